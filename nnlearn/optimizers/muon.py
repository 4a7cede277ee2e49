"""Muon: momentum whose matrices are made orthogonal, with AdamW for everything that is no matrix."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from optax import chain
from optax.contrib import GaLoreDimensionNumbers, MuonDimensionNumbers, MuonState

from nnlearn.optimizers.adam import adamw
from nnlearn.settings import comparable
from nnlearn.transforms.averages import debiased, momentum_corrections, moving_average
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.groups import by_label
from nnlearn.transforms.orthogonal import JORDAN, PRESETS, Preconditioning, newton_schulz
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import is_function, path_name
from nnlearn.types import (
    DTypeLike,
    EmptyState,
    GradientTransformation,
    GradientTransformationExtraArgs,
    MaskOrFn,
    PyTree,
    Scalar,
    ScalarOrSchedule,
)

Coefficients = Sequence[Scalar] | Sequence[Sequence[Scalar]]
# words in the names of leaves that are no maps from inputs to outputs
TABLES = frozenset("embed embedding embeddings wte wpe pos position positions head unembed".split())  # noqa: SIM905
DimensionNumbers = Any  # MuonDimensionNumbers, a tree of them, or a function from parameters to one


def axes_of(dims: MuonDimensionNumbers | None, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The batch, reduction and output axes of a leaf."""
    if ndim < 2 or (dims is None and ndim != 2):
        raise ValueError(
            f"Muon needs matrices, got an array of {ndim} axes: give weight_dimension_numbers, or leave it to Adam"
        )
    rows, columns = (
        tuple(axis % ndim for axis in ((axes,) if isinstance(axes, int) else axes))
        for axes in (dims or MuonDimensionNumbers())
    )
    if set(rows) & set(columns):
        raise ValueError(f"reduction_axis and output_axis must be disjoint, got {dims} for an array of {ndim} axes")
    return tuple(axis for axis in range(ndim) if axis not in rows + columns), rows, columns


def on_matrices(function: Callable[[jax.Array], jax.Array], x: jax.Array, dims: MuonDimensionNumbers | None):
    """Run a function on each matrix of an array."""
    batch, rows, columns = axes_of(dims, x.ndim)
    order = batch + rows + columns
    if order == (0, 1):
        return function(x)
    moved = jnp.transpose(x, order)
    matrices = jnp.reshape(moved, tuple(math.prod(x.shape[axis] for axis in axes) for axes in (batch, rows, columns)))
    result = jnp.reshape(jax.vmap(function)(matrices), moved.shape)
    return jnp.transpose(result, sorted(range(x.ndim), key=order.__getitem__))


def matrix_rules(params: PyTree) -> PyTree:
    """Which leaves Muon takes, and which of their axes are inputs and outputs, by the names and shapes of leaves.

    Embeddings, positions and heads, recognised by their names, and leaves of fewer than two axes are left to AdamW. A
    leaf of two axes is a matrix, one of three a stack of matrices, as scanned layers are, and one of four or five a
    convolution kernel whose last axis is the outputs.

    Args:
      params: a tree of arrays or shapes.

    Returns:
      A tree for ``muon_weight_dimension_numbers``, which also takes this function itself.

    >>> shapes = {"embed": jnp.zeros((9, 4)), "layers": {"w": jnp.zeros((3, 4, 4)), "b": jnp.zeros((3, 4))}}
    >>> matrix_rules(shapes)["layers"]["w"], matrix_rules(shapes)["embed"]
    (MuonDimensionNumbers(reduction_axis=1, output_axis=2), None)
    """

    def rule(path, leaf):
        names = path_name(path).lower().replace("-", "_").split("/")
        ndim, last = jnp.ndim(leaf), names[-1]
        words = {word for name in names for word in name.split("_")}
        if words & TABLES:
            return None
        if ndim < 2 or words & {"bias", "scale", "norm"} or last in ("b", "g"):
            return None
        if ndim == 2:
            return MuonDimensionNumbers(0, 1)
        return MuonDimensionNumbers(1, 2) if ndim == 3 else MuonDimensionNumbers(tuple(range(ndim - 1)), ndim - 1)

    return jax.tree.map_with_path(rule, params)


