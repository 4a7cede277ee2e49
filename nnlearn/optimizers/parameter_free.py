"""Estimates of the learning rate while training: Prodigy, D-Adaptation, and COCOB's bets on coins."""

import jax.numpy as jnp
from optax.contrib import COCOBState, DAdaptAdamWState, ProdigyState

from nnlearn.optimizers.distance import START
from nnlearn.settings import comparable
from nnlearn.transforms.averages import bias_correction
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.plumbing import from_kernel, number, total
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot
from nnlearn.tree import abs_sq, as_hyperparam, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule

_PRODIGY = ("learning_rate", "b1", "b2", "b3", "estim_lr0", "estim_lr_coef")


def prodigy_kernel(g, param, exp_avg, exp_avg_sq, grad_sum, params0, *, b1, b2, b3, eps, weight_decay, step, **seen):
    r"""One step of Prodigy (Mishchenko & Defazio 2023, arXiv:2306.06101, algorithm 4).

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) d_t g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) d_t^2 g_t^2, \quad
        s_t = \beta_3 s_{t-1} + c_t g_t, \quad
        u_t = -\eta_t \Big(\frac{m_t}{\sqrt{v_t} + d_{t+1} \epsilon} + \lambda w_{t-1}\Big)

    ``seen`` has :math:`d_t`, :math:`d_{t+1}` and :math:`c_t` as ``before``, ``estim_lr`` and ``weight``.
    """
    scaled = seen["before"] * g
    exp_avg = b1 * exp_avg + (1 - b1) * scaled
    exp_avg_sq = b2 * exp_avg_sq + (1 - b2) * abs_sq(scaled)
    direction = safe_divide(exp_avg, safe_sqrt(exp_avg_sq) + seen["estim_lr"] * eps)
    update = -step * (weight_decay * param + direction)
    return update, exp_avg, exp_avg_sq, b3 * grad_sum + seen["weight"] * g, params0


