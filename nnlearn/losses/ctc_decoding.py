"""Decoding of the logits of a network trained with ``ctc_loss``: the best alignment, or the best labels.

Both functions run inside a compiled program. The greedy decoder takes the most likely alignment, whose labels need not
be the most likely: many alignments of other labels may have a larger sum. The beam search sums over alignments.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count
from nnlearn.losses.arguments import widen
from nnlearn.losses.sequences import check_blank_id, check_frames, compact
from nnlearn.losses.softmax import normalize_logits
from nnlearn.sharding.axes import automatic_axes
from nnlearn.types import ArrayLike


class Decoded(NamedTuple):
    """Labels padded to the number of frames, their paddings (1.0 = no label), and log-probabilities."""

    labels: jax.Array
    label_paddings: jax.Array
    scores: jax.Array


class Beam(NamedTuple):
    """The prefixes kept: log-probabilities, last label, length, and hashes of their labels.

    Prefixes are compared by two 32-bit hashes, so that a comparison takes the same time at any length.
    """

    ends_in_blank_w: jax.Array
    ends_in_label_w: jax.Array
    last_w: jax.Array  # -1 for no label
    length_w: jax.Array
    hash_w2: jax.Array
    parent_hash_w2: jax.Array

    @property
    def total_w(self) -> jax.Array:
        return jnp.logaddexp(self.ends_in_blank_w, self.ends_in_label_w)


@automatic_axes(like="logits")
def ctc_greedy_decode(logits: ArrayLike, logit_paddings: ArrayLike, blank_id: int = 0) -> Decoded:
    """Greedy CTC decoding: the most likely class of each frame, with repeats merged and blanks dropped.

    Args:
      logits: unnormalised log-probabilities, floating-point, shape ``[batch, frames, classes]``.
      logit_paddings: shape ``[batch, frames]``: 0 where the frame exists. Padding is skipped at any position.
      blank_id: index of the blank class; a Python int.

    Returns:
      ``labels`` (int32) and ``label_paddings`` (1.0 = padding), shape ``[batch, frames]``, as ``ctc_loss`` takes them;
      ``scores``, the log-probability of the alignment, shape ``[batch]``.

    Raises:
      ValueError: if the shapes do not match, or ``blank_id`` is not a class.
      TypeError: if the logits are not floating-point, or ``blank_id`` is not an int.

    Source: Graves et al., *Connectionist temporal classification: labelling unsegmented sequence data with recurrent
    neural networks*, 2006, section 3.2 (best path decoding).

    >>> logits = jnp.log(jnp.array([[[0.1, 0.9], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]]]))
    >>> labels, paddings, scores = ctc_greedy_decode(logits, jnp.zeros((1, 4)))
    >>> labels, paddings
    (Array([[1, 1, 0, 0]], dtype=int32), Array([[0., 0., 1., 1.]], dtype=float32))
    """
    log_probs_btk, is_frame_bt = _log_probs(logits, logit_paddings)
    blank_id = check_blank_id(blank_id, log_probs_btk.shape[2])
    best_bt, lengths_b = compact(jnp.argmax(log_probs_btk, 2).astype(jnp.int32), is_frame_bt)
    before_bt = jnp.pad(best_bt[:, :-1], ((0, 0), (1, 0)), constant_values=-1)[:, : best_bt.shape[1]]
    is_new_bt = (best_bt != blank_id) & (best_bt != before_bt)
    is_new_bt &= jnp.arange(best_bt.shape[1], dtype=jnp.int32)[None] < lengths_b[:, None]
    scores_b = jnp.sum(jnp.where(is_frame_bt, jnp.max(log_probs_btk, 2), 0), 1)
    return _pack(best_bt, is_new_bt, scores_b)


@automatic_axes(like="logits")
def ctc_beam_search_decode(
    logits: ArrayLike, logit_paddings: ArrayLike, beam_width: int = 16, blank_id: int = 0, *, top_paths: int = 1
) -> Decoded:
    """CTC beam search: the most likely labels, keeping the ``beam_width`` most likely prefixes after every frame.

    The probability of a prefix is a sum over its alignments, kept separately for those that end in a blank and those
    that end in its last label. Scores are exact if the beam holds all prefixes; otherwise they are too low by the
    alignments of dropped prefixes. The time per frame is proportional to ``beam_width * (classes + beam_width)``.

    Args:
      logits: unnormalised log-probabilities, floating-point, shape ``[batch, frames, classes]``.
      logit_paddings: shape ``[batch, frames]``: 0 where the frame exists. Padding is skipped at any position.
      beam_width: number of prefixes kept.
      blank_id: index of the blank class; a Python int.
      top_paths: number of results, at most ``beam_width``.

    Returns:
      ``labels`` (int32) and ``label_paddings`` (1.0 = padding), shape ``[batch, top_paths, frames]``, most likely
      first; ``scores``, the log-probabilities of the labels, shape ``[batch, top_paths]``. If fewer label sequences are
      possible, the remaining results have a score of -inf and are meaningless.

    Raises:
      ValueError: if the shapes do not match, or an argument is out of range.
      TypeError: if the logits are not floating-point, or an argument is not an int.

    Source: Graves and Jaitly, *Towards end-to-end speech recognition with recurrent neural networks*, 2014; Hannun et
    al., *First-pass large vocabulary continuous speech recognition using bi-directional recurrent DNNs*, 2014.

    >>> logits = jnp.log(jnp.array([[[0.6, 0.4], [0.6, 0.4]]]))  # greedy: no label, 0.36; one label: 0.64
    >>> labels, paddings, scores = ctc_beam_search_decode(logits, jnp.zeros((1, 2)))
    >>> labels, paddings, jnp.exp(scores)
    (Array([[[1, 0]]], dtype=int32), Array([[[0., 1.]]], dtype=float32), Array([[0.64]], dtype=float32))
    """
    log_probs_btk, is_frame_bt = _log_probs(logits, logit_paddings)
    blank_id = check_blank_id(blank_id, log_probs_btk.shape[2])
    width, paths = check_count("beam_width", beam_width), check_count("top_paths", top_paths)
    if paths > width:
        raise ValueError(f"top_paths must be at most beam_width = {width}, got {paths}")

    def search(log_probs_tk, is_frame_t):
        def step(beam, frame):
            log_probs_k, is_frame = frame
            return _advance(beam, log_probs_k, is_frame, blank_id)

        beam, history = jax.lax.scan(step, _initial_beam(width, log_probs_tk.dtype), (log_probs_tk, is_frame_t))
        _, labels_tp = jax.lax.scan(_trace_back, jnp.arange(paths, dtype=jnp.int32), history, reverse=True)
        return labels_tp.T, beam.total_w[:paths]

    labels_bpt, scores_bp = jax.vmap(search)(log_probs_btk, is_frame_bt)
    flat = labels_bpt.reshape(-1, labels_bpt.shape[2])
    decoded = _pack(flat, flat >= 0, scores_bp)
    shape = labels_bpt.shape
    return Decoded(decoded.labels.reshape(shape), decoded.label_paddings.reshape(shape), scores_bp)


def _log_probs(logits: ArrayLike, logit_paddings: ArrayLike) -> tuple[jax.Array, jax.Array]:
    logits_btk, is_frame_bt = check_frames(logits, logit_paddings)
    rows = normalize_logits(*widen(logits_btk), (2,))
    return rows.shifted - rows.log_total, is_frame_bt


def _pack(labels_bt: jax.Array, is_label_bt: jax.Array, scores: jax.Array) -> Decoded:
    labels_bt, lengths_b = compact(labels_bt, is_label_bt)
    paddings_bt = (jnp.arange(labels_bt.shape[1], dtype=jnp.int32)[None] >= lengths_b[:, None]).astype(scores.dtype)
    return Decoded(labels_bt, paddings_bt, scores)


def _initial_beam(width: int, dtype) -> Beam:
    """A beam with the empty prefix; its other entries have probability 0."""
    first_w = jnp.arange(width, dtype=jnp.int32) == 0
    hash_w2 = jnp.zeros((width, 2), jnp.uint32)
    return Beam(
        jnp.where(first_w, 0, -jnp.inf).astype(dtype),
        jnp.full(width, -jnp.inf, dtype),
        jnp.full(width, -1, jnp.int32),
        jnp.zeros(width, jnp.int32),
        hash_w2,
        hash_w2,
    )


def _extend_hash(hash_w2: jax.Array, label_w: jax.Array) -> jax.Array:
    """The hashes of prefixes extended by one label: two Murmur-style mixes with different constants."""
    mixed = (hash_w2 ^ (label_w.astype(jnp.uint32)[:, None] + 1)) * jnp.array([[0x9E3779B1, 0x85EBCA77]], jnp.uint32)
    mixed = (mixed ^ (mixed >> 15)) * jnp.array([[0xC2B2AE3D, 0x27D4EB2F]], jnp.uint32)
    return mixed ^ (mixed >> 13)


def _is_parent(beam: Beam) -> jax.Array:
    """Whether the second of each two prefixes is the first plus one label, shape [W, W]."""
    same_ww = jnp.all(beam.hash_w2[:, None] == beam.parent_hash_w2[None], 2)
    longer_ww = beam.length_w[:, None] + 1 == beam.length_w[None]
    return same_ww & longer_ww & (beam.total_w > -jnp.inf)[None]  # an unused entry has no parent


def _advance(beam: Beam, log_probs_k: jax.Array, is_frame: jax.Array, blank_id: int):
    """The beam after one frame, the index of each prefix's parent, and the label added to it, or -1."""
    width, classes = len(beam.last_w), len(log_probs_k)
    total_w, last_w = beam.total_w, jnp.maximum(beam.last_w, 0)
    repeats_wk = beam.last_w[:, None] == jnp.arange(classes, dtype=jnp.int32)[None]
    grown_wk = jnp.where(repeats_wk, beam.ends_in_blank_w[:, None], total_w[:, None]) + log_probs_k[None]
    # A prefix that grows into one already in the beam is added to that one instead of being a candidate.
    is_parent_ww = _is_parent(beam)
    joined_w = jax.nn.logsumexp(jnp.where(is_parent_ww, grown_wk[:, last_w], -jnp.inf), 0)
    grown_wk = grown_wk.at[jnp.arange(width, dtype=jnp.int32)[:, None], last_w[None]].min(
        jnp.where(is_parent_ww, -jnp.inf, jnp.inf)
    )
    blank_w = total_w + log_probs_k[blank_id]
    repeated_w = jnp.where(beam.last_w < 0, -jnp.inf, beam.ends_in_label_w + log_probs_k[last_w])
    label_w = jnp.logaddexp(repeated_w, joined_w)
    # No prefix grows by a blank, so that column holds the unchanged prefixes.
    candidates_wk = grown_wk.at[:, blank_id].set(jnp.logaddexp(blank_w, label_w))
    score_w, chosen_w = jax.lax.top_k(candidates_wk.reshape(-1), width)
    from_w, by_w = jnp.divmod(chosen_w.astype(jnp.int32), classes)
    grows_w = by_w != blank_id
    after = Beam(
        jnp.where(grows_w, -jnp.inf, blank_w[from_w]),
        jnp.where(grows_w, score_w, label_w[from_w]),
        jnp.where(grows_w, by_w, beam.last_w[from_w]),
        beam.length_w[from_w] + grows_w.astype(beam.length_w.dtype),
        jnp.where(grows_w[:, None], _extend_hash(beam.hash_w2[from_w], by_w), beam.hash_w2[from_w]),
        jnp.where(grows_w[:, None], beam.hash_w2[from_w], beam.parent_hash_w2[from_w]),
    )
    kept = Beam(*(jnp.where(is_frame, new, old) for new, old in zip(after, beam, strict=True)))
    from_w = jnp.where(is_frame, from_w, jnp.arange(width, dtype=jnp.int32))
    return kept, (from_w, jnp.where(is_frame & grows_w, by_w, -1))


def _trace_back(place_p: jax.Array, frame):
    """Indices of the prefixes before a frame, and the labels added in it."""
    from_w, label_w = frame
    return from_w[place_p], label_w[place_p]
