"""Metrics over a whole set of examples, in batches that fit memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnlearn.data import MaskedBatch, epoch_indices, example_count, take
from nnlearn.settings import comparable
from nnlearn.train.calls import check_takes, hand
from nnlearn.tree import compute_dtype
from nnlearn.types import Batch, Params, Scalar

MetricsFn = Callable[..., dict[str, Scalar]]


@comparable
def evaluation(metrics_fn: MetricsFn, examples: Batch, batch_size: int | None = None) -> Callable[..., dict[str, Any]]:
    """``evaluate(params) -> metrics`` over all examples, for ``make_train`` and ``fit``.

    Args:
      metrics_fn: ``metrics_fn(params, batch) -> {"name": scalar}``, means over the examples of a ``MaskedBatch`` that
        count; may ask for ``hparams``, ``model_state`` and ``opt_state`` by name. NaN is passed on.
      examples: a pytree of arrays of shape (size, ...).
      batch_size: examples at once; None for all.

    Returns:
      A pure function. Batches weigh by the examples that count, so that every example weighs the same.

    >>> def metrics_fn(params, batch):
    ...     return {"mean": jnp.mean(params * batch.examples, where=batch.where)}
    >>> evaluation(metrics_fn, jnp.arange(5.0), batch_size=2)(3.0)
    {'mean': Array(6., dtype=float32)}
    """
    check_takes(metrics_fn, "metrics_fn", "params, batch", "hparams", "model_state", "opt_state")
    size = example_count(examples)
    indices_nb, where_nb = epoch_indices(None, size, batch_size or size, shuffle=False)

    def evaluate(params: Params, hparams=None, model_state=None, opt_state=None) -> dict[str, jax.Array]:
        offered = {"hparams": hparams, "model_state": model_state, "opt_state": opt_state}

        def on_batch(row):
            indices_b, where_b = row
            metrics = hand(metrics_fn, params, MaskedBatch(take(examples, indices_b), where_b), **offered)
            if not isinstance(metrics, dict):
                raise TypeError(f"metrics_fn must return a dict of scalars, got {type(metrics).__name__}")
            arrays = {name: jnp.asarray(value) for name, value in metrics.items()}
            return {name: array.astype(compute_dtype(array.dtype)) for name, array in arrays.items()}

        if len(indices_nb) == 1:
            return on_batch((indices_nb[0], where_nb[0]))
        count_n = jnp.sum(where_nb, axis=1)
        means_n = jax.lax.map(on_batch, (indices_nb, where_nb))
        return {name: jnp.sum(mean_n * count_n) / size for name, mean_n in means_n.items()}

    return evaluate


__all__ = ["evaluation"]
