"""The gradients of single examples: all of them, only their norms, or their clipped mean.

The gradient of an example is that of the loss on a batch of this example alone, with a random key of its own.
"""

import dataclasses
import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import NUMERIC, check_nonnegative, check_number, known
from nnlearn.data import MaskedBatch, example_count
from nnlearn.gradients.ghost import Dense, Program
from nnlearn.packing import unpack
from nnlearn.settings import comparable
from nnlearn.sharding.axes import along_first_axes, automatic, lie_like
from nnlearn.tree import as_hyperparam, compute_dtype, global_norm, path_name, real_dtype
from nnlearn.types import Batch, Grads, Key, LossFn, Params, PyTree, Scalar

NOISE_STREAM = 0x7D9F1E55  # an arbitrary constant, above any batch size: example i's key may be fold_in(key, i)


def per_example_grads(loss_fn: LossFn, params: Params, batch: Batch, key: Key | None = None) -> Grads:
    """The gradient of every example, ``g_b = d loss_fn(params, batch[b : b + 1], key_b) / d params``.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``; the mean over a batch.
      params: the parameters, as a tree or ``Packed``.
      batch: a pytree of arrays of shape (batch_size, ...), or a ``MaskedBatch`` of them.
      key: a random key; example b gets ``jax.random.split(key, batch_size)[b]``. None if the loss draws nothing.

    Returns:
      A tree like ``params``, each leaf of shape (batch_size, *leaf.shape). The gradient of an example that is masked
      out is zero.

    Raises:
      TypeError: a parameter is not floating or complex, or the loss is not a real scalar.
      ValueError: the arrays of ``batch`` have no common leading axis.

    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
    >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.array([1.0, 1.0])}
    >>> per_example_grads(loss_fn, jnp.zeros(2), batch).tolist()
    [[-2.0, 0.0], [0.0, -4.0]]
    """
    return _by_example(_grads, batch, loss_fn, params, batch, key)


def _grads(loss_fn: LossFn, params: Params, batch: Batch, key: Key | None) -> Grads:
    examples, where_b, keys_b = _parts(batch, key)
    params = _prepare(params, examples)

    def loss_of(params, example, key):
        return _loss_and_aux(loss_fn, unpack(params), _alone(batch, example), key)[0]

    grads = jax.vmap(jax.grad(loss_of), in_axes=(None, 0, 0))(params, examples, keys_b)
    if not isinstance(batch, MaskedBatch):
        return grads
    return jax.tree.map(lambda grad_b: _select(where_b, grad_b), grads)


def _by_example(function: Callable, batch: Batch, *arguments: Any) -> Any:
    """``function(*arguments)``, whose results have an axis of examples first, cut as that of the batch is.

    JAX refuses to map a gather or a reshape over an axis that is cut over Explicit mesh axes.
    """
    return automatic(function, *arguments, spec=lambda result: along_first_axes(batch, result)[:1])


def per_example_norms(loss_fn: LossFn, params: Params, batch: Batch, key: Key | None = None) -> jax.Array:
    """The Euclidean norm of every example's gradient, in about the time of one gradient of the whole batch.

    A weight that the loss uses once, in a matrix product ``y = x W``, has the gradient ``x^T delta`` with
    ``delta = d loss / d y``, whose norm needs neither a sum over the batch nor the gradient itself::

        |g|^2 = |x|^2 |delta|^2                                         if x and delta are vectors
        |g|^2 = sum_{t, u} (x_t . x_u) (delta_t . delta_u)              if they are sequences

    The gradients of all other parameters (biases, scales, embeddings, convolutions, weights that are used twice or
    inside of a scan or of a function with a derivative of its own) are worked out for each example and take
    batch_size times the memory of the parameter.

    Args:
      loss_fn, params, batch, key: as in ``per_example_grads``.

    Returns:
      ``norms_b`` of shape (batch_size,), in float32 or better; 0 for an example that is masked out.

    Raises:
      TypeError: a parameter is not floating or complex, or the loss is not a real scalar.
      ValueError: the arrays of ``batch`` have no common leading axis.

    Source: Goodfellow 2015, arXiv:1510.01799; for sequences Li et al. 2022, arXiv:2110.05679, and, for when the
    gradient itself is cheaper, Bu et al. 2022, arXiv:2205.10683.

    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
    >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.array([1.0, 1.0])}
    >>> per_example_norms(loss_fn, jnp.zeros(2), batch).tolist()
    [2.0, 4.0]
    """
    return _by_example(_norms, batch, loss_fn, unpack(params), batch, key)


