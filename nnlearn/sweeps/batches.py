"""Run the batches of a sweep on a few threads, store each when it finishes, and skip those that a folder holds."""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_count
from nnlearn.sweeps.program import (
    CPU_WIDTH,
    DEVICE_WIDTH,
    BatchProgram,
    BatchShape,
    TracedRun,
    compile_batch,
    free_bytes,
)
from nnlearn.sweeps.results import Execution, Results, fill
from nnlearn.sweeps.store import Store, read_batches
from nnlearn.train.trace import Trace


class Resources(NamedTuple):
    """Devices, workers and memory for a sweep.

    Attributes:
      width: the largest number of runs in a batch; None to choose it by device.
      memory_limit: bytes on each device for all workers; None for a share of the free memory.
      devices: the devices that share each batch.
      workers: number of batches that run concurrently.
    """

    width: int | None
    memory_limit: int | None
    devices: list[Any]
    workers: int

    def width_for(self, runs: int) -> int:
        """The largest number of runs in a batch, given the total number of runs."""
        if self.width is not None:
            return check_count("width", self.width)
        largest = CPU_WIDTH if self.devices[0].platform == "cpu" else DEVICE_WIDTH
        largest *= len(self.devices)
        return largest if self.workers == 1 else min(largest, -(-runs // self.workers))

    def limit(self) -> int:
        """Bytes for each batch on each device."""
        if self.memory_limit is not None:
            return check_count("memory_limit", self.memory_limit) // self.workers
        on_cpu = self.devices[0].platform == "cpu"  # CPU devices share one memory
        return free_bytes(self.devices[0]) // self.workers // (len(self.devices) if on_cpu else 1)


class Runner:
    """Runs a sweep and collects its results, including those that the folder already holds."""

    def __init__(
        self,
        results: Results,
        members: Sequence[TracedRun],
        store: Store | None,
        progress: Callable[[int, int], None] | None,
    ):
        self.sweep, self.members, self.store, self.progress = results, members, store, progress
        self.shape = BatchShape(seeds=len(results.seeds), settings=len(results.settings))
        self.traces: list[Trace | None] = [None] * len(results.statics)
        self.batches, self.compile_seconds = 0, 0.0
        self.program: BatchProgram | None = None
        for static, setting, seed, batch in read_batches(store.folder) if store else ():
            self._fill(static, setting, seed, batch)

    def finish(self, static: int, resources: Resources) -> None:
        """Make all missing runs of one static choice."""
        done = self._done(static)
        if done.all():
            return
        settings, varied, traced = self.sweep.settings, self.sweep.varied, self.members[static]
        if traced.has_effects:
            resources = resources._replace(width=1, devices=resources.devices[:1], workers=1)
        if traced.on_mesh:  # each run uses all devices of its mesh
            resources = resources._replace(devices=resources.devices[:1], workers=1)
        columns = {name: np.asarray(jnp.asarray([setting[name] for setting in settings])) for name in varied}
        example = {name: column[0] for name, column in columns.items()}
        width = resources.width_for(int(done.size - done.sum()))
        program = compile_batch(
            traced, example, self.shape, width=width, devices=resources.devices, limit=resources.limit()
        )
        self.program, self.compile_seconds = program, self.compile_seconds + program.compile_seconds
        self._run_batches(static, program, columns, resources.workers)

    def _run_batches(self, static: int, program: BatchProgram, columns: dict[str, np.ndarray], workers: int) -> None:
        """Run every batch with an unfinished run. The threads spend their time in XLA, which releases the GIL."""
        keys, (seeds, settings) = jnp.stack([jax.random.key(seed) for seed in self.sweep.seeds]), program.shape
        done = self._done(static)

        def run(setting: int, seed: int) -> Trace:
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
        waiting, ahead = iter(places), workers + 1  # one more than can run, so that no worker waits for this loop
        under_way: dict[Future[Trace], tuple[int, int]] = {}
        with ThreadPoolExecutor(workers) as pool:
            try:
                while True:
                    for setting, seed in itertools.islice(waiting, ahead - len(under_way)):
                        under_way[pool.submit(run, setting, seed)] = (setting, seed)
                    if not under_way:
                        return
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        self._add(static, *under_way[future], future.result())
                        del under_way[future]
                    self._report()
            except BaseException as error:
                started = [future for future in under_way if not future.cancel()]
                for future in started if isinstance(error, KeyboardInterrupt) else ():
                    self._add(static, *under_way[future], future.result())  # a started batch cannot be stopped: use it
                raise

    def results(self, resources: Resources, trace_seconds: float, seconds: float) -> Results:
        """The results of all finished runs."""
        program = self.program
        execution = None
        if program is not None:
            execution = Execution(
                width=program.shape.seeds * program.shape.settings,
                batches=self.batches,
                bytes=program.bytes,
                limit=program.limit,
                workers=resources.workers,
                devices=len(resources.devices),
                trace_seconds=trace_seconds,
                compile_seconds=self.compile_seconds,
                seconds=seconds,
            )
        return dataclasses.replace(self.sweep, traces=tuple(self.traces), execution=execution)

    def _add(self, static: int, setting: int, seed: int, batch: Trace) -> None:
        if self.store:
            batch = self.store.write(static, setting, seed, batch)
        self._fill(static, setting, seed, batch)
        self.batches += 1

    def _report(self) -> None:
        if self.progress:
            finished = sum(int(self._done(static).sum()) for static in range(len(self.traces)))
            self.progress(finished, len(self.traces) * math.prod(self.shape))

    def _fill(self, static: int, setting: int, seed: int, batch: Trace) -> None:
        shape = (self.shape.settings, self.shape.seeds)
        self.traces[static] = fill(self.traces[static], batch, setting, seed, shape)

    def _done(self, static: int) -> np.ndarray:
        trace = self.traces[static]
        if trace is None:
            return np.zeros((self.shape.settings, self.shape.seeds), bool)
        return np.asarray(trace.stop_step) > 0


def _padded(first: int, size: int, count: int) -> np.ndarray:
    """``size`` indices from ``first`` on; the last valid index repeats beyond the end."""
    return np.minimum(first + np.arange(size), count - 1)


def default_workers(devices: Sequence[Any]) -> int:
    """Threads that keep the devices busy: one per core if the only device is a CPU, otherwise one."""
    if len(devices) > 1 or devices[0].platform != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


__all__ = ["Resources", "Runner", "default_workers"]
