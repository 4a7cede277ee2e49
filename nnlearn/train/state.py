"""The state of training between steps, and the initial state."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nnlearn.checks import NUMERIC, as_key
from nnlearn.packing import is_packed, make_layout, pack, pack_like, unpack, worth_packing
from nnlearn.programs.packable import packing_difference
from nnlearn.settings import Made
from nnlearn.sharding.follow import follow
from nnlearn.sharding.rules import Axes, FullySharded, Rules, checked_spec, shardings
from nnlearn.sharding.zero import of_buffers
from nnlearn.tree import is_function, is_readable, matching, path_name, sizes
from nnlearn.types import GradientTransformation, Key, Params, PyTree, StatefulModel

STEP_STREAM = 0x5E7  # an arbitrary constant that separates the random numbers of the steps from the caller's


class TrainState(NamedTuple):
    """Everything that the next step needs, and nothing else.

    Attributes:
      step: the number of steps so far, int32.
      stored: the parameters in the form that training uses: a tree or ``Packed``. ``params`` is the tree of either.
      opt_state: the optimizer's state.
      key: the random key of the run, derived from the one given to ``init_state``. Step t uses
        ``jax.random.fold_in(key, t)``, so a restored run draws the same random numbers.
      model_state: the state of the model that is not trained, such as the running statistics of batch normalisation;
        None if ``loss_fn`` takes none.
    """

    step: jax.Array
    stored: Params
    opt_state: PyTree
    key: Key
    model_state: PyTree = None

    def __repr__(self) -> str:
        if not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(self)):  # such as shardings
            return f"TrainState({', '.join(f'{name}={part!r}' for name, part in zip(self._fields, self, strict=True))})"
        one = is_readable(self.step) and np.ndim(self.step) == 0
        parts = [f"step {int(self.step)}" if one else f"step of shape {np.shape(self.step)}"]
        trees = {"params": self.stored, "opt_state": self.opt_state, "model_state": self.model_state}
        parts += [f"{name}: {sizes(tree)}" for name, tree in trees.items() if jax.tree.leaves(tree)]
        return f"TrainState({', '.join(parts)})"

    @property
    def params(self) -> Params:
        """The parameters as the tree that the model takes, packed or not."""
        return unpack(self.stored)

    def with_params(self, params: Params) -> "TrainState":
        """The same state with other parameters, packed and placed on devices as the current ones are.

        The optimizer state, step, key and model state do not change, so moments and averages remain those of the old
        parameters. If that is wrong, make a new state with ``init_state``.

        Args:
          params: a tree like ``state.params``, or ``Packed``. It is copied. For the state of vmapped runs its leaves
            have the axes of the runs.

        Raises:
          TypeError: if the dtype of a leaf differs.
          ValueError: if the structure of the tree or the shape of a leaf differs.

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
    """``params`` as arrays, checked against ``shapes``."""
    matching(params, shapes, ("params", "state.params"))
    if jax.tree.structure(params) != jax.tree.structure(shapes):  # a None of the state matches any leaf
        raise ValueError("params has a leaf where state.params has None")

    def check(path, shape, leaf):
        # a Python number takes the dtype of the state
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
    """A copy that a step may donate, with a strong dtype, sharded like ``old`` if that lies on a mesh."""
    array = jnp.array(array, array.dtype, copy=True)
    if isinstance(old, jax.core.Tracer) or isinstance(array, jax.core.Tracer):
        return array
    sharding = getattr(old, "sharding", None)
    return jax.device_put(array, sharding) if isinstance(sharding, NamedSharding) else array


