"""Steps per second of a whole run: nnlearn's compiled run and its ``fit``, compared with the usual loop around optax.

    python benchmarks/run_speed.py            # three networks
    python benchmarks/run_speed.py --quick    # short runs, writes nothing
    python benchmarks/run_speed.py --networks xor

The usual loop calls a jitted step with donation from Python; NumPy gathers its batches in a new random order every
epoch. ``make_train`` is the whole run, shuffling included, as one program. ``fit`` receives the same batches as the
loop, as a stream. All rivals use Adam with one learning rate and restart for every run. The compiled programs are
reused, and compilation is reported separately. Rivals take turns in one process.
"""

import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import Report, Thunk, argument_parser, race, ratios_to, show, summarize

import nnlearn
from nnlearn.data import Examples
from nnlearn.datasets import load
from nnlearn.models import mlp

RATE = 1e-3
# name: sizes, batch size, steps of a run
NETWORKS = {
    "xor": ((2, 8, 1), 4, 4000),
    "digits small": ((64, 32, 10), 32, 2000),
    "digits large": ((64, 128, 128, 10), 32, 1000),
}


def make_problem(name: str):
    """Model, loss and examples; all rivals use the same loss, with optax's arithmetic."""
    sizes, _, _ = NETWORKS[name]
    if name == "xor":
        model, points = mlp(sizes, activation="tanh"), load("xor").train
        examples = Examples(points.inputs, points.targets[:, None].astype(np.float32))
        losses = lambda outputs, targets: jnp.square(outputs - targets)  # noqa: E731
    else:
        model, examples = mlp(sizes), load("digits").train
        losses = optax.softmax_cross_entropy_with_integer_labels

    def loss_fn(params, batch, key=None):
        return jnp.mean(losses(model.apply(params, batch.inputs), batch.targets))

    return model, loss_fn, examples


def stream(examples: Examples, batch_size: int, steps: int) -> Iterator[Examples]:
    """``steps`` batches of NumPy arrays, in a new order every epoch, without incomplete batches."""
    random, made = np.random.default_rng(0), 0
    while True:
        order = random.permutation(len(examples.inputs))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield Examples(examples.inputs[rows], examples.targets[rows])
            made += 1
            if made == steps:
                return


def optax_loop(model, loss_fn, examples, batch_size: int, steps: int) -> Callable[[], None]:
    tx = optax.adam(RATE)

    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    step, start = jax.jit(step, donate_argnums=(0, 1)), model.init(jax.random.key(0))

    def run():
        params = jax.tree.map(jnp.copy, start)
        opt_state = tx.init(params)
        for batch in stream(examples, batch_size, steps):
            params, opt_state, _ = step(params, opt_state, batch)
        jax.block_until_ready(params)

    return run


def compiled_run(model, loss_fn, examples, batch_size: int, steps: int) -> Callable[[], None]:
    batches = nnlearn.shuffled(examples, batch_size, remainder="drop")
    train = nnlearn.make_train(loss_fn, nnlearn.adam(RATE), batches, model.init, steps=steps, record=())
    program = jax.jit(train).lower(None, jax.random.key(0)).compile()

    def run():
        jax.block_until_ready(program(None, jax.random.key(0)))

    return run


def streamed_fit(model, loss_fn, examples, batch_size: int, steps: int) -> Callable[[], None]:
    tx, start = nnlearn.adam(RATE), model.init(jax.random.key(0))
    step = nnlearn.make_step(loss_fn, tx, record=())

    def run():
        state = nnlearn.init_state(start, tx)
        result = nnlearn.fit(step, state, stream(examples, batch_size, steps), steps=steps, progress=False)
        jax.block_until_ready(result.state)

    return run


RIVALS = {"optax loop": optax_loop, "nnlearn make_train": compiled_run, "nnlearn fit": streamed_fit}


def main() -> None:
    parser = argument_parser(__doc__, "run_speed")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    report = Report(options, optimizer=f"adam({RATE})", note="times per step")
    table = []
    for name in options.networks:
        _, batch_size, steps = NETWORKS[name]
        steps = steps // 10 if options.quick else steps
        problem = make_problem(name)
        rivals, first = {}, {}
        for rival, make in RIVALS.items():
            began = time.perf_counter()
            thunk = make(*problem, batch_size, steps)
            thunk()
            first[rival] = time.perf_counter() - began
            rivals[rival] = Thunk(thunk)
        seconds, _ = race(rivals, rounds=options.rounds or (3 if options.quick else 15), warmup=1)
        seconds = {rival: [total / steps for total in totals] for rival, totals in seconds.items()}
        ratios = ratios_to(seconds, "nnlearn make_train", ["optax loop"])
        ratios |= ratios_to(seconds, "nnlearn fit", ["optax loop"])
        facts = {"network": name, "sizes": NETWORKS[name][0], "batch_size": batch_size, "steps": steps}
        rows = [
            facts | {"rival": rival, "first_run_seconds": first[rival]} | summarize(samples)
            for rival, samples in seconds.items()
        ]
        report.add(rows, [facts | ratios])
        for row in rows:
            above = ratios.get(f"optax loop / {row['rival']}", {"median": 1.0})["median"]
            cells = [f"{row['median_ms'] * 1e3:.1f}", f"{1e3 / row['median_ms']:,.0f}", f"{above:.1f}"]
            table.append([name, row["rival"], *cells, f"{row['first_run_seconds']:.1f}"])
    headings = ["network", "rival", "us per step", "steps/s", "times the loop", "first run, s"]
    show("A whole run, shuffling included", headings, table, left=2)
    report.close()


if __name__ == "__main__":
    main()
