"""``nnlearn launch``: a script in several processes on this host."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from nnlearn.distributed import launch


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """Run a Python script in several processes, with merged output and one exit status.

    The script calls nnlearn.distributed.start(). If a process fails, the others are ended.
    """

    script: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SCRIPT ...")]
    """The script and its arguments."""
    processes: int = 2
    """Number of processes."""


def launch_script(options: LaunchOptions) -> int:
    """Run the command and return the exit status: 0, or that of the first process that failed."""
    if not options.script:
        raise ValueError("script: give a script, as in 'nnlearn launch --processes 4 train.py'")
    return launch([sys.executable, *options.script], options.processes)


def before_script(words: Sequence[str]) -> list[str]:
    """The words of the command with ``--`` before the script, because the words after it are the script's.

    >>> before_script(["--processes", "4", "train.py", "--rate", "0.1"])
    ['--processes', '4', '--', 'train.py', '--rate', '0.1']
    """
    at = 0
    while at < len(words) and words[at].startswith("-") and words[at] != "--":
        at += 2 if words[at] == "--processes" else 1
    rest = list(words[at:])
    return [*words[:at], "--", *rest] if rest and rest[0] != "--" else list(words)


__all__ = ["LaunchOptions", "before_script", "launch_script"]
