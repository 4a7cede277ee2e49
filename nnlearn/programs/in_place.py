"""The optimizer's part of a step, without copies of the values that it overwrites.

A step that donates its state writes the new state over the old one. XLA's compiler for CPUs chooses the order of
operations. If it overwrites a moment before the parameters have read the old value, it copies that value first, which
is two thirds of Lion's step. ``in_place`` delays in-place writes until every reader of the old
value has run. The old value passes through ``_after``, which returns it unchanged, but only after those readers.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Jaxpr, JaxprEqn, Var, jaxpr_as_fun
from optax import apply_updates, with_extra_args_support

from nnlearn.native import is_native
from nnlearn.native.kernel import is_for_one_cpu
from nnlearn.programs.one_pass import Update, in_one_pass
from nnlearn.programs.read import ELEMENTWISE, called_program, is_large, makers, variables
from nnlearn.types import GradientTransformation, OptState, Params, Updates

MANY = 512  # number of arrays above which reading the program costs more than it saves
SHAPING = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims"}


def apply_gradients(
    tx: GradientTransformation, params: Params, grads: Updates, opt_state: OptState, **extra: Any
) -> tuple[Params, OptState]:
    """Apply ``tx.update`` and ``apply_updates``, as the steps of ``make_step`` do.

    ``make_step`` calls it with ``skip_whole(tx)``. A custom step should do the same if ``tx`` skips updates.

    In a program for one CPU, with parameters and state donated, the elementwise part becomes one pass over each large
    array, in a C kernel (see ``nnlearn.native_status``). Without a C compiler, XLA's program copies fewer of the values
    that it overwrites, and none for Lion. The results are equal up to rounding: XLA may add a product without rounding
    it first.

    Args:
      tx: an optimizer from nnlearn or optax.
      params: the parameters, as a tree or ``Packed``.
      grads: the gradients, in the same form.
      opt_state: the optimizer's state.
      **extra: other arguments of ``tx.update``, such as ``value``.

    Returns:
      The new ``(params, opt_state)``.

    >>> import nnlearn
    >>> tx = nnlearn.sgd(0.5)
    >>> params, opt_state = apply_gradients(tx, jnp.ones(2), jnp.ones(2), tx.init(jnp.ones(2)))
    >>> params
    Array([0.5, 0.5], dtype=float32)
    """
    tx = with_extra_args_support(tx)

    def update(grads: Updates, opt_state: OptState, params: Params, /) -> tuple[Params, OptState]:
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        with jax.numpy_dtype_promotion("standard"):  # an update may be wider than its parameter
            return apply_updates(params, updates), opt_state

    if not _pays(params):
        return update(grads, opt_state, params)
    ordered = in_place(update)
    fast = in_one_pass(update, ordered) if is_native() else ordered
    return fast(grads, opt_state, params)


def _pays(params: Params) -> bool:
    """Whether this is a program for one CPU with large arrays.

    On other devices XLA computes all results in one kernel. On several devices the delay would move a scalar between
    them.
    """
    leaves = jax.tree.leaves(params)
    large = len(leaves) <= MANY and any(is_large(jax.typeof(leaf)) for leaf in leaves)
    return large and any(isinstance(leaf, Tracer) for leaf in leaves) and is_for_one_cpu(*leaves)


def in_place(update: Update) -> Update:
    """Wrap ``update(grads, opt_state, params) -> (params, opt_state)`` so that it overwrites old values last."""

    def ordered(grads, opt_state, params):
        program, shapes = jax.make_jaxpr(update, return_shape=True)(grads, opt_state, params)
        arguments = jax.tree.leaves((grads, opt_state, params))
        first, last = len(jax.tree.leaves(grads)), len(arguments) - len(jax.tree.leaves(params))
        places = [*range(last, len(arguments)), *range(first, last)]  # of params and opt_state, as they are returned
        results = jaxpr_as_fun(program)(*arguments)
        waits = _waits(program.jaxpr, [program.jaxpr.invars[place] for place in places])
        if waits and not program.effects:  # effects would happen twice
            for at, readers in waits.items():
                arguments[places[at]] = _after([results[reader] for reader in readers], arguments[places[at]])
            late = jaxpr_as_fun(program)(*arguments)  # XLA removes duplicate and unused operations
            results = [late[at] if at in waits else result for at, result in enumerate(results)]
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return ordered


def _waits(program: Jaxpr, carried: Sequence[Var]) -> dict[int, list[int]]:
    """Find the results that have to wait.

    Returns:
      From the index of such a result to the indices of the results that read the value it overwrites.
    """
    pairs = {
        at: (old, new)
        for at, (old, new) in enumerate(zip(carried, program.outvars, strict=False))
        if isinstance(new, Var) and new is not old and is_large(old.aval) and is_large(new.aval)
    }
    index = {new: at for at, (_, new) in pairs.items()}
    # For every variable, the carried values that it is computed from. A result is its own source: it is written out.
    sources = {old: frozenset([old]) for old, _ in pairs.values()}
    made = dict.fromkeys(program.invars, frozenset())
    for equation in program.eqns:
        found = frozenset().union(*(sources.get(var, ()) for var in variables(equation.invars)))
        for var in equation.outvars:
            made[var], sources[var] = found, frozenset([var]) if var in index else found
    used = frozenset().union(*(made[new] for new in index))
    maker = makers(program)
    readers_of: dict[Var, list[int]] = {old: [] for old, _ in pairs.values()}
    for result, at in index.items():
        for var in made[result]:
            if var in readers_of:
                readers_of[var].append(at)
    waits = {}
    for at, (old, new) in pairs.items():
        readers = [reader for reader in readers_of[old] if reader != at]
        # a result that others read cannot wait for them, and only a cheap one may be computed twice
        if readers and new not in used and _is_elementwise(_between(old, new, maker, sources)):
            waits[at] = readers
    return {at: readers for at, readers in waits.items() if not waits.keys() & set(readers)}


def _between(old: Var, new: Var, maker: dict[Var, Any], sources: dict[Var, frozenset[Var]]) -> list[Any]:
    """Return the equations that lead from an old value to a new one."""
    found, ahead = {}, [new]
    while ahead:
        equation = maker.get(ahead.pop())
        if equation is not None and id(equation) not in found:
            found[id(equation)] = equation
            ahead += [var for var in variables(equation.invars) if old in sources.get(var, ())]
    return list(found.values())


def _after(before: Sequence[jax.Array], value: jax.Array) -> jax.Array:
    """Return ``value`` unchanged, but only after the arrays ``before`` have been computed.

    No element both differs from itself and equals itself, but XLA does not know that.
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
