"""Symbolic arrays: which expression computes each element.

An array is a sequence of segments. A leaf is one segment and a buffer of ten leaves is ten, so laying leaves end to end
or cutting a buffer into them changes no expression.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp


@dataclasses.dataclass(eq=False, slots=True)
class Expression:
    """How an element is computed. Equal expressions of one table are the same object, so they compare by identity.

    Attributes:
      number: position in the order of creation; it sorts the operands of commutative operations.
      key: the name of an operation (``argument``, ``constant``, a primitive), its settings and its operands.
      terms: of a sum, a maximum or another reduction to one element: what it reduces.
      neutral: the reductions to which this element adds nothing.
      regrouped: whether its last bits depend on the order of a sum; of single elements only.
      owner: the leaf that it is computed from, if elementwise from a leaf of one element.
    """

    number: int
    key: tuple
    terms: "Terms | None" = None
    neutral: frozenset[str] = frozenset()
    regrouped: bool = False
    owner: int | None = None


class Term(NamedTuple):
    """Something that a reduction goes over, a number of times: one element, or all elements of a segment."""

    whole: bool
    times: int
    expression: Expression


class Terms(NamedTuple):
    """The terms of a reduction, such as ``add``."""

    kind: str
    terms: tuple[Term, ...]


class Segment(NamedTuple):
    """Consecutive elements that one expression computes, each from the elements of the arguments at its position.

    ``uniform`` says that all elements are equal, whatever the arguments, so a sum over them depends on their count.
    ``moved`` is a shape and a transposition of it, if that has reordered the elements.
    """

    size: int
    expression: Expression
    uniform: bool = False
    moved: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Along:
    """Segments along an axis other than the first, as in a buffer that is cut over devices."""

    axis: int
    segments: tuple[Segment, ...]


Value = tuple[Segment, ...] | Along | Expression
"""Segments in the order of the flattened array or along one axis; or one expression for every element."""

Combine = Callable[[Sequence[Expression], bool], Expression]
"""From the expressions of operands, and whether they are single or uniform elements, to that of the result."""


def is_low(dtype) -> bool:
    """Whether sums in this dtype are less precise than in float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).nmant < jnp.finfo(jnp.float32).nmant


def of_size(size: int, expression: Expression) -> Value:
    """An array of ``size`` elements that one expression computes."""
    return expression if size == 1 else (Segment(size, expression),) if size else ()


def canonical(value: Value) -> Value:
    """A value in its only form: a single segment becomes its expression."""
    if isinstance(value, tuple) and len(value) == 1 and value[0].moved is None:
        return value[0].expression
    return value


def segments_of(value: Value) -> tuple[Segment, ...]:
    """The segments of a value; none for an expression, which says nothing of its size."""
    return () if isinstance(value, Expression) else value.segments if isinstance(value, Along) else value


def expressions_of(value: Value) -> list[Expression]:
    """The expressions in a value."""
    return [value] if isinstance(value, Expression) else [segment.expression for segment in segments_of(value)]


def as_segments(value: Value, size: int) -> tuple[Segment, ...]:
    """The segments of a value of ``size`` elements."""
    if isinstance(value, Expression):
        return (Segment(size, value, True),) if size else ()
    return segments_of(value)


def in_place(expressions: Any, segment: Segment) -> Segment:
    """A segment in the order of its elements now, whether transposed or not."""
    if segment.moved is None or segment.uniform:
        return segment
    return Segment(segment.size, expressions.make("transposed", segment.moved, segment.expression))


def by_segment(expressions: Any, values: Sequence[Value | None], combine: Combine) -> Value | None:
    """Apply an elementwise operation to the expressions of its operands, segment by segment.

    Args:
      expressions: the table, ``Expressions``.
      values: the operands.
      combine: makes the expression of each segment of the result.

    Returns:
      The result; None if an operand is unknown or the segments of two operands differ in size.
    """
    known: Sequence[Any] = values
    arrays = [value for value in known if not isinstance(value, Expression)]
    if not arrays:
        return combine(known, True)
    if any(value is None for value in arrays):
        return None
    axes = {value.axis if isinstance(value, Along) else None for value in arrays}
    sizes = {tuple(segment.size for segment in segments_of(value)) for value in arrays}
    if len(sizes) != 1 or len(axes) != 1:
        return None
    whole, axis = sizes.pop(), axes.pop()
    columns = [
        as_segments(value, 1) * len(whole) if isinstance(value, Expression) else segments_of(value) for value in known
    ]
    results = []
    for size, row in zip(whole, zip(*columns, strict=True), strict=True):
        uniform = all(segment.uniform for segment in row)
        orders = {segment.moved for segment in row if not segment.uniform}
        if len(orders) > 1:  # only some are transposed, so the transposition becomes part of their expression
            row, orders = tuple(in_place(expressions, segment) for segment in row), {None}
        expression = combine([segment.expression for segment in row], size == 1 or uniform)
        results.append(Segment(size, expression, uniform, *orders))
    return tuple(results) if axis is None else Along(axis, tuple(results))
