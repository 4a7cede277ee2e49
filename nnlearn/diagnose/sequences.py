"""Checks of sequences: the blank of CTC, visible answers, moved targets, tokens without an order."""

from typing import Any

import jax
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.examples import exchanged, one_array, some
from nnlearn.diagnose.facts import Facts, facts_of
from nnlearn.diagnose.gains import poor
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.probes import log_softmax
from nnlearn.diagnose.report import found

ROWS = 64
MASK = "mask later positions in every attention: jnp.where(jnp.tril(jnp.ones((n, n), bool)), scores, -jnp.inf)"
SEEN_AHEAD = 1e-3  # change of outputs, relative to their spread, that later tokens may cause


@check("the blank of CTC is no label")
def blank(evidence: Evidence) -> Seen:
    """The class of most positions of a network that aligns short label sequences with long inputs is the blank."""
    subject = evidence.subject
    targets = one_array(subject.targets, "targets")
    if (
        targets.ndim != 2
        or targets.dtype.kind not in "iu"
        or not (subject.output_shape and len(subject.output_shape) == 2)
    ):
        raise Unknown("the targets are not label sequences for outputs per position")
    positions, classes = subject.output_shape
    if targets.shape[1] >= positions or not (evidence.loops or evidence.program.of_kind("softmax")):
        raise Unknown("there is a target for every position")
    inputs, labels = some((subject.inputs, subject.targets))
    said = np.argmax(facts_of(evidence).evaluate(inputs), -1)
    counts = np.bincount(said.reshape(-1), minlength=classes) / said.size
    most = int(np.argmax(counts))
    tail = np.cumprod((labels == labels[:, -1:])[:, ::-1], axis=1)[:, ::-1].astype(bool)  # padding of short ones
    tail &= len(np.unique(labels[:, -1])) == 1
    used = np.unique(labels[~tail])
    values = {
        "class of most positions": most,
        "its share": float(counts[most]),
        "labels": [int(used[0]), int(used[-1])],
    }
    rule = "the class of most positions, the blank, is not among the labels"
    free = [each for each in range(classes) if each not in used]
    if counts[most] < 0.3 or most not in used or not free:
        return Seen(values, rule)
    text = (
        f"Most positions ({counts[most]:.0%}) get class {most}, which is the blank of CTC, but labels go from "
        f"{used[0]} to {used[-1]} and use it, too; class {free[0]} is free."
    )
    remedy = "number the labels past the blank, or give the loss another blank_id"
    finding = found("label_encoding", text, values, strength=0.9, where="labels", remedies=[remedy])
    return Seen(values, rule, [finding])


@check("tokens are predicted before they are seen")
def causal(evidence: Evidence) -> Seen:
    """A model of the next token whose outputs change with later tokens, or whose loss is far below its predictions."""
    subject, facts = evidence.subject, facts_of(evidence)
    if subject.validation is None:
        raise Unknown("no validation data were given")
    inputs, targets = (one_array(each, "inputs or targets") for each in some(tuple(subject.validation), ROWS))
    if inputs.ndim != 2 or inputs.dtype.kind not in "iu" or inputs.shape[1] < 4:
        raise Unknown("the inputs are not sequences of tokens")
    if targets.shape == inputs.shape and np.mean(targets[:, :-1] == inputs[:, 1:]) > 0.9:
        return _sees_ahead(facts, inputs)
    examples = subject.examples
    length = inputs.shape[1]
    if not hasattr(examples, "shape") or examples.ndim != 2 or examples.shape[1] <= length:
        raise Unknown("the network does not predict the next token")
    if targets.shape not in ((len(inputs),), (len(inputs), 1)) or targets.dtype.kind not in "iu":
        raise Unknown("the targets are not the next tokens")
    sequences = some(examples, ROWS)  # of training: a network may fail to generalise
    inputs, targets = sequences[:, :length], sequences[:, length]
    logits = facts.evaluate(inputs).astype(np.float64)
    logits = logits[:, -1] if logits.ndim == 3 else logits
    if logits.ndim != 2 or targets.max() >= logits.shape[1]:
        raise Unknown("predict gives no logits of the next token")
    last = float(-np.mean(log_softmax(logits, 1)[np.arange(len(logits)), targets]))
    loss = facts.loss(sequences, None)
    values = {"loss": loss, "cross-entropy of the next token": last}
    rule = "the token after a beginning costs at most three times the mean + 0.3"
    if not last > 3 * loss + 0.3:
        return Seen(values, rule)
    text = (
        f"The loss of training sequences is {loss:.3g} for each token, but the cross-entropy of what predict says "
        f"after their first {length} tokens is {last:.3g}: in training the network sees the tokens that it predicts."
    )
    finding = found("target_leak", text, values, strength=0.9, where="attention mask", remedies=[MASK])
    return Seen(values, rule, [finding])


def _sees_ahead(facts: Facts, inputs: np.ndarray) -> Seen:
    cut = inputs.shape[1] // 2
    before, after = facts.evaluate(inputs), facts.evaluate(exchanged(inputs, cut, inputs.shape[1]))
    if before.ndim != 3 or before.shape[:2] != inputs.shape:
        raise Unknown("predict gives no outputs per position")
    change = float(np.abs(before - after)[:, :cut].mean() / (np.std(before) + 1e-12))
    values = {"change of earlier outputs with later tokens": change}
    rule = f"at most {SEEN_AHEAD:g} of their spread"
    if not change > SEEN_AHEAD:
        return Seen(values, rule)
    text = f"Later tokens change the outputs before them by {change:.2g} of their spread: the network sees its targets."
    finding = found("target_leak", text, values, strength=0.93, where="attention mask", remedies=[MASK])
    return Seen(values, rule, [finding])


