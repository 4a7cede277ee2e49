"""The softmax losses of a linear layer's outputs, and their gradients, without ever holding those outputs.

The logits ``hidden @ weight + bias`` are by far the largest array of a language model. Here the tokens go through in
chunks: each has its logits, its losses and its share of the gradients worked out before the next. That is three matrix
products, as many as a derivative of the whole takes, and the memory of one chunk's logits.

The loss of a token is a sum of terms, each with a coefficient. With ``x`` the token's logits, ``L`` the log of their
summed exponentials, ``y`` its label and ``w`` the classes' weights:

    own * (L - x_y) + spread * sum_k w_k (L - x_k) + square * L**2

Masks, smoothing and the like decide the coefficients, outside, in arithmetic that JAX differentiates by itself.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.types import DTypeLike

AxisName = str | tuple[str, ...] | None


class Plan(NamedTuple):
    """How to go through the arrays; static.

    Attributes:
      tokens: how many are in a chunk.
      rows: how many of them have their logits summed at once; divides ``tokens``.
      columns: how many classes have the gradient of their logits worked out at once.
      classes_axis: of the weight.
      dtype: of hidden and weight, and of what is multiplied with them.
      axis_name: the mapped axis over which the classes are divided, or None.
    """

    tokens: int
    rows: int
    columns: int
    classes_axis: int
    dtype: DTypeLike
    axis_name: AxisName


class Head(NamedTuple):
    """The arrays that a loss depends on, or their gradients, or whether those are wanted; None for what is not there.

    All but the first two have the dtype of the sums.
    """

    hidden: jax.Array  # [tokens, width]
    weight: jax.Array  # [width, classes], or [classes, width]
    bias: jax.Array | None  # [classes]
    softcap: jax.Array | None  # []
    class_weights: jax.Array | None  # [classes]


class Terms(NamedTuple):
    """The terms of each token's loss, or their coefficients, shape [tokens]; None where no loss has the term."""

    own: jax.Array
    spread: jax.Array | None
    square: jax.Array | None

    def map(self, function, *others: "Terms") -> "Terms":
        return Terms(*(None if parts[0] is None else function(*parts) for parts in zip(self, *others, strict=True)))

    def dot(self, other: "Terms") -> jax.Array:
        """Each token's loss, from its terms and their coefficients."""
        return sum(part for part in self.map(jnp.multiply, other) if part is not None)


class Sums(NamedTuple):
    """What the gradient of a token's logits needs to know of all of them, shape [tokens]."""

    largest: jax.Array
    log_total: jax.Array
    weight_total: jax.Array  # []: that of all classes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_loss(plan: Plan, head: Head, coefficients: Terms, labels: jax.Array, keep: jax.Array | None) -> jax.Array:
    """The losses of all tokens, summed; its derivative is worked out along with it, in one pass.

    Under an ``axis_name`` this is the device's share, and the shares add up to the sum. What goes in must vary over
    that axis, see ``vary_alike``, so that the gradient of what all devices share is summed over them by JAX.
    """
    return jnp.sum(token_losses(plan, head, coefficients, labels, keep))


def _summed_loss_forward(plan, head, coefficients, labels, keep):
    head, coefficients, labels, keep, wanted = _split_wanted(head, coefficients, labels, keep)
    terms, grads = _evaluate(plan, wanted, head, coefficients, labels, keep)
    terms = terms.map(lambda term: _share(plan, term))
    return jnp.sum(terms.dot(coefficients)), (terms, grads)


def _summed_loss_backward(plan, saved, cotangent):
    terms, grads = saved
    return _cast(plan, _scale(grads, cotangent)), terms.map(lambda term: cotangent * term), None, None


