"""Classification and regression, as ``loss_fn`` and ``metrics_fn`` of a model with or without state."""

from collections.abc import Callable

import jax.numpy as jnp

from nnlearn.calls import hand
from nnlearn.losses import absolute_error, cross_entropy, squared_error
from nnlearn.losses.arguments import weighted_mean
from nnlearn.settings import comparable
from nnlearn.types import Model, StatefulModel

Objective = tuple[Callable, Callable]


@comparable
def classification(model: Model | StatefulModel, **options) -> Objective:
    """Cross-entropy as the loss, ``loss`` and ``accuracy`` as metrics. Batches are ``MaskedBatch(Examples, where)``.

    Args:
      model: maps inputs (batch, ...) to logits (batch, classes).
      **options: arguments of ``cross_entropy`` for the loss; the metrics do not use them.
    """

    def loss(logits, batch, **options):
        return cross_entropy(logits, batch.examples.targets, where=batch.where, **options)

    def metrics(logits, batch):
        right = jnp.argmax(logits, axis=-1) == batch.examples.targets
        return {"loss": loss(logits, batch), "accuracy": weighted_mean(right.astype(jnp.float32), None, batch.where)}

    return _objective(model, lambda logits, batch: loss(logits, batch, **options), metrics)


@comparable
def regression(model: Model | StatefulModel, elementwise: Callable = squared_error) -> Objective:
    """A mean of elementwise errors as the loss, ``loss`` and ``absolute_error`` as metrics.

    Args:
      model: maps inputs (batch, ...) to outputs of the targets' shape.
      elementwise: ``elementwise(outputs, targets) -> errors``.
    """

    def mean(errors, batch):
        return weighted_mean(jnp.mean(errors, axis=range(1, errors.ndim)), None, batch.where)

    def loss(outputs, batch):
        return mean(elementwise(outputs, batch.examples.targets), batch)

    def metrics(outputs, batch):
        return {
            "loss": loss(outputs, batch),
            "absolute_error": mean(absolute_error(outputs, batch.examples.targets), batch),
        }

    return _objective(model, loss, metrics)


def _objective(model, loss, metrics) -> Objective:
    if isinstance(model, StatefulModel):

        def stateful_loss_fn(params, batch, key, model_state):
            offered = {"where": batch.where}  # padding must not enter the batch statistics
            outputs, model_state = hand(model.apply, params, model_state, batch.examples.inputs, key, **offered)
            return loss(outputs, batch), {}, model_state

        def stateful_metrics_fn(params, batch, model_state):
            return metrics(model.apply(params, model_state, batch.examples.inputs)[0], batch)

        return stateful_loss_fn, stateful_metrics_fn

    def loss_fn(params, batch, key):
        return loss(model.apply(params, batch.examples.inputs, key), batch)

    def metrics_fn(params, batch):
        return metrics(model.apply(params, batch.examples.inputs), batch)

    return loss_fn, metrics_fn