def _norms(loss_fn: LossFn, params: Params, batch: Batch, key: Key | None) -> jax.Array:
    return _differentiate(loss_fn, params, batch, key).norms_b


def gradient_moments(
    loss_fn: LossFn, params: Params, batch: Batch, key: Key | None = None
) -> tuple[Grads, jax.Array, jax.Array]:
    """The sum of the examples' gradients, the sum of their squared norms, and how many count; in one pass.

    Args:
      loss_fn, params, batch, key: as in ``per_example_grads``.

    >>> batch = jnp.array([[3.0, 4.0], [0.0, 1.0]])
    >>> gradient_moments(lambda params, batch, key: jnp.mean(batch @ params), jnp.ones(2), batch)
    (Array([3., 5.], dtype=float32), Array(26., dtype=float32), Array(2., dtype=float32))
    """
    return automatic(_moments, loss_fn, _prepare(unpack(params), batch), batch, key)


def _moments(loss_fn: LossFn, tree: Params, batch: Batch, key: Key | None) -> tuple[Grads, jax.Array, jax.Array]:
    pieces = _differentiate(loss_fn, tree, batch, key)
    leaves = pieces.weighted_sum(jnp.ones_like(pieces.norms_b), pieces.where_b)
    count = jnp.sum(pieces.where_b).astype(jnp.float32)
    return jax.tree.unflatten(jax.tree.structure(tree), leaves), jnp.sum(jnp.square(pieces.norms_b)), count


@comparable
def clipped_value_and_grad(
    loss_fn: LossFn, clip_norm: Scalar, noise_multiplier: Scalar = 0.0, *, batch_size: Scalar | None = None
) -> "ClippedGradient":
    """The mean of the examples' clipped gradients plus noise: the gradient of DP-SGD.

    With ``g_b`` the gradient of example b, and n examples that count::

        grads = (sum_b min(1, clip_norm / |g_b|) g_b + noise_multiplier * clip_norm * normal) / n

    so that, but for rounding, no example moves the sum by more than ``clip_norm``. An example whose gradient is not
    finite adds 0 to the sum, and still counts in n: its gradient has no direction to keep, and a bound that one bad
    example breaks is none. What leaves the function besides ``grads`` (the loss, aux) is not private; nor is n, the
    number of examples that count. No accountant is included: the privacy that a run spends depends on how its batches
    are drawn, see ``poisson_sampled``. In ``make_step(value_and_grad=...)`` with ``microbatches`` or an ``axis_name``
    the noise is added once, to the whole batch's sum. Called by hand in ``jax.shard_map``, every device clips, and adds
    noise to, the mean of its own examples.

    One forward and one backward pass for the whole batch: the sum is put together from the layers' inputs and deltas
    that the norms were worked out from, so nothing of size batch_size x parameters is held for dense layers.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``; the mean over a batch.
      clip_norm: the largest norm of one example's gradient, > 0; may be traced.
      noise_multiplier: the noise's standard deviation in units of ``clip_norm``, >= 0; may be traced. 0 adds none.
      batch_size: what to divide by in place of n, > 0; may be traced. With ``poisson_sampled`` it is the expected size,
        which is the same whoever takes part, as n is not.

    Returns:
      ``f(params, batch, key) -> ((loss, aux), grads)``, like ``jax.value_and_grad(loss_fn, has_aux=True)``. ``loss`` is
      the mean of the examples' losses; ``aux`` is what ``loss_fn`` says beside the loss about the whole batch, or None;
      unless it is used, a compiled program does not work it out. ``grads`` is like ``params``, a tree or ``Packed``;
      zero, and the noise for n = 1, where no example counts.

    Raises:
      TypeError: a number is no number; in ``f``, as ``per_example_norms`` says.
      ValueError: ``clip_norm`` is not above 0 and finite, or ``noise_multiplier`` is negative or not finite; in ``f``,
        there is noise to draw and no key, or the arrays of ``batch`` have no common leading axis.

    Source: Abadi et al. 2016, arXiv:1607.00133; the single pass is that of Bu et al. 2023, arXiv:2210.00038.

    >>> f = clipped_value_and_grad(lambda params, batch, key: jnp.mean(batch @ params), clip_norm=1.0)
    >>> (loss, aux), grads = f(jnp.ones(2), jnp.array([[3.0, 4.0], [0.0, 0.5]]), None)
    >>> float(loss), aux, grads.tolist()
    (3.75, None, [0.30, 0.65])
    """
    check_number("clip_norm", clip_norm, low=0.0, low_open=True, high=math.inf, high_open=True)
    check_nonnegative("noise_multiplier", noise_multiplier)
    if batch_size is not None:
        check_number("batch_size", batch_size, low=0.0, low_open=True, high=math.inf, high_open=True)
    return ClippedGradient(loss_fn, clip_norm, noise_multiplier, batch_size)