def init_state(
    params: Params | Callable[[Key], Params],
    tx: GradientTransformation,
    key: Key | int = 0,
    *,
    packed: bool | None = None,
    labels: PyTree | Callable[[Params], PyTree] = None,
    model_state: PyTree = None,
    mesh: Mesh | None = None,
    rules: Rules = None,
) -> TrainState:
    """The state before the first step.

    Args:
      params: the parameters, as a tree or ``Packed``; or ``init(key) -> params``, such as ``model.init``. They are
        copied, so a step that donates its state does not invalidate them. The ``init`` of a ``StatefulModel`` of
        nnlearn also makes ``model_state``, unless that is given.
      tx: an nnlearn or optax optimizer.
      key: a random key or an integer seed. The state contains a key derived from it, so the same key can also shuffle
        the batches: the random numbers are independent.
      packed: whether training stores the parameters in a few large buffers, see ``pack``. The trajectory is the same.
        None packs if measurements showed a benefit, see ``worth_packing``, and ``tx`` gives the same updates.
      labels: leaves to store in separate buffers, see ``pack``. An optimizer whose mask separates leaves of one dtype
        needs labels; the mask itself can serve as them.
      model_state: for a ``loss_fn`` with an argument ``model_state``, a pytree of arrays. It is copied, too.
      mesh: the devices of the state, see ``make_mesh``. With ``init`` each device computes its part of the parameters
        and of the optimizer's state, so they are never whole on one device. None for the default device.
      rules: how the parameters are sharded, see ``nnlearn.sharding.shardings``; None replicates them. The optimizer's
        state follows its parameters, see ``nnlearn.sharding.zero`` for another way. The rest is replicated. With
        ``packed=True`` and ``fsdp()``, the buffers are padded and sharded evenly.

    Raises:
      TypeError: if a parameter is not floating or complex, and so cannot be trained.
      ValueError: if ``packed`` is True and ``tx`` would update packed parameters differently; if a rule does not fit.

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
    if _makes_model_state(params):
        params, first_state = cast(Any, params)(as_key(key))
        model_state = first_state if model_state is None else model_state
    if mesh is not None:
        return place_state(params, tx, as_key(key), packed, labels, model_state, mesh, rules)
    if rules is not None:
        raise ValueError("rules need a mesh: init_state(..., mesh=nnlearn.make_mesh('data'), rules=rules)")
    params = cast(Any, params)(as_key(key)) if is_function(params) else unpack(params)
    _check_trainable(params)
    # Copies, because donation invalidates a buffer: it must not belong to the caller or the optimizer, or occur twice.
    stored, model_state = jax.tree.map(_strong, (params, model_state))
    if _decide_packing(packed, params, tx, labels):
        stored = cast(Params, pack(stored, labels))  # Packed is a pytree, too
    return _first(stored, tx, as_key(key), model_state)


def _makes_model_state(params: Any) -> bool:
    """Whether this is the ``init`` of a ``StatefulModel``, which returns ``(params, model_state)``."""
    return isinstance(params, Made) and params.call.kind is StatefulModel


def _first(stored: Params, tx: GradientTransformation, key: Key, model_state: PyTree) -> TrainState:
    opt_state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tx.init(stored))
    return TrainState(jnp.zeros([], jnp.int32), stored, opt_state, jax.random.fold_in(key, STEP_STREAM), model_state)


def _strong(leaf: Any) -> jax.Array:
    """A copy with a strong dtype: a weak one becomes strong at the first update, and the step would compile again."""
    return jnp.array(leaf, jnp.result_type(leaf), copy=True)


def place_state(
    params: Params | Callable[[Key], Params],
    tx: GradientTransformation,
    key: Key,
    packed: bool | None,
    labels: Any,
    model_state: PyTree,
    mesh: Mesh,
    rules: Rules,
) -> TrainState:
    """``init_state`` on a mesh: one program that computes each array where it belongs."""
    start = params if is_function(params) else None
    shapes = jax.eval_shape(unpack if start is None else start, params if start is None else key)
    _check_trainable(shapes)
    placed = shardings(shapes, mesh, rules)
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, placed
    )
    layout = None
    if _decide_packing(packed, shapes, tx, labels):
        even = None
        if isinstance(rules, FullySharded) and rules.rules is None:
            even = NamedSharding(mesh, checked_spec((rules.axes,), "the buffers", (mesh.size,), mesh))
        layout = make_layout(shapes, labels, sharding=even, multiple=mesh.size)

    def first(given, key, model_state):
        params = jax.tree.map(_strong, given if start is None else start(key))
        stored = params if layout is None else pack_like(layout, params)
        return _first(stored, tx, key, jax.tree.map(_strong, model_state))

    given = None if start is not None else jax.device_put(unpack(params), placed)
    places = state_shardings(jax.eval_shape(first, given, key, model_state), mesh, rules)
    return jax.jit(first, out_shardings=places)(given, key, model_state)


def state_shardings(state: TrainState, mesh: Mesh, rules: Rules = None) -> TrainState:
    """The sharding of each array of a state, as ``init_state`` chooses it.

    Args:
      state: the state, or its shapes.
      mesh, rules: see ``init_state``.

    Returns:
      A state with a ``NamedSharding`` for each array, for ``jax.jit(step, out_shardings=(shardings, None))`` and for
      ``jax.device_put``.

    Raises:
      ValueError: if a rule does not fit.

    >>> import nnlearn
    >>> mesh = nnlearn.make_mesh("data=1")
    >>> state = init_state({"w": jnp.zeros(2)}, nnlearn.adamw(0.1))
    >>> state_shardings(state, mesh, {"w": "data"}).opt_state[0].mu["w"].spec
    P('data',)
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    places = jax.tree.map(lambda _: replicated, state)
    stored = of_buffers(state.stored, mesh)
    stored = shardings(state.stored, mesh, rules) if stored is None else stored
    return places._replace(stored=stored, opt_state=follow(state.opt_state, state.stored, stored))


def on_mesh(step: Callable[..., Any], mesh: Mesh, rules: Rules, batch_axis: Axes) -> Callable[..., Any]:
    """A step inside a program that keeps its state where ``state_shardings`` says, and shards its batch."""
    put = jax.sharding.reshard if AxisType.Explicit in mesh.axis_types else jax.lax.with_sharding_constraint

    def run(state: TrainState, batch: PyTree, **options: Any) -> tuple[TrainState, Any]:
        batch = jax.tree.map(put, batch, shardings(batch, mesh, lambda path, shape, mesh: (batch_axis,)))
        new, info = step(state, batch, **options)
        places = state_shardings(new, mesh, rules)
        stored, opt_state = jax.tree.map(put, (new.stored, new.opt_state), (places.stored, places.opt_state))
        return new._replace(stored=stored, opt_state=opt_state), info

    return run


def _check_trainable(params: Params) -> None:
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


def _decide_packing(packed: bool | None, params: Params, tx: GradientTransformation, labels) -> bool:
    if packed not in (True, False, None):
        raise ValueError(f"packed must be True, False or None, got {packed!r}")
    packed = None if packed is None else bool(packed)  # NumPy's False is not Python's
    if packed is False or (packed is None and not worth_packing(params)):
        return False
    if packed is None and any(buffer.sharding is not None for buffer in make_layout(params, labels).buffers):
        return False  # no measurement has shown a benefit there
    difference = packing_difference(tx, params, labels)
    if packed and difference:
        raise ValueError(
            f"packed=True, but this optimizer would update packed parameters differently: {difference}. "
            "Give labels that separate the leaves that it treats differently (for partition(txs, rule): partition(txs, "
            "nnlearn.per_buffer(rule)) and labels=rule), put by_leaf around the transformation that needs whole "
            "leaves, or leave packed=None"
        )
    return not difference


__all__ = ["TrainState", "init_state", "on_mesh", "state_shardings"]
