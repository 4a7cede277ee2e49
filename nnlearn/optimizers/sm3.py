"""SM3: a second moment in the memory of one vector for each axis."""

import functools

import jax
import jax.numpy as jnp
from optax import ScaleBySM3State

from nnlearn.settings import comparable
from nnlearn.transforms.averages import moving_average
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot
from nnlearn.transforms.wrapping import by_leaf
from nnlearn.tree import as_hyperparam, compute_dtype, map_unzip, safe_rsqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, Scalar, ScalarOrSchedule


def sm3_kernel(g, mu, nu, *, b1, b2, eps):
    r"""One step of SM3-II on an array (Anil et al. 2019, arXiv:1901.11150, algorithm 2).

    .. math::
        a_t = \beta_2 \min_k \mu^k_{t-1} + (1-\beta_2) g_t^2, \quad \mu^k_t = \max_{j \ne k} a_t, \quad
        n_t = \beta_1 n_{t-1} + (1-\beta_1) g_t / \sqrt{a_t + \epsilon}, \quad u_t = n_t

    :math:`\mu^k` has an entry for each index of axis :math:`k`. With :math:`\beta_2 = 1` the squares are summed:
    their weight is 1, not 0.

    Args:
      g: the gradient.
      mu: a list of vectors, one for each axis; of a scalar, one scalar.
      nu: the momentum, like ``g``.
      b1, b2, eps: numbers.

    Returns:
      ``(u, mu, n)``.
    """
    wide = [jnp.expand_dims(one, [other for other in range(g.ndim) if other != axis]) for axis, one in enumerate(mu)]
    smallest = functools.reduce(jnp.minimum, wide if g.ndim else mu)
    accumulated = jnp.where(b2 == 1, 1, 1 - b2) * jnp.square(g) + b2 * smallest
    nu = moving_average(b1, jnp.where(accumulated > 0, g * safe_rsqrt(accumulated + eps), 0), nu)
    others = [tuple(other for other in range(g.ndim) if other != axis) for axis in range(max(g.ndim, 1))]
    return nu, [jnp.max(accumulated, axes, initial=0) for axes in others], nu


@comparable
def scale_by_sm3(b1: Scalar = 0.9, b2: Scalar = 1.0, eps: Scalar = 1e-8) -> GradientTransformationExtraArgs:
    """SM3's direction, see ``sm3_kernel``. Parameters are real; of packed parameters the state holds the leaves.

    Args:
      b1: decay rate of the momentum, in [0, 1).
      b2: decay rate of the second moment, in [0, 1]; 1 sums.
      eps: added inside of the square root, >= 0.

    Returns:
      A transformation with ``ScaleBySM3State(mu, nu)``; ``mu`` has a list of arrays for each leaf.

    Raises:
      ValueError: if a hyper-parameter is out of its range, or a parameter is complex.

    >>> tx, w = scale_by_sm3(b1=0.0), jnp.zeros((2, 3))
    >>> jax.tree.map(jnp.shape, tx.init(w))
    ScaleBySM3State(mu=[(2,), (3,)], nu=(2, 3))
    >>> tx.update(jnp.full((2, 3), -4.0), tx.init(w))[0][0]
    Array([-1., -1., -1.], dtype=float32)
    """
    check_hyperparams(b1=b1, momentum=b2, eps=eps)

    def init(params):
        if any(jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating) for leaf in jax.tree.leaves(params)):
            raise ValueError("scale_by_sm3 needs real parameters: wrap it in split_real_and_imaginary")

        def accumulators(param):
            dtype = compute_dtype(jnp.result_type(param))
            return [jnp.zeros(length, dtype) for length in jnp.shape(param)] or [jnp.zeros([], dtype)]

        return ScaleBySM3State(jax.tree.map(accumulators, params), Slot().start(params))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args

        def on_leaf(g, nu, mu):
            g = jnp.asarray(g)
            wide = compute_dtype(g.dtype, nu.dtype)
            numbers = {name: as_hyperparam(value, wide) for name, value in (("b1", b1), ("b2", b2), ("eps", eps))}
            vectors, kind = jax.tree.flatten(mu)  # flax keeps lists in containers of its own
            change, vectors, nu = sm3_kernel(g.astype(wide), vectors, nu.astype(wide), **numbers)
            return change.astype(g.dtype), kind.unflatten(vectors), nu

        map_unzip(lambda g, nu: (g,), 1, ("updates", "state.nu"), updates, state.nu)  # names what does not fit
        treedef = jax.tree.structure(updates)
        rows = [
            on_leaf(*row)
            for row in zip(
                jax.tree.leaves(updates), treedef.flatten_up_to(state.nu), treedef.flatten_up_to(state.mu), strict=True
            )
        ]
        change, mu, nu = (treedef.unflatten([row[index] for row in rows]) for index in range(3))
        return change, ScaleBySM3State(mu, nu)

    return by_leaf(GradientTransformationExtraArgs(init, update))


@comparable
def sm3(
    learning_rate: ScalarOrSchedule, momentum: Scalar = 0.9, *, master_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    """SM3, memory-efficient AdaGrad (Anil et al. 2019, arXiv:1901.11150), see ``sm3_kernel``.

    Args:
      learning_rate: a number >= 0 or a schedule.
      momentum: decay rate of the average of the directions, in [0, 1).
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx = sm3(0.1, momentum=0.0)
    >>> tx.update(jnp.array([7.0, -0.2]), tx.init(jnp.zeros(2)))[0].round(5)
    Array([-0.1,  0.1], dtype=float32)
    """
    check_hyperparams(momentum=momentum)
    return assemble(scale_by_sm3(momentum), scale_by_learning_rate(learning_rate), master_dtype=master_dtype)


__all__ = ["scale_by_sm3", "sm3", "sm3_kernel"]
