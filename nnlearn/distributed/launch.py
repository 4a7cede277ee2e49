"""Run a script in several processes on one host."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

GRACE = 5.0  # seconds between asking processes to end and killing them


def launch(command: Sequence[str], processes: int, *, output: Any = None) -> int:
    """Run a command in several processes, with merged and prefixed output, until all have ended.

    If one fails, the others are ended. Ctrl-C is passed on to all; a second one kills them.

    Args:
      command: the words of the command.
      processes: the number of processes.
      output: a text file for their output; None for standard output.

    Returns:
      0 if all succeeded; otherwise the exit status of the first that failed, 128 + n after signal n.

    Raises:
      ValueError: if the number of processes is below 1.
      OSError: if the command cannot be started.

    >>> launch([sys.executable, "-c", "import os; print(os.environ['NNLEARN_PROCESS'])"], 1)
    [0] 0
    0
    """
    if processes < 1:
        raise ValueError(f"processes must be >= 1, got {processes}")
    output, lock = output or sys.stdout, threading.Lock()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    children: list[subprocess.Popen] = []
    readers = []
    try:
        for index in range(processes):
            own = {"NNLEARN_COORDINATOR": address, "NNLEARN_PROCESSES": str(processes), "NNLEARN_PROCESS": str(index)}
            environment = os.environ | own | {"NNLEARN_LAUNCHER": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
            child = subprocess.Popen(
                list(command),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches them through this process only
            )
            children.append(child)
            readers.append(threading.Thread(target=_copy, args=(child, index, output, lock), daemon=True))
            readers[-1].start()
        return _wait(children, output, lock)
    finally:
        _end(children)
        for reader in readers:
            reader.join(timeout=GRACE)


def _copy(child: subprocess.Popen, index: int, output: Any, lock: Any) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        with lock:
            output.write(f"[{index}] {line.decode(errors='replace').rstrip()}\n")
            output.flush()


def _wait(children: Sequence[subprocess.Popen], output: Any, lock: Any) -> int:
    """Wait for all; the exit status of the first that fails."""
    asked = False
    while True:
        try:
            codes = [child.poll() for child in children]
            bad = next((index for index, code in enumerate(codes) if code), None)
            if bad is not None and not asked:
                code = codes[bad] or 0
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                with lock:
                    output.write(f"nnlearn: process {bad} of {len(children)} {how}; the others are ended\n")
                    output.flush()
                return 128 - code if code < 0 else code
            if all(code is not None for code in codes):
                return 130 if asked else 0
            time.sleep(0.05)
        except KeyboardInterrupt:
            if asked:
                return 130
            asked = True
            _signal(children, signal.SIGINT)


def _end(children: Sequence[subprocess.Popen]) -> None:
    """Ask the processes that still run to end, then kill them."""
    _signal(children, signal.SIGTERM)
    end = time.monotonic() + GRACE
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))
    _signal(children, signal.SIGKILL)
    for child in children:
        child.wait()


def _signal(children: Sequence[subprocess.Popen], number: int) -> None:
    for child in children:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, number)


__all__ = ["launch"]