def muon_kernel(
    dims, g, mu, *, beta, eps, ns_coeffs, ns_steps, c1, c1_next, nesterov=True, adaptive=False, preconditioning
):
    r"""One step of Muon on a whole leaf (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    .. math:: m_t = \beta m_{t-1} + (1-\beta) g_t, \quad u_t = \operatorname{NewtonSchulz}(\hat m_t)

    with the debiased moment, Nesterov's by default. ``adaptive`` multiplies by :math:`\langle \hat m_t, u_t \rangle`,
    the dual norm (Bernstein & Newhouse 2024, arXiv:2409.20325).

    Returns:
      ``(u, m)``.
    """
    mu = moving_average(beta, g, mu)
    direction = debiased(g, mu, decay=beta, c1=c1, c1_next=c1_next, nesterov=nesterov)
    update = on_matrices(lambda x: newton_schulz(x, ns_coeffs, ns_steps, eps, preconditioning), direction, dims)
    if adaptive:
        update = jnp.sum(jnp.conj(direction) * update) * update
    return update, mu


def _is_dims(node: Any) -> bool:
    return node is None or isinstance(node, MuonDimensionNumbers | GaLoreDimensionNumbers)


def spread_over(spec: DimensionNumbers, tree: PyTree) -> PyTree:
    """The dimension numbers of each leaf, hashable, from a tree, a prefix of one or a function of the parameters."""
    found = spec(tree) if is_function(spec) else spec

    def hashable(axes):
        return axes if isinstance(axes, int) else tuple(axes)

    def over(dims, part):
        dims = dims and MuonDimensionNumbers(*map(hashable, dims))
        return jax.tree.map(lambda _: dims, part)

    return jax.tree.map(over, found, tree, is_leaf=_is_dims)


@comparable
def scale_by_muon(
    ns_coeffs: Coefficients = JORDAN,
    ns_steps: Scalar = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    weight_dimension_numbers: DimensionNumbers | None = None,
) -> GradientTransformationExtraArgs:
    """Muon's direction, see ``muon_kernel``; arguments as in ``muon``. All equal matrices run as one batch.

    Args:
      weight_dimension_numbers: ``MuonDimensionNumbers`` for each leaf; None takes every leaf to be a matrix.

    Returns:
      A transformation with ``MuonState(count, mu, ns_coeffs)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range, ``preconditioning`` is unknown, ``ns_coeffs`` has the wrong
        shape, or ``ns_steps`` is not a whole number, or is traced although ``ns_coeffs`` has a row for each step; in
        ``update``, if a leaf is not a matrix.

    >>> tx, gradient = scale_by_muon(), jnp.array([[3.0, 0.0], [0.0, 4.0]])
    >>> jnp.abs(tx.update(gradient, tx.init(gradient))[0]) > 0.6
    Array([[ True, False], [False, True]], dtype=bool)
    """
    check_hyperparams(beta=beta, eps=eps, ns_steps=ns_steps)
    if preconditioning not in ("frobenius", "spectral", "aol", "schatten"):
        raise ValueError(f"preconditioning must be frobenius, spectral, aol or schatten, got {preconditioning!r}")
    coefficients = jnp.asarray(ns_coeffs, float)
    if coefficients.ndim not in (1, 2) or coefficients.shape[-1] != 3:
        raise ValueError(f"ns_coeffs must have shape (3,) or (steps, 3), got {coefficients.shape}")
    static = isinstance(ns_steps, int | float)
    if static and int(ns_steps) != ns_steps:
        raise ValueError(f"ns_steps must be a whole number, got {ns_steps}")
    if coefficients.ndim == 2:
        if not static:
            raise ValueError("ns_steps must be a Python number where ns_coeffs has a row for each step")
        coefficients = coefficients[max(len(coefficients) - int(ns_steps), 0) :]
    hyperparams: dict[str, Any] = {"beta": beta, "eps": eps}
    options: dict[str, Any] = {"nesterov": nesterov, "adaptive": adaptive, "preconditioning": preconditioning}
    if static:
        options["ns_steps"] = int(ns_steps)
    else:
        hyperparams["ns_steps"] = ns_steps
    return from_kernel(
        functools.partial(muon_kernel, **options),
        MuonState,
        {"mu": Slot(dtype=as_storage("mu_dtype", mu_dtype))},
        hyperparams,
        lambda count, beta, **_: momentum_corrections(count, beta),
        shared={"ns_coeffs": coefficients},
        whole_leaf=True,
        stack_equal=True,
        settings=functools.partial(spread_over, weight_dimension_numbers),
    )


