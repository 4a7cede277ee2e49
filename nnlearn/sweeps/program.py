"""One compiled program for a batch of runs, as wide as memory allows."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from nnlearn.programs.fingerprint import program_hash
from nnlearn.train import Train
from nnlearn.train.trace import Trace
from nnlearn.types import Key

CPU_WIDTH = 32  # small networks: 8 to 256 at once take the same time each, and one alone twice as long
DEVICE_WIDTH = 1024  # a width for each accelerator at which it is busy with the smallest networks
MEMORY_SHARE = {"cpu": 0.5, "other": 0.85}  # of what is free; a computer's memory is shared with other programs
ATTEMPTS = 4  # the second fits unless memory is far from linear in the width

Member = Callable[[dict, Key], Trace]


class Shape(NamedTuple):
    """How many seeds and settings one batch holds."""

    seeds: int
    settings: int


class Program(NamedTuple):
    """A compiled batch of runs.

    Attributes:
      run: ``run(varied, keys) -> trace``; ``varied`` holds arrays of shape (settings,), ``keys`` is of
        shape (seeds,), and the runs of the trace are (settings, seeds).
      shape: of a batch.
      bytes: of memory that one batch takes on one device, from the compiled program; 0 if it does not say.
      limit: the bytes that it had to fit.
      compile_seconds: to compile, all attempts together.
    """

    run: Callable[[dict, Key], Trace]
    shape: Shape
    bytes: int
    limit: int
    compile_seconds: float


class Traced(NamedTuple):
    """A run, traced.

    Attributes:
      member: the run as a function of its varied hyper-parameters and its key.
      shapes: its trace, of ``jax.ShapeDtypeStruct``.
      identity: JAX's version and a hash of what it computes.
      has_effects: whether a run prints or calls the host.
    """

    member: Member
    shapes: Trace
    identity: str
    has_effects: bool


def trace_member(train: Train, setting: dict, varied: Sequence[str], full: bool) -> Traced:
    """One run as a function of its varied hyper-parameters and its key, traced here once and for all.

    What comes back replays the trace, so that no ``vmap`` and no second width calls the user's functions again.

    Args:
      setting: any one of the settings; what is not in ``varied`` is the same for all.
      full: whether to return all records; otherwise those at the checks.
    """

    def member(values, key):
        _, trace = train({**setting, **values}, key)
        return trace if full else _at_checks(train, trace)

    example = {name: jnp.asarray(setting[name]) for name in varied}
    jaxpr, shapes = jax.make_jaxpr(member, return_shape=True)(example, jax.random.key(0))
    replay, structure = jaxpr_as_fun(jaxpr), jax.tree.structure(shapes)

    def replayed(values, key):
        return jax.tree.unflatten(structure, replay(*jax.tree.leaves((values, key))))

    identity = f"jax {jax.__version__}:{program_hash(jaxpr)}"
    return Traced(replayed, shapes, identity, bool(jaxpr.effects))


def compile_batch(
    traced: Traced,
    example: dict,
    counts: Shape,
    *,
    width: int,
    devices: Sequence[Any],
    limit: int,
) -> Program:
    """Compile a batch of about ``width`` runs, or of fewer if the program takes more than ``limit`` bytes.

    Args:
      example: by name, a scalar array of each varied hyper-parameter.
      counts: seeds and settings of the whole sweep.
      devices: those to spread a batch over.

    Raises:
      ValueError: one run for each device takes more than ``limit``.
    """
    tried: list[tuple[int, int]] = []  # (runs, bytes)
    began = time.perf_counter()
    for _ in range(ATTEMPTS):
        shape = batch_shape(width, counts, len(devices))
        compiled = _compile(traced, example, shape, devices)
        runs, needed = shape.seeds * shape.settings, program_bytes(compiled)
        if needed <= limit:
            return Program(compiled, shape, needed, limit, time.perf_counter() - began)
        tried.append((runs, needed))
        if runs <= len(devices):
            break
        width = _fitting_width(tried, limit) // len(devices) * len(devices)
    runs, needed = tried[-1]
    raise ValueError(
        f"{runs} runs at once take {needed:,} bytes on each device, and one batch may take {limit:,}; give a larger "
        "memory_limit or fewer workers, record less, or check less often"
    )


def batch_shape(width: int, counts: Shape, devices: int) -> Shape:
    """Settings side by side first, because they share their batches, then seeds; all batches about alike.

    At most ``width`` runs, but never fewer than one for each device.

    >>> batch_shape(32, Shape(seeds=4, settings=40), devices=1)
    Shape(seeds=1, settings=20)
    >>> batch_shape(32, Shape(seeds=100, settings=3), devices=1)
    Shape(seeds=10, settings=3)
    """
    each = max(1, width // devices)
    if _split_settings(counts, devices):
        settings = devices * _even(-(-counts.settings // devices), each)
        return Shape(_even(counts.seeds, max(1, width // settings)), settings)
    settings = _even(counts.settings, each)
    return Shape(devices * _even(-(-counts.seeds // devices), max(1, each // settings)), settings)


def program_bytes(compiled: Any) -> int:
    """Arguments, results and scratch memory of a compiled program, in bytes; 0 if it does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(getattr(memory, name) for name in names)


