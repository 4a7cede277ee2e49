"""Changes of any optimizer's direction: cautious updates, MARS, weights on a sphere, rates by depth."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax import with_extra_args_support

from nnlearn.checks import check_nonnegative
from nnlearn.settings import comparable
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot
from nnlearn.transforms.whole_leaf import map_whole_leaves
from nnlearn.transforms.wrapping import by_leaf, from_map, require_params
from nnlearn.tree import array_norm, as_hyperparam, compute_dtype, path_name, safe_divide
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, PyTree, Scalar


def cautious_kernel(update, g):
    r"""Keep the entries of an update that go downhill (Liang et al. 2024, arXiv:2411.16085, algorithm 1).

    .. math:: \phi_i = [u_i g_i < 0], \quad u \leftarrow \frac{n}{\max(1, \sum_i \phi_i)} \phi \odot u

    on a leaf of :math:`n` numbers. Returns the update.
    """
    agrees = jnp.real(update * jnp.conj(g)) < 0
    share = jnp.sum(agrees.astype(jnp.finfo(g.dtype).dtype))
    return jnp.where(agrees, update, 0) * (update.size / jnp.maximum(share, 1))


@comparable
def cautious(tx: GradientTransformation) -> GradientTransformationExtraArgs:
    """Let an optimizer move only where its update goes against the gradient, see ``cautious_kernel``.

    Args:
      tx: the whole optimizer, learning rate included.

    >>> import nnlearn
    >>> tx = cautious(nnlearn.sgd(1.0, momentum=0.9))
    >>> _, state = tx.update(jnp.array([1.0, 1.0]), tx.init(jnp.zeros(2)), jnp.zeros(2))
    >>> tx.update(jnp.array([0.1, -0.1]), state, jnp.zeros(2))[0]  # momentum still points to the left
    Array([-2.,  0.], dtype=float32)
    """
    tx = with_extra_args_support(tx)

    def on_leaf(_, update, g):
        wide = compute_dtype(update.dtype, g.dtype)
        return (cautious_kernel(update.astype(wide), g.astype(wide)).astype(update.dtype),)

    def update(updates, state, params=None, **extra_args):
        change, state = tx.update(updates, state, params, **extra_args)
        return map_whole_leaves(on_leaf, ("updates", "gradients"), (change, updates), (None, None), (None,))[0], state

    return GradientTransformationExtraArgs(tx.init, update)


class ScaleByMarsState(NamedTuple):
    """The last gradient."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    previous: PyTree


def mars_kernel(g, previous, *, gamma, b1, is_first):
    r"""Variance-reduced gradient of a leaf (MARS, Yuan et al. 2024, arXiv:2411.10438, algorithm 1).

    .. math:: c_t = g_t + \gamma \frac{\beta_1}{1-\beta_1} (g_t - g_{t-1}), \quad
        u_t = \frac{c_t}{\max(1, \|c_t\|)}

    with :math:`g_0 = g_1`, the approximate form that takes one gradient a step. Returns ``(u, g)``.
    """
    corrected = g + gamma * (b1 / (1 - b1)) * jnp.where(is_first, 0, g - previous)
    return corrected / jnp.maximum(1, array_norm(corrected)), g


@comparable
def scale_by_mars(gamma: Scalar = 0.025, b1: Scalar = 0.95) -> GradientTransformationExtraArgs:
    """Reduce the variance of gradients with the last one, see ``mars_kernel``.

    It comes before ``adamw`` with the same ``b1``.

    Args:
      gamma: strength of the correction, >= 0.
      b1: decay rate of the first moment that follows, in [0, 1).

    Returns:
      A transformation with ``ScaleByMarsState(count, previous)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx = scale_by_mars(gamma=0.1, b1=0.5)
    >>> _, state = tx.update(jnp.array([0.25]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([0.5]), state)[0]
    Array([0.525], dtype=float32)
    """
    check_hyperparams(gamma=gamma, b1=b1)
    return from_kernel(
        mars_kernel,
        ScaleByMarsState,
        {"previous": Slot()},
        {"gamma": gamma, "b1": b1},
        lambda count, **_: {"is_first": count == 1},
        whole_leaf=True,
    )


def hyperball_kernel(update, param):
    r"""Project a step back onto the sphere of the weights: :math:`w + u \leftarrow \|w\| \frac{w + u}{\|w + u\|}`."""
    moved = param + update
    return moved * safe_divide(array_norm(param), array_norm(moved)) - param


@comparable
def hyperball(min_axes: int = 2) -> GradientTransformationExtraArgs:
    """Keep the norm of each matrix as it is; the last link of a chain.

    A layer whose output is normalised does not depend on the norm of its weights, so the learning rate alone sets how
    far a step turns them, and weight decay has nothing to do (Kosson et al. 2024, arXiv:2305.17212).

    Args:
      min_axes: leaves with fewer axes move freely.

    Raises:
      ValueError: in ``update``, if there are no parameters.

    >>> tx, w = hyperball(), jnp.array([[3.0, 4.0]])
    >>> tx.update(jnp.array([[1.0, -4.0]]), tx.init(w), w)[0]
    Array([[ 2., -4.]], dtype=float32)
    """

    def on_leaf(_, update, param):
        if param.ndim < min_axes:
            return (update,)
        wide = compute_dtype(update.dtype, param.dtype)
        return (hyperball_kernel(update.astype(wide), param.astype(wide)).astype(update.dtype),)

    def on_tree(updates, params):
        require_params(params, "hyperball")
        return map_whole_leaves(on_leaf, ("updates", "params"), (updates, params), (None, None), (None,))[0]

    return from_map(on_tree, needs_params="hyperball")


@comparable
def scale_by_depth(
    decay: Scalar, depth: Mapping[str, int] | Callable[[str], int], layers: int
) -> GradientTransformationExtraArgs:
    r"""Smaller steps for lower layers: :math:`u \leftarrow \gamma^{L - l} u` in layer :math:`l` of :math:`L`.

    The usual way to fine-tune (Clark et al. 2020, arXiv:2003.10555); put it after the learning rate or before it.

    Args:
      decay: :math:`\gamma >= 0`.
      depth: the layer of each leaf, by a function of its path, such as ``"encoder/0/kernel"``, or by the first entry
        of a mapping whose name is a part of the path; a leaf without one is in the last layer.
      layers: :math:`L`.

    Raises:
      ValueError: if ``decay`` is negative.

    >>> tx = scale_by_depth(0.5, {"embed": 0, "body": 1}, layers=2)
    >>> tx.update({"embed": jnp.ones(()), "body": jnp.ones(()), "head": jnp.ones(())}, tx.init({}))[0]["embed"]
    Array(0.25, dtype=float32)
    """
    check_nonnegative("decay", decay)

    def layer(path: str) -> int:
        if callable(depth):
            return depth(path)
        return next((number for name, number in depth.items() if name in path), layers)

    def on_leaf(path, update):
        update = jnp.asarray(update)
        wide = compute_dtype(update.dtype)
        factor = as_hyperparam(decay, wide) ** (layers - layer(path_name(path)))
        return (update.astype(wide) * factor).astype(update.dtype)

    return by_leaf(from_map(lambda updates, params: jax.tree.map_with_path(on_leaf, updates)))


__all__ = [
    "cautious",
    "cautious_kernel",
    "hyperball",
    "hyperball_kernel",
    "mars_kernel",
    "scale_by_depth",
    "scale_by_mars",
]
