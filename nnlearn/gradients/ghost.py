"""The norm of one example's gradient without the gradient, for the weights of dense layers.

A weight ``W`` that one matrix product ``y = x W`` uses has the gradient ``x^T delta``, where ``delta`` is the
derivative of the loss with respect to ``y``. Its norm, and the sum of many such gradients, follow from ``x`` and
``delta``, which one pass over a batch computes anyway. ``TracedLoss`` reads a loss as a list of operations and finds
such products. It adds a zero to the result of each; the derivative with respect to that zero is ``delta``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from nnlearn.programs.read import bind, called_program, interpret
from nnlearn.tree import abs_sq, compute_dtype, power_of_two, rarely, safe_sqrt, squares_fit

# Operations that only move or cast elements: the gradient moves back, and its norm does not change.
MOVES = {"broadcast_in_dim", "convert_element_type", "copy", "copy_p", "reshape", "rev", "squeeze", "transpose"}


class Op(NamedTuple):
    """One operation: its equation, and the ids of its input and output values."""

    equation: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def run(self, values: dict[int, Any]) -> None:
        """Compute this operation's results from ``values`` and store them there."""
        results = bind(self.equation, [values[value_id] for value_id in self.inputs])
        values.update(zip(self.outputs, results, strict=True))


class Dense(NamedTuple):
    """The only use of a leaf: a matrix product.

    Attributes:
      leaf: index of the leaf.
      moves: the operations before the product, such as a transpose, a reshape or a cast.
      product: the product.
      side: 0 if the leaf is the product's left operand, 1 if its right.
    """

    leaf: int
    moves: tuple[Op, ...]
    product: Op
    side: int

    @property
    def result(self) -> int:
        """Id of the product's result."""
        return self.product.outputs[0]

    def gradient(self, leaf: jax.Array, x_b: jax.Array, delta_b: jax.Array) -> jax.Array:
        """The gradient of the leaf, summed over the examples, from their inputs and deltas."""
        x_bgtd, delta_bgto = jax.vmap(self._rows)(x_b), jax.vmap(self._delta_rows)(x_b, delta_b)
        # Concatenate the examples' rows, as a plain gradient does: XLA copies less than for two axes.
        x_gsd, delta_gso = (jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, a.shape[3]) for a in (x_bgtd, delta_bgto))
        precision = self.product.equation.params["precision"]
        wide = compute_dtype(x_gsd.dtype, delta_gso.dtype)
        sum_gdo = jnp.einsum("gsd,gso->gdo", x_gsd, delta_gso, precision=precision, preferred_element_type=wide)
        operand = self._unrows(sum_gdo)

        def move(leaf):
            values = {self.leaf: leaf}
            for op in self.moves:
                op.run(values)
            return values[self.product.inputs[self.side]]

        return jax.linear_transpose(move, leaf)(operand)[0] if self.moves else operand.astype(leaf.dtype)

    def norm(self, x: jax.Array, delta: jax.Array) -> jax.Array:
        """The norm of one example's gradient; if its squares overflow or underflow, from factors scaled to about 1."""

        def rescaled(x, delta):
            arrays = [array.astype(compute_dtype(x.dtype, delta.dtype)) for array in (x, delta)]
            sizes = [power_of_two(jnp.max(jnp.abs(jax.lax.stop_gradient(array)), initial=0)) for array in arrays]
            scaled = [array / size for array, size in zip(arrays, sizes, strict=True)]
            return safe_sqrt(self.squared_norm(*scaled)) * sizes[0] * sizes[1]

        @jax.custom_jvp
        def norm(x, delta):
            plain = jnp.sqrt(self.squared_norm(x, delta))
            return rarely(~squares_fit(plain), rescaled, plain, x, delta)

        norm.defjvp(lambda primals, tangents: jax.jvp(rescaled, primals, tangents))
        return norm(x, delta)

    def squared_norm(self, x: jax.Array, delta: jax.Array) -> jax.Array:
        """The squared norm of one example's gradient, in float32 or better.

        With T rows ``x_t`` of length D and ``delta_t`` of length O it is ``|x|^2 |delta|^2`` for T = 1, and otherwise::

            sum_{t, u} (x_t . x_u) (delta_t . delta_u)

        If two T x T arrays are larger than the D x O gradient, it is computed from the gradient itself.
        """
        wide = compute_dtype(x.dtype, delta.dtype)
        x_gtd, delta_gto = self._rows(x).astype(wide), self._delta_rows(x, delta).astype(wide)
        (rows, inputs), outputs = x_gtd.shape[1:], delta_gto.shape[2]
        if rows == 1:
            return jnp.sum(jnp.sum(abs_sq(x_gtd), axis=(1, 2)) * jnp.sum(abs_sq(delta_gto), axis=(1, 2)))
        if 2 * rows**2 <= inputs * outputs:
            precise = jax.lax.Precision.HIGHEST  # terms of the sum may cancel
            x_gtu = jnp.einsum("gtd,gud->gtu", x_gtd, x_gtd, precision=precise)
            delta_gtu = jnp.einsum("gto,guo->gtu", delta_gto, delta_gto, precision=precise)
            return jnp.maximum(jnp.sum(x_gtu * delta_gtu), 0)
        return jnp.sum(abs_sq(jnp.einsum("gtd,gto->gdo", x_gtd, delta_gto)))

    def _axes(self, side: int) -> tuple[list[int], list[int], list[int]]:
        """The batch, free and contracted axes of one operand of the product."""
        contracted, batched = (axes[side] for axes in self.product.equation.params["dimension_numbers"])
        ndim = self.product.equation.invars[side].aval.ndim
        free = [axis for axis in range(ndim) if axis not in (*contracted, *batched)]
        return list(batched), free, list(contracted)

    def _rows(self, x):
        """The other operand with axes (batch, free, contracted), as (groups, rows, inputs)."""
        groups = self._axes(1 - self.side)
        return x.transpose(sum(groups, [])).reshape([math.prod(x.shape[axis] for axis in axes) for axes in groups])

    def _delta_rows(self, x, delta):
        """The product's delta, whose axes are (batch, left, right), as (groups, rows, outputs)."""
        groups, rows, _ = self._rows(x).shape
        outputs = delta.size // max(groups * rows, 1)
        return delta.reshape(groups, rows, outputs) if self.side else delta.reshape(groups, outputs, rows).mT

    def _unrows(self, array_gdo):
        """An array of (groups, inputs, outputs) with the axes of the operand that the leaf is."""
        batched, free, contracted = self._axes(self.side)
        shape, order = self.product.equation.invars[self.side].aval.shape, [*batched, *contracted, *free]
        array = array_gdo.reshape([shape[axis] for axis in order])
        array = array.transpose([order.index(axis) for axis in range(len(order))])
        return array.astype(self.product.equation.invars[self.side].aval.dtype)


