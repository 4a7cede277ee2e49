"""Search for random transformations that ``packing_difference`` accepts although packing changes their result.

    python benchmarks/packing_fuzz.py --count 20000 --seed 0

Each transformation and tree of parameters is drawn from the grammar in ``tests/packing_grammar.py``. If
``packing_difference`` accepts it, three steps are run with packed parameters and with the leaves, in float64 so that
sums in a different order agree to 1e-6. One in twenty of the rejected transformations is run as well. The script prints
the counts and every wrongly accepted transformation with its number; its exit status is 1 if there is one.
"""

import argparse
import collections
import gc
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import jax

jax.config.update("jax_enable_x64", True)

from packing_grammar import random_transformation  # noqa: E402  # pyright: ignore[reportMissingImports]
from packing_runs import differs, random_problem  # noqa: E402  # pyright: ignore[reportMissingImports]

from nnlearn import packing_difference  # noqa: E402

REFUSED_SHARE = 20


def judge(number: int) -> tuple[str, bool]:
    """The outcome for one transformation, and whether it was constructed to be accepted."""
    problem = random_problem(number)
    _, tx, honest = random_transformation(number)
    accepted = packing_difference(tx, problem.params, problem.labels) == ""
    if not accepted and number % REFUSED_SHARE:
        return "refused", honest
    try:
        different = differs(lambda: random_transformation(number)[1], problem)
    except Exception as error:  # it fails on the leaves as well
        return (
            f"accepted, but fails: {type(error).__name__}" if accepted else "refused, and fails",
            honest,
        )
    if accepted:
        return "WRONGLY ACCEPTED" if different else "accepted, and the same", honest
    return ("refused, and different" if different else "refused, but the same"), honest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="number of transformations")
    parser.add_argument("--seed", type=int, default=0, help="index of the run; each run has different transformations")
    options = parser.parse_args()
    counts, start, wrong = collections.Counter(), time.perf_counter(), 0
    first = options.seed * 10_000_000
    gc.disable()  # most objects stay in JAX's caches anyway
    for number in range(first, first + options.count):
        verdict, honest = judge(number)
        counts[verdict, honest] += 1
        if verdict.startswith("WRONGLY"):
            wrong += 1
            print(f"{verdict}: {number} {random_transformation(number)[0]}", flush=True)
        if (number + 1 - first) % 250 == 0:
            print(f"{number + 1 - first} in {time.perf_counter() - start:.0f} s: {dict(counts)}", flush=True)
            gc.collect()
            if (number + 1 - first) % 2000 == 0:
                jax.clear_caches()
    for (verdict, honest), count in sorted(counts.items()):
        print(f"{'elementwise' if honest else 'any'}: {verdict}: {count}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
