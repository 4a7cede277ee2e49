"""Skeleton of a new method: copy the kernel and its transformation into a file of ``nnlearn/transforms/``, the recipe
into one of ``nnlearn/optimizers/``, and rename. It runs as it stands: RMSProp in its plainest form.
"""

from optax import ScaleByRmsState  # optax's state where it has the method; else a NamedTuple with a field per slot

from nnlearn.checks import check_decay, check_dtype, check_nonnegative
from nnlearn.settings import comparable
from nnlearn.transforms import Slot, assemble, from_kernel, scale_by_learning_rate
from nnlearn.tree import abs_sq, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, Scalar, ScalarOrSchedule


# 1. The mathematics of one leaf: arrays to arrays, all in one precision, float32 or better.
def skeleton_kernel(g, nu, *, decay, eps):
    r"""One step of <method> (<authors> <year>, arXiv:<number>, <algorithm or equation>).

    .. math:: v_t = \beta v_{t-1} + (1-\beta) |g_t|^2, \quad u_t = g_t / (\sqrt{v_t} + \epsilon)

    Returns:
      ``(u, v)``: the update, then the new value of each slot in the order of ``slots`` below.
    """
    nu = (1 - decay) * abs_sq(g) + decay * nu
    return safe_divide(g, safe_sqrt(nu) + eps), nu


# 2. The transformation: check the arguments, name the slots, call ``from_kernel``.
@comparable
def scale_by_skeleton(
    decay: Scalar = 0.9, eps: Scalar = 1e-8, *, nu_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    """<Method>'s direction, see ``skeleton_kernel``.

    Args:
      decay: decay rate of the mean of squared gradients, in [0, 1).
      eps: added to the denominator, >= 0.
      nu_dtype: dtype in which the mean is stored; None for the parameter's dtype, float32 at least.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: if a hyper-parameter is out of range.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_skeleton(decay=0.75)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([2.], dtype=float32)
    """
    check_decay("decay", decay)
    check_nonnegative("eps", eps)
    return from_kernel(
        skeleton_kernel,
        ScaleByRmsState,
        slots={"nu": Slot(dtype=check_dtype("nu_dtype", nu_dtype), real=True)},  # real: a mean of squared magnitudes
        hyperparams={"decay": decay, "eps": eps},
        # per_step=lambda count, decay, **_: {"correction": 1 - decay**count},  # computed once a step for all leaves
    )


# 3. The recipe: a chain of transformations.
@comparable
def skeleton(
    learning_rate: ScalarOrSchedule,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    *,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """<Method> (<authors> <year>). <Equation, arguments, errors, example>.

    >>> import jax.numpy as jnp
    >>> tx = skeleton(0.1, decay=0.75)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([-0.2], dtype=float32)
    """
    return assemble(
        scale_by_skeleton(decay, eps, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


# 4. Tests: a ``Case`` in ``tests/contract.py``, with every hyper-parameter different from its default. This entry runs
#    the whole contract. Then export the name in both ``__init__.py`` files.
