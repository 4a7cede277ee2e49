"""What each number of a program's results is made of, as an expression in the program's arguments.

Arrays are read as runs of numbers that are all made in the same way: a leaf is one run, a buffer of ten leaves is ten,
and laying leaves end to end, or cutting a buffer into them, changes nothing. Sums, maxima and the like over a whole run
are sets of what they go over, whatever the order. So two programs that do the same to the same leaves come out equal,
packed or not; what is not understood comes out different, never equal by mistake.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

ELEMENTWISE_NAMES = """
abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp complex conj convert_element_type copy copy_p cos
cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic
lt max min mul ne neg nextafter not or population_count pow real reduce_precision rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor
"""
ELEMENTWISE = frozenset(ELEMENTWISE_NAMES.split())
ELEMENTWISE_SETTINGS = ("y", "new_dtype", "exponent_bits", "mantissa_bits", "rounding_method")
REDUCTIONS = {"reduce_sum": "add", "reduce_max": "max", "reduce_min": "min", "reduce_and": "and", "reduce_or": "or"}
NEUTRAL = {"add": 0, "and": 1, "or": 0}
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat2": "jaxpr"}
CALLS |= {"checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


class Run(NamedTuple):
    """So many numbers in a row that are all made by one expression, each from the arguments' numbers at its place.

    ``uniform`` says that they are all equal, whatever the arguments: a sum over them depends on how many they are.
    """

    size: int
    expression: int
    uniform: bool = False


Value = tuple[Run, ...] | int
"""Runs in the order of the flattened array; or one expression that holds for every number of it."""


def _solid(shape: Sequence[int], axes: Sequence[int]) -> tuple:
    """A shape without its axes of length 1, and where the named axes are then."""
    kept = [axis for axis, length in enumerate(shape) if length != 1]
    return tuple(shape[axis] for axis in kept), tuple(kept.index(axis) for axis in axes if axis in kept)


class Interpreter:
    """Reads programs. Expressions are numbers, the same for the same expression in all programs that one reads."""

    def __init__(self):
        self._numbers: dict[tuple, int] = {}
        self._sets: dict[int, tuple[str, tuple]] = {}
        self._neutral: dict[str, set[int]] = {kind: set() for kind in REDUCTIONS.values()}

    def run(self, program) -> list[Value]:
        """The values of a closed program's results; arguments are told apart by their position."""
        arguments = [
            self._of_size(var.aval, self._express("argument", position))
            for position, var in enumerate(program.jaxpr.invars)
        ]
        results = self._inside(program, arguments)
        # a single run is a value that holds throughout
        return [value[0].expression if isinstance(value, tuple) and len(value) == 1 else value for value in results]

    def _express(self, *key) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _of_size(self, aval, expression: int) -> Value:
        return expression if aval.size == 1 else (Run(aval.size, expression),) if aval.size else ()

    def _constant(self, value, aval) -> Value:
        if isinstance(value, jax.core.Tracer) or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
            return self._of_size(aval, self._express("constant", id(value)))
        array = np.asarray(value)
        if array.size == 1:
            number = self._express("number", str(array.dtype), array.tobytes())
            for kind, neutral in NEUTRAL.items():
                if array == neutral and (kind != "and" or array.dtype == bool):
                    self._neutral[kind].add(number)
            return number
        return self._of_size(aval, self._express("array", str(array.dtype), array.tobytes()))

    def _inside(self, program, arguments: Sequence[Value]) -> list[Value]:
        known = dict(zip(program.jaxpr.invars, arguments, strict=True))
        for var, constant in zip(program.jaxpr.constvars, program.consts, strict=True):
            known[var] = self._constant(constant, var.aval)

        def read(var):
            return self._constant(var.val, var.aval) if isinstance(var, Literal) else known[var]

        for equation in program.jaxpr.eqns:
            results = self._apply(equation, [read(var) for var in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(var) for var in program.jaxpr.outvars]

    def _apply(self, equation, values: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        shapes = [var.aval.shape for var in equation.invars]
        out = equation.outvars[0].aval if equation.outvars else None
        result = None
        if CALLS.get(name) in params:
            return self._call(params[CALLS[name]], values)
        if name == "cond":
            return self._branch(params["branches"], values) or self._opaque(equation, values)
        if name == "optimization_barrier":
            return values
        if name == "split":
            return self._split(values[0], params["sizes"], params["axis"], shapes[0]) or self._opaque(equation, values)
        if name in ELEMENTWISE:
            result = self._elementwise(name, params, self._stretched(values, shapes, out.shape), out)
        elif name in REDUCTIONS:
            result = self._reduce(REDUCTIONS[name], values[0], shapes[0], params["axes"])
        elif name == "dot_general" and all(len(shape) == 1 for shape in shapes) and out.shape == ():
            products = self._elementwise("mul", {}, values, equation.invars[0].aval)
            result = None if products is None else self._reduce("add", products, shapes[0], (0,))
        elif name == "broadcast_in_dim":
            result = self._broadcast(values[0], shapes[0], out.shape, params["broadcast_dimensions"])
        elif name == "squeeze" or (name == "reshape" and params["dimensions"] is None):
            result = values[0]
        elif name in ("concatenate", "stack") and self._end_to_end(params, shapes):
            sized = zip(values, shapes, strict=True)
            result = sum((self._runs(value, math.prod(shape)) for value, shape in sized), ())
        elif name == "slice" and len(shapes[0]) == 1 and params["strides"] in (None, (1,)):
            start, limit = params["start_indices"][0], params["limit_indices"][0]
            parts = self._split(values[0], (start, limit - start, shapes[0][0] - limit), 0, shapes[0])
            result = parts and parts[1]
        if result is None:
            return self._opaque(equation, values)
        if out.size == 1 and isinstance(result, tuple):
            result = result[0].expression
        return [result]

    def _end_to_end(self, params, shapes) -> bool:
        axis = params.get("dimension", params.get("axis"))
        return all(math.prod(shape[:axis]) == 1 for shape in shapes)

    def _call(self, program, values):
        if not hasattr(program, "consts"):  # remat holds an open program
            program = jax.extend.core.ClosedJaxpr(program, ())
        return self._inside(program, values)

    def _runs(self, value: Value, size: int) -> tuple[Run, ...]:
        return value if isinstance(value, tuple) else (Run(size, value, True),) if size else ()

    def _aligned(self, values: Sequence[Value]) -> list[tuple[int, list[int], bool]] | None:
        """For each run: its size, every value's expression there, and whether all are uniform; None if ends differ."""
        sizes = {tuple(run.size for run in value) for value in values if isinstance(value, tuple)}
        if len(sizes) != 1:
            return None
        whole = sizes.pop()
        columns = [self._runs(value, 1) * len(whole) if isinstance(value, int) else value for value in values]
        rows = zip(*columns, strict=True)
        return [
            (size, [run.expression for run in row], all(run.uniform for run in row))
            for size, row in zip(whole, rows, strict=True)
        ]

    def _stretched(self, values, shapes, target) -> list[Value]:
        """Operands of an elementwise operation with axes of length 1 brought to the result's shape."""
        return [
            value if shape in ((), target) else self._broadcast(value, shape, target, range(len(shape))) or value
            for value, shape in zip(values, shapes, strict=True)
        ]

    def _elementwise(self, name, params, values, out) -> Value | None:
        settings = tuple(str(params[key]) for key in ELEMENTWISE_SETTINGS if key in params)

        def combine(row):
            if name in REDUCTIONS.values():  # in any order and grouping
                return self._gather(name, [item for expression in row for item in self._items(name, 1, expression)])
            if name == "convert_element_type" and row[0] in self._sets and jnp.issubdtype(out.dtype, jnp.floating):
                return row[0]  # a sum is the same sum in another precision
            return self._express(name, settings, *row)

        if all(isinstance(value, int) for value in values):
            return combine(values)
        rows = self._aligned(values)
        return None if rows is None else tuple(Run(size, combine(row), uniform) for size, row, uniform in rows)

    def _items(self, kind: str, size: int, expression: int, uniform: bool = False) -> tuple:
        """What a run adds to a sum, or the like: itself, or if it is one number and such a sum, what that goes over."""
        if size != 1:
            return (("times", size, expression),) if uniform else (("all", expression),)
        if self._sets.get(expression, ("",))[0] == kind:
            return self._sets[expression][1]
        return () if expression in self._neutral[kind] else (("one", expression),)

    def _gather(self, kind: str, items: Sequence[tuple]) -> int:
        if len(items) == 1 and items[0][0] == "one":
            return items[0][1]
        items = tuple(sorted(items))
        expression = self._express("gather", kind, items)
        self._sets[expression] = (kind, items)
        return expression

    def _each(self, value: tuple[Run, ...], shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape of each run if the array is one run, or a stack of equal ones along its first axis."""
        if len(value) == 1:
            return tuple(shape)
        stacked = shape and shape[0] == len(value) and all(run.size == math.prod(shape[1:]) for run in value)
        return tuple(shape[1:]) if stacked else None

    def _reduce(self, kind, value, shape, axes) -> Value | None:
        left = math.prod(length for axis, length in enumerate(shape) if axis not in axes)
        if isinstance(value, int):
            size = math.prod(shape) // max(left, 1)
            return self._gather(kind, self._items(kind, size, value, uniform=True))
        if left == 1:
            return self._gather(kind, [item for run in value for item in self._items(kind, *run)])
        each, lead = self._each(value, shape), int(len(value) > 1)
        if each is None or (lead and 0 in axes):
            return None
        axes = [axis - lead for axis in axes]
        kept = math.prod(length for axis, length in enumerate(each) if axis not in axes)

        def reduce_run(run):
            if kept == 1:
                return Run(1, self._gather(kind, self._items(kind, *run)))
            return Run(kept, self._express("reduce", kind, *_solid(each, axes), run.expression))

        return tuple(map(reduce_run, value))

    def _broadcast(self, value, shape, target, dimensions) -> Value | None:
        if isinstance(value, int) or math.prod(shape) == math.prod(target):
            return value
        each, lead = self._each(value, shape), int(len(value) > 1)
        if each is None or (lead and (dimensions[0] != 0 or target[0] != shape[0])):
            return None
        size, goal = math.prod(target[lead:]), tuple(target[lead:])
        places = [dimension - lead for dimension in dimensions[lead:]]
        places = [place for place, length in zip(places, each, strict=True) if length != 1]
        how = (_solid(each, ())[0], *_solid(goal, places))
        return tuple(
            Run(size, run.expression, True)
            if run.size == 1
            else Run(size, self._express("broadcast", how, run.expression), run.uniform)
            for run in value
        )

    def _split(self, value, sizes, axis, shape) -> list[Value] | None:
        if math.prod(shape[:axis]) != 1:
            return None
        if isinstance(value, int):
            return [value] * len(sizes)
        parts, runs = [], list(value)
        for size in sizes:
            part, left = [], size * math.prod(shape[axis + 1 :])
            while left > 0 and runs and runs[0].size <= left:
                part.append(runs.pop(0))
                left -= part[-1].size
            if left:
                return None
            single = len(part) == 1 and (part[0].size == 1 or part[0].uniform)
            parts.append(part[0].expression if single else tuple(part))
        return parts

    def _branch(self, branches, values) -> list[Value] | None:
        index, *operands = values
        results = []
        for outcomes in zip(*(self._inside(branch, operands) for branch in branches), strict=True):
            if all(isinstance(outcome, int) for outcome in outcomes):
                results.append(self._express("cond", index, *outcomes))
                continue
            rows = self._aligned(outcomes)
            if rows is None:
                return None
            results.append(tuple(Run(size, self._express("cond", index, *row), uniform) for size, row, uniform in rows))
        return results

    def _opaque(self, equation, values) -> list[Value]:
        """An operation that is not understood, on arrays as they are: equal only to itself."""
        shapes = tuple(var.aval.shape for var in equation.invars)
        key = (equation.primitive.name, str(equation.params), shapes, tuple(values))
        return [
            self._of_size(var.aval, self._express("opaque", position, key))
            for position, var in enumerate(equation.outvars)
        ]


__all__ = ["Interpreter", "Run"]
