"""One page or figure of several sources."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nnlearn.diagnose import Report
from nnlearn.report.sources import Source, read_source
from nnlearn.train.records import write_records


def write_report(
    sources: str | Path | Source | Sequence[str | Path | Source],
    path: str | Path,
    *,
    title: str | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
) -> Path:
    """Write a page of one or several runs, sweeps or comparisons, with what differs between them.

    Args:
      sources: files or folders, see ``read_source``, or what it returned. The findings of diagnoses among them come
        first.
      path: an ``.html`` file for a page that needs no network, or a ``.pdf``, ``.svg`` or ``.png`` file for a static
        figure as wide as one column of a paper.
      title: the heading; the names of the sources by default.
      metric, mode: the metric that ranks the runs, and whether a small or a large one is better; by default those of
        the first sweep, or result of ``learn`` or ``compare``, else as in ``Trace.report``.

    Returns:
      The path.

    Raises:
      FileNotFoundError: if a source does not exist.
      ValueError: if a source holds no run, or the suffix is unknown.
      ImportError: if a figure is drawn without matplotlib.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "run.csv").write_text("step,loss\\n1,2.0\\n2,1.0\\n")
    ...     page = write_report(Path(folder) / "run.csv", Path(folder) / "run.html")
    ...     "<title>run</title>" in page.read_text()
    True
    """
    if isinstance(sources, str | Path | Source):
        sources = [sources]
    found = [each if isinstance(each, Source) else read_source(each) for each in sources]
    with_runs = [source for source in found if source.runs]
    if not with_runs:
        raise ValueError("a report needs at least one run: a trace, a history, a sweep or a result")
    runs = [run for source in with_runs for run in _told_apart(source, with_runs, sources, found)]
    names = list(dict.fromkeys(run.name for run in runs))
    chosen = next((each for each in with_runs if each.metric and metric in (None, each.metric)), Source())
    facts: dict[str, Any] = {}
    for source in found:
        prefix = f"{source.runs[0].name}: " if source.runs and len(with_runs) > 1 else ""
        facts |= {prefix + key: value for key, value in source.facts.items()}
    return write_records(
        path,
        runs,
        title=title or (", ".join(names) if len(names) < 4 else f"{len(names)} runs"),
        diagnosis=_united([source.diagnosis for source in found if source.diagnosis is not None]),
        metric=metric or chosen.metric,
        mode=mode or chosen.mode,
        logarithmic={name for source in with_runs for name in source.logarithmic},
        facts=facts,
        samples={title: text for source in found for title, text in source.samples.items()},
    )


def _told_apart(
    source: Source, with_runs: Sequence[Source], given: Sequence[Any], found: Sequence[Source]
) -> list[Any]:
    """The runs of a source; if another source has the same name, under its path."""
    names = Counter(each.runs[0].name for each in with_runs)
    if names[source.runs[0].name] < 2:
        return list(source.runs)
    path = given[next(at for at, each in enumerate(found) if each is source)]
    unique = str(path) if isinstance(path, str | Path) else f"{source.runs[0].name} {found.index(source)}"
    return [dataclasses.replace(run, name=unique) for run in source.runs]


def _united(diagnoses: Sequence[Report]) -> Report | None:
    if len(diagnoses) < 2:
        return next(iter(diagnoses), None)
    findings = tuple(finding for report in diagnoses for finding in report.findings)
    return Report(findings, tuple(check for report in diagnoses for check in report.checks))


__all__ = ["write_report"]
