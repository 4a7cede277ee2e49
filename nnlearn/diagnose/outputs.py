"""Checks of the network's outputs and the loss as functions: which formula it is, what it depends on."""

import math
import re
from typing import Any

import jax
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.data import learned_well, validation_labels
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.examples import some
from nnlearn.diagnose.facts import UNLOGGED, Facts, facts_of
from nnlearn.diagnose.formulas import binary_formulas, class_formulas, value_formulas, wrong_signs
from nnlearn.diagnose.gains import LOWER, gain, poor
from nnlearn.diagnose.metric import unmoved
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.report import found
from nnlearn.diagnose.subject import params_of

CLOSE = 0.01  # relative difference of two losses that are the same formula
FAR = 12.0  # a logit whose sigmoid is 1 in half precision
ROWS = 64
ONE_SIDED = "count both classes: -(y log p + (1 - y) log(1 - p)), or optax.sigmoid_binary_cross_entropy"


WRONG = {  # formula -> finding, in words
    "softmax over the batch": ("wrong_axis_or_reduction", "a softmax over the examples of the batch, not the classes"),
    "softmax twice": ("loss_output_mismatch", "a softmax of a softmax"),
    "sigmoid before softmax": ("loss_output_mismatch", "a softmax of sigmoids"),
    "sigmoid twice": ("loss_output_mismatch", "a sigmoid of a sigmoid"),
    "every output minus every target": (
        "wrong_axis_or_reduction",
        "the difference of every output and every target: shapes (n, 1) and (n,) broadcast to (n, n)",
    ),
}
WRONG["absolute, every output minus every target"] = WRONG["every output minus every target"]


def pair(evidence: Evidence) -> tuple[np.ndarray, Any, Any, float]:
    """Outputs, inputs and targets of some training examples, and their loss in the run's own form."""
    facts, subject = facts_of(evidence), evidence.subject
    inputs, targets = some((subject.inputs, subject.targets), ROWS)
    return facts.evaluate(inputs).astype(np.float64), inputs, targets, facts.loss(inputs, targets)


@check("the loss is the usual formula of the outputs")
def formula(evidence: Evidence) -> Seen:
    facts = facts_of(evidence)
    outputs, _, targets, loss = pair(evidence)
    targets = np.asarray(targets)
    if not (np.all(np.isfinite(outputs)) and np.isfinite(loss)):
        raise Unknown("outputs or loss are not finite")
    every = np.asarray(evidence.history.train)  # at every snapshot, as a trained network's may lie there by chance
    squashed = bool(np.nanmin(every) >= 0 and np.nanmax(every) <= 1)
    if facts.is_classes and outputs.ndim == 2 and outputs.shape[1] > 1 and len(outputs) == len(targets):
        labels = np.argmax(targets, -1) if targets.ndim == 2 and targets.shape[1] > 1 else targets.reshape(-1)
        labels = labels.astype(int)
        if labels.min() < 0 or labels.max() >= outputs.shape[1]:
            raise Unknown("the labels do not fit the outputs")
        formulas = class_formulas(outputs, labels, squashed)
        trivial = class_formulas(np.broadcast_to(outputs.mean(0), outputs.shape), labels, squashed)
    elif outputs.size == len(outputs) == targets.size:
        flat, values = outputs.reshape(-1), targets.reshape(-1).astype(np.float64)
        formulas, trivial = value_formulas(flat, values), {}
        if facts.is_classes and set(np.unique(values)) <= {0.0, 1.0}:
            close = [name for name, value in formulas.items() if near(loss, value)]
            formulas |= {} if close else binary_formulas(flat, values, squashed)
            trivial = {} if close else binary_formulas(np.full(len(flat), flat.mean()), values, squashed)
    else:
        raise Unknown("no formula is known for outputs and targets of these shapes")
    values = {"loss": loss, **formulas}
    rule = "not one of the known wrong formulas"
    if any("right" in name and near(loss, value) for name, value in formulas.items()):
        return Seen(values, rule)
    findings = []
    harmless = learned_well(facts) and not unmoved(evidence.metrics)  # predict may read the outputs otherwise
    for name, value in formulas.items():
        vague = near(value, trivial.get(name, np.nan), 3 * CLOSE)  # as good as a constant output gives
        if name in WRONG and near(loss, value) and not vague and abs(value) > 1e-6 and not harmless:
            fault, words = WRONG[name]
            text = f"The loss of the trained network, {loss:.4g}, is that of {words}."
            findings.append(found(fault, text, values, strength=0.96, where="loss"))
    return Seen(values, rule, findings)


