"""The optimizer step alone: milliseconds, gigabytes a second, seconds to compile, over leaves, recipes and rivals.

    python benchmarks/step_time.py                       # everything
    python benchmarks/step_time.py --quick               # small sizes, writes nothing
    python benchmarks/step_time.py --regimes "2000 x 2000" --recipes adamw

A step is ``update`` and ``apply_updates`` in one jitted program, parameters and state donated, the gradient given: as a
tree, or packed for the packed rivals, as they get it in training. Torch gets its own in ``param.grad``. All rivals of a
regime and recipe take turns, and two programs that do nothing but move memory take turns with them, so that the
share of the bandwidth is measured against the same machine. A regime whose numbers fit in a cache may exceed 100 %.
"""

import argparse
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
DIFFERENT = 1e-2  # of the largest change; rounding makes up to 1e-4 of it
ATTEMPTS = 3
AGREE = 1.8  # times as fast; undisturbed the two are within 1.5 of each other


def torch_makers(recipe: str, params: dict, grads: dict) -> dict[str, Any]:
    """Torch's rivals; none without a torch that runs on the same processor."""
    try:
        from torch_rivals import runs_here, torch_rivals
    except ModuleNotFoundError:
        return {}
    return torch_rivals(recipe, params, grads) if runs_here() else {}


def to_numpy(array: Any) -> np.ndarray:
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)


def values(rival: Any) -> np.ndarray:
    """The parameters of a rival, end to end."""
    params = rival.params if hasattr(rival, "params") else rival.state[0]
    leaves = jax.tree.leaves(nnlearn.unpack(params) if isinstance(params, nnlearn.Packed) else params)
    return np.concatenate([to_numpy(leaf).reshape(-1) for leaf in leaves])


def disagreement(rivals: dict[str, Any], params: dict) -> dict[str, float]:
    """After a few steps: the largest difference to the first rival's parameters, in parts of the largest change."""
    for rival in rivals.values():
        rival.run(CHECKED_STEPS)
    start = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in params.values()])
    results = {name: values(rival) for name, rival in rivals.items()}
    reference = next(iter(results.values()))
    scale = float(np.max(np.abs(reference - start)))
    found = {name: float(np.max(np.abs(result - reference))) / scale for name, result in results.items()}
    for name, difference in found.items():
        if not difference < DIFFERENT:
            print(f"  NOT THE SAME STEP: {name} differs by {difference:.0e}", flush=True)
    return found


def make_rivals(
    recipe: str, params: dict, grads: dict, wanted: list[str] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The rivals, compiled, and what kept others away: a rival that runs out of memory is a result too."""
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
    """The race with two programs that only move memory; run again where those two disagree, up to ``ATTEMPTS`` times.

    Other work on the cores slows torch's threads, which wait for each other, far more than XLA's. The programs that
    only move memory tell so; no rival's own time decides whether a race counts.
    """
    memory = bandwidth_rivals(quick)
    for attempt in range(ATTEMPTS):
        seconds, calls = race({**rivals, **memory}, rounds=rounds, seed=attempt)
        bandwidth = {name: bytes_moved(memory[name]) / statistics.median(seconds[name]) / 1e9 for name in memory}
        disturbed = max(bandwidth.values()) > AGREE * min(bandwidth.values())
        if not disturbed:
            break
        print("  disturbed: " + ", ".join(f"{name} {gbps:.1f} GB/s" for name, gbps in bandwidth.items()), flush=True)
    return seconds, calls, bandwidth, disturbed


def measure(
    regime: str, shapes: list, recipe: str, rounds: int, options: argparse.Namespace
) -> tuple[list[dict], list[dict]]:
    """One regime and recipe: a row for each rival, and the ratios."""
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
    """Everyone's time in units of the packed step's, and that of the better of torch's two."""
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
    parser.add_argument("--gpu-regimes", action="store_true", help="the leaves for an accelerator instead")
    parser.add_argument("--regimes", nargs="*", default=None, help="names; all by default")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--rivals", nargs="*", default=None, help="names; all by default")
    options = parser.parse_args()
    regimes = QUICK_REGIMES if options.quick else GPU_REGIMES if options.gpu_regimes else REGIMES
    unknown = set(options.regimes or ()) - set(regimes)
    if unknown:
        parser.error(f"no regime {', '.join(unknown)} among: {', '.join(regimes)}")
    rounds = options.rounds or (5 if options.quick else 30)
    report = Report(options, note="torch has no Lion; bandwidth is of float32 arrays far larger than the caches")
    for regime in options.regimes or regimes:
        for recipe in options.recipes:
            print(f"{regime}, {recipe}", flush=True)
            rows, ratios = measure(regime, regimes[regime], recipe, rounds, options)
            report.add(rows, ratios)
            print_rows(rows)
    report.close()


if __name__ == "__main__":
    main()
