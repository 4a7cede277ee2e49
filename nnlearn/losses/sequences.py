"""Checks of the arguments of losses and decoders of unaligned sequences."""

import operator

import jax
import jax.numpy as jnp
from jax.core import Tracer

from nnlearn.losses.arguments import as_boolean, as_floating, as_real, check_same_shape
from nnlearn.losses.softmax import as_labels
from nnlearn.tree import widest
from nnlearn.types import ArrayLike


def check_blank_id(blank_id: int, classes: int) -> int:
    """``blank_id`` as a Python int in [0, classes)."""
    if isinstance(blank_id, Tracer):
        raise TypeError("blank_id decides which program is compiled, so it must be a Python int, not a traced value")
    try:
        number = operator.index(blank_id)
    except TypeError as error:
        raise TypeError(f"blank_id must be an int, got {blank_id!r} ({type(blank_id).__name__})") from error
    if not 0 <= number < classes:
        raise ValueError(f"blank_id must be in [0, {classes}), a class of the logits, got {blank_id!r}")
    return number


def check_frames(logits: ArrayLike, logit_paddings: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Logits [B, T, K], and the mask of frames [B, T]."""
    logits_btk = as_floating("logits", logits)
    if logits_btk.ndim != 3:
        raise ValueError(
            f"logits must have shape [batch, frames, classes], got {logits_btk.shape}; "
            "for one sequence pass logits[None]"
        )
    paddings_bt = as_real("logit_paddings", logit_paddings)
    check_same_shape(("logits[..., 0]", "logit_paddings"), logits_btk[..., 0], paddings_bt)
    return logits_btk, ~paddings_bt.astype(bool)


def running_count(is_one_bn: jax.Array, width: int = 16) -> jax.Array:
    """Cumulative count of True along each row, by matrix products, which XLA runs faster than ``cumsum``."""
    batch, size = is_one_bn.shape
    chunks = -(-size // width)
    padded_bm = jnp.pad(is_one_bn.astype(jnp.float32), ((0, 0), (0, chunks * width - size)))
    up_to_bcw = jnp.dot(padded_bm.reshape(batch, chunks, width), jnp.triu(jnp.ones((width, width), jnp.float32)))
    total_bc = up_to_bcw[..., -1].astype(jnp.int32)
    count_bcw = up_to_bcw.astype(jnp.int32) + (jnp.cumsum(total_bc, 1) - total_bc)[..., None]
    return count_bcw.reshape(padded_bm.shape)[:, :size]


def compact(labels_bn: jax.Array, is_label_bn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Labels moved to the front in order and padded with 0, and their number in each row."""
    # A scatter: XLA would fuse the gather of a sort into every later look-up and repeat it for every frame.
    place_bn = jnp.where(is_label_bn, running_count(is_label_bn) - 1, labels_bn.shape[1])
    rows_b1 = jnp.arange(len(labels_bn), dtype=jnp.int32)[:, None]
    moved_bn = jnp.zeros_like(labels_bn).at[rows_b1, place_bn].set(labels_bn, mode="drop")
    return moved_bn, jnp.sum(is_label_bn, 1, dtype=jnp.int32)


def check_labels(labels: ArrayLike, label_paddings: ArrayLike, shape) -> tuple[jax.Array, jax.Array]:
    """Labels [B, N], and the mask of labels."""
    labels_bn, paddings_bn = as_labels(labels), as_real("label_paddings", label_paddings)
    if labels_bn.ndim != 2 or len(labels_bn) != shape[0]:
        raise ValueError(
            f"labels must have shape [batch, labels] = ({shape[0]}, ...) for logits {shape}, got {labels_bn.shape}"
        )
    check_same_shape(("labels", "label_paddings"), labels_bn, paddings_bn)
    # Widened first, so that comparisons with -1 or 300 are not done in uint8.
    return labels_bn.astype(widest(labels_bn.dtype, jnp.int32)), ~paddings_bn.astype(bool)


def check_examples(where: ArrayLike, shape) -> jax.Array:
    mask_b = as_boolean(where)
    if mask_b.shape != shape[:1]:
        raise ValueError(f"where must have shape {shape[:1]}, one entry per example, got {mask_b.shape}")
    return mask_b


__all__ = ["check_blank_id", "check_examples", "check_frames", "check_labels", "compact", "running_count"]
