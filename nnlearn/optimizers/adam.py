"""Adam and its relatives as whole optimizers; the equations are in ``nnlearn.transforms.adam``."""

from nnlearn.settings import comparable
from nnlearn.transforms.adam import (
    scale_by_adam,
    scale_by_adamax,
    scale_by_amsgrad,
    scale_by_belief,
    scale_by_radam,
    scale_by_yogi,
)
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule


@comparable
def adam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Adam (Kingma & Ba 2015, arXiv:1412.6980).

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \quad
        w_t = w_{t-1} - \alpha \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t) + \bar\epsilon} + \epsilon}

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      b1: decay rate of the first moment, :math:`\beta_1` in [0, 1).
      b2: decay rate of the second moment, :math:`\beta_2` in [0, 1).
      eps: added outside of the square root, >= 0.
      eps_root: added inside of the square root, >= 0.
      mu_dtype: dtype of the first moment; None for the parameter's dtype, float32 at least.
      nesterov: look one step ahead (Dozat 2016).
      nu_dtype: dtype of the second moment; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of range.

    >>> import jax, jax.numpy as jnp
    >>> from nnlearn import apply_updates
    >>> tx, w = adam(0.5), jnp.array([1.0, 2.0])
    >>> state = tx.init(w)
    >>> for _ in range(100):
    ...     updates, state = tx.update(jax.grad(lambda w: jnp.sum(w**2))(w), state, w)
    ...     w = apply_updates(w, updates)
    >>> bool(jnp.all(jnp.abs(w) < 0.01))
    True
    """
    return assemble(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def nadam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Adam with Nesterov's momentum (Dozat 2016); arguments as in ``adam``.

    .. math:: \hat m_t = \beta_1 m_t / (1-\beta_1^{t+1}) + (1-\beta_1) g_t / (1-\beta_1^t)

    takes the place of Adam's debiased moment.

    >>> import jax.numpy as jnp
    >>> tx = nadam(0.1)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0].round(4)
    Array([-0.1474], dtype=float32)
    """
    moments = {"nesterov": nesterov, "nu_dtype": nu_dtype, "master_dtype": master_dtype}
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, **moments)


@comparable
def adamw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
    *,
    nesterov: bool = False,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

    .. math:: w_t = w_{t-1} - \alpha (u_t + \lambda w_{t-1})

    with Adam's :math:`u_t`. As in PyTorch the decay is multiplied by the learning rate. Other arguments as in ``adam``.

    Args:
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      mask: a tree of booleans like the parameters, or a function from parameters to one: True where weights decay.

    >>> import jax.numpy as jnp
    >>> tx, w = adamw(0.1, weight_decay=0.5), jnp.array([2.0])
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([-0.2], dtype=float32)
    """
    return assemble(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def nadamw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
    *,
    nesterov: bool = True,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """AdamW with Nesterov's momentum (Dozat 2016); arguments as in ``adamw``.

    >>> import jax.numpy as jnp
    >>> tx, w = nadamw(0.1, weight_decay=0.5), jnp.array([2.0])
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0].round(4)
    Array([-0.2474], dtype=float32)
    """
    moments = {"nesterov": nesterov, "nu_dtype": nu_dtype, "master_dtype": master_dtype}
    return adamw(learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, **moments)


@comparable
def amsgrad(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Adam whose step sizes never grow (Reddi et al. 2018, arXiv:1904.09237); arguments as in ``adam``.

    Args:
      bias_correction_mu: divide the first moment by its bias.
      bias_correction_nu: divide the second moment by its bias before the maximum is taken.

    >>> import jax.numpy as jnp
    >>> tx = amsgrad(0.1)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([-0.1], dtype=float32)
    """
    return assemble(
        scale_by_amsgrad(b1, b2, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def adamax(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Adam with the maximum norm (Kingma & Ba 2015, algorithm 2); arguments as in ``adam``.

    >>> import jax.numpy as jnp
    >>> tx = adamax(0.1)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([-0.1], dtype=float32)
    """
    return assemble(
        scale_by_adamax(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def adamaxw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """AdaMax (Kingma & Ba 2015) with decoupled weight decay; arguments as in ``adamw``.

    >>> import jax.numpy as jnp
    >>> tx, w = adamaxw(0.1, weight_decay=0.5), jnp.array([2.0])
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([-0.2], dtype=float32)
    """
    return assemble(
        scale_by_adamax(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def adabelief(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    *,
    nesterov: bool = False,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Adam scaled by its surprise (Zhuang et al. 2020, arXiv:2010.07468); arguments as in ``adam``.

    >>> import jax.numpy as jnp
    >>> tx = adabelief(0.1, b1=0.5)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([-0.2], dtype=float32)
    """
    return assemble(
        scale_by_belief(b1, b2, eps, eps_root, nesterov=nesterov, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def radam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Rectified Adam, a warm-up built in (Liu et al. 2020, arXiv:1908.03265); arguments as in ``adam``.

    Args:
      threshold: length of the simple moving average, in steps, from which the variance is trusted.

    >>> import jax.numpy as jnp
    >>> tx = radam(0.1)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0].round(4)
    Array([-0.4], dtype=float32)
    """
    return assemble(
        scale_by_radam(b1, b2, eps, eps_root, threshold, nesterov=nesterov, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def yogi(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-3,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Adam with an additive second moment (Zaheer et al. 2018); arguments as in ``adam``.

    >>> import jax.numpy as jnp
    >>> tx = yogi(0.1)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0].round(3)
    Array([-0.1], dtype=float32)
    """
    return assemble(
        scale_by_yogi(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )
