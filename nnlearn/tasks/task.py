"""A task: data, a model, a loss and a target; any optimizer or sweep can run on any task."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from nnlearn.checks import check_count
from nnlearn.data import batch_count, example_count
from nnlearn.models.transformer import LanguageModel
from nnlearn.optimizers import adamw
from nnlearn.schedules import warmup_cosine_decay_schedule
from nnlearn.train.evaluation import MetricsFn, evaluation
from nnlearn.train.run import Train, make_train
from nnlearn.train.sampler import Sampler, shuffled
from nnlearn.types import Batch, GradientTransformation, LossFn, Model, Params, PyTree, StatefulModel

Part = Literal["train", "validation", "test"]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A complete learning problem: everything needed to train a model and to evaluate it.

    Attributes:
      name: its name for ``load_task``.
      train, validation, test: the parts of the data, pytrees of arrays with the examples along their leading axis.
      model: the network.
      loss_fn: ``loss_fn(params, batch, key)`` of a ``MaskedBatch``, see ``make_step``; it takes ``model_state`` if the
        model has one.
      metrics_fn: ``metrics_fn(params, batch) -> {"name": scalar}``, means over the valid examples of a
        ``MaskedBatch``; it takes ``model_state`` if the model has one.
      metric: the name of the metric that measures success.
      mode: whether a small ("min") or a large ("max") metric is better.
      target: the value of the metric that counts as success.
      baselines: by name, the metric of predictors that learn little or nothing.
      make_tx: ``make_tx(hparams) -> tx``, an optimizer that suits the task.
      hparams: hyper-parameters for ``make_tx`` that reach the target.
      batch_size, epochs: the batch size and the number of epochs for these hyper-parameters.
      source, licence: the source and the licence of the data.
      show: ``show(params, model_state) -> text``, a readable sample of the network's outputs, or None.
    """

    name: str
    train: Batch
    validation: Batch
    test: Batch
    model: Model[Any] | StatefulModel | LanguageModel
    loss_fn: LossFn
    metrics_fn: MetricsFn
    metric: str
    mode: Literal["min", "max"]
    target: float
    baselines: Mapping[str, float]
    make_tx: Callable[[PyTree], GradientTransformation]
    hparams: Mapping[str, Any]
    batch_size: int
    epochs: int
    source: str
    licence: str
    show: Callable[[Params, PyTree], str] | None = None

    def __post_init__(self):
        check_count("batch_size", self.batch_size)
        check_count("epochs", self.epochs)

    @property
    def sampler(self) -> Sampler:
        """Shuffled batches of the training part; the last batch of an epoch is masked."""
        return shuffled(self.train, self.batch_size)

    def make_train(
        self,
        make_tx: Callable[[Any], GradientTransformation] | GradientTransformation | None = None,
        **options: Any,
    ) -> Train:
        """The run of this task as a pure function, ``train(hparams, key) -> (state, trace)``.

        Args:
          make_tx: ``make_tx(hparams) -> tx``, or an optimizer; None for the task's own.
          **options: arguments of ``nnlearn.make_train``. By default the run has the task's ``epochs`` and evaluates the
            validation part after each.
        """
        if "steps" not in options:
            options.setdefault("epochs", self.epochs)
        options.setdefault("evaluate", self.evaluation("validation"))
        return make_train(self.loss_fn, make_tx or self.make_tx, self.sampler, self.model.init, **options)

    def evaluation(self, part: Part, batch_size: int | None = None) -> Callable[..., dict[str, jax.Array]]:
        """``evaluate(params) -> metrics`` over one part, by default in batches of four times the training size."""
        examples = getattr(self, part)
        return evaluation(self.metrics_fn, examples, min(batch_size or 4 * self.batch_size, example_count(examples)))

    def evaluate(self, params: Params, model_state: PyTree = None, part: Part = "test") -> dict[str, float]:
        """The metrics of parameters on one part, as Python numbers."""
        evaluate = jax.jit(self.evaluation(part))
        return {name: float(value) for name, value in evaluate(params, model_state=model_state).items()}

    def solved(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metrics reach the target."""
        value = metrics[self.metric]
        return bool(value >= self.target if self.mode == "max" else value <= self.target)


def warmed_adamw(hparams: Mapping[str, Any], *, size: int, batch_size: int, epochs: int) -> GradientTransformation:
    """AdamW with a cosine schedule after a warmup over a tenth of the run.

    Args:
      hparams: the peak ``learning_rate`` and ``weight_decay``.
      size: number of examples of the training part.
      batch_size, epochs: batch size and number of epochs of the run.
    """
    steps = epochs * batch_count(size, batch_size)
    warmup = -(-steps // 10)
    schedule = warmup_cosine_decay_schedule(0.0, hparams["learning_rate"], warmup, steps + 1)
    return adamw(schedule, weight_decay=hparams["weight_decay"])
