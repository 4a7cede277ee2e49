"""Runs as plain arrays from the files of nnlearn: traces, sweeps, histories, results of ``learn`` and ``compare``."""

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnlearn.diagnose import Report
from nnlearn.diagnose.report import FORMAT as DIAGNOSIS
from nnlearn.figures.page import Layers, RunRecord, Series
from nnlearn.sweeps import Results
from nnlearn.train.records import MONITORED, run_records
from nnlearn.train.trace import Trace

INFO = (
    "loss",
    "grad_norm",
    "update_norm",
    "learning_rate",
    "skipped",
    "noise_scale",
    "aux",
    "leaf_grad_norms",
    "layers",
)
KINDS = (
    "a trace (.npz), a history (.csv, .jsonl), a diagnosis (.json), or a folder of sweep, learn --out or compare --out"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a file or folder holds.

    Attributes:
      runs: its runs.
      metric, mode, logarithmic: as in ``Trace.report``; None if it does not say.
      facts: how it was made.
      samples: texts by title.
      diagnosis: the report of a diagnosis, or None.
    """

    runs: Sequence[RunRecord] = ()
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    logarithmic: tuple[str, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: Mapping[str, str] = dataclasses.field(default_factory=dict)
    diagnosis: Report | None = None


def read_source(path: str | Path) -> Source:
    """Read the runs in a file or folder that nnlearn wrote. Reading runs no code.

    Args:
      path: a trace (``Trace.save``), a history of ``fit`` or ``run`` (.csv or .jsonl), a diagnosis (``Report.save``),
        the folder of a sweep, or that of ``nnlearn learn --out`` or ``nnlearn compare --out``.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is none of these, or damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "run.csv").write_text("step,loss,accuracy\\n1,2.0,\\n2,1.0,0.5\\n")
    ...     run = read_source(Path(folder) / "run.csv").runs[0]
    >>> run.metrics, run.series["loss"].value.tolist()
    (('accuracy',), [2.0, 1.0])
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    name = path.stem if path.is_file() else path.resolve().name
    if path.is_dir():
        return _read_folder(path, name)
    if path.suffix == ".npz":
        return Source(run_records(Trace.load(path), name))
    if path.suffix in (".csv", ".jsonl"):
        return Source([_read_history(path, name)])
    if path.suffix == ".json":
        return _read_json(path, name)
    raise ValueError(f"{str(path)!r} is no run: give {KINDS}")


def _read_folder(folder: Path, name: str) -> Source:
    if (folder / "sweep.json").exists():
        results = Results.load(folder)
        return Source(results.records(name), results.metric, results.mode, tuple(results.logarithmic))
    for inner in ("result.json", "results.json"):
        if (folder / inner).exists():
            return _read_json(folder / inner, name)
    raise ValueError(f"the folder {str(folder)!r} holds no run: give {KINDS}")


def _read_json(path: Path, name: str) -> Source:
    try:
        tree = json.loads(path.read_text())
        if not isinstance(tree, dict):
            raise ValueError("it is not an object")
        if tree.get("format") == DIAGNOSIS:
            return Source(diagnosis=Report.from_json(path.read_text()))
        if "checks" in tree and "settings" in tree:
            return _read_learn(path.parent, tree, name)
        if "curves" in tree and "settings" in tree:
            return _read_compare(tree, name)
        raise ValueError("it is neither a diagnosis nor a result of learn or compare")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error


def _read_learn(folder: Path, tree: dict[str, Any], name: str) -> Source:
    settings = {key: value for key, value in tree["settings"].items() if key not in ("out", "resume", "checks")}
    target = tree["target"]
    if (folder / "trace.npz").exists():
        (run,) = run_records(Trace.load(folder / "trace.npz"), name)
    else:
        checks = tree["checks"]
        step = np.array([check["step"] for check in checks])
        names = [key for key in checks[0] if key != "step"]
        series = {key: Series(step, np.array([check[key] for check in checks], float)) for key in names}
        run = RunRecord(name, series, tuple(names), steps=int(step[-1]), stopped_by="all steps")
    scores = {f"test {key}": float(value) for key, value in tree["metrics"].items()}
    run = dataclasses.replace(run, config={**settings, **tree.get("hparams", {})}, scores=scores)
    said = "reached" if target["reached"] else "not reached"
    facts = {"target": f"{target['metric']} {target['value']:.4g}: {said}", "baselines": tree["baselines"]}
    facts["seconds"] = round(tree["seconds"], 1)
    samples = {"Sample of the network's output": tree["sample"]} if tree.get("sample") else {}
    return Source([run], f"test {target['metric']}", target.get("mode", "min"), (), facts, samples)


