"""Loops of a compiled run, cut into stretches so that a derivative of the run needs little memory.

A derivative stores the state before each stretch of steps and recomputes the values it needs, one stretch at a time.
With stretches near the square root of the number of steps, it stores about that many states for either purpose.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from nnlearn.programs.read import JIT, variables
from nnlearn.programs.slices import results_of
from nnlearn.sharding.axes import filled
from nnlearn.types import PyTree

KEPT = {"dot_general", "conv_general_dilated", "exp", "log", "reduce_sum", "reduce_max"}
SHORTEST = 64  # steps; a shorter stretch does not hide its fixed cost


def stretch_length(steps: int, check_every: int, record_every: int, epoch_steps: int | None) -> int:
    """Return the number of steps in a stretch: near the square root of all steps, in whole epochs or even parts of one.

    It divides the number of steps between two checks, so that one program serves all stretches. If the only check is
    the last one, a shorter stretch may come at the end.

    >>> stretch_length(1000, 1000, 1, 39), stretch_length(1000, 50, 1, None), stretch_length(6400, 6400, 1, None)
    (78, 50, 80)
    """
    aim = max(math.isqrt(steps), SHORTEST)
    if check_every <= aim:
        return check_every
    alone = check_every == steps
    fits = [n for n in range(record_every, 4 * aim + 1, record_every) if alone or check_every % n == 0]

    def cost(n):
        misfit = abs(math.log(n / aim))
        ragged = check_every % n != 0
        unaligned = epoch_steps is not None and n % epoch_steps and epoch_steps % n
        return misfit + 0.5 * ragged + 0.7 * bool(unaligned)  # unaligned stretches compute orders of epochs in vain

    best = min(fits, key=cost, default=check_every)
    return best if best >= aim / 8 or best == record_every else check_every


def is_kept(primitive, *_, **__) -> bool:
    """Whether a derivative stores a result of a step: products, exponentials and sums are slow to recompute, or small.

    >>> from jax.extend.core.primitives import add_p, dot_general_p
    >>> is_kept(dot_general_p), is_kept(add_p)
    (True, False)
    """
    return primitive.name in KEPT


def blank(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Return a placeholder for values that were never computed: infinity, or 0 in dtypes without one.

    It is not NaN, because a run that has stopped normally must pass ``jax_debug_nans``.

    >>> blank(jax.ShapeDtypeStruct((2,), jnp.float32))
    Array([inf, inf], dtype=float32)
    """
    return filled(shape, jnp.inf if jnp.issubdtype(shape.dtype, jnp.inexact) else 0)


def end_to_end(outputs: PyTree) -> PyTree:
    """Join the outputs of a loop over segments: (segments, iterations, ...) to (segments * iterations, ...).

    >>> end_to_end(jnp.ones((2, 3, 4))).shape
    (6, 4)
    """
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)


def followed_by(outputs: PyTree, last: PyTree) -> PyTree:
    """Concatenate the outputs of some iterations and of those after them.

    >>> followed_by(jnp.ones((2, 4)), jnp.ones((1, 4))).shape
    (3, 4)
    """
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)


def scan_in_segments(body: Callable, carry: PyTree, length: int, size: int) -> tuple[PyTree, Any]:
    """``scan`` over ``arange(length)`` whose derivative stores the carry before every ``size`` iterations.

    >>> scan_in_segments(lambda total, index: (total + index, None), 0, 5, 2)[0]
    Array(10, dtype=int32)
    """
    many, rest = divmod(length, size)
    if many <= 1:
        return jax.lax.scan(body, carry, jnp.arange(length))

    def segment(carry, indices):
        return jax.lax.scan(body, carry, indices)

    kept = jax.checkpoint(segment, prevent_cse=False)
    carry, outputs = jax.lax.scan(kept, carry, jnp.arange(many * size).reshape(many, size))
    outputs = end_to_end(outputs)
    if rest:
        carry, last = segment(carry, jnp.arange(many * size, length))
        outputs = followed_by(outputs, last)
    return carry, outputs


