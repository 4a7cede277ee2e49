"""A run as plain arrays: what pages and figures of runs are drawn from."""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

SEED = "seed"
LOSSES = frozenset(("loss", "losses", "nll", "mse", "rmse", "mae", "error", "perplexity", "bits", "wer", "cer"))
SCORES = frozenset(
    ("accuracy", "acc", "score", "auc", "auroc", "f1", "precision", "recall", "iou", "dice", "bleu", "rouge", "psnr")
    + ("ssim", "r2", "reward", "return", "correct", "top1", "top5", "ndcg", "mrr")
)
HELD_OUT = frozenset(("validation", "valid", "val", "eval", "dev"))


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


def mode_of(metric: str) -> Literal["min", "max"]:
    """Whether a small or a large value of a metric is better, from its name; small, if the name does not tell.

    >>> mode_of("val_accuracy"), mode_of("val/loss"), mode_of("size")
    ('max', 'min', 'min')
    """
    return "max" if _words(metric) & SCORES and not is_loss(metric) else "min"


def is_loss(metric: str) -> bool:
    """Whether a metric is a loss or an error, from its name."""
    return bool(_words(metric) & LOSSES)


def ranking_metric(names: Collection[str]) -> str:
    """The metric that ranks runs if nobody has chosen one: a loss on held-out examples if there is one.

    >>> ranking_metric(["accuracy", "val_loss"]), ranking_metric(["size", "train_loss"]), ranking_metric([])
    ('val_loss', 'size', 'loss')
    """

    def place(name: str) -> tuple[bool, bool, bool]:
        return "train" in _words(name), not is_loss(name), not _words(name) & HELD_OUT

    return min(names, key=place, default="loss")


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


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


__all__ = [
    "SEED",
    "Group",
    "Layers",
    "RunRecord",
    "Series",
    "best_first",
    "differing",
    "group_runs",
    "is_loss",
    "mode_of",
    "ranking_metric",
]
