"""The optimizer alone, without a network: how it answers to gradients that are known."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax import with_extra_args_support

from nnlearn.diagnose.plan import quick
from nnlearn.diagnose.subject import Subject
from nnlearn.tree import global_norm
from nnlearn.types import Grads, Params, PyTree

LONGEST = 4000  # steps of constant gradients
SIDE = 16
SHORT = 500  # steps below which compiling takes longer than running
AFTER = 48
FACTORS = 10.0 ** np.arange(1, -9, -1)


class Answer(NamedTuple):
    """Updates of an optimizer, without a network.

    Attributes:
      pace: norm of the update at each step under a constant gradient, shape (steps,).
      along: cosine of the update with the negative gradient at each step.
      memory: norm of the moments and momentum in the state at each step, shape (steps,); NaN if it has none.
      left: the same after the first zero gradient, relative to that before it.
      counts: sum of the integers in the state at each step.
      coasting: norms of the updates under zero gradients, afterwards, shape (AFTER,).
      turning: cosine of the update with the new negative gradient after the sign of the gradient changes, (AFTER,).
      drift: relative growth of the parameters in the second step under zero gradients: negative for decay.
      response: norm of the second update under the gradient times each of ``FACTORS``.
    """

    pace: np.ndarray
    along: np.ndarray
    memory: np.ndarray
    left: float
    counts: np.ndarray
    coasting: np.ndarray
    turning: np.ndarray
    drift: float
    response: np.ndarray


def ask(subject: Subject, params: Params, grads: Grads, steps: int) -> Answer:
    """Feed an optimizer with a constant gradient, then with none, then with its opposite.

    Large arrays are cut to a corner, with gradients and parameters of the same global norms, because only ratios of
    norms are needed and a whole network costs as much as the run. An optimizer that refuses these gets all.
    """
    try:
        return _ask(subject, corner(params), corner(grads), steps)
    except Exception:  # an optimizer that knows the shapes
        return _ask(subject, params, grads, steps)


def forgets(subject: Subject, params: Params, grads: Grads, every: int) -> bool:
    """Whether a gradient in the first of ``every`` steps changes nothing in the update after them."""
    params, grads = corner(params), corner(grads)
    tx, update_of = _updates(subject, params)

    def program(grads, factors):
        def one(state, factor):
            updates, state = update_of(_times(grads, factor), state)
            return state, _dot(updates, grads)

        return jax.lax.scan(one, tx.init(params), factors)[1][-1]

    before = np.repeat(np.array([1, 0], np.float32), [3 * every, every])
    with_one = before.copy()
    with_one[3 * every] = -100.0  # also turns the sign of a momentum
    update = jax.jit(program, compiler_options=quick())
    return bool(update(grads, before) == update(grads, with_one))


def norm_on_host(tree: PyTree) -> float:
    """The global norm of a tree of NumPy arrays, in float64 and without compilation."""
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree))))


def corner(tree: PyTree) -> PyTree:
    """The corner of each array of at most SIDE entries along each axis, scaled to the tree's global norm.

    >>> part = corner({"w": np.ones((64, 32)), "b": np.ones(4)})
    >>> part["w"].shape, round(float(np.sum(part["w"] ** 2) + np.sum(part["b"] ** 2)))
    ((16, 16), 2052)
    """
    part = jax.tree.map(lambda leaf: leaf[tuple(slice(0, SIDE) for _ in leaf.shape)], tree)
    whole, left = norm_on_host(tree), norm_on_host(part)
    if not 0 < whole < np.inf or left == 0:
        return part
    factor = whole / left
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype) if leaf.dtype.kind != "i" else leaf, part)


def _updates(subject: Subject, params: Params) -> tuple[Any, Callable[..., Any]]:
    """The optimizer, and its update of a gradient and a state at these parameters."""
    tx = with_extra_args_support(subject.tx)

    def update(grads, state):
        # The loss is only for line searches and plateau rules, which see a constant one.
        return tx.update(grads, state, params, value=jnp.ones(()), grad=grads, value_fn=lambda _: jnp.ones(()))

    return tx, update


def _times(grads: Grads, factor: jax.Array) -> Grads:
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), grads)


def _dot(one: PyTree, other: PyTree) -> jax.Array:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum((jnp.sum(a * b) for a, b in pairs), jnp.zeros(()))


def _ask(subject: Subject, params: Params, grads: Grads, steps: int) -> Answer:
    tx, update = _updates(subject, params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)} - {()}  # hyper-parameters are scalars
    steps = min(steps, LONGEST)

    def look(updates, state):
        size, slope = global_norm(updates), global_norm(grads)
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in shapes and leaf.dtype.kind == "f"]
        counts = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype.kind in "iu" and leaf.ndim == 0]
        return {
            "pace": size,
            "along": -_dot(updates, grads) / jnp.maximum(size * slope, 1e-30),
            "memory": global_norm(moments) if moments else jnp.full((), jnp.nan),
            "counts": sum((jnp.asarray(leaf, jnp.float32) for leaf in counts), jnp.zeros(())),
        }

    def program(grads, factors):
        def one(state, factor):
            updates, state = update(_times(grads, factor), state)
            return state, look(updates, state)

        def answer(factor):
            updates, state = update(_times(grads, factor), first)
            updates, state = update(_times(grads, factor), state)  # the rate of the first step may be zero
            return global_norm(updates), _dot(updates, params) / jnp.maximum(_dot(params, params), 1e-30)

        first = tx.init(params)
        seen = jax.lax.scan(one, first, factors)[1]
        response, drift = jax.lax.map(answer, jnp.asarray([*FACTORS, 0.0], jnp.float32))
        return seen | {"response": response[:-1], "drift": drift[-1]}

    factors = np.repeat(np.array([1, 0, -1], np.float32), [steps, AFTER, AFTER])
    found = jax.jit(program, compiler_options=quick() if steps < SHORT else {})(grads, factors)
    found = {name: np.asarray(value, np.float64) for name, value in found.items()}
    parts = {name: np.split(found[name], [steps, steps + AFTER]) for name in ("pace", "along", "memory", "counts")}
    memory = parts["memory"]
    return Answer(
        left=float(memory[1][0] / max(memory[0][-1], 1e-30)),
        **{name: part[0] for name, part in parts.items()},
        coasting=parts["pace"][1],
        turning=-parts["along"][2],
        drift=float(found["drift"]),
        response=found["response"],
    )


__all__ = ["AFTER", "FACTORS", "Answer", "ask", "forgets", "norm_on_host"]
