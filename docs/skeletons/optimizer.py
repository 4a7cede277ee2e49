"""Skeleton of a new method: copy the kernel and its transformation into a file of ``nnlearn/transforms/``, the recipe
into one of ``nnlearn/optimizers/``, and rename. It runs as it stands: RMSProp without the frills.
"""

from optax import ScaleByRmsState  # where optax has the method, its state; else a NamedTuple with a field for each slot

from nnlearn.checks import check_decay, check_dtype, check_nonnegative
from nnlearn.settings import comparable
from nnlearn.transforms import Slot, assemble, from_kernel, scale_by_learning_rate
from nnlearn.tree import abs_sq, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, Scalar, ScalarOrSchedule


# 1. The mathematics: arrays in, arrays out, one leaf at a time; all in one precision, float32 or better.
def skeleton_kernel(g, nu, *, decay, eps):
    r"""One step of <method> (<authors> <year>, arXiv:<number>, <algorithm or equation>).

    .. math:: v_t = \beta v_{t-1} + (1-\beta) |g_t|^2, \quad u_t = g_t / (\sqrt{v_t} + \epsilon)

    Returns:
      ``(u, v)``: the update, then each slot's new value in the order of ``slots`` below.
    """
    nu = (1 - decay) * abs_sq(g) + decay * nu
    return safe_divide(g, safe_sqrt(nu) + eps), nu


# 2. The transformation: check what is known, name the slots, hand over.
@comparable
def scale_by_skeleton(
    decay: Scalar = 0.9, eps: Scalar = 1e-8, *, nu_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    """<Method>'s direction, see ``skeleton_kernel``.

    Args:
      decay: decay rate of the mean of squares, in [0, 1).
      eps: added to the denominator, >= 0.
      nu_dtype: what the mean is stored in; None for the parameter's dtype, float32 at least.

    Raises:
      ValueError: a number is out of its range.

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
        # per_step=lambda count, decay, **_: {"correction": 1 - decay**count},  # what all leaves share, once a step
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


# 4. The proof: a ``Case`` in ``tests/contract.py``, with every number away from its default. That one entry runs all of
#    the contract. Then the name in both ``__init__.py`` files and in the README's table.
