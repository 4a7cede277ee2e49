"""Changes of the weights themselves: decay, noise and freezing."""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from optax import AddNoiseState, masked, set_to_zero

from nnlearn.checks import as_key, check_nonnegative
from nnlearn.packing import per_buffer
from nnlearn.settings import comparable
from nnlearn.transforms.averages import increment
from nnlearn.transforms.wrapping import by_leaf, require_params
from nnlearn.tree import as_hyperparam, compute_dtype, is_function, map_unzip, path_name
from nnlearn.types import EmptyState, GradientTransformationExtraArgs, Key, MaskOrFn, Scalar, ScalarOrSchedule


class WeightDecayState(NamedTuple):
    """Step counter of a scheduled weight decay."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def _add_scaled(updates, factor, others, name):
    """``updates + factor * others``, in float32 or better, in the dtype of the updates."""

    def add_leaf(update, other):
        update = jnp.asarray(update)
        wide = compute_dtype(update.dtype)
        total = update.astype(wide) + as_hyperparam(factor, wide) * jnp.asarray(other).astype(wide)
        return (total.astype(update.dtype),)

    return map_unzip(add_leaf, 1, ("updates", name), updates, others)[0]


@comparable
def add_decayed_weights(weight_decay: ScalarOrSchedule = 0.0, mask: MaskOrFn = None) -> GradientTransformationExtraArgs:
    r"""Add the decayed weights: :math:`u \leftarrow u + \lambda w`.

    Before the learning rate it is the decay of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); before the moments
    it is L2 regularisation.

    Args:
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      mask: a tree of booleans like the parameters, or a function from parameters to one: True where weights decay.

    Raises:
      ValueError: if ``update`` is called without parameters, or the decay is negative.

    >>> tx = add_decayed_weights(0.1)
    >>> params = jnp.array([2.0])
    >>> tx.update(jnp.array([1.0]), tx.init(params), params)[0]
    Array([1.2], dtype=float32)
    """
    if not callable(weight_decay):
        check_nonnegative("weight_decay", weight_decay)

    def init(params):
        del params
        return WeightDecayState(jnp.zeros([], jnp.int32)) if callable(weight_decay) else EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        require_params(params, "add_decayed_weights")
        if isinstance(weight_decay, int | float) and weight_decay == 0:
            return updates, state  # the default of several optimizers should not cost a pass over the parameters
        if not callable(weight_decay):
            return _add_scaled(updates, weight_decay, params, "params"), state
        decayed = _add_scaled(updates, weight_decay(state.count), params, "params")
        return decayed, WeightDecayState(increment(state.count))

    tx = GradientTransformationExtraArgs(init, update)
    return tx if mask is None else masked(tx, per_buffer(mask))


@comparable
def add_noise(
    eta: Scalar, gamma: Scalar, key: Key | int | None = None, *, seed: int | None = None
) -> GradientTransformationExtraArgs:
    r"""Add Gaussian noise of decreasing variance (Neelakantan et al. 2015, arXiv:1511.06807, eq. 1).

    .. math:: u \leftarrow u + \mathcal N(0, \eta / t^\gamma)

    Args:
      eta: variance of the noise at the first step, >= 0.
      gamma: exponent of the decrease, >= 0.
      key: a random key, or a seed for one. Runs that share it share their noise.
      seed: old name of an integer ``key``.

    Returns:
      A transformation with ``AddNoiseState(count, rng_key)``.

    Raises:
      ValueError: if ``eta`` or ``gamma`` is negative or not finite, or both ``key`` and ``seed`` are given.

    >>> tx = add_noise(eta=0.0, gamma=0.5, key=jax.random.key(0))
    >>> tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))[0]
    Array([1.], dtype=float32)
    """
    check_nonnegative("eta", eta)
    check_nonnegative("gamma", gamma)
    if key is not None and seed is not None:
        raise ValueError(f"give key or seed, not both: got key={key!r}, seed={seed!r}")
    if key is None and seed is None:
        warnings.warn("add_noise without a key uses key 0, and so does every other run: pass key=", stacklevel=3)
        key = 0
    start = as_key(seed if key is None else key)

    def init(params):
        del params
        return AddNoiseState(count=jnp.zeros([], jnp.int32), rng_key=jnp.array(start, copy=True))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = increment(state.count)
        rng_key, sample_key = jax.random.split(state.rng_key)
        leaves, treedef = jax.tree.flatten(updates)
        noise = _normal(jax.random.split(sample_key, len(leaves)), leaves) if leaves else []
        deviation = jnp.sqrt(eta / count.astype(jnp.result_type(float)) ** gamma)
        return _add_scaled(updates, deviation, treedef.unflatten(noise), "noise"), AddNoiseState(count, rng_key)

    # each leaf draws from a key of its own, packed or not, so that packing changes nothing
    return by_leaf(GradientTransformationExtraArgs(init, update))


def _normal(keys: jax.Array, leaves: list) -> list:
    """Normal numbers like each leaf, by a key for each. Leaves of one shape are one batch, which compiles faster."""
    groups: dict[tuple, list[int]] = {}
    for at, leaf in enumerate(leaves):
        groups.setdefault((jnp.shape(leaf), jnp.result_type(leaf)), []).append(at)
    noise: list = [None] * len(leaves)
    for (shape, dtype), places in groups.items():
        draw = functools.partial(jax.random.normal, shape=shape, dtype=dtype)
        for at, drawn in zip(places, jax.vmap(draw)(keys[jnp.array(places)]), strict=True):
            noise[at] = drawn
    return noise


def _as_bool(path: tuple, leaf: Any) -> bool:
    is_array = isinstance(leaf, np.ndarray | jax.Array) and not isinstance(leaf, Tracer)
    if not isinstance(leaf, bool | np.bool_) and not (is_array and leaf.shape == () and leaf.dtype == np.bool_):
        raise TypeError(f"mask must hold booleans, got {leaf!r} at {path_name(path)!r}")
    return bool(leaf)


@comparable
def freeze(mask: bool | MaskOrFn) -> GradientTransformationExtraArgs:
    """Set the updates of some parameters to zero.

    Put it last: what follows it, such as weight decay, moves the parameters again. Around an optimizer with a master
    copy use ``partition``, so that the frozen parameters have none.

    Args:
      mask: True for parameters that stay as they are; a tree of booleans like the parameters, a prefix of one, or a
        function from parameters to one.

    Raises:
      TypeError: the mask holds something else than booleans.

    >>> tx = freeze({"body": True, "head": False})
    >>> gradient = {"body": jnp.ones(1), "head": jnp.ones(1)}
    >>> tx.update(gradient, tx.init(gradient))[0]["body"]
    Array([0.], dtype=float32)
    """
    if not is_function(mask):
        mask = jax.tree.map_with_path(_as_bool, mask)
    return masked(set_to_zero(), per_buffer(mask))


__all__ = ["WeightDecayState", "add_decayed_weights", "add_noise", "freeze"]
