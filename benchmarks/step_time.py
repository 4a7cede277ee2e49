"""The optimizer step alone: milliseconds, GB/s and compilation time, by shapes of leaves, recipe and rival.

    python benchmarks/step_time.py                       # everything
    python benchmarks/step_time.py --quick               # small sizes, writes nothing
    python benchmarks/step_time.py --regimes "2000 x 2000" --recipes adamw

A step is ``update`` and ``apply_updates`` in one jitted program with donated parameters and state. The gradient is an
input: a tree, or packed for the packed rivals, as in training; torch has it in ``param.grad``. All rivals of a regime
and recipe take turns with two programs that only move memory, so that the share of the bandwidth is measured under the
same conditions. It can exceed 100 % if the arrays of a regime fit into a cache.
"""

import argparse
import itertools
import statistics
from typing import Any

import jax
import numpy as np
from harness import Jitted, Report, argument_parser, race, ratio, ratios_to, show, summarize
from machine import bandwidth_rivals, bytes_moved
from recipes import GPU_REGIMES, QUICK_REGIMES, RECIPES, REGIMES, count, draw, update_steps

import nnlearn

OURS = "nnlearn, packed"
CHECKED_STEPS = 3
DIFFERENT = 1e-2  # relative to the largest change; rounding contributes up to 1e-4
ATTEMPTS = 3
AGREE = 1.8  # largest ratio of the two bandwidths; without disturbance it is below 1.5


def torch_makers(recipe: str, params: dict, grads: dict) -> dict[str, Any]:
    """The rivals of torch; none if torch does not run on this device."""
    try:
        from torch_rivals import runs_here, torch_rivals
    except ModuleNotFoundError:
        return {}
    return torch_rivals(recipe, params, grads) if runs_here() else {}


def to_numpy(array: Any) -> np.ndarray:
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)


def values(rival: Any) -> np.ndarray:
    """The parameters of a rival, concatenated."""
    params = rival.params if hasattr(rival, "params") else rival.state[0]
    leaves = jax.tree.leaves(nnlearn.unpack(params) if isinstance(params, nnlearn.Packed) else params)
    return np.concatenate([to_numpy(leaf).reshape(-1) for leaf in leaves])


def disagreement(rivals: dict[str, Any], params: dict) -> dict[str, float]:
    """The largest difference from the first rival's parameters after a few steps, relative to the largest change."""
    for rival in rivals.values():
        rival.run(CHECKED_STEPS)
    start = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in params.values()])
    results = {name: values(rival) for name, rival in rivals.items()}
    reference = next(iter(results.values()))
    scale = float(np.max(np.abs(reference - start)))
    found = {name: float(np.max(np.abs(result - reference))) / scale for name, result in results.items()}
    for name, difference in found.items():
        if not difference < DIFFERENT:
            print(f"  DIFFERENT STEP: {name} differs by {difference:.0e}", flush=True)
    return found


