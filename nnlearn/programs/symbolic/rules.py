"""One rule for each primitive that is understood: from the symbolic operands of an equation to its results.

A rule returns None for operands that it does not understand. The result is then equal only to the same operation on the
same arrays, so two programs may come out different although they are equal, and never the other way around.
"""

import math
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from nnlearn.native.kernel import KERNEL
from nnlearn.programs.read import ELEMENTWISE
from nnlearn.programs.symbolic.expressions import Expressions
from nnlearn.programs.symbolic.shaping import (
    broadcast,
    concatenated,
    reshaped,
    same_segments,
    split,
    transposed,
    without_ones,
)
from nnlearn.programs.symbolic.values import Along, Expression, Segment, Value, by_segment, is_low, segments_of
from nnlearn.tree import rarely

REDUCTIONS = {"reduce_sum": "add", "reduce_max": "max", "reduce_min": "min", "reduce_and": "and", "reduce_or": "or"}
BY_NUMBER = operator.attrgetter("number")
RARELY = f"{rarely.__qualname__}.<locals>."


class Reader(Protocol):
    """What rules need of the interpreter.

    Attributes:
      expressions: the table.
      exact: whether sums of the same elements in another order are different.
      low: the dtypes below float32 in which sums were made or rounded.
    """

    expressions: Expressions
    exact: bool
    low: set[str]

    def inside(self, program: Any, arguments: Sequence[Value]) -> list[Value]:
        """The results of a closed program."""
        ...

    def settings(self, params: Mapping[str, Any]) -> Hashable:
        """Equal for parameters of an equation that give equal results."""
        ...

    def rounded(self, dtype: Any) -> Expression:
        """The element that the current equation rounds to ``dtype``, below float32, after a sum of several leaves."""
        ...

    def record(self, result: Value | None) -> None:
        """Remember the result of the current equation, which rounds below float32."""
        ...


Rule = Callable[[Reader, Any, list[Value]], Value | list[Value] | None]
"""``rule(reader, equation, values)``: the one result, or a list of all results, or None."""
RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Enter a function into ``RULES`` for these primitives."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return enter


@rule("optimization_barrier", "sharding_constraint", "reshard", "stop_gradient")
def _identity(reader, equation, values):
    return values


@rule(KERNEL)
def _kernel(reader, equation, values):
    forms = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in equation.invars]
    program = jax.make_jaxpr(equation.params["kernel"].reference)(*forms)
    reader.expressions.same_object(program)  # equations are known by their address, so it must not be freed
    return reader.inside(program, values)


@rule("custom_vmap_call")
def _rarely(reader, equation, values):
    """Both branches of ``rarely`` are equal, so the one that is right for all arguments is read."""
    if not equation.params["rule"].__qualname__.startswith(RARELY):
        return None
    program = equation.params["call"]
    choice = program.jaxpr.eqns[-1]
    if choice.primitive.name != "cond" or list(choice.invars[1:]) != list(program.jaxpr.invars[1:]):
        return None
    return reader.inside(choice.params["branches"][1], values[1:])


@rule("cond")
def _cond(reader, equation, values):
    index, *operands = values

    def combine(row, single):
        expression = reader.expressions.make("cond", index, *row)
        return reader.expressions.mark(expression, row, jnp.float32) if single else expression

    branches = [reader.inside(branch, operands) for branch in equation.params["branches"]]
    results = [by_segment(reader.expressions, outcomes, combine) for outcomes in zip(*branches, strict=True)]
    found = [result for result in results if result is not None]
    return found if len(found) == len(results) else None


@rule(*ELEMENTWISE)
def _elementwise(reader, equation, values):
    out = equation.outvars[0].aval
    operands = [
        value if var.aval.shape in ((), out.shape) else broadcast(reader.expressions, value, var.aval.shape, out.shape)
        for value, var in zip(values, equation.invars, strict=True)
    ]
    return elementwise(reader, equation.primitive.name, equation.params, operands, out.dtype)


def elementwise(
    reader: Reader, name: str, params: Mapping[str, Any], values: Sequence[Value | None], dtype: Any
) -> Value | None:
    """The result of an elementwise operation on operands of one shape, and scalars."""
    expressions, settings = reader.expressions, reader.settings(params)
    rounds = name == "reduce_precision" or (name == "convert_element_type" and is_low(dtype))
    any_order = name in ("max", "min", "and", "or")
    any_order |= name == "add" and not is_low(dtype) and not reader.exact

    def combine(row, single):
        if single and rounds and not reader.exact and any(each.regrouped and each.owner is None for each in row):
            return reader.rounded(dtype)
        if any_order and (name != "add" or single):
            terms = [term for expression in row for term in expressions.terms(name, 1, expression)]
            expression = expressions.reduction(name, terms, dtype)
        else:
            operands = sorted(row, key=BY_NUMBER) if name == "add" else row
            expression = expressions.make(name, settings, *operands)
        return expressions.mark(expression, row, dtype) if single else expression

    result = by_segment(reader.expressions, values, combine)
    if rounds:
        reader.record(result)
    return result


