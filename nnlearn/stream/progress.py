"""A progress bar in the terminal; rich is imported when one is shown."""

import sys
import time
from typing import Any, Self

REFRESH_SECONDS = 0.1


class NoProgress:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, step: int, loss: float, rate: float | None) -> None:
        """No-op."""


class Bar(NoProgress):
    """Shows steps, loss, learning rate, speed and the remaining time.

    Args:
      console: a ``rich.console.Console``.
      first: steps made before.
      total: steps of the run, or None if unknown.
    """

    def __init__(self, console: Any, first: int, total: int | None):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.fields[text]}")
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), text, TimeRemainingColumn(compact=True))
        self._progress = Progress(*columns, console=console, expand=True)
        self._task = self._progress.add_task("", total=total, text="")
        self._first, self._shown_at = first, 0.0
        self._latest: tuple[int, float, float | None, float] | None = None
        self._start: tuple[int, float] | None = None  # after the first steps, which include compilation

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._show()
        self._progress.stop()

    def update(self, step: int, loss: float, rate: float | None) -> None:
        """Update the position; redraws at most every ``REFRESH_SECONDS``."""
        now = time.monotonic()
        self._latest = (step, loss, rate, now)
        if self._start is None:
            self._start = (step, now)
        if now - self._shown_at >= REFRESH_SECONDS:
            self._shown_at = now
            self._show()

    def _show(self) -> None:
        if self._latest is None or self._start is None:
            return
        step, loss, rate, now = self._latest
        parts = [f"loss {loss:.4g}"]
        if rate is not None:
            parts.append(f"lr {rate:.3g}")
        first, start = self._start
        if step > first and now > start:
            parts.append(f"{(step - first) / (now - start):.4g} steps/s")
        self._progress.update(self._task, completed=step - self._first, text="  ".join(parts))


def show_progress(progress: Any, first: int, total: int | None) -> NoProgress:
    """The progress display for ``fit``'s argument ``progress``.

    Args:
      progress: None for a bar on a terminal or in a notebook, True or False, or a ``rich.console.Console``.
      first, total: see ``Bar``.

    >>> type(show_progress(False, 0, 10)).__name__
    'NoProgress'
    """
    if progress is False or (progress is None and not _is_watched()):
        return NoProgress()
    from rich.console import Console

    if progress is not None and progress is not True and not isinstance(progress, Console):
        raise TypeError(f"progress must be None, True, False or a rich.console.Console, got {progress!r}")
    return Bar(progress if isinstance(progress, Console) else Console(stderr=True), first, total)


def _is_watched() -> bool:
    """Whether there is a notebook or a terminal."""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


__all__ = ["Bar", "NoProgress", "show_progress"]
