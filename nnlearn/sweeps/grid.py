"""Many runs as one program: every setting and every seed, in batches that fit memory."""

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
from nnlearn.sweeps.batches import Means, Runs, default_workers
from nnlearn.sweeps.members import check_metric
from nnlearn.sweeps.program import trace_member
from nnlearn.sweeps.results import Results
from nnlearn.sweeps.space import Interval, Method, Setting, axes_of, list_settings
from nnlearn.sweeps.store import Store
from nnlearn.train import Train
from nnlearn.train.stopping import check_mode


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

    Settings lie side by side under ``vmap``; those of one seed share their key, and so their batches. The training
    functions are called for one trace, whatever the number of runs, and all batches of runs have one shape.

    Runs with effects (``jax.debug.print``, ``io_callback``) are made one after the other on one device, so that every
    effect occurs once for each run and in order. That is slow: leave effects out of a large sweep.

    Args:
      train: made by ``make_train``, with hyper-parameters as a dict; or, with ``static``, a function from a static
        choice to one.
      space: by name an axis, or a value that all settings share, see ``list_settings``.
      seeds: seeds, or how many; run ``(setting, seed)`` is ``train(setting, seed)``.
      metric: what to judge by: a name out of what ``evaluate`` returns, ``train_loss``, or ``aux/<path>`` for a scalar
        that steps recorded in ``info.aux``, its mean over the steps since the check before.
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
      folder: where each finished batch is written, and finished ones are read from: a sweep that was cut short goes on,
        if ``train`` still computes the same with the same version of JAX. One process at a time may use it.
      progress: ``progress(finished, all)`` after each batch, in runs.

    Returns:
      ``Results``: ``best()``, ``columns()``, ``plot()``.

    Raises:
      ValueError: no settings, an unknown metric, a run that needs more than ``memory_limit``, or a folder of another
        sweep (of another ``train``, say), or one that another process is using.
      SweepInterrupted: on a ``KeyboardInterrupt``, with the finished runs as ``results``.

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
    trains = _make_trains(train, static, statics)
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
    means = Means(width, memory_limit, devices, workers)
    with contextlib.nullcontext() if folder is None else Store(folder, results.header()) as keep:
        runs = Runs(results, members, keep, progress)
        try:
            for at in range(len(members)):
                runs.finish(at, means)
        except KeyboardInterrupt as error:
            raise SweepInterrupted(runs.results(means, trace_seconds, time.perf_counter() - began)) from error
        return runs.results(means, trace_seconds, time.perf_counter() - began)


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


__all__ = ["SweepInterrupted", "sweep"]
