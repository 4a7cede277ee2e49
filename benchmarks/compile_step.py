"""Seconds to trace, lower and compile a whole training step, each time in a separate process.

    python benchmarks/compile_step.py                    # the transformer of 288 leaves, three times each rival
    python benchmarks/compile_step.py --quick            # two layers of it, once, writes nothing

The rivals are those of ``train_step.py``. Within one process each compilation takes longer than the one before, the
last by up to a quarter. The times of ``train_step.py`` are therefore not comparable with one another, but these are.
"""

import json
import statistics
import subprocess
import sys

from harness import Report, argument_parser, show
from problems import PROBLEMS, QUICK_PROBLEMS
from train_step import FLOOR, OURS, makers

RIVALS = (FLOOR, "optax", OURS)
PARTS = ("trace_seconds", "lower_seconds", "compile_seconds", "total_seconds")


def in_a_process(problem: str, rival: str, quick: bool) -> dict[str, float]:
    words = [sys.executable, __file__, "--problem", problem, "--one", rival, *(["--quick"] if quick else [])]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argument_parser(__doc__, "compile_step")
    parser.add_argument("--problem", default="transformer", choices=list(PROBLEMS))
    parser.add_argument("--one", choices=RIVALS, help="compile this rival in this process and print its times")
    options = parser.parse_args()
    if options.one:
        problem = (QUICK_PROBLEMS if options.quick else PROBLEMS)[options.problem]()
        print(json.dumps(makers(options.problem, problem)[options.one]().compile))
        return
    report = Report(options, note="medians over processes that compile once each; the rivals take turns")
    found = {rival: [] for rival in RIVALS}
    for _ in range(options.rounds or (1 if options.quick else 3)):
        for rival in RIVALS:
            found[rival].append(in_a_process(options.problem, rival, options.quick))
            print(f"  {rival}: {found[rival][-1]['total_seconds']:.1f} s", flush=True)
    medians = {
        rival: {part: statistics.median(each[part] for each in facts) for part in PARTS}
        for rival, facts in found.items()
    }
    ratios = {
        f"{rival} / {FLOOR}": m["total_seconds"] / medians[FLOOR]["total_seconds"] for rival, m in medians.items()
    }
    rows = [{"problem": options.problem, "rival": rival, **medians[rival], "each": found[rival]} for rival in RIVALS]
    report.add(rows, [{"problem": options.problem, "ratios": ratios}])
    cells = [
        [rival, *(f"{medians[rival][part]:.2f}" for part in PARTS), f"{ratios[f'{rival} / {FLOOR}']:.3f}"]
        for rival in RIVALS
    ]
    show(options.problem, ("rival", "trace s", "lower s", "compile s", "total s", "/ gradient"), cells)
    report.close()


if __name__ == "__main__":
    main()
