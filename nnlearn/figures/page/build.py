"""The numbers of a page, in types of JSON, and few enough for a file of some megabytes."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from nnlearn.figures.page.record import (
    SEED,
    Layers,
    RunRecord,
    Series,
    best_first,
    differing,
    group_runs,
    mode_of,
    ranking_metric,
)
from nnlearn.figures.page.thin import Grid, encode, grid_of, thin

CURVE_NUMBERS = 450_000  # in all curves together, 2.4 MB of base64
LAYER_NUMBERS = 150_000
POINTS = (60, 1500)  # of one curve, at least and at most
LAYER_POINTS = (24, 200)
MOST_RUNS = 400
MOST_LEAVES = 64
RATE = "learning_rate"
SHARPNESS = "sharpness"


def page_data(
    runs: Sequence[RunRecord], *, metric: str | None = None, mode: str | None = None, logarithmic: Collection[str] = ()
) -> dict[str, Any]:
    """What the script of the page draws.

    Args:
      runs: at least one.
      metric: the score by which runs are ranked; None for a loss on held-out examples if they have one, else the first
        score, else the last loss.
      mode: whether a small ("min") or a large ("max") score is better; None to tell it from the name of the metric.
      logarithmic: names of hyper-parameters to draw on a logarithmic axis.

    Returns:
      A dict of JSON types.
    """
    named = dict.fromkeys(name for run in runs for name in run.scores)
    metric = metric or ranking_metric(named)
    mode = mode or mode_of(metric)
    ranks = best_first(runs, metric, mode)
    shown = sorted(ranks[:MOST_RUNS])
    kept, left_out = [runs[index] for index in shown], len(runs) - len(shown)
    groups = group_runs(kept)
    varied, same = differing([group.config for group in groups])
    return {
        "metric": metric,
        "mode": mode,
        "left_out": left_out,
        "scores": list(named) or [metric],
        "varied": varied,
        "same": {name: _plain(value) for name, value in same.items()},
        "logarithmic": [name for name in varied if name in logarithmic],
        "groups": [
            {"name": group.name, "config": {key: _plain(value) for key, value in group.config.items()}}
            | {"runs": group.runs}
            for group in groups
        ],
        "runs": [
            {
                "seed": _plain(run.config.get(SEED)),
                "steps": run.steps,
                "stopped": run.stopped_by,
                "scores": {name: _plain(float(value)) for name, value in run.scores.items()},
            }
            for run in kept
        ],
        "panels": _panels(kept),
        "layers": _layers(kept, [shown.index(index) for index in ranks if index in shown]),
    }


def _panels(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The curves of all runs, one panel for each name; the loss, the metrics and the schedule first."""
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    metrics = {name for run in runs for name in run.metrics}

    def place(name: str) -> int:
        if name == "loss":
            return 0
        if name in metrics:
            return 1
        return 2 if name.startswith(RATE) else 3 if name.endswith(SHARPNESS) else 4

    count = sum(name in run.series for run in runs for name in names)
    points = int(np.clip(CURVE_NUMBERS // max(3 * count, 1), *POINTS))
    return [_panel(name, runs, points, place(name)) for name in sorted(names, key=place)]


def _panel(name: str, runs: Sequence[RunRecord], points: int, place: int) -> dict[str, Any]:
    grid = grid_of([run.series[name].step for run in runs if name in run.series], points)
    lines, ends, lowest, highest = [], [], math.inf, -math.inf
    for index, run in enumerate(runs):
        if name not in run.series:
            continue
        thinned = thin(run.series[name], grid)
        line: dict[str, Any] = {"run": index, "mean": encode(thinned.mean), "bad": thinned.bad}
        if grid.edges is not None:
            line |= {"low": encode(thinned.low), "high": encode(thinned.high)}
        if name.endswith(SHARPNESS) and RATE in run.series:
            line["limit"] = encode(_limit(grid, run.series[RATE]))
        finite = thinned.low[np.isfinite(thinned.low)]
        if len(finite):
            lowest, highest = min(lowest, finite.min()), max(highest, np.nanmax(thinned.high))
            ends.append(finite[[0, -1]])
        lines.append(line)
    kind = ("loss", "metric", "schedule", "sharpness", "other")[place]
    falls = [end < begin for begin, end in ends]
    logarithmic = lowest > 0 and highest > 20 * lowest and np.mean(falls) > 0.5 and not name.startswith(RATE)
    per_point = 1 if grid.edges is None else math.ceil((grid.step[-1] - grid.step[0]) / len(grid.step))
    title = "loss of each batch" if name == "loss" else name
    if name.startswith("check/"):
        title = f"{name.removeprefix('check/')} at checks"
    return {
        "name": name,
        "title": title,
        "kind": kind,
        "log": bool(logarithmic),
        "steps_per_point": per_point,
        "step": encode(grid.step),
        "lines": lines,
    }


def _limit(grid: Grid, rate: Series) -> np.ndarray:
    """Twice the inverse of the learning rate at the points of a grid."""
    rates = np.interp(grid.step, rate.step, np.asarray(rate.value, float))
    return np.where(rates > 0, 2 / np.where(rates > 0, rates, 1), np.nan)


def _layers(runs: Sequence[RunRecord], best_first: Sequence[int]) -> list[dict[str, Any]]:
    """Heat maps of the best runs that have some, as many as fit."""
    found, room = [], LAYER_NUMBERS
    for index in best_first:
        layers = runs[index].layers
        if layers is None or not layers.values:
            continue
        leaves = min(len(layers.leaves), MOST_LEAVES)
        points = int(np.clip(LAYER_NUMBERS // (4 * len(layers.values) * leaves), *LAYER_POINTS))
        room -= points * len(layers.values) * leaves
        if room < 0 and found:
            break
        found.append(_heat_maps(index, layers, points))
    return found


def _heat_maps(index: int, layers: Layers, points: int) -> dict[str, Any]:
    rows = np.linspace(0, len(layers.leaves) - 1, min(len(layers.leaves), MOST_LEAVES)).round().astype(int)
    grid = grid_of([layers.step], points)

    def map_of(values: np.ndarray) -> str:
        return encode(np.stack([thin(Series(layers.step, values[:, row]), grid).mean for row in rows]))

    return {
        "run": index,
        "leaves": [layers.leaves[row] for row in rows],
        "of": len(layers.leaves),
        "step": encode(grid.step),
        "maps": {name: map_of(np.asarray(values, float)) for name, values in layers.values.items()},
    }


def _plain(value: Any) -> Any:
    """The value in a type of JSON; numbers that are not finite become None, other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


__all__ = ["page_data"]
