"""``nnlearn learn``: train on one task, print a line for each check, and report the result on the test part."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from nnlearn.checkpoints import Checkpoints
from nnlearn.checks import check_count
from nnlearn.data import batch_count, example_count
from nnlearn.files import replacing
from nnlearn.models import parameter_count
from nnlearn.stream import run
from nnlearn.tasks import load_task
from nnlearn.train.trace import Trace

TERMINATED = 143  # the exit status of a process that SIGTERM has ended


@dataclasses.dataclass(frozen=True)
class LearnOptions:
    """Train the network of one task, download its data if necessary, and report metrics on the test part."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """Name of the task; nnlearn tasks lists them."""
    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Seed of the parameters and of the batches."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Passes over the training examples; by default the task's own number."""
    checks: Annotated[int, tyro.conf.arg(metavar="INT")] = 10
    """Number of evaluations on the validation part."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for result.json (options, metrics, checks), trace.npz (every step) and checkpoints, which nnlearn report
    reads; by default nothing is written."""
    resume: bool = False
    """Continue the run whose checkpoints are in the folder."""
    json: bool = False
    """Print the result as one JSON object, and nothing else."""


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
    console = Console(soft_wrap=True, highlight=False, quiet=options.json)
    task = load_task(options.task) if options.epochs is None else load_task(options.task, epochs=options.epochs)
    steps = task.epochs * batch_count(example_count(task.train), task.batch_size)
    train = task.make_train(steps=steps, check_every=-(-steps // options.checks), record_every=1)
    began = time.perf_counter()
    key = jax.random.key(options.seed)
    count = parameter_count(jax.eval_shape(lambda: train.start(task.hparams, key).state.params))
    console.print(f"{task.name}: {task.source} ({task.licence})")
    console.print(f"{count:,} parameters, {steps:,} steps of {task.batch_size} examples")
    with _checkpoints(options, train.check_every) as checkpoints:
        show = lambda trace: console.print(_check_line(trace))  # noqa: E731
        result = run(train, task.hparams, key, checkpoints=checkpoints, progress=False, watch=show)
    if result.stopped_by in ("interrupted", "terminated"):
        if checkpoints is not None:
            console.print(f"{result.stopped_by}; --resume continues from step {int(result.trace.stop_step):,}")
        raise KeyboardInterrupt if result.stopped_by == "interrupted" else SystemExit(TERMINATED)
    state, trace = result
    rows = zip(*trace.metrics.values(), strict=True)
    checks = [
        {"step": int(step), **dict(zip(trace.metrics, map(float, row), strict=True))}
        for step, row in zip(trace.check_step, rows, strict=True)
    ]
    metrics = task.evaluate(state.params, state.model_state)
    seconds = time.perf_counter() - began
    verdict = "reached" if task.solved(metrics) else "not reached"
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    console.print(f"test: {shown}, after {seconds:.0f} s; target {task.metric} {task.target:.4g}: {verdict}")
    console.print("baselines: " + ", ".join(f"{name} {value:.4g}" for name, value in task.baselines.items()))
    sample = None if task.show is None else task.show(state.params, state.model_state)
    if sample is not None:
        console.print(sample, markup=False)
    report = {
        "settings": {**dataclasses.asdict(options), "epochs": task.epochs, "out": options.out and str(options.out)},
        "metrics": metrics,
        "hparams": {name: float(value) for name, value in task.hparams.items()},
        "target": {"metric": task.metric, "mode": task.mode, "value": task.target, "reached": task.solved(metrics)},
        "baselines": dict(task.baselines),
        "seconds": seconds,
        "checks": checks,
        "sample": sample,
    }
    if options.out is not None:
        trace.save(options.out / "trace.npz")
        with replacing(options.out / "result.json") as file:
            json.dump(report, file, indent=1)
        console.print(f"written: {options.out / 'result.json'}")
    if options.json:
        print(json.dumps(report))
    return metrics


def _check_line(trace: Trace) -> str:
    """The line for the last check of a trace."""
    metrics = ", ".join(f"{name} {values[-1]:.4g}" for name, values in trace.metrics.items())
    return f"  step {int(trace.check_step[-1]):>6,}  {metrics}"


@contextlib.contextmanager
def _checkpoints(options: LearnOptions, every: int) -> Iterator[Checkpoints | None]:
    """The checkpoints in the folder of the run, if it has one.

    Raises:
      ValueError: if there are some and ``--resume`` is not given, or ``--resume`` is given without a folder.
    """
    if options.out is None:
        if options.resume:
            raise ValueError("--resume needs --out, the folder of the run to resume")
        yield None
        return
    with Checkpoints(options.out / "checkpoints", every_steps=every) as checkpoints:
        if checkpoints.steps() and not options.resume:
            raise ValueError(
                f"{str(options.out)!r} has checkpoints of an earlier run: add --resume, or give another --out"
            )
        yield checkpoints
