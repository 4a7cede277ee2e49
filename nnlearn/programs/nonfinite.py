"""The first operation of a program that gives an infinity or a NaN, with its source line.

The program runs once, and each value carries along where its infinities and NaNs come from, through calls, loops and
the backward pass. Only operations that lead to the result are blamed: an infinity that is masked out again is not.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn

from nnlearn.programs.places import Place, place_of, trace_program
from nnlearn.programs.read import bind, called_program, closed, interpret, scan_sizes
from nnlearn.tree import path_name

DEPTH = 3  # nested loops whose iterations are known
FINITE = 0.0  # the code of a value whose non-finite elements, if any, were put there on purpose


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an infinity or a NaN comes from.

    Attributes:
      operation: the primitive, such as ``"log"``; ``"input"`` if an argument is not finite.
      where: its source line; for a backward operation the line whose derivative it computes.
      value: ``"nan"`` or ``"inf"``, what it gave first.
      operands: the smallest and the largest finite element of each of its operands that is an array of numbers.
      backward: whether it belongs to a derivative.
      iterations: of the loops around it, the outermost first.
      results: the paths of the results that are not finite because of it.
    """

    operation: str
    where: Place
    value: str
    operands: tuple[tuple[float, float], ...]
    backward: bool
    iterations: tuple[int, ...]
    results: tuple[str, ...]

    def __str__(self) -> str:
        part = "the derivative of " if self.backward else ""
        ranges = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in self.operands)
        turn = f", in iteration {', '.join(map(str, self.iterations))} of its loop" if self.iterations else ""
        seen = f" from operands of {ranges}" if ranges else ""
        return f"{part}{self.operation} at {self.where} gives {self.value}{seen}{turn}"


class _Known(NamedTuple):
    """A value, and where it stops being finite.

    Attributes:
      value: the array.
      seen: [has a NaN, has an infinity, smallest and largest finite element], float32.
      origin: [code of the operation, iterations of the loops around it]; the code is 0 for a finite value.
    """

    value: Any
    seen: jax.Array
    origin: jax.Array


def find_nonfinite(function: Callable[..., Any], *arguments: Any) -> Origin | None:
    """The operation that makes a function's result infinite or NaN.

    For the backward pass give a gradient, ``find_nonfinite(jax.grad(loss), params, batch)``; a whole training step
    works, too. An infinity that the program itself contains, such as the ``-inf`` of a mask, is no origin; a NaN that
    results from it is.

    Args:
      function: a function of arrays that JAX can trace.
      *arguments: its arguments.

    Returns:
      The origin of the first result that is not finite, or None if all are finite.

    >>> def loss(x):
    ...     return jnp.sum(jnp.log(x) * 0.0)
    >>> origin = find_nonfinite(loss, jnp.array([1.0, 0.0]))
    >>> origin.operation, origin.value, origin.operands
    ('log', 'inf', ((0.0, 1.0),))
    >>> find_nonfinite(loss, jnp.ones(2)) is None
    True
    """
    program, shapes = trace_program(function, *arguments)
    reader = _Reader()

    @jax.jit
    def run(values):
        known = [reader.given(value, number) for number, value in enumerate(values)]
        results = reader.run(program, known, (), None, 0)
        return [(each.origin, each.seen) for each in results], reader.operands

    results, operands = run(jax.tree.leaves(arguments))
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(shapes)]
    codes = [int(origin[0]) for origin, _ in results]
    code = next((code for code in codes if code), 0)
    if not code:
        return None
    origin = np.asarray(results[codes.index(code)][0])
    names = tuple(path for path, other in zip(paths, codes, strict=True) if other == code)
    if code < 0:
        path = path_name(jax.tree.leaves_with_path(arguments)[-code - 1][0])
        value = "nan" if results[codes.index(code)][1][0] else "inf"
        return Origin("input", Place(scope=path), value, (), False, (), names)
    return reader.origin(code, origin, operands, names)


