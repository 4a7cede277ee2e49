"""Checks of inputs and targets together: do they belong together, are labels wrong, is the answer visible."""

import contextlib
from typing import Any

import jax
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.dynamics import stuck
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.examples import Data, one_array
from nnlearn.diagnose.facts import Facts, facts_of
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.probes import FREQUENT, area_under_curve, dependence, neighbours, ridge, scores, standard
from nnlearn.diagnose.report import found

SHIFTS = (-3, -2, -1, 1, 2, 3)  # rows by which targets may have moved
LEAK = 0.995  # area under the curve, or explained share, of one feature alone
MANY = 15  # neighbours that vote on a label


@check("targets belong to their inputs")
def alignment(evidence: Evidence) -> Seen:
    """Whether the targets can be predicted from the inputs at all, better than shuffled ones."""
    facts = facts_of(evidence)
    if facts.data.kind == "sequence":
        return sequence_alignment(facts)
    if same_shape_as_inputs(facts) and np.array_equal(facts.targets, facts.data.inputs[facts.rows][:, :64]):
        raise Unknown("the targets are the inputs")
    (mean, deviation), reached = facts.by_chance, facts.dependence(facts.targets)
    values = {"dependence": reached, "shuffled": mean, "deviation of shuffled": deviation}
    rule = "targets correlate with simple predictions more than by chance + 5 deviations, or the network's do"
    if facts.are_dependent:
        return Seen(values, rule)
    name, where = "misaligned_labels", "targets"
    moved = {shift: facts.dependence(moved_targets(facts, shift)) for shift in SHIFTS}
    shift = max(moved, key=lambda each: moved[each])
    if moved[shift] > mean + max(8 * deviation, 0.1):
        values |= {"dependence after a shift": moved[shift], "shift": shift}
        text = (
            f"The targets do not depend on their inputs (correlation {reached:.2f}, shuffled {mean:.2f}), "
            f"but on the inputs {abs(shift)} row{'s' * (abs(shift) > 1)} "
            f"{'before' if shift > 0 else 'after'} ({moved[shift]:.2f}): they have moved."
        )
        return Seen(values, rule, [found(name, text, values, strength=0.97, where=where)])
    on_validation = validation_alignment(facts)
    values["dependence in validation"] = on_validation
    text = f"The training targets do not depend on their inputs (correlation {reached:.2f}, shuffled {mean:.2f})"
    if on_validation > mean + max(6 * deviation, 0.1):
        text += f", but those of validation do ({on_validation:.2f})."
        partly = reached > mean + 2.5 * deviation  # a share of the targets is right
        findings = [found(name, text, values, strength=0.5 if partly else 0.95, where="training targets")]
        if partly:
            findings.append(found("label_noise", text, values, strength=0.9, where="training labels"))
        return Seen(values, rule, findings)
    if stuck(evidence):
        raise Unknown("simple predictors do not know the targets, and the network hardly moved")
    try:
        others = [each.validation_score for each in evidence.variants.values()]
        useful = float(np.nanmax([facts.reached_on_validation, *others])) - facts.guessing
    except Unknown:
        useful = np.nan
    values["network on validation, above guessing"] = useful
    if useful > 0.07:
        return Seen(values, rule)
    first, last = evidence.same_losses
    if np.isnan(useful) and last < first - 0.3 * abs(first):
        raise Unknown("simple predictors do not know the targets, and whether the network does is not known")
    text += ", and the network does not do better than guessing on validation." if np.isfinite(useful) else "."
    return Seen(values, rule, [found(name, text, values, strength=0.8, where=where)])


def same_shape_as_inputs(facts: Facts) -> bool:
    """An autoencoder, or a network for sequences of values."""
    targets = np.asarray(facts.data.targets)
    numbers = facts.data.kind in ("values", "labels")
    return numbers and targets.size >= facts.data.inputs.size and targets.size > len(targets)


def moved_targets(facts: Facts, shift: int) -> np.ndarray:
    rows = (facts.rows + shift) % len(facts.data.inputs)
    return facts.columns(facts.data, rows)


