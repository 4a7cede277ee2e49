"""The part of a program that leads to some of its results, and none of the effects beside it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

JIT = ("jit", "pjit")  # the primitive of a compiled call, by JAX's version


def without_effects(function: Callable) -> Callable:
    """The same function without effects, such as ``jax.debug.print``, for a second evaluation.

    A callback whose result the function needs is called all the same.

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
    """Those results of a program that are wanted, None for the others; only what leads to them is computed.

    Args:
      program: what ``jax.make_jaxpr`` returns.
      arguments: its arguments; those that lead to nothing wanted may be None.
      wanted: for each result, whether it is wanted.

    >>> program = jax.make_jaxpr(lambda x, y: (x + 1.0, 2.0 * y))(1.0, 1.0)
    >>> results_of(program, [None, 3.0], [False, True])
    [None, Array(6., dtype=float32, weak_type=True)]
    """
    jaxpr = program.jaxpr
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *arguments], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else known.get(atom)

    for equation, used in _leading(jaxpr, wanted)[0]:
        operands = [read(atom) for atom in equation.invars]
        if equation.primitive.name in JIT:
            results = results_of(equation.params["jaxpr"], operands, used)
        else:
            with equation.ctx.manager:
                results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
            results = results if equation.primitive.multiple_results else [results]
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) if wants else None for atom, wants in zip(jaxpr.outvars, wanted, strict=True)]


def _leading(jaxpr: Jaxpr, wanted: list[bool]) -> tuple[list[tuple[Any, list[bool]]], list[bool]]:
    """The equations that lead to the wanted results, which of their results do, and which arguments are read."""
    needed = {var for var, wants in zip(jaxpr.outvars, wanted, strict=True) if wants and isinstance(var, Var)}
    equations = []
    for equation in reversed(jaxpr.eqns):
        used = [var in needed for var in equation.outvars]
        if any(used):
            equations.append((equation, used))
            reads = [True] * len(equation.invars)
            if equation.primitive.name in JIT:
                reads = _leading(equation.params["jaxpr"].jaxpr, used)[1]
            pairs = zip(equation.invars, reads, strict=True)
            needed.update(var for var, read in pairs if read and isinstance(var, Var))
    return equations[::-1], [var in needed for var in jaxpr.invars]


__all__ = ["JIT", "results_of", "without_effects"]
