"""``nnlearn checkpoints``: what a folder of checkpoints holds, and whether it is whole."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from nnlearn.checkpoints import CheckpointError, Checkpoints


@dataclasses.dataclass(frozen=True)
class CheckpointsOptions:
    """List the checkpoints in a folder and check every byte. The exit status is 1 if one is damaged."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of Checkpoints, fit(checkpoints=...) or nnlearn learn --out, which has it inside."""
    json: bool = False
    """Print one JSON object."""


def list_checkpoints(options: CheckpointsOptions) -> int:
    """Run the command, print the table and return the exit status.

    Raises:
      ValueError: if the folder has no checkpoints.
    """
    inner = options.folder / "checkpoints"
    folder = inner if inner.is_dir() else options.folder
    with Checkpoints(folder, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise ValueError(f"folder: {str(options.folder)!r} has no checkpoints")
        damaged = checkpoints.verify()
        rows = [_row(checkpoints, step, damaged.get(step)) for step in steps]
    if options.json:
        print(json.dumps({"folder": str(folder), "checkpoints": rows}))
    else:
        for row in rows:
            metrics = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
            state = f"DAMAGED: {row['damage']}" if row["damage"] else metrics
            print(f"step {row['step']:>9,}  {row['bytes'] / 1e6:8.2f} MB  {state}".rstrip())
    return 1 if damaged else 0


def _row(checkpoints: Checkpoints, step: int, damage: str | None) -> dict[str, Any]:
    try:
        metrics = checkpoints.metrics(step)
    except (CheckpointError, FileNotFoundError):
        metrics = {}
    size = sum(path.stat().st_size for path in checkpoints.path(step).rglob("*") if path.is_file())
    return {"step": step, "bytes": size, "metrics": metrics, "damage": damage}


__all__ = ["CheckpointsOptions", "list_checkpoints"]
