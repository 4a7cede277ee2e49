"""The interpreter: reads a program equation by equation, by the rules, and calls what it does not understand opaque."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from nnlearn.programs.read import called_program, closed, interpret
from nnlearn.programs.symbolic.expressions import Expressions
from nnlearn.programs.symbolic.rules import RULES
from nnlearn.programs.symbolic.values import Expression, Value, canonical, expressions_of, is_low, of_size

WITHOUT_EFFECT = {"sharding", "out_sharding", "weak_type"}  # settings that change no element
IMPURE = {"rng_uniform", "empty"}  # two calls with the same arguments may return different results
HARMLESS = {"DebugEffect", "OrderedDebugEffect"}
LEAF_BY_LEAF = {"unknown_gradient", "unknown_curvature"}  # a result for each leaf, see ``stand_in``


class Interpreter:
    """Reads programs as expressions, the same object for the same expression in all programs that one instance reads.

    Args:
      exact: distinguish sums of the same elements in another order or from arrays of other shapes.

    Attributes:
      expressions: the table.
      low: the dtypes below float32 in which sums were made or rounded.
    """

    def __init__(self, exact: bool = False):
        self.exact = exact
        self.low: set[str] = set()
        self.expressions = Expressions()
        self._program: Any = None
        self._leaves: Mapping[int, int] = {}
        self._path: list[JaxprEqn] = []  # the equations that are being read, the outermost first
        self._depth = 0  # of programs, such as a loop's body, that are read for all arguments
        self._roundings = 0  # of elements that depend on the order of a sum
        self._rounded: dict[tuple, Hashable] = {}  # by place, results that are or may be rounded below float32
        self._exact_reading: Interpreter | None = None

    def run(self, program: ClosedJaxpr, leaves: Mapping[int, int]) -> list[Value]:
        """The values of a program's results; arguments are distinguished by their position.

        Args:
          program: as ``jax.make_jaxpr`` returns it.
          leaves: by the position of an argument, the leaf whose elements it holds. An argument without an entry does
            not belong to a leaf.
        """
        self._program, self._leaves, self._rounded = program, leaves, {}
        arguments = [self.expressions.make("argument", position) for position in range(len(program.jaxpr.invars))]
        for position, leaf in leaves.items():
            arguments[position].owner = leaf
        return [canonical(value) for value in self.inside(program, _arguments(program, arguments))]

    def inside(self, program: ClosedJaxpr, arguments: Sequence[Value]) -> list[Value]:
        """The results of a program, for these arguments."""
        return interpret(program, arguments, self._apply, self.expressions.constant)

    def settings(self, params: Mapping[str, Any]) -> Hashable:
        """Equal for parameters of an equation that give equal results."""
        return tuple((name, self._key(params[name])) for name in sorted(params) if name not in WITHOUT_EFFECT)

    def rounded(self, dtype: Any) -> Expression:
        """The element that the current equation rounds to ``dtype``, below float32, after a sum of several leaves."""
        self.low.add(str(dtype))
        self._roundings += 1
        return self.expressions.make("rounded", self._read_exactly())

    def record(self, result: Value | None) -> None:
        """Remember the result of the current equation, which rounds below float32."""
        self._rounded[self._place()] = None if result is None else canonical(result)

    def _apply(self, equation: JaxprEqn, values: list[Value]) -> list[Value]:
        self._path.append(equation)
        results = self._results(equation, values)
        self._path.pop()
        return results

    def _results(self, equation: JaxprEqn, values: list[Value]) -> list[Value]:
        inner, name = called_program(equation, custom_batching=True), equation.primitive.name
        if inner is not None:
            return self.inside(inner, values)
        types: list[Any] = [var.aval for var in equation.outvars]
        if name in IMPURE or any(type(effect).__name__ not in HARMLESS for effect in equation.effects):
            return [of_size(aval.size, self.expressions.unique()) for aval in types]
        results = RULES[name](self, equation, values) if name in RULES else None
        if results is None:
            return self._opaque(equation, values)
        if not isinstance(results, list):
            results = [results]
        return [
            result[0].expression if aval.size == 1 and isinstance(result, tuple) else result
            for result, aval in zip(results, types, strict=True)
        ]

    def _place(self) -> tuple:
        return self._depth, *map(id, self._path)

    def _read_exactly(self) -> Hashable:
        """The result of the current equation, if sums in another order count as other sums."""
        if self._exact_reading is None:
            self._exact_reading = Interpreter(exact=True)
        if self._exact_reading._program is not self._program:
            self._exact_reading.run(self._program, self._leaves)
        found = self._exact_reading._rounded.get(self._place())
        return self.expressions.unique() if found is None else found

    def _opaque(self, equation: JaxprEqn, values: list[Value]) -> list[Value]:
        """The results of an operation that is not understood, on whole arrays: equal only to themselves."""
        before = self._roundings
        inputs: list[Any] = [var.aval for var in equation.invars]
        outputs: list[Any] = [var.aval for var in equation.outvars]
        settings = tuple((name, self._key(equation.params[name])) for name in sorted(equation.params))
        forms = tuple((aval.shape, str(aval.dtype)) for aval in inputs)
        key: Hashable = (equation.primitive.name, settings, forms, tuple(map(canonical, values)))
        rounds = self._roundings > before or any(is_low(aval.dtype) for aval in outputs)
        regrouped = any(expression.regrouped for value in values for expression in expressions_of(value))
        if regrouped and rounds and not self.exact:
            key = self._read_exactly()
        results = [self.expressions.make("opaque", position, key) for position in range(len(outputs))]
        self._rounded[self._place()] = tuple(results)
        for position, result in enumerate(results):
            result.regrouped |= regrouped
            if equation.primitive.name in LEAF_BY_LEAF:
                result.owner = position
        return [of_size(aval.size, result) for aval, result in zip(outputs, results, strict=True)]

    def _key(self, setting: Any) -> Hashable:
        """Equal for settings that mean the same: programs by what they compute, arrays by value, others by equality."""
        if isinstance(setting, ClosedJaxpr | Jaxpr):
            return self._body(closed(setting))
        if isinstance(setting, tuple | list):
            return type(setting), tuple(map(self._key, setting))
        if isinstance(setting, dict):
            return dict, tuple((key, self._key(part)) for key, part in setting.items())
        if isinstance(setting, np.ndarray) and setting.dtype != object:
            return "array", str(setting.dtype), setting.shape, setting.tobytes()
        try:
            hash(setting)
        except TypeError:
            return "object", self.expressions.same_object(setting)
        return type(setting), setting

    def _body(self, program: ClosedJaxpr) -> Hashable:
        """A program inside a program, such as a loop's body, as what it computes from any arguments."""
        forms = tuple(
            tuple((var.aval.shape, str(var.aval.dtype)) for var in some)
            for some in (program.jaxpr.invars, program.jaxpr.outvars)
        )
        self._depth += 1
        bound = [self.expressions.make("bound", self._depth, position, form) for position, form in enumerate(forms[0])]
        for expression in bound:
            expression.regrouped = True  # the previous iteration of a loop may have made it so
        values = self.inside(program, _arguments(program, bound))
        self._depth -= 1
        return forms, tuple(map(canonical, values))


def _arguments(program: ClosedJaxpr, expressions: Sequence[Expression]) -> list[Value]:
    types: list[Any] = [var.aval for var in program.jaxpr.invars]
    return [of_size(aval.size, expression) for aval, expression in zip(types, expressions, strict=True)]


__all__ = ["Interpreter"]
