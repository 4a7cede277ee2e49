"""Training programs as parts, faults as changes of these parts, and the case that a diagnosis receives."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nnlearn
from nnlearn.data import Examples
from nnlearn.types import Key, PyTree


class Case(NamedTuple):
    """The arguments of ``nnlearn.diagnose``."""

    train: nnlearn.Train
    hparams: dict[str, Any]
    key: Key
    predict: Callable
    validation: tuple[PyTree, PyTree]
    metric: str
    mode: str


def accuracy(outputs, targets):
    return jnp.mean(jnp.argmax(outputs, -1) == targets)


def binary_accuracy(outputs, targets):
    return jnp.mean((jnp.ravel(outputs) > 0) == (jnp.ravel(targets) > 0.5))


def balanced_accuracy(outputs, targets):
    """The mean of both classes' recalls, for one logit."""
    said, true = jnp.ravel(outputs) > 0, jnp.ravel(targets) > 0.5
    return (jnp.mean(said, where=true) + jnp.mean(~said, where=~true)) / 2


def squared_error(outputs, targets):
    return jnp.mean((jnp.reshape(outputs, jnp.shape(targets)) - targets) ** 2)


def explained(outputs, targets):
    """The share of the targets' variance that the outputs explain, R squared."""
    return 1 - squared_error(outputs, targets) / jnp.mean((targets - jnp.mean(targets, 0)) ** 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A training program in parts. A fault replaces some of them.

    Attributes:
      train, validation, test: pairs of inputs and targets. ``test`` is prepared correctly in every program, faulty or
        not, so it measures what the network has learned.
      init: ``init(key) -> params``.
      apply: ``apply(params, inputs)``, or ``apply(params, inputs, key)`` if ``stochastic``; a key means training.
      loss: ``loss(outputs, targets)``, the mean over a batch.
      tx: ``tx(hparams) -> transformation``.
      measure: ``measure(outputs, targets)``, the metric that the program reports on ``validation``.
      score: the same for ``test``, at most 1, larger is better; by default ``measure``.
      augment: ``augment(key, inputs, targets) -> (inputs, targets)`` in training.
      penalty: ``penalty(params)``, added to the loss.
      evaluate_with: ``evaluate_with(params, inputs)``, the outputs that the program evaluates; by default ``apply``
        without a key.
      generate: ``generate(key, step) -> (inputs, targets)``, for batches that are new at every step.
      layout: of a batch: ``"tuple"``, ``"dict"``, ``"examples"``, or ``"masked"``, with a mask of the last batch.
    """

    name: str
    kind: str
    train: tuple[PyTree, PyTree]
    validation: tuple[PyTree, PyTree]
    test: tuple[PyTree, PyTree]
    init: Callable
    apply: Callable
    loss: Callable
    tx: Callable
    hparams: dict[str, Any]
    steps: int = 300
    batch_size: int = 32
    metric: str = "accuracy"
    mode: str = "max"
    measure: Callable = accuracy
    score: Callable | None = None
    stochastic: bool = False
    shuffle: bool = True
    augment: Callable | None = None
    penalty: Callable | None = None
    evaluate_with: Callable | None = None
    generate: Callable | None = None
    layout: str = "tuple"
    check_every: int = 50
    fault_score: Callable | None = None  # the score where a fault changes what outputs mean

    def with_(self, **changes) -> "Program":
        return dataclasses.replace(self, **changes)

    def rate(self, factor: float) -> "Program":
        """The same program with the learning rate times ``factor``."""
        return self.with_(hparams=self.hparams | {"learning_rate": self.hparams["learning_rate"] * factor})


class Fault(NamedTuple):
    """A mistake in a program.

    Attributes:
      name: what a diagnosis should call it.
      how: the mistake in a few words; with ``name`` and the program's name it identifies the case.
      program: the name of the healthy program.
      change: ``change(program) -> program``.
      also: other names that are right, too.
      hides: whether the mistake leaves the network alone and falsifies what validation reports.
    """

    name: str
    how: str
    program: str
    change: Callable[[Program], Program]
    also: Sequence[str] = ()
    hides: bool = False

    @property
    def title(self) -> str:
        return f"{self.program} / {self.name} / {self.how}"


def pack(layout: str, inputs: PyTree, targets: PyTree) -> PyTree:
    if layout == "dict":
        return {"x": inputs, "y": targets}
    return Examples(inputs, targets) if layout in ("examples", "masked") else (inputs, targets)


def unpack(layout: str, batch: PyTree) -> tuple[PyTree, PyTree]:
    if layout == "dict":
        return batch["x"], batch["y"]
    if layout == "masked":
        return batch.examples.inputs, batch.examples.targets
    return tuple(batch)


def forward(program: Program) -> Callable:
    """``predict`` of a program."""
    if program.stochastic:
        return lambda params, inputs, key=None: program.apply(params, inputs, key)
    return lambda params, inputs: program.apply(params, inputs)


def build(program: Program, key: Key | int = 0) -> Case:
    """The case of a program."""
    predict = forward(program)

    def loss_fn(params, batch, key):
        inputs, targets = unpack(program.layout, batch)
        augment_key, key = jax.random.split(key)
        if program.augment is not None:
            inputs, targets = program.augment(augment_key, inputs, targets)
        outputs = predict(params, inputs, key) if program.stochastic else predict(params, inputs)
        extra = {"where": batch.where} if program.layout == "masked" else {}
        loss = program.loss(outputs, targets, **extra)
        return loss if program.penalty is None else loss + program.penalty(params)

    evaluate_with = program.evaluate_with or predict

    def metrics_fn(params, batch):
        inputs, targets = batch.examples
        return {program.metric: program.measure(evaluate_with(params, inputs), targets)}

    remainder = "mask" if program.layout == "masked" else "drop"
    data = jax.tree.map(jnp.asarray, pack(program.layout, *program.train))
    if program.generate is None:
        batches = nnlearn.shuffled(data, program.batch_size, shuffle=program.shuffle, remainder=remainder)
    else:
        batches = nnlearn.generated(lambda key, step: pack(program.layout, *program.generate(key, step)))
    train = nnlearn.make_train(
        loss_fn,
        program.tx,
        batches,
        program.init,
        steps=program.steps,
        evaluate=nnlearn.evaluation(metrics_fn, program.validation),
        check_every=program.check_every,
    )
    key = jax.random.key(key) if isinstance(key, int) else key
    return Case(train, program.hparams, key, evaluate_with, program.validation, program.metric, program.mode)


def scores(program: Program, keys: jax.Array) -> dict[str, np.ndarray]:
    """For each key the ``true`` score, on ``test``, and the ``reported`` one, on ``validation``."""
    case, predict = build(program), forward(program)
    score = program.fault_score or program.score or program.measure
    reported = program.score or program.measure

    def run(key):
        state, trace = case.train(case.hparams, key)
        params = state.params
        losses = trace.loss
        return {
            "true": score(predict(params, program.test[0]), program.test[1]),
            "reported": reported(case.predict(params, program.validation[0]), program.validation[1]),
            "first_loss": jnp.mean(losses[:3]),
            "last_loss": jnp.mean(losses[-10:]),
        }

    # One after the other: vmapped convolutions are slow on a CPU.
    found = jax.jit(lambda keys: jax.lax.map(run, keys))(keys)
    results = {name: np.asarray(value, np.float64) for name, value in found.items()}
    for name in ("true", "reported"):
        results[name] = np.clip(np.nan_to_num(results[name], nan=0.0), 0.0, 1.0)
    return results
