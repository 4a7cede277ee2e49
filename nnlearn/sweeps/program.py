"""Compile one program for a batch of runs, as wide as memory allows."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from nnlearn.programs.fingerprint import program_hash
from nnlearn.sweeps.divided import DividedBatch
from nnlearn.train import Train
from nnlearn.train.trace import Trace
from nnlearn.types import ArrayLike, Key

CPU_WIDTH = 32  # small networks: a run costs the same at widths from 8 to 256, and twice as much alone
DEVICE_WIDTH = 1024  # for each accelerator; enough to occupy it with the smallest networks
MEMORY_SHARE = {"cpu": 0.5, "other": 0.85}  # of the free memory; a computer shares its memory with other programs
ATTEMPTS = 4  # the second fits unless memory is far from linear in the width

Member = Callable[[Mapping[str, ArrayLike], Key], Trace]


class BatchShape(NamedTuple):
    """The numbers of seeds and settings in one batch."""

    seeds: int
    settings: int


class BatchProgram(NamedTuple):
    """A compiled batch of runs.

    Attributes:
      run: ``run(varied, keys) -> trace``. ``varied`` holds arrays of shape (settings,), ``keys`` has shape (seeds,),
        and the trace has runs (settings, seeds).
      shape: the shape of a batch.
      bytes: memory that one batch takes on one device, measured from the compiled program; 0 if unknown.
      limit: bytes that were available for it.
      compile_seconds: compilation time of all attempts together.
    """

    run: Callable[[Mapping[str, ArrayLike], jax.Array], Trace]
    shape: BatchShape
    bytes: int
    limit: int
    compile_seconds: float


class TracedRun(NamedTuple):
    """A traced run.

    Attributes:
      member: the run as a function of its varied hyper-parameters and its key.
      shapes: its trace, with ``jax.ShapeDtypeStruct`` as leaves.
      identity: JAX's version and a hash of what the run computes.
      has_effects: whether a run prints or calls the host.
      on_mesh: whether each run has a mesh of its own, so that runs cannot be divided among the devices.
    """

    member: Member
    shapes: Trace
    identity: str
    has_effects: bool
    on_mesh: bool = False


def trace_member(train: Train, setting: Mapping[str, Any], varied: Sequence[str], full: bool) -> TracedRun:
    """Trace one run as a function of its varied hyper-parameters and its key.

    The result replays the trace, so ``vmap`` and further widths do not call the user's functions again.

    Args:
      train: the run.
      setting: any of the settings; the values of names outside ``varied`` are the same in all of them.
      varied: the names that vary.
      full: whether to return all records; otherwise only those at the checks.
    """

    def member(values: Mapping[str, ArrayLike], key: Key) -> Trace:
        _, trace = train({**setting, **values}, key)
        return trace if full else _at_checks(train, trace)

    example = {name: jnp.asarray(setting[name]) for name in varied}
    jaxpr, shapes = jax.make_jaxpr(member, return_shape=True)(example, jax.random.key(0))
    replay, structure = jaxpr_as_fun(jaxpr), jax.tree.structure(shapes)

    def replayed(values: Mapping[str, ArrayLike], key: Key) -> Trace:
        return jax.tree.unflatten(structure, replay(*jax.tree.leaves((values, key))))

    identity = f"jax {jax.__version__}:{program_hash(jaxpr)}"
    on_mesh = train.packing.get("mesh") is not None
    return TracedRun(replayed, shapes, identity, bool(jaxpr.effects), on_mesh)


def compile_batch(
    traced: TracedRun,
    example: Mapping[str, Any],
    counts: BatchShape,
    *,
    width: int,
    devices: Sequence[Any],
    limit: int,
) -> BatchProgram:
    """Compile a batch of about ``width`` runs, or fewer if the program takes more than ``limit`` bytes.

    Args:
      traced: the run.
      example: by name, a scalar array for each varied hyper-parameter.
      counts: seeds and settings of the whole sweep.
      width: the largest number of runs in a batch.
      devices: the devices that share a batch.
      limit: bytes available for a batch on each device.

    Raises:
      ValueError: if one run per device takes more than ``limit``.
    """
    tried: list[tuple[int, int]] = []  # (runs, bytes)
    began = time.perf_counter()
    for _ in range(ATTEMPTS):
        shape = batch_shape(width, counts, len(devices))
        compiled = _compile(traced, example, shape, devices)
        runs, needed = shape.seeds * shape.settings, program_bytes(compiled)
        if needed <= limit:
            return BatchProgram(compiled, shape, needed, limit, time.perf_counter() - began)
        tried.append((runs, needed))
        if runs <= len(devices):
            break
        width = _fitting_width(tried, limit) // len(devices) * len(devices)
    runs, needed = tried[-1]
    raise ValueError(
        f"a batch of {runs} runs takes {needed:,} bytes on each device, and the limit is {limit:,}: give a larger "
        "memory_limit or fewer workers, record less, or check less often"
    )


def batch_shape(width: int, counts: BatchShape, devices: int) -> BatchShape:
    """The shape of batches of at most ``width`` runs, but at least one run per device.

    Settings of one seed come first, because they share their training batches, then seeds. All batches have about the
    same size.

    >>> batch_shape(32, BatchShape(seeds=4, settings=40), devices=1)
    BatchShape(seeds=1, settings=20)
    >>> batch_shape(32, BatchShape(seeds=100, settings=3), devices=1)
    BatchShape(seeds=10, settings=3)
    """
    each = max(1, width // devices)
    if _split_settings(counts, devices):
        settings = devices * _even(-(-counts.settings // devices), each)
        return BatchShape(_even(counts.seeds, max(1, width // settings)), settings)
    settings = _even(counts.settings, each)
    return BatchShape(devices * _even(-(-counts.seeds // devices), max(1, each // settings)), settings)


def program_bytes(compiled: Any) -> int:
    """Bytes of arguments, results and scratch memory of a compiled program; 0 if unknown."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(getattr(memory, name) for name in names)