@dataclasses.dataclass(frozen=True, eq=False)
class ClippedGradient:
    """The gradient of DP-SGD as a function, and in the two halves that parts of a batch need.

    ``over_part`` clips and averages the gradients of one part; ``finish`` adds the noise, once, to the average over all
    parts. Made by ``clipped_value_and_grad``.
    """

    loss_fn: LossFn
    clip_norm: Scalar
    noise_multiplier: Scalar
    batch_size: Scalar | None

    def __call__(
        self, params: Params, batch: Batch, key: Key | None = None, loss_scale: Scalar | None = None
    ) -> tuple[tuple[jax.Array, PyTree], Grads]:
        """``((loss, aux), grads)`` of a whole batch."""
        tree, to_stored = jax.vjp(unpack, _prepare(params, batch))
        value, grads = self.over_part(tree, batch, key, loss_scale)
        count = jnp.sum(batch.where) if isinstance(batch, MaskedBatch) else example_count(batch)
        return value, to_stored(self.finish(grads, count, key))[0]

    def over_part(
        self, params: Params, batch: Batch, key: Key | None = None, loss_scale: Scalar | None = None
    ) -> tuple[tuple[jax.Array, PyTree], Grads]:
        """``((loss, aux), grads)`` of a part of a batch, the mean over its examples, without noise.

        Args:
          params: the parameters, as a tree.
          batch, key: the part and its key.
          loss_scale: by how much the loss is multiplied while it is differentiated, for float16. Clipping and the
            result are those of the loss itself. A number that is not finite may then come from the scale, and makes
            the result infinite, so that ``dynamic_loss_scale`` skips the step, unless the scale is 1.
        """
        tree = _prepare(params, batch)
        loss, leaves, more = automatic(_clipped_sum, self.loss_fn, tree, batch, key, self.clip_norm, loss_scale)
        leaves = map(lie_like, leaves, jax.tree.leaves(tree))
        # The effects of the loss occur here, once for the batch: its examples are worked out without them.
        aux = None if more is None else _loss_and_aux(self.loss_fn, tree, batch, key)[1]
        return (loss, aux), jax.tree.unflatten(jax.tree.structure(tree), leaves)

    def finish(self, grads: Grads, count: Scalar, key: Key | None) -> Grads:
        """Add the noise to the average over all parts, and divide by ``batch_size`` in place of ``count``.

        Args:
          grads: the average of what ``over_part`` returned, each part weighing by its examples that count.
          count: the examples that count in all parts.
          key: the whole batch's key, the same on all devices.
        """
        leaves, treedef = jax.tree.flatten(grads)
        dtype = compute_dtype(*(real_dtype(leaf.dtype) for leaf in leaves))
        number = jnp.asarray(count).astype(dtype)
        size = jnp.maximum(number, 1) if self.batch_size is None else as_hyperparam(self.batch_size, dtype)
        if self.batch_size is not None:
            leaves = [(_wide(leaf) * (number / size)).astype(leaf.dtype) for leaf in leaves]
        if not known(self.noise_multiplier) or float(self.noise_multiplier) != 0:
            if key is None:
                raise ValueError(
                    f"noise_multiplier={self.noise_multiplier} draws noise, so key must be a random key, got None"
                )
            scale = as_hyperparam(self.noise_multiplier, dtype) * as_hyperparam(self.clip_norm, dtype) / size
            leaves = _add_noise(leaves, jnp.asarray(scale, dtype), jax.random.fold_in(key, NOISE_STREAM))
        return treedef.unflatten(leaves)