summed_loss.defvjp(_summed_loss_forward, _summed_loss_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_losses(plan: Plan, head: Head, coefficients: Terms, labels: jax.Array, keep: jax.Array | None) -> jax.Array:
    """The loss of each token, as ``summed_loss``.

    The derivative is known only with the cotangent of each loss, so it works out the logits a second time.
    """
    terms, _ = _evaluate(plan, Head(*[False] * 5), head, coefficients, labels, keep)
    return _share(plan, terms.dot(coefficients))


def _token_losses_forward(plan, head, coefficients, labels, keep):
    head, coefficients, labels, keep, wanted = _split_wanted(head, coefficients, labels, keep)
    terms, _ = _evaluate(plan, Head(*[False] * 5), head, coefficients, labels, keep)
    shares = terms.map(lambda term: _share(plan, term))
    # An empty tuple for True and None for False: what is saved must be arrays, or a structure.
    flags = Head(*(() if flag else None for flag in wanted))
    return shares.dot(coefficients), (head, coefficients, labels, keep, shares, flags)


def _token_losses_backward(plan, saved, cotangent):
    head, coefficients, labels, keep, shares, flags = saved
    wanted = Head(*(flag is not None for flag in flags))
    cotangents = coefficients.map(lambda coefficient: cotangent * coefficient)
    _, grads = _evaluate(plan, wanted, head, cotangents, labels, keep)
    return _cast(plan, grads), shares.map(lambda share: cotangent * share), None, None


token_losses.defvjp(_token_losses_forward, _token_losses_backward, symbolic_zeros=True)


def vary_alike(tree, axis_name: AxisName):
    """Arrays of which none is known to be the same on all devices where another, or the classes, are not.

    Inside ``jax.shard_map`` the gradient of what is the same on all devices must be summed over them. The derivative of
    this function does that, so the derivatives in this file need not.
    """
    leaves, structure = jax.tree.flatten(tree)
    known = [*leaves, *([] if axis_name is None else [jax.lax.axis_index(axis_name)])]
    axes = frozenset().union(*(_varying(leaf) for leaf in known))
    leaves = [jax.lax.pcast(leaf, tuple(sorted(axes - _varying(leaf))), to="varying") for leaf in leaves]
    return structure.unflatten(leaves)


def _varying(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _split_wanted(head, coefficients, labels, keep):
    """The arrays behind what a rule with symbolic zeros is handed, and which of the head's are differentiated by."""
    wanted = Head(*(leaf is not None and leaf.perturbed for leaf in head))
    return *jax.tree.map(lambda leaf: leaf.value, (head, coefficients, labels, keep)), wanted


def _share(plan: Plan, total: jax.Array) -> jax.Array:
    """A number that all devices know, as shares that add up to it: all of it on the first device."""
    return total if plan.axis_name is None else jnp.where(jax.lax.axis_index(plan.axis_name) == 0, total, 0)


def _scale(grads: Head, factor: jax.Array) -> Head:
    return Head(*(None if grad is None else factor * grad for grad in grads))


def _cast(plan: Plan, grads: Head) -> Head:
    hidden, weight = (None if grad is None else grad.astype(plan.dtype) for grad in grads[:2])
    return grads._replace(hidden=hidden, weight=weight)


def _evaluate(plan, wanted, head, coefficients, labels, keep) -> tuple[Terms, Head]:
    """The terms of every token's loss, and the gradients of the summed losses that are wanted, in the sums' dtype."""
    dtype = coefficients.own.dtype
    starts = Head(None, *(jnp.zeros_like(array, dtype) if want else None
                          for array, want in zip(head[1:], wanted[1:], strict=True)))  # fmt: skip

    def step(grads, chunk):
        hidden, coefficients, labels, keep = chunk
        if keep is not None:
            hidden = jnp.where(keep[:, None], hidden, 0)
        outputs = _product(hidden, head.weight, 1, 1 - plan.classes_axis, dtype)
        terms, sums = _sum_up(plan, head, outputs, coefficients, labels)
        if not any(wanted):
            return grads, (terms, None)
        chunk_head = head._replace(hidden=hidden)
        grads = _add_gradients(plan, wanted, chunk_head, outputs, sums, coefficients, labels, grads)
        return grads._replace(hidden=None), (terms, grads.hidden)

    count = len(labels)
    chunks = jax.tree.map(lambda array: _in_chunks(array, plan.tokens), (head.hidden, coefficients, labels, keep))
    grads, stacked = jax.lax.scan(step, starts, chunks)
    terms, hidden_grad = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:count], stacked)
    return terms, grads._replace(hidden=hidden_grad)


def _in_chunks(array: jax.Array, length: int) -> jax.Array:
    """The first axis as two, the second of ``length``, filled up with zeros, which cost nothing as coefficients."""
    filled = jnp.pad(array, [(0, -len(array) % length)] + [(0, 0)] * (array.ndim - 1))
    return filled.reshape(-1, length, *array.shape[1:]) if len(array) else filled.reshape(0, length, *array.shape[1:])


def _product(left, right, left_axis, right_axis, dtype):
    """The matrix product over an axis of each, summed in ``dtype`` whatever the operands hold."""
    contracted = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, contracted, preferred_element_type=dtype)


def _logits(outputs, bias, softcap):
    """The logits behind a linear layer's outputs, and their derivative by outputs and by ``softcap``; None for 1."""
    logits = outputs if bias is None else outputs + (bias[None] if outputs.ndim > 1 else bias)
    if softcap is None:
        return logits, None, None
    ratio = logits / softcap
    squashed = jnp.tanh(ratio)
    slope = 1 - jnp.square(squashed)
    return softcap * squashed, slope, squashed - jnp.where(slope == 0, 0, ratio * slope)


