"""The table of expressions: one object for equal expressions, and what is known of single elements."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nnlearn.programs.symbolic.values import Expression, Term, Terms, Value, of_size

NEUTRAL = {"add": 0, "and": 1, "or": 0}


class Expressions:
    """Makes expressions: the same object for the same operation on the same operands."""

    def __init__(self):
        self._table: dict[tuple, Expression] = {}
        self._kept: list = []

    def make(self, *key: Hashable) -> Expression:
        """The expression with this key: the name of an operation, its settings and its operands."""
        found = self._table.get(key)
        if found is None:
            found = self._table[key] = Expression(len(self._table), key)
        return found

    def unique(self) -> Expression:
        """An expression that is equal to no other."""
        return self.make("unique", len(self._table))

    def same_object(self, value: Any) -> int:
        """The identity of an object, which is kept alive so that no other object gets the same one."""
        self._kept.append(value)
        return id(value)

    def constant(self, value: Any, aval: Any) -> Value:
        """A constant of a program: by value, or by identity if the value cannot be read."""
        if isinstance(value, Tracer) or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
            return of_size(aval.size, self.make("constant", self.same_object(value)))
        array = np.asarray(value)
        if array.size == 1:
            seen = len(self._table)
            number = self.make("number", str(array.dtype), array.tobytes())
            if len(self._table) > seen:
                kinds = [kind for kind in NEUTRAL if kind != "and" or array.dtype == bool]
                number.neutral = frozenset(kind for kind in kinds if array == NEUTRAL[kind])
            return number
        return of_size(aval.size, self.make("array", str(array.dtype), array.tobytes()))

    def terms(self, kind: str, size: int, expression: Expression, uniform: bool = False) -> tuple[Term, ...]:
        """What a segment adds to a reduction: itself, or the terms of an element that is such a reduction."""
        if size == 0 or kind in expression.neutral:
            return ()
        if size != 1 and not uniform:
            return (Term(True, 1, expression),)
        inner = expression.terms
        if inner is not None and inner.kind == kind:
            return tuple(term._replace(times=size * term.times) for term in inner.terms)
        return (Term(False, size, expression),)

    def reduction(self, kind: str, terms: Iterable[Term], dtype) -> Expression:
        """The reduction of terms, whatever their order and grouping."""
        counts = Counter()
        for whole, times, expression in terms:
            counts[whole, expression] += times
        # a maximum does not depend on how often an element occurs
        merged = [Term(whole, n if kind == "add" else 1, expression) for (whole, expression), n in counts.items()]
        merged = tuple(sorted(merged, key=lambda term: (term.whole, term.times, term.expression.number)))
        if len(merged) == 1 and not merged[0].whole and merged[0].times == 1:
            return merged[0].expression
        expression = self.make("reduction", kind, str(dtype), merged)
        expression.terms = Terms(kind, merged)
        if kind == "add" and jnp.issubdtype(dtype, jnp.inexact) and _depends_on_order(merged):
            expression.regrouped = True
        return expression

    def mark(self, expression: Expression, operands: Sequence[Expression], dtype) -> Expression:
        """Record what is known of an expression of single elements, given its operands."""
        owners = {operand.owner for operand in operands if operand.owner is not None}
        inner = expression.terms.terms if expression.terms is not None else ()
        if len(owners) == 1 and expression.owner is None and not any(term.whole for term in inner):
            expression.owner = owners.pop()
        if any(operand.regrouped for operand in operands) and jnp.issubdtype(dtype, jnp.inexact):
            expression.regrouped = True
        return expression


def _depends_on_order(terms: Sequence[Term]) -> bool:
    """Whether a sum goes over several leaves, or over an element that does."""
    several = len(terms) > 1 and any(term.whole for term in terms)
    return several or any(not term.whole and (term.times > 2 or term.expression.regrouped) for term in terms)
