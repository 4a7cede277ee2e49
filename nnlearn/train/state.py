"""What training carries from step to step, and where it starts."""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import NamedSharding

from nnlearn.checks import NUMERIC, as_key
from nnlearn.packing import is_packed, make_layout, pack, pack_like, unpack, worth_packing
from nnlearn.programs.packable import packing_difference
from nnlearn.tree import matching, path_name
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
    stored: Params
    opt_state: OptState
    key: Key
    model_state: PyTree = None

    @property
    def params(self) -> Params:
        """The parameters as the tree that the model takes, however they are stored."""
        return unpack(self.stored)

    def with_params(self, params: Params) -> "TrainState":
        """The same state with other parameters, stored as these are: packed, and on the devices where they lie.

        The optimizer state, the step, the key and the model state are kept. Moments and averages are then those of the
        parameters before; where that is wrong, make a new state with ``init_state``.

        Args:
          params: a tree like ``state.params``, or ``Packed``; copied. Of vmapped runs, with the axes of the runs.

        Raises:
          TypeError: a leaf has another dtype.
          ValueError: the tree has another structure, or a leaf another shape.

        >>> import nnlearn
        >>> state = init_state({"w": jnp.zeros(2)}, nnlearn.sgd(0.1))
        >>> state.with_params({"w": jnp.ones(2)}).params
        {'w': Array([1., 1.], dtype=float32)}
        >>> state.with_params({"w": jnp.ones(3)})
        Traceback (most recent call last):
        ValueError: params: leaf 'w' has shape (3,), but the state's has (2,)
        """
        leaves = _like(unpack(params), jax.eval_shape(unpack, self.stored))
        if is_packed(self.stored):
            return self._replace(stored=jax.tree.map(_owned, pack_like(self.stored.layout, leaves)))
        return self._replace(stored=jax.tree.map(_owned, leaves, self.stored))


def _like(params: Params, shapes: PyTree) -> Params:
    """``params`` as arrays, once they are known to have those shapes and dtypes."""
    matching(params, shapes, ("params", "state.params"))
    if jax.tree.structure(params) != jax.tree.structure(shapes):  # beside a None of the state's there is a leaf
        raise ValueError("params has a leaf where state.params has None")

    def check(path, shape, leaf):
        # a Python number takes the dtype that is asked for
        array = jnp.asarray(leaf, shape.dtype if isinstance(leaf, bool | int | float | complex) else None)
        if array.shape != shape.shape:
            raise ValueError(
                f"params: leaf {path_name(path)!r} has shape {array.shape}, but the state's has {shape.shape}"
            )
        if array.dtype != shape.dtype:
            raise TypeError(
                f"params: leaf {path_name(path)!r} is {array.dtype.name}, but the state's is {shape.dtype.name}; "
                "convert it: jax.tree.map(lambda new, old: new.astype(old.dtype), params, state.params)"
            )
        return array

    return jax.tree.map_with_path(check, shapes, params)


def _owned(array: jax.Array, old: jax.Array | None = None) -> jax.Array:
    """A copy that a step may donate, of a strong type, where ``old`` lies on a mesh there."""
    array = jnp.array(array, array.dtype, copy=True)
    if isinstance(old, jax.core.Tracer) or isinstance(array, jax.core.Tracer):
        return array
    sharding = getattr(old, "sharding", None)
    return jax.device_put(array, sharding) if isinstance(sharding, NamedSharding) else array


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
        stored = cast(Params, pack(stored, labels))  # Packed is a pytree, too
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
            "Give labels that keep apart what it treats apart (for partition(txs, rule): partition(txs, "
            "nnlearn.per_buffer(rule)) and labels=rule), put by_leaf around the transformation that works with whole "
            "leaves, or leave packed=None"
        )
    return not difference


__all__ = ["TrainState", "init_state"]