def lean_scan(body: Callable, carry: PyTree, xs: PyTree) -> tuple[PyTree, Any]:
    """``scan`` that carries only what changes, and whose derivative stores only the results that ``is_kept`` names.

    >>> lean_scan(lambda carry, x: ((carry[0] + x, 3.0), -x), (jnp.zeros(()), 1.0), jnp.ones(2))
    ((Array(2., dtype=float32), Array(3., dtype=float32)), Array([-1., -1.], dtype=float32))
    """
    turn, carried, restore = without_constants(body, carry, jax.tree.map(lambda leaf: leaf[0], xs))
    carried, outputs = jax.lax.scan(jax.checkpoint(turn, policy=is_kept, prevent_cse=False), carried, xs)
    return restore(carried), outputs


def without_constants(body: Callable, carry: PyTree, x: PyTree) -> tuple[Callable, list, Callable[[list], PyTree]]:
    """Remove constant leaves from the carry of a loop's body.

    XLA writes a constant in the carry, such as a learning rate that is only recorded, again in every iteration. It also
    runs a program with more than a few independent operations on several threads, which costs more than it gains where
    arrays are small.

    The body runs exactly once per iteration, so its effects (``jax.debug``, ``io_callback``) occur once. The values of
    the constants after the loop are computed by the equations that lead to them, which have no effects.

    Args:
      body: ``body(carry, x) -> (carry, output)``.
      carry, x: its first arguments.

    Returns:
      ``turn(carried, x) -> (carried, output)``, the first ``carried``, and ``restore(carried) -> carry``.

    >>> turn, carried, restore = without_constants(lambda carry, x: ((carry[0] + x, 3.0), None), (0.0, 1.0), 1.0)
    >>> carried, restore(turn(carried, 1.0)[0])
    ([0.0], (1.0, Array(3., dtype=float32)))
    """
    leaves, treedef = jax.tree.flatten(carry)
    program = jax.make_jaxpr(body)(carry, x)
    constant = _constant_leaves(program.jaxpr, len(leaves))

    def join(carried, constants):
        carried, constants = iter(carried), iter(constants)
        return treedef.unflatten([next(constants if fixed else carried) for fixed in constant])

    def part(tree, fixed):
        return [leaf for leaf, flag in zip(jax.tree.leaves(tree), constant, strict=True) if flag == fixed]

    def turn(carried, x):
        carry, output = body(join(carried, part(leaves, True)), x)
        return part(carry, False), output

    def restore(carried):
        return join(carried, _constant_results(program, constant))

    return turn, part(leaves, False), restore


def _constant_leaves(program: Jaxpr, leaves: int) -> list[bool]:
    """Whether each leaf of a carry is constant: the body never reads it and sets it to the same value every time."""
    used, varied = _reads(program, [True] * len(program.invars))
    return [not used[at] and not varied[at] for at in range(leaves)]


def _reads(program: Jaxpr, varied: list[bool]) -> tuple[list[bool], list[bool]]:
    """Which arguments of a program are used or returned, and which results depend on the arguments ``varied``."""
    changing = {var for var, flag in zip(program.invars, varied, strict=True) if flag}
    used: set = set()
    for equation in program.eqns:
        flags = [not isinstance(var, Literal) and var in changing for var in equation.invars]
        # a callback may return another value in every iteration, whatever its arguments
        reads, results = [True] * len(flags), [any(flags) or bool(equation.effects)] * len(equation.outvars)
        if equation.primitive.name in JIT:
            reads, results = _reads(equation.params["jaxpr"].jaxpr, flags)
        used.update(variables(var for var, read in zip(equation.invars, reads, strict=True) if read))
        changing |= {var for var, flag in zip(equation.outvars, results, strict=True) if flag}
    used.update(variables(program.outvars))
    read = [var in used for var in program.invars]
    return read, [not isinstance(var, Literal) and var in changing for var in program.outvars]


def _constant_results(program: ClosedJaxpr, constant: list[bool]) -> list[jax.Array]:
    """Return the results of a loop's body that are the same in every iteration."""
    wanted = constant + [False] * (len(program.jaxpr.outvars) - len(constant))
    values = results_of(program, [None] * len(program.jaxpr.invars), wanted)
    types: list[Any] = [var.aval for var in program.jaxpr.outvars]
    return [
        value if isinstance(value, jax.Array) else jnp.asarray(value, aval.dtype)
        for aval, value, wants in zip(types, values, wanted, strict=True)
        if wants
    ]


__all__ = [
    "blank",
    "end_to_end",
    "followed_by",
    "is_kept",
    "lean_scan",
    "scan_in_segments",
    "stretch_length",
    "without_constants",
]
