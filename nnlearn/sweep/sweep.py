"""Many runs as one program: every setting and every seed, in batches that fit memory."""

import dataclasses
import itertools
import math
import operator
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_count
from nnlearn.sweep.members import check_metric, check_mode
from nnlearn.sweep.program import (
    CPU_WIDTH,
    DEVICE_WIDTH,
    Program,
    Shape,
    compile_batch,
    free_bytes,
    trace_member,
)
from nnlearn.sweep.results import Plan, Results, fill
from nnlearn.sweep.space import Interval, Method, Setting, axes_of, list_settings
from nnlearn.sweep.store import Store, read_batches
from nnlearn.train import Train
from nnlearn.train.trace import Trace


class SweepInterrupted(KeyboardInterrupt):
    """A sweep was interrupted; ``results`` holds the runs that are finished."""

    def __init__(self, results: Results):
        super().__init__(f"{int(results.done.sum())} of {results.done.size} runs are finished, see .results")
        self.results = results


def sweep(
    train: Train | Callable[[dict[str, Any]], Train],
    space: Setting,
    seeds: int | Sequence[int] = 1,
    *,
    metric: str,
    mode: Literal["min", "max"] = "min",
    samples: int | None = None,
    method: Method = "grid",
    seed: int = 0,
    static: dict[str, Sequence[Any]] | None = None,
    full: bool = False,
    width: int | None = None,
    memory_limit: int | None = None,
    devices: Sequence[Any] | None = None,
    workers: int | None = None,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Run every setting of a space with every seed, compiled once.

    Settings lie side by side under ``vmap``; those of one seed share their key, and so their batches. The training
    functions are called for one trace, whatever the number of runs, and all batches of runs have one shape.

    Args:
      train: made by ``make_train``, with hyper-parameters as a dict; or, with ``static``, a function from a static
        choice to one.
      space: by name an axis, or a value that all settings share, see ``list_settings``.
      seeds: seeds, or how many; run ``(setting, seed)`` is ``train(setting, seed)``.
      metric: what to judge by: a name out of what ``evaluate`` returns, or ``train_loss``.
      mode: whether small or large is better.
      samples, method, seed: how to draw settings, see ``list_settings``.
      static: by name, values that shape the program, such as widths or kinds of optimizer; one program is compiled for
        each combination, and ``train`` is called with it.
      full: keep all records of every run; otherwise those at its checks.
      width: runs at once, at most; chosen by what the devices do best if None.
      memory_limit: bytes on each device; a share of what is free if None. The need is measured from the compiled
        program, and a program that needs more is compiled again, narrower.
      devices: those to spread each batch over; all if None.
      workers: batches at once, from as many threads; on a CPU that is one device, its cores if None, since a program of
        small matrices keeps but one of them busy.
      folder: where each finished batch is written, and finished ones are read from: a sweep that was cut short goes on.
      progress: ``progress(finished, all)`` after each batch, in runs.

    Returns:
      ``Results``: ``best()``, ``columns()``, ``plot()``.

    Raises:
      ValueError: no settings, an unknown metric, a run that needs more than ``memory_limit``, or a folder of another
        sweep.
      SweepInterrupted: on a ``KeyboardInterrupt``, with the finished runs as ``results``.

    >>> import nnlearn
    >>> from nnlearn.sweep.space import choice
    >>> batches = nnlearn.generated(lambda key, step: jax.random.normal(key))
    >>> def loss_fn(params, batch, key):
    ...     return (params - 3.0) ** 2 + 0.1 * params * batch
    >>> train = nnlearn.make_train(loss_fn, lambda h: nnlearn.sgd(h["rate"]), batches, jnp.zeros(()), steps=20)
    >>> results = sweep(train, {"rate": choice(0.01, 0.1, 2.0)}, seeds=4, metric="train_loss")
    >>> results.best().setting, results.columns()["rate"].shape
    ({'rate': 0.1}, (12,))
    """
    check_mode(mode)
    began = time.perf_counter()
    axes, settings = axes_of(space), list_settings(space, samples, method, seed=seed)
    statics = _combinations(static)
    trains = _make_trains(train, static, statics)
    seeds = _seeds(seeds)
    results = Results(
        settings=tuple(settings),
        varied=tuple(axes),
        logarithmic=tuple(name for name, axis in axes.items() if isinstance(axis, Interval) and axis.log),
        statics=statics,
        seeds=seeds,
        steps=tuple(each.steps for each in trains),
        full=full,
        metric=metric,
        mode=mode,
        traces=(None,) * len(statics),
    )
    devices = list(jax.devices() if devices is None else devices)
    workers = default_workers(devices) if workers is None else check_count("workers", workers)
    means = _Means(width, memory_limit, devices, workers)
    keep = None if folder is None else Store(folder, results.header())
    runs = _Runs(results, keep, progress)
    try:
        for at, each in enumerate(trains):
            runs.finish(at, each, means)
    except KeyboardInterrupt as error:
        raise SweepInterrupted(runs.results(means, time.perf_counter() - began)) from error
    return runs.results(means, time.perf_counter() - began)


class _Means(NamedTuple):
    """What there is to run with."""

    width: int | None
    memory_limit: int | None
    devices: list[Any]
    workers: int

    def width_for(self, runs: int) -> int:
        if self.width is not None:
            return check_count("width", self.width)
        widest = CPU_WIDTH if self.devices[0].platform == "cpu" else DEVICE_WIDTH
        return min(widest * len(self.devices), -(-runs // self.workers))

    def limit(self) -> int:
        """Bytes for each batch on each device."""
        if self.memory_limit is not None:
            return check_count("memory_limit", self.memory_limit) // self.workers
        on_cpu = self.devices[0].platform == "cpu"  # whose devices share one memory
        return free_bytes(self.devices[0]) // self.workers // (len(self.devices) if on_cpu else 1)


class _Runs:
    """The runs of a sweep so far: what is finished, in memory and in the folder."""

    def __init__(self, results: Results, keep: Store | None, progress: Callable[[int, int], None] | None):
        self.sweep, self.keep, self.progress = results, keep, progress
        self.shape = Shape(seeds=len(results.seeds), settings=len(results.settings))
        self.traces: list[Trace | None] = [None] * len(results.statics)
        self.batches, self.trace_seconds, self.compile_seconds = 0, 0.0, 0.0
        self.program: Program | None = None
        for at, setting, seed, batch in read_batches(keep.folder) if keep else ():
            self._fill(at, setting, seed, batch)

    def finish(self, at: int, train: Train, means: _Means) -> None:
        """Make all runs of one static choice that are not there yet."""
        done = self._done(at)
        if done.all():
            return
        began = time.perf_counter()
        settings, varied = self.sweep.settings, self.sweep.varied
        member, shapes = trace_member(train, settings[0], varied, self.sweep.full)
        self.trace_seconds += time.perf_counter() - began
        check_metric(shapes.metrics, self.sweep.metric)
        columns = {name: np.asarray(jnp.asarray([setting[name] for setting in settings])) for name in varied}
        example = {name: column[0] for name, column in columns.items()}
        width = means.width_for(int(done.size - done.sum()))
        program = compile_batch(member, example, self.shape, width=width, devices=means.devices, limit=means.limit())
        self.program, self.compile_seconds = program, self.compile_seconds + program.compile_seconds
        self._run_batches(at, program, columns, means.workers)

    def _run_batches(self, at: int, program: Program, columns: dict[str, np.ndarray], workers: int) -> None:
        """Every batch that holds a run which is not done; the threads meet in XLA, which holds no lock of Python's."""
        keys, (seeds, settings) = jnp.stack([jax.random.key(seed) for seed in self.sweep.seeds]), program.shape
        done = self._done(at)

        def run(place):
            setting, seed = place
            rows, picked = _padded(setting, settings, self.shape.settings), _padded(seed, seeds, self.shape.seeds)
            trace = program.run({name: column[rows] for name, column in columns.items()}, keys[picked])
            kept = (slice(self.shape.settings - setting), slice(self.shape.seeds - seed))  # without the padding
            return jax.tree.map(lambda leaf: leaf[kept], jax.device_get(trace))

        places = [
            (setting, seed)
            for seed in range(0, self.shape.seeds, seeds)
            for setting in range(0, self.shape.settings, settings)
            if not done[setting : setting + settings, seed : seed + seeds].all()
        ]
        waiting, ahead, under_way = iter(places), workers + 1, {}  # one more than can run, so that none waits for us
        with ThreadPoolExecutor(workers) as pool:
            try:
                while True:
                    for place in itertools.islice(waiting, ahead - len(under_way)):
                        under_way[pool.submit(run, place)] = place
                    if not under_way:
                        return
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        self._keep(at, *under_way[future], future.result())
                        del under_way[future]
                    self._tell()
            except BaseException as error:
                started = [future for future in under_way if not future.cancel()]
                for future in started if isinstance(error, KeyboardInterrupt) else ():
                    self._keep(at, *under_way[future], future.result())  # it cannot be stopped, so it is not wasted
                raise

    def results(self, means: _Means, seconds: float) -> Results:
        """All that is finished."""
        program = self.program
        plan = None
        if program is not None:
            plan = Plan(
                width=program.shape.seeds * program.shape.settings,
                batches=self.batches,
                bytes=program.bytes,
                limit=program.limit,
                workers=means.workers,
                devices=len(means.devices),
                trace_seconds=self.trace_seconds,
                compile_seconds=self.compile_seconds,
                seconds=seconds,
            )
        return dataclasses.replace(self.sweep, traces=tuple(self.traces), plan=plan)

    def _keep(self, at: int, setting: int, seed: int, batch: Trace) -> None:
        if self.keep:
            batch = self.keep.write(at, setting, seed, batch)
        self._fill(at, setting, seed, batch)
        self.batches += 1

    def _tell(self) -> None:
        if self.progress:
            finished = sum(int(self._done(at).sum()) for at in range(len(self.traces)))
            self.progress(finished, len(self.traces) * math.prod(self.shape))

    def _fill(self, at: int, setting: int, seed: int, batch: Trace) -> None:
        shape = (self.shape.settings, self.shape.seeds)
        self.traces[at] = fill(self.traces[at], batch, setting, seed, shape)

    def _done(self, at: int) -> np.ndarray:
        trace = self.traces[at]
        return np.zeros((self.shape.settings, self.shape.seeds), bool) if trace is None else trace.stop_step > 0


def _padded(first: int, size: int, count: int) -> np.ndarray:
    """Places from ``first`` on, the last one repeated beyond the end."""
    return np.minimum(first + np.arange(size), count - 1)


def default_workers(devices: Sequence[Any]) -> int:
    """Threads that keep the devices busy: one, but on a CPU that is one device, as many as it has cores."""
    if len(devices) > 1 or devices[0].platform != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(seeds, Sequence | np.ndarray):
        return tuple(range(check_count("seeds", seeds)))
    found = tuple(operator.index(seed) for seed in seeds)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"seeds must be at least one, and all different, got {found}")
    return found


def _combinations(static: dict[str, Sequence[Any]] | None) -> tuple[dict[str, Any], ...]:
    static = static or {}
    for name, values in static.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"static: {name!r} must be a list of at least one value, got {values!r}")
    return tuple(dict(zip(static, row, strict=True)) for row in itertools.product(*static.values()))


def _make_trains(train: Any, static: dict | None, statics: tuple[dict, ...]) -> list[Train]:
    made = [train] if not static else [train(dict(choice)) for choice in statics]
    for each in made:
        if not isinstance(each, Train):
            cure = "a function from a static choice to make_train(...)" if static else "made by make_train(...)"
            raise TypeError(f"train must be {cure}, got {type(each).__name__}")
    return made


__all__ = ["SweepInterrupted", "default_workers", "sweep"]
