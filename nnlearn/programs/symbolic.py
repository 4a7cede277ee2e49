"""What each number of a program's results is made of, as an expression in the program's arguments.

Arrays are read as runs of numbers that are all made in the same way: a leaf is one run, a buffer of ten leaves is ten,
and laying leaves end to end, or cutting a buffer into them, changes nothing. Sums, maxima and the like over a whole run
are sets of what they go over, whatever the order. So two programs that do the same to the same leaves come out equal,
packed or not; what is not understood comes out different, never equal by mistake.

Only sums in float32 or better may be regrouped. A sum in bfloat16 is equal to the same sum of the same arrays alone,
and so is a total that is rounded to bfloat16: the last bit of it is 0.4 %.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from nnlearn.native.kernel import KERNEL
from nnlearn.tree import rarely

ELEMENTWISE_NAMES = """
abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp complex conj convert_element_type copy copy_p cos
cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic
lt max min mul ne neg nextafter not or population_count pow real reduce_precision rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor
"""
ELEMENTWISE = frozenset(ELEMENTWISE_NAMES.split())
WITHOUT_EFFECT = {"sharding", "out_sharding", "weak_type"}  # settings that change no number
REDUCTIONS = {"reduce_sum": "add", "reduce_max": "max", "reduce_min": "min", "reduce_and": "and", "reduce_or": "or"}
RARELY = f"{rarely.__qualname__}.<locals>."
NEUTRAL = {"add": 0, "and": 1, "or": 0}
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat2": "jaxpr"}
CALLS |= {"checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
IMPURE = {"rng_uniform", "empty"}  # two calls with the same arguments need not return the same
HARMLESS = {"DebugEffect", "OrderedDebugEffect"}
LEAF_BY_LEAF = {"unknown_gradient", "unknown_curvature"}  # a result for each leaf, see ``stand_in``


class Run(NamedTuple):
    """So many numbers in a row that are all made by one expression, each from the arguments' numbers at its place.

    ``uniform`` says that they are all equal, whatever the arguments: a sum over them depends on how many they are.
    ``moved`` is a shape and a transposition of it, if that has put them in another order.
    """

    size: int
    expression: int
    uniform: bool = False
    moved: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Along:
    """Runs that lie along an axis which is not the first: what a buffer that is cut over devices holds."""

    axis: int
    runs: tuple[Run, ...]


Value = tuple[Run, ...] | Along | int
"""Runs in the order of the flattened array, or along one axis; or one expression that holds for every number of it."""


def is_low(dtype) -> bool:
    """Whether sums in this dtype are less precise than in float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).nmant < jnp.finfo(jnp.float32).nmant


def _whole(value: Value) -> Value:
    """A value in its only form: a single run is an expression that holds throughout."""
    single = isinstance(value, tuple) and len(value) == 1 and value[0].moved is None
    return value[0].expression if single else value


def _expressions(value: Value) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [run.expression for run in (value.runs if isinstance(value, Along) else value)]


def _solid(shape: Sequence[int], axes: Sequence[int]) -> tuple:
    """A shape without its axes of length 1, and where the named axes are then."""
    kept = [axis for axis, length in enumerate(shape) if length != 1]
    return tuple(shape[axis] for axis in kept), tuple(kept.index(axis) for axis in axes if axis in kept)


def _closed(program) -> ClosedJaxpr:
    return program if hasattr(program, "consts") else ClosedJaxpr(program, ())


def _transpose_run(run: Run, shape: Sequence[int], order: Sequence[int]) -> Run | None:
    """The run of that shape, transposed; None if it was before, and this does not undo it."""
    shape, order = _solid(shape, order)
    if run.uniform or order == tuple(range(len(order))):
        return run
    if run.moved is None:
        return run._replace(moved=(shape, order))
    first, before = run.moved
    undone = tuple(first[axis] for axis in before) == shape and [before[axis] for axis in order] == sorted(order)
    return run._replace(moved=None) if undone else None


