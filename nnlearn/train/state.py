"""What training carries from step to step, and where it starts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import NUMERIC, as_key
from nnlearn.packing import Packed, is_packed, make_layout, pack, unpack, worth_packing
from nnlearn.train.packable import packing_difference
from nnlearn.tree import path_name
from nnlearn.types import GradientTransformation, Key, OptState, Params, PyTree

STEP_STREAM = 0x5E7  # an arbitrary constant: it sets the steps' random numbers apart from the caller's own


class TrainState(NamedTuple):
    """What the next step needs, and nothing else.

    Attributes:
      step: steps made so far, int32.
      stored: the parameters as training keeps them: the tree itself, or ``Packed``; ``params`` is the tree of either.
      opt_state: the optimizer's state.
      key: the run's random key, derived from the one given to ``init_state``; step t uses
        ``jax.random.fold_in(key, t)``, so a restored run draws the same numbers.
      model_state: what the model carries from step to step beside its parameters, such as the running statistics of
        batch normalisation; None where ``loss_fn`` asks for none.
    """

    step: jax.Array
    stored: Params | Packed
    opt_state: OptState
    key: Key
    model_state: PyTree = None

    @property
    def params(self) -> Params:
        """The parameters as the tree that the model takes, however they are stored."""
        return unpack(self.stored)


def init_state(
    params: Params,
    tx: GradientTransformation,
    key: Key | int = 0,
    *,
    packed: bool | None = None,
    labels: PyTree | Callable[[Params], PyTree] = None,
    model_state: PyTree = None,
) -> TrainState:
    """The state before the first step.

    Args:
      params: the parameters, as a tree or ``Packed``; they are copied, so that a step which donates its state leaves
        yours alone.
      tx: an optimizer, nnlearn's or optax's.
      key: a random key, or an integer seed for one. The state keeps a key of its own derived from it, so that yours may
        also shuffle the batches without the two ever drawing the same numbers.
      packed: whether training keeps the parameters in a few large buffers, see ``pack``; the trajectory is the same.
        None packs where that was measured to pay, see ``worth_packing``, if ``tx`` gives the same updates.
      labels: leaves to keep in buffers of their own, see ``pack``. An optimizer whose mask parts leaves of one dtype
        needs them: the mask itself will do.
      model_state: what the model carries beside its parameters, a pytree of arrays, for a ``loss_fn`` that asks for it;
        copied too.

    Raises:
      TypeError: a parameter is not floating or complex, and so cannot be trained.
      ValueError: ``packed`` is True, and ``tx`` would update packed parameters differently.

    >>> import nnlearn
    >>> state = init_state({"w": jnp.zeros(2)}, nnlearn.sgd(0.1), key=0)
    >>> int(state.step), state.params
    (0, {'w': Array([0., 0.], dtype=float32)})
    >>> init_state({"w": jnp.zeros(2), "b": jnp.zeros(1)}, nnlearn.sgd(0.1), packed=True).stored
    Packed(2 leaves: float32[3])
    """
    if is_packed(params):
        packed = True if packed is None else packed
        labels = params.layout.labels if labels is None else labels
    params = unpack(params)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, NUMERIC | complex):
            raise TypeError(
                f"parameter {path_name(path)!r} is a {type(leaf).__name__}, not an array; keep it out of params, as "
                "nnlearn.models.adapters or equinox.partition do"
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"parameter {path_name(path)!r} is {jnp.result_type(leaf).name}, which has no gradient; "
                "make it floating, or keep it out of params"
            )
    key = jax.random.fold_in(as_key(key), STEP_STREAM)
    # Copies, because a donated buffer is gone: it may not be the caller's or the optimizer's, nor stand in two places.
    # Strong dtypes, because a weak one would turn strong at the first update, and compile the step anew.
    stored, model_state = jax.tree.map(
        lambda leaf: jnp.array(leaf, jnp.result_type(leaf), copy=True), (params, model_state)
    )
    if _decide_packing(packed, params, tx, labels):
        stored = pack(stored, labels)
    opt_state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tx.init(stored))
    return TrainState(jnp.zeros([], jnp.int32), stored, opt_state, key, model_state)


def _decide_packing(packed: bool | None, params: Params, tx: GradientTransformation, labels) -> bool:
    if packed not in (True, False, None):
        raise ValueError(f"packed must be True, False or None, got {packed!r}")
    packed = None if packed is None else bool(packed)  # NumPy's False is not Python's
    if packed is False or (packed is None and not worth_packing(params)):
        return False
    if packed is None and any(buffer.sharding is not None for buffer in make_layout(params, labels).buffers):
        return False  # it was not measured to pay there
    difference = packing_difference(tx, params, labels)
    if packed and difference:
        raise ValueError(
            f"packed=True, but this optimizer would update packed parameters differently: {difference}. "
            "Give labels that keep apart what it treats apart, put by_leaf around the transformation that works with "
            "whole leaves, or leave packed=None"
        )
    return not difference


__all__ = ["TrainState", "init_state"]
