"""Skeleton of a new method: copy this file to ``nnlearn/optimizers/<method>.py`` and rename it.

It runs without changes, as the simplest form of RMSProp. A transformation that several optimizers share belongs in
``nnlearn/transforms/``.
"""

from optax import ScaleByRmsState  # optax's state if it has the method; else a NamedTuple with a field for each slot

from nnlearn.settings import comparable
from nnlearn.transforms import Slot, assemble, from_kernel, scale_by_learning_rate
from nnlearn.transforms.averages import moving_average
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import as_storage
from nnlearn.tree import abs_sq, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, Scalar, ScalarOrSchedule


# 1. The kernel, from arrays to arrays of one leaf, all in one precision, float32 or better.
def skeleton_kernel(g, nu, *, decay, eps):
    r"""One step of <method> (<authors> <year>, arXiv:<number>, <algorithm or equation>).

    .. math:: v_t = \beta v_{t-1} + (1-\beta) |g_t|^2, \quad u_t = g_t / (\sqrt{v_t} + \epsilon)

    Returns:
      ``(u, v)``: the update, then the new value of each slot in the order of ``slots`` below.
    """
    nu = moving_average(decay, abs_sq(g), nu)
    return safe_divide(g, safe_sqrt(nu) + eps), nu


# 2. The transformation: check hyper-parameters by their standard names, name the slots, call ``from_kernel``.
@comparable
def scale_by_skeleton(
    decay: Scalar = 0.9, eps: Scalar = 1e-8, *, nu_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    """<Method>'s direction, see ``skeleton_kernel``; arguments as in ``skeleton``.

    Returns:
      A transformation with ``ScaleByRmsState(nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_skeleton(decay=0.75)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([2.], dtype=float32)
    """
    check_hyperparams(decay=decay, eps=eps)  # a new name needs a line in transforms/ranges.py
    return from_kernel(
        skeleton_kernel,
        ScaleByRmsState,
        slots={"nu": Slot(dtype=as_storage("nu_dtype", nu_dtype), real=True)},  # real: a mean of squared magnitudes
        hyperparams={"decay": decay, "eps": eps},  # numbers, arrays, tracers, or schedules if the state has a counter
        # per_step=lambda count, decay, **_: {"correction": 1 - decay**count},  # computed once per step for all leaves
        # shared={"scale": 1.0},  # fields of the state with one array for the whole tree, which per_step may update
        # needs_params="scale_by_skeleton",  # kernel(g, param, nu, ...)
        # whole_leaf=True,  # for norms, rows, matrices: packed parameters come in stacks of equal leaves; see muon.py
        # Slot(shape=lambda shape: shape[:-1])  # state of another shape than its leaf; see adafactor.py
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
    """<Method> (<authors> <year>). <Equation>

    Args:
      learning_rate: a number >= 0 or a schedule.
      decay: decay rate of the mean of squares, in [0, 1).
      eps: added to the denominator, >= 0.
      nu_dtype: dtype of the mean of squares; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

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


# 4. Tests: a ``Case`` in ``tests/contract.py`` with every hyper-parameter different from its default and at least one
#    reference: a library, a NumPy loop, PyTorch. This entry runs the whole contract.
# 5. Export the names: a line for each in ``nnlearn/optimizers/__init__.py``, from which ``nnlearn`` takes them.
# 6. Add the paper and the other lines that ``CONTRIBUTING.md`` lists under "Add a method".
