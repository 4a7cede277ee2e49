"""Connectionist temporal classification: the loss of a label sequence that is not aligned with the frames.

An alignment names one class, or the blank, for every frame; merging repeats and dropping blanks gives the labels. The
probability of the labels is the sum over all their alignments, computed by a recursion over the frames.

The states of the recursion are stored in two arrays: ``label`` n, in the n-th label, and ``blank`` n, in the blank
before it. Read from the last frame to the first, with reversed labels, the recursion has the same form. So one ``scan``
over 2 B rows runs both directions at once until they meet in the middle, where the loss is known. For the gradient,
each direction continues over the other's frames and combines with the scores stored there to the posterior probability
of every label.

A probability may be far below the range of a float, so each is a float with a separate exponent.
"""

import functools
import math
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from nnlearn.losses.arguments import check_reduction, widen
from nnlearn.losses.scaled import Scaled, add, exact_exp2, from_log, multiply, normalize_mantissa
from nnlearn.losses.sequences import check_blank_id, check_examples, check_frames, check_labels, compact, running_count
from nnlearn.losses.softmax import one_or_nan
from nnlearn.native.ctc import CtcKernel
from nnlearn.native.kernel import runs_here
from nnlearn.sharding.axes import automatic_axes
from nnlearn.tree import safe_divide
from nnlearn.types import ArrayLike

FEW_CLASSES = 128  # up to this many, a product with one-hot labels is faster and smaller than a scatter
MAX_EXPONENT = 127  # the exponent of the largest power of two in float32
UNROLL = 8  # on an H200 five times as fast as 1; compilation takes 2 s longer
BLOCK = 16  # frames between normalisations: a frame multiplies a mantissa by at most 6, and 6**16 < 2**42

NO_GRADIENT: tuple[Any, Any, Any] = (None, None, None)  # for the integers and booleans of ``Sequences``


class Sequences(NamedTuple):
    """Checked arguments: logits, mask of frames, labels moved to the front and padded with 0, and their lengths."""

    logits_btk: jax.Array
    is_frame_bt: jax.Array
    labels_bn: jax.Array
    lengths_b: jax.Array


class Softmax(NamedTuple):
    """Exponentials of ``logits - largest``, and their sum, which is 1 where it would be 0."""

    weights_xk: jax.Array  # x: all frames of all examples, so that the gradient can reuse the memory
    largest_bt: jax.Array
    total_bt: jax.Array


class Rows(NamedTuple):
    """Inputs of the recursion: the examples forward, followed by the examples backward, ``steps`` frames each.

    Frames that exist come first (``order_bt``), so forward rows end and backward rows begin with padding. Columns 0 and
    N + 1 hold no label; neither do those after the last label or, in backward rows, before the first.
    """

    steps: int
    order_bt: jax.Array
    frame_counts_b: jax.Array
    labels_rw: jax.Array
    is_label_rw: jax.Array
    start_r: jax.Array  # the column of the first label

    @property
    def differs_rv(self) -> jax.Array:
        """Whether neighbouring labels differ, so that no blank is needed between them."""
        return self.labels_rw[:, 1:] != self.labels_rw[:, :-1]


class Frames(NamedTuple):
    """Probabilities of the classes at each step, relative to the most likely class of the frame."""

    blank_sr1: Scaled
    label_srw: Scaled


def _compute_softmax(logits_btk: jax.Array, is_frame_bt: jax.Array) -> Softmax:
    # The smallest finite number instead of -inf: a row of -inf then needs no ``where``, which XLA would not fuse.
    smallest = jnp.finfo(logits_btk.dtype).min
    largest_bt = jax.lax.stop_gradient(jnp.max(logits_btk, 2, initial=smallest))
    weights_xk = jnp.exp(logits_btk.reshape(-1, logits_btk.shape[2]) - largest_bt.reshape(-1, 1))
    weights_xk = jnp.where(is_frame_bt.reshape(-1, 1), weights_xk, 0)  # padding may hold inf, and inf - inf is NaN
    total_bt = jnp.sum(weights_xk, 1).reshape(largest_bt.shape)
    return Softmax(weights_xk, largest_bt, jnp.where(total_bt == 0, 1, total_bt))