@check("the loss is a cross-entropy of all classes")
def entropy(evidence: Evidence) -> Seen:
    name, loss = facts_of(evidence).wrong_entropy, evidence.first_loss
    values = {"first loss": loss, "formula": name}
    rule = "no cross-entropy without logarithms or of one class alone, at one snapshot at least"
    if not name:
        return Seen(values, rule)
    text = f"At every snapshot the loss is the {name}; at the start it is {loss:.3g}."
    remedy = ONE_SIDED if name.endswith("alone") else UNLOGGED
    finding = found("loss_output_mismatch", text, values, strength=0.97, where="loss", remedies=[remedy])
    return Seen(values, rule, [finding])


@check("the first loss has the sign of a cross-entropy")
def sign(evidence: Evidence) -> Seen:
    facts, history = facts_of(evidence), evidence.history
    if history.train is None or facts.data.labels is None:
        raise Unknown("the targets are not classes")
    labels = validation_labels(history.train_targets)
    losses = [float(each) for each in history.train_loss]
    formulas = [_signs(np.asarray(each, np.float64), labels) for each in history.train]
    loss, right, wrong = losses[0], *formulas[0]
    values = {"first loss": loss, "right": right, **wrong}
    rule = "the first loss is not a cross-entropy with a wrong sign, nor are the losses later"

    def holds(name: str) -> bool:
        """At all times at which outputs are moderate: far ones depend on how logarithms are guarded."""
        known = zip(history.train, losses, formulas, strict=True)
        return all(
            abs(at - each[1][name]) <= 2 * CLOSE * max(abs(each[0]), 0.1)
            for outputs, at, each in known
            if _moderate(np.asarray(outputs)) and np.isfinite(at) and np.isfinite(each[0])
        )

    close = abs(loss - right) <= 2 * CLOSE * abs(right)
    near_first = [name for name, value in wrong.items() if abs(loss - value) <= 2 * CLOSE * abs(right)]
    found_names = [name for name in near_first if holds(name)]
    if not found_names or close or not np.isfinite(right) or learned_well(facts):
        return Seen(values, rule)
    text = (
        f"The first loss, {loss:.3g}, is that of a cross-entropy with {found_names[0]}; the right one is {right:.3g}."
    )
    return Seen(values, rule, [found("sign_error", text, values, strength=0.96, where="loss", step=0)])


def _moderate(outputs: np.ndarray) -> bool:
    """Whether no logarithm of a probability needs a guard."""
    low, high = float(outputs.min()), float(outputs.max())
    if low >= 0 and high <= 1:
        return low > 1e-4 and high < 1 - 1e-4
    return max(-low, high) < FAR


def _signs(outputs: np.ndarray, labels: np.ndarray) -> tuple[float, dict[str, float]]:
    """The cross-entropy of outputs, and the same with wrong signs."""
    squashed = bool(outputs.min() >= 0 and outputs.max() <= 1)
    if outputs.size == len(labels) and set(np.unique(labels)) <= {0, 1}:
        right = binary_formulas(outputs.reshape(-1), labels, squashed)["right"]
        return right, wrong_signs(outputs.reshape(-1), labels, squashed)
    if outputs.ndim == 2 and labels.min() >= 0 and labels.max() < outputs.shape[1]:
        right = class_formulas(outputs, labels, squashed)["right"]
        return right, {"the wrong sign": -right}
    raise Unknown("no formula is known for outputs and targets of these shapes")


