"""The recipes, the parameter shapes and the JAX rivals of the optimizer benchmarks."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import nnlearn

Shapes = list[tuple[int, ...]]
RATE, WARMUP, DECAY = 1e-3, 100, 10_000  # one peak rate for all, because it does not affect the time of a step


class Recipe(NamedTuple):
    """An optimizer as a user writes it.

    Attributes:
      make: maps a library, optax or nnlearn, to the transformation, with the same code for both.
      minimal_bytes: the bytes per float32 parameter that any implementation must move: 4 for each array that it reads
        and for each that it writes.
    """

    make: Callable[[ModuleType], Any]
    minimal_bytes: int


def _schedule(library: ModuleType):
    return library.warmup_cosine_decay_schedule(0.0, RATE, WARMUP, DECAY)


def _clipped_adamw(library: ModuleType):
    return library.chain(library.clip_by_global_norm(1.0), library.adamw(_schedule(library), weight_decay=1e-4))


RECIPES = {
    # reads p, g, m; writes p, m
    "sgd-momentum": Recipe(lambda library: library.sgd(RATE, momentum=0.9), 20),
    # reads p, g, m, v; writes p, m, v
    "adamw": Recipe(lambda library: library.adamw(RATE, weight_decay=1e-4), 28),
    # also reads g a second time: its norm must be known before the first update
    "clip+adamw+schedule": Recipe(_clipped_adamw, 32),
    "lion": Recipe(lambda library: library.lion(RATE, weight_decay=1e-4), 20),
}

REGIMES: dict[str, Shapes] = {
    "1 x 16M": [(16_000_000,)],
    "160 x 100k": [(100_000,)] * 160,
    "2000 x 2000": [(2000,)] * 2000,
    "1000 x 20": [(20,)] * 1000,
}
QUICK_REGIMES: dict[str, Shapes] = {"1 x 1M": [(1_000_000,)], "50 x 2000": [(2000,)] * 50}


def _gpt2_shapes() -> Shapes:
    """The 148 arrays of GPT-2, with 124 million parameters."""
    d, ff = 768, 3072
    attention = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
    feed_forward = [(d,), (d,), (d, ff), (ff,), (ff, d), (d,)]
    return [(50257, d), (1024, d), *(attention + feed_forward) * 12, (d,), (d,)]


GPU_REGIMES: dict[str, Shapes] = {
    "GPT-2, 148 leaves": _gpt2_shapes(),
    "2000 x 2000": REGIMES["2000 x 2000"],
    "10000 x 2000": [(2000,)] * 10_000,
    "1 x 1e9": [(1_000_000_000,)],
}


def count(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


def draw(shapes: Shapes, seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
    """A tree of standard normal values times ``scale``, sliced from one array."""
    flat = scale * jax.random.normal(jax.random.key(seed), (count(shapes),))
    tree, start = {}, 0
    for index, shape in enumerate(shapes):
        tree[f"leaf{index:05}"] = jnp.asarray(flat[start : start + math.prod(shape)].reshape(shape))
        start += math.prod(shape)
    return tree


def one_leaf(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same values as a tree of one leaf."""
    return {"leaf": jnp.concatenate([leaf.reshape(-1) for leaf in tree.values()])}


def _apply_with_optax(tx: Any, params: Any, grads: Any, opt_state: Any) -> tuple:
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _step(tx: Any, params: Any, grads: Any, apply_gradients: Callable = _apply_with_optax) -> tuple:
    def step(state, grads):
        params, opt_state = state
        return apply_gradients(tx, params, grads, opt_state)

    params = jax.tree.map(jnp.copy, params)  # the step donates them
    # Copied, because an array that occurs twice in a state cannot be donated twice.
    opt_state = jax.tree.map(jnp.copy, tx.init(params))
    return jax.jit(step, donate_argnums=0), (params, opt_state), grads


def update_steps(recipe: str, params: dict, grads: dict) -> dict[str, Callable[[], tuple]]:
    """Functions that make the optimizer step of each JAX rival: a jitted step with donation, its state, its gradient.

    ``optax, packed`` separates the gain of the layout from that of the optimizer.
    """
    theirs, ours = RECIPES[recipe].make(optax), RECIPES[recipe].make(nnlearn)

    def packed(tx, form=lambda tree: tree, apply_gradients=nnlearn.apply_gradients):
        packed_params = nnlearn.pack(form(params))
        # In training the gradient has the same layout object as the parameters, not only an equal one.
        buffers, structure = jax.tree.leaves(nnlearn.pack(form(grads))), jax.tree.structure(packed_params)
        return _step(tx, packed_params, jax.tree.unflatten(structure, buffers), apply_gradients)

    steps = {
        "optax": lambda: _step(theirs, params, grads),
        "optax.flatten": lambda: _step(optax.flatten(theirs), params, grads),
        "optax, packed": lambda: packed(theirs, apply_gradients=_apply_with_optax),
        "nnlearn": lambda: _step(ours, params, grads, nnlearn.apply_gradients),
        "nnlearn, packed": lambda: packed(ours),
    }
    if len(params) > 1:
        steps["nnlearn, packed, one leaf"] = lambda: packed(ours, one_leaf)
    return steps