def _read_compare(tree: dict[str, Any], name: str) -> Source:
    settings = tree["settings"]
    rates, own = settings["learning_rates"], settings.get("problem") is not None
    loss, metric = tree.get("loss", "validation loss"), tree["metric"] if own else f"test {tree['metric']}"
    runs = []
    for optimizer, libraries in tree["curves"].items():
        for library, curves in libraries.items():
            parts = {"train loss": "train_sre", metric: "test_sre", loss: "validation_sre"}
            arrays = {title: np.array(curves[part], float) for title, part in parts.items()}
            seeds, _, epochs = arrays["train loss"].shape
            step = np.arange(1, epochs + 1)
            for seed in range(seeds):
                for at, rate in enumerate(rates):
                    series = {title: Series(step, values[seed, at]) for title, values in arrays.items()}
                    config = {"optimizer": optimizer, "library": library, "rate": rate, "seed": seed}
                    scores = {title: float(values[seed, at, -1]) for title, values in arrays.items()}
                    scores = {title: scores[title] for title in dict.fromkeys((loss, metric))}
                    runs.append(RunRecord(name, series, tuple(series), config, scores, steps=epochs))
    facts = {"compared with": tree["command"], "steps on the page": "checks" if own else "epochs"}
    facts["run" if own else "data"] = settings["problem"] if own else settings["data"]
    return Source(runs, loss, "min", ("rate",), facts)


def _read_history(path: Path, name: str) -> RunRecord:
    with open(path, newline="", encoding="utf-8") as file:
        try:
            if path.suffix == ".csv":
                rows: list[dict[str, Any]] = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.endswith("\n")]
            names = list(dict.fromkeys(key for row in rows for key in row if key is not None))
            columns = {key: np.array([_number(row.get(key)) for row in rows]) for key in names}
            step = columns.pop("step").astype(int)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"cannot read {str(path)!r} as a history: {error!r}") from error
    if not len(step):
        raise ValueError(f"the history {str(path)!r} has no rows yet")
    given = {key: [row.get(key) not in (None, "") for row in rows] for key in columns}
    metrics = tuple(key for key in columns if key.split("/")[0] not in INFO)
    plain = [key for key in columns if key.split("/")[0] not in ("layers", "leaf_grad_norms")]
    series = {key: Series(step[given[key]], columns[key][given[key]]) for key in plain if any(given[key])}
    last = {key: float(series[key].value[-1]) for key in (*metrics, "loss") if key in series}
    kept = [key for key in metrics if key in last and key != "train_loss"] or [key for key in ("loss",) if key in last]
    return RunRecord(
        name,
        series,
        tuple(key for key in metrics if key in series),
        scores={key: last[key] for key in kept},
        layers=_layers_of(columns, step),
        steps=int(step[-1]),
    )


def _number(text: Any) -> float:
    return np.nan if text is None or text == "" else float(text)


def _layers_of(columns: Mapping[str, np.ndarray], step: np.ndarray) -> Layers | None:
    """The columns ``layers/<statistic>/<name>``, or those of the norms of gradients."""
    for statistics in ([(name, f"layers/{name}/") for name in MONITORED], [("grad_norm", "leaf_grad_norms/")]):
        found: dict[str, np.ndarray] = {}
        leaves: tuple[str, ...] = ()
        for name, prefix in statistics:
            own = [key for key in columns if key.startswith(prefix)]
            if own:
                leaves = tuple(key.removeprefix(prefix) for key in own)
                found[name] = np.stack([columns[key] for key in own], axis=1)
        if found:
            return Layers(step, leaves, found)
    return None


__all__ = ["Source", "read_source"]
