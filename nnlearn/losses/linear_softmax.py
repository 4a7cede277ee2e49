"""Softmax losses of a linear layer's outputs, and their gradients, without storing all outputs.

The logits ``hidden @ weight + bias`` are by far the largest array of a language model. Here the tokens are processed in
chunks: the logits, the losses and the gradient contributions of one chunk are computed before the next. That takes
three matrix products, like differentiating the whole layer, and the memory of one chunk's logits.

The loss of a token is a sum of terms, each with a coefficient. With ``x`` the token's logits, ``L`` the log of the sum
of their exponentials, ``y`` its label and ``w`` the class weights:

    own * (L - x_y) + spread * sum_k w_k (L - x_k) + square * L**2

Masks, smoothing and other options determine the coefficients, outside, in arithmetic that JAX differentiates.
"""

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from nnlearn.types import DTypeLike

AxisName = str | tuple[str, ...] | None
Part = TypeVar("Part")


class Plan(NamedTuple):
    """How the arrays are divided into chunks; static.

    Attributes:
      tokens: number of tokens in a chunk.
      rows: number of tokens whose logits are summed at a time; divides ``tokens``.
      columns: number of classes whose logit gradients are computed at a time.
      classes_axis: of the weight.
      dtype: of the operands of the matrix products.
      axis_name: the mapped axis over which the classes are divided, or None.
    """

    tokens: int
    rows: int
    columns: int
    classes_axis: int
    dtype: DTypeLike
    axis_name: AxisName


class Head(NamedTuple, Generic[Part]):
    """One value for each array that a loss depends on: ``Head[jax.Array]`` for the arrays, ``Head[bool]`` for whether
    its gradient is wanted, ``Head[jax.Array | None]`` for the gradients. None for an array that is absent.

    The last three arrays have the dtype of the sums.
    """

    hidden: Part  # [tokens, width]
    weight: Part  # [width, classes], or [classes, width]
    bias: Part | None  # [classes]
    softcap: Part | None  # []
    class_weights: Part | None  # [classes]


Arrays = Head[jax.Array]
Gradients = Head[jax.Array | None]


class Terms(NamedTuple):
    """The terms of each token's loss, or their coefficients, shape [tokens]; None for a term that is absent."""

    own: jax.Array
    spread: jax.Array | None
    square: jax.Array | None

    def map(self, function: Callable[..., jax.Array], *others: "Terms") -> "Terms":
        def apply(*parts: Any) -> Any:
            return None if parts[0] is None else function(*parts)

        return Terms(*map(apply, self, *others))

    def dot(self, other: "Terms") -> jax.Array:
        """Each token's loss, from its terms and their coefficients."""
        return jnp.asarray(sum(part for part in self.map(jnp.multiply, other) if part is not None))


class Sums(NamedTuple):
    """Sums over each token's logits that its loss and gradient need, shape [tokens]."""

    largest: jax.Array
    total: jax.Array  # sum_k exp(x_k - largest)
    weighted: jax.Array | None  # sum_k w_k (x_k - largest), if the loss has that term
    weight_total: jax.Array  # sum_k w_k, shape []
    label_logit: jax.Array

    @property
    def log_total(self) -> jax.Array:
        return jnp.log(jnp.where(self.total == 0, 1, self.total))

    @property
    def log_sum(self) -> jax.Array:
        """``L``, clipped before its square overflows, so that a coefficient of 0 gives 0."""
        limit = 0.5 * math.sqrt(float(jnp.finfo(self.largest.dtype).max))
        return jnp.clip(self.largest + self.log_total, -limit, limit)

    def terms(self, coefficients: Terms) -> Terms:
        """The terms of a loss; an infinite term without weight is replaced by 0."""
        picked = self.label_logit - self.largest
        own = self.log_total - jnp.where((picked == -jnp.inf) & (coefficients.own == 0), 0, picked)
        spread = None if self.weighted is None else self.weight_total * self.log_total - self.weighted
        return Terms(own, spread, None if coefficients.square is None else jnp.square(self.log_sum))


