"""Runs per second and memory, by the number of runs in a compiled batch.

    python benchmarks/sweep_scaling.py                   # 1 to 1,024 runs per batch, 200 steps each
    python benchmarks/sweep_scaling.py --quick           # 1 to 16, writes nothing

The runs are those of ``sweep_speed.py``: a 64-32-10 network on digits with Adam and training batches of 32, which all
runs of a batch share. Widths take turns. ``workers`` batches run concurrently, as in ``sweep``; a sample is one batch
of each worker. Memory is that of the compiled program (arguments, results, scratch) for one worker. A figure is written
next to the JSON file.
"""

import argparse
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from harness import Report, argument_parser, output_path, show
from sweep_speed import make_problem

from nnlearn.sweeps.batches import default_workers
from nnlearn.sweeps.program import BatchProgram, BatchShape, compile_batch, trace_member

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
QUICK_WIDTHS = (1, 4, 16)
STEPS, QUICK_STEPS = 200, 20
LONG_ENOUGH = 0.1  # seconds per sample


class Batch:
    """A compiled width; ``sample()`` runs it in every worker and returns its seconds and CPU seconds."""

    def __init__(self, program: BatchProgram, workers: int):
        self.program, self.pool, self.workers, self.calls = program, ThreadPoolExecutor(workers), workers, 1
        self.rates = {"rate": np.geomspace(1e-4, 1e-1, program.shape.settings).astype(np.float32)}
        self.keys = jnp.stack([jax.random.key(0)])
        self.sample()
        seconds, _ = self.sample()
        self.calls = max(1, round(LONG_ENOUGH / seconds))

    def work(self) -> None:
        for _ in range(self.calls):
            jax.device_get(self.program.run(self.rates, self.keys))

    def sample(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for future in [self.pool.submit(self.work) for _ in range(self.workers)]:
            future.result()
        return (time.perf_counter() - wall) / self.calls, (time.process_time() - cpu) / self.calls


def measure(widths: tuple[int, ...], steps: int, rounds: int, workers: int) -> list[dict]:
    train, _ = make_problem(steps)
    member = trace_member(train, {"rate": 0.1}, ["rate"], full=False)
    device, batches = jax.devices()[:1], {}
    for width in widths:
        program = compile_batch(
            member, {"rate": jnp.ones(())}, BatchShape(1, width), width=width, devices=device, limit=1 << 62
        )
        batches[width] = Batch(program, workers)
    samples, shuffler = {width: [] for width in widths}, random.Random(0)
    for _ in range(rounds):
        for width in shuffler.sample(widths, len(widths)):
            samples[width].append(batches[width].sample())
    rows = []
    for width, batch in batches.items():
        seconds, cpu = (statistics.median(column) for column in zip(*samples[width], strict=True))
        rows.append(
            {
                "width": width,
                "steps": steps,
                "runs_per_second": width * workers / seconds,
                "best_runs_per_second": width * workers / min(wall for wall, _ in samples[width]),
                "cores_busy": cpu / seconds,
                "cpu_ms_per_run": 1e3 * cpu / (width * workers),
                "program_bytes": batch.program.bytes,
                "compile_seconds": batch.program.compile_seconds,
            }
        )
    return rows


def draw(document: dict, path) -> None:
    """Draw speed on the left and memory on the right."""
    from nnlearn.figures.style import new_figure

    figure = new_figure(9, 3.6)
    speed, memory = figure.subplots(1, 2)
    rows = document["rows"]
    widths = [row["width"] for row in rows]
    speed.plot(widths, [row["runs_per_second"] for row in rows], "o-", color="#00798c", label="median")
    best = [row["best_runs_per_second"] for row in rows]
    speed.plot(widths, best, "_", color="#00798c", markersize=9, label="fastest sample")
    speed.set(ylabel=f"runs of {rows[0]['steps']} steps per second", ylim=(0, None))
    speed.legend(frameon=False)
    memory.plot(widths, [row["program_bytes"] / 1e6 for row in rows], "o-", color="#00798c")
    memory.set(ylabel="memory of the program, MB", yscale="log")
    for axes in (speed, memory):
        axes.set(xlabel="runs per batch", xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    machine = document["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['device']}, {machine['cores']} cores", fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser: argparse.ArgumentParser = argument_parser(__doc__, "sweep_scaling")
    parser.add_argument("--widths", nargs="*", type=int, default=None, help="runs in a batch")
    parser.add_argument("--workers", type=int, default=None, help="concurrent batches; by default as in sweep")
    options = parser.parse_args()
    workers = options.workers or default_workers(jax.devices()[:1])
    widths = tuple(options.widths or (QUICK_WIDTHS if options.quick else WIDTHS))
    rounds = options.rounds or (2 if options.quick else 7)
    report = Report(options, workers=workers)
    rows = measure(widths, QUICK_STEPS if options.quick else STEPS, rounds, workers)
    report.add(rows)
    cells = [
        [
            str(row["width"]),
            f"{row['runs_per_second']:.0f}",
            f"{row['cores_busy']:.2f}",
            f"{row['cpu_ms_per_run']:.2f}",
            f"{row['program_bytes'] / 1e6:.1f}",
            f"{row['compile_seconds']:.1f}",
        ]
        for row in rows
    ]
    headings = ("runs per batch", "runs/s", "cores busy", "CPU ms per run", "MB", "compile s")
    show(f"runs of {rows[0]['steps']} steps, {workers} workers", headings, cells, left=0)
    path = output_path(options)
    if path:
        draw(report.document, path.with_suffix(".png"))
    report.close()


if __name__ == "__main__":
    main()