class TracedLoss:
    """A loss of one example as a list of operations.

    Attributes:
      dense: leaves whose only use is a matrix product.
      others: indices of all other leaves that the loss depends on.
      shifts: a zero for the result of each product of ``dense``.
      has_more: whether the function returns ``(loss, aux)`` or has effects, such as printing.

    Raises:
      TypeError: if the loss is not a real scalar.
    """

    def __init__(self, function: Callable[..., Any], leaves: Sequence[jax.Array], *data: Any):
        closed, (loss, aux) = jax.make_jaxpr(function, return_shape=True)(leaves, *data)
        if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise TypeError(
                f"loss_fn must return a real scalar, or (loss, aux); got {loss.dtype.name} of shape {loss.shape}"
            )
        self.has_more = aux is not None or bool(closed.effects)
        self._value_count = 0
        self._constants: dict[int, Any] = {}
        self._ops: list[Op] = []
        self._inputs = [self._new_id() for _ in closed.jaxpr.invars]
        self._loss = self._read(closed, self._inputs)[0]
        self._drop_unused()
        self.dense, self.others = self._find_dense(len(leaves))
        self.shifts = [jnp.zeros(aval.shape, aval.dtype) for aval in map(_result_aval, self.dense)]

    def run(
        self, leaves: Sequence[jax.Array], data: Sequence[jax.Array], shifts: Sequence[jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The loss, with ``shifts`` added to the products of ``dense``, and the other operands of these products."""
        values = self._constants | dict(zip(self._inputs, [*leaves, *data], strict=True))
        shift_of = {dense.result: shift for dense, shift in zip(self.dense, shifts, strict=True)}
        for op in self._ops:
            op.run(values)
            for value_id in op.outputs:  # empty for an operation that only has effects
                if value_id in shift_of:
                    values[value_id] += shift_of[value_id]
        return values[self._loss], [values[dense.product.inputs[1 - dense.side]] for dense in self.dense]

    def _new_id(self) -> int:
        self._value_count += 1
        return self._value_count - 1

    def _read(self, program: ClosedJaxpr, inputs: Sequence[int]) -> list[int]:
        """Append the operations of a program, and of those that it calls, and return the ids of its results."""

        def constant(value, aval):
            value_id = self._new_id()
            self._constants[value_id] = value
            return value_id

        def apply(equation, inputs):
            inner = called_program(equation, custom_derivatives=False)  # inlined they would lose their derivative
            if inner is not None:
                return self._read(inner, inputs)
            outputs = tuple(self._new_id() for _ in equation.outvars)
            self._ops.append(Op(equation, tuple(inputs), outputs))
            return outputs

        return interpret(program, inputs, apply, constant)

    def _drop_unused(self) -> None:
        """Keep only the operations that the loss depends on: the aux may use the parameters in other ways.

        Effects are dropped too: they occur once, in the loss of the whole batch, and not for each example.
        """
        used, kept = {self._loss}, []
        for op in reversed(self._ops):
            if used.intersection(op.outputs):
                used.update(op.inputs)
                kept.append(op)
        self._ops = kept[::-1]

    def _find_dense(self, leaf_count: int) -> tuple[list[Dense], list[int]]:
        """The leaves whose only use is a product, and the indices of all others that are used."""
        origins: dict[int, tuple[int, tuple[Op, ...]]] = {leaf: (leaf, ()) for leaf in self._inputs[:leaf_count]}
        uses: dict[int, list[Dense | None]] = {leaf: [] for leaf in origins}  # None for any other use
        for op in self._ops:
            sides = [side for side, value_id in enumerate(op.inputs) if value_id in origins]
            if sides and _only_moves(op.equation):
                leaf, moves = origins[op.inputs[0]]
                origins[op.outputs[0]] = leaf, (*moves, op)
                continue
            simple = len(sides) == 1 and _is_product(op.equation)
            for side in sides:
                leaf, moves = origins[op.inputs[side]]
                uses[leaf].append(Dense(leaf, moves, op, side) if simple else None)
        if self._loss in origins:
            uses[origins[self._loss][0]].append(None)
        dense = [found[0] for found in uses.values() if len(found) == 1 and found[0] is not None]
        direct = {use.leaf for use in dense}
        return dense, [leaf for leaf, found in uses.items() if found and leaf not in direct]


def _result_aval(dense: Dense) -> Any:
    return dense.product.equation.outvars[0].aval


def _only_moves(equation: Any) -> bool:
    if equation.primitive.name not in MOVES or len(equation.invars) != 1:
        return False
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    return before.size == after.size and all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in (before, after))


def _is_product(equation: Any) -> bool:
    """Whether an equation is a matrix product of real arrays."""
    avals = [var.aval for var in (*equation.invars, *equation.outvars)]
    return equation.primitive.name == "dot_general" and all(jnp.issubdtype(a.dtype, jnp.floating) for a in avals)


__all__ = ["Dense", "TracedLoss"]
