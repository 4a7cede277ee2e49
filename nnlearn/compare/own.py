"""The comparison on a user's own run: its model, loss, batches and evaluation, with every optimizer and rate."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnlearn import optimizers
from nnlearn.checks import as_key
from nnlearn.compare.options import CompareOptions
from nnlearn.compare.runs import Curves, Tick
from nnlearn.figures.page.record import is_loss, mode_of, ranking_metric
from nnlearn.train import make_step
from nnlearn.train.named import load_run
from nnlearn.train.run import Train
from nnlearn.train.verdict import measure


@dataclasses.dataclass(frozen=True, eq=False)
class OwnProblem:
    """A user's run, cut to equally long stretches between checks, without its rules.

    Attributes:
      name: how it is called.
      train: the run.
      hparams: those of its file or module; the learning rate of the comparison is added.
      loss, metric: the metrics that become the validation loss and the result, chosen by their names: a loss of
        ``evaluate``, or ``train_loss`` if it has none; and a score such as ``accuracy``, or the same loss.
    """

    name: str
    train: Train[Any]
    hparams: Any
    loss: str
    metric: str

    @property
    def source(self) -> str:
        return self.name


def make_own_problem(options: CompareOptions) -> OwnProblem:
    """The problem of ``options.problem``.

    Raises:
      ValueError: if there is no such run, or it has a custom step, which has no optimizer to replace.
    """
    name = options.problem or ""
    found = load_run(name)
    train, hparams = found.train, found.names.get("hparams", {})
    if train.step is not None:
        raise ValueError(f"{name!r} has a custom step, so its optimizer cannot be replaced")
    every = max(train.steps // options.epochs, 1)
    changes: dict[str, Any] = {"steps": every * min(options.epochs, train.steps), "check_every": every, "stop": ()}
    train = dataclasses.replace(train, **changes, record_every=1, stretch=every)
    _, trace = jax.eval_shape(train, hparams, jax.random.key(0))
    loss = ranking_metric([each for each in trace.metrics if is_loss(each)])
    scores = sorted((each for each in trace.metrics if mode_of(each) == "max"), key=lambda each: each != "accuracy")
    return OwnProblem(name, train, hparams, loss, scores[0] if scores else loss)


def run_own_nnlearn(name: str, problem: OwnProblem, options: CompareOptions, tick: Tick) -> Curves:
    """All seeds and rates together: one program computes the steps between two checks of the whole grid."""
    make_tx, train = getattr(optimizers, name), problem.train

    def with_rate(rate):
        return dataclasses.replace(train, make_tx=lambda hparams: make_tx(rate))

    def start(rate, seed):
        return with_rate(rate).start(problem.hparams, as_key(seed))

    def advance(run, rate, first):
        run, trace = with_rate(rate).advance(problem.hparams, run, first, train.check_every)
        return run, tuple(trace.metrics[each][-1] for each in ("train_loss", problem.loss, problem.metric))

    rates, seeds = jnp.array(options.learning_rates), jnp.arange(options.seeds)
    runs = jax.jit(jax.vmap(jax.vmap(start, in_axes=(0, None)), in_axes=(None, 0)))(rates, seeds)
    grid = jax.vmap(jax.vmap(advance, in_axes=(0, 0, None)), in_axes=(0, None, None))
    began = time.perf_counter()
    program = jax.jit(grid, donate_argnums=0).lower(runs, rates, jnp.int32(0)).compile()
    compile_seconds = time.perf_counter() - began
    measured, clock, began = [], [], time.perf_counter()
    for first in range(0, train.steps, train.check_every):
        runs, results = program(runs, rates, jnp.int32(first))
        measured.append(jax.device_get(results))
        clock.append(time.perf_counter() - began)
        tick()
    return _curves(measured, clock, compile_seconds, problem, options)


def run_own_optax(name: str, problem: OwnProblem, options: CompareOptions, tick: Tick) -> Curves:
    """The same grid with optax's optimizer as its users run it: a Python loop calls a jitted step for every batch."""
    make_tx, train, every = getattr(optax, name), problem.train, problem.train.check_every
    batches = train.batches

    def step(rate, state, batch):
        state, info = make_step(train.loss_fn, make_tx(rate), record=(), **train.options)(state, batch)
        return state, info.loss

    def start(rate, seed):
        begun = dataclasses.replace(train, make_tx=lambda hparams: make_tx(rate), packing={"packed": False})
        return begun.start(problem.hparams, as_key(seed))

    def draw(data_key, order, first):
        order, rows = batches.rows(data_key, order, first, every, every)
        return order, jax.vmap(batches.batch)(rows)

    grid = [(seed, index) for seed in range(options.seeds) for index in range(len(options.learning_rates))]
    rates = [jnp.float32(rate) for rate in options.learning_rates]
    start, draw = jax.jit(start), jax.jit(draw)
    runs = {run: start(rates[run[1]], run[0]) for run in grid}
    orders = {seed: runs[seed, 0].order for seed in range(options.seeds)}
    first_batch = jax.tree.map(lambda leaf: leaf[0], draw(runs[0, 0].data_key, orders[0], 0)[1])
    began = time.perf_counter()
    compiled = jax.jit(step).lower(rates[0], runs[0, 0].state, first_batch).compile()
    evaluate = jax.jit(lambda state: measure(train.evaluate, state, hparams=problem.hparams))
    evaluate = evaluate.lower(runs[0, 0].state).compile()
    compile_seconds = time.perf_counter() - began
    states = {run: begun.state for run, begun in runs.items()}
    measured, clock, began = [], [], time.perf_counter()
    for first in range(0, train.steps, every):
        results = tuple(np.zeros((options.seeds, len(rates))) for _ in range(3))
        for seed in range(options.seeds):
            orders[seed], stacked = draw(runs[seed, 0].data_key, orders[seed], first)
            rows = [jax.tree.map(lambda leaf, at=at: leaf[at], stacked) for at in range(every)]
            for index, rate in enumerate(rates):
                run, losses = (seed, index), []
                for batch in rows:
                    states[run], loss = compiled(rate, states[run], batch)
                    losses.append(loss)
                metrics = {"train_loss": np.mean(jax.device_get(losses)), **evaluate(states[run])}
                for array, each in zip(results, ("train_loss", problem.loss, problem.metric), strict=True):
                    array[run] = float(metrics[each])
        measured.append(results)
        clock.append(time.perf_counter() - began)
        tick()
    return _curves(measured, clock, compile_seconds, problem, options)


def _curves(
    measured: list, clock: list, compile_seconds: float, problem: OwnProblem, options: CompareOptions
) -> Curves:
    train, validation, test = (np.stack(column, axis=-1) for column in zip(*measured, strict=True))
    steps = problem.train.steps * options.seeds * len(options.learning_rates)
    return Curves(train, validation, test, np.array(clock), compile_seconds, steps)


OWN_RUNNERS: dict[str, Callable[[str, OwnProblem, CompareOptions, Tick], Curves]] = {
    "nnlearn": run_own_nnlearn,
    "optax": run_own_optax,
}