def _arrange_rows(sequences: Sequences) -> Rows:
    is_frame_bt, labels_bn, lengths_b = sequences[1:]
    numbers_bt = jnp.broadcast_to(jnp.arange(is_frame_bt.shape[1], dtype=jnp.int32)[None], is_frame_bt.shape)
    order_bt, frame_counts_b = compact(numbers_bt, is_frame_bt)
    labels_bw = jnp.pad(labels_bn, ((0, 0), (1, 1)))
    column_1w = jnp.arange(labels_bw.shape[1], dtype=jnp.int32)[None]
    is_label_bw = (column_1w > 0) & (column_1w <= lengths_b[:, None])
    labels_rw, is_label_rw = (jnp.concatenate([one, jnp.flip(one, 1)]) for one in (labels_bw, is_label_bw))
    start_r = jnp.concatenate([jnp.ones_like(lengths_b), labels_bw.shape[1] - 1 - lengths_b])
    return Rows(-(-is_frame_bt.shape[1] // 2), order_bt, frame_counts_b, labels_rw, is_label_rw, start_r)


def _gather_frames(logits_btk: jax.Array, largest_bt: jax.Array, rows: Rows, blank_id: int) -> Frames:
    batch, frames, _ = logits_btk.shape
    forward_s1 = jnp.arange(rows.steps, dtype=jnp.int32)[:, None]
    place_sr = jnp.repeat(jnp.concatenate([forward_s1, 2 * rows.steps - 1 - forward_s1], 1), batch, 1)
    example_sr = jnp.broadcast_to(jnp.tile(jnp.arange(batch, dtype=jnp.int32), 2)[None], place_sr.shape)
    frame_sr = rows.order_bt[example_sr, jnp.minimum(place_sr, frames - 1)]
    is_frame_sr = place_sr < jnp.tile(rows.frame_counts_b, 2)[None]
    shape = (*place_sr.shape, rows.labels_rw.shape[1])
    at = [jnp.broadcast_to(one[..., None], shape) for one in (example_sr, frame_sr)]
    at_label = (*at, jnp.broadcast_to(rows.labels_rw[None], shape))
    label_srw = logits_btk.at[at_label].get(mode="promise_in_bounds")
    blank_sr = logits_btk[:, :, blank_id].at[example_sr, frame_sr].get(mode="promise_in_bounds")
    largest_sr = largest_bt.at[example_sr, frame_sr].get(mode="promise_in_bounds")
    label_srw, blank_sr = label_srw.astype(largest_bt.dtype), blank_sr.astype(largest_bt.dtype)
    # Padding frames are blanks of probability 1, which do not change the probability of the labels.
    blank_sr = jnp.where(is_frame_sr, blank_sr - largest_sr, 0)
    exists_srw = is_frame_sr[..., None] & rows.is_label_rw[None]
    label_srw = jnp.where(exists_srw, label_srw - largest_sr[..., None], -jnp.inf)
    return Frames(from_log(blank_sr[..., None]), from_log(label_srw))


# The states of all rows are one array [4, R, W], mantissas and exponents of blanks and labels, so that XLA compiles a
# step of the scan to few kernels. For the same reason a step reads each array of frames once, and last.


def _blank_and_label(states_4rw: jax.Array) -> tuple[Scaled, Scaled]:
    return Scaled(*states_4rw[:2]), Scaled(*states_4rw[2:])


def _initial_states(rows: Rows, dtype) -> jax.Array:
    """States before the first frame: probability 1 of the blank before the first label."""
    is_start_rw = jnp.arange(rows.labels_rw.shape[1], dtype=jnp.int32)[None] == rows.start_r[:, None]
    zero = Scaled(jnp.zeros(is_start_rw.shape, dtype), jnp.full(is_start_rw.shape, -jnp.inf, dtype))
    return jnp.stack([is_start_rw.astype(dtype), jnp.where(is_start_rw, 0, zero.exponent), *zero])


def _enter(states_4rw: jax.Array, may_skip_rw: jax.Array, towards: int) -> jax.Array:
    """Scores before emitting a frame from each state; labels are read to the right (1) or to the left (-1)."""
    blank, label = _blank_and_label(states_4rw)
    entered = add(blank, Scaled(*jnp.roll(states_4rw[2:], towards, 2)))  # the column that wraps around holds no label
    come_from = Scaled(*(jnp.where(may_skip_rw, e, b) for e, b in zip(entered, blank, strict=True)))
    return jnp.stack([*entered, *add(label, come_from)])


def _emit(entered_4rw: jax.Array, frame: Frames) -> jax.Array:
    blank, label = (multiply(*both) for both in zip(_blank_and_label(entered_4rw), frame, strict=True))
    return jnp.stack([*blank, *label])


def _normalize_states(states_4rw: jax.Array) -> jax.Array:
    both = normalize_mantissa(Scaled(states_4rw[::2], states_4rw[1::2]))  # as one array, for one kernel
    return jnp.stack(both, 1).reshape(states_4rw.shape)


def _normalize_every_block(states_4rw: jax.Array, step: jax.Array) -> jax.Array:
    if jax.default_backend() != "cpu":  # on an accelerator a condition costs more than it saves
        return _normalize_states(states_4rw)
    return jax.lax.cond(step % BLOCK == 0, _normalize_states, lambda states_4rw: states_4rw, states_4rw)


def _scan_unroll() -> int:
    """Steps per iteration of a scan, whose overhead on an accelerator is that of several steps."""
    return 1 if jax.default_backend() == "cpu" else UNROLL


def _step_of(frames: Any, step: int | jax.Array) -> Any:
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, step, 0, keepdims=False), frames)


