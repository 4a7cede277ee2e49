"""Evaluates the part of a program that leads to some of its results, without other effects."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from nnlearn.programs.read import JIT, bind, variables


def without_effects(function: Callable) -> Callable:
    """Remove effects such as ``jax.debug.print`` from a function, for a second evaluation.

    A callback whose result the function needs is still called.

    >>> def loud(x):
    ...     jax.debug.print("never seen")
    ...     return x + 1
    >>> int(without_effects(loud)(1))
    2
    """

    def quiet(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        arguments, structure = jax.tree.leaves(args), jax.tree.structure(shapes)
        if program.effects:
            return structure.unflatten(results_of(program, arguments, [True] * len(program.jaxpr.outvars)))
        return structure.unflatten(jaxpr_as_fun(program)(*arguments))

    return quiet


def results_of(program: ClosedJaxpr, arguments: list, wanted: list[bool]) -> list:
    """Return the wanted results of a program, and None for the others; compute only what leads to them.

    Args:
      program: the output of ``jax.make_jaxpr``.
      arguments: its arguments. An argument that no wanted result depends on may be None.
      wanted: for each result, whether it is wanted.

    >>> program = jax.make_jaxpr(lambda x, y: (x + 1.0, 2.0 * y))(1.0, 1.0)
    >>> results_of(program, [None, 3.0], [False, True])
    [None, Array(6., dtype=float32, weak_type=True)]
    """
    outputs = program.jaxpr.outvars
    known = values_of(program, arguments, [var for var, wants in zip(outputs, wanted, strict=True) if wants])
    return [read(known, atom) if wants else None for atom, wants in zip(outputs, wanted, strict=True)]


def values_of(program: ClosedJaxpr, arguments: Sequence[Any], wanted: Iterable[Any]) -> dict[Var, Any]:
    """Return the values of some variables of a program, and of every variable that leads to them.

    Args:
      program, arguments: as for ``results_of``.
      wanted: the variables; literal constants among them are skipped.
    """
    jaxpr = program.jaxpr
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *arguments], strict=True))
    for equation, used in _leading(jaxpr, wanted)[0]:
        operands = [read(known, atom) for atom in equation.invars]
        nested = equation.primitive.name in JIT
        results = results_of(equation.params["jaxpr"], operands, used) if nested else bind(equation, operands)
        known |= dict(zip(equation.outvars, results, strict=True))
    return known


def read(known: Mapping[Var, Any], atom: Any) -> Any:
    """Return the value of an operand; None for an unknown variable."""
    return atom.val if isinstance(atom, Literal) else known.get(atom)


def _leading(jaxpr: Jaxpr, wanted: Iterable[Any]) -> tuple[list[tuple[JaxprEqn, list[bool]]], list[bool]]:
    """Find the equations that lead to the wanted variables, which of their results do, and which arguments are read."""
    needed = set(variables(wanted))
    equations = []
    for equation in reversed(jaxpr.eqns):
        used = [var in needed for var in equation.outvars]
        if any(used):
            equations.append((equation, used))
            reads = [True] * len(equation.invars)
            if equation.primitive.name in JIT:
                inner = equation.params["jaxpr"].jaxpr
                reads = _leading(inner, [var for var, is_used in zip(inner.outvars, used, strict=True) if is_used])[1]
            needed.update(variables(atom for atom, is_read in zip(equation.invars, reads, strict=True) if is_read))
    return equations[::-1], [var in needed for var in jaxpr.invars]


__all__ = ["read", "results_of", "values_of", "without_effects"]
