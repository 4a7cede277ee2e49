"""Statistics of every layer's gradient and update, measured every few steps while training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import safe_increment, with_extra_args_support

from nnlearn.checks import check_count, check_decay
from nnlearn.packing import is_packed, unpack
from nnlearn.packing.stacks import stack_values
from nnlearn.tree import compute_dtype, matching, safe_divide, safe_sqrt
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, OptState, Params, PyTree, Scalar


class LayerStats(NamedTuple):
    """Statistics of each parameter leaf, in the tree's order; every field has the shape (leaves,).

    Attributes:
      grad_norm: Euclidean norm of the gradient.
      update_norm: Euclidean norm of the change that the previous step made.
      param_norm: Euclidean norm of the parameters.
      update_ratio: ``update_norm / param_norm``; 0 for parameters that are zero.
      cosine: of the gradient and that of the previous step. Near 1 if successive batches agree, near 0 if noise
        dominates, negative if steps overshoot.
      signal_to_noise: the squared norm of the mean gradient divided by the variance of a batch's gradient, estimated
        from products of successive gradients, averaged over the measurements. It may be infinite without noise.
      zero: the share of entries of the gradient that are exactly zero.
      nonfinite: the share of entries of the gradient that are infinite or NaN.
    """

    grad_norm: jax.Array
    update_norm: jax.Array
    param_norm: jax.Array
    update_ratio: jax.Array
    cosine: jax.Array
    signal_to_noise: jax.Array
    zero: jax.Array
    nonfinite: jax.Array


class MonitorLayersState(NamedTuple):
    """State of ``monitor_layers``.

    Attributes:
      inner_state: the state of the monitored optimizer.
      count: steps so far, int32.
      layers: the last measurement.
      last_grads, last_params: those before the step to compare with.
      signal, power: moving averages per leaf of the product of successive gradients, and of their squares.
    """

    inner_state: OptState
    count: jax.Array
    layers: LayerStats
    last_grads: PyTree
    last_params: PyTree
    signal: jax.Array
    power: jax.Array


def monitor_layers(
    inner: GradientTransformation, every: int = 10, *, decay: Scalar = 0.9
) -> GradientTransformationExtraArgs:
    r"""Measure every layer's gradient and update while training; the updates are those of ``inner``.

    A step records the latest measurement as ``info.layers``, so that ``trace.info.layers.grad_norm`` has the shape
    (records, leaves) and ``trace.leaves`` their names. A measurement is made at steps ``every``, ``2 * every`` and so
    on; with ``record_every=every`` every record is a new one. The step before it keeps a copy of the gradient and of
    the parameters. With :math:`g_t` the gradient, the signal-to-noise ratio is

    .. math:: \frac{E[g_t \cdot g_{t-1}]}{E[(|g_t|^2 + |g_{t-1}|^2) / 2] - E[g_t \cdot g_{t-1}]}

    with averages over measurements. It takes two copies of the parameters as memory. Under ``vmap`` every step
    measures.

    Args:
      inner: an nnlearn or optax optimizer, the whole one.
      every: steps between two measurements, a Python int.
      decay: of the averages behind ``signal_to_noise``, over measurements.

    Returns:
      A transformation with state ``MonitorLayersState``.

    Raises:
      TypeError: if ``every`` is not an integer.
      ValueError: if ``every`` is below 1 or ``decay`` not in [0, 1).

    >>> import nnlearn
    >>> tx = monitor_layers(nnlearn.sgd(0.5), every=1)
    >>> step = nnlearn.make_step(lambda params, batch, key: jnp.sum(params["w"] ** 2), tx)
    >>> state = nnlearn.init_state({"w": jnp.ones(4)}, tx)
    >>> state, info = step(state, None)
    >>> info.layers.grad_norm, info.layers.param_norm
    (Array([4.], dtype=float32), Array([2.], dtype=float32))
    """
    every = check_count("every", every)
    check_decay("decay", decay)
    inner = with_extra_args_support(inner)

    def init(params):
        shapes = jax.eval_shape(lambda tree: unpack(tree), params)
        none = jnp.zeros(len(jax.tree.leaves(shapes)), jnp.float32)
        zeros = jax.tree.map(jnp.zeros_like, params)
        kept = jax.tree.map(jnp.asarray, params)
        return MonitorLayersState(
            inner.init(params), jnp.zeros((), jnp.int32), LayerStats(*[none] * 8), zeros, kept, none, none
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("monitor_layers needs params: tx.update(grads, state, params)")
        change, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        due = state.count % every == every - 1
        measured = state.layers, state.signal, state.power
        grads = matching(updates, params, ("updates", "params"))

        def measure(grads, params, state):
            return _measure(grads, params, state, decay)

        def keep(grads, params, last):
            return jax.tree.map(lambda new, old: new.astype(old.dtype), (grads, params), last)

        last = state.last_grads, state.last_params
        if every == 1:
            measured, last = measure(grads, params, state), keep(grads, params, last)
        else:
            held = state._replace(inner_state=(), layers=measured[0])
            measured = jax.lax.cond(due, measure, lambda grads, params, state: measured, grads, params, held)
            before = state.count % every == every - 2
            last = jax.lax.cond(before, keep, lambda grads, params, last: last, grads, params, last)
        return change, MonitorLayersState(inner_state, safe_increment(state.count), measured[0], *last, *measured[1:])

    found = Monitor(init, update)
    found.monitored = inner
    return found


class Monitor(GradientTransformationExtraArgs):
    """A transformation whose updates are those of another one, ``monitored``."""

    monitored: GradientTransformation


def _measure(grads: PyTree, params: Params, state: MonitorLayersState, decay: Any):
    """A measurement: the statistics, and the averages behind the ratio of signal and noise."""
    trees = grads, state.last_grads, params, state.last_params
    if is_packed(params):
        sums = stack_values(jax.vmap(_sums), *trees)
    else:
        rows = [_sums(*leaves) for leaves in zip(*map(jax.tree.leaves, trees), strict=True)]
        sums = jnp.stack(rows) if rows else jnp.zeros((0, 7))
    square, product, before, change, size, zero, nonfinite = jnp.moveaxis(sums, -1, 0)
    # the first measurement may have no gradient to compare with
    weight = jnp.where(jnp.any(before > 0), 1 - decay, 0)
    pairs = ((product, state.signal), ((square + before) / 2, state.power))
    # both averages start at zero, which cancels in their ratio
    signal, power = (jnp.where(jnp.isfinite(new), old + weight * (new - old), old) for new, old in pairs)
    norm, size = jnp.sqrt(square), jnp.sqrt(size)
    moved = jnp.sqrt(change)
    noise = jnp.maximum(power - signal, 0)
    layers = LayerStats(
        norm,
        moved,
        size,
        safe_divide(moved, size),
        safe_divide(product, norm * safe_sqrt(before)),
        jnp.where(signal > 0, jnp.where(noise > 0, safe_divide(signal, noise), jnp.inf), 0),
        zero,
        nonfinite,
    )
    return layers, signal, power


def _sums(grad: jax.Array, last_grad: jax.Array, param: jax.Array, last_param: jax.Array) -> jax.Array:
    """All sums over one leaf, in one pass: seven numbers."""
    wide = compute_dtype(grad.dtype, param.dtype)
    grad, last_grad, param, last_param = (_real(leaf.astype(wide)) for leaf in (grad, last_grad, param, last_param))
    change = param - last_param
    one = jnp.ones((), grad.dtype)
    terms = (
        grad * grad,
        grad * last_grad,
        last_grad * last_grad,
        change * change,
        param * param,
        jnp.where(grad == 0, one, 0),
        jnp.where(jnp.isfinite(grad), 0, one),
    )
    found = jax.lax.reduce(terms, (jnp.zeros((), grad.dtype),) * len(terms), _added, (0,))
    share = 1 / max(grad.size, 1)
    return jnp.stack([*found[:5], found[5] * share, found[6] * share]).astype(jnp.float32)


def _added(one: tuple, other: tuple) -> tuple:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _added(one: tuple, other: tuple) -> tuple:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _real(leaf: jax.Array) -> jax.Array:
    """The elements as one vector of real numbers."""
    leaf = leaf.reshape(-1)
    return jnp.concatenate([leaf.real, leaf.imag]) if jnp.iscomplexobj(leaf) else leaf


def current_layers(state: OptState) -> LayerStats | None:
    """The latest measurement of ``monitor_layers`` in an optimizer's state, or None.

    >>> import nnlearn
    >>> current_layers(nnlearn.sgd(0.1).init(jnp.zeros(1))) is None
    True
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MonitorLayersState))
    return next((node.layers for node in nodes if isinstance(node, MonitorLayersState)), None)


__all__ = ["LayerStats", "Monitor", "MonitorLayersState", "current_layers", "monitor_layers"]