def near(one: float, other: float, close: float = CLOSE) -> bool:
    return bool(abs(one - other) <= close * abs(other) + 1e-9)


@check("the outputs can take the values of the targets")
def reach_of_outputs(evidence: Evidence) -> Seen:
    """Outputs that stay inside bounds for all inputs, although targets are beyond; outputs that are constant."""
    facts = facts_of(evidence)
    outputs, inputs, targets, loss = pair(evidence)
    values: dict[str, Any] = {"smallest output": outputs.min(), "largest output": outputs.max()}
    rule = "not constant, and no bound inside the range of the targets"
    if outputs.size == len(outputs) and facts.is_classes and np.all(outputs == 1.0):
        text = "The network's single output is 1 for every example, as a softmax of one unit is."
        return Seen(values, rule, [found("loss_output_mismatch", text, values, strength=0.97, where="outputs")])
    rectified = [each for each in evidence.activations if each.is_output and each.kind == "relu"]
    if rectified and facts.is_classes and poor(evidence):
        text = f"The outputs for classes are rectified: {np.mean(outputs == 0):.0%} of them are 0 and have no gradient."
        return Seen(values, rule, [found("loss_output_mismatch", text, values, strength=0.92, where="outputs")])
    bounded = [each for each in evidence.activations if each.is_output and each.kind == "tanh"]
    if bounded and facts.is_classes and outputs.size > len(outputs) and poor(evidence):
        text = (
            f"The outputs for classes stay between {outputs.min():.2g} and {outputs.max():.2g}, as those of a tanh do."
        )
        return Seen(values, rule, [found("loss_output_mismatch", text, values, strength=0.92, where="outputs")])
    if rectified and outputs.shape == np.shape(targets) and facts.data.kind != "classes" and np.min(targets) >= 0:
        units, wanted = (np.reshape(each, (len(outputs), -1)) for each in (outputs, targets))
        off = np.all(units == 0, 0) & np.any(wanted != 0, 0)
        values["output units that are always 0"] = float(off.mean())
        if off.mean() > 0.1:
            text = f"{off.mean():.0%} of the rectified outputs are 0 for every example, and their targets are not."
            return Seen(values, rule, [found("dead_units", text, values, strength=0.93, where="outputs")])
    if facts.data.kind == "labels" and outputs.shape == np.shape(targets):
        several = np.sum(np.asarray(targets) > 0.5, 1)
        if np.allclose(outputs.sum(1), 1, atol=1e-3) and outputs.min() >= 0 and np.mean(several > 1) > 0.1:
            text = f"The outputs of an example sum to 1, as those of a softmax, but {np.mean(several > 1):.0%} of the "
            text += "examples have several labels."
            return Seen(values, rule, [found("loss_output_mismatch", text, values, strength=0.93, where="outputs")])
    units = outputs.size // len(outputs)
    if units == 1 and np.all(evidence.run.loss == 0) and facts.is_classes:
        text = "The loss is exactly 0 at every step, as a softmax of one unit gives."
        return Seen(values, rule, [found("loss_output_mismatch", text, values, strength=0.95, where="loss")])
    whole = np.asarray(targets).dtype.kind in "iu" and len(np.unique(targets)) <= len(targets) / 2
    counted = "acc" in (evidence.subject.metric or "").lower() and np.nanmax(np.abs(evidence.metrics)) < 0.9
    if units == 1 and whole and facts.unbounded_entropy:
        text = f"The loss is a cross-entropy of 0 and 1, but targets go from {np.min(targets)} to {np.max(targets)}."
        return Seen(values, rule, [found("loss_output_mismatch", text, values, strength=0.98, where="outputs")])
    if facts.unbounded_entropy and len(np.unique(targets)) == 2:
        low, high = np.unique(targets)
        text = f"The loss is a cross-entropy of 0 and 1, but the targets are {low:g} and {high:g}."
        return Seen(values, rule, [found("label_encoding", text, values, strength=0.98, where="targets")])
    if units == 1 and whole and facts.data.kind == "values" and (counted or facts.short_of(0.1)):
        text = f"There are {len(np.unique(targets))} classes, but the network has a single output."
        return Seen(
            values,
            rule,
            [found("loss_output_mismatch", text, values, strength=0.9 if counted else 0.8, where="outputs")],
        )
    if facts.data.kind != "values" or not all_floating(inputs):
        return Seen(values, rule)
    wild = np.concatenate([outputs.reshape(-1), *(stretched(facts, inputs, by) for by in (30.0, -30.0, 1000.0))])
    wild = wild[np.isfinite(wild)]
    if not wild.size:
        raise Unknown("the outputs are not finite")
    true = np.asarray(facts.data.targets, np.float64)
    every = np.asarray(evidence.history.train)  # a trained network's outputs may lie there by chance
    low, high = min(float(wild.min()), float(np.nanmin(every))), max(float(wild.max()), float(np.nanmax(every)))
    above = true > high + 0.02 if high <= 1.001 else np.zeros(true.shape, bool)
    beyond = float(np.mean((true < low - 0.02) | above))
    never_negative = low >= 0 and (high <= 1.001 or low < 0.02 * high)  # a bound, and no chance
    bounded = never_negative or -1.001 <= low <= high <= 1.001
    values |= {"smallest possible": low, "largest possible": high, "targets beyond": beyond}
    constant = np.ptp(wild) < 1e-6 and low != 0
    if beyond < 0.1 or not bounded or constant or learned_well(facts):
        return Seen(values, rule)
    if low >= 0 and high > 1.001:
        words = "are never negative, as those of a relu or softplus are"
    else:
        words = f"stay between {low:.2g} and {high:.2g} for all inputs"
    text = f"The outputs {words}, but {beyond:.0%} of the targets are beyond."
    return Seen(values, rule, [found("loss_output_mismatch", text, values, strength=0.92, where="outputs")])