def _sum_up(plan, head, outputs, coefficients, labels) -> tuple[Terms, Sums]:
    """The terms of a chunk's losses from the outputs of the linear layer, [tokens, classes]."""
    weights = head.class_weights

    def sum_rows(group):
        outputs, spread = group
        logits, _, _ = _logits(outputs, head.bias, head.softcap)
        largest = _finite_floor(jax.lax.stop_gradient(jnp.max(logits, axis=1)))
        shifted = logits - largest[:, None]
        weighted = None
        if spread is not None:
            mass = spread[:, None] if weights is None else spread[:, None] * weights[None]
            present = jnp.where((shifted == -jnp.inf) & (mass == 0), 0, shifted)
            weighted = jnp.sum(present if weights is None else present * weights[None], axis=1)
        return largest, jnp.sum(jnp.exp(shifted), axis=1), weighted

    groups = jax.tree.map(lambda array: array.reshape(-1, plan.rows, *array.shape[1:]), (outputs, coefficients.spread))
    parts = jax.lax.map(sum_rows, groups)
    part_largest, total, weighted = jax.tree.map(lambda array: array.reshape(-1), parts)
    part_weight = outputs.shape[1] if weights is None else jnp.sum(weights)

    largest = part_largest
    label, mine = labels, None
    if plan.axis_name is not None:
        largest = jax.lax.stop_gradient(jax.lax.pmax(part_largest, plan.axis_name))
        total = total * jnp.exp(part_largest - largest)
        label = labels - outputs.shape[1] * jax.lax.axis_index(plan.axis_name)
        mine = (label >= 0) & (label < outputs.shape[1])
        label = jnp.where(mine, label, 0)
    bias = None if head.bias is None else head.bias[label]
    picked, _, _ = _logits(jnp.take_along_axis(outputs, label[:, None], axis=1)[:, 0], bias, head.softcap)
    picked = picked - largest
    weight_total = jnp.asarray(part_weight, outputs.dtype)
    if weighted is not None:
        weighted = weighted + weight_total * (part_largest - largest)
    if mine is not None:
        sums = (total, jnp.where(mine, picked, 0), weight_total, weighted)
        total, picked, weight_total, weighted = jax.lax.psum(sums, plan.axis_name)
    log_total = jnp.log(jnp.where(total == 0, 1, total))
    own = log_total - jnp.where((picked == -jnp.inf) & (coefficients.own == 0), 0, picked)
    spread = None if weighted is None else weight_total * log_total - weighted
    square = None if coefficients.square is None else jnp.square(_log_sum(largest, log_total))
    return Terms(own, spread, square), Sums(largest, log_total, weight_total)


def _finite_floor(largest):
    """The largest logit, or 0 where none exists, so that nothing subtracts -inf from -inf."""
    return jnp.where(largest == -jnp.inf, 0, largest)


def _log_sum(largest, log_total):
    """``L``, cut before its square overflows, so that a coefficient of 0 gives 0."""
    limit = 0.5 * math.sqrt(float(jnp.finfo(largest.dtype).max))
    return jnp.clip(largest + log_total, -limit, limit)


def _add_gradients(plan, wanted, head, outputs, sums, coefficients, labels, grads) -> Head:
    """``grads`` with a chunk's gradients added, and the chunk's own for hidden; ``head.hidden`` is the chunk's."""
    dtype, classes = outputs.dtype, outputs.shape[1]
    offset = 0 if plan.axis_name is None else classes * jax.lax.axis_index(plan.axis_name)
    gain = coefficients.own  # the coefficient of L's derivative, which is the softmax
    if coefficients.spread is not None:
        gain = gain + coefficients.spread * sums.weight_total
    if coefficients.square is not None:
        gain = gain + 2 * coefficients.square * _log_sum(sums.largest, sums.log_total)

    def add_columns(grads, index):
        start = jnp.minimum(index * plan.columns, classes - plan.columns)
        numbers = start + jnp.arange(plan.columns, dtype=labels.dtype)
        new = (numbers >= index * plan.columns)[None]  # the last block starts early, and meets some classes again

        def cut(array, axis=0):
            return None if array is None else jax.lax.dynamic_slice_in_dim(array, start, plan.columns, axis)

        def add(total, part, axis=0):
            return jax.lax.dynamic_update_slice_in_dim(total, cut(total, axis) + part, start, axis)

        logits, slope, by_softcap = _logits(cut(outputs, 1), cut(head.bias), head.softcap)
        shifted = logits - sums.largest[:, None]
        change = jnp.exp(shifted - sums.log_total[:, None]) * gain[:, None]
        change = change - jnp.where(labels[:, None] == numbers[None] + offset, coefficients.own[:, None], 0)
        if coefficients.spread is not None:
            spread, weights = coefficients.spread[:, None], cut(head.class_weights)
            mass = spread if weights is None else spread * weights[None]
            change = change - mass
        change = jnp.where(new, change, 0)
        hidden_grad, weight_grad, bias_grad, softcap_grad, class_weights_grad = grads
        if wanted.softcap:
            softcap_grad = softcap_grad + jnp.sum(change * by_softcap)
        if wanted.class_weights and coefficients.spread is not None:
            shifted = jnp.where((shifted == -jnp.inf) & (mass == 0), 0, shifted)
            by_weight = jnp.where(new, spread * (sums.log_total[:, None] - shifted), 0)
            class_weights_grad = add(class_weights_grad, jnp.sum(by_weight, axis=0))
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
        return Head(hidden_grad, weight_grad, bias_grad, softcap_grad, class_weights_grad), None

    start = grads._replace(hidden=jnp.zeros_like(head.hidden, dtype) if wanted.hidden else None)
    blocks = jnp.arange(-(-classes // plan.columns), dtype=labels.dtype)
    return jax.lax.scan(add_columns, start, blocks)[0]
