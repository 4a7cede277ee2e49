"""The records of a run as rows of a file that can be read during the run."""

import contextlib
import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nnlearn.files import hold, replacing

Row = dict[str, float]
FORMATS = (".csv", ".jsonl")


class History:
    """Writes rows to a ``.csv`` file or a file of JSON lines, complete after every ``write``.

    A run from step 0 begins a new file and renames an existing one (``run.1.csv``). A resumed run continues its file,
    after removing the rows of steps that it repeats.

    Args:
      path: a file name that ends with ``.csv`` or ``.jsonl``.
      columns: the names of all columns; a row may lack some.
      first: steps made before; 0 begins a new file.

    Raises:
      ValueError: if the name ends otherwise, the file being resumed has other columns, or another run is writing it.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "run.csv"
    >>> with History(path, ["step", "loss"], 0) as history:
    ...     history.write([{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan}])
    >>> path.read_text().split()
    ['step,loss', '1,0.5', '2,nan']
    >>> folder.cleanup()
    """

    def __init__(self, path: str | Path, columns: Sequence[str], first: int = 0):
        self.path, self.columns = check_history(path), list(columns)
        self.is_table = self.path.suffix == ".csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._claimed() if self.path.exists() else contextlib.nullcontext():
            resumes = first > 0 and self._has_begun()
            if resumes:
                self._cut(first)
            elif self.path.exists():
                move_aside(self.path)
        self._file = self._claimed()
        self._last: tuple[Row, int] | None = None  # the last row, and its position in the file
        if self.is_table and not resumes:
            csv.writer(self._file, lineterminator="\n").writerow(self.columns)
            self._file.flush()

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows to the file. A first row for the step of the last row is merged into that row.

        Non-finite values are written as ``NaN`` and ``Infinity``, in JSON lines too.
        """
        if not rows:
            return
        if self._last is not None and self._last[0]["step"] == rows[0]["step"]:
            row, begins = self._last
            rows = [row | rows[0], *rows[1:]]
            self._file.seek(begins)
            self._file.truncate()
        self._add(rows[:-1])
        self._last = rows[-1], self._file.tell()
        self._add(rows[-1:])
        self._file.flush()

    def _claimed(self) -> Any:
        """The file, opened and locked against other runs until it is closed."""
        file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        if not hold(file):
            file.close()
            raise ValueError(f"history {str(self.path)!r} is being written by another run: give it another file")
        return file

    def _has_begun(self) -> bool:
        """Whether there is a file to resume. A table whose header line is incomplete does not count."""
        if not self.path.exists():
            return False
        with open(self.path, newline="", encoding="utf-8") as file:
            first_line = file.readline()
        return first_line.endswith("\n") or bool(first_line and not self.is_table)

    def _add(self, rows: Sequence[Row]) -> None:
        if self.is_table:
            csv.DictWriter(self._file, self.columns, restval="", lineterminator="\n").writerows(rows)
        else:
            self._file.writelines(json.dumps(row) + "\n" for row in rows)

    def _cut(self, first: int) -> None:
        """Remove the rows after step ``first``, and an incomplete last line."""
        kept, step_of = [], self._step_of()
        with open(self.path, newline="", encoding="utf-8") as file:
            if self.is_table:
                kept.append(header := file.readline())
                if next(csv.reader([header]), []) != self.columns:
                    raise ValueError(
                        f"history {str(self.path)!r} has the columns {header.strip()}, but this run has "
                        f"{','.join(self.columns)}: give it another file"
                    )
            kept += [line for line in file if line.endswith("\n") and step_of(line) <= first]
        with replacing(self.path, newline="", encoding="utf-8") as file:
            file.writelines(kept)

    def _step_of(self) -> Callable[[str], float]:
        def step_of(line: str) -> float:
            try:
                return float(line.split(",")[0] if self.is_table else json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                return math.inf

        return step_of


def check_history(path: str | Path) -> Path:
    """``path`` as a ``Path``.

    Raises:
      ValueError: if its suffix is not a known format.

    >>> check_history("run.txt")
    Traceback (most recent call last):
    ValueError: history must be a file name that ends with .csv or .jsonl, got 'run.txt'
    """
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"history must be a file name that ends with .csv or .jsonl, got {str(path)!r}")
    return Path(path)


def move_aside(path: Path) -> Path:
    """Rename a file to the first free name of ``run.1.csv``, ``run.2.csv`` ... and return it."""
    index = 1
    while (aside := path.with_name(f"{path.stem}.{index}{path.suffix}")).exists():
        index += 1
    return path.rename(aside)


__all__ = ["History", "Row", "check_history", "move_aside"]