@comparable
def prodigy(
    learning_rate: ScalarOrSchedule = 1.0,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    beta3: Scalar | None = None,
    eps: Scalar = 1e-8,
    estim_lr0: Scalar = 1e-6,
    estim_lr_coef: Scalar = 1.0,
    weight_decay: Scalar = 0.0,
    safeguard_warmup: bool = False,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Prodigy, Adam that estimates its learning rate (Mishchenko & Defazio 2023, arXiv:2306.06101).

    .. math::
        d_{t+1} = \max\Big(d_t, \frac{r_t}{\|s_t\|_1}\Big), \quad
        r_t = \beta_3 r_{t-1} + \frac{d_t \eta_t}{d_0} \langle g_t, w_0 - w_{t-1} \rangle

    with the :math:`s_t` of ``prodigy_kernel`` and :math:`\eta_t = d_t \alpha_t \sqrt{1-\beta_2^t} / (1-\beta_1^t)`.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule, which should be 1 at its largest.
      betas: decay rates of the moments, in [0, 1).
      beta3: decay rate of :math:`r` and :math:`s`; None for the root of the second of ``betas``.
      eps: added to the divisor, >= 0.
      estim_lr0: :math:`d_0`, the first estimate, > 0.
      estim_lr_coef: multiplies the estimate, >= 0.
      weight_decay: :math:`\lambda`, a number >= 0.
      safeguard_warmup: leave a warmup of the learning rate out of the estimate.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Returns:
      A transformation with ``ProdigyState(exp_avg, exp_avg_sq, grad_sum, params0, estim_lr, numerator_weighted,
      count)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = prodigy(estim_lr0=0.1, eps=0.0), jnp.zeros(1)
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0].round(5)
    Array([-0.1], dtype=float32)
    """
    b1, b2 = betas
    b3 = b2**0.5 if beta3 is None else beta3
    check_hyperparams(b1=b1, b2=b2, b3=b3, eps=eps, estim_lr0=estim_lr0, estim_lr_coef=estim_lr_coef)
    check_hyperparams(learning_rate=learning_rate, weight_decay=weight_decay, schedules=("learning_rate",))

    def per_step(
        count, *, estim_lr, numerator_weighted, updates, params, grad_sum, params0, eps, weight_decay, **numbers
    ):
        del eps, weight_decay
        real = estim_lr.dtype
        rate, b1, b2, b3, first, coef = (as_hyperparam(numbers[name], real) for name in _PRODIGY)
        c1, c2 = (bias_correction(decay, count).astype(real) for decay in (b1, b2))
        step = estim_lr * rate * safe_sqrt(c2) / c1
        weight = (estim_lr if safeguard_warmup else step) * estim_lr / first
        product = total(lambda g, start, p: jnp.conj(g) * (start - p), updates, params0, params).astype(real)
        length = total(lambda g, s: jnp.abs(b3 * s + weight * g), updates, grad_sum).astype(real)
        numerator = b3 * numerator_weighted + estim_lr / first * step * product
        new = jnp.maximum(estim_lr, coef * safe_divide(numerator, length))
        return {"before": estim_lr, "estim_lr": new, "numerator_weighted": numerator, "step": step, "weight": weight}

    hyperparams = {"learning_rate": learning_rate, "b1": b1, "b2": b2, "b3": b3, "eps": eps}
    tx = from_kernel(
        prodigy_kernel,
        ProdigyState,
        {"exp_avg": Slot(), "exp_avg_sq": Slot(real=True), "grad_sum": Slot(), "params0": START},
        {**hyperparams, "estim_lr0": estim_lr0, "estim_lr_coef": estim_lr_coef, "weight_decay": weight_decay},
        per_step,
        shared={"estim_lr": number(estim_lr0), "numerator_weighted": number(0.0)},
        needs_params="prodigy",
    )
    return assemble(tx, master_dtype=master_dtype)


def dadapt_kernel(g, param, exp_avg, exp_avg_sq, grad_sum, *, b1, b2, b3, eps, weight_decay, step, **_):
    r"""One step of AdamW with D-Adaptation (Defazio & Mishchenko 2023, arXiv:2301.07733, algorithm 5).

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) \eta_t g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \quad
        s_t = \beta_3 s_{t-1} + (1-\beta_3) \eta_t g_t, \quad
        u_t = -\frac{m_t}{\sqrt{v_t} + \epsilon} - \eta_t \lambda w_{t-1}

    Returns:
      ``(u, m, v, s)``.
    """
    exp_avg, exp_avg_sq = b1 * exp_avg + (1 - b1) * step * g, b2 * exp_avg_sq + (1 - b2) * abs_sq(g)
    grad_sum = b3 * grad_sum + (1 - b3) * step * g
    update = -step * weight_decay * param - safe_divide(exp_avg, safe_sqrt(exp_avg_sq) + eps)
    return update, exp_avg, exp_avg_sq, grad_sum


@comparable
def dadapt_adamw(
    learning_rate: ScalarOrSchedule = 1.0,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    estim_lr0: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""AdamW with D-Adaptation, which estimates the learning rate (Defazio & Mishchenko 2023, arXiv:2301.07733).

    .. math::
        d_{t+1} = \max\Big(d_t, \frac{r_t}{(1-\beta_3) \|s_t\|_1}\Big), \quad
        r_t = \beta_3 r_{t-1}
        + (1-\beta_3) \eta_t \Big\langle g_t, \frac{s_{t-1}}{\sqrt{v_{t-1}} + \epsilon} \Big\rangle

    with :math:`\beta_3 = \sqrt{\beta_2}`, the :math:`\eta_t` of ``prodigy`` and the :math:`s_t` of ``dadapt_kernel``;
    arguments as in ``prodigy``.

    Returns:
      A transformation with ``DAdaptAdamWState(exp_avg, exp_avg_sq, grad_sum, estim_lr, numerator_weighted, count)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = dadapt_adamw(estim_lr0=0.1, eps=0.0), jnp.zeros(1)
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0].round(5)
    Array([-0.1], dtype=float32)
    """
    b1, b2 = betas
    check_hyperparams(b1=b1, b2=b2, eps=eps, estim_lr0=estim_lr0)
    check_hyperparams(learning_rate=learning_rate, weight_decay=weight_decay, schedules=("learning_rate",))

    def per_step(
        count, *, learning_rate, b1, b2, eps, estim_lr, numerator_weighted, updates, grad_sum, exp_avg_sq, weight_decay
    ):
        del weight_decay
        real = estim_lr.dtype
        rate, b1, b2, eps = (as_hyperparam(value, real) for value in (learning_rate, b1, b2, eps))
        c1, c2 = (bias_correction(decay, count).astype(real) for decay in (b1, b2))
        b3, step = b2**0.5, estim_lr * rate * safe_sqrt(c2) / c1

        def product(g, s, v):
            return jnp.conj(g) * safe_divide(s, safe_sqrt(v) + eps)

        seen = total(product, updates, grad_sum, exp_avg_sq).astype(real)
        length = total(lambda g, s: jnp.abs(b3 * s + (1 - b3) * step * g), updates, grad_sum).astype(real)
        numerator = b3 * numerator_weighted + (1 - b3) * step * seen
        new = jnp.maximum(estim_lr, safe_divide(numerator, (1 - b3) * length))
        return {"b3": b3, "step": step, "estim_lr": new, "numerator_weighted": numerator}

    hyperparams = {"learning_rate": learning_rate, "b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    tx = from_kernel(
        dadapt_kernel,
        DAdaptAdamWState,
        {"exp_avg": Slot(), "exp_avg_sq": Slot(real=True), "grad_sum": Slot()},
        hyperparams,
        per_step,
        shared={"estim_lr": number(estim_lr0), "numerator_weighted": number(0.0)},
        needs_params="dadapt_adamw",
    )
    return assemble(tx, master_dtype=master_dtype)


