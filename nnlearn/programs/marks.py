"""What is known about each value of a network's program without running it.

A ``Mark`` follows every value: which axes count examples and which count units, which parameters it depends on, with
and without a derivative, and which layer and operation it comes from. The rules below hold for one operation each;
loops and calls are in ``walk``.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from nnlearn.programs.read import ELEMENTWISE

BATCH, UNIT = "batch", "unit"  # labels of axes; others are ""
MOVES = {"broadcast_in_dim", "reshape", "transpose", "squeeze", "convert_element_type", "copy", "copy_p", "rev"}
SAME_RANK = {"slice", "dynamic_slice", "pad", "rev", "concatenate", "sort", "dynamic_update_slice", "split", "top_k"}
SAME_RANK |= {
    "cumsum",
    "cumprod",
    "cummax",
    "cumlogsumexp",
    "stop_gradient",
    "reduce_precision",
    "optimization_barrier",
}
CUTS = {"stop_gradient", "argmax", "argmin", "round", "sign", "floor", "ceil", "eq", "ne", "lt", "le", "gt", "ge"}
CUTS |= {"is_finite", "and", "or", "not"}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
REMEMBERED = 64  # elementwise ancestors of a value
_numbers = itertools.count()


class Mark(NamedTuple):
    """What is known about a value.

    Attributes:
      name: equal for values that are computed alike.
      axes: a label for each axis: ``"batch"``, ``"unit"`` or ``""``.
      leaf: the parameter that it is a form of, if it depends on parameters and not on inputs.
      layer: the place in the program of the last product that leads to it, and the parameter in it.
      reached: the parameters, as bits, that it depends on.
      smooth: those of them that it has a derivative with respect to.
      fed: the inputs, as bits, that it depends on.
      facts: the facts about the program, as bits, that led to it.
      sources: the operations of interest that lead to it without another one in between.
      trail: the names of its elementwise ancestors.
      constant: its value, if all elements are one known number.
      compares: the name of a value and the number that it is compared with, if this is such a comparison.
      sum_of: the name of the value that this is the sum of, over which axes, and their labels.
      is_exp: whether it is an exponential.
      is_total: whether it is computed from sums and other reductions alone.
      guarded: whether a positive number was added to it, or is its lower bound.
    """

    name: Any
    axes: tuple[str, ...] = ()
    leaf: str = ""
    layer: tuple[tuple[int, ...], str] = ((), "")
    reached: int = 0
    smooth: int = 0
    fed: int = 0
    facts: int = 0
    sources: frozenset = frozenset()
    trail: frozenset = frozenset()
    constant: float | None = None
    compares: tuple[Any, float] | None = None
    sum_of: tuple[Any, tuple[int, ...], tuple[str, ...]] | None = None
    is_exp: bool = False
    is_total: bool = False
    guarded: bool = False

    @property
    def is_weight(self) -> bool:
        """Whether it is computed from parameters and not from inputs."""
        return bool(self.reached) and not self.fed


def literal_mark(value: Any) -> Mark:
    """The mark of a constant.

    >>> literal_mark(0.0).constant
    0.0
    """
    number = float(value) if jnp.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.number) else None
    name = ("constant", number) if number is not None else next(_numbers)
    return Mark(name, ("",) * jnp.ndim(value), constant=number)


def fresh_name() -> int:
    """A name that no other value has."""
    return next(_numbers)


def marks_after(equation: JaxprEqn, marks: Sequence[Mark]) -> list[Mark]:
    """The marks of an operation's results.

    >>> import jax
    >>> add = jax.make_jaxpr(lambda x: x + 1.0)(jnp.ones((2, 3))).jaxpr.eqns[0]
    >>> marks_after(add, [Mark(0, ("batch", "unit"), fed=1), literal_mark(1.0)])[0].axes
    ('batch', 'unit')
    """
    primitive = equation.primitive.name
    elementwise = primitive in ELEMENTWISE or primitive in MOVES
    reached = smooth = fed = facts = 0
    for mark in marks:
        reached, smooth, fed, facts = reached | mark.reached, smooth | mark.smooth, fed | mark.fed, facts | mark.facts
    if primitive == "select_n":
        smooth = marks[1].smooth | (marks[2].smooth if len(marks) > 2 else 0)
    results: list[Any] = [var.aval for var in equation.outvars]
    inexact = [jnp.issubdtype(aval.dtype, jnp.inexact) for aval in results]
    trail = frozenset().union(*(mark.trail for mark in marks)) if elementwise else frozenset()
    shared = Mark(
        None,
        leaf=next((mark.leaf for mark in marks if mark.leaf), "") if reached and not fed else "",
        layer=max((mark.layer for mark in marks), default=((), "")),
        reached=reached,
        fed=fed,
        facts=facts,
        sources=frozenset().union(*(mark.sources for mark in marks)),
        trail=trail if len(trail) < REMEMBERED else frozenset(),
    )
    found = []
    for at, (var, is_inexact) in enumerate(zip(equation.outvars, inexact, strict=True)):
        name = _name(equation, marks, at) if elementwise or primitive.startswith("reduce") else fresh_name()
        mark = shared._replace(
            name=name,
            axes=_axes_after(equation, marks, var.aval),
            smooth=smooth if is_inexact and primitive not in CUTS else 0,
            sources=shared.sources if is_inexact else frozenset(),
            trail=shared.trail | {name},
        )
        found.append(_with_details(mark, equation, marks))
    return found


def _name(equation: JaxprEqn, marks: Sequence[Mark], at: int) -> Any:
    params = {key: value for key, value in equation.params.items() if key not in ("sharding", "out_sharding")}
    return hash((equation.primitive.name, tuple(mark.name for mark in marks), str(params), at))


def _with_details(mark: Mark, equation: JaxprEqn, marks: Sequence[Mark]) -> Mark:
    """The mark with what only some operations give."""
    primitive, first = equation.primitive.name, marks[0] if marks else None
    if first is None:
        return mark
    if primitive.startswith("reduce_") and "axes" in equation.params:
        mark = mark._replace(is_total=True)
    elif primitive in ELEMENTWISE or primitive in MOVES:
        known = [each for each in marks if each.fed or each.reached]
        mark = mark._replace(is_total=bool(known) and all(each.is_total for each in known))
    if primitive in MOVES or primitive == "abs":
        return mark._replace(
            constant=None if primitive == "abs" else first.constant,
            compares=None if primitive == "abs" else first.compares,
            sum_of=first.sum_of,
            guarded=first.guarded,
            is_exp=first.is_exp,
        )
    if primitive in COMPARISONS and marks[1].constant is not None:
        return mark._replace(compares=(first.name, marks[1].constant))
    if primitive == "reduce_sum":
        axes = tuple(equation.params["axes"])
        total = first.name, axes, tuple(first.axes[axis] for axis in axes)
        return mark._replace(sum_of=total, is_exp=first.is_exp, guarded=first.is_exp)
    if primitive == "select_n":
        values = [each for each in marks[1:] if each.constant is None]
        if len(values) == 1:  # a value that is replaced where it is masked, or where it is zero
            kept = values[0]
            guarded = kept.guarded or (first.compares is not None and first.compares[0] == kept.name)
            return mark._replace(is_exp=kept.is_exp, sum_of=kept.sum_of, guarded=guarded)
    if primitive == "exp":
        return mark._replace(is_exp=True)
    if primitive in ("add", "max"):
        return mark._replace(guarded=any((each.constant or 0) > 0 or each.guarded for each in marks))
    if primitive == "clamp":
        return mark._replace(guarded=(first.constant or 0) > 0)
    if primitive in ("sqrt", "integer_pow", "square", "mul", "div", "logistic", "select_n", "stop_gradient"):
        return mark._replace(guarded=all(each.guarded or (each.constant or 0) > 0 for each in marks))
    return mark


def _axes_after(equation: JaxprEqn, marks: Sequence[Mark], aval: Any) -> tuple[str, ...]:
    primitive, params, rank = equation.primitive.name, equation.params, len(getattr(aval, "shape", ()))
    if not marks or not rank:
        return ("",) * rank
    axes, operand = marks[0].axes, equation.invars[0].aval
    shape: tuple[int, ...] = getattr(operand, "shape", ())
    if primitive == "dot_general":
        return _axes_of_product(params["dimension_numbers"], marks)
    if primitive == "conv_general_dilated":
        places = params["dimension_numbers"]
        labels = [""] * rank
        labels[places.out_spec[0]] = axes[places.lhs_spec[0]] or BATCH
        labels[places.out_spec[1]] = UNIT
        return tuple(labels)
    if primitive == "broadcast_in_dim":
        labels = [""] * rank
        for label, to in zip(axes, params["broadcast_dimensions"], strict=True):
            labels[to] = label
        return tuple(labels)
    if primitive == "reshape":
        return _reshaped_axes(axes, shape, aval.shape)
    if primitive == "transpose":
        return tuple(axes[at] for at in params["permutation"])
    if primitive == "squeeze":
        return tuple(label for at, label in enumerate(axes) if at not in params["dimensions"])
    if "axes" in params and (primitive.startswith("reduce") or primitive in ("argmax", "argmin")):
        return tuple(label for at, label in enumerate(axes) if at not in params["axes"])
    if primitive == "gather":
        return _gathered_axes(params["dimension_numbers"].offset_dims, marks, rank)
    if primitive in ELEMENTWISE or primitive in SAME_RANK:
        return joined_axes([mark.axes for mark in marks if len(mark.axes) == rank], rank)
    return axes if len(axes) == rank and shape == aval.shape else ("",) * rank


def joined_axes(several: Sequence[tuple[str, ...]], rank: int) -> tuple[str, ...]:
    """For each axis the first label that is not empty.

    >>> joined_axes([("batch", ""), ("", "unit")], 2)
    ('batch', 'unit')
    """
    return tuple(next((axes[at] for axes in several if axes[at]), "") for at in range(rank))


def _axes_of_product(dimensions: Any, marks: Sequence[Mark]) -> tuple[str, ...]:
    contracted, batched = dimensions
    shared = [marks[0].axes[a] or marks[1].axes[b] for a, b in zip(*batched, strict=True)]
    for mark, used, batch in zip(marks, contracted, batched, strict=True):
        free = [label for at, label in enumerate(mark.axes) if at not in (*used, *batch)]
        shared += [UNIT] * len(free) if mark.is_weight else free
    return tuple(shared)


def _gathered_axes(offset_dims: Sequence[int], marks: Sequence[Mark], rank: int) -> tuple[str, ...]:
    """Rows of a table of parameters have units; their order has the axes of the indices."""
    rows = iter(marks[1].axes[:-1])
    inner = UNIT if marks[0].is_weight else ""
    return tuple(inner if at in offset_dims else next(rows, "") for at in range(rank))


def _reshaped_axes(axes: Sequence[str], old: Sequence[int], new: Sequence[int]) -> tuple[str, ...]:
    """The labels after a reshape: parts of an axis keep its label; merged axes have that of their kind."""
    labels, at = [""] * len(new), 0
    if 0 in (*old, *new):
        return tuple(labels)
    start = 0
    while start < len(new):
        group, size, end = [], new[start], start + 1
        length = 1
        while at < len(old) and (length < size or not group):
            length, group, at = length * old[at], [*group, axes[at]], at + 1
            while size < length and end < len(new):
                size, end = size * new[end], end + 1
        kinds = set(filter(None, group))
        label = kinds.pop() if len(kinds) == 1 else ""
        for position in range(start, end):
            labels[position] = label if new[position] > 1 or end == start + 1 else ""
        start = end
    return tuple(labels)


__all__ = [
    "BATCH",
    "CUTS",
    "UNIT",
    "Mark",
    "fresh_name",
    "joined_axes",
    "literal_mark",
    "marks_after",
]