@comparable
def scale_by_shape(
    weight_dimension_numbers: DimensionNumbers | None = None, consistent_rms: Scalar | None = None
) -> GradientTransformationExtraArgs:
    r"""Scale each matrix by :math:`\sqrt{\max(1, outputs / inputs)}`, or by :math:`r \sqrt{\max(inputs, outputs)}`.

    Args:
      weight_dimension_numbers: see ``scale_by_muon``.
      consistent_rms: :math:`r`, which makes the step's size the same for all shapes; 0.2 is that of AdamW (Liu et al.
        2025, arXiv:2502.16982). None for the first rule.

    Returns:
      A transformation without state.

    Raises:
      ValueError: if ``consistent_rms`` is negative or not finite; in ``update``, if a leaf is not a matrix.

    >>> tx, gradient = scale_by_shape(), jnp.ones((1, 4))
    >>> tx.update(gradient, tx.init(gradient))[0]
    Array([[2., 2., 2., 2.]], dtype=float32)
    """
    check_hyperparams(consistent_rms=consistent_rms)

    def kernel(dims, update, *, consistent_rms=None):
        _, *axes = axes_of(dims, update.ndim)
        inputs, outputs = (math.prod(update.shape[axis] for axis in some) for some in axes)
        if consistent_rms is None:
            return (math.sqrt(max(1, outputs / max(inputs, 1))) * update,)
        return (consistent_rms * math.sqrt(max(inputs, outputs)) * update,)

    return from_kernel(
        kernel,
        EmptyState,
        {},
        {} if consistent_rms is None else {"consistent_rms": consistent_rms},
        whole_leaf=True,
        settings=functools.partial(spread_over, weight_dimension_numbers),
    )


def coefficients_of(ns_coeffs: Coefficients | str) -> Coefficients:
    """The coefficients of a preset, or those that are given."""
    if isinstance(ns_coeffs, str):
        if ns_coeffs not in PRESETS:
            raise ValueError(f"ns_coeffs must be numbers or one of {sorted(PRESETS)}, got {ns_coeffs!r}")
        return PRESETS[ns_coeffs]
    return ns_coeffs


def by_kind(spec: DimensionNumbers | None, matrices, others) -> GradientTransformationExtraArgs:
    """One transformation for the leaves that ``spec`` takes, another for the rest."""

    def labels(params):
        if spec is None:
            return jax.tree.map(lambda leaf: "muon" if jnp.ndim(leaf) == 2 else "adam", params)
        found = spread_over(spec, params)
        return jax.tree.map(lambda dims: "adam" if dims is None else "muon", found, is_leaf=_is_dims)

    return by_label({"muon": matrices, "adam": others}, labels)


