"""Checks of the program: cut gradients, softmax twice, wrong axes, silent broadcasts, masks, evaluation mode."""

import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.gains import poor
from nnlearn.diagnose.report import Finding, found

LOG_SOFTMAX = ("log_softmax", "logsumexp", "softmax")


@check("the gradient reaches every parameter")
def cut(evidence: Evidence) -> Seen:
    shown = evidence.program
    blocked = [name for name, state in shown.params.items() if state == "cut"]
    values = {"cut off": blocked, "unused": [name for name, state in shown.params.items() if state == "unused"]}
    rule = "every parameter that the loss depends on has a derivative"
    if not blocked:
        return Seen(values, rule)
    cuts = [fact for fact in shown.of_kind("cut") if set(fact.leaves) & set(blocked)]
    where = f"{cuts[-1].operation} at {cuts[-1].where}" if cuts else blocked[0]
    text = f"{len(blocked)} of {len(shown.params)} parameters ({', '.join(blocked[:3])}) get no gradient"
    text += f": {cuts[-1].operation} cuts it." if cuts else "."
    return Seen(values, rule, [found("blocked_gradient", text, values, strength=0.97, where=where)])


@check("loss and outputs belong together")
def outputs(evidence: Evidence) -> Seen:
    softmaxes = [fact for fact in evidence.program.of_kind("softmax") if fact.operation in LOG_SOFTMAX]
    last = softmaxes[-1] if softmaxes else None
    values = {"softmax of the loss": last.operation if last else "", "of": list(last.of) if last else []}
    rule = "raw outputs go into the softmax of the loss, over two classes or more, not over the batch"
    findings: list[Finding] = []
    if last is not None:
        squashed = [kind for kind in last.of if kind in ("softmax", "log_softmax", "sigmoid", "tanh", "relu")]
        if squashed and "softmax" in squashed[0]:  # the weights of a mixture have no axis of examples
            squashed *= any(fact.shape == last.shape for fact in softmaxes[:-1] if fact.operation == squashed[0])
        exact = last.operation != "logsumexp" and last.axes and max(last.axes) < len(last.shape)
        size = int(np.prod([last.shape[axis] for axis in last.axes])) if exact else _outputs_per_example(evidence)
        if squashed and "matmul" not in last.of:
            text = f"The {last.operation} of the loss is applied to the result of a {squashed[0]}."
            findings.append(found("loss_output_mismatch", text, values, strength=0.95, where=str(last.where)))
        if size == 1 and not within(evidence):
            text = "The softmax of the loss runs over one output, so it is always 1 and has no gradient."
            findings.append(found("loss_output_mismatch", text, values, strength=0.97, where=str(last.where)))
        square = len(last.shape) == 2 and last.shape[0] == last.shape[1] != _outputs_per_example(evidence)
        if "batch" in last.labels and size > 1 and not square:  # examples against examples: a contrastive loss
            text = f"The {last.operation} of the loss runs over axis {last.axes}, which counts the examples."
            findings.append(found("wrong_axis_or_reduction", text, values, strength=0.97, where=str(last.where)))
    for fact in softmaxes if within(evidence) else softmaxes[:-1]:
        exact = fact.operation != "logsumexp" and fact.axes and max(fact.axes) < len(fact.shape)
        if exact and all(fact.shape[axis] == 1 for axis in fact.axes):
            text = f"A softmax runs over axis {fact.axes} of shape {fact.shape}, which has length 1: it is always 1"
            slopes = evidence.slopes
            still = [name for name, norms in zip(slopes.names, slopes.mean_norms.T, strict=True) if not norms.any()]
            alone = still and np.prod(fact.shape[1:]) == 1  # no other axis could be meant
            name = "blocked_gradient" if alone else "wrong_axis_or_reduction"
            text += f", and {', '.join(still[:3])} get no gradient." if still else "."
            findings.append(found(name, text, values, strength=0.93, where=str(fact.where)))
            break
    return Seen(values, rule, findings)


def within(evidence: Evidence) -> bool:
    """Whether the network has outputs that differ, so that a softmax of one number does not give them."""
    train = evidence.history.train
    return train is not None and bool(np.isfinite(train).all() and np.ptp(train) > 0)


def _outputs_per_example(evidence: Evidence) -> int:
    """The size of the last axis of the outputs; 0 if it is unknown."""
    train = evidence.history.train
    shape = train.shape[2:] if train is not None else ()
    return int(shape[-1]) if shape else 0


@check("no silent broadcast")
def broadcast(evidence: Evidence) -> Seen:
    pairs = [fact for fact in evidence.program.of_kind("pairs") if fact.operation in ("sub", "mul", "add", "div")]
    mixed = [fact for fact in pairs if len(fact.inputs) > 1]
    values = {"operations on all pairs of examples": len(pairs)}
    rule = "outputs and targets are not combined for all pairs of examples"
    if not mixed:
        return Seen(values, rule)
    text = f"A {mixed[0].operation} combines the outputs with the targets of all examples, as their shapes differ."
    finding = found("wrong_axis_or_reduction", text, values, strength=0.95, where=str(mixed[0].where))
    return Seen(values, rule, [finding])


@check("each example is normalised by itself")
def own_norms(evidence: Evidence) -> Seen:
    """Outputs that are divided by one number for the whole batch, as by a norm without an axis."""
    norms = evidence.program.of_kind("norm")
    values = {"divisions by a sum over all examples": len(norms)}
    rule = "no array of examples is divided by a sum over all of them, or the run fits"
    if not norms or not poor(evidence):
        return Seen(values, rule)
    text = f"An array of shape {norms[0].shape} is divided by one number that sums over all of its examples."
    remedy = "take the norm of each example: jnp.linalg.norm(x, axis=-1, keepdims=True)"
    where = str(norms[0].where)
    finding = found("wrong_axis_or_reduction", text, values, strength=0.9, where=where, remedies=[remedy])
    return Seen(values, rule, [finding])


CHECKS: tuple[NamedCheck, ...] = (cut, outputs, broadcast, own_norms)