def _clipped_sum(loss_fn, tree, batch, key, clip_norm, loss_scale) -> tuple[jax.Array, list, tuple | None]:
    """The mean loss, the gradient's leaves, and whether there is more than a loss: an empty tuple, or None."""
    pieces = _differentiate(loss_fn, tree, batch, key, loss_scale)
    count = jnp.maximum(jnp.sum(pieces.where_b), 1).astype(pieces.norms_b.dtype)
    bound = as_hyperparam(clip_norm, pieces.norms_b.dtype)
    finite_b = jnp.isfinite(pieces.norms_b)
    norms_b = jnp.where(finite_b, pieces.norms_b, 0)
    leaves = pieces.weighted_sum(bound / jnp.maximum(norms_b, bound) / count, pieces.where_b & finite_b)
    if loss_scale is not None:
        overflow = jnp.where(jnp.all(finite_b) | (jnp.asarray(loss_scale) <= 1), 0, jnp.inf)
        leaves = [(_wide(leaf) / as_hyperparam(loss_scale, _wide(leaf).dtype) + overflow) for leaf in leaves]
        leaves = [leaf.astype(like.dtype) for leaf, like in zip(leaves, pieces.leaves, strict=True)]
    loss = jnp.sum(_select(pieces.where_b, pieces.losses_b)) / count.astype(pieces.losses_b.dtype)
    return loss, leaves, () if pieces.has_more else None


class _Pieces(NamedTuple):
    """What the norms, and any weighted sum, of the examples' gradients are put together from.

    Attributes:
      losses_b, norms_b, where_b: each example's loss, gradient norm (0 if masked out), and whether it counts.
      dense, inputs_b, deltas_b: leaves that matrix products use, the products' other operands, and their deltas.
      grads_b: the examples' gradients of other leaves, by the leaf's number.
      leaves: all parameters.
      has_more: whether the loss does more than return a number: it has an aux beside it, or effects.
    """

    losses_b: jax.Array
    norms_b: jax.Array
    where_b: jax.Array
    dense: list[Dense]
    inputs_b: list[jax.Array]
    deltas_b: list[jax.Array]
    grads_b: dict[int, jax.Array]
    leaves: list[jax.Array]
    has_more: bool

    def weighted_sum(self, factors_b: jax.Array, chosen_b: jax.Array) -> list[jax.Array]:
        """The sum over the chosen examples of factor times gradient, for every leaf."""

        def weigh(array_b):
            wide = compute_dtype(array_b.dtype)
            factors = factors_b.astype(real_dtype(wide)).reshape(-1, *(1,) * (array_b.ndim - 1))
            return _select(chosen_b, factors * array_b.astype(wide))

        sums = list(map(jnp.zeros_like, self.leaves))
        for number, grad_b in self.grads_b.items():
            sums[number] = jnp.sum(weigh(grad_b), axis=0).astype(grad_b.dtype)
        for dense, x_b, delta_b in zip(self.dense, self.inputs_b, self.deltas_b, strict=True):
            # both, because 0 times an input that is not finite is not 0
            x_b, delta_b = _select(chosen_b, x_b), weigh(delta_b).astype(delta_b.dtype)
            sums[dense.leaf] = dense.gradient(self.leaves[dense.leaf], x_b, delta_b)
        return sums


def _differentiate(
    loss_fn: LossFn, params: Params, batch: Batch, key: Key | None, loss_scale: Scalar | None = None
) -> _Pieces:
    """One forward and one backward pass over all examples, each on its own, without the loss's effects.

    Deltas and gradients are those of ``loss_scale`` times the loss; the squared norms are the loss's own.
    """
    examples, where_b, keys_b = _parts(batch, key)
    leaves, treedef = jax.tree.flatten(_prepare(params, examples))

    def loss_of(leaves, example, key):
        return _loss_and_aux(loss_fn, treedef.unflatten(leaves), _alone(batch, example), key)

    data_b = examples, keys_b
    program = Program(loss_of, leaves, *jax.tree.map(lambda array: array[0], data_b))
    shifts = [_varying_like(shift, examples) for shift in program.shifts]

    def differentiate(data):
        def run(shifts, others):
            replaced = leaves.copy()
            for number, leaf in others.items():
                replaced[number] = leaf
            return program.run(replaced, jax.tree.leaves(data), shifts)

        others = {number: leaves[number] for number in program.others}
        loss, backward, inputs = jax.vjp(run, shifts, others, has_aux=True)
        factor = jnp.ones_like(loss) if loss_scale is None else jnp.asarray(loss_scale).astype(loss.dtype)
        deltas, grads = backward(_varying_like(factor, examples))
        norms = [dense.norm(x, delta) for dense, x, delta in zip(program.dense, inputs, deltas, strict=True)]
        return loss, global_norm([*norms, *grads.values()]), inputs, deltas, grads

    losses_b, norms_b, inputs_b, deltas_b, grads_b = jax.vmap(differentiate)(data_b)
    norms_b = _select(where_b, norms_b)
    if loss_scale is not None:
        norms_b = norms_b / jnp.asarray(loss_scale).astype(norms_b.dtype)
    pieces = losses_b, norms_b, where_b, program.dense, inputs_b, deltas_b, grads_b, leaves, program.has_more
    return _Pieces(*pieces)


