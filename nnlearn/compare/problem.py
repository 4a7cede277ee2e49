"""The task that all rivals are given: data, network, first parameters and losses."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nnlearn import losses
from nnlearn.compare.settings import Settings
from nnlearn.data import Examples
from nnlearn.datasets import DataBundle, load
from nnlearn.models import mlp
from nnlearn.types import Model, Params


class Problem(NamedTuple):
    """A data set with a network for it.

    Attributes:
      bundle: the data, on the host.
      model: the network.
      metric: what the test part is judged by, ``"accuracy"`` or ``"mse"``.
      example_loss: from outputs (n, features) and targets to losses (n,), nnlearn's.
      optax_loss: the same, optax's.
    """

    bundle: DataBundle
    model: Model
    metric: str
    example_loss: Callable
    optax_loss: Callable

    def evaluate(self, params: Params, examples: Examples) -> tuple[jax.Array, jax.Array]:
        """Mean loss and metric over a part of the data, both scalars."""
        outputs = self.model.apply(params, examples.inputs)
        loss = jnp.mean(self.example_loss(outputs, examples.targets))
        if self.metric == "mse":
            return loss, loss
        return loss, jnp.mean(jnp.argmax(outputs, axis=-1) == examples.targets)


def _squared(squared_error: Callable) -> Callable:
    return lambda outputs, targets: jnp.sum(squared_error(outputs, targets), axis=-1)


def make_problem(settings: Settings) -> Problem:
    """The problem that the settings name; classes are learned by cross-entropy, numbers by squared error."""
    bundle = load(settings.data)
    features = bundle.train.inputs.shape[-1]
    if bundle.task == "classification":
        outputs, metric = len(bundle.classes), "accuracy"
        ours, theirs = (
            losses.softmax_cross_entropy_with_integer_labels,
            optax.softmax_cross_entropy_with_integer_labels,
        )
    else:
        outputs, metric = bundle.train.targets.shape[-1], "mse"
        ours, theirs = _squared(losses.squared_error), _squared(optax.squared_error)
    return Problem(bundle, mlp((features, *settings.hidden, outputs)), metric, ours, theirs)


def first_params(problem: Problem, seeds: int) -> Params:
    """The first parameters of every seed, stacked along a leading axis."""
    return jax.vmap(lambda seed: problem.model.init(jax.random.key(seed)))(jnp.arange(seeds))
