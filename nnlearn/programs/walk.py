"""A walk through a network's program, into its calls and loops, with a mark and if wanted a value for each variable."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from nnlearn.programs.marks import Mark, fresh_name, joined_axes, literal_mark, marks_after
from nnlearn.programs.places import Place, place_of
from nnlearn.programs.read import CUSTOM_DERIVATIVES, bind, called_program, closed, scan_sizes
from nnlearn.tree import path_name

SETTLED = 8  # passes over the body of a loop after which the marks of its carry must be constant
At = tuple[int, ...]  # the position of an equation, through the calls that contain it


@dataclasses.dataclass
class Visit:
    """An operation that the walk has reached.

    Attributes:
      equation: the equation.
      at: its position in the program.
      place: its source line.
      before, after: the marks of its operands and results.
      operands, results: their values, or None if the walk computes none. A visitor may replace marks and values of
        results.
    """

    equation: JaxprEqn
    at: At
    place: Place
    before: Sequence[Mark]
    after: list[Mark]
    operands: Sequence[Any]
    results: list[Any]


class Visitor:
    """What happens at each operation; the base class does nothing."""

    def is_whole(self, equation: JaxprEqn) -> bool:
        """Whether a call is visited as one operation rather than entered."""
        return False

    def visit(self, visit: Visit) -> None:
        """Look at an operation."""

    def inside(self) -> "Visitor":
        """The visitor of a loop's body or of a branch."""
        return self

    def arrays(self) -> Any:
        """The arrays that the visitor has collected, a pytree."""
        return ()

    def absorb(self, child: "Visitor", arrays: Any, length: int | None) -> None:
        """Take over what a child collected; its arrays have a new leading axis for a loop of that length."""


@dataclasses.dataclass(frozen=True)
class Walk:
    """A walk with one visitor.

    Attributes:
      visitor: called at each operation.
      concrete: whether values are computed, besides marks.
    """

    visitor: Visitor
    concrete: bool = True

    def run(
        self,
        program: ClosedJaxpr,
        values: Sequence[Any],
        marks: Sequence[Mark],
        at: At = (),
        caller: Place | None = None,
    ) -> tuple[list[Any], list[Mark]]:
        """The values and the marks of a program's results."""
        known: dict[Any, tuple[Any, Mark]] = {}
        for var, value in zip(program.jaxpr.constvars, program.consts, strict=True):
            known[var] = value, literal_mark(value)
        known |= zip(program.jaxpr.invars, zip(values, marks, strict=True), strict=True)

        def read(atom):
            return (atom.val, literal_mark(atom.val)) if isinstance(atom, Literal) else known[atom]

        for number, equation in enumerate(program.jaxpr.eqns):
            operands = [read(atom) for atom in equation.invars]
            results = self._equation(equation, operands, (*at, number), place_of(equation, caller))
            known.update(zip(equation.outvars, zip(*results, strict=True), strict=True))
        results = [read(atom) for atom in program.jaxpr.outvars]
        return [value for value, _ in results], [mark for _, mark in results]

    def _equation(self, equation: JaxprEqn, operands: list, at: At, place: Place) -> tuple[list, list]:
        values, marks = [value for value, _ in operands], [mark for _, mark in operands]
        primitive, called = equation.primitive.name, called_program(equation)
        if called is not None and not self.visitor.is_whole(equation):
            results, after = self.run(called, values, marks, at, place)
            if primitive in CUSTOM_DERIVATIVES:  # it may have a derivative where its operations have none
                after = [_smooth(mark, marks, var.aval) for mark, var in zip(after, equation.outvars, strict=True)]
            return results, after
        if primitive == "scan":
            return self._scan(equation, values, marks, at, place)
        if primitive == "cond":
            return self._branches(equation, values, marks, at, place)
        return self._operation(equation, values, marks, at, place)

    def _operation(self, equation, values, marks, at, place) -> tuple[list, list]:
        results = list(bind(equation, values)) if self.concrete else [None] * len(equation.outvars)
        visit = Visit(equation, at, place, marks, marks_after(equation, marks), values, results)
        self.visitor.visit(visit)
        return visit.results, visit.after

    def _scan(self, equation, values, marks, at, place) -> tuple[list, list]:
        params, body = equation.params, equation.params["jaxpr"]
        fixed, carried = scan_sizes(params)
        marks = self._settled_marks(body, marks, fixed, carried, at, place)
        children: list[Visitor] = []
        after: list[Mark] = []

        def turn(carry, xs):
            child = self.visitor.inside()
            results, after[:] = Walk(child, self.concrete).run(body, [*values[:fixed], *carry, *xs], marks, at, place)
            children.append(child)
            return results[:carried], (results[carried:], child.arrays())

        if self.concrete:
            carry, xs = values[fixed : fixed + carried], values[fixed + carried :]
            options = {"length": params["length"], "reverse": params["reverse"], "unroll": params["unroll"]}
            carry, (ys, arrays) = jax.lax.scan(turn, carry, xs, **options)
            results = [*carry, *ys]
        else:
            turn([None] * carried, [None] * (len(marks) - fixed - carried))
            results, arrays = [None] * len(equation.outvars), children[-1].arrays()
        self.visitor.absorb(children[-1], arrays, params["length"])
        stacked = [mark._replace(axes=("", *mark.axes)) for mark in after[carried:]]
        return results, [_anew(mark) for mark in (*after[:carried], *stacked)]

    def _settled_marks(self, body, marks, fixed, carried, at, place) -> list[Mark]:
        """The marks of a loop's body: those of its carry hold in every iteration."""
        rows = [mark._replace(axes=mark.axes[1:]) for mark in marks[fixed + carried :]]
        carry = list(marks[fixed : fixed + carried])
        for _ in range(SETTLED):
            carry = [_anew(mark) for mark in carry]
            walk = Walk(self.visitor.inside(), concrete=False)
            inputs = [*marks[:fixed], *carry, *map(_anew, rows)]
            _, after = walk.run(body, [None] * len(inputs), inputs, at, place)
            joined = [_either(one, other) for one, other in zip(carry, after[:carried], strict=True)]
            if [mark._replace(name=0) for mark in joined] == [mark._replace(name=0) for mark in carry]:
                break
            carry = joined
        return [*marks[:fixed], *map(_anew, carry), *map(_anew, rows)]

    def _branches(self, equation, values, marks, at, place) -> tuple[list, list]:
        branches = [closed(branch) for branch in equation.params["branches"]]
        after: list[list[Mark]] = [[] for _ in branches]
        children = [self.visitor.inside() for _ in branches]

        def run(number, *operands):
            children[number] = self.visitor.inside()
            results, after[number] = Walk(children[number], self.concrete).run(
                branches[number], operands, marks[1:], (*at, number), place
            )
            return results, children[number].arrays()

        if not self.concrete:
            found = [run(number, *values[1:]) for number in range(len(branches))]
            results, arrays = [None] * len(equation.outvars), [arrays for _, arrays in found]
        else:
            shapes = [
                jax.eval_shape(lambda *operands, n=n: run(n, *operands)[1], *values[1:]) for n in range(len(after))
            ]

            def one(number, *operands):
                results, arrays = run(number, *operands)
                blanks = [jax.tree.map(_missing, shape) for shape in shapes]
                return results, [arrays if at == number else blank for at, blank in enumerate(blanks)]

            options = [functools.partial(one, n) for n in range(len(branches))]
            results, arrays = jax.lax.switch(jnp.asarray(values[0], jnp.int32), options, *values[1:])
        for child, its_arrays in zip(children, arrays, strict=True):
            self.visitor.absorb(child, its_arrays, None)
        joined = after[0]
        for others in after[1:]:
            joined = [_either(one, other) for one, other in zip(joined, others, strict=True)]
        return results, [_anew(mark) for mark in joined]