def with_adamw(
    directions: Sequence[GradientTransformation],
    spec: DimensionNumbers | None,
    learning_rate: ScalarOrSchedule,
    eps: Scalar,
    *,
    weight_decay: ScalarOrSchedule,
    weight_decay_mask: MaskOrFn,
    adam_b1: Scalar,
    adam_b2: Scalar,
    adam_weight_decay: ScalarOrSchedule,
    adam_learning_rate: ScalarOrSchedule | None,
    mu_dtype: DTypeLike | None,
    nu_dtype: DTypeLike | None,
    master_dtype: DTypeLike | None,
    adam_eps_root: Scalar = 0.0,
    nesterov: bool = False,
) -> GradientTransformationExtraArgs:
    """Decay and a rate after the directions of matrices, and AdamW for the leaves that ``spec`` does not take.

    Raises:
      ValueError: if a hyper-parameter of AdamW is out of its range.
    """
    check_hyperparams(adam_b1=adam_b1, adam_b2=adam_b2, adam_eps_root=adam_eps_root)
    may_be = {"adam_weight_decay": adam_weight_decay, "adam_learning_rate": adam_learning_rate}
    check_hyperparams(**may_be, schedules=tuple(may_be))
    matrices = chain(
        *directions, add_decayed_weights(weight_decay, weight_decay_mask), scale_by_learning_rate(learning_rate)
    )
    others = adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1,
        adam_b2,
        eps,
        adam_eps_root,
        mu_dtype,
        adam_weight_decay,
        nesterov=nesterov,
        nu_dtype=nu_dtype,
    )
    return assemble(by_kind(spec, matrices, others), master_dtype=master_dtype)


@comparable
def muon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Coefficients | str = JORDAN,
    ns_steps: Scalar = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = None,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: ScalarOrSchedule = 0.0,
    adam_learning_rate: ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: DimensionNumbers | None = None,
    consistent_rms: Scalar | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Muon for matrices, AdamW for the rest (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    .. math:: w_t = w_{t-1} - \alpha (\sqrt{\max(1, outputs / inputs)} u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``muon_kernel``. Packed or not, all matrices of one shape run as one batch.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      ns_coeffs: coefficients of Newton-Schulz, three numbers or three for each step, or ``"standard"``, ``"dion"``
        or ``"polar_express"``.
      ns_steps: steps of Newton-Schulz; of coefficients for each step, the last so many are used. A traced number of
        steps has no derivative in reverse mode.
      beta: :math:`\beta` in [0, 1).
      eps: added to the norm of a matrix, and Adam's eps.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      weight_decay_mask: True where matrices decay, see ``adamw``.
      mu_dtype: dtype of the momentum; None for the parameter's dtype, float32 at least.
      nesterov: look one step ahead, in AdamW too.
      adaptive: multiply by the dual norm, see ``muon_kernel``.
      preconditioning: see ``newton_schulz``.
      adam_b1, adam_b2, adam_eps_root, adam_weight_decay: see ``adamw``.
      adam_learning_rate: learning rate of AdamW; None for ``learning_rate``.
      muon_weight_dimension_numbers: ``optax.contrib.MuonDimensionNumbers`` for each leaf that Muon takes, as a tree, a
        prefix of one, or a function from parameters to one; None for leaves that AdamW takes. The default is every
        leaf of two axes, inputs first.
      consistent_rms: see ``scale_by_shape``.
      nu_dtype: dtype of Adam's second moment; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of its range, or a leaf that Muon takes is no matrix.

    >>> tx, w = muon(0.1), {"w": jnp.eye(2), "b": jnp.zeros(1)}
    >>> updates, _ = tx.update({"w": -3 * jnp.eye(2), "b": jnp.ones(1)}, tx.init(w), w)
    >>> updates["b"].round(4), bool(updates["w"][0, 0] > 0.06)
    (Array([-0.1474], dtype=float32), True)
    """
    spec = muon_weight_dimension_numbers
    direction = scale_by_muon(
        coefficients_of(ns_coeffs),
        ns_steps,
        beta,
        eps,
        mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        preconditioning=preconditioning,
        weight_dimension_numbers=spec,
    )
    return with_adamw(
        [direction, scale_by_shape(spec, consistent_rms)],
        spec,
        learning_rate,
        eps,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps_root=adam_eps_root,
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        master_dtype=master_dtype,
    )


__all__ = [
    "axes_of",
    "by_kind",
    "coefficients_of",
    "matrix_rules",
    "muon",
    "muon_kernel",
    "on_matrices",
    "scale_by_muon",
    "scale_by_shape",
    "spread_over",
    "with_adamw",
]
