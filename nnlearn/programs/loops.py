"""How the loops of a compiled run are cut, so that a derivative of it needs little memory.

A derivative keeps the state before each stretch of steps, and works out again what it needs of one stretch at a time.
With stretches near the square root of all steps, both come to about that many.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from nnlearn.programs.read import JIT
from nnlearn.programs.slices import results_of
from nnlearn.sharding.axes import filled
from nnlearn.types import PyTree

KEPT = {"dot_general", "conv_general_dilated", "exp", "log", "reduce_sum", "reduce_max"}
SHORTEST = 64  # steps; fewer at once would not hide what a stretch costs


def stretch_length(steps: int, check_every: int, record_every: int, epoch_steps: int | None) -> int:
    """How many steps are made at once: near the square root of all, in whole epochs or even parts of one.

    It divides the steps between two checks, so that one program does for all stretches, unless the only check is the
    last; then a shorter stretch may come at the end.

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
        return misfit + 0.5 * ragged + 0.7 * bool(unaligned)  # orders of epochs are worked out in vain, unaligned

    best = min(fits, key=cost, default=check_every)
    return best if best >= aim / 8 or best == record_every else check_every


def is_kept(primitive, *_, **__) -> bool:
    """What a derivative keeps of a step: products, exponentials and sums are dear to work out again, or small.

    >>> from jax.extend.core.primitives import add_p, dot_general_p
    >>> is_kept(dot_general_p), is_kept(add_p)
    (True, False)
    """
    return primitive.name in KEPT


def blank(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """What stands for numbers that were never made: infinity, or 0 where there is none.

    Not NaN: a healthy run that has stopped must pass ``jax_debug_nans``.

    >>> blank(jax.ShapeDtypeStruct((2,), jnp.float32))
    Array([inf, inf], dtype=float32)
    """
    return filled(shape, jnp.inf if jnp.issubdtype(shape.dtype, jnp.inexact) else 0)


def end_to_end(outputs: PyTree) -> PyTree:
    """What a loop over segments gave, (segments, turns, ...), as that of all turns, (segments * turns, ...).

    >>> end_to_end(jnp.ones((2, 3, 4))).shape
    (6, 4)
    """
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)


def followed_by(outputs: PyTree, last: PyTree) -> PyTree:
    """The outputs of some turns and of those after them, as one.

    >>> followed_by(jnp.ones((2, 4)), jnp.ones((1, 4))).shape
    (3, 4)
    """
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)


def scan_in_segments(body: Callable, carry: PyTree, length: int, size: int) -> tuple[PyTree, Any]:
    """``scan`` over ``arange(length)`` whose derivative keeps the carry before every ``size`` turns.

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
    """``scan`` that carries only what changes, and whose derivative keeps only what of a turn is dear.

    >>> lean_scan(lambda carry, x: ((carry[0] + x, 3.0), -x), (jnp.zeros(()), 1.0), jnp.ones(2))
    ((Array(2., dtype=float32), Array(3., dtype=float32)), Array([-1., -1.], dtype=float32))
    """
    turn, carried, restore = without_constants(body, carry, jax.tree.map(lambda leaf: leaf[0], xs))
    carried, outputs = jax.lax.scan(jax.checkpoint(turn, policy=is_kept, prevent_cse=False), carried, xs)
    return restore(carried), outputs


def without_constants(body: Callable, carry: PyTree, x: PyTree) -> tuple[Callable, list, Callable[[list], PyTree]]:
    """The body of a loop on a carry without the leaves that are constant.

    XLA writes a constant in the carry, such as a learning rate that is only recorded, again at every turn; and a
    program with more than a few operations that wait for nothing it runs on several threads, which costs more than it
    gains where arrays are small.

    The body runs once a turn and no more, so its effects (``jax.debug``, ``io_callback``) occur once a turn: what the
    constants are after the loop is computed by the equations that lead to them, which have no effects.

    Args:
      body: ``body(carry, x) -> (carry, output)``.
      carry, x: what it is called with first.

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
    """Which leaves of a carry a loop need not carry: never read by its body, and set to what depends on no turn."""
    used, varied = _reads(program, [True] * len(program.invars))
    return [not used[at] and not varied[at] for at in range(leaves)]


def _reads(program: Jaxpr, varied: list[bool]) -> tuple[list[bool], list[bool]]:
    """Which arguments of a program anything is worked out from or returned, and which results depend on ``varied``."""
    changing = {var for var, flag in zip(program.invars, varied, strict=True) if flag}
    used: set = set()
    for equation in program.eqns:
        flags = [not isinstance(var, Literal) and var in changing for var in equation.invars]
        # what a callback returns may be another number at every turn, whatever it is called with
        reads, results = [True] * len(flags), [any(flags) or bool(equation.effects)] * len(equation.outvars)
        if equation.primitive.name in JIT:
            reads, results = _reads(equation.params["jaxpr"].jaxpr, flags)
        used |= {var for var, read in zip(equation.invars, reads, strict=True) if read and not isinstance(var, Literal)}
        changing |= {var for var, flag in zip(equation.outvars, results, strict=True) if flag}
    returned = {var for var in program.outvars if not isinstance(var, Literal)}
    read = [var in used or var in returned for var in program.invars]
    return read, [not isinstance(var, Literal) and var in changing for var in program.outvars]


def _constant_results(program: ClosedJaxpr, constant: list[bool]) -> list[jax.Array]:
    """The values of those results of a loop's body that are the same at every turn."""
    wanted = constant + [False] * (len(program.jaxpr.outvars) - len(constant))
    values = results_of(program, [None] * len(program.jaxpr.invars), wanted)
    variables = zip(program.jaxpr.outvars, values, wanted, strict=True)
    return [
        value if isinstance(value, jax.Array) else jnp.asarray(value, var.aval.dtype)
        for var, value, wants in variables
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