def free_bytes(device: Any) -> int:
    """The memory that a program on ``device`` may take: a share of the memory that is free now."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(MEMORY_SHARE["other"] * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return int(MEMORY_SHARE["cpu"] * _available_ram())


def _available_ram() -> int:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 4 << 30  # a size that any computer has


def _at_checks(train: Train, trace: Trace) -> Trace:
    """Keep only the records at a check: a sweep holds many traces, and the other records are most of each."""
    checks = {*range(train.check_every, train.steps + 1, train.check_every), train.steps}
    recorded = range(train.record_every, train.steps + 1, train.record_every)
    kept = np.array([at for at, step in enumerate(recorded) if step in checks], int)
    step, info = jax.tree.map(lambda leaf: leaf[kept], (trace.step, trace.info))
    return dataclasses.replace(trace, step=step, info=info)


def _compile(traced: TracedRun, example: Mapping[str, Any], shape: BatchShape, devices: Sequence[Any]) -> Any:
    member = traced.member

    def many(values: Mapping[str, jax.Array], keys: jax.Array) -> Trace:
        over_settings = jax.vmap(member, in_axes=(0, None))  # the key has no axis here, so neither have the batches
        return jax.vmap(over_settings, in_axes=(None, 0), out_axes=1)(values, keys)

    def one(values: Mapping[str, jax.Array], keys: jax.Array) -> Trace:
        trace = member({name: column[0] for name, column in values.items()}, keys[0])
        return jax.tree.map(lambda leaf: leaf[None, None], trace)

    # vmap would merge the effects of several runs, repeat them for padding, and reject ordered ones.
    batch, parts = one if traced.has_effects else many, len(devices)
    axis = 0 if _split_settings(shape, parts) else 1  # of a trace
    settings, seeds = shape.settings // (1 if axis else parts), shape.seeds // (parts if axis else 1)
    values = {name: jax.ShapeDtypeStruct((settings,), leaf.dtype) for name, leaf in example.items()}
    arguments = (values, jax.ShapeDtypeStruct((seeds,), jax.random.key(0).dtype))
    if traced.on_mesh:
        return jax.jit(batch).lower(*arguments).compile()
    return DividedBatch(jax.jit(batch), arguments, axis, devices)


def _split_settings(counts: BatchShape, devices: int) -> bool:
    """Whether the devices share a batch along its settings, rather than along its seeds."""
    return counts.settings >= min(devices, counts.seeds)


def _even(count: int, most: int) -> int:
    """The size of the parts when ``count`` is divided into as few parts as possible, of at most ``most`` each."""
    return -(-count // -(-count // max(1, most)))


def _fitting_width(tried: list[tuple[int, int]], limit: int) -> int:
    """The width at which a line through the last two measurements, or through one and the origin, meets the limit."""
    runs, needed = tried[-1]
    other_runs, other = tried[-2] if len(tried) > 1 and tried[-2][0] != runs else (0, 0)
    slope = max((needed - other) / (runs - other_runs), 1e-9)
    return max(1, min(int(runs - (needed - limit) / slope), runs - 1))


__all__ = [
    "BatchProgram",
    "BatchShape",
    "TracedRun",
    "batch_shape",
    "compile_batch",
    "free_bytes",
    "program_bytes",
    "trace_member",
]
