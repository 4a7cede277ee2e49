"""Batches of runs: handed to a few threads, kept as they finish, read from a folder where they are there already."""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_count
from nnlearn.sweeps.program import CPU_WIDTH, DEVICE_WIDTH, Program, Shape, Traced, compile_batch, free_bytes
from nnlearn.sweeps.results import Plan, Results, fill
from nnlearn.sweeps.store import Store, read_batches
from nnlearn.train.trace import Trace


class Means(NamedTuple):
    """What there is to run with."""

    width: int | None
    memory_limit: int | None
    devices: list[Any]
    workers: int

    def width_for(self, runs: int) -> int:
        """How many of so many runs to put in a batch, at most."""
        if self.width is not None:
            return check_count("width", self.width)
        widest = CPU_WIDTH if self.devices[0].platform == "cpu" else DEVICE_WIDTH
        widest *= len(self.devices)
        return widest if self.workers == 1 else min(widest, -(-runs // self.workers))

    def limit(self) -> int:
        """Bytes for each batch on each device."""
        if self.memory_limit is not None:
            return check_count("memory_limit", self.memory_limit) // self.workers
        on_cpu = self.devices[0].platform == "cpu"  # whose devices share one memory
        return free_bytes(self.devices[0]) // self.workers // (len(self.devices) if on_cpu else 1)


class Runs:
    """The runs of a sweep so far: what is finished, in memory and in the folder."""

    def __init__(
        self,
        results: Results,
        members: Sequence[Traced],
        keep: Store | None,
        progress: Callable[[int, int], None] | None,
    ):
        self.sweep, self.members, self.keep, self.progress = results, members, keep, progress
        self.shape = Shape(seeds=len(results.seeds), settings=len(results.settings))
        self.traces: list[Trace | None] = [None] * len(results.statics)
        self.batches, self.compile_seconds = 0, 0.0
        self.program: Program | None = None
        for at, setting, seed, batch in read_batches(keep.folder) if keep else ():
            self._fill(at, setting, seed, batch)

    def finish(self, at: int, means: Means) -> None:
        """Make all runs of one static choice that are not there yet."""
        done = self._done(at)
        if done.all():
            return
        settings, varied, traced = self.sweep.settings, self.sweep.varied, self.members[at]
        if traced.has_effects:
            means = means._replace(width=1, devices=means.devices[:1], workers=1)
        columns = {name: np.asarray(jnp.asarray([setting[name] for setting in settings])) for name in varied}
        example = {name: column[0] for name, column in columns.items()}
        width = means.width_for(int(done.size - done.sum()))
        program = compile_batch(traced, example, self.shape, width=width, devices=means.devices, limit=means.limit())
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

    def results(self, means: Means, trace_seconds: float, seconds: float) -> Results:
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
                trace_seconds=trace_seconds,
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


__all__ = ["Means", "Runs", "default_workers"]