def cocob_kernel(g, param, init_particles, cumulative_gradients, scale, subgradients, reward, *, alpha, eps):
    r"""One step of COCOB-Backprop (Orabona & Tommasi 2017, arXiv:1705.07795, algorithm 2).

    .. math::
        L \leftarrow \max(L, |g|), \quad G \leftarrow G + |g|, \quad R \leftarrow \max(R - g (w - w_0), 0), \quad
        \theta \leftarrow \theta - g, \quad w \leftarrow w_0 + \frac{\theta (L + R)}{L \max(G + L, \alpha L)}

    Returns:
      The change of :math:`w`, and :math:`w_0, \theta, L, G, R`.
    """
    del eps
    size = jnp.abs(g)
    scale, subgradients = jnp.maximum(scale, size), subgradients + size
    reward = jnp.maximum(reward - g * (param - init_particles), 0)
    cumulative_gradients = cumulative_gradients - g
    fraction = safe_divide(cumulative_gradients, scale * jnp.maximum(subgradients + scale, alpha * scale))
    change = init_particles - param + fraction * (scale + reward)
    return change, init_particles, cumulative_gradients, scale, subgradients, reward


@comparable
def scale_by_cocob(alpha: Scalar = 100.0, eps: Scalar = 1e-8) -> GradientTransformationExtraArgs:
    """COCOB's whole step, see ``cocob_kernel``; arguments as in ``cocob``.

    Returns:
      A transformation with ``COCOBState(init_particles, cumulative_gradients, scale, subgradients, reward)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = scale_by_cocob(alpha=100.0), jnp.zeros(1)
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([-0.01], dtype=float32)
    """
    check_hyperparams(alpha=alpha, eps=eps)
    names = ("cumulative_gradients", "subgradients", "reward")
    slots = {"init_particles": START, "cumulative_gradients": Slot(), "scale": Slot(fill=eps)}
    slots |= {name: Slot() for name in names}
    order = ("init_particles", "cumulative_gradients", "scale", "subgradients", "reward")
    return from_kernel(
        cocob_kernel,
        COCOBState,
        {name: slots[name] for name in order},
        {"alpha": alpha, "eps": eps},
        needs_params="scale_by_cocob",
    )


@comparable
def cocob(
    learning_rate: ScalarOrSchedule = 1.0,
    alpha: Scalar = 100.0,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """COCOB, coin betting without a learning rate (Orabona & Tommasi 2017, arXiv:1705.07795), see ``cocob_kernel``.

    Parameters are real.

    Args:
      learning_rate: multiplies the gradients, a number >= 0 or a schedule; the paper has 1.
      alpha: bounds the first bets, >= 0.
      eps: first estimate of the largest gradient, >= 0.
      weight_decay: added to the gradient times the weights, a number >= 0 or a schedule.
      mask: True where weights decay, see ``adamw``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> tx, w = cocob(), jnp.zeros(1)
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([-0.01], dtype=float32)
    """
    return assemble(
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate, flip_sign=False),
        scale_by_cocob(alpha, eps),
        master_dtype=master_dtype,
    )


__all__ = ["cocob", "cocob_kernel", "dadapt_adamw", "dadapt_kernel", "prodigy", "prodigy_kernel", "scale_by_cocob"]