class Interpreter:
    """Reads programs. Expressions are numbers, the same for the same expression in all programs that one reads.

    Args:
      exact: tell sums of the same numbers apart if they are made in another order or from arrays of other shapes.

    Attributes:
      low: the dtypes below float32 that sums were made in or rounded to.
    """

    def __init__(self, exact: bool = False):
        self.exact = exact
        self.low: set[str] = set()
        self._numbers: dict[tuple, int] = {}
        self._sets: dict[int, tuple[str, tuple]] = {}
        self._neutral: dict[str, set[int]] = {kind: set() for kind in REDUCTIONS.values()}
        self._regrouped: set[int] = set()  # of single numbers, those that depend on the order of a sum, by rounding
        self._owner: dict[int, int] = {}  # of single numbers made elementwise from a leaf of one number: which leaf
        self._kept: list = []  # what is known by its address must not be freed
        self._depth, self._path = 0, []
        self._rounded: dict[tuple, Hashable] = {}  # by path, what is or may be rounded to less than float32
        self._roundings = 0  # of numbers that depend on the order of a sum
        self._to_the_bit: Interpreter | None = None
        self._program, self._leaves = None, {}

    def run(self, program, leaves: Mapping[int, int]) -> list[Value]:
        """The values of a closed program's results; arguments are told apart by their position.

        Args:
          program: as ``jax.make_jaxpr`` returns it.
          leaves: of which leaf an argument holds the numbers, by its position; others have one number for all leaves.
        """
        self._program, self._leaves, self._rounded = program, leaves, {}
        arguments = [self._express("argument", position) for position in range(len(program.jaxpr.invars))]
        self._owner.update({arguments[position]: leaf for position, leaf in leaves.items()})
        values = [self._of_size(var.aval, one) for var, one in zip(program.jaxpr.invars, arguments, strict=True)]
        return list(map(_whole, self._inside(program, values)))

    def _express(self, *key) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _unique(self) -> int:
        """An expression that is equal to no other."""
        return self._express("unique", len(self._numbers))

    def _of_size(self, aval, expression: int) -> Value:
        return expression if aval.size == 1 else (Run(aval.size, expression),) if aval.size else ()

    def _constant(self, value, aval) -> Value:
        if isinstance(value, jax.core.Tracer) or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
            self._kept.append(value)
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
            self._path.append(equation)
            results = self._apply(equation, [read(var) for var in equation.invars])
            self._path.pop()
            known.update(zip(equation.outvars, results, strict=True))
        return [read(var) for var in program.jaxpr.outvars]

    def _apply(self, equation, values: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        shapes = [var.aval.shape for var in equation.invars]
        out = equation.outvars[0].aval if equation.outvars else None
        result = None
        if CALLS.get(name) in params:
            return self._call(params[CALLS[name]], values)
        if name in IMPURE or any(type(effect).__name__ not in HARMLESS for effect in equation.effects):
            return [self._of_size(var.aval, self._unique()) for var in equation.outvars]
        if name == KERNEL:
            forms = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in equation.invars]
            return self._call(jax.make_jaxpr(params["kernel"].reference)(*forms), values)
        if name == "custom_vmap_call" and params["rule"].__qualname__.startswith(RARELY):
            return self._rarely(params["call"], values) or self._opaque(equation, values)
        if name == "cond":
            return self._branch(params["branches"], values) or self._opaque(equation, values)
        if name in ("optimization_barrier", "sharding_constraint", "reshard", "stop_gradient"):
            return values
        if name == "split":
            return self._split(values[0], params["sizes"], params["axis"], shapes[0]) or self._opaque(equation, values)
        if name in ELEMENTWISE:
            result = self._elementwise(name, params, self._stretched(values, shapes, out.shape), out)
        elif name in REDUCTIONS:
            result = self._reduce(REDUCTIONS[name], values[0], shapes[0], params["axes"], out.dtype)
        elif name == "dot_general" and all(len(shape) == 1 for shape in shapes) and out.shape == ():
            result = self._dot(values, params, equation.invars, out)
        elif name == "broadcast_in_dim":
            result = self._broadcast(values[0], shapes[0], out.shape, params["broadcast_dimensions"])
        elif name == "squeeze" or (name == "reshape" and params["dimensions"] is None):
            result = self._reshape(values[0], shapes[0], out.shape)
        elif name == "transpose":
            result = self._transpose(values[0], shapes[0], params["permutation"])
        elif name in ("concatenate", "stack"):
            result = self._concatenate(params.get("dimension", params.get("axis")), values, shapes)
        elif name == "slice" and out.shape == shapes[0]:
            result = values[0]
        elif name == "slice" and set(params["strides"] or (1,)) == {1}:
            cut = [axis for axis, (one, other) in enumerate(zip(out.shape, shapes[0], strict=True)) if one != other]
            if len(cut) == 1:
                start, limit = params["start_indices"][cut[0]], params["limit_indices"][cut[0]]
                sizes = (start, limit - start, shapes[0][cut[0]] - limit)
                parts = self._split(values[0], sizes, cut[0], shapes[0])
                result = parts and parts[1]
        if result is None:
            return self._opaque(equation, values)
        if out.size == 1 and isinstance(result, tuple):
            result = result[0].expression
        return [result]

    def _concatenate(self, axis, values, shapes) -> Value | None:
        runs, single = (), True
        for value, shape in zip(values, shapes, strict=True):
            along = isinstance(value, Along)
            if along and value.axis != axis:
                return None
            part = value.runs if along else self._runs(value, math.prod(shape))
            runs, single = runs + part, single and (along or len(part) <= 1)
        if len(runs) <= 1 or all(math.prod(shape[:axis]) == 1 for shape in shapes):
            return runs
        return Along(axis, runs) if single else None

    def _reshape(self, value, shape, target) -> Value | None:
        if not isinstance(value, Along):
            return value
        kept = target[: value.axis] == shape[: value.axis] and len(target) > value.axis
        whole = all(run.size * target[value.axis] % math.prod(shape) == 0 for run in value.runs)
        return value if kept and whole else None

    def _transpose(self, value, shape, order) -> Value | None:
        """Runs that each fill one place of an axis follow it; all others are one."""
        if isinstance(value, int):
            return value
        along, runs = (value.axis, value.runs) if isinstance(value, Along) else (0, value)
        if len(runs) == 1:
            moved = _transpose_run(runs[0], shape, order)
            return moved and (moved,)
        if not shape or shape[along] != len(runs) or any(run.size != runs[0].size for run in runs):
            return None
        rest = [axis - (axis > along) for axis in order if axis != along]
        runs = tuple(_transpose_run(run, shape[:along] + shape[along + 1 :], rest) for run in runs)
        if None in runs:
            return None
        axis = order.index(along)
        return runs if math.prod(shape[at] for at in order[:axis]) == 1 else Along(axis, runs)

    def _call(self, program, values):
        return self._inside(_closed(program), values)

    def _runs(self, value: Value, size: int) -> tuple[Run, ...]:
        return value if isinstance(value, tuple) else (Run(size, value, True),) if size else ()

    def _by_run(self, values: Sequence[Value], combine) -> Value | None:
        """What ``combine(expressions, single)`` makes of the values' expressions, run by run; None if ends differ."""
        if None in values:
            return None
        if all(isinstance(value, int) for value in values):
            return combine(values, True)
        axes = {getattr(value, "axis", None) for value in values if not isinstance(value, int)}
        values = [value.runs if isinstance(value, Along) else value for value in values]
        sizes = {tuple(run.size for run in value) for value in values if isinstance(value, tuple)}
        if len(sizes) != 1 or len(axes) != 1:
            return None
        whole, axis, runs = sizes.pop(), axes.pop(), []
        columns = [self._runs(value, 1) * len(whole) if isinstance(value, int) else value for value in values]
        for size, row in zip(whole, zip(*columns, strict=True), strict=True):
            uniform, orders = all(run.uniform for run in row), {run.moved for run in row if not run.uniform}
            if len(orders) > 1:  # of one run transposed and one not, the transposition belongs to the expression
                row, orders = tuple(map(self._in_place, row)), {None}
            expression = combine([run.expression for run in row], size == 1 or uniform)
            runs.append(Run(size, expression, uniform, *orders))
        return tuple(runs) if axis is None else Along(axis, tuple(runs))

    def _in_place(self, run: Run) -> Run:
        """A run of the numbers where they are now, transposed or not."""
        if run.moved is None or run.uniform:
            return run
        return Run(run.size, self._express("transposed", run.moved, run.expression))

    def _stretched(self, values, shapes, target) -> list[Value | None]:
        """Operands of an elementwise operation with axes of length 1 brought to the result's shape."""
        return [
            value if shape in ((), target) else self._broadcast(value, shape, target, range(len(shape)))
            for value, shape in zip(values, shapes, strict=True)
        ]

    def _elementwise(self, name, params, values, out) -> Value | None:
        settings = tuple((key, self._key(params[key])) for key in sorted(params) if key not in WITHOUT_EFFECT)
        rounds = name == "reduce_precision" or (name == "convert_element_type" and is_low(out.dtype))
        any_order = name in ("max", "min", "and", "or")
        any_order |= name == "add" and not is_low(out.dtype) and not self.exact

        def combine(row, single):
            if single and rounds and not self.exact and self._regrouped.intersection(row).difference(self._owner):
                self.low.add(str(out.dtype))
                self._roundings += 1
                return self._express("rounded", self._read_exactly())
            if any_order and (name != "add" or single):
                items = [item for expression in row for item in self._items(name, 1, expression)]
                expression = self._gather(name, items, out.dtype)
            else:
                expression = self._express(name, settings, *(sorted(row) if name == "add" else row))
            return self._mark(expression, row, out.dtype) if single else expression

        result = self._by_run(values, combine)
        if rounds:
            self._rounded[self._place()] = None if result is None else _whole(result)
        return result

    def _mark(self, expression: int, row: Sequence[int], dtype) -> int:
        """An expression of single numbers, with what is known of them."""
        owners = {self._owner[part] for part in row if part in self._owner}
        if len(owners) == 1 and all(what == "one" for what, *_ in self._sets.get(expression, ("", ()))[1]):
            self._owner.setdefault(expression, *owners)
        if not self._regrouped.isdisjoint(row) and jnp.issubdtype(dtype, jnp.inexact):
            self._regrouped.add(expression)
        return expression

    def _place(self) -> tuple:
        return self._depth, *map(id, self._path)

    def _read_exactly(self) -> Hashable:
        """What comes out of the operation that is being read, if sums made in another order are other sums."""
        if self._to_the_bit is None:
            self._to_the_bit = Interpreter(exact=True)
        if self._to_the_bit._program is not self._program:
            self._to_the_bit.run(self._program, self._leaves)
        found = self._to_the_bit._rounded.get(self._place())
        return self._unique() if found is None else found

    def _dot(self, values, params, inputs, out) -> Value | None:
        """The product of two vectors, if its sum is over exact products or in the precision of its arguments."""
        if is_low(out.dtype):
            self.low.add(str(out.dtype))
        if self.exact or is_low(out.dtype) or any(var.aval.dtype != out.dtype for var in inputs):
            return None
        products = self._elementwise("mul", {"precision": params["precision"]}, values, inputs[0].aval)
        return None if products is None else self._reduce("add", products, inputs[0].aval.shape, (0,), out.dtype)

    def _items(self, kind: str, size: int, expression: int, uniform: bool = False) -> tuple:
        """What a run adds to a sum, or the like, how often: itself, or what a number that is such a sum goes over."""
        if size == 0 or expression in self._neutral[kind]:
            return ()
        if size != 1 and not uniform:
            return (("all", 1, expression),)
        if self._sets.get(expression, ("",))[0] == kind:
            return tuple((what, size * times, inner) for what, times, inner in self._sets[expression][1])
        return (("one", size, expression),)

    def _gather(self, kind: str, items: Sequence[tuple], dtype) -> int:
        counts = Counter()
        for what, times, expression in items:
            counts[what, expression] += times
        # to a maximum or the like it is the same how often a number occurs
        items = tuple(sorted((what, n if kind == "add" else 1, expression) for (what, expression), n in counts.items()))
        if len(items) == 1 and items[0][:2] == ("one", 1):
            return items[0][2]
        expression = self._express("gather", kind, str(dtype), items)
        self._sets[expression] = (kind, items)
        if kind == "add" and jnp.issubdtype(dtype, jnp.inexact) and self._is_regrouped(items):
            self._regrouped.add(expression)
        return expression

    def _is_regrouped(self, items: Sequence[tuple]) -> bool:
        """Whether a sum goes over several leaves, or over a number that does."""
        several = len(items) > 1 and any(what == "all" for what, *_ in items)
        return several or any(
            what == "one" and (times > 2 or expression in self._regrouped) for what, times, expression in items
        )

    def _each(self, value: tuple[Run, ...], shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape of each run if the array is one run, or a stack of equal ones along its first axis."""
        if len(value) == 1:
            return tuple(shape)
        stacked = shape and shape[0] == len(value) and all(run.size == math.prod(shape[1:]) for run in value)
        return tuple(shape[1:]) if stacked else None

    def _reduce(self, kind, value, shape, axes, dtype) -> Value | None:
        if kind == "add" and is_low(dtype):
            self.low.add(str(dtype))
            return None
        if kind == "add" and self.exact and jnp.issubdtype(dtype, jnp.inexact):
            return None
        left = math.prod(length for axis, length in enumerate(shape) if axis not in axes)
        if isinstance(value, int):
            size = math.prod(shape) // max(left, 1)
            return self._gather(kind, self._items(kind, size, value, uniform=True), dtype)
        if left == 1:
            runs = value.runs if isinstance(value, Along) else value
            total = self._gather(kind, [item for run in runs for item in self._items(kind, *run[:3])], dtype)
            if kind == "add" and len(runs) > 1:  # even if no run has more than one number
                self._regrouped.add(total)
                self._owner.pop(total, None)
            return total
        if isinstance(value, Along):
            return None
        each, lead = self._each(value, shape), int(len(value) > 1)
        if each is None or (lead and 0 in axes):
            return None
        axes = [axis - lead for axis in axes]
        kept = math.prod(length for axis, length in enumerate(each) if axis not in axes)

        def reduce_run(run):
            if kept == 1:
                return Run(1, self._gather(kind, self._items(kind, *run[:3]), dtype))
            return Run(kept, self._express("reduce", kind, *_solid(each, axes), run.expression, run.moved))

        return tuple(map(reduce_run, value))

    def _broadcast(self, value, shape, target, dimensions) -> Value | None:
        if isinstance(value, int) or math.prod(shape) == math.prod(target):
            return self._reshape(value, shape, target)
        if isinstance(value, Along):
            return None
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
            else Run(size, self._express("broadcast", how, run.expression, run.moved), run.uniform)
            for run in value
        )

    def _split(self, value, sizes, axis, shape) -> list[Value] | None:
        if isinstance(value, int):
            return [value] * len(sizes)
        if isinstance(value, Along) and value.axis == axis:
            parts = self._split(value.runs, sizes, 0, (shape[axis], math.prod(shape) // max(shape[axis], 1)))
            multiple = lambda part: isinstance(part, tuple) and len(part) > 1  # noqa: E731
            return parts and [Along(axis, part) if multiple(part) else part for part in parts]
        if isinstance(value, Along) or math.prod(shape[:axis]) != 1:
            return None
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

        def combine(row, single):
            expression = self._express("cond", index, *row)
            return self._mark(expression, row, jnp.float32) if single else expression

        for outcomes in zip(*(self._inside(branch, operands) for branch in branches), strict=True):
            result = self._by_run(outcomes, combine)
            if result is None:
                return None
            results.append(result)
        return results

    def _rarely(self, program, values) -> list[Value] | None:
        """What ``rarely`` chooses from is the same on both sides, so the side that holds for all arguments is read."""
        choice = program.jaxpr.eqns[-1]
        if choice.primitive.name != "cond" or list(choice.invars[1:]) != list(program.jaxpr.invars[1:]):
            return None
        return self._inside(choice.params["branches"][1], values[1:])

    def _opaque(self, equation, values) -> list[Value]:
        """An operation that is not understood, on arrays as they are: equal only to itself."""
        shapes, before = tuple((var.aval.shape, str(var.aval.dtype)) for var in equation.invars), self._roundings
        settings = tuple((key, self._key(equation.params[key])) for key in sorted(equation.params))
        key = (equation.primitive.name, settings, shapes, tuple(map(_whole, values)))
        rounds = self._roundings > before or any(is_low(var.aval.dtype) for var in equation.outvars)
        regrouped = any(not self._regrouped.isdisjoint(_expressions(value)) for value in values)
        if regrouped and rounds and not self.exact:
            key = self._read_exactly()
        results = [self._express("opaque", position, key) for position in range(len(equation.outvars))]
        self._rounded[self._place()] = tuple(results)
        if regrouped:
            self._regrouped.update(results)
        if equation.primitive.name in LEAF_BY_LEAF:
            self._owner.update({result: leaf for leaf, result in enumerate(results)})
        return [self._of_size(var.aval, result) for var, result in zip(equation.outvars, results, strict=True)]

    def _key(self, setting: Any) -> Hashable:
        """What is equal for equal settings of an operation: programs and arrays by meaning, others as Python has it."""
        if isinstance(setting, ClosedJaxpr | Jaxpr):
            return self._body(_closed(setting))
        if isinstance(setting, tuple | list):
            return type(setting), tuple(map(self._key, setting))
        if isinstance(setting, dict):
            return dict, tuple((key, self._key(part)) for key, part in setting.items())
        if isinstance(setting, np.ndarray) and setting.dtype != object:
            return "array", str(setting.dtype), setting.shape, setting.tobytes()
        try:
            hash(setting)
        except TypeError:
            self._kept.append(setting)
            return "object", id(setting)
        return type(setting), setting

    def _body(self, program) -> Hashable:
        """A program in a program, such as a loop's, as what it makes of any arguments."""
        forms = tuple(
            tuple((var.aval.shape, str(var.aval.dtype)) for var in some)
            for some in (program.jaxpr.invars, program.jaxpr.outvars)
        )
        self._depth += 1
        bound = [self._express("bound", self._depth, position, form) for position, form in enumerate(forms[0])]
        self._regrouped.update(bound)  # as the last turn of a loop may have left them
        arguments = [self._of_size(var.aval, one) for var, one in zip(program.jaxpr.invars, bound, strict=True)]
        values = self._inside(program, arguments)
        self._depth -= 1
        return forms, tuple(map(_whole, values))


__all__ = ["Interpreter", "Run"]
