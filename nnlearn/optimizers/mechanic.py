"""Mechanic: learns the scale of any optimizer's updates."""

import jax.numpy as jnp
from optax import with_extra_args_support
from optax.contrib import MechanicState

from nnlearn.checks import check_count
from nnlearn.settings import comparable
from nnlearn.transforms.averages import increment
from nnlearn.transforms.plumbing import total, wide_real
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot
from nnlearn.transforms.wrapping import require_params
from nnlearn.tree import as_hyperparam, compute_dtype, global_norm, map_unzip, safe_divide, safe_sqrt
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, Scalar


def mechanic_kernel(h, m, v, r, s, *, betas, s_init, eps):
    r"""One step of the tuner (Cutkosky, Defazio & Mehta 2023, arXiv:2306.00144, algorithm 1), for each decay.

    .. math::
        m_t = \max(\beta m_{t-1}, |h_t| + \epsilon), \quad v_t = \beta^2 v_{t-1} + h_t^2, \quad
        r_t = \beta r_{t-1} + \operatorname{clip}(h_t, \pm m_{t-1}) s_{t-1}, \quad
        s_t = \frac{s_{init} m_t / n + \max(r_t, 0)}{\sqrt{v_t} + \epsilon}

    Args:
      h: the product of gradient and direction.
      m, v, r, s: arrays (n,).
      betas: the decay rates, (n,).
      s_init, eps: numbers.

    Returns:
      ``(m, v, r, s)``.
    """
    r = betas * r + jnp.clip(h, -m, m) * s
    m, v = jnp.maximum(betas * m, jnp.abs(h) + eps), betas**2 * v + h**2
    wealth = s_init / len(betas) * m + jnp.maximum(r, 0)
    return m, v, r, safe_divide(wealth, safe_sqrt(v) + eps)


@comparable
def mechanize(
    base_optimizer: GradientTransformation,
    weight_decay: Scalar = 1e-2,
    eps: Scalar = 1e-8,
    s_init: Scalar = 1e-6,
    num_betas: int = 6,
) -> GradientTransformationExtraArgs:
    r"""Learn the scale of an optimizer's updates online, Mechanic (Cutkosky, Defazio & Mehta 2023, arXiv:2306.00144).

    .. math:: w_t = w_0 + \sum_i s_{t,i} \Delta_t, \quad h_t = \langle g_t, -\Delta_{t-1} \rangle

    with the sum :math:`\Delta` of the optimizer's updates and the :math:`s` of ``mechanic_kernel``. The optimizer's
    learning rate should be about 1 at its largest.

    Args:
      base_optimizer: any optimizer.
      weight_decay: pull towards zero, relative to the gradient's norm, >= 0.
      eps: added to divisors, >= 0.
      s_init: first scale, >= 0.
      num_betas: how many decay rates 0.9, 0.99, ... there are.

    Returns:
      A transformation with ``MechanicState(base_optimizer_state, count, r, m, v, s, x0)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range; in ``update``, if there are no parameters.

    >>> import nnlearn
    >>> tx, w = mechanize(nnlearn.sgd(1.0), weight_decay=0.0, s_init=0.5), jnp.zeros(1)
    >>> updates, state = tx.update(jnp.array([4.0]), tx.init(w), w)
    >>> updates.round(3)  # h is 0, so that the wealth is that of the start
    Array([-2.], dtype=float32)
    """
    check_hyperparams(weight_decay=weight_decay, eps=eps, s_init=s_init)
    count_of_betas = check_count("num_betas", num_betas)
    base_optimizer = with_extra_args_support(base_optimizer)
    start = Slot(initial=lambda param: param)

    def init(params):
        real = wide_real(params)
        r, m, v = (jnp.zeros(count_of_betas, real) for _ in range(3))
        s = jnp.full(count_of_betas, s_init, real)
        return MechanicState(base_optimizer.init(params), jnp.zeros([], jnp.int32), r, m, v, s, start.start(params))

    def update(updates, state, params=None, **extra_args):
        require_params(params, "mechanize")
        change, base_state = base_optimizer.update(updates, state.base_optimizer_state, params, **extra_args)
        real = state.s.dtype
        decay, tiny, first = (as_hyperparam(value, real) for value in (weight_decay, eps, s_init))
        scale = jnp.sum(state.s)
        pull = decay * scale * safe_divide(global_norm(updates).astype(real), global_norm(params).astype(real) + tiny)

        def travelled(param, x0):
            return (x0 - param) * as_hyperparam(1 / (scale + tiny), param.dtype)

        def product(g, param, x0):
            return jnp.conj(g + as_hyperparam(pull, g.dtype) * param) * travelled(param, x0)

        h = total(product, updates, params, state.x0).astype(real)
        betas = 1 - jnp.asarray([0.1**number for number in range(1, count_of_betas + 1)], real)
        m, v, r, s = mechanic_kernel(h, state.m, state.v, state.r, state.s, betas=betas, s_init=first, eps=tiny)
        new_scale = jnp.sum(s)

        def on_leaf(u, param, x0):
            u, param = jnp.asarray(u), jnp.asarray(param)
            wide = compute_dtype(u.dtype, param.dtype, x0.dtype)
            u_wide, param, x0 = (array.astype(wide) for array in (u, param, x0))
            delta = travelled(param, x0) - u_wide
            return ((x0 - as_hyperparam(new_scale, wide) * delta - param).astype(u.dtype),)

        (new,) = map_unzip(on_leaf, 1, ("updates", "params", "state.x0"), change, params, state.x0)
        return new, MechanicState(base_state, increment(state.count), r, m, v, s, state.x0)

    return GradientTransformationExtraArgs(init, update)


__all__ = ["mechanic_kernel", "mechanize"]