class _Reader:
    """An interpreter that tracks origins.

    Attributes:
      equations: each operation that may be an origin, with its place; its code is its number counted from 1.
      operands: for each code the ranges of its operands and what it gave; in a loop, of the iteration of the origin.
    """

    def __init__(self):
        self.equations: list[tuple[JaxprEqn, Place]] = []
        self.operands: dict[int, jax.Array] = {}

    def given(self, value: Any, number: int) -> _Known:
        """An argument, whose code is negative if it is not finite."""
        seen = _look(value)
        code = jnp.where((seen[0] + seen[1]) > 0, -1.0 - number, FINITE)
        return _Known(value, seen, jnp.full(1 + DEPTH, -1.0).at[0].set(code))

    def run(self, program: ClosedJaxpr, known: Sequence[_Known], at: tuple, caller: Place | None, depth: int):
        """The results of a program."""

        def constant(value, aval):
            return _Known(value, _look(value), jnp.full(1 + DEPTH, -1.0).at[0].set(FINITE))

        def apply(equation, operands):
            place = place_of(equation, caller)
            called = called_program(equation)
            if called is not None:
                return self.run(called, operands, at, place, depth)
            name = equation.primitive.name
            loops = {"scan": self._scan, "while": self._while, "cond": self._cond}
            if name in loops:
                return loops[name](equation, operands, place, depth)
            return self._operation(equation, operands, place)

        return interpret(program, known, apply, constant)

    def _operation(self, equation: JaxprEqn, operands: Sequence[_Known], place: Place) -> list[_Known]:
        results = bind(equation, [each.value for each in operands])
        self.equations.append((equation, place))
        code = float(len(self.equations))
        found = []
        inherited, nan_before, bad_before = _blank_origin(), jnp.zeros(()), jnp.zeros(())
        for each in operands[::-1]:  # the first operand that is not finite decides
            inherited = jnp.where(each.origin[0] != FINITE, each.origin, inherited)
            nan_before = jnp.maximum(nan_before, each.seen[0])
            bad_before = jnp.maximum(bad_before, each.seen[0] + each.seen[1])
        for result in results:
            seen = _look(result)
            bad, new_nan = seen[0] + seen[1] > 0, (seen[0] > 0) & (nan_before == 0)
            own = bad & (inherited[0] == FINITE) & ((bad_before == 0) | new_nan)
            ranges = [each.seen[2:] for each in operands if _is_number(each.value)]
            origin = jnp.where(own, _blank_origin().at[0].set(code), jnp.where(bad, inherited, _blank_origin()))
            found.append(_Known(result, seen, origin))
            self._note(code, seen, ranges)
        return found

    def _note(self, code: float, seen: jax.Array, ranges: Sequence[jax.Array]) -> None:
        self.operands[int(code)] = jnp.concatenate([seen[:2], *ranges])

    def _loop(self, turn: Callable, first_code: int, depth: int, index: Any, results: Sequence[_Known]) -> list[_Known]:
        """Write the number of the iteration into the origins that lie inside of this loop."""
        if depth >= DEPTH:
            return list(results)
        inside = [(each.origin[0] > first_code) & (each.origin[1 + depth] < 0) for each in results]
        return [
            each._replace(origin=each.origin.at[1 + depth].set(jnp.where(here, index, each.origin[1 + depth])))
            for each, here in zip(results, inside, strict=True)
        ]

    def _scan(self, equation: JaxprEqn, operands: Sequence[_Known], place: Place, depth: int) -> list[_Known]:
        params, body = equation.params, equation.params["jaxpr"]
        (fixed, carried), before = scan_sizes(params), len(self.equations)
        constants, carry, rows = operands[:fixed], operands[fixed : fixed + carried], operands[fixed + carried :]

        def turn(carry, xs):
            index, carry = carry
            values, _ = xs
            row = [_Known(value, _look(value), each.origin) for value, each in zip(values, rows, strict=True)]
            del self.equations[before:]  # traced more than once
            outer, self.operands = self.operands, {}
            results = self.run(body, [*constants, *carry, *row], (), place, depth + 1)
            results = self._loop(turn, before, depth, index, results)
            noted, self.operands = self.operands, outer
            return (index + 1, results[:carried]), (results[carried:], noted)

        start = jnp.zeros(()), [*carry]
        xs = [each.value for each in rows], None
        (_, carry), (ys, noted) = jax.lax.scan(turn, start, xs, length=params["length"], reverse=params["reverse"])
        self.operands |= {code: _first_bad(values) for code, values in noted.items()}
        stacked = [_Known(each.value, _summary(each.seen), _first_origin(each.origin)) for each in ys]
        return [*carry, *stacked]

    def _while(self, equation: JaxprEqn, operands: Sequence[_Known], place: Place, depth: int) -> list[_Known]:
        return self._operation(equation, operands, place)

    def _cond(self, equation: JaxprEqn, operands: Sequence[_Known], place: Place, depth: int) -> list[_Known]:
        branches = [closed(branch) for branch in equation.params["branches"]]
        noted: dict[int, jax.ShapeDtypeStruct] = {}
        before = self.operands
        starts = []
        for branch in branches:  # the codes of all branches, before any of them is traced to run
            starts.append(len(self.equations))
            self.operands = {}
            jax.eval_shape(lambda known, b=branch: self.run(b, known, (), place, depth), list(operands[1:]))
            noted |= {code: jax.ShapeDtypeStruct(each.shape, each.dtype) for code, each in self.operands.items()}
        equations = list(self.equations)

        def option(number):
            def run(known):
                del self.equations[starts[number] :]
                self.operands = {}
                results = self.run(branches[number], known, (), place, depth)
                blank = {code: jnp.zeros(shape.shape, shape.dtype) for code, shape in noted.items()}
                return results, blank | self.operands

            return run

        index = jnp.asarray(operands[0].value, jnp.int32)
        results, found = jax.lax.switch(index, [option(n) for n in range(len(branches))], list(operands[1:]))
        self.equations, self.operands = equations, before | found
        return results

    def origin(self, code: int, origin: np.ndarray, operands: dict[int, Any], results: tuple[str, ...]) -> Origin:
        """What was found, in words."""
        equation, place = self.equations[code - 1]
        noted = np.asarray(operands[code])
        backward = "transpose(" in place.scope
        return Origin(
            equation.primitive.name,
            place,
            "nan" if noted[0] else "inf",
            tuple((float(low), float(high)) for low, high in noted[2:].reshape(-1, 2) if low <= high),
            backward,
            tuple(int(each) for each in origin[1:] if each >= 0),
            results,
        )


