"""Checks of padding: does it change outputs or the loss, is the mask inverted."""

from typing import Any

import jax
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.facts import Facts, facts_of
from nnlearn.diagnose.outputs import near
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.probes import log_softmax
from nnlearn.diagnose.report import found
from nnlearn.tree import path_name

LEAST_PADDING = 0.15  # share of all positions
ROWS = 64


def lengths_of(inputs: Any) -> np.ndarray:
    """The length of each sequence, from a mask among the inputs or from equal values at the ends.

    Raises:
      Unknown: if the inputs are not padded sequences.

    >>> lengths_of(np.array([[3, 1, 0, 0, 0, 0], [1, 2, 2, 1, 0, 0], [1, 2, 3, 4, 5, 1]]))
    array([2, 4, 6])
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
    masks = [leaf for leaf in leaves if leaf.dtype == bool and leaf.ndim == 2]
    if len(leaves) > 1 and len(masks) == 1:
        return masks[0].sum(1)
    main = [leaf for leaf in leaves if leaf.ndim >= 2 and leaf.shape[1] >= 4]
    if len(main) != 1 or main[0].ndim > 3:
        raise Unknown("the inputs are not padded sequences")
    values = main[0]
    if values.ndim == 3 or values.dtype.kind == "f":
        if values.ndim != 3:
            raise Unknown("the inputs are not padded sequences")
        blank = np.all(values == 0, axis=-1)
    else:
        ends = values[:, -1]
        names, counts = np.unique(ends, return_counts=True)
        blank = values == names[np.argmax(counts)]
    tail = np.cumprod(blank[:, ::-1], axis=1).sum(1)
    lengths = values.shape[1] - tail
    inside = np.mean(blank.sum(1) - tail)
    if inside > 0.02 * values.shape[1] or len(np.unique(lengths)) < 3 or tail.max() < 2:
        raise Unknown("the inputs are not padded sequences")
    return lengths


@check("padding changes neither outputs nor loss")
def padding(evidence: Evidence) -> Seen:
    """Outputs and loss of short examples with all their padding, and with less of it."""
    facts, subject = facts_of(evidence), evidence.subject
    lengths = lengths_of(subject.inputs)
    total = np.asarray(jax.tree.leaves(subject.inputs)[0]).shape[1]
    share = float(1 - lengths.mean() / total)
    if share < LEAST_PADDING:
        raise Unknown(f"only {share:.0%} of the positions are padding")
    order = np.argsort(lengths, kind="stable")
    rows = order[(lengths[order] > 0) & (lengths[order] <= 0.75 * total)][:ROWS]
    if len(rows) < 8:
        raise Unknown("too few short examples")
    kept = int(max(lengths[rows].max(), 2))
    whole = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], (subject.inputs, subject.targets))

    def shorter(leaf):
        return leaf[:, :kept] if leaf.ndim >= 2 and leaf.shape[1] == total else leaf

    short = jax.tree.map(shorter, whole)
    before, after = facts.evaluate(whole[0]), facts.evaluate(short[0])
    if before.ndim == 3 and before.shape[1] == total:
        real = np.arange(kept) < lengths[rows][:, None]
        before, after = before[:, :kept][real], after[real]
    scale = float(np.std(before)) + 1e-6 * float(np.abs(before).max()) + 1e-12
    change = float(np.sqrt(np.mean((before - after) ** 2)) / scale)
    values = {"share of padding": share, "change of outputs with less padding": change}
    values["change of outputs with other inputs"] = blindness(facts, whole[0], lengths[rows], scale)
    losses = [facts.loss(*part) for part in (whole, short)]
    values |= {"loss": losses[0], "loss with less padding": losses[1]}
    rule = "outputs change below 5 %, the loss below 3 %; or it does no harm"
    if facts.reached >= 0.97:
        return Seen(values, rule)
    if values["change of outputs with other inputs"] < 1e-3 < change:
        text = "The outputs do not change if the real positions do, only with the padding: the mask is inverted."
        return Seen(values, rule, [found("mask_ignored", text, values, strength=0.97, where="features")])
    if change > 0.05:
        text = f"The outputs of examples change by {change:.0%} of their spread if they are padded less."
        return Seen(values, rule, [found("mask_ignored", text, values, strength=0.88, where="features")])
    if abs(losses[0] - losses[1]) > 0.03 * abs(losses[1]) and facts.data.kind == "sequence":
        text = f"The loss of the same examples is {losses[0]:.3g} with padding and {losses[1]:.3g} with less of it."
        return Seen(values, rule, [found("mask_ignored", text, values, strength=0.9, where="loss")])
    return Seen(values, rule)


def blindness(facts: Facts, inputs: Any, lengths: np.ndarray, scale: float) -> float:
    """How much outputs change if the real positions are taken from another example."""
    leaves = jax.tree.leaves(inputs)
    if len(leaves) != 1:
        return float("nan")
    values = np.array(leaves[0])
    real = np.arange(values.shape[1]) < lengths[:, None]
    first = values[:, 0]
    # Each real position gets the first value of some other example, which is no padding.
    others = np.random.default_rng(4).permutation(len(values))
    changed = np.where(real.reshape(*real.shape, *[1] * (values.ndim - 2)), first[others][:, None], values)
    before, after = facts.evaluate(inputs), facts.evaluate(jax.tree.map(lambda _: changed, inputs))
    if before.ndim == 3:
        before, after = before[real], after[real]
    return float(np.sqrt(np.mean((before - after) ** 2)) / scale)


@check("positions without a target stay out of the loss")
def blank_targets(evidence: Evidence) -> Seen:
    """The loss beside the cross-entropy of all positions and that of the positions with a target."""
    facts, subject = facts_of(evidence), evidence.subject
    if facts.data.kind != "sequence":
        raise Unknown("the targets are not sequences")
    targets = np.asarray(facts.data.targets)
    pad, share = blank_of(targets)
    inputs, some_targets = jax.tree.map(lambda leaf: np.asarray(leaf)[:ROWS], (subject.inputs, subject.targets))
    outputs = facts.evaluate(inputs).astype(np.float64)
    if outputs.ndim != 3 or outputs.shape[:2] != some_targets.shape or some_targets.min() < 0:
        raise Unknown("predict gives no logits per position")
    each = -np.take_along_axis(log_softmax(outputs, -1), some_targets[..., None].astype(int), -1)[..., 0]
    real = some_targets != pad
    loss = facts.loss(inputs, some_targets)
    accuracy = float(np.mean(np.argmax(outputs, -1)[real] == some_targets[real]))
    values = {
        "share without a target": share,
        "loss": loss,
        "of all positions": float(each.mean()),
        "of positions with a target": float(each[real].mean()),
        "accuracy at positions with a target": accuracy,
    }
    rule = "the loss is not that of all positions; or it does no harm"
    apart = not near(values["of all positions"], values["of positions with a target"])
    if not (apart and near(loss, values["of all positions"])) or accuracy > 0.97:
        return Seen(values, rule)
    text = (
        f"{share:.0%} of the targets are {pad}, which marks positions without one, and the loss ({loss:.3g}) is the "
        f"mean over all positions. The accuracy at the others is {accuracy:.0%}."
    )
    return Seen(values, rule, [found("mask_ignored", text, values, strength=0.9, where="loss")])


def blank_of(targets: np.ndarray) -> tuple[int, float]:
    """The target that marks positions without one, which fills one end of most rows, and its share.

    Raises:
      Unknown: if there is none.
    """
    for pad in np.unique(np.concatenate([targets[:, 0], targets[:, -1]])):
        blank = targets == pad
        share = float(blank.mean())
        tail, head = np.cumprod(blank[:, ::-1], axis=1).sum(1), np.cumprod(blank, axis=1).sum(1)
        ends = np.minimum(head + tail, blank.shape[1])
        if share >= LEAST_PADDING and ends.sum() >= 0.97 * blank.sum() and np.mean(ends >= 2) > 0.5:
            return int(pad), share
    raise Unknown("no target marks positions without one")


@check("the loss uses the masks and lengths of the batch")
def unused_mask(evidence: Evidence) -> Seen:
    """Arrays that the loss does not read, although they say which values of another one are filled in."""
    used, batches = evidence.program.inputs, evidence.subject.plan.batches([0])
    leaves = {f"0/{path_name(path)}": np.asarray(leaf[0]) for path, leaf in jax.tree.leaves_with_path(batches)}
    unused = {name: leaf for name, leaf in leaves.items() if used.get(name) is False and leaf.size}
    read = {name: leaf for name, leaf in leaves.items() if used.get(name)}
    rule = "a mask or lengths that mark filled places reach the loss"
    for name, leaf in unused.items():
        for other, values in read.items():
            share, words = filled_by(leaf, values), "marks where {} is filled in"
            if not share:
                share, words = padded_by(leaf, values), "has the lengths of the sequences in {}"
            if share:
                text = f"The loss does not read {name[2:]}, which {words.format(other[2:])}: {share:.0%} of it counts "
                text += "without being data."
                seen = {"unused": name[2:], "share that is filled in": share}
                return Seen(seen, rule, [found("mask_ignored", text, seen, strength=0.9, where="loss")])
    return Seen({"unused": list(unused)}, rule)


def filled_by(mask: np.ndarray, values: np.ndarray) -> float:
    """The share of values, all equal, where a mask of the same shape is 0; 0 if it is no such mask.

    >>> filled_by(np.array([[1, 1, 0], [1, 0, 0]]), np.array([[5.0, 7.0, 0.0], [3.0, 0.0, 0.0]]))
    0.5
    """
    if mask.ndim < 1 or mask.shape != values.shape or set(np.unique(mask).tolist()) != {0, 1}:
        return 0.0
    if mask.ndim == 1 and (values.dtype.kind != "f" or len(np.unique(values)) < min(12, len(values) // 3)):
        return 0.0  # a class that another column marks
    blank, share = np.unique(values[mask == 0]), float(np.mean(mask == 0))
    is_filled = len(blank) == 1 and np.mean(values[mask != 0] != blank[0]) > 0.1
    return share if is_filled and share >= LEAST_PADDING else 0.0


def padded_by(lengths: np.ndarray, values: np.ndarray) -> float:
    """The share of positions after the ends of padded sequences; 0 if these are not their lengths.

    >>> padded_by(np.array([2, 4, 3]), np.array([[3, 1, 0, 0, 0, 0], [1, 2, 2, 1, 0, 0], [1, 2, 3, 0, 0, 0]]))
    0.5
    """
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or values.ndim < 2 or len(np.unique(lengths)) < 3:
        return 0.0
    try:
        same = np.mean(lengths_of(values) == lengths)
    except Unknown:
        return 0.0
    share = float(1 - lengths.mean() / values.shape[1])
    return share if same > 0.9 and share >= LEAST_PADDING else 0.0


CHECKS: tuple[NamedCheck, ...] = (padding, blank_targets, unused_mask)