def all_floating(inputs: Any) -> bool:
    return all(np.asarray(leaf).dtype.kind == "f" for leaf in jax.tree.leaves(inputs))


def stretched(facts: Facts, inputs: Any, factor: float) -> np.ndarray:
    try:
        return facts.evaluate(jax.tree.map(lambda x: (x * factor).astype(x.dtype), inputs)).reshape(-1)
    except Exception:  # inputs that cannot be scaled
        return np.zeros(0)


@check("the loss is a mean over the examples")
def reduction(evidence: Evidence) -> Seen:
    """The loss of a batch beside that of the batch twice: equal for a mean, twice as large for a sum."""
    facts = facts_of(evidence)
    subject = evidence.subject
    inputs, targets = some((subject.inputs, subject.targets), ROWS // 2)
    finite = np.isfinite(facts.loss(inputs, targets))
    loss = facts.loss if finite else facts.loss_at_start  # a sum diverges at the rate of a mean
    once = loss(inputs, targets)
    inputs, targets = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), (inputs, targets))
    twice = loss(inputs, targets)
    values = {"loss of a batch": once, "of the batch twice": twice}
    rule = "equal, or it does no harm"
    ratio = twice / once if abs(once) > 1e-9 and np.isfinite(once) else 1.0
    if abs(ratio - 2) > 0.1 or learned_well(facts):
        return Seen(values, rule)
    short = np.isfinite(evidence.score) and poor(evidence)
    if not short and max(gain(evidence, name) for name in LOWER) == 0:  # a rate that suits the sum
        return Seen(values, rule)
    text = f"The loss of a batch is {once:.4g}, and {twice:.4g} if each example is in it twice: it is a sum."
    return Seen(values, rule, [found("wrong_axis_or_reduction", text, values, strength=0.75, where="loss")])


RANDOM = ("random_bits", "threefry2x32", "random_gamma")


