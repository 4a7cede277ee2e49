"""Hardware, versions and the command: what a result should say about how it was made."""

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from nnlearn.native import native_status


def describe_machine() -> dict[str, Any]:
    """Hardware and versions."""
    device = jax.devices()[0]
    packages = ("nnlearn", "jax", "jaxlib", "optax", "numpy")
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "kernels in C": native_status(),
        "versions": {name: version(name) for name in packages},
    }


def describe_command() -> str:
    """The command of this process, with the program's name in place of its path."""
    return shlex.join([Path(sys.argv[0] or "python").name, *sys.argv[1:]])


def provenance() -> dict[str, Any]:
    """Date, command, hardware and versions, as facts for a reader.

    >>> list(provenance())[:2]
    ['date', 'command']
    """
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "command": describe_command(), **describe_machine()}


__all__ = ["describe_command", "describe_machine", "provenance"]