def validation_alignment(facts: Facts) -> float:
    """How much targets of validation depend on their inputs; NaN without validation."""
    try:
        validation, rows = facts.evidence.validation, facts.validation_rows
        if len(rows) < 30:
            return np.nan
        (features,) = standard(facts.features(validation.inputs[rows]))
        targets = facts.columns(validation, rows)
        return dependence(neighbours(features, features), targets)
    except Unknown:
        return np.nan


def moved_positions(facts: Facts) -> tuple[int, float, float]:
    """By how many positions the targets of training have moved relative to those of validation.

    It compares which input each target equals, for every pair of positions.

    Returns:
      The shift, and the agreement of the tables with it and without.
    """

    def table(data: Data) -> np.ndarray:
        targets, tokens = np.asarray(data.targets)[:1000], data.inputs[:1000].astype(np.int64)
        if targets.shape != tokens.shape or targets.shape[1] < 6:
            raise Unknown("the targets are not a sequence as long as that of the inputs")
        return np.mean(targets[:, :, None] == tokens[:, None, :], axis=0)

    train, validation = table(facts.data), table(facts.evidence.validation)
    length = len(train)

    def agreement(shift: int) -> float:
        kept = length - abs(shift)
        one = train[:kept] if shift >= 0 else train[-shift:]
        other = validation[shift:] if shift >= 0 else validation[:kept]
        return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])

    if validation.std() < 0.05:
        raise Unknown("no target equals an input at a fixed position")
    agreements = {shift: agreement(shift) for shift in (0, *SHIFTS)}
    best = max(agreements, key=lambda each: agreements[each])
    return best, agreements[best], agreements[0]


def sequence_alignment(facts: Facts) -> Seen:
    """Whether targets are inputs at another position: the next token is right, others are not."""
    with contextlib.suppress(Unknown):
        shift, with_shift, without = moved_positions(facts)
        if shift and with_shift > 0.9 and without < 0.6:
            values = {"shift": shift, "agreement with it": with_shift, "without": without}
            text = f"The training targets have moved by {shift:+d} positions relative to those of validation."
            finding = found("misaligned_labels", text, values, strength=0.95, where="training targets")
            return Seen(values, "training targets relate to inputs as those of validation do", [finding])
    targets, tokens = np.asarray(facts.data.targets), facts.data.inputs
    if facts.tokens is None or targets.shape != tokens.shape or targets.shape[1] < 6:
        raise Unknown("the targets are not a sequence as long as that of the inputs")
    targets, tokens = targets[facts.rows], tokens[facts.rows].astype(np.int64)
    used = targets >= 0  # negative numbers mark positions without a target

    def equal(offset: int) -> float:
        length = targets.shape[1] - abs(offset)
        mine = slice(0, length) if offset >= 0 else slice(-offset, None)
        theirs = slice(offset, None) if offset >= 0 else slice(0, length)
        same, where = targets[:, mine] == tokens[:, theirs], used[:, mine]
        return float(np.mean(same[where])) if where.any() else 0.0

    shares = {offset: equal(offset) for offset in range(-3, 4)}
    values = {f"equal to the input at {offset:+d}": share for offset, share in shares.items()}
    rule = "targets are not copies of inputs at another position than the next one"
    best = max(shares, key=lambda each: shares[each])
    if shares[best] < 0.95 or best == 1:
        return Seen(values, rule)
    if best == 0:
        text = f"{shares[0]:.0%} of the targets equal the input at their own position: the answer is visible."
        return Seen(
            values,
            rule,
            [
                found("target_leak", text, values, strength=0.9, where="targets"),
                found("misaligned_labels", text, values, strength=0.85, where="targets"),
            ],
        )
    text = f"{shares[best]:.0%} of the targets equal the input {best:+d} positions away; the next token is at +1."
    findings = [found("misaligned_labels", text, values, strength=0.9, where="targets")]
    if best < 0:
        findings.append(found("target_leak", text, values, strength=0.7, where="targets"))
    return Seen(values, rule, findings)


