"""Checks of the program: cut gradients, softmax twice, wrong axes, silent broadcasts, masks, evaluation mode."""

import jax
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import Evidence, params_of, some
from nnlearn.diagnose.report import Finding, found
from nnlearn.diagnose.subject import Unknown

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
        exact = last.operation != "logsumexp" and last.axes and max(last.axes) < len(last.shape)
        size = int(np.prod([last.shape[axis] for axis in last.axes])) if exact else _outputs_per_example(evidence)
        if squashed and "matmul" not in last.of:
            text = f"The {last.operation} of the loss is applied to the result of a {squashed[0]}."
            findings.append(found("loss_output_mismatch", text, values, strength=0.95, where=str(last.where)))
        if size == 1:
            text = "The softmax of the loss runs over one output, so it is always 1 and has no gradient."
            findings.append(found("loss_output_mismatch", text, values, strength=0.97, where=str(last.where)))
        if "batch" in last.labels and size > 1:
            text = f"The {last.operation} of the loss runs over axis {last.axes}, which counts the examples."
            findings.append(found("wrong_axis_or_reduction", text, values, strength=0.97, where=str(last.where)))
    return Seen(values, rule, findings)


def _outputs_per_example(evidence: Evidence) -> int:
    """The size of the last axis of the outputs; 0 if it is unknown."""
    shape = np.shape(evidence.history.train)[2:] if evidence.subject.predict is not None else ()
    return int(shape[-1]) if shape else 0


@check("outputs can reach the targets")
def output_range(evidence: Evidence) -> Seen:
    data = evidence.data
    last = [each for each in evidence.activations if each.is_output]
    kinds = {each.kind for each in last}
    values = {"output follows": sorted(kinds), "kind of targets": data.kind}
    rule = "the last operation can give every target"
    ranges = {"relu": (0, np.inf), "sigmoid": (0, 1), "tanh": (-1, 1), "softmax": (0, 1), "softplus": (0, np.inf)}
    if data.kind != "values" or len(kinds) != 1 or not kinds & set(ranges):
        return Seen(values, rule)
    low, high = ranges[next(iter(kinds))]
    targets = np.asarray(data.targets, np.float64)
    beyond = float(np.mean((targets < low - 0.05) | (targets > high + 0.05)))
    values["share of targets beyond"] = beyond
    if beyond < 0.05:
        return Seen(values, rule)
    text = f"The output is that of a {next(iter(kinds))}, from {low} to {high}; {beyond:.0%} of the targets lie beyond."
    return Seen(values, rule, [found("loss_output_mismatch", text, values, strength=0.95, where=str(last[0].where))])


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


@check("an example's output depends on it alone")
def independence(evidence: Evidence) -> Seen:
    subject, state = evidence.subject, evidence.run.last
    subject.need_predict()
    inputs = some(subject.inputs, 64)
    predict = jax.jit(lambda inputs: subject.outputs(params_of(state), inputs, None, state.model_state))
    whole = np.asarray(predict(inputs), np.float64)
    count = len(jax.tree.leaves(inputs)[0])
    if whole.ndim == 0 or len(whole) != count or count < 4 or not np.all(np.isfinite(whole)):
        raise Unknown("the network has not one output for each example")
    half = np.asarray(predict(jax.tree.map(lambda leaf: leaf[: count // 2], inputs)), np.float64)
    again = np.asarray(predict(inputs), np.float64)
    size = max(float(np.std(whole)), 1e-12)
    change, noise = float(np.abs(half - whole[: count // 2]).mean() / size), float(np.abs(again - whole).mean() / size)
    random = len(evidence.network.of_kind("random"))
    values = {"change with fewer examples": change, "change from call to call": noise, "random operations": random}
    rule = "outputs change by less than 1 % of their spread when other examples are left out; no random numbers"
    findings: list[Finding] = []
    if random:
        text = f"Without a key, predict still draws random numbers in {random} places."
        findings.append(found("evaluation_in_training_mode", text, values, strength=0.95))
    elif change > 0.01:
        text = f"Outputs change by {change:.0%} of their spread when half of the other examples are left out."
        over_batch = [
            fact
            for fact in evidence.network.of_kind("softmax")
            if "batch" in fact.labels and fact.operation == "softmax"
        ]
        name = "wrong_axis_or_reduction" if over_batch else "evaluation_in_training_mode"
        findings.append(found(name, text, values, strength=0.9))
    return Seen(values, rule, findings)


CHECKS: tuple[NamedCheck, ...] = (cut, outputs, output_range, broadcast, independence)
