"""Connectionist temporal classification: the loss of a label sequence that no one has aligned with the frames.

An alignment names one class, or the blank, for every frame; merging repeats and dropping blanks leaves the labels. The
probability of the labels is the sum over all their alignments, from a recursion over the frames.

The states of the recursion are kept apart: ``blank`` n, after n labels, and ``label`` n, in the n-th (label 0 is never
entered). In that form a step needs two sums of exponentials per label, where the usual row of 2 N + 1 states needs two
per state. Read from its last frame to its first, the recursion has the same form with its labels reversed, so one
``scan`` over 2 B rows runs both directions at once, in half the steps.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.losses.arguments import as_boolean, as_floating, as_real, check_reduction, check_same_shape, widen
from nnlearn.losses.softmax import as_labels, normalize
from nnlearn.tree import safe_divide
from nnlearn.types import ArrayLike

FEW_CLASSES = 128  # up to which a product with one-hot labels is faster than adding them one by one, and smaller


class Sequences(NamedTuple):
    """Checked arguments: which frames exist, labels moved to the front (0 behind them), and how many there are."""

    logits_btk: jax.Array
    is_frame_bt: jax.Array
    labels_bn: jax.Array
    lengths_b: jax.Array


class Emissions(NamedTuple):
    """Scores of the states at each frame, relative to the frame's best, and what the best costs: -log of its softmax.

    Relative scores keep the recursion's numbers small, and so its rounding: it adds up what alignments differ in.
    """

    blank_bt: jax.Array
    label_btm: jax.Array  # m = 0, and those behind the last label: -inf
    cost_bt: jax.Array


class Scores(NamedTuple):
    """Log-scores of the states of every row."""

    blank_rm: jax.Array
    label_rm: jax.Array


def _log_add(first: jax.Array, second: jax.Array) -> jax.Array:
    """``log(exp(first) + exp(second))``, also of -inf. ``log1p`` would cost half as much again and be no closer: what
    it saves is below the rounding of scores of size 1."""
    larger = jnp.maximum(first, second)
    finite = jnp.maximum(larger, jnp.finfo(larger.dtype).min)
    return larger + jnp.log(1 + jnp.exp(jnp.minimum(first, second) - finite))


def _shift(score_rm: jax.Array) -> jax.Array:
    """What stood at n - 1."""
    return jnp.pad(score_rm[:, :-1], ((0, 0), (1, 0)), constant_values=-jnp.inf)


def _emissions(sequences: Sequences, rows, blank_id: int) -> Emissions:
    logits_btk, is_frame_bt, labels_bn, lengths_b = sequences
    # With the labels repeated for every frame, the gather goes through memory in order.
    index_btn = jnp.broadcast_to(labels_bn[:, None, :], (*is_frame_bt.shape, labels_bn.shape[1]))
    picked_btn = jnp.take_along_axis(logits_btk, index_btn, 2, mode="promise_in_bounds")
    (picked_btn, blank_bt) = widen(picked_btn, logits_btk[:, :, blank_id])
    is_label_bn = jnp.arange(labels_bn.shape[1])[None] < lengths_b[:, None]
    picked_btn = jnp.where(is_frame_bt[..., None], picked_btn, 0)
    picked_btn = jnp.where(is_label_bn[:, None], picked_btn, -jnp.inf)
    blank_bt = jnp.where(is_frame_bt, blank_bt, 0)
    best_bt = jax.lax.stop_gradient(jnp.maximum(blank_bt, jnp.max(picked_btn, 2, initial=-jnp.inf)))
    best_bt = jnp.where(best_bt == -jnp.inf, 0, best_bt)
    label_btm = jnp.pad(picked_btn - best_bt[..., None], ((0, 0), (0, 0), (1, 0)), constant_values=-jnp.inf)
    cost_bt = jnp.where(is_frame_bt, rows.largest[..., 0] - best_bt + rows.log_total[..., 0], 0)
    return Emissions(blank_bt - best_bt, label_btm, cost_bt)


def _may_skip(labels_bn: jax.Array) -> jax.Array:
    """Whether label m may follow label m - 1 with no blank between: they differ. Shape [B, N + 1]."""
    return jnp.pad(labels_bn[:, 1:] != labels_bn[:, :-1], ((0, 0), (min(2, labels_bn.shape[1] + 1), 0)))


def _start(at_r: jax.Array, states: int, dtype) -> Scores:
    """Before the first frame: certainly in the blank numbered ``at``."""
    blank_rm = jnp.where(jnp.arange(states)[None] == at_r[:, None], 0, -jnp.inf).astype(dtype)
    return Scores(blank_rm, jnp.full_like(blank_rm, -jnp.inf))


def _enter(scores: Scores, may_skip_rm: jax.Array) -> Scores:
    """Scores of being about to emit a frame from each state."""
    blank_rm = _log_add(*scores)
    come_from_rm = jnp.where(may_skip_rm, _shift(blank_rm), _shift(scores.blank_rm))
    return Scores(blank_rm, _log_add(scores.label_rm, come_from_rm))


def _emit(before: Scores, entered: Scores, frame) -> Scores:
    """Scores after the frame; one that does not exist changes nothing."""
    blank_r1, label_rm, is_frame_r1 = frame
    return Scores(
        jnp.where(is_frame_r1, entered.blank_rm + blank_r1, before.blank_rm),
        jnp.where(is_frame_r1, entered.label_rm + label_rm, before.label_rm),
    )


def _frames(emissions: Emissions, is_frame_bt: jax.Array):
    """The frames as what a scan takes, time first."""
    blank_tb, is_frame_tb = emissions.blank_bt.T, is_frame_bt.T
    return blank_tb[..., None], emissions.label_btm.swapaxes(0, 1), is_frame_tb[..., None]


def _log_likelihood(last: Scores, lengths_b: jax.Array) -> jax.Array:
    """Of having ended in the last label or in the blank behind it."""
    return jnp.take_along_axis(_log_add(*last), lengths_b[:, None], 1, mode="promise_in_bounds")[:, 0]


def _loss(emissions: Emissions, log_likelihood_b: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(emissions.cost_bt, 1) - log_likelihood_b, 0)  # rounding may leave less than 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _negative_log_likelihood(sequences: Sequences, blank_id: int) -> jax.Array:
    """The loss of each example. Without a gradient, only the forward direction runs, and no history is kept."""
    emissions = _emissions(sequences, normalize(*widen(sequences.logits_btk), (2,)), blank_id)
    may_skip_bm = _may_skip(sequences.labels_bn)

    def step(before, frame):
        return _emit(before, _enter(before, may_skip_bm), frame), None

    first = _start(jnp.zeros_like(sequences.lengths_b), may_skip_bm.shape[1], emissions.blank_bt.dtype)
    last, _ = jax.lax.scan(step, first, _frames(emissions, sequences.is_frame_bt))
    return _loss(emissions, _log_likelihood(last, sequences.lengths_b))


def _both_directions(emissions: Emissions, sequences: Sequences):
    """Log-likelihood, and for every frame and state the scores of what led there and of what follows, summed."""
    lengths_b = sequences.lengths_b
    states, batch = emissions.label_btm.shape[2], len(lengths_b)
    may_skip_bm = _may_skip(sequences.labels_bn)
    reverse = functools.partial(jnp.flip, axis=0)
    blank, label, is_frame = _frames(emissions, sequences.is_frame_bt)
    label_back = jnp.concatenate([label[..., :1], jnp.flip(label[..., 1:], (0, 2))], 2)
    skip_back = jnp.concatenate([may_skip_bm[:, :2], jnp.flip(may_skip_bm[:, 2:], 1)], 1)
    frames = (
        jnp.concatenate([blank, reverse(blank)], 1),
        jnp.concatenate([label, label_back], 1),
        jnp.concatenate([is_frame, reverse(is_frame)], 1),
    )
    may_skip_rm = jnp.concatenate([may_skip_bm, skip_back])
    is_forward_r1 = jnp.arange(2 * batch)[:, None] < batch

    def step(before, frame):
        entered = _enter(before, may_skip_rm)
        after = _emit(before, entered, frame)
        # A frame's own score must count once: it is in what led to a state, and not in what follows.
        return after, Scores(*(jnp.where(is_forward_r1, a, e) for a, e in zip(after, entered, strict=True)))

    first = _start(jnp.concatenate([jnp.zeros_like(lengths_b), states - 1 - lengths_b]), states, blank.dtype)
    last, history = jax.lax.scan(step, first, frames)
    log_likelihood_b = _log_likelihood(Scores(*(score[:batch] for score in last)), lengths_b)
    blank_tbm = history.blank_rm[:, :batch] + jnp.flip(history.blank_rm[:, batch:], (0, 2))
    label_tbn = history.label_rm[:, :batch, 1:] + jnp.flip(history.label_rm[:, batch:, 1:], (0, 2))
    return log_likelihood_b, blank_tbm, label_tbn


def _forward(sequences: Sequences, blank_id: int):
    """The loss, and the share of its probability that each frame spends in each label and in the blank."""
    rows = normalize(*widen(sequences.logits_btk), (2,))
    emissions = _emissions(sequences, rows, blank_id)
    log_likelihood_b, blank_tbm, label_tbn = _both_directions(emissions, sequences)
    loss_b = _loss(emissions, log_likelihood_b)
    scale_1b1 = jnp.where(log_likelihood_b == -jnp.inf, 0, log_likelihood_b)[None, :, None]
    label_tbn = jnp.exp(label_tbn - scale_1b1)
    blank_tb = jnp.sum(jnp.exp(blank_tbm - scale_1b1), 2)
    # The shares of a frame add up to 1 but for rounding, which over hundreds of frames is felt: divide by their sum.
    total_tb = blank_tb + jnp.sum(label_tbn, 2)
    total_tb = jnp.where(total_tb == 0, 1, total_tb)
    return loss_b, (sequences, rows.largest, rows.log_total, label_tbn, blank_tb, total_tb, loss_b)


def _backward(blank_id: int, residuals, cotangent_b: jax.Array):
    sequences, largest, log_total, label_tbn, blank_tb, total_tb, loss_b = residuals
    logits_btk, is_frame_bt, labels_bn, _ = sequences
    scale_bt = jnp.where(is_frame_bt, jnp.where(loss_b == jnp.inf, 0, cotangent_b)[:, None], 0)
    over_bt = scale_bt / total_tb.T
    blank_bt = jnp.where(is_frame_bt, blank_tb.T * over_bt, 0)
    label_btn = jnp.where(is_frame_bt[..., None], label_tbn.swapaxes(0, 1) * over_bt[..., None], 0)
    softmax_btk = jnp.exp(widen(logits_btk)[0] - largest - log_total)
    softmax_btk = jnp.where(is_frame_bt[..., None], softmax_btk * scale_bt[..., None], 0)
    is_blank_11k = (jnp.arange(logits_btk.shape[2]) == blank_id)[None, None]
    grad_btk = _subtract_at(softmax_btk - jnp.where(is_blank_11k, blank_bt[..., None], 0), labels_bn, label_btn)
    return (Sequences(grad_btk.astype(logits_btk.dtype), None, None, None),)


def _subtract_at(grad_btk: jax.Array, labels_bn: jax.Array, label_btn: jax.Array) -> jax.Array:
    """``grad`` less the share of every label at its class, where equal labels add up."""
    batch, frames, classes = grad_btk.shape
    if classes <= FEW_CLASSES:
        one_hot_bnk = (labels_bn[..., None] == jnp.arange(classes)[None, None]).astype(grad_btk.dtype)
        return grad_btk - jnp.einsum("btn,bnk->btk", label_btn, one_hot_bnk, precision=jax.lax.Precision.HIGHEST)
    rows, labels = jnp.arange(batch * frames)[:, None], label_btn.shape[2]
    at = jnp.broadcast_to(labels_bn[:, None], label_btn.shape).reshape(batch * frames, labels)
    flat = grad_btk.reshape(batch * frames, classes)
    flat = flat.at[rows, at].add(-label_btn.reshape(batch * frames, labels), mode="promise_in_bounds")
    return flat.reshape(grad_btk.shape)


_negative_log_likelihood.defvjp(_forward, _backward)


def check_blank_id(blank_id: int, classes: int) -> int:
    """``blank_id`` as a Python int in [0, classes)."""
    if isinstance(blank_id, jax.core.Tracer):
        raise TypeError("blank_id decides which program is compiled, so it must be a Python int, not a traced value")
    try:
        number = operator.index(blank_id)
    except TypeError as error:
        raise TypeError(f"blank_id must be an int, got {blank_id!r} ({type(blank_id).__name__})") from error
    if not 0 <= number < classes:
        raise ValueError(f"blank_id must be in [0, {classes}), a class of the logits, got {blank_id!r}")
    return number


def check_frames(logits: ArrayLike, logit_paddings: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Logits [B, T, K], and which frames exist [B, T]."""
    logits_btk = as_floating("logits", logits)
    if logits_btk.ndim != 3:
        raise ValueError(
            f"logits must have shape [batch, frames, classes], got {logits_btk.shape}; "
            "for one sequence pass logits[None]"
        )
    paddings_bt = as_real("logit_paddings", logit_paddings)
    check_same_shape(("logits[..., 0]", "logit_paddings"), logits_btk[..., 0], paddings_bt)
    return logits_btk, paddings_bt == 0


