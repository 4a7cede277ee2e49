"""Sweeps: every setting of a space with every seed, as one program in batches that fit memory."""

import contextlib
import itertools
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from nnlearn.checks import check_count
from nnlearn.sweeps.batches import Resources, Runner, default_workers
from nnlearn.sweeps.members import check_metric
from nnlearn.sweeps.program import trace_member
from nnlearn.sweeps.results import Results
from nnlearn.sweeps.space import Interval, Method, Setting, axes_of, list_settings
from nnlearn.sweeps.store import Store
from nnlearn.train import Train
from nnlearn.train.stopping import check_mode


class SweepInterrupted(KeyboardInterrupt):
    """Raised when a sweep is interrupted; ``results`` holds the finished runs."""

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
    static: Mapping[str, Sequence[Any]] | None = None,
    full: bool = False,
    width: int | None = None,
    memory_limit: int | None = None,
    devices: Sequence[Any] | None = None,
    workers: int | None = None,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Run every setting of a space with every seed, compiled once.

    Settings run side by side under ``vmap``. The settings of one seed share their key, and so their training batches.
    The training functions are traced once, regardless of the number of runs, and all batches of runs have one shape.

    All devices execute one program. Results are equal to the bit on any number of devices of one kind if each device
    gets as many runs in a batch, that is if ``width / len(devices)`` is the same. Another width may round differently.

    The runs of a ``make_train(..., mesh=mesh)`` use the devices of their mesh together.

    Runs with effects (``jax.debug.print``, ``io_callback``) execute sequentially on one device, so that every effect
    occurs once for each run and in order. This is slow: avoid effects in a large sweep.

    Args:
      train: a run of ``make_train`` with hyper-parameters as a dict; with ``static``, a function from a static choice
        to such a run.
      space: by name, an axis or a value that all settings share, see ``list_settings``.
      seeds: the seeds, or their number; run ``(setting, seed)`` is ``train(setting, seed)``.
      metric: the metric to compare: a name from ``evaluate``, ``train_loss``, or ``aux/<path>`` for a scalar in
        ``info.aux``, averaged over the steps since the previous check.
      mode: whether a small ("min") or a large ("max") metric is better.
      samples, method, seed: how to draw settings, see ``list_settings``.
      static: by name, the values of choices that change the program, such as widths or kinds of optimizer. Each
        combination calls ``train`` and compiles one program.
      full: whether to keep all records of every run; otherwise only those at its checks.
      width: the largest number of runs in a batch; None for a width that suits the devices.
      memory_limit: bytes on each device; None for a share of the free memory. The memory is measured from the compiled
        program; a program that takes more is compiled again with a smaller width.
      devices: the devices that share each batch; None for all.
      workers: number of batches that run concurrently, each in its own thread. None for one per core if the only device
        is a CPU, because a program of small matrices occupies one core, otherwise one.
      folder: folder in which each finished batch is stored. A later call with the same folder reads the finished
        batches and resumes the sweep, provided that ``train`` computes the same with the same version of JAX. Only one
        process at a time can use it.
      progress: called as ``progress(finished, total)`` after each batch, with numbers of runs.

    Returns:
      ``Results``, with ``best()``, ``columns()`` and ``plot()``.

    Raises:
      TypeError: if ``train`` is not made by ``make_train``, or ``space`` is not a dict of axes and values.
      ValueError: if there is no setting, if the metric is unknown, if a run takes more than ``memory_limit``, or if the
        folder holds another sweep (such as one of another ``train``) or is used by another process.
      SweepInterrupted: on ``KeyboardInterrupt``, with the finished runs as ``results``.

    >>> import jax.numpy as jnp, nnlearn
    >>> from nnlearn.sweeps.space import choice
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
    trains = _make_trains(train, statics)
    seeds = _seeds(seeds)
    members = [trace_member(each.with_metrics(metric), settings[0], tuple(axes), full) for each in trains]
    for each in members:
        check_metric(each.shapes.metrics, metric)
    trace_seconds = time.perf_counter() - began
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
        programs=tuple(each.identity for each in members),
    )
    devices = list(jax.devices() if devices is None else devices)
    workers = default_workers(devices) if workers is None else check_count("workers", workers)
    resources = Resources(width, memory_limit, devices, workers)
    with contextlib.nullcontext() if folder is None else Store(folder, results.header()) as store:
        runner = Runner(results, members, store, progress)
        try:
            for at in range(len(members)):
                runner.finish(at, resources)
        except KeyboardInterrupt as error:
            raise SweepInterrupted(runner.results(resources, trace_seconds, time.perf_counter() - began)) from error
        return runner.results(resources, trace_seconds, time.perf_counter() - began)


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(seeds, Sequence | np.ndarray):
        return tuple(range(check_count("seeds", seeds)))
    found = tuple(operator.index(seed) for seed in seeds)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"seeds must hold at least one seed, and all different, got {found}")
    return found


def _combinations(static: Mapping[str, Sequence[Any]] | None) -> tuple[dict[str, Any], ...]:
    static = static or {}
    for name, values in static.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"static: {name!r} must be a list of at least one value, got {values!r}")
    return tuple(dict(zip(static, row, strict=True)) for row in itertools.product(*static.values()))


def _make_trains(train: Any, statics: Sequence[dict[str, Any]]) -> list[Train]:
    has_choices = any(statics)
    made = [train(dict(choice)) for choice in statics] if has_choices else [train]
    for each in made:
        if not isinstance(each, Train):
            cure = "a function from a static choice to make_train(...)" if has_choices else "made by make_train(...)"
            raise TypeError(f"train must be {cure}, got {type(each).__name__}")
    return made


__all__ = ["SweepInterrupted", "sweep"]
