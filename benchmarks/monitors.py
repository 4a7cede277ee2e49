"""What it costs to watch every layer of the transformer of 288 leaves while it trains.

    python benchmarks/monitors.py           # whole steps with and without monitor_layers
    python benchmarks/monitors.py --quick   # a small transformer, writes nothing

Whole jitted steps with donated state, gradient, clip + AdamW + schedule, packed parameters, on one batch. A sample is
ten steps, so that it contains one measurement of ``every=10``. Rivals take turns.
"""

import jax
from harness import Report, argument_parser, compile_timed, race, ratios_to, show, summarize
from problems import PROBLEMS, QUICK_PROBLEMS, Problem
from recipes import RECIPES

import nnlearn

PLAIN, STEPS = "no monitor", 10


class Ten:
    """A rival that makes ten steps at each call."""

    def __init__(self, problem: Problem, every: int | None, record: tuple[str, ...] = ("grad_norm",)):
        tx = RECIPES["clip+adamw+schedule"].make(nnlearn)
        tx = tx if every is None else nnlearn.monitor_layers(tx, every)
        state = nnlearn.init_state(problem.params, tx, 0, packed=True)
        step = nnlearn.jit_step(nnlearn.make_step(problem.loss_fn, tx, record=record))
        self.compiled, self.compile = compile_timed(step, state, problem.batch)
        self.state, self.batch = state, problem.batch
        self.info = None

    def run(self, calls: int) -> None:
        for _ in range(calls * STEPS):
            self.state, self.info = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.info)


def main() -> None:
    parser = argument_parser(__doc__, "monitors")
    options = parser.parse_args()
    problem = (QUICK_PROBLEMS if options.quick else PROBLEMS)["transformer"]()
    rivals = {
        PLAIN: Ten(problem, None),
        "leaf_grad_norms": Ten(problem, None, ("leaf_grad_norms",)),
        "every 10 steps": Ten(problem, 10),
        "every step": Ten(problem, 1),
    }
    for name, rival in rivals.items():
        print(f"  {name}: compiled in {rival.compile['total_seconds']:.1f} s", flush=True)
    seconds, _ = race(rivals, rounds=options.rounds or (3 if options.quick else 40))
    seconds = {name: [each / STEPS for each in values] for name, values in seconds.items()}
    ratios = ratios_to(seconds, PLAIN, rivals)
    leaves = jax.tree.leaves(problem.params)
    head = {"problem": "transformer", "leaves": len(leaves), "parameters": sum(leaf.size for leaf in leaves)}
    rows = [head | {"rival": name, **summarize(seconds[name]), "compile": rivals[name].compile} for name in rivals]
    report = Report(options)
    report.add(rows, [head | {"ratios": ratios}])

    def cells(row):
        ratio = ratios.get(f"{row['rival']} / {PLAIN}")
        times = f"{row['median_ms']:.3f}", "{:.3f}-{:.3f}".format(*row["quartiles_ms"])
        return row["rival"], *times, f"{ratio['median']:.3f}" if ratio else ""

    show(f"{len(leaves)} leaves", ("rival", "ms", "quartiles", "/ no monitor"), map(cells, rows))
    report.close()


if __name__ == "__main__":
    main()