def make_rivals(
    recipe: str, params: dict, grads: dict, wanted: list[str] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The compiled rivals, and the error of each rival that failed, such as running out of memory."""
    steps = update_steps(recipe, params, grads)
    makers = {name: lambda make=make: Jitted(*make()) for name, make in steps.items()}
    rivals, faults = {}, {}
    for name, make in (makers | torch_makers(recipe, params, grads)).items():
        if wanted and name not in wanted:
            continue
        try:
            rivals[name] = make()
            rivals[name].run(1)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            rivals.pop(name, None)
            faults[name] = str(error).splitlines()[0]
        else:
            if rivals[name].compile:
                print(f"  {name}: compiled in {rivals[name].compile['total_seconds']:.1f} s", flush=True)
    return rivals, faults


def undisturbed_race(rivals: dict[str, Any], rounds: int, quick: bool) -> tuple[dict, int, dict, bool]:
    """Race together with two programs that only move memory, and repeat up to ``ATTEMPTS`` times if those two disagree.

    Other load on the cores slows torch's threads, which wait for each other, much more than XLA's. The programs that
    only move memory detect it, so that no rival's own time decides whether a race counts.
    """
    memory = bandwidth_rivals(quick)
    for attempt in itertools.count(1):
        seconds, calls = race({**rivals, **memory}, rounds=rounds, seed=attempt - 1)
        bandwidth = {name: bytes_moved(memory[name]) / statistics.median(seconds[name]) / 1e9 for name in memory}
        disturbed = max(bandwidth.values()) > AGREE * min(bandwidth.values())
        if disturbed:
            rates = ", ".join(f"{name} {gbps:.1f} GB/s" for name, gbps in bandwidth.items())
            print(f"  disturbed: {rates}", flush=True)
        if not disturbed or attempt == ATTEMPTS:
            return seconds, calls, bandwidth, disturbed
    raise AssertionError("itertools.count does not end")


def measure(
    regime: str, shapes: list, recipe: str, rounds: int, options: argparse.Namespace
) -> tuple[list[dict], list[dict]]:
    """For one regime and recipe, a row for each rival, and the ratios."""
    params, grads = draw(shapes, 0, scale=0.02), draw(shapes, 1)
    rivals, faults = make_rivals(recipe, params, grads, options.rivals)
    differences = {} if count(shapes) > 200_000_000 else disagreement(rivals, params)
    seconds, calls, bandwidth, disturbed = undisturbed_race(rivals, rounds, options.quick)
    minimal = RECIPES[recipe].minimal_bytes * count(shapes)
    head = {"regime": regime, "leaves": len(shapes), "parameters": count(shapes), "recipe": recipe}
    race_facts = {"calls": calls, "disturbed": disturbed, "minimal_bytes": minimal, "bandwidth_gbps": bandwidth}
    rows = [head | {"rival": name, "fault": fault} for name, fault in faults.items()]
    for name, rival in rivals.items():
        times = summarize(seconds[name])
        achieved = minimal / times["median_ms"] / 1e6
        shares = {"achieved_gbps": achieved, "share_of_bandwidth": {k: achieved / v for k, v in bandwidth.items()}}
        facts = {"rival": name, **times, **shares, "compile": rival.compile, "disagreement": differences.get(name)}
        rows.append(head | race_facts | facts)
    return rows, [head | {"ratios": compare(seconds, rivals)}]


def compare(seconds: dict, rivals: dict) -> dict:
    """The ratio of each rival's time to that of the packed step, and that of torch's faster rival."""
    if OURS not in rivals:
        return {}
    found = ratios_to(seconds, OURS, rivals)
    torch = [name for name in rivals if name.startswith("torch")]
    if torch:
        best = min(torch, key=lambda name: statistics.median(seconds[name]))
        found[f"torch best / {OURS}"] = ratio(seconds, best, OURS) | {"best": best}
    return found


def print_rows(rows: list[dict]) -> None:
    def cells(row):
        if "fault" in row:
            return row["rival"], row["fault"][:40]
        compiling = row["compile"]
        return (
            row["rival"],
            f"{row['median_ms']:.3f}",
            "{:.3f}-{:.3f}".format(*row["quartiles_ms"]),
            f"{row['achieved_gbps']:.1f}",
            " ".join(f"{share:.0%}" for share in row["share_of_bandwidth"].values()),
            f"{compiling['total_seconds']:.2f}" if compiling else "",
            f"{compiling['temp_bytes'] / 1e6:.1f}" if compiling and compiling["temp_bytes"] is not None else "",
            f"{row['disagreement']:.0e}" if row["disagreement"] is not None else "",
        )

    measured = [row for row in rows if "fault" not in row]
    memory = ", ".join(f"{name} {gbps:.1f}" for name, gbps in measured[0]["bandwidth_gbps"].items())
    mark = "; DISTURBED" if measured[0]["disturbed"] else ""
    title = f"{rows[0]['regime']}, {rows[0]['recipe']} (GB/s: {memory}{mark})"
    headings = ("rival", "ms", "quartiles", "GB/s", "share", "compile s", "temp MB", "differs by")
    show(title, headings, map(cells, rows))


def main() -> None:
    parser = argument_parser(__doc__, "step_time")
    parser.add_argument("--gpu-regimes", action="store_true", help="use the shapes for an accelerator")
    parser.add_argument("--regimes", nargs="*", default=None, help="names; by default all")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--rivals", nargs="*", default=None, help="names; by default all")
    options = parser.parse_args()
    regimes = QUICK_REGIMES if options.quick else GPU_REGIMES if options.gpu_regimes else REGIMES
    unknown = set(options.regimes or ()) - set(regimes)
    if unknown:
        parser.error(f"no regime {', '.join(unknown)} among: {', '.join(regimes)}")
    rounds = options.rounds or (5 if options.quick else 30)
    report = Report(options, note="torch has no Lion; bandwidth of float32 arrays far larger than the caches")
    for regime in options.regimes or regimes:
        for recipe in options.recipes:
            print(f"{regime}, {recipe}", flush=True)
            rows, ratios = measure(regime, regimes[regime], recipe, rounds, options)
            report.add(rows, ratios)
            print_rows(rows)
    report.close()


if __name__ == "__main__":
    main()
