"""A run as plain arrays: what pages and figures of runs are drawn from."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SEED = "seed"


class Series(NamedTuple):
    """Values at ascending steps; both have shape (n,)."""

    step: np.ndarray
    value: np.ndarray


class Layers(NamedTuple):
    """Statistics of each parameter over the steps.

    Attributes:
      step: shape (n,).
      leaves: the names of the parameters.
      values: by name of the statistic, shape (n, leaves).
    """

    step: np.ndarray
    leaves: tuple[str, ...]
    values: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
      name: of the run, or of the file or sweep that it comes from.
      series: curves by name: ``loss``, ``learning_rate``, metrics.
      metrics: the names among them that are metrics of checks.
      config: hyper-parameters and choices by name; runs that differ only in ``seed`` are drawn as one band.
      scores: metrics at the end of the run by name; NaN or infinite if it failed.
      layers: statistics of the parameters, or None.
      steps: the number of steps.
      stopped_by: the rule that stopped it.
    """

    name: str
    series: Mapping[str, Series]
    metrics: tuple[str, ...] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layers: Layers | None = None
    steps: int = 0
    stopped_by: str = ""


class Group(NamedTuple):
    """Runs that differ only in their seed.

    Attributes:
      name, config: of all of them; ``config`` is without the seed.
      runs: their indices.
    """

    name: str
    config: dict[str, Any]
    runs: list[int]


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """The runs in groups, in the order of their first members.

    >>> runs = [RunRecord("a", {}, config={"rate": rate, "seed": seed}) for rate in (1, 2) for seed in (0, 1)]
    >>> [(group.config, group.runs) for group in group_runs(runs)]
    [({'rate': 1}, [0, 1]), ({'rate': 2}, [2, 3])]
    """
    groups: dict[str, Group] = {}
    for index, run in enumerate(runs):
        config = {name: value for name, value in run.config.items() if name != SEED}
        identity = json.dumps([run.name, config], sort_keys=True, default=str)
        groups.setdefault(identity, Group(run.name, config, [])).runs.append(index)
    return list(groups.values())


def best_first(runs: Sequence[RunRecord], metric: str, mode: str) -> list[int]:
    """The indices of the runs, the best first, those without a finite score last.

    >>> best_first([RunRecord("a", {}, scores={"loss": loss}) for loss in (2.0, np.nan, 1.0)], "loss", "min")
    [2, 0, 1]
    """
    scores = np.array([run.scores.get(metric, np.nan) for run in runs], float)
    ranked = np.where(np.isfinite(scores), scores if mode == "min" else -scores, np.inf)
    return np.argsort(ranked, kind="stable").tolist()


def differing(configs: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """The names whose values differ, and those that are the same everywhere, with their value.

    >>> differing([{"rate": 1, "decay": 0}, {"rate": 2, "decay": 0}])
    (['rate'], {'decay': 0})
    """
    names = dict.fromkeys(name for config in configs for name in config)
    same = {
        name: configs[0][name]
        for name in names
        if all(name in config and str(config[name]) == str(configs[0][name]) for config in configs)
    }
    return [name for name in names if name not in same], same


__all__ = ["SEED", "Group", "Layers", "RunRecord", "Series", "best_first", "differing", "group_runs"]
