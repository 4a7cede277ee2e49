"""``nnlearn learn``: train on one task, print a line for every check, and report the result on the test part."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from nnlearn.checks import check_count
from nnlearn.files import replacing
from nnlearn.models import parameter_count
from nnlearn.tasks import TASKS, load_task
from nnlearn.tasks.task import Task
from nnlearn.train.run import Train


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train the network of one task, on data that are fetched if need be, and report it on the test part."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="|".join(TASKS))]
    """What to learn."""
    seed: int = 0
    """Of the parameters and of the batches."""
    epochs: int | None = None
    """Passes over the training examples; the task's own number by default."""
    checks: int = 10
    """How many times to evaluate on the validation part."""
    out: Path | None = None
    """Folder for result.json, with the settings, the metrics and the metrics of every check; nothing is written by
    default."""


def learn(settings: Settings) -> dict[str, float]:
    """Run the command and return the metrics on the test part.

    Raises:
      ValueError: a setting is unknown or out of range.
      ImportError, OSError: the data cannot be had.
    """
    check_count("checks", settings.checks)
    if settings.epochs is not None:
        check_count("epochs", settings.epochs)
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)  # before the run, which may take an hour
    options = {} if settings.epochs is None else {"epochs": settings.epochs}
    console = Console(soft_wrap=True, highlight=False)
    task = load_task(settings.task, **options)
    steps = task.epochs * task.sampler.epoch_steps
    train = task.make_train(steps=steps, check_every=-(-steps // settings.checks), record_every=1)
    began = time.perf_counter()
    run = jax.jit(train.start)(task.hparams, jax.random.key(settings.seed))
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
    if settings.out is not None:
        result = {
            "settings": {**dataclasses.asdict(settings), "epochs": task.epochs, "out": str(settings.out)},
            "metrics": metrics,
            "target": {"metric": task.metric, "value": task.target, "reached": task.solved(metrics)},
            "baselines": dict(task.baselines),
            "seconds": seconds,
            "checks": checks,
        }
        with replacing(settings.out / "result.json") as file:
            json.dump(result, file, indent=1)
        console.print(f"written: {settings.out / 'result.json'}")
    return metrics


def _advance(train: Train, task: Task, run, console: Console):
    """Make all steps, print a line for each check, and return the run and the checks' metrics."""
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
