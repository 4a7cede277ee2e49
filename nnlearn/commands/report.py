"""``nnlearn report``: a page or figure of runs."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nnlearn.report import write_report


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Write one page, or a figure for a paper, of one or several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Traces (.npz), histories (.csv, .jsonl), diagnoses (.json), and folders of nnlearn sweep, learn --out or
    compare --out."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("report.html")
    """File to write: .html for a page that needs no network; .pdf, .svg or .png for a figure of one column."""
    title: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Heading; by default the names of the runs."""
    metric: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Metric that ranks the runs."""
    mode: Literal["min", "max"] | None = None
    """Whether a small or a large metric is better."""


def make_report(options: ReportOptions) -> None:
    """Run the command.

    Raises:
      ValueError: if a file is no run, or the suffix is unknown.
      OSError: if a file does not exist, or the report cannot be written.
    """
    if not options.runs:
        raise ValueError("runs must name at least one file or folder")
    path = write_report(options.runs, options.out, title=options.title, metric=options.metric, mode=options.mode)
    print(f"written: {path}")


__all__ = ["ReportOptions", "make_report"]
