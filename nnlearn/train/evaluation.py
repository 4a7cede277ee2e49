"""Metrics over a set of examples, computed in batches."""

from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from nnlearn.calls import check_takes, hand
from nnlearn.data import MaskedBatch, epoch_indices, example_count, take
from nnlearn.settings import comparable
from nnlearn.sums import long_sum
from nnlearn.train.explain import METRICS_CURE, explaining_batch
from nnlearn.tree import compute_dtype
from nnlearn.types import Batch, Params, PyTree, Scalar

MetricsFn = Callable[..., Mapping[str, Scalar]]


class Evaluate(Protocol):
    """``evaluate(params) -> metrics``, the function that ``evaluation`` returns."""

    def __call__(
        self, params: Params, hparams: PyTree = None, model_state: PyTree = None, opt_state: PyTree = None
    ) -> dict[str, jax.Array]: ...


@comparable
def evaluation(
    metrics_fn: MetricsFn,
    examples: Batch,
    batch_size: int | None = None,
    *,
    batch_weight: Callable[[MaskedBatch], Scalar] | None = None,
) -> Evaluate:
    """``evaluate(params) -> metrics`` over all examples, for ``make_train`` and ``fit``.

    Args:
      metrics_fn: ``metrics_fn(params, batch) -> {"name": scalar}``, means over the examples of a ``MaskedBatch`` that
        count. It may also take ``hparams``, ``model_state`` and ``opt_state``. NaN propagates to the result.
      examples: a pytree of arrays of shape (size, ...).
      batch_size: the number of examples in a batch; None for all.
      batch_weight: the weight of a batch, a scalar >= 0, if metrics are means over something other than examples:
        ``lambda batch: jnp.sum(batch.examples["mask"] * batch.where[:, None])`` for tokens. The result is then the mean
        over all tokens, whatever the batch size. None for the number of examples that count.

    Returns:
      A pure function. A batch of weight 0 has no influence, whatever its metrics are.

    Raises:
      TypeError: if ``metrics_fn`` or ``batch_weight`` does not take the arguments above.
      ValueError: if ``batch_weight`` does not return a scalar.

    >>> def metrics_fn(params, batch):
    ...     return {"mean": jnp.mean(params * batch.examples, where=batch.where)}
    >>> evaluation(metrics_fn, jnp.arange(5.0), batch_size=2)(3.0)
    {'mean': Array(6., dtype=float32)}
    """
    check_takes(metrics_fn, "metrics_fn", "params, batch", "hparams", "model_state", "opt_state")
    if batch_weight is not None:
        check_takes(batch_weight, "batch_weight", "batch")
    size = example_count(examples)
    indices_nb, where_nb = epoch_indices(None, size, batch_size or size, shuffle=False)

    def evaluate(
        params: Params, hparams: PyTree = None, model_state: PyTree = None, opt_state: PyTree = None
    ) -> dict[str, jax.Array]:
        offered = {"hparams": hparams, "model_state": model_state, "opt_state": opt_state}

        def on_batch(row):
            indices_b, where_b = row
            batch = MaskedBatch(take(examples, indices_b), where_b)
            with explaining_batch(batch, METRICS_CURE):
                metrics = hand(metrics_fn, params, batch, **offered)
            if not isinstance(metrics, Mapping):
                raise TypeError(f"metrics_fn must return a dict of scalars, got {type(metrics).__name__}")
            arrays = {name: jnp.asarray(value) for name, value in metrics.items()}
            means = {name: array.astype(compute_dtype(array.dtype)) for name, array in arrays.items()}
            return means, _weight(batch, batch_weight)

        if len(indices_nb) == 1:
            return on_batch((indices_nb[0], where_nb[0]))[0]
        means_n, weight_n = jax.lax.map(on_batch, (indices_nb, where_nb))

        def mean(mean_n):
            part_n = weight_n.astype(mean_n.dtype)
            return long_sum(jnp.where(part_n == 0, 0, mean_n * part_n)) / long_sum(part_n)

        return {name: mean(mean_n) for name, mean_n in means_n.items()}

    return evaluate


def _weight(batch: MaskedBatch, batch_weight: Callable[[MaskedBatch], Scalar] | None) -> jax.Array:
    if batch_weight is None:
        return jnp.sum(batch.where, dtype=jnp.float32)
    weight = batch_weight(batch)
    if jnp.shape(weight) != ():
        raise ValueError(f"batch_weight must return a scalar, got an array of shape {jnp.shape(weight)}: sum it")
    return jnp.asarray(weight, jnp.float32)


__all__ = ["evaluation"]
