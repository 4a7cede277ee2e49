"""The optimizer's part of a step without copies of what it overwrites.

A step that donates its state writes the new state over the old. XLA's compiler for CPUs decides by itself what runs
first, and where it overwrites a moment before the parameters have used the old one, it keeps a copy: of Lion's step
that is two thirds. The cure is to let the new moment wait for the parameters. Its old value then goes through
``_after``, which changes no number, but cannot be computed before they are.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Var, jaxpr_as_fun
from optax import apply_updates, with_extra_args_support

from nnlearn.native import is_native
from nnlearn.native.kernel import is_for_one_cpu
from nnlearn.programs.one_pass import in_one_pass
from nnlearn.programs.read import ELEMENTWISE, called_program, is_large, makers, variables
from nnlearn.types import GradientTransformation, OptState, Params, Updates

MANY = 512  # arrays, from which reading the program costs more than it saves
SHAPING = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims"}


def apply_gradients(
    tx: GradientTransformation, params: Params, grads: Updates, opt_state: OptState, **extra: Any
) -> tuple[Params, OptState]:
    """``tx.update`` and ``apply_updates`` in one, as the steps of ``make_step`` do it.

    ``make_step`` calls it with ``skip_whole(tx)``; so should a step of your own where ``tx`` skips updates.

    Compiled for one CPU, with parameters and state donated, what is elementwise becomes one pass over each large array,
    by a kernel in C (see ``nnlearn.native_status``). Where there is no C compiler, it makes fewer copies of what is
    still needed when its place is overwritten, and none for Lion. The numbers are the same, but for the rounding of
    products that XLA adds up without rounding them first.

    Args:
      tx: an optimizer, nnlearn's or optax's.
      params: the parameters, as a tree or ``Packed``.
      grads: their gradients, alike.
      opt_state: the optimizer's state.
      **extra: what else ``tx.update`` is handed, such as ``value``.

    Returns:
      ``(params, opt_state)``, the new ones.

    >>> import nnlearn
    >>> tx = nnlearn.sgd(0.5)
    >>> params, opt_state = apply_gradients(tx, jnp.ones(2), jnp.ones(2), tx.init(jnp.ones(2)))
    >>> params
    Array([0.5, 0.5], dtype=float32)
    """
    tx = with_extra_args_support(tx)

    def update(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        with jax.numpy_dtype_promotion("standard"):  # an update may be wider than its parameter
            return apply_updates(params, updates), opt_state

    if _pays(params):
        careful = in_place(update)
        update = in_one_pass(update, careful) if is_native() else careful
    return update(grads, opt_state, params)


def _pays(params: Params) -> bool:
    """In a program for one CPU: elsewhere XLA makes one kernel of all results, and waiting would move a number between
    devices."""
    leaves = jax.tree.leaves(params)
    large = len(leaves) <= MANY and any(is_large(jax.typeof(leaf)) for leaf in leaves)
    return large and any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) and is_for_one_cpu(*leaves)


def in_place(update: Callable[[Updates, OptState, Params], tuple[Params, OptState]]) -> Callable:
    """``update(grads, opt_state, params) -> (params, opt_state)``, its results waiting for whom they would disturb."""

    def waiting(grads, opt_state, params):
        program, shapes = jax.make_jaxpr(update, return_shape=True)(grads, opt_state, params)
        arguments = jax.tree.leaves((grads, opt_state, params))
        first, last = len(jax.tree.leaves(grads)), len(arguments) - len(jax.tree.leaves(params))
        places = [*range(last, len(arguments)), *range(first, last)]  # of what is carried, in the order of the results
        results = jaxpr_as_fun(program)(*arguments)
        waits = _waits(program.jaxpr, [program.jaxpr.invars[place] for place in places])
        if waits and not program.effects:  # which would take place twice
            for at, readers in waits.items():
                arguments[places[at]] = _after([results[reader] for reader in readers], arguments[places[at]])
            late = jaxpr_as_fun(program)(*arguments)  # XLA drops what it has already, and what is not used
            results = [late[at] if at in waits else result for at, result in enumerate(results)]
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return waiting


def _waits(program: Jaxpr, carried: Sequence[Var]) -> dict[int, list[int]]:
    """By the number of a result that has to wait: the results that need the value which it overwrites."""
    pairs = {
        at: (old, new)
        for at, (old, new) in enumerate(zip(carried, program.outvars, strict=False))
        if isinstance(new, Var) and new is not old and is_large(old.aval) and is_large(new.aval)
    }
    number = {new: at for at, (_, new) in pairs.items()}
    # Of every variable, the carried values that it is computed from. A result stands for itself: it is written out.
    sources = {old: frozenset([old]) for old, _ in pairs.values()}
    made = dict.fromkeys(program.invars, frozenset())
    for equation in program.eqns:
        found = frozenset().union(*(sources.get(var, ()) for var in variables(equation.invars)))
        for var in equation.outvars:
            made[var], sources[var] = found, frozenset([var]) if var in number else found
    used = frozenset().union(*(made[new] for new in number))
    maker = makers(program)
    readers_of: dict[Var, list[int]] = {old: [] for old, _ in pairs.values()}
    for result, at in number.items():
        for var in made[result]:
            if var in readers_of:
                readers_of[var].append(at)
    waits = {}
    for at, (old, new) in pairs.items():
        readers = [reader for reader in readers_of[old] if reader != at]
        # what others are made from cannot wait for them, and only what is cheap may be computed twice
        if readers and new not in used and _is_elementwise(_between(old, new, maker, sources)):
            waits[at] = readers
    return {at: readers for at, readers in waits.items() if not waits.keys() & set(readers)}


def _between(old: Var, new: Var, maker: dict[Var, Any], sources: dict[Var, frozenset[Var]]) -> list[Any]:
    """The equations that lead from an old value to a new one."""
    found, ahead = {}, [new]
    while ahead:
        equation = maker.get(ahead.pop())
        if equation is not None and id(equation) not in found:
            found[id(equation)] = equation
            ahead += [var for var in variables(equation.invars) if old in sources.get(var, ())]
    return list(found.values())


def _after(before: Sequence[jax.Array], value: jax.Array) -> jax.Array:
    """The value, which cannot be computed before those others are.

    No number differs from itself and equals itself, but XLA does not know that.
    """
    firsts = [jax.lax.slice(array, (0,) * array.ndim, (1,) * array.ndim).reshape(()) for array in before]
    never = functools.reduce(operator.or_, [(first != first) & (first == first) for first in firsts])
    return jax.lax.select_n(never, value, jnp.zeros_like(value))


def _is_elementwise(equations: Sequence[JaxprEqn]) -> bool:
    for equation in equations:
        inner, name = called_program(equation), equation.primitive.name
        if inner is not None and not _is_elementwise(inner.jaxpr.eqns):
            return False
        if inner is None and name not in ELEMENTWISE and name not in SHAPING:
            return False
    return True


__all__ = ["apply_gradients", "in_place"]
