"""Gradients at the snapshots of a run: their norms, zeros and cosines, layer by layer."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.diagnose.plan import on_host, quick
from nnlearn.diagnose.rerun import Record, leaf_names
from nnlearn.diagnose.subject import Subject, params_of
from nnlearn.tree import array_norm, global_norm
from nnlearn.types import Params, PyTree

BATCHES = 4  # consecutive batches whose gradients are compared at each snapshot


class Slopes(NamedTuple):
    """Gradients at the snapshots, on consecutive batches with fixed parameters.

    Attributes:
      loss: shape (times, batches).
      leaf_norms: norm of each leaf's gradient, shape (times, batches, leaves).
      leaf_zeros: share of zeros in each leaf's gradient, shape (times, batches, leaves).
      mean_norms: norm of each leaf's mean gradient over the batches, shape (times, leaves).
      cosines: cosine of the gradients of neighbouring batches, shape (times, batches - 1).
      grads: the gradient at the first step, as a tree of NumPy arrays.
      change_norms: norm of each leaf's change until the next snapshot, shape (times - 1, leaves).
      param_norms: norm of each leaf, shape (times, leaves).
      descent: cosine of the change until the next snapshot with the negative gradient, shape (times - 1,).
      names: of the leaves.
    """

    loss: np.ndarray
    leaf_norms: np.ndarray
    leaf_zeros: np.ndarray
    mean_norms: np.ndarray
    cosines: np.ndarray
    grads: Params
    change_norms: np.ndarray
    param_norms: np.ndarray
    descent: np.ndarray
    names: tuple[str, ...]


def cosine(one: PyTree, other: PyTree) -> jax.Array:
    """The cosine of the angle between two trees; 0 if one of them is zero."""
    dots = jax.tree.map(lambda a, b: jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32)), one, other)
    total = sum(jax.tree.leaves(dots), jnp.zeros(()))
    norms = global_norm(one) * global_norm(other)
    return jnp.where(norms > 0, total / jnp.where(norms > 0, norms, 1), 0.0)


def slopes_of(subject: Subject, run: Record) -> Slopes:
    """The gradients of a run; raises ``Unknown`` if it has no loss function."""
    subject.need_loss()
    plan = subject.plan
    near = run.at[:, None] + np.arange(BATCHES)

    def norms(tree):
        return jnp.stack([array_norm(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree)])

    @functools.partial(jax.jit, compiler_options=quick())
    def program(states, keys, rows, examples):
        def slope(state, key, row):
            batch = plan.batch(row, examples)
            return jax.value_and_grad(subject.loss)(params_of(state), batch, subject.as_key(key), state.model_state)

        def one(each):
            state, key, rows = each
            losses, grads = jax.lax.map(lambda row: slope(state, key, row), rows)
            batches = [jax.tree.map(lambda leaf, index=index: leaf[index], grads) for index in range(BATCHES)]
            flat = [leaf.reshape(BATCHES, -1) for leaf in jax.tree.leaves(grads)]
            return {
                "loss": losses,
                "leaf_norms": jax.vmap(norms)(grads),
                "leaf_zeros": jnp.stack([jnp.mean(leaf == 0, axis=1, dtype=jnp.float32) for leaf in flat], axis=-1),
                "mean_norms": norms(jax.tree.map(lambda leaf: jnp.mean(leaf.astype(jnp.float32), 0), grads)),
                "cosines": jnp.stack([cosine(a, b) for a, b in zip(batches, batches[1:], strict=False)]),
                "first": batches[0],
            }

        return jax.lax.map(one, (states, keys, rows))

    found = program(run.states, subject.keys[run.at], plan.at(near), plan.examples)
    grads = on_host(found.pop("first"))
    params = params_of(run.states)
    changes = jax.tree.map(lambda leaf: np.diff(leaf, axis=0), params)
    return Slopes(
        **{name: np.asarray(value, np.float64) for name, value in found.items()},
        grads=jax.tree.map(lambda leaf: leaf[0], grads),
        change_norms=_norms(changes),
        param_norms=_norms(params),
        descent=-_cosines(changes, jax.tree.map(lambda leaf: leaf[:-1], grads)),
        names=leaf_names(params),
    )


def _norms(tree: PyTree) -> np.ndarray:
    """The norm of each leaf, for each row of its leading axis: shape (rows, leaves)."""
    flat = [leaf.reshape(len(leaf), -1).astype(np.float64) for leaf in jax.tree.leaves(tree)]
    return np.stack([np.sqrt(np.sum(np.square(leaf), axis=1)) for leaf in flat], axis=-1)


def _cosines(one: PyTree, other: PyTree) -> np.ndarray:
    """The cosine of the angle between two trees, for each row of their leading axis; 0 if one is zero."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    dots = sum(np.sum((a.astype(np.float64) * b).reshape(len(a), -1), axis=1) for a, b in pairs)
    sizes = np.sqrt(np.sum(_norms(one) ** 2, axis=1) * np.sum(_norms(other) ** 2, axis=1))
    return np.divide(dots, sizes, out=np.zeros_like(sizes), where=sizes > 0)


__all__ = ["BATCHES", "Slopes", "cosine", "slopes_of"]
