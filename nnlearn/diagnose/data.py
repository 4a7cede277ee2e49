"""Checks of the examples: scale of the targets, numbering of classes, order, balance."""

import jax
import numpy as np

from nnlearn.data import MaskedBatch
from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.facts import Facts, facts_of
from nnlearn.diagnose.gains import LOWER
from nnlearn.diagnose.metric import tolerance
from nnlearn.diagnose.parts import Unknown, parts_of
from nnlearn.diagnose.probes import FREQUENT, said_yes, standard
from nnlearn.diagnose.report import found

GOOD = 0.97  # an accuracy, or an explained share, with which nobody looks for a fault


def learned_well(facts: Facts) -> bool:
    """Whether the network is about perfect on training examples, and not worse than simple predictors on others."""
    try:
        if facts.reached < GOOD:
            return False
        return facts.evidence.subject.validation is None or (
            facts.reached_on_validation >= min(GOOD, facts.attainable_on_validation) - 0.03
        )
    except Unknown:
        return False


@check("regression targets have about unit scale")
def target_scale(evidence: Evidence) -> Seen:
    facts = facts_of(evidence)
    if facts.data.kind != "values":
        raise Unknown("the targets are not values of a regression")
    targets = np.asarray(facts.data.targets, np.float64).reshape(len(facts.data.inputs), -1)
    deviation = float(np.sqrt(np.mean(targets.var(0))))
    offset = float(np.sqrt(np.mean(targets.mean(0) ** 2)))
    values = {"deviation": deviation, "offset": offset}
    rule = "deviation between 0.05 and 10, offset at most 5 deviations and 10; or it does no harm"
    odd = deviation > 10 or 0 < deviation < 0.05 or (offset > 5 * deviation and offset > 1) or offset > 30
    if not odd or learned_well(facts):
        return Seen(values, rule)
    reached, attainable = facts.fairly_reached, facts.attainable
    values |= {"explained by the network": reached, "explained by simple predictors": attainable}
    slower = max((each.score for name, each in evidence.variants.items() if name in LOWER), default=0.0)
    mild = deviation <= 10 and offset <= 30
    if facts.shortfall <= 0.05 or (mild and slower > attainable - 0.05):  # a lower rate is all that it needs
        return Seen(values, rule)
    text = (
        f"The targets have mean {targets.mean():.3g} and deviation {deviation:.3g}. The network explains "
        f"{max(reached, 0):.0%} of their variance; simple predictors on unseen examples explain {attainable:.0%}."
    )
    return Seen(values, rule, [found("unnormalised_targets", text, values, strength=0.9, where="targets")])


@check("class numbers fit the outputs")
def class_numbers(evidence: Evidence) -> Seen:
    facts = facts_of(evidence)
    classes, targets = facts.classes, np.asarray(facts.data.targets)
    if targets.ndim > 1 and facts.data.kind == "one-hot":
        raise Unknown("the targets are one-hot")
    outputs = facts.outputs.train
    units = outputs.shape[-1] if outputs.ndim == targets.ndim + 1 or outputs.ndim == 2 else 1
    values = {"classes": len(classes), "smallest": classes[0], "largest": classes[-1], "outputs": units}
    rule = "from 0 to outputs - 1, the same in training and validation"
    findings = []
    if units > 1 and (classes[0] < 0 or classes[-1] >= units):
        text = (
            f"The labels go from {classes[0]} to {classes[-1]}, but the network has {units} outputs, 0 to {units - 1}."
        )
        share = float(np.mean((targets < 0) | (targets >= units)))
        findings.append(found("label_encoding", text, values | {"share outside": share}, strength=0.97, where="labels"))
    elif units == 1 and len(classes) == 2 and classes[0] >= 1:
        text = f"The labels are {classes[0]} and {classes[-1]}; a single output stands for 0 and 1."
        findings.append(found("label_encoding", text, values, strength=0.9, where="labels"))
    return Seen(values, rule, findings)