def evaluate(
    plan: Plan, wanted: Head[bool], head: Arrays, coefficients: Terms, labels: jax.Array, keep: jax.Array | None
) -> tuple[Terms, Gradients]:
    """The terms of every token's loss, and the ``wanted`` gradients of the summed losses, not yet rounded.

    Losses and gradients of a chunk share its logits, so together they take three matrix products.
    """
    dtype = coefficients.own.dtype

    def start(array: jax.Array | None, want: bool | None) -> jax.Array | None:
        return jnp.zeros_like(array, dtype) if want and array is not None else None

    def step(grads, chunk):
        hidden, coefficients, labels, keep = chunk
        if keep is not None:
            hidden = jnp.where(keep[:, None], hidden, 0)
        outputs = _product(hidden, head.weight, 1, 1 - plan.classes_axis, dtype)
        sums = _sum_up(plan, head, outputs, coefficients.spread, labels)
        terms = sums.terms(coefficients)
        if not any(wanted):
            return grads, (terms, None)
        chunk_head = head._replace(hidden=hidden)
        grads = _add_gradients(plan, wanted, chunk_head, outputs, sums, coefficients, labels, grads)
        return grads._replace(hidden=None), (terms, grads.hidden)

    def in_chunks(array):  # padded with zeros, which as coefficients add no loss
        chunks = -(-len(array) // plan.tokens)
        filled = jnp.pad(array, [(0, chunks * plan.tokens - len(array))] + [(0, 0)] * (array.ndim - 1))
        return filled.reshape(chunks, plan.tokens, *array.shape[1:])

    def joined(array):
        return array.reshape(array.shape[0] * plan.tokens, *array.shape[2:])[: len(labels)]

    chunks = jax.tree.map(in_chunks, (head.hidden, coefficients, labels, keep))
    grads, stacked = jax.lax.scan(step, Gradients(None, *map(start, head[1:], wanted[1:])), chunks)
    terms, hidden_grad = jax.tree.map(joined, stacked)
    return terms, grads._replace(hidden=hidden_grad)


def _product(left, right, left_axis, right_axis, dtype):
    """The matrix product over one axis of each operand, accumulated in ``dtype``."""
    contracted = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, contracted, preferred_element_type=dtype)


def _logits(outputs, bias, softcap):
    """Logits from a linear layer's outputs, and their derivatives by outputs and ``softcap``; None without softcap."""
    logits = outputs if bias is None else outputs + (bias[None] if outputs.ndim > 1 else bias)
    if softcap is None:
        return logits, None, None
    ratio = logits / softcap
    squashed = jnp.tanh(ratio)
    slope = 1 - jnp.square(squashed)
    return softcap * squashed, slope, squashed - jnp.where(slope == 0, 0, ratio * slope)


def _present(shifted, mass):
    """Logits with 0 in place of -inf where there is no mass, as ``0 * inf`` would be NaN."""
    return jnp.where((shifted == -jnp.inf) & (mass == 0), 0, shifted)


def _mass(spread, class_weights):
    """The coefficient of each class in the spread term, [tokens, classes or 1]."""
    return spread[:, None] if class_weights is None else spread[:, None] * class_weights[None]


def _sum_up(plan: Plan, head: Arrays, outputs: jax.Array, spread: jax.Array | None, labels: jax.Array) -> Sums:
    """Sums over the logits of a chunk, a few rows at a time; ``outputs`` of the linear layer are [tokens, classes]."""
    weights = head.class_weights

    def sum_rows(rows):
        outputs, spread = rows
        logits, _, _ = _logits(outputs, head.bias, head.softcap)
        largest = jax.lax.stop_gradient(jnp.max(logits, axis=1))
        largest = jnp.where(largest == -jnp.inf, 0, largest)
        shifted = logits - largest[:, None]
        weighted = None
        if spread is not None:
            present = _present(shifted, _mass(spread, weights))
            weighted = jnp.sum(present if weights is None else present * weights[None], axis=1)
        return largest, jnp.sum(jnp.exp(shifted), axis=1), weighted

    rows = jax.tree.map(lambda array: array.reshape(-1, plan.rows, *array.shape[1:]), (outputs, spread))
    largest, total, weighted = jax.tree.map(lambda array: array.reshape(-1), jax.lax.map(sum_rows, rows))
    weight_total = jnp.asarray(outputs.shape[1] if weights is None else jnp.sum(weights), outputs.dtype)
    if plan.axis_name is None:
        return Sums(largest, total, weighted, weight_total, _label_logit(head, outputs, labels))
    here = labels - outputs.shape[1] * jax.lax.axis_index(plan.axis_name)
    mine = (here >= 0) & (here < outputs.shape[1])
    label_logit = jnp.where(mine, _label_logit(head, outputs, jnp.where(mine, here, 0)), 0)
    return _join(Sums(largest, total, weighted, weight_total, label_logit), plan.axis_name)