def _parts(batch: Batch, key: Key | None) -> tuple[PyTree, jax.Array, jax.Array | None]:
    """The examples, which of them count, and a key for each."""
    examples, where_b = batch if isinstance(batch, MaskedBatch) else (batch, None)
    examples = jax.tree.map(jnp.asarray, examples)
    size = example_count(examples)
    where_b = jnp.ones((size,), bool) if where_b is None else jnp.asarray(where_b, bool)
    if where_b.shape != (size,):
        raise ValueError(f"where must have shape {(size,)}, one for each example, got {where_b.shape}")
    return examples, where_b, None if key is None else jax.random.split(key, size)


def _alone(batch: Batch, example: PyTree) -> Batch:
    """A batch of one example. It counts, so that its mean is not 0 / 0; one that is masked out is dropped later."""
    alone = jax.tree.map(lambda array: array[None], example)
    return MaskedBatch(alone, jnp.ones((1,), bool)) if isinstance(batch, MaskedBatch) else alone


def _loss_and_aux(loss_fn: LossFn, params: Params, batch: Batch, key: Key | None) -> tuple[Any, PyTree]:
    result = loss_fn(params, batch, key)
    loss, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(loss, NUMERIC):
        raise TypeError(f"loss_fn must return a real scalar, or (loss, aux); got {type(loss).__name__}")
    return jnp.asarray(loss), aux


def _prepare(params: Params, examples: PyTree) -> Params:
    """The parameters as arrays that have gradients, ready to be differentiated for each example alone."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(f"parameter {path_name(path)!r} is {jnp.result_type(leaf).name}, which has no gradient")
    return jax.tree.map(lambda leaf: _varying_like(jnp.asarray(leaf), examples), params)


def _select(chosen_b: jax.Array, array_b: jax.Array) -> jax.Array:
    """Zero for examples that are not chosen, whatever they hold."""
    return jnp.where(chosen_b.reshape(-1, *(1,) * (array_b.ndim - 1)), array_b, jnp.zeros_like(array_b))


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(compute_dtype(array.dtype))


def _varying_like(leaf: jax.Array, examples: PyTree) -> jax.Array:
    """Mark the leaf as another on every device that holds other examples, in ``shard_map``.

    The derivative with respect to a leaf that is the same everywhere would be summed over the devices, and so be no
    longer that of one example.
    """
    axes = {axis for array in jax.tree.leaves(examples) for axis in _varying_axes(array)} - set(_varying_axes(leaf))
    return jax.lax.pcast(leaf, tuple(sorted(axes)), to="varying") if axes else leaf


def _varying_axes(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _add_noise(leaves: list[jax.Array], scale: jax.Array, key: Key) -> list[jax.Array]:
    """Adds normal numbers of that standard deviation, to the real and the imaginary part where there are two."""
    parts = [2 if jnp.iscomplexobj(leaf) else 1 for leaf in leaves]
    ends = list(accumulate(leaf.size * part for leaf, part in zip(leaves, parts, strict=True)))
    # drawn at once, because every draw of its own takes a second to compile
    flat = scale * jax.random.normal(key, (ends[-1] if ends else 0,), scale.dtype)

    def add(leaf, part, end):
        noise = flat[end - part * leaf.size : end].reshape(part, *leaf.shape)
        noise = jax.lax.complex(*noise) if part == 2 else noise[0]
        return (leaf.astype(compute_dtype(leaf.dtype)) + noise).astype(leaf.dtype)

    return list(map(add, leaves, parts, ends))


__all__ = ["ClippedGradient", "clipped_value_and_grad", "gradient_moments", "per_example_grads", "per_example_norms"]