def free_bytes(device: Any) -> int:
    """The memory that a program on ``device`` may take: a share of what is free now."""
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
        return 4 << 30  # where nothing says, what any computer has


def _at_checks(train: Train, trace: Trace) -> Trace:
    """The records that lie at a check; the rest is the bulk of a trace, and a sweep holds many."""
    checks = {*range(train.check_every, train.steps + 1, train.check_every), train.steps}
    recorded = range(train.record_every, train.steps + 1, train.record_every)
    kept = np.array([at for at, step in enumerate(recorded) if step in checks], int)
    step, info = jax.tree.map(lambda leaf: leaf[kept], (trace.step, trace.info))
    return dataclasses.replace(trace, step=step, info=info)


def _compile(traced: Traced, example: dict, shape: Shape, devices: Sequence[Any]) -> Any:
    member = traced.member

    def batch(values, keys):
        over_settings = jax.vmap(member, in_axes=(0, None))  # the key has no axis here, so neither have the batches
        return jax.vmap(over_settings, in_axes=(None, 0), out_axes=1)(values, keys)

    if traced.has_effects:  # vmap would share an effect among runs, pad with more of them, and refuse ordered ones

        def batch(values, keys):
            trace = member({name: column[0] for name, column in values.items()}, keys[0])
            return jax.tree.map(lambda leaf: leaf[None, None], trace)

    by_settings = _split_settings(shape, len(devices))
    values_spec, keys_spec = (P("run"), P()) if by_settings else (P(), P("run"))
    # shard_map, because runs have nothing to tell one another: every device runs a program of its own.
    mesh = Mesh(np.array(devices), ("run",), axis_types=(AxisType.Auto,))
    outputs = P("run") if by_settings else P(None, "run")
    spread = jax.shard_map(batch, mesh=mesh, in_specs=(values_spec, keys_spec), out_specs=outputs, check_vma=False)
    place = [jax.NamedSharding(mesh, spec) for spec in (values_spec, keys_spec)]
    program = jax.jit(spread, in_shardings=tuple(place))
    values = {name: jax.ShapeDtypeStruct((shape.settings,), leaf.dtype) for name, leaf in example.items()}
    keys = jax.ShapeDtypeStruct((shape.seeds,), jax.random.key(0).dtype)
    return program.lower(values, keys).compile()


def _split_settings(counts: Shape, devices: int) -> bool:
    return counts.settings >= min(devices, counts.seeds)


def _even(count: int, most: int) -> int:
    """The size of the parts if ``count`` is cut into as few as possible of at most ``most``."""
    return -(-count // -(-count // max(1, most)))


def _fitting_width(tried: list[tuple[int, int]], limit: int) -> int:
    """Where the line through the last two measured points, or through one and the origin, meets the limit."""
    runs, needed = tried[-1]
    other_runs, other = tried[-2] if len(tried) > 1 and tried[-2][0] != runs else (0, 0)
    slope = max((needed - other) / (runs - other_runs), 1e-9)
    return max(1, min(int(runs - (needed - limit) / slope), runs - 1))


__all__ = ["Program", "Shape", "Traced", "batch_shape", "compile_batch", "free_bytes", "program_bytes", "trace_member"]