@overload
def _run_to_middle(rows: Rows, frames: Frames, keep: Literal[True]) -> tuple[jax.Array, jax.Array]: ...
@overload
def _run_to_middle(rows: Rows, frames: Frames, keep: Literal[False]) -> tuple[jax.Array, None]: ...
def _run_to_middle(rows: Rows, frames: Frames, keep: bool) -> tuple[jax.Array, jax.Array | None]:
    """States after the first half of the frames and, if ``keep``, the label scores before each step."""
    may_skip_rw = jnp.pad(rows.differs_rv, ((0, 0), (1, 0)))

    def one_step(states_4rw, inputs):
        step, frame = inputs
        states_4rw = _normalize_every_block(states_4rw, step)
        after_4rw = _emit(_enter(states_4rw, may_skip_rw, 1), frame)
        return after_4rw, states_4rw[2:] if keep else None

    start_4rw = _initial_states(rows, frames.label_srw.mantissa.dtype)
    return jax.lax.scan(one_step, start_4rw, (jnp.arange(rows.steps, dtype=jnp.int32), frames), unroll=_scan_unroll())


def _enter_from_other_end(rows: Rows, states_4rw: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scores of each example from its other end, before emitting the row's last frame; and the labels that may
    follow each other without a blank."""
    may_skip_rw = jnp.pad(rows.differs_rv, ((0, 0), (0, 1)))
    other_4rw = jnp.flip(jnp.roll(states_4rw, states_4rw.shape[1] // 2, 1), 2)
    return _enter(other_4rw, may_skip_rw, -1), may_skip_rw


def _meet(states_4rw: jax.Array, entered_4rw: jax.Array) -> Scaled:
    """Likelihood of each row's labels, from the scores of both directions."""
    (blank, label), (next_blank, next_label) = _blank_and_label(states_4rw), _blank_and_label(entered_4rw)
    # The blank before a label in one direction is the blank after it in the other.
    blank = multiply(Scaled(*(one[:, 1:] for one in blank)), Scaled(*(one[:, :-1] for one in next_blank)))
    both = blank, multiply(label, next_label)
    exponent_r = functools.reduce(jnp.maximum, (jnp.max(one.exponent, 1) for one in both))
    scaled = (one.mantissa * exact_exp2(one.exponent - exponent_r[:, None]) for one in both)
    return Scaled(jnp.asarray(sum(jnp.sum(one, 1) for one in scaled)), exponent_r)


def _loss_of(softmax: Softmax, is_frame_bt: jax.Array, likelihood: Scaled) -> jax.Array:
    mantissa_b, exponent_b = (one[: len(is_frame_bt)] for one in likelihood)
    cost_b = jnp.sum(jnp.where(is_frame_bt, jnp.log(softmax.total_bt), 0), 1)
    # Rounding may give a value below 0.
    return jnp.maximum(cost_b - (jnp.log(mantissa_b) + exponent_b * math.log(2)), 0)


def _loss_without_gradient(sequences: Sequences, blank_id: int) -> jax.Array:
    """The loss of each example. Without a gradient half the steps suffice, and no history is stored."""
    softmax, rows = _compute_softmax(*widen(sequences.logits_btk), sequences.is_frame_bt), _arrange_rows(sequences)
    frames = _gather_frames(sequences.logits_btk, softmax.largest_bt, rows, blank_id)
    states_4rw, _ = _run_to_middle(rows, frames, keep=False)
    return _loss_of(softmax, sequences.is_frame_bt, _meet(states_4rw, _enter_from_other_end(rows, states_4rw)[0]))


def _forward(sequences: Sequences, blank_id: int):
    """The loss, and the posterior probability of each label at each frame."""
    softmax, rows = _compute_softmax(*widen(sequences.logits_btk), sequences.is_frame_bt), _arrange_rows(sequences)
    frames = _gather_frames(sequences.logits_btk, softmax.largest_bt, rows, blank_id)
    states_4rw, history_s2rw = _run_to_middle(rows, frames, keep=True)
    entered_4rw, may_skip_rw = _enter_from_other_end(rows, states_4rw)
    likelihood = _meet(states_4rw, entered_4rw)
    loss_b = _loss_of(softmax, sequences.is_frame_bt, likelihood)
    over_r1 = 1 / jnp.where(likelihood.mantissa == 0, 1, likelihood.mantissa)[:, None]
    exponent_r1 = likelihood.exponent[:, None]

    def share(entered_4rw, mantissa_rw, exponent_rw):
        # Exponents beyond a float's precision may be off by more than 1, so shares are clipped to 1.
        exponent_rw = entered_4rw[3] + (exponent_rw - exponent_r1)
        scale_rw = exact_exp2(jnp.where(exponent_rw > MAX_EXPONENT, MAX_EXPONENT, exponent_rw))
        share_rw = entered_4rw[2] * over_r1 * mantissa_rw * scale_rw
        return jnp.where(share_rw > 1, 1, share_rw)

    history_hrw = history_s2rw.reshape(-1, *history_s2rw.shape[2:])

    def one_step(states_4rw, step):
        entered_4rw = _enter(_normalize_every_block(states_4rw, step), may_skip_rw, -1)
        before = _step_of(history_hrw, 2 * step), _step_of(history_hrw, 2 * step + 1)
        return _emit(entered_4rw, _step_of(frames, jnp.maximum(step - 1, 0))), share(entered_4rw, *before)

    first_4rw = _normalize_states(_emit(entered_4rw, _step_of(frames, rows.steps - 1)))
    _, share_srw = jax.lax.scan(
        one_step, first_4rw, jnp.arange(rows.steps, dtype=jnp.int32), reverse=True, unroll=_scan_unroll()
    )
    # A step gives the shares of the frame before it. Step 0 has none, so its place holds those of the last frame.
    share_srw = share_srw.at[0].set(share(entered_4rw, *states_4rw[2:]))
    share_btn = _by_frame(share_srw, sequences.is_frame_bt)
    return loss_b, (sequences, softmax, share_btn, loss_b)


def _by_frame(share_srw: jax.Array, is_frame_bt: jax.Array) -> jax.Array:
    """Reorder shares from the rows' order of steps to frames and labels."""
    (steps, _, columns), batch = share_srw.shape, len(is_frame_bt)
    place_bt = running_count(is_frame_bt) - 1
    is_forward_bt = place_bt < steps
    step_bt = (jnp.where(is_forward_bt, place_bt, 2 * steps - 1 - place_bt) + 1) % steps
    row_bt = jnp.arange(batch, dtype=jnp.int32)[:, None] + jnp.where(is_forward_bt, 0, batch)
    column_11n = jnp.arange(1, columns - 1, dtype=jnp.int32)[None, None]
    column_btn = jnp.where(is_forward_bt[..., None], column_11n, columns - 1 - column_11n)
    step_btn, row_btn = (jnp.broadcast_to(one[..., None], column_btn.shape) for one in (step_bt, row_bt))
    share_btn = share_srw.at[step_btn, row_btn, column_btn].get(mode="promise_in_bounds")
    return jnp.where(is_frame_bt[..., None], share_btn, 0)


def _backward(blank_id: int, residuals, cotangent_b: jax.Array):
    sequences, softmax, share_btn, loss_b = residuals
    logits_btk, is_frame_bt, labels_bn, _ = sequences
    scale_bt = jnp.where(is_frame_bt, jnp.where(loss_b == jnp.inf, 0, cotangent_b)[:, None], 0)
    blank_bt = jnp.where(is_frame_bt, 1 - jnp.sum(share_btn, 2), 0) * scale_bt  # the rest of a frame's probability
    scale_x1, blank_x1 = (scale_bt / softmax.total_bt).reshape(-1, 1), blank_bt.reshape(-1, 1)
    softmax_xk = jnp.where(is_frame_bt.reshape(-1, 1), softmax.weights_xk * scale_x1, 0)
    is_blank_1k = (jnp.arange(logits_btk.shape[2], dtype=jnp.int32) == blank_id)[None]
    grad_xk = softmax_xk - jnp.where(is_blank_1k, blank_x1, 0)
    grad_xk = _subtract_at(grad_xk, labels_bn, share_btn * scale_bt[..., None])
    return (Sequences(grad_xk.reshape(logits_btk.shape).astype(logits_btk.dtype), *NO_GRADIENT),)


def _subtract_at(grad_xk: jax.Array, labels_bn: jax.Array, label_btn: jax.Array) -> jax.Array:
    """Subtract the share of every label at its class from ``grad``; equal labels add up."""
    labels, classes = label_btn.shape[2], grad_xk.shape[1]
    if classes <= FEW_CLASSES:
        one_hot_bnk = (labels_bn[..., None] == jnp.arange(classes, dtype=jnp.int32)[None, None]).astype(grad_xk.dtype)
        label_btk = jnp.einsum("btn,bnk->btk", label_btn, one_hot_bnk, precision=jax.lax.Precision.HIGHEST)
        return grad_xk - label_btk.reshape(grad_xk.shape)
    at_xn = jnp.broadcast_to(labels_bn[:, None], label_btn.shape).reshape(-1, labels)
    rows_x1 = jnp.arange(len(grad_xk), dtype=jnp.int32)[:, None]
    return grad_xk.at[rows_x1, at_xn].add(-label_btn.reshape(-1, labels), mode="promise_in_bounds")


# Each is jitted as a whole: the exponents of impossible states are NaN inside, which ``Scaled`` reads as 0, and eager
# operations would expose them to ``jax_debug_nans``.
_negative_log_likelihood = jax.custom_vjp(jax.jit(_loss_without_gradient, static_argnums=1), nondiff_argnums=(1,))
_negative_log_likelihood.defvjp(jax.jit(_forward, static_argnums=1), jax.jit(_backward, static_argnums=0))


def _reference(logits_btk, is_frame_bt, labels_bn, lengths_b, blank_id):
    return [_loss_without_gradient(Sequences(logits_btk, is_frame_bt, labels_bn, lengths_b), blank_id)]


def _reference_with_gradient(logits_btk, is_frame_bt, labels_bn, lengths_b, blank_id):
    loss_b, residuals = _forward(Sequences(logits_btk, is_frame_bt, labels_bn, lengths_b), blank_id)
    return [loss_b, _backward(blank_id, residuals, jnp.ones_like(loss_b))[0].logits_btk]


LOSS, LOSS_AND_GRADIENT = CtcKernel(_reference, gradient=False), CtcKernel(_reference_with_gradient, gradient=True)


def _kernel_loss(sequences: Sequences, blank_id: int) -> jax.Array:
    """``_negative_log_likelihood`` in C, one example at a time."""
    return LOSS(*sequences, jnp.int32(blank_id))[0]


def _kernel_forward(sequences: Sequences, blank_id: int):
    loss_b, grad_btk = LOSS_AND_GRADIENT(*sequences, jnp.int32(blank_id))
    return loss_b, (loss_b, grad_btk, sequences.is_frame_bt)


def _kernel_backward(blank_id: int, residuals, cotangent_b: jax.Array):
    loss_b, grad_btk, is_frame_bt = residuals
    scale_b11 = jnp.where(loss_b == jnp.inf, 0, cotangent_b)[:, None, None]
    return (Sequences(jnp.where(is_frame_bt[..., None], grad_btk * scale_b11, 0), *NO_GRADIENT),)


_by_kernel = jax.custom_vjp(_kernel_loss, nondiff_argnums=(1,))
_by_kernel.defvjp(_kernel_forward, _kernel_backward)


@automatic_axes(like="logits")
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
    """CTC loss, ``-log sum_a prod_t softmax(logits_t)_(a_t)`` over all alignments ``a``.

    An alignment names one class or the blank for each frame; merging repeats and dropping blanks gives the labels.
    Arguments and values are those of ``optax.ctc_loss`` without ``log_epsilon``: the logarithm of 0 is -inf, not a
    large negative number, so a label sequence that is impossible has loss +inf.

    Args:
      logits: unnormalised log-probabilities, floating-point, shape ``[batch, frames, classes]``, the blank among the
        classes; -inf marks a class that does not exist.
      logit_paddings: shape ``[batch, frames]``: 0 where the frame exists, any other value where it is padding. Padding
        is skipped at any position and gets no gradient, even if it is NaN.
      labels: integers in [0, classes), shape ``[batch, labels]``. One that is out of range, or the blank, makes the
        loss and the gradient of its example NaN, unless it is padding.
      label_paddings: shape ``[batch, labels]``: 0 where the label exists. Padding is skipped at any position.
      blank_id: index of the blank class; a Python int.
      where: booleans of shape ``[batch]``: which examples count. The others have loss 0 and no gradient, even if they
        are NaN.
      zero_infinity: whether to replace infinite losses by 0. Their gradient is 0 either way.
      reduction: ``"none"``; ``"sum"``; or ``"mean"``, the sum over the number of examples that count (PyTorch's mean
        also divides each loss by its number of labels).

    Returns:
      One loss per example in nats, shape ``[batch]``, or a scalar after a reduction; float32 (float64 if the logits
      are); never below 0. Labels that need more frames than there are (one each, and one between equal neighbours) have
      loss +inf. Second derivatives go through the recursion, and need finite values in padding; ``jax.jvp`` of the
      loss itself raises.

    Raises:
      ValueError: if the shapes do not match, ``blank_id`` is not a class, or ``reduction`` is unknown.
      TypeError: if the logits are not floating-point, the labels are not integers, ``where`` is not boolean, or
        ``blank_id`` not an int.

    Source: Graves et al., *Connectionist temporal classification: labelling unsegmented sequence data with recurrent
    neural networks*, 2006.

    >>> logits = jnp.log(jnp.array([[[0.5, 0.5], [0.5, 0.5]]]))
    >>> ctc_loss(logits, jnp.zeros((1, 2)), jnp.array([[1]]), jnp.zeros((1, 1)))  # 3 of the 4 paths: -log 0.75
    Array([0.2877], dtype=float32)
    """
    check_reduction(reduction)
    logits_btk, is_frame_bt = check_frames(logits, logit_paddings)
    blank_id = check_blank_id(blank_id, logits_btk.shape[2])
    labels_bn, is_label_bn = check_labels(labels, label_paddings, logits_btk.shape)
    if not logits_btk.shape[1]:  # one masked frame, as a gather needs at least one
        logits_btk = jnp.zeros((len(logits_btk), 1, logits_btk.shape[2]), logits_btk.dtype)
        is_frame_bt = jnp.zeros(logits_btk.shape[:2], bool)
    counts_b = jnp.ones(len(logits_btk), bool) if where is None else check_examples(where, logits_btk.shape)
    # A masked example has no frames and no labels, and so a loss of 0.
    is_frame_bt, is_label_bn = is_frame_bt & counts_b[:, None], is_label_bn & counts_b[:, None]
    valid_bn = (labels_bn >= 0) & (labels_bn < logits_btk.shape[2]) & (labels_bn != blank_id)
    is_valid_b = jnp.all(valid_bn | ~is_label_bn, 1)
    labels_bn, lengths_b = compact(jnp.where(valid_bn, labels_bn, 0).astype(jnp.int32), is_label_bn)
    sequences = Sequences(logits_btk, is_frame_bt, labels_bn, lengths_b)
    in_c = logits_btk.dtype == jnp.float32 and runs_here(logits_btk)
    loss_b = (_by_kernel if in_c else _negative_log_likelihood)(sequences, blank_id)
    loss_b = loss_b * one_or_nan(is_valid_b, loss_b.dtype)
    if zero_infinity:
        loss_b = jnp.where(loss_b == jnp.inf, 0, loss_b)
    if reduction == "none":
        return loss_b
    return (
        jnp.sum(loss_b) if reduction == "sum" else safe_divide(jnp.sum(loss_b), jnp.sum(counts_b, dtype=loss_b.dtype))
    )