@check("evaluation is deterministic and independent of the batch")
def evaluation_mode(evidence: Evidence) -> Seen:
    """Random numbers without a key, and outputs that change with the other examples of a batch."""
    facts, subject, state = facts_of(evidence), evidence.subject, evidence.run.last
    if subject.key_mode == "needed":
        raise Unknown("predict needs a key")
    inputs, _ = some((subject.inputs, subject.targets), ROWS)
    network = lambda params, inputs, model_state: subject.outputs(params, inputs, None, model_state)  # noqa: E731
    halves = jax.tree.map(lambda leaf: leaf[len(leaf) // 2 :], inputs)  # a loop over the batch changes the last ones
    counts = [drawn(network, params_of(state), part, state.model_state) for part in (inputs, halves)]
    if counts[0] > counts[1]:  # not the same random features for every example
        text = "predict draws random numbers although it gets no key: dropout or noise is on."
        return Seen({"random": True}, "", [found("evaluation_in_training_mode", text, strength=0.95, where="predict")])
    size = jax.tree.leaves(subject.plan.batches([0]))[0].shape[1]
    whole = facts.evaluate(inputs)
    half = facts.evaluate(halves)
    if whole.ndim == 0 or len(whole) != len(jax.tree.leaves(inputs)[0]):
        raise Unknown("predict gives no output per example")
    change = float(np.abs(whole[-len(half) :] - half).mean() / (np.std(whole) + 1e-12))
    values = {"random": False, "change of outputs with the batch": change, "batch size": size}
    rule = "no random numbers without a key, and the same outputs in smaller batches; or it does no harm"
    snapshots = evidence.history.train
    blind = snapshots is not None and all(_alike(snapshots[at]) for at in (0, -1))
    if blind and not np.all(whole == 1):
        text = "The outputs are the same for every example, before and after training: what tells them apart is lost "
        text += "on the way, as in a mean, a softmax or attention along another axis."
        return Seen(values, rule, [found("wrong_axis_or_reduction", text, values, strength=0.72, where="predict")])
    if not change > 0.01 or learned_well(facts):
        return Seen(values, rule)
    text = f"The output of an example changes by {change:.0%} of its spread with the other examples of the batch"
    if whole.ndim == 2 and whole.min() >= 0 and np.allclose(whole.sum(0), 1, atol=1e-3):
        text += ", and each column sums to 1: a softmax runs over the batch."
        return Seen(values, rule, [found("wrong_axis_or_reduction", text, values, strength=0.95, where="predict")])
    turned = facts.evaluate(jax.tree.map(lambda leaf: leaf[::-1].copy(), inputs))[::-1]
    if np.abs(whole - turned).mean() > 0.01 * np.std(whole):
        text += " and with their order: a loop or a product runs over the axis of the examples."
        return Seen(values, rule, [found("wrong_axis_or_reduction", text, values, strength=0.96, where="predict")])
    if size <= 4:
        text += f", and a batch of training has {size}."
        return Seen(values, rule, [found("batch_too_small", text, values, strength=0.95, where="batches")])
    text += ": statistics of the batch are used."
    return Seen(values, rule, [found("evaluation_in_training_mode", text, values, strength=0.75, where="predict")])


def _alike(outputs: np.ndarray) -> bool:
    """Whether the outputs of all examples are equal but for rounding, and not 0."""
    largest = np.abs(outputs).max()
    return bool(np.isfinite(outputs).all() and 0 < np.ptp(outputs, axis=0).max() + largest <= (1 + 1e-5) * largest)


def drawn(function: Any, *arguments: Any) -> int:
    """How many random numbers a function draws.

    >>> import jax.numpy as jnp
    >>> drawn(lambda x: x + jax.random.normal(jax.random.key(0), x.shape), jnp.zeros(2)), drawn(jnp.sin, jnp.zeros(2))
    (2, 0)
    """
    text = str(jax.make_jaxpr(function)(*arguments))
    shapes = re.findall(rf":\w+\[([\d,]*)\] = (?:{'|'.join(RANDOM)})\b", text)
    return sum(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


CHECKS: tuple[NamedCheck, ...] = (formula, entropy, sign, reach_of_outputs, reduction, evaluation_mode)