@check("validation has the classes of training")
def validation_classes(evidence: Evidence) -> Seen:
    """Other numbers, or a consistent exchange of classes between what the network says and the labels."""
    facts = facts_of(evidence)
    validation = evidence.validation
    if validation.labels is None:
        raise Unknown("the targets of validation are not classes")
    unknown = float(np.mean(~np.isin(validation.labels, facts.classes)))
    outputs, values = facts.outputs, {"share of unknown classes": unknown}
    rule = "no class that training lacks, and no exchange of classes"
    findings = []
    if outputs.validation is None or outputs.validation_targets is None:
        raise Unknown("no validation data were given")
    labels = validation_labels(outputs.validation_targets)
    said = decisions(outputs.validation, labels, facts)
    plain = float(np.mean(said == labels))
    exchanged, pairs = best_exchange(said, labels)
    values |= {"accuracy": plain, "accuracy after the best renumbering": exchanged}
    fewer = len(np.unique(labels)) <= 0.7 * len(facts.classes) and len(labels) >= 20
    goes_on = bool(np.all(np.diff(facts.data.labels) >= 0) and np.min(validation.labels) >= np.max(facts.data.labels))
    if unknown > 0.2 and (fewer or goes_on):  # other numbers would keep the number of classes
        text = (
            f"{unknown:.0%} of the validation examples are of {len(np.unique(labels))} classes that training does not "
            "have: the split cut off the end of examples that are sorted by class."
        )
        remedy = "shuffle the examples before the split, or draw the same share of each class"
        finding = found("unshuffled_data", text, values, strength=0.95, where="split", remedies=[remedy])
        return Seen(values, rule, [finding])
    if unknown > 0.02 and len(facts.classes) < 200:
        text = f"{unknown:.0%} of the validation labels are classes that training does not have."
        findings.append(found("label_encoding", text, values, strength=0.9, where="validation labels"))
    if exchanged > plain + 0.3 and exchanged > 0.6 and len(labels) >= 20:
        shown = ", ".join(f"{a} as {b}" for a, b in pairs[:3])
        text = (
            f"On validation the accuracy is {plain:.0%}, and {exchanged:.0%} if classes are renumbered "
            f"({shown}): validation numbers the classes in another way."
        )
        findings.append(found("label_encoding", text, values, strength=0.95, where="validation labels"))
    return Seen(values, rule, findings)


def validation_labels(targets: np.ndarray) -> np.ndarray:
    targets = np.asarray(targets)
    return np.argmax(targets, -1) if targets.ndim == 2 and targets.shape[1] > 1 else targets.reshape(-1).astype(int)


def decisions(outputs: np.ndarray, labels: np.ndarray, facts: Facts) -> np.ndarray:
    """The class that the network gives to each example."""
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return np.argmax(outputs, -1)
    if outputs.size == len(outputs) and len(facts.classes) == 2:
        return np.where(said_yes(outputs, labels == facts.classes[1]), facts.classes[1], facts.classes[0])
    raise Unknown("the shapes of predict's outputs do not tell the classes")


def best_exchange(said: np.ndarray, labels: np.ndarray) -> tuple[float, list[tuple[int, int]]]:
    """The accuracy after the best one-to-one renumbering of what was said, and the classes that it changes.

    >>> best_exchange(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
    (1.0, [(0, 1), (1, 0)])
    """
    from scipy.optimize import linear_sum_assignment

    names = np.union1d(said, labels)
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (np.searchsorted(names, said), np.searchsorted(names, labels)), 1)
    rows, columns = linear_sum_assignment(-counts)
    pairs = [(int(names[i]), int(names[j])) for i, j in zip(rows, columns, strict=True) if i != j and counts[i, j]]
    return float(counts[rows, columns].sum() / len(said)), pairs


