"""Several processes on one host: the trajectory of one process, the end of all after a failure, restarts, elasticity.

Usage: python benchmarks/processes.py

Every case starts real processes of the script ``benchmarks/worker.py``, which trains a small transformer under FSDP.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, argument_parser

WORKER = Path(__file__).with_name("worker.py")
EPOCHS, EXAMPLES = 4, 30


def start(processes: int, folder: Path, **options: Any) -> list[subprocess.Popen]:
    """Start workers without a launcher; process ``odd``, if given, gets other options."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    odd = options.pop("odd", {})
    found = []
    for index in range(processes):
        place = {"COORDINATOR": address, "PROCESSES": str(processes), "PROCESS": str(index)}
        given = {"folder": str(folder), "epochs": EPOCHS} | options | odd.get(index, {})
        log = open(folder.parent / f"{folder.name}-{index}.log", "w")  # noqa: SIM115
        found.append(
            subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(given)],
                env=os.environ | {f"NNLEARN_{name}": value for name, value in place.items()},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
    return found


def logs(folder: Path, processes: int) -> list[str]:
    return [(folder.parent / f"{folder.name}-{index}.log").read_text() for index in range(processes)]


def finish(children: list[subprocess.Popen], limit: float = 900) -> list[int]:
    end = time.monotonic() + limit
    try:
        return [child.wait(max(1, end - time.monotonic())) for child in children]
    finally:
        for child in children:
            child.kill()


def trained(processes: int, folder: Path, **options: Any) -> dict[str, Any]:
    """The record that process 0 prints at the end of a run."""
    codes = finish(start(processes, folder, **options))
    outputs = logs(folder, processes)
    if any(codes):
        raise RuntimeError("\n".join(outputs))
    line = next(line for line in outputs[0].splitlines() if line.startswith("{"))
    return json.loads(line)


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return float(np.abs(np.array(one["loss"]) - np.array(other["loss"])).max())


def every_example(run: dict[str, Any]) -> bool:
    """Whether each epoch has trained once on every example, by the counts that the program of the step returned."""
    counts = np.array(run["seen"])
    return len(counts) % EPOCHS == 0 and bool((counts.reshape(EPOCHS, -1, EXAMPLES).sum(1) == 1).all())


def kill(processes: int, victim: int, folder: Path) -> dict[str, Any]:
    """Kill one process with SIGKILL in the middle of a run, and measure when the others end."""
    children = start(processes, folder, epochs=100_000)
    marker = folder.parent / f"{folder.name}-0.log"
    while "step 4\n" not in marker.read_text():
        time.sleep(0.05)
        if children[0].poll() is not None:
            raise RuntimeError(marker.read_text())
    killed = time.monotonic()
    children[victim].send_signal(signal.SIGKILL)
    ends = {}
    while len(ends) < processes - 1 and time.monotonic() < killed + 120:
        for index, child in enumerate(children):
            if index != victim and index not in ends and child.poll() is not None:
                ends[index] = time.monotonic() - killed
        time.sleep(0.02)
    finish(children, 1)
    outputs = [text for index, text in enumerate(logs(folder, processes)) if index != victim]
    named = [f"nnlearn: process {victim} of {processes} (pid {children[victim].pid}" in text for text in outputs]
    # if the coordinator dies, JAX's runtime may end the others before nnlearn does
    words = ("nnlearn: process", "the leader")
    message = next((line for line in outputs[0].splitlines() if any(word in line for word in words)), "")
    return {
        "case": "kill",
        "processes": processes,
        "victim": victim,
        "seconds": ends,
        "named": sum(named),
        "message": message,
    }


def main() -> None:
    options = argument_parser(__doc__, "processes").parse_args()
    report = Report(options, epochs=EPOCHS, examples=EXAMPLES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = trained(1, folder / "1")
        trajectories = [
            {
                "case": "trajectory",
                "processes": count,
                "difference": largest_difference(alone, run),
                "every example": every_example(run),
            }
            for count in (2, 4)
            for run in [trained(count, folder / str(count))]
        ]
        print(trajectories, flush=True)
        report.add(trajectories)
        restarts = []
        for first, second in ((2, 4), (4, 1)):
            place = folder / f"{first}to{second}"
            before = trained(first, place, stop_at=6)  # inside an epoch
            after = trained(second, place)  # its record begins with the steps of the first run
            restarts.append(
                {
                    "case": "restart",
                    "from": first,
                    "to": second,
                    "difference": largest_difference(alone, after),
                    "steps before": len(before["seen"]),
                    "every example": every_example(after) and after["seen"][:6] == before["seen"],
                }
            )
        print(restarts, flush=True)
        report.add(restarts)
        kills = [
            kill(2, 0, folder / "k0"),
            kill(2, 1, folder / "k1"),
            kill(4, 2, folder / "k2"),
            kill(4, 0, folder / "k3"),
        ]
        print(kills, flush=True)
        report.add(kills)
        stopped = interrupt(folder / "signal")
        print(stopped, flush=True)
        report.add([stopped])
        failed = failures(folder)
        print(failed, flush=True)
        report.add(failed)
    report.close()


def interrupt(folder: Path) -> dict[str, Any]:
    """Send SIGTERM to one process of two: both end after the same step, with a checkpoint."""
    children = start(2, folder, epochs=100_000)
    marker = folder.parent / f"{folder.name}-0.log"
    while "step 4\n" not in marker.read_text():
        time.sleep(0.05)
    children[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    codes = finish(children, 60)
    steps = [line for line in marker.read_text().splitlines() if line.startswith("step")]
    saved = sorted(path.name for path in folder.glob("step-*"))
    return {
        "case": "SIGTERM",
        "seconds": time.monotonic() - began,
        "codes": codes,
        "last_step": steps[-1],
        "newest": saved[-1],
        "parts": len(list((folder / saved[-1]).glob("arrays-*"))),
    }


def failures(folder: Path) -> list[dict[str, Any]]:
    """One process with another program, and one that raises an error."""
    found = []
    for name, odd in {"another program": {1: {"width": 24}}, "an error": {1: {"raise_at": 5}}}.items():
        began, place = time.monotonic(), folder / name.replace(" ", "-")
        codes = finish(start(2, place, odd=odd, epochs=1000))
        lines = [line for line in logs(place, 2)[0].splitlines() if "process" in line and "Gloo" not in line]
        message = lines[-1] if lines else ""
        found.append({"case": name, "seconds": time.monotonic() - began, "codes": codes, "message": message})
    return found


if __name__ == "__main__":
    main()