def compact(labels_bn: jax.Array, is_label_bn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Labels moved to the front, in their order, 0 behind them; and how many there are."""
    # By scattering: XLA would put a sort's gather into every later look-up of a label, and repeat it for every frame.
    place_bn = jnp.where(is_label_bn, jnp.cumsum(is_label_bn, 1, dtype=jnp.int32) - 1, labels_bn.shape[1])
    rows_b1 = jnp.arange(len(labels_bn), dtype=jnp.int32)[:, None]
    moved_bn = jnp.zeros_like(labels_bn).at[rows_b1, place_bn].set(labels_bn, mode="drop")
    return moved_bn, jnp.sum(is_label_bn, 1, dtype=jnp.int32)


def ctc_loss(
    logits: ArrayLike,
    logit_paddings: ArrayLike,
    labels: ArrayLike,
    label_paddings: ArrayLike,
    blank_id: int = 0,
    *,
    where: ArrayLike | None = None,
    zero_infinity: bool = False,
    reduction: str = "none",
) -> jax.Array:
    """Connectionist temporal classification: ``-log sum_a prod_t softmax(logits_t)_(a_t)`` over all alignments ``a``.

    An alignment is one class or blank for each frame that gives the labels once repeats are merged and blanks dropped.
    Arguments and values are those of ``optax.ctc_loss`` without ``log_epsilon``: the logarithm of 0 is -inf here, not a
    large negative number, so that what is impossible costs +inf.

    Args:
      logits: unnormalised log-probabilities, floating, shape ``[batch, frames, classes]``, the blank among the classes;
        -inf marks a class that does not exist.
      logit_paddings: shape ``[batch, frames]``: 0 where the frame exists, anything else where it is padding. Padded
        frames are skipped wherever they stand and get no gradient, whatever they hold.
      labels: integers in [0, classes), shape ``[batch, labels]``. One that is out of range, or the blank, makes the
        loss and the gradient of its example NaN, unless it is padding.
      label_paddings: shape ``[batch, labels]``: 0 where the label exists. Padded ones are skipped wherever they stand.
      blank_id: the class that stands for no label; a Python int.
      where: booleans of shape ``[batch]``: which examples count. The others cost 0 and get no gradient, whatever they
        hold.
      zero_infinity: make infinite losses 0. Their gradient is 0 with or without it.
      reduction: ``"none"``; ``"sum"``; or ``"mean"``, the sum over the number of examples that count (PyTorch's mean
        also divides each loss by its number of labels).

    Returns:
      One loss per example in nats, shape ``[batch]``, or a scalar after a reduction; float32 (float64 if the logits
      are); never below 0. Labels that need more frames than there are (one each, and one between equal neighbours)
      cost +inf. Second derivatives go through the recursion, and need finite numbers in padding; ``jax.jvp`` of
      the loss itself raises.

    Raises:
      ValueError: the shapes do not fit, ``blank_id`` is not a class, or ``reduction`` is unknown.
      TypeError: the logits are not floating, the labels not integer, ``where`` not boolean, or ``blank_id`` not an int.

    Source: Graves et al., *Connectionist temporal classification: labelling unsegmented sequence data with recurrent
    neural networks*, 2006.

    >>> logits = jnp.log(jnp.array([[[0.5, 0.5], [0.5, 0.5]]]))
    >>> ctc_loss(logits, jnp.zeros((1, 2)), jnp.array([[1]]), jnp.zeros((1, 1)))  # 3 of the 4 paths: -log 0.75
    Array([0.2877], dtype=float32)
    """
    check_reduction(reduction)
    logits_btk, is_frame_bt = check_frames(logits, logit_paddings)
    blank_id = check_blank_id(blank_id, logits_btk.shape[2])
    labels_bn, is_label_bn = _check_labels(labels, label_paddings, logits_btk.shape)
    counts_b = jnp.ones(len(logits_btk), bool) if where is None else _check_where(where, logits_btk.shape)
    # An example that does not count is one of no frames and no labels, which costs 0.
    is_frame_bt, is_label_bn = is_frame_bt & counts_b[:, None], is_label_bn & counts_b[:, None]
    valid_bn = (labels_bn >= 0) & (labels_bn < logits_btk.shape[2]) & (labels_bn != blank_id)
    is_valid_b = jnp.all(valid_bn | ~is_label_bn, 1)
    labels_bn, lengths_b = compact(jnp.where(valid_bn, labels_bn, 0).astype(jnp.int32), is_label_bn)
    sequences = Sequences(logits_btk, is_frame_bt, labels_bn, lengths_b)
    loss_b = _negative_log_likelihood(sequences, blank_id)
    loss_b = loss_b * jnp.where(is_valid_b, 1, jnp.nan).astype(loss_b.dtype)
    if zero_infinity:
        loss_b = jnp.where(loss_b == jnp.inf, 0, loss_b)
    if reduction == "none":
        return loss_b
    return (
        jnp.sum(loss_b) if reduction == "sum" else safe_divide(jnp.sum(loss_b), jnp.sum(counts_b, dtype=loss_b.dtype))
    )


def _check_labels(labels: ArrayLike, label_paddings: ArrayLike, shape) -> tuple[jax.Array, jax.Array]:
    """Labels [B, N], and which of them exist."""
    labels_bn, paddings_bn = as_labels(labels), as_real("label_paddings", label_paddings)
    if labels_bn.ndim != 2 or len(labels_bn) != shape[0]:
        raise ValueError(
            f"labels must have shape [batch, labels] = ({shape[0]}, ...) for logits {shape}, got {labels_bn.shape}"
        )
    check_same_shape(("labels", "label_paddings"), labels_bn, paddings_bn)
    # Wider first: -1 or 300 must not turn into a class in a comparison with a uint8.
    return labels_bn.astype(jnp.promote_types(labels_bn.dtype, jnp.int32)), paddings_bn == 0


def _check_where(where: ArrayLike, shape) -> jax.Array:
    mask_b = as_boolean(where)
    if mask_b.shape != shape[:1]:
        raise ValueError(f"where must have shape {shape[:1]}, one entry per example, got {mask_b.shape}")
    return mask_b