@check("batches mix the examples")
def order_of_batches(evidence: Evidence) -> Seen:
    """Variance of the batches' mean targets, relative to that of random batches."""
    subject, facts = evidence.subject, facts_of(evidence)
    epoch = subject.train.batches.epoch_steps or 64
    batches = subject.plan.batches(np.arange(int(min(epoch, subject.steps, 256))))
    batches = batches.examples if isinstance(batches, MaskedBatch) else batches
    if isinstance(batches, tuple | list) and len(batches) > 2 and not hasattr(batches, "inputs"):
        raise Unknown("the batches hold more than inputs and targets")
    targets = np.asarray(parts_of(jax.tree.map(np.asarray, batches))[1])
    if targets.ndim < 2 or targets.shape[1] < 2 or len(targets) < 3:
        raise Unknown("too few batches or examples in a batch to compare")
    count, size = targets.shape[:2]
    if facts.is_classes:
        flat = targets.reshape(count, size, -1)
        columns = flat if flat.shape[-1] > 1 else (flat == facts.classes).astype(np.float64)
    else:
        columns = targets.reshape(count, size, -1).astype(np.float64)[..., :64]
    total = columns.reshape(count * size, -1).var(0).sum()
    if not total > 0:
        raise Unknown("the targets are constant, or not all known")
    ratio = float(columns.mean(1).var(0).sum() * size / total * count / (count - 1))
    values = {"variance between batches / that of random batches": ratio, "batches": count, "batch size": size}
    rule = "at most 1 + 5 deviations, and at most 3; or it does no harm"
    limit = max(3.0, 1 + 5 * np.sqrt(2 / (count - 1)))
    if not ratio > limit or learned_well(facts) or not facts.falls_short(0.02):
        return Seen(values, rule)
    share = np.sqrt(ratio / size)
    text = (
        f"The targets of one batch resemble each other: the means of batches vary {ratio:.1f} times as much as those "
        f"of random batches of {size}."
    )
    strength = 0.95 if share > 0.4 or ratio > 10 else 0.75
    return Seen(values, rule, [found("unshuffled_data", text, values, strength=strength, where="batches")])


@check("the rare classes are learned")
def balance(evidence: Evidence) -> Seen:
    facts = facts_of(evidence)
    labels, classes = facts.data.labels, facts.classes
    if labels is None or len(classes) < 2:
        raise Unknown("there are not two classes")
    frequent, shares = frequencies(facts)
    largest = float(shares.max())
    values = {"share of the largest class": largest, "share of the smallest class": float(shares.min())}
    rule = "no class above 70 %, or the recall of the others not below half of what a balanced predictor reaches, and "
    rule += "the network does not say it for 20 % more of the validation examples than are of it"
    if largest < FREQUENT:
        return Seen(values, rule)
    outputs = facts.outputs
    true = validation_labels(outputs.train_targets)
    said = decisions(outputs.train, true, facts)
    rare = true != frequent
    if rare.sum() < 3:
        raise Unknown("too few examples of rare classes")
    recall = float(np.mean(said[rare] == true[rare]))
    says_frequent = float(np.mean(said == frequent))
    fair = balanced_recall(facts, frequent)
    values |= {"recall of the rare classes": recall, "recall of a balanced predictor": fair, "said": says_frequent}
    often, share = overstated(facts, frequent)
    if often > share + 0.2:
        values |= {"said on validation": often, "share in validation": share}
        text = (
            f"{largest:.0%} of the training examples are of class {frequent}. The network says it for {often:.0%} of "
            f"the validation examples, of which {share:.0%} are of that class."
        )
        return Seen(values, rule, [found("class_imbalance", text, values, strength=0.85, where=f"class {frequent}")])
    above = recall + 1 / np.sqrt(rare.sum())  # by two standard errors, because they are few
    if not (above < 0.5 and above < 0.75 * fair and fair > 0.4):
        return Seen(values, rule)
    text = (
        f"{largest:.0%} of the examples are of class {frequent}, and the network says it for {says_frequent:.0%}: it "
        f"finds {recall:.0%} of the others, a balanced linear predictor {fair:.0%}."
    )
    return Seen(values, rule, [found("class_imbalance", text, values, strength=0.85, where=f"class {frequent}")])


