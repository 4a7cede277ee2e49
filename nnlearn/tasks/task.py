"""A task: data, a model, a loss and a number to reach; any optimizer, sweep or diagnosis can run on any of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from nnlearn.checks import check_count
from nnlearn.data import batch_count, example_count
from nnlearn.optimizers import adamw
from nnlearn.schedules import warmup_cosine_decay_schedule
from nnlearn.train.evaluation import MetricsFn, evaluation
from nnlearn.train.run import Train, make_train
from nnlearn.train.sampler import Sampler, shuffled
from nnlearn.types import Batch, GradientTransformation, LossFn, Model, Params, PyTree, StatefulModel


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Something to learn, whole: nothing else is needed to train on it and to say how well that went.

    Attributes:
      name: what ``load_task`` knows it by.
      train, validation, test: pytrees of arrays whose leading axis counts the examples: to learn from, to choose
        settings by, and to report.
      model: a ``Model`` or a ``StatefulModel``.
      loss_fn: ``loss_fn(params, batch, key)`` of a ``MaskedBatch``, see ``make_step``; it takes ``model_state`` where
        the model has some.
      metrics_fn: ``metrics_fn(params, batch) -> {"name": scalar}``, means over the examples of a ``MaskedBatch`` that
        count; it takes ``model_state`` where the model has some.
      metric: the one of them that decides.
      goal: whether more of it is better, ``"max"``, or less, ``"min"``.
      target: the value of it that counts as solved.
      baselines: what it is for predictors that learn nothing, or little, by name.
      make_tx: ``make_tx(hparams) -> tx``, an optimizer that does well here.
      hparams: settings for it that reach the target.
      batch_size, epochs: for these settings.
      source, licence: of the data.
      show: ``show(params, model_state) -> text``, some of the network's answers for people to read, or None.
    """

    name: str
    train: Batch
    validation: Batch
    test: Batch
    model: Model | StatefulModel
    loss_fn: LossFn
    metrics_fn: MetricsFn
    metric: str
    goal: Literal["max", "min"]
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
        """Shuffled batches of the training part, the last one of an epoch masked."""
        return shuffled(self.train, self.batch_size)

    def make_train(self, make_tx: Any = None, **options: Any) -> Train:
        """The run of this task as a pure function, ``train(hparams, key) -> (state, trace)``.

        Args:
          make_tx: ``make_tx(hparams) -> tx``, or an optimizer; None for the task's own.
          **options: of ``nnlearn.make_train``; where they say nothing, the task's ``epochs``, and its validation part
            evaluated after each.
        """
        if "steps" not in options:
            options.setdefault("epochs", self.epochs)
        options.setdefault("evaluate", self.evaluation("validation"))
        return make_train(self.loss_fn, make_tx or self.make_tx, self.sampler, self.model.init, **options)

    def evaluation(self, part: Literal["train", "validation", "test"], batch_size: int | None = None) -> Callable:
        """``evaluate(params) -> metrics`` over one part, in batches of four times the training ones."""
        examples = getattr(self, part)
        return evaluation(self.metrics_fn, examples, min(batch_size or 4 * self.batch_size, example_count(examples)))

    def evaluate(self, params: Params, model_state: PyTree = None, part: str = "test") -> dict[str, float]:
        """The metrics of trained parameters on one part, as Python numbers."""
        evaluate = jax.jit(self.evaluation(part))
        return {name: float(value) for name, value in evaluate(params, model_state=model_state).items()}

    def solved(self, metrics: Mapping[str, float]) -> bool:
        """Whether metrics reach the target."""
        value = metrics[self.metric]
        return bool(value >= self.target if self.goal == "max" else value <= self.target)


def warmed_adamw(hparams: Mapping[str, Any], *, size: int, batch_size: int, epochs: int) -> GradientTransformation:
    """AdamW under a tenth of warm-up and a cosine, over a run of so many epochs.

    Args:
      hparams: ``learning_rate``, the highest, and ``weight_decay``.
      size: examples of the training part.
      batch_size, epochs: of the run.
    """
    steps = epochs * batch_count(size, batch_size)
    warmup = -(-steps // 10)
    schedule = warmup_cosine_decay_schedule(0.0, hparams["learning_rate"], warmup, steps + 1)
    return adamw(schedule, weight_decay=hparams["weight_decay"])