def _smooth(mark: Mark, operands: Sequence[Mark], aval: Any) -> Mark:
    if not jnp.issubdtype(aval.dtype, jnp.inexact):
        return mark
    return mark._replace(smooth=functools.reduce(operator.or_, (each.smooth for each in operands), mark.smooth))


def _missing(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.full(shape.shape, jnp.nan, shape.dtype)


def _anew(mark: Mark) -> Mark:
    """The mark of a value that is no longer known by the operation that made it."""
    name = fresh_name()
    return mark._replace(name=name, trail=frozenset({name}), constant=None, compares=None, sum_of=None)


def _either(one: Mark, other: Mark) -> Mark:
    """What holds of a value that has one of two marks."""
    return one._replace(
        axes=joined_axes([one.axes, other.axes], len(one.axes)),
        leaf=one.leaf or other.leaf,
        layer=max(one.layer, other.layer),
        reached=one.reached | other.reached,
        smooth=one.smooth | other.smooth,
        fed=one.fed | other.fed,
        facts=one.facts | other.facts,
        sources=one.sources | other.sources,
        guarded=one.guarded and other.guarded,
    )


def leaf_marks(tree: Any, *, weights: bool) -> list[Mark]:
    """Marks of arguments: parameters, each with its path, or inputs, whose first axis counts examples.

    >>> [mark.leaf for mark in leaf_marks({"a": jnp.ones(2), "b": jnp.ones(3)}, weights=True)]
    ['a', 'b']
    """
    found = []
    for number, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        rank, bit = jnp.ndim(leaf), 1 << number
        if weights:
            found.append(Mark(fresh_name(), ("",) * rank, path_name(path), reached=bit, smooth=bit))
        else:
            found.append(Mark(fresh_name(), ("batch",) * min(rank, 1) + ("",) * (rank - 1), fed=bit))
    return [mark._replace(trail=frozenset({mark.name})) for mark in found]


__all__ = ["At", "Visit", "Visitor", "Walk", "leaf_marks"]