def _join(sums: Sums, axis_name: AxisName) -> Sums:
    """Combine the sums over each device's classes."""
    largest = jax.lax.pmax(jax.lax.stop_gradient(sums.largest), axis_name)
    below = sums.largest - largest
    weighted = None if sums.weighted is None else sums.weighted + sums.weight_total * below
    parts = sums.total * jnp.exp(below), weighted, sums.weight_total, sums.label_logit
    return Sums(largest, *jax.lax.psum(parts, axis_name))


def _label_logit(head, outputs, labels):
    bias = None if head.bias is None else head.bias[labels]
    return _logits(jnp.take_along_axis(outputs, labels[:, None], axis=1)[:, 0], bias, head.softcap)[0]


def _add_gradients(plan, wanted, head, outputs, sums, coefficients, labels, grads: Gradients) -> Gradients:
    """Add a chunk's gradients to ``grads``; ``head.hidden``, and the gradient for it, are the chunk's alone."""
    dtype, classes = outputs.dtype, outputs.shape[1]
    if plan.axis_name is not None:
        labels = labels - classes * jax.lax.axis_index(plan.axis_name)
    gain = coefficients.own  # coefficient of the softmax, which is the derivative of L
    if coefficients.spread is not None:
        gain = gain + coefficients.spread * sums.weight_total
    if coefficients.square is not None:
        gain = gain + 2 * coefficients.square * sums.log_sum
    log_total = sums.log_total[:, None]

    def add_columns(grads, index):
        start = jnp.minimum(index * plan.columns, classes - plan.columns)
        class_indices = start + jnp.arange(plan.columns, dtype=labels.dtype)
        new = (class_indices >= index * plan.columns)[None]  # the last block starts early and repeats some classes

        def cut(array, axis=0):
            return None if array is None else jax.lax.dynamic_slice_in_dim(array, start, plan.columns, axis)

        def add(total, part, axis=0):
            return jax.lax.dynamic_update_slice_in_dim(total, cut(total, axis) + part, start, axis)

        weights = cut(head.class_weights)
        logits, slope, by_softcap = _logits(cut(outputs, 1), cut(head.bias), head.softcap)
        shifted = logits - sums.largest[:, None]
        change = jnp.exp(shifted - log_total) * gain[:, None]
        change = change - jnp.where(labels[:, None] == class_indices[None], coefficients.own[:, None], 0)
        hidden_grad, weight_grad, bias_grad, softcap_grad, class_weights_grad = grads
        if coefficients.spread is not None:
            mass = _mass(coefficients.spread, weights)
            change = change - mass
            if wanted.class_weights:
                by_weight = coefficients.spread[:, None] * (log_total - _present(shifted, mass))
                class_weights_grad = add(class_weights_grad, jnp.sum(jnp.where(new, by_weight, 0), axis=0))
        change = jnp.where(new, change, 0)
        if by_softcap is not None and wanted.softcap:
            softcap_grad = softcap_grad + jnp.sum(change * by_softcap)
        change = change if slope is None else change * slope
        if wanted.bias:
            bias_grad = add(bias_grad, jnp.sum(change, axis=0))
        change = change.astype(plan.dtype)
        if wanted.hidden:
            weight = cut(head.weight, plan.classes_axis)
            hidden_grad = hidden_grad + _product(change, weight, 1, plan.classes_axis, dtype)
        if wanted.weight:
            pair = (change, head.hidden) if plan.classes_axis == 0 else (head.hidden, change)
            weight_grad = add(weight_grad, _product(*pair, 0, 0, dtype), plan.classes_axis)
        return Gradients(hidden_grad, weight_grad, bias_grad, softcap_grad, class_weights_grad), None

    start = grads._replace(hidden=jnp.zeros_like(head.hidden, dtype) if wanted.hidden else None)
    blocks = jnp.arange(-(-classes // plan.columns), dtype=labels.dtype)
    return jax.lax.scan(add_columns, start, blocks)[0]
