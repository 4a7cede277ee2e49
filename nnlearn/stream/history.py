"""The records of a run as rows of a file that can be read during the run."""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nnlearn.files import FullDiskError, explaining_full_disk, hold, replacing

Row = dict[str, float]
FORMATS = (".csv", ".jsonl")
CHUNK = 1000  # rows of a checkpoint that are made and written together


class History:
    """Writes rows to a ``.csv`` file or a file of JSON lines, complete after every ``write``.

    A run from step 0 begins a new file and renames an existing one (``run.1.csv``). A resumed run continues its file,
    after removing the rows of steps that it repeats. If the disk is full, rows wait in memory for the next ``write``.

    Args:
      path: a file name that ends with ``.csv`` or ``.jsonl``.
      columns: the names of all columns; a row may lack some.
      first: steps made before; 0 begins a new file.
      saved: the rows after ``first`` that a checkpoint has, which replace those of the file; None if there is none.

    Warns:
      UserWarning: once when the disk is full, and at the end if rows still wait.

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

    def __init__(self, path: str | Path, columns: Sequence[str], first: int = 0, saved: Iterable[Row] | None = None):
        self.path, self.columns = check_history(path), list(columns)
        self.is_table = self.path.suffix == ".csv"
        self._has_space = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._claimed() if self.path.exists() else contextlib.nullcontext():
            resumes = (first > 0 or saved is not None) and self._has_begun()
            if resumes:
                self._cut(first)
            elif self.path.exists():
                move_aside(self.path)
        self._file = self._claimed()
        self._end = os.fstat(self._file.fileno()).st_size  # of the lines that are in the file
        self._waiting = b""  # lines that are not
        self._last: tuple[Row, int] | None = None  # the last row, and where it begins
        if self.is_table and not resumes:
            self._waiting = self._line(self.columns)
            self._flush()
        self._begin = self._end + len(self._waiting)
        self.rewrite(saved or ())

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._waiting and not self._flush():
                warnings.warn(f"history {str(self.path)!r} lacks the last rows: the disk is still full", stacklevel=2)
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
        finally:
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
            self._return_to(begins)
        self._waiting += b"".join(map(self._line_of, rows[:-1]))
        self._last = rows[-1], self._end + len(self._waiting)
        self._waiting += self._line_of(rows[-1])
        self._flush()

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Replace all rows of this run."""
        self._return_to(self._begin)
        self._last, rows = None, iter(rows)
        while chunk := list(itertools.islice(rows, CHUNK)):
            self.write(chunk)

    def _return_to(self, position: int) -> None:
        """Remove the lines from a position on, whether they are in the file or wait."""
        self._waiting = self._waiting[: max(0, position - self._end)]
        self._end = min(self._end, position)
        self._file.truncate(self._end)

    def _flush(self) -> bool:
        """Write the lines that wait, whole or not at all; False if the disk is full."""
        had_space, self._has_space = self._has_space, True
        try:
            with explaining_full_disk(self.path, "Its rows wait in memory until there is space"):
                at = 0
                while at < len(self._waiting):
                    at += self._file.write(self._waiting[at:])
        except FullDiskError as error:
            self._file.truncate(self._end)  # removes a part of a line
            self._has_space = False
            if had_space:
                warnings.warn(f"history {error.strerror}", stacklevel=3)
            return False
        self._end, self._waiting = self._end + len(self._waiting), b""
        return True

    def _claimed(self) -> Any:
        """The file, opened and locked against other runs until it is closed."""
        file = open(self.path, "ab", buffering=0)  # noqa: SIM115
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

    def _line_of(self, row: Row) -> bytes:
        if self.is_table:
            return self._line([row.get(name, "") for name in self.columns])
        return (json.dumps(row) + "\n").encode()

    def _line(self, values: Sequence[Any]) -> bytes:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        return line.getvalue().encode()

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
        content = "".join(kept).encode()
        with open(self.path, "rb") as file:
            only_the_end = file.read(len(content)) == content
        if only_the_end:  # needs no space on the disk
            os.truncate(self.path, len(content))
        else:
            with replacing(self.path, "wb") as file:
                file.write(content)

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
