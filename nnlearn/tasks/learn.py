"""``nnlearn learn``: train on one task, print a line for each check, and report the result on the test part."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from nnlearn.checks import check_count
from nnlearn.data import batch_count, example_count
from nnlearn.files import replacing
from nnlearn.models import parameter_count
from nnlearn.tasks import TASKS, load_task
from nnlearn.tasks.task import Task
from nnlearn.train.run import Run, Train


@dataclasses.dataclass(frozen=True)
class LearnOptions:
    """Train the network of one task, download its data if necessary, and report metrics on the test part."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="|".join(TASKS))]
    """Name of the task."""
    seed: int = 0
    """Seed of the parameters and of the batches."""
    epochs: int | None = None
    """Passes over the training examples; by default the task's own number."""
    checks: int = 10
    """Number of evaluations on the validation part."""
    out: Path | None = None
    """Folder for result.json, with the options, the metrics and the metrics of every check; by default nothing is
    written."""


def learn(options: LearnOptions) -> dict[str, float]:
    """Run the command and return the metrics on the test part.

    Raises:
      ValueError: if an option is unknown or out of range.
      ImportError: if the package that holds the data is not installed.
      OSError: if the data cannot be fetched.
    """
    check_count("checks", options.checks)
    if options.epochs is not None:
        check_count("epochs", options.epochs)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)  # before the run, which may take an hour
    console = Console(soft_wrap=True, highlight=False)
    task = load_task(options.task) if options.epochs is None else load_task(options.task, epochs=options.epochs)
    steps = task.epochs * batch_count(example_count(task.train), task.batch_size)
    train = task.make_train(steps=steps, check_every=-(-steps // options.checks), record_every=1)
    began = time.perf_counter()
    run = jax.jit(train.start)(task.hparams, jax.random.key(options.seed))
    console.print(f"{task.name}: {task.source} ({task.licence})")
    console.print(f"{parameter_count(run.state.params):,} parameters, {steps:,} steps of {task.batch_size} examples")
    run, checks = _advance(train, task, run, console)
    state = train.finish(run)
    metrics = task.evaluate(state.params, state.model_state)
    seconds = time.perf_counter() - began
    verdict = "reached" if task.solved(metrics) else "not reached"
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    console.print(f"test: {shown}, after {seconds:.0f} s; target {task.metric} {task.target:.4g}: {verdict}")
    console.print("baselines: " + ", ".join(f"{name} {value:.4g}" for name, value in task.baselines.items()))
    if task.show is not None:
        console.print(task.show(state.params, state.model_state), markup=False)
    if options.out is not None:
        result = {
            "settings": {**dataclasses.asdict(options), "epochs": task.epochs, "out": str(options.out)},
            "metrics": metrics,
            "target": {"metric": task.metric, "value": task.target, "reached": task.solved(metrics)},
            "baselines": dict(task.baselines),
            "seconds": seconds,
            "checks": checks,
        }
        with replacing(options.out / "result.json") as file:
            json.dump(result, file, indent=1)
        console.print(f"written: {options.out / 'result.json'}")
    return metrics


def _advance(train: Train, task: Task, run: Run, console: Console) -> tuple[Run, list[dict[str, float]]]:
    """Make all steps, print a line for each check, and return the run and the metrics of the checks."""
    checks = []
    advance = jax.jit(train.advance, static_argnums=3, donate_argnums=1)
    for first in range(0, train.steps, train.check_every):
        count = min(train.check_every, train.steps - first)
        run, trace = advance(task.hparams, run, first, count)
        metrics = {name: float(values[-1]) for name, values in trace.metrics.items()}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        console.print(f"  step {first + count:>6,}  {shown}")
        checks.append({"step": first + count, **metrics})
    return run, checks