@check("rare positive targets are predicted")
def rare_targets(evidence: Evidence) -> Seen:
    """Many targets of 0 and 1 per example, few of them 1: outputs that rank them well, but never say 1."""
    outputs, targets = evidence.history.train, np.asarray(evidence.history.train_targets, np.float64)
    if outputs is None or np.shape(outputs[-1]) != targets.shape or targets.size == len(targets):
        raise Unknown("there are not several targets of 0 and 1 per example")
    said, truth = np.asarray(outputs[-1], np.float64).ravel(), targets.ravel() > 0.5
    if not set(np.unique(targets)) <= {0.0, 1.0} or truth.sum() < 10:
        raise Unknown("there are not several targets of 0 and 1 per example")
    share, middle = float(truth.mean()), 0.5 if said.min() >= 0 and said.max() <= 1 else 0.0
    rank = float(np.mean(np.searchsorted(np.sort(said[~truth]), said[truth]) / max(np.sum(~truth), 1)))
    recall = float(np.mean(said[truth] > middle))
    first, last = float(evidence.metrics[0]), float(evidence.metrics[-1])
    values = {"share of ones": share, "share of ones that are found": recall, "ones rank above zeros": rank}
    values["metric"] = abs(last)
    rule = "15 % of the ones are found, where outputs rank them above 80 % of the zeros; or the metric improves"
    stands = np.isfinite(last) and last <= first + tolerance(first, last)
    if not (share < 1 - FREQUENT and recall < 0.15 and rank > 0.8 and stands):
        return Seen(values, rule)
    text = (
        f"{share:.1%} of the targets are 1. The outputs rank them above {rank:.0%} of the others, but say 1 for "
        f"{recall:.0%} of them: the loss is won by saying 0."
    )
    return Seen(values, rule, [found("class_imbalance", text, values, strength=0.85, where="targets")])


def frequencies(facts: Facts) -> tuple[int, np.ndarray]:
    """The most frequent class, and the share of each class that occurs."""
    classes, counts = np.unique(facts.data.labels, return_counts=True)
    return classes[np.argmax(counts)], counts / counts.sum()


def overstated(facts: Facts, frequent: int) -> tuple[float, float]:
    """How often the network says a class on validation, and how often it occurs there; zeros if it is not known."""
    outputs = facts.outputs
    if outputs.validation is None or facts.evidence.validation.labels is None:
        return 0.0, 0.0
    labels = validation_labels(outputs.validation_targets)
    return float(np.mean(decisions(outputs.validation, labels, facts) == frequent)), float(np.mean(labels == frequent))


def favours_rare(facts: Facts) -> bool:
    """Whether the network says a very frequent class more rarely than it occurs, as after a weighted loss."""
    if facts.data.labels is None:
        return False
    frequent, shares = frequencies(facts)
    if shares.max() < FREQUENT:
        return False
    try:
        said = decisions(facts.outputs.train, validation_labels(facts.outputs.train_targets), facts)
    except Unknown:
        return False
    return bool(np.mean(said == frequent) < shares.max() - 0.03)


def balanced_recall(facts: Facts, frequent: int) -> float:
    """The recall of the rare classes of a ridge regression whose classes weigh the same; 0 if it is no better."""
    (features,) = standard(facts.features(facts.data.inputs[facts.rows]))
    targets = facts.targets
    weight = 1 / np.maximum(targets.sum(0), 1)
    each = np.sqrt(targets @ weight)[:, None]
    features = np.concatenate([features, np.ones((len(features), 1))], 1)
    said = np.zeros(len(features), int)
    first = np.arange(len(features)) % 2 == 0
    for fold in (first, ~first):
        x, y = features[~fold] * each[~fold], targets[~fold] * each[~fold]
        solution = np.linalg.solve(x.T @ x + 1e-2 / len(weight) * np.eye(x.shape[1]), x.T @ y)
        said[fold] = np.argmax(features[fold] @ solution, 1)
    true = np.argmax(targets, 1)
    rare = facts.classes[true] != frequent
    if rare.sum() < 3:
        return 0.0
    recall, false = np.mean(said[rare] == true[rare]), np.mean(facts.classes[said[~rare]] != frequent)
    return float(recall) if recall > false + 0.2 else 0.0


CHECKS: tuple[NamedCheck, ...] = (
    target_scale,
    class_numbers,
    validation_classes,
    order_of_batches,
    balance,
    rare_targets,
)
