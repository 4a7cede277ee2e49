"""The problem that all optimizers share: data, network, initial parameters and losses."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nnlearn import losses
from nnlearn.compare.options import CompareOptions
from nnlearn.data import Examples
from nnlearn.datasets import DataBundle, load
from nnlearn.models import mlp
from nnlearn.types import Model, Params


class Problem(NamedTuple):
    """A data set with a network for it.

    Attributes:
      bundle: the data, on the host.
      model: the network.
      metric: the metric on the test part, ``"accuracy"`` or ``"mse"``.
      example_loss: nnlearn's loss, from outputs (n, features) and targets to losses (n,).
      optax_loss: optax's loss, with the same arguments.
    """

    bundle: DataBundle
    model: Model
    metric: str
    example_loss: Callable
    optax_loss: Callable

    loss = "validation loss"  # the name of what chooses the learning rate

    @property
    def source(self) -> str:
        """Where the data are from."""
        return self.bundle.source

    def evaluate(self, params: Params, examples: Examples) -> tuple[jax.Array, jax.Array]:
        """The mean loss and the metric over a part of the data, both scalars."""
        outputs = self.model.apply(params, examples.inputs)
        loss = jnp.mean(self.example_loss(outputs, examples.targets))
        if self.metric == "mse":
            return loss, loss
        return loss, jnp.mean(jnp.argmax(outputs, axis=-1) == examples.targets)


def _squared(squared_error: Callable) -> Callable:
    return lambda outputs, targets: jnp.sum(squared_error(outputs, targets), axis=-1)


def make_problem(options: CompareOptions) -> Problem:
    """The problem for these options; classification uses cross-entropy and regression squared error."""
    bundle = load(options.data)
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
    return Problem(bundle, mlp((features, *options.hidden, outputs)), metric, ours, theirs)


def first_params(problem: Problem, seeds: int) -> Params:
    """The initial parameters of every seed, stacked along a leading axis."""
    return jax.vmap(lambda seed: problem.model.init(jax.random.key(seed)))(jnp.arange(seeds))