@check("two views of an example belong together")
def views(evidence: Evidence) -> Seen:
    """Whether one view predicts the other, better than a shuffled one, in training as in validation."""
    facts = facts_of(evidence)
    subject = evidence.subject
    one, other = two_views(subject.inputs, facts.rows)
    reached, mean, deviation = view_score(one, other)
    values = {"predictable": reached, "shuffled": mean, "deviation of shuffled": deviation}
    rule = "one view predicts the other better than a shuffled one + 5 deviations, if it does in validation"
    if reached > mean + max(5 * deviation, 0.02):
        return Seen(values, rule)
    if subject.validation is None:
        raise Unknown("one view does not predict the other, and there is no validation to compare with")
    held_out, mean, deviation = view_score(*two_views(subject.validation[0], facts.validation_rows))
    values |= {"predictable on validation": held_out}
    if held_out < mean + max(6 * deviation, 0.05):
        return Seen(values, rule)
    text = (
        f"In training the first view of an example does not predict the second ({reached:.2f}), but in validation it "
        f"does ({held_out:.2f}): the views are paired wrongly."
    )
    return Seen(values, rule, [found("misaligned_labels", text, values, strength=0.95, where="views")])


def two_views(inputs: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of equal shape, or the halves of one array of shape (n, 2, features)."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
    if len(leaves) == 1 and leaves[0].ndim == 3 and leaves[0].shape[1] == 2 and leaves[0].shape[2] >= 4:
        leaves = [leaves[0][:, 0], leaves[0][:, 1]]
    if len(leaves) != 2 or leaves[0].shape != leaves[1].shape or leaves[0].ndim < 2 or leaves[0].dtype.kind != "f":
        raise Unknown("the inputs are not two views")
    one, other = (leaf[rows].reshape(len(rows), -1).astype(np.float64) for leaf in leaves)
    return one, other


def view_score(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """The share of a view that the other explains, and the mean and deviation of it for shuffled pairs."""
    first, second = standard(one)[0], standard(other)[0][:, :64]
    weights = ridge(first, first, 0.1).weights
    random = np.random.default_rng(6)
    shuffled = [second[random.permutation(len(second))] for _ in range(5)]
    chance = [scores(weights @ each, each, "values") for each in shuffled]
    return scores(weights @ second, second, "values"), float(np.mean(chance)), float(np.std(chance))


@check("labels agree with those of similar examples")
def label_noise(evidence: Evidence) -> Seen:
    """Whether neighbours contradict labels: more than on validation, or in all classes alike."""
    facts = facts_of(evidence)
    if facts.data.kind == "sequence" or same_shape_as_inputs(facts):
        raise Unknown("the targets are not one class or value per example")
    if not facts.are_dependent:
        raise Unknown("the targets cannot be predicted from the inputs at all")
    values: dict[str, float] = {"predictable": facts.attainable}
    findings, rule = [], "at most 15 % less predictable than validation, and at most 25 % contradicted alike by all"
    try:
        clean = facts.attainable_on_validation
        values["predictable on validation"] = clean
        balanced = not facts.is_classes or facts.targets.mean(0).max() <= FREQUENT  # else few examples decide
        gap = clean - facts.attainable if balanced else 0.0
        count = min(len(facts.rows), len(facts.validation_rows))
        if gap > max(0.15, 4 * 0.5 / np.sqrt(count)) and clean > 0.5 and not averaged_out(facts, clean):
            text = (
                f"Simple predictors, fitted to the training examples, are right on validation "
                f"({clean:.0%}) more often than on training examples that they have not seen ({facts.attainable:.0%}): "
                f"a share of about {1 - facts.attainable / clean:.0%} of the training labels is wrong."
            )
            values["share of wrong labels"] = 1 - facts.attainable / clean
            findings.append(found("label_noise", text, values, strength=0.9, where="training labels"))
    except Unknown:
        pass
    if not findings and facts.is_classes and len(facts.classes) >= 3:
        contradicted, evenness = contradictions(facts)
        values |= {"contradicted": contradicted, "evenness": evenness}
        try:  # a network that is right more often than its neighbours agree shows that these are wrong
            right = facts.reached_on_validation
        except Unknown:
            right = 0.0
        if contradicted > 0.25 and evenness > 0.85 and right < 1 - 0.8 * contradicted:
            text = (
                f"The neighbours of {contradicted:.0%} of the examples agree on another class than their label, and "
                "the wrong labels are spread over all classes: many labels are random."
            )
            findings.append(found("label_noise", text, values, strength=0.8, where="labels"))
    return Seen(values, rule, findings)


def averaged_out(facts: Facts, clean: float) -> bool:
    """Whether targets are values, whose noise the network averages: it does on validation what predictors can do."""
    if facts.is_classes:
        return False
    try:
        return facts.reached_on_validation >= clean - 0.02
    except Unknown:
        return False


def contradictions(facts: Facts) -> tuple[float, float]:
    """The share of labels that a clear majority of neighbours contradicts, and how evenly they spread over classes."""
    (features,) = standard(facts.features(facts.data.inputs[facts.rows]))
    votes = neighbours(features, features, MANY).weights @ facts.targets
    ordered = np.sort(votes, 1)
    clear = (ordered[:, -1] >= 0.35) & (ordered[:, -1] >= 2 * ordered[:, -2])
    said, label = np.argmax(votes, 1), np.argmax(facts.targets, 1)
    wrong = clear & (said != label)
    if wrong.sum() < 20 or clear.sum() < 0.2 * len(clear):
        return 0.0, 0.0
    classes = facts.targets.shape[1]
    table = np.zeros((classes, classes))
    np.add.at(table, (said[wrong], label[wrong]), 1)
    expected = np.outer(table.sum(1), table.sum(0)) + 1e-9
    np.fill_diagonal(expected, 0)
    expected *= table.sum() / expected.sum()
    distance = 0.5 * np.abs(table - expected).sum() / table.sum()
    noise = 0.4 * np.sqrt(np.count_nonzero(expected) / table.sum())  # of the distance for random labels
    return float(wrong.sum() / clear.sum()), float(1 - max(distance - noise, 0))


@check("no feature gives the answer away")
def visible_answer(evidence: Evidence) -> Seen:
    facts = facts_of(evidence)
    inputs = facts.data.inputs[facts.rows]
    if facts.data.kind == "sequence":
        return visible_future(facts)
    if same_shape_as_inputs(facts) or facts.tokens is not None or inputs.shape[1] < 3:
        raise Unknown("the inputs are not a table of three features or more")
    if evidence.loops and np.ndim(jax.tree.leaves(evidence.subject.inputs)[0]) == 3:
        return visible_value(facts, inputs)
    single = classes_by_feature(facts, inputs) if facts.is_classes else values_by_feature(facts, inputs)
    order = np.argsort(-single)
    rest = float(single[order[min(_group(single, order), len(order) - 1)]])
    best = float(single[order[0]])
    values = {"best single feature": best, "best of the others": rest, "feature": int(order[0])}
    rule = f"no feature alone above {LEAK:g}, where the others are not as good"
    if best < LEAK or rest > 0.985:
        return Seen(values, rule)
    measure = "separates the classes" if facts.is_classes else "explains the targets"
    text = (
        f"Feature {order[0]} alone {measure} almost perfectly ({best:.3f}); the best of the other features reaches "
        f"{rest:.3f}. It may have been computed from the target."
    )
    return Seen(values, rule, [found("target_leak", text, values, strength=0.93, where=f"feature {order[0]}")])


def visible_value(facts: Facts, inputs: np.ndarray) -> Seen:
    """Whether a number at some place of a sequence is the target itself; one step may decide, but not be equal."""
    if facts.is_classes or facts.targets.shape[1] != 1:
        raise Unknown("the inputs are sequences, of which one step may decide")
    alike = correlations(inputs, facts.targets[:, 0])
    values = {"largest correlation of a number with the target": float(alike.max()), "place": int(np.argmax(alike))}
    rule = "below 0.9999"
    if alike.max() < 0.9999:
        return Seen(values, rule)
    text = f"Number {np.argmax(alike)} of each input sequence is the target, but for its scale."
    return Seen(values, rule, [found("target_leak", text, values, strength=0.95, where="inputs")])


def _group(single: np.ndarray, order: np.ndarray) -> int:
    """How many features leak: those above the bound, at most a quarter of all."""
    return int(min(max((single >= LEAK).sum(), 1), max(1, len(order) // 4)))


def classes_by_feature(facts: Facts, inputs: np.ndarray) -> np.ndarray:
    """How well each feature alone separates the classes: the accuracy of its nearest values, rescaled to [0.5, 1]."""
    labels = np.argmax(facts.targets, 1)
    if len(facts.classes) == 2:
        return area_under_curve(inputs, labels == 1)
    chance = np.bincount(labels).max() / len(labels)
    accuracy = np.zeros(inputs.shape[1])
    for column in range(inputs.shape[1]):
        order = np.argsort(inputs[:, column], kind="stable")
        ordered, value = labels[order], inputs[order, column]
        first = np.searchsorted(value, value, "left")
        last = np.searchsorted(value, value, "right")
        counts = np.concatenate([np.zeros((1, facts.targets.shape[1])), np.cumsum(facts.targets[order], 0)])
        # Votes of equal values and of the two nearest ranks, without the example itself.
        low, high = (
            np.maximum(np.minimum(first, np.arange(len(order)) - 2), 0),
            np.minimum(np.maximum(last, np.arange(len(order)) + 3), len(order)),
        )
        votes = counts[high] - counts[low] - facts.targets[order]
        accuracy[column] = np.mean(np.argmax(votes, 1) == ordered)
    return 0.5 + 0.5 * np.clip((accuracy - chance) / (1 - chance), 0, 1)


def correlations(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The absolute correlation of each column with some values."""
    columns, values = columns - columns.mean(0), values - values.mean()
    norm = np.sqrt(np.sum(columns**2, 0) * np.sum(values**2)) + 1e-30
    return np.abs(values @ columns / norm)


def values_by_feature(facts: Facts, inputs: np.ndarray) -> np.ndarray:
    """The share of the targets' variance that the ranks or the values of each feature explain, rescaled to [0.5, 1]."""
    target = facts.targets[:, 0]
    if facts.targets.shape[1] > 1:
        raise Unknown("there are several targets")

    ranks = np.argsort(np.argsort(inputs, axis=0), axis=0).astype(np.float64)
    by_rank = correlations(ranks, np.argsort(np.argsort(target)).astype(np.float64))
    best = np.maximum(correlations(inputs, target), by_rank)
    return 0.5 + 0.5 * best**2


def visible_future(facts: Facts) -> Seen:
    """Whether outputs of a model of the next token change with the tokens that they are to predict."""
    evidence = facts.evidence
    if facts.tokens is None:
        raise Unknown("the inputs are not sequences of tokens")
    inputs, targets = one_array(evidence.subject.inputs)[:8], np.asarray(facts.data.targets)[:8]
    if inputs.shape != targets.shape or inputs.shape[1] < 6:
        raise Unknown("the targets are not a sequence as long as that of the inputs")
    used = targets[:, :-1] >= 0
    following = float(np.mean((targets[:, :-1] == inputs[:, 1:])[used])) if used.any() else 0.0
    if following < 0.95:
        raise Unknown("the targets are not the next tokens")
    middle = inputs.shape[1] // 2
    changed = np.array(inputs)
    changed[:, middle:] = (changed[:, middle:] + 1 + np.arange(inputs.shape[1] - middle) % 3) % facts.tokens
    as_given = jax.tree.structure(evidence.subject.inputs)
    before, after = (facts.evaluate(jax.tree.unflatten(as_given, [each])) for each in (inputs, changed))
    if before.ndim < 3 or before.shape[1] != inputs.shape[1]:
        raise Unknown("predict gives no outputs per position")
    difference = np.abs(before - after)[:, : middle - 1].max() / (np.abs(before).max() + 1e-12)
    values = {"change of earlier outputs": float(difference)}
    rule = "outputs do not depend on later inputs"
    if difference < 1e-3:
        return Seen(values, rule)
    text = f"The outputs at the first {middle - 1} positions change ({difference:.0%}) with tokens that come later."
    remedy = "mask the future in attention: jnp.tril(jnp.ones((length, length), bool))"
    return Seen(values, rule, [found("target_leak", text, values, strength=0.95, where="inputs", remedies=[remedy])])


CHECKS: tuple[NamedCheck, ...] = (alignment, views, label_noise, visible_answer)
