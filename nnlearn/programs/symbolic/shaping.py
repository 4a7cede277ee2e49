"""Operations that move elements and compute none: broadcast, reshape, transpose, concatenate and split.

Each returns None where the result has no form as segments.
"""

import math
from collections.abc import Sequence

from nnlearn.programs.symbolic.expressions import Expressions
from nnlearn.programs.symbolic.values import Along, Expression, Segment, Value, as_segments, segments_of


def without_ones(shape: Sequence[int], axes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape without its axes of length 1, and the named axes in that shape."""
    kept = [axis for axis, length in enumerate(shape) if length != 1]
    return tuple(shape[axis] for axis in kept), tuple(kept.index(axis) for axis in axes if axis in kept)


def same_segments(value: tuple[Segment, ...], shape: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of each segment if the array is one, or a stack of equal ones along its first axis."""
    if len(value) == 1:
        return tuple(shape)
    stacked = shape and shape[0] == len(value) and all(part.size == math.prod(shape[1:]) for part in value)
    return tuple(shape[1:]) if stacked else None


def broadcast(
    expressions: Expressions,
    value: Value,
    shape: Sequence[int],
    target: Sequence[int],
    dimensions: Sequence[int] | None = None,
) -> Value | None:
    """An array of ``shape`` broadcast to ``target``, whose axes ``dimensions`` are its own; None for the first ones."""
    dimensions = range(len(shape)) if dimensions is None else dimensions
    if isinstance(value, Expression) or math.prod(shape) == math.prod(target):
        return reshaped(value, shape, target)
    if isinstance(value, Along):
        return None
    each, lead = same_segments(value, shape), int(len(value) > 1)
    if each is None or (lead and (dimensions[0] != 0 or target[0] != shape[0])):
        return None
    size, goal = math.prod(target[lead:]), tuple(target[lead:])
    places = [dimension - lead for dimension in dimensions[lead:]]
    places = [place for place, length in zip(places, each, strict=True) if length != 1]
    how = (without_ones(each, ())[0], *without_ones(goal, places))
    return tuple(
        Segment(size, part.expression, True)
        if part.size == 1
        else Segment(size, expressions.make("broadcast", how, part.expression, part.moved), part.uniform)
        for part in value
    )


def reshaped(value: Value, shape: Sequence[int], target: Sequence[int]) -> Value | None:
    """The same elements in another shape."""
    if not isinstance(value, Along):
        return value
    kept = target[: value.axis] == shape[: value.axis] and len(target) > value.axis
    whole = all(part.size * target[value.axis] % math.prod(shape) == 0 for part in value.segments)
    return value if kept and whole else None


def transposed(value: Value, shape: Sequence[int], order: Sequence[int]) -> Value | None:
    """An array with its axes in this order.

    Segments that each fill one place of an axis follow the axis; any other array must be a single segment.
    """
    if isinstance(value, Expression):
        return value
    along, segments = value.axis if isinstance(value, Along) else 0, segments_of(value)
    if len(segments) == 1:
        moved = transposed_segment(segments[0], shape, order)
        return None if moved is None else (moved,)
    if not shape or shape[along] != len(segments) or any(part.size != segments[0].size for part in segments):
        return None
    rest = [axis - (axis > along) for axis in order if axis != along]
    inner = [length for axis, length in enumerate(shape) if axis != along]
    moved = [transposed_segment(part, inner, rest) for part in segments]
    parts = tuple(part for part in moved if part is not None)
    if len(parts) < len(moved):
        return None
    axis = order.index(along)
    return parts if math.prod(shape[at] for at in order[:axis]) == 1 else Along(axis, parts)


def transposed_segment(segment: Segment, shape: Sequence[int], order: Sequence[int]) -> Segment | None:
    """A segment of this shape, transposed; None if it was transposed before and this does not undo it."""
    shape, order = without_ones(shape, order)
    if segment.uniform or order == tuple(range(len(order))):
        return segment
    if segment.moved is None:
        return segment._replace(moved=(shape, order))
    first, before = segment.moved
    undone = tuple(first[axis] for axis in before) == shape and [before[axis] for axis in order] == sorted(order)
    return segment._replace(moved=None) if undone else None


def concatenated(values: Sequence[Value], shapes: Sequence[Sequence[int]], axis: int) -> Value | None:
    """Arrays laid end to end along an axis."""
    segments, single = (), True
    for value, shape in zip(values, shapes, strict=True):
        along = isinstance(value, Along)
        if along and value.axis != axis:
            return None
        part = as_segments(value, math.prod(shape))
        segments, single = segments + part, single and (along or len(part) <= 1)
    if len(segments) <= 1 or all(math.prod(shape[:axis]) == 1 for shape in shapes):
        return segments
    return Along(axis, segments) if single else None


def split(value: Value, sizes: Sequence[int], axis: int, shape: Sequence[int]) -> list[Value] | None:
    """An array cut along an axis; None if a cut falls inside a segment."""
    if isinstance(value, Expression):
        return [value for _ in sizes]
    if isinstance(value, Along) and value.axis == axis:
        parts = split(value.segments, sizes, 0, (shape[axis], math.prod(shape) // max(shape[axis], 1)))
        return parts and [Along(axis, part) if isinstance(part, tuple) and len(part) > 1 else part for part in parts]
    if isinstance(value, Along) or math.prod(shape[:axis]) != 1:
        return None
    parts, segments = [], list(value)
    for size in sizes:
        part, left = [], size * math.prod(shape[axis + 1 :])
        while left > 0 and segments and segments[0].size <= left:
            part.append(segments.pop(0))
            left -= part[-1].size
        if left:
            return None
        single = len(part) == 1 and (part[0].size == 1 or part[0].uniform)
        parts.append(part[0].expression if single else tuple(part))
    return parts