def _blank_origin() -> jax.Array:
    return jnp.full(1 + DEPTH, -1.0).at[0].set(FINITE)


def _is_number(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def _look(value: Any) -> jax.Array:
    """Whether an array has a NaN and an infinity, and its smallest and largest finite element, in one pass."""
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.array([0, 0, jnp.inf, -jnp.inf], jnp.float32)
    value = jnp.ravel(jnp.abs(value) if jnp.iscomplexobj(value) else value).astype(
        jnp.promote_types(dtype, jnp.float32)
    )
    nan, inf = jnp.isnan(value), jnp.isinf(value)
    finite, zero = ~(nan | inf), jnp.zeros((), value.dtype)
    terms = nan.astype(value.dtype), inf.astype(value.dtype), jnp.where(finite, value, jnp.inf)
    terms = (*terms, jnp.where(finite, value, -jnp.inf))
    starts = zero, zero, zero + jnp.inf, zero - jnp.inf

    def merge(one, other):
        larger, smaller = jnp.maximum, jnp.minimum
        return tuple(f(a, b) for f, a, b in zip((larger, larger, smaller, larger), one, other, strict=True))

    return jnp.stack(jax.lax.reduce(terms, starts, merge, (0,))).astype(jnp.float32)


def _summary(seen: jax.Array) -> jax.Array:
    """What is seen of an array whose rows were seen one by one, shape (rows, 4)."""
    return jnp.stack([seen[:, 0].max(), seen[:, 1].max(), seen[:, 2].min(), seen[:, 3].max()])


def _first_origin(origins: jax.Array) -> jax.Array:
    """The first origin of an array whose rows have origins."""
    return origins[jnp.argmax(origins[:, 0] != FINITE)]


def _first_bad(noted: jax.Array) -> jax.Array:
    """Of the notes of every iteration those of the first that was not finite."""
    return noted[jnp.argmax(noted[:, 0] + noted[:, 1] > 0)]


__all__ = ["Origin", "find_nonfinite"]
