"""Time and memory of the derivative of a whole run, in forward and reverse mode, compared with the run itself.

    python benchmarks/hypergrad.py            # 100 to 6,400 steps
    python benchmarks/hypergrad.py --quick    # 100 and 400, writes nothing

The run trains a 64-32-10 network on digits with AdamW and batches of 32; the objective is its final validation loss.
Forward mode is measured with respect to one, two and four hyper-parameters, reverse mode with respect to four (their
number does not matter in reverse mode). Memory is the size of the compiled program's temporary buffers. The run and its
derivatives take turns.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from harness import Report, Thunk, argument_parser, compile_timed, race, ratios_to, show, summarize

import nnlearn
from nnlearn.datasets import load
from nnlearn.models import mlp

POINT = {"rate": 1e-3, "decay": 1e-2, "b1": 0.9, "b2": 0.99}
RIVALS: dict[str, tuple[Literal["forward", "reverse"], int]] = {
    "forward, 1": ("forward", 1),
    "forward, 2": ("forward", 2),
    "forward, 4": ("forward", 4),
    "reverse, 4": ("reverse", 4),
}


def make_objective(steps: int):
    digits, model = load("digits"), mlp((64, 32, 10))

    def loss_fn(params, batch, key):
        return nnlearn.cross_entropy(model.apply(params, batch.inputs), batch.targets)

    def make_tx(hparams):
        return nnlearn.adamw(hparams["rate"], hparams["b1"], hparams["b2"], weight_decay=hparams["decay"])

    batches = nnlearn.shuffled(digits.train, 32, remainder="drop")
    train = nnlearn.make_train(loss_fn, make_tx, batches, model.init, steps=steps, record=())
    held_out = jax.tree.map(jnp.asarray, digits.validation)

    def objective(some):
        state, _ = train(POINT | some, 0)
        return loss_fn(state.params, held_out, None)

    return objective


def main() -> None:
    parser = argument_parser(__doc__, "hypergrad")
    options = parser.parse_args()
    report = Report(options, note="times of a whole run or derivative; memory of its temporary buffers")
    table = []
    for steps in (100, 400) if options.quick else (100, 400, 1600, 6400):
        objective = make_objective(steps)
        jobs = {"the run": (jax.jit(objective), POINT)}
        for name, (mode, count) in RIVALS.items():
            some = dict(list(POINT.items())[:count])
            jobs[name] = (jax.jit(nnlearn.hyper_value_and_grad(objective, mode=mode)), some)
        rivals, facts = {}, {}
        for name, (jitted, point) in jobs.items():
            compiled, facts[name] = compile_timed(jitted, point)
            rivals[name] = Thunk(lambda compiled=compiled, point=point: jax.block_until_ready(compiled(point)))
        seconds, _ = race(rivals, rounds=options.rounds or (3 if options.quick else 11), warmup=1)
        ratios = {}
        for name in RIVALS:
            ratios |= ratios_to(seconds, "the run", [name])
        rows = [{"steps": steps, "rival": name} | facts[name] | summarize(seconds[name]) for name in jobs]
        report.add(rows, [{"steps": steps} | ratios])
        for row in rows:
            times = ratios.get(f"{row['rival']} / the run", {"median": 1.0})["median"]
            cells = [f"{row['median_ms']:.1f}", f"{times:.2f}", f"{row['temp_bytes'] / 1e6:.2f}"]
            table.append([str(steps), row["rival"], *cells])
    show("The derivative of a run", ["steps", "program", "ms", "times the run", "temporaries, MB"], table, left=2)
    report.close()


if __name__ == "__main__":
    main()