@rule(*REDUCTIONS)
def _reduce(reader, equation, values):
    array, kind = equation.invars[0].aval, REDUCTIONS[equation.primitive.name]
    return reduce(reader, kind, values[0], array.shape, equation.params["axes"], equation.outvars[0].aval.dtype)


def reduce(
    reader: Reader, kind: str, value: Value, shape: Sequence[int], axes: Sequence[int], dtype: Any
) -> Value | None:
    """A sum, maximum or the like over axes of an array."""
    expressions = reader.expressions
    if kind == "add" and is_low(dtype):
        reader.low.add(str(dtype))
        return None
    if kind == "add" and reader.exact and jnp.issubdtype(dtype, jnp.inexact):
        return None
    left = math.prod(length for axis, length in enumerate(shape) if axis not in axes)

    def over(*segments: Segment) -> Expression:
        terms = [term for segment in segments for term in expressions.terms(kind, *segment[:3])]
        return expressions.reduction(kind, terms, dtype)

    if isinstance(value, Expression):
        return over(Segment(math.prod(shape) // max(left, 1), value, True))
    segments = segments_of(value)
    if left == 1:
        total = over(*segments)
        if kind == "add" and len(segments) > 1:  # even if no segment has more than one element
            total.regrouped, total.owner = True, None
        return total
    if isinstance(value, Along):
        return None
    each, lead = same_segments(value, shape), int(len(value) > 1)
    if each is None or (lead and 0 in axes):
        return None
    inner = [axis - lead for axis in axes]
    kept = math.prod(length for axis, length in enumerate(each) if axis not in inner)

    def partly(segment: Segment) -> Segment:
        how = without_ones(each, inner)
        return Segment(kept, expressions.make("reduce", kind, *how, segment.expression, segment.moved))

    return tuple(Segment(1, over(segment)) if kept == 1 else partly(segment) for segment in segments)


@rule("dot_general")
def _dot(reader, equation, values):
    """The product of two vectors, if its sum is over exact products or in the precision of its arguments."""
    inputs, out = [var.aval for var in equation.invars], equation.outvars[0].aval
    if any(array.ndim != 1 for array in inputs) or out.shape != ():
        return None
    if is_low(out.dtype):
        reader.low.add(str(out.dtype))
    if reader.exact or is_low(out.dtype) or any(array.dtype != out.dtype for array in inputs):
        return None
    precision = {"precision": equation.params["precision"]}
    products = elementwise(reader, "mul", precision, values, inputs[0].dtype)
    return None if products is None else reduce(reader, "add", products, inputs[0].shape, (0,), out.dtype)


@rule("broadcast_in_dim")
def _broadcast(reader, equation, values):
    dimensions, out = equation.params["broadcast_dimensions"], equation.outvars[0].aval
    return broadcast(reader.expressions, values[0], equation.invars[0].aval.shape, out.shape, dimensions)


@rule("squeeze", "reshape")
def _reshape(reader, equation, values):
    if equation.primitive.name == "reshape" and equation.params["dimensions"] is not None:
        return None
    return reshaped(values[0], equation.invars[0].aval.shape, equation.outvars[0].aval.shape)


@rule("transpose")
def _transpose(reader, equation, values):
    return transposed(values[0], equation.invars[0].aval.shape, equation.params["permutation"])


@rule("concatenate", "stack")
def _concatenate(reader, equation, values):
    axis = equation.params.get("dimension", equation.params.get("axis"))
    return concatenated(values, [var.aval.shape for var in equation.invars], axis)


@rule("split")
def _split(reader, equation, values):
    return split(values[0], equation.params["sizes"], equation.params["axis"], equation.invars[0].aval.shape)


@rule("slice")
def _slice(reader, equation, values):
    """A slice of one axis, as one part of a split."""
    shape, out, params = equation.invars[0].aval.shape, equation.outvars[0].aval.shape, equation.params
    if out == shape:
        return values[0]
    cut = [axis for axis, (one, other) in enumerate(zip(out, shape, strict=True)) if one != other]
    if len(cut) != 1 or set(params["strides"] or (1,)) != {1}:
        return None
    (axis,) = cut
    start, limit = params["start_indices"][axis], params["limit_indices"][axis]
    parts = split(values[0], (start, limit - start, shape[axis] - limit), axis, shape)
    return parts and parts[1]
