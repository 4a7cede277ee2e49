"""Sophia: momentum over an estimate of the Hessian's diagonal, clipped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax.tree
from optax import with_extra_args_support
from optax.contrib import HutchinsonState, SophiaState

from nnlearn.checks import check_number
from nnlearn.packing import is_packed, pack_like, unpack
from nnlearn.settings import comparable
from nnlearn.transforms.averages import bias_correction, increment, is_multiple, moving_average
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.transforms.wrapping import require_params
from nnlearn.tree import as_hyperparam, clip_parts, compute_dtype, map_unzip, safe_divide
from nnlearn.types import (
    DTypeLike,
    GradientTransformation,
    GradientTransformationExtraArgs,
    MaskOrFn,
    Scalar,
    ScalarOrSchedule,
)


@comparable
def hutchinson_estimator_diag_hessian(random_seed: jax.Array | None = None) -> GradientTransformationExtraArgs:
    r"""An estimate of the Hessian's diagonal in place of the gradient (Hutchinson 1989).

    .. math:: h = z \odot \nabla^2 L \, z

    with a random sign for each number in :math:`z`. Its ``update`` takes ``obj_fn``, the loss as a function of the
    parameters alone. Optax's casts all signs to one dtype, and fails where parameters have several.

    Args:
      random_seed: a random key; None for ``jax.random.PRNGKey(0)``.

    Returns:
      A transformation with ``HutchinsonState(key)``.

    Raises:
      ValueError: in ``update``, if ``params`` is missing, or the loss: ``obj_fn``, or ``value_fn`` from ``make_step``.

    >>> tx, w = hutchinson_estimator_diag_hessian(), jnp.array([1.0, 2.0])
    >>> tx.update(w, tx.init(w), w, obj_fn=lambda w: jnp.sum(w**3))[0]
    Array([ 6., 12.], dtype=float32)
    """

    def init(params):
        del params
        return HutchinsonState(jax.random.PRNGKey(0) if random_seed is None else random_seed)

    def update(updates, state, params: Any = None, obj_fn: Callable | None = None, value_fn: Any = None, **extra_args):
        del extra_args
        require_params(params, "hutchinson_estimator_diag_hessian")
        obj_fn = value_fn if obj_fn is None else obj_fn
        if obj_fn is None:
            raise ValueError("the Hessian needs the loss: call update(..., obj_fn=lambda params: loss(params, batch))")
        key, subkey = jax.random.split(state.key)
        leaves = unpack(params)
        signs = optax.tree.random_like(subkey, leaves, jax.random.rademacher, dtype=jnp.float32)
        signs = jax.tree.map(lambda sign, leaf: sign.astype(jnp.result_type(leaf)), signs, leaves)
        signs = pack_like(params.layout, signs) if is_packed(params) else signs
        products = jax.jvp(jax.grad(obj_fn), (params,), (signs,))[1]
        return jax.tree.map(lambda product, sign: product * sign, products, signs), HutchinsonState(key)

    return GradientTransformationExtraArgs(init, update)


HUTCHINSON = hutchinson_estimator_diag_hessian()


def sophia_kernel(g, mu, nu, *, b1, eps, gamma, c1, clip_threshold=None):
    r"""One step of Sophia on arrays of one shape (Liu et al. 2023, arXiv:2305.14342, algorithm 3).

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad
        u_t = \operatorname{clip}\left(\frac{m_t / (1-\beta_1^t)}{\max(\gamma h_t, \epsilon)}, \pm\rho\right)

    As in optax the momentum is debiased, which the paper does not do.

    Returns:
      ``(u, m)``.
    """
    mu = moving_average(b1, g, mu)
    update = safe_divide(mu / c1, jnp.maximum(gamma * nu, eps))
    return (update if clip_threshold is None else clip_parts(update, clip_threshold)), mu


@comparable
def scale_by_sophia(
    b1: Scalar = 0.965,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-8,
    gamma: Scalar = 0.01,
    clip_threshold: Scalar | None = 1.0,
    update_interval: Scalar = 10,
    hessian_diagonal_fn: GradientTransformation = HUTCHINSON,
    mu_dtype: DTypeLike | None = None,
    verbose: bool = False,
    print_win_rate_every_n_steps: int = 0,
) -> GradientTransformationExtraArgs:
    """Sophia's direction, see ``sophia_kernel``; arguments as in ``sophia``.

    Returns:
      A transformation with ``SophiaState(count, mu, nu, hessian_fn_state)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range; in ``update``, if there are no parameters.

    >>> tx, w = scale_by_sophia(), jnp.array([1.0, -2.0])
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     update, state = tx.update(w, state, w, obj_fn=lambda w: 50 * jnp.sum(w**2))
    >>> update, state.nu  # the Hessian is 100, of which the average has 1 % after the first step
    (Array([ 1., -1.], dtype=float32), Array([1., 1.], dtype=float32))
    """
    check_hyperparams(b1=b1, b2=b2, eps=eps, gamma=gamma, clip_threshold=clip_threshold)
    check_number("update_interval", update_interval, low=1)
    diagonal = with_extra_args_support(hessian_diagonal_fn)
    mu_slot, nu_slot = Slot(dtype=as_storage("mu_dtype", mu_dtype)), Slot()

    def init(params):
        count = jnp.zeros([], jnp.int32)
        return SophiaState(count, mu_slot.start(params), nu_slot.start(params), diagonal.init(params))

    def update(updates, state, params: Any = None, **extra_args):
        require_params(params, "scale_by_sophia")
        count = increment(state.count)
        c1 = bias_correction(b1, count)

        def on_leaf(g, mu, nu):
            g = jnp.asarray(g)
            wide = compute_dtype(g.dtype, mu.dtype)
            given = {"b1": b1, "eps": eps, "gamma": gamma, "c1": c1, "clip_threshold": clip_threshold}
            numbers = {name: None if value is None else as_hyperparam(value, wide) for name, value in given.items()}
            new, kept = sophia_kernel(g.astype(wide), mu.astype(wide), nu.astype(wide), **numbers)
            return new.astype(g.dtype), kept.astype(mu.dtype)

        names = ("updates", "state.mu", "state.nu")
        change, mu = map_unzip(on_leaf, 2, names, updates, state.mu, state.nu)
        if verbose and clip_threshold is not None:
            _print_share(change, clip_threshold, count, print_win_rate_every_n_steps)

        def estimated(held, nu):
            found, new = diagonal.update(updates, held, params, **extra_args)
            wide = jax.tree.map(lambda h, old: jnp.asarray(h).astype(old.dtype), found, nu)
            nu = jax.tree.map(lambda h, old: moving_average(as_hyperparam(b2, old.dtype), h, old), wide, nu)
            return jax.tree.map(lambda one, old: jnp.asarray(one, jnp.result_type(old)), new, held), nu

        due = is_multiple(state.count, update_interval)
        held, nu = jax.lax.cond(due, estimated, lambda *same: same, state.hessian_fn_state, state.nu)
        return change, SophiaState(count, mu, nu, held)

    return GradientTransformationExtraArgs(init, update)


def _print_share(change, threshold, count, every) -> None:
    """Print which share of the updates is not clipped, every so many steps."""
    leaves = jax.tree.leaves(change)
    inside = sum(jnp.sum(jnp.abs(leaf) < as_hyperparam(threshold, leaf.dtype)) for leaf in leaves)
    share = inside / sum(leaf.size for leaf in leaves)
    due = (every > 0) & (count % max(every, 1) == 0)
    jax.lax.cond(due, lambda: jax.debug.print("Sophia optimizer win rate: {}", share), lambda: None)


@comparable
def sophia(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.965,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    weight_decay_mask: MaskOrFn = None,
    gamma: Scalar = 0.01,
    clip_threshold: Scalar | None = 1.0,
    update_interval: Scalar = 10,
    hessian_diagonal_fn: GradientTransformation = HUTCHINSON,
    mu_dtype: DTypeLike | None = None,
    verbose: bool = False,
    print_win_rate_every_n_steps: int = 0,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Sophia, clipped steps by the Hessian's diagonal (Liu et al. 2023, arXiv:2305.14342).

    .. math:: w_t = w_{t-1} - \alpha (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``sophia_kernel``. Hutchinson's estimator takes a product with the Hessian at every
    ``update_interval``-th step. ``make_step`` and ``make_train`` give it the loss. Elsewhere, pass the loss as a
    function of the parameters alone: ``tx.update(grads, state, params, obj_fn=lambda params: loss(params, batch))``.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      b1: decay rate of the momentum, in [0, 1).
      b2: decay rate of the Hessian's diagonal, in [0, 1).
      eps: smallest divisor, >= 0.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      weight_decay_mask: True where weights decay, see ``adamw``.
      gamma: :math:`\gamma`, factor of the diagonal, >= 0. Where the share of updates that are not clipped leaves
        [0.1, 0.5], change it.
      clip_threshold: :math:`\rho` > 0; None for no clipping.
      update_interval: steps from one estimate to the next, >= 1.
      hessian_diagonal_fn: a transformation whose update is the Hessian's diagonal; it takes the extra arguments.
      mu_dtype: dtype of the momentum; None for the parameter's dtype, float32 at least.
      verbose: print the share of updates that are not clipped.
      print_win_rate_every_n_steps: how often.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = sophia(0.1, weight_decay=0.0), jnp.array([1.0])
    >>> tx.update(jnp.array([2.0]), tx.init(w), w, obj_fn=lambda w: jnp.sum(w**2))[0]
    Array([-0.1], dtype=float32)
    """
    return assemble(
        scale_by_sophia(
            b1,
            b2,
            eps,
            gamma,
            clip_threshold,
            update_interval,
            hessian_diagonal_fn,
            mu_dtype,
            verbose,
            print_win_rate_every_n_steps,
        ),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


__all__ = ["hutchinson_estimator_diag_hessian", "scale_by_sophia", "sophia", "sophia_kernel"]