@check("targets stand at the positions of their tokens")
def positions(evidence: Evidence) -> Seen:
    """Whether the tokens at a distance tell the targets better than those at the same position do."""
    facts = facts_of(evidence)
    targets = np.asarray(facts.data.targets)
    if facts.data.kind != "sequence" or facts.tokens is None or facts.tokens > 1000:
        raise Unknown("the targets are not one class per token")
    tokens = one_array(evidence.subject.inputs)
    if targets.shape != tokens.shape or targets.shape[1] < 4:
        raise Unknown("the targets are not one class per token")
    tokens, targets = tokens[facts.rows].astype(np.int64), targets[facts.rows].astype(np.int64)
    if np.mean(targets[:, :-1] == tokens[:, 1:]) > 0.5:
        raise Unknown("the targets are the next tokens")
    told = {shift: _told(tokens, targets, shift, facts.tokens) for shift in (-2, -1, 0, 1, 2)}
    best = max(told, key=lambda each: told[each])
    values: dict[str, Any] = {f"told by the token at {shift:+d}": share for shift, share in told.items()}
    values["reached"] = evidence.score
    rule = "the token at the position of the target tells most, or the network does as well"
    if best == 0 or told[best] < told[0] + 0.1 or not evidence.score < told[best] - 0.05:
        return Seen(values, rule)
    text = (
        f"The token {best:+d} position{'s' * (abs(best) > 1)} away tells {told[best]:.0%} of the targets, that at the "
        f"same position {told[0]:.0%}, and the network {evidence.score:.0%}: the targets have moved."
    )
    return Seen(values, rule, [found("misaligned_labels", text, values, strength=0.85, where="targets")])


def _told(tokens: np.ndarray, targets: np.ndarray, shift: int, count: int) -> float:
    """The accuracy, on the second half of the rows, of a table from the token at a distance to the target."""
    length = targets.shape[1] - abs(shift)
    mine = targets[:, :length] if shift >= 0 else targets[:, -shift:]
    theirs = tokens[:, shift:] if shift >= 0 else tokens[:, :length]
    classes, numbers = np.unique(mine, return_inverse=True)
    numbers, used = numbers.reshape(mine.shape), mine >= 0  # negative numbers mark positions without a target
    fitted = np.zeros(mine.shape, bool)
    fitted[::2] = True
    table = np.zeros((count, len(classes)))
    np.add.at(table, (theirs[fitted & used], numbers[fitted & used]), 1.0)
    tested = ~fitted & used
    return float(np.mean(np.argmax(table, 1)[theirs[tested]] == numbers[tested])) if tested.any() else 0.0


@check("validation targets stand where the network predicts them")
def predicted_positions(evidence: Evidence) -> Seen:
    """Whether outputs fit the validation targets of another position much better."""
    outputs, targets = evidence.history.validation, np.asarray(evidence.history.validation_targets)
    if outputs is None or targets.ndim != 2 or targets.dtype.kind not in "iu":
        raise Unknown("validation has not one class per position")
    said, length = np.argmax(outputs[-1], -1), targets.shape[1]
    if said.shape != targets.shape or length < 6:
        raise Unknown("predict gives no outputs per position")
    right = {}
    for by in (-2, -1, 0, 1, 2):
        here = slice(max(0, -by), length - max(0, by))
        there = slice(max(0, by), length - max(0, -by))
        right[by] = float(np.mean(said[:, here] == targets[:, there]))
    best = max(right, key=lambda each: right[each])
    values: dict[str, Any] = {f"right for the target at {by:+d}": each for by, each in right.items()}
    rule = "outputs fit the targets at their own positions best"
    if right[best] < max(right[0] + 0.2, 1.5 * right[0]):
        return Seen(values, rule)
    text = (
        f"The outputs are right for {right[0]:.0%} of the validation targets at their own positions, and for "
        f"{right[best]:.0%} of those at {best:+d}: training moves the targets in another way."
    )
    return Seen(values, rule, [found("misaligned_labels", text, values, strength=0.93, where="targets")])


@check("the order of tokens is visible")
def order(evidence: Evidence) -> Seen:
    """Whether outputs stay the same when tokens change places, in a run that does not fit."""
    subject, facts = evidence.subject, facts_of(evidence)
    inputs, _ = some((subject.inputs, subject.targets), ROWS)
    if facts.tokens is None or facts.data.labels is None:
        raise Unknown("the inputs are not sequences of tokens with a class")
    random = np.random.default_rng(8)
    mixed = jax.tree.map(lambda leaf: random.permuted(leaf, axis=1), inputs)
    before, after = facts.evaluate(inputs), facts.evaluate(mixed)
    change = float(np.abs(before - after).mean() / (np.std(before) + 1e-12))
    values = {"change of outputs with the order": change, "score": evidence.score}
    rule = "outputs change with the order of the tokens, or the run fits"
    if change > 1e-3 or evidence.score > 0.9 or not poor(evidence):
        return Seen(values, rule)
    text = f"The outputs do not change with the order of the tokens, and the network reaches {evidence.score:.2f}."
    remedy = "add positions: embeddings or rotations of each place"
    return Seen(values, rule, [found("underfitting", text, values, strength=0.75, remedies=[remedy])])


CHECKS: tuple[NamedCheck, ...] = (blank, causal, positions, predicted_positions, order)
