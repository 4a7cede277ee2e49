"""Seconds for 64 learning rates with 4 seeds each: as one sweep, and as 256 ordinary programs.

    python benchmarks/sweep_speed.py                     # 256 runs of 1,000 steps; 8 ordinary ones, scaled to 256
    python benchmarks/sweep_speed.py --quick             # 16 runs of 100 steps, writes nothing

Each run trains a 64-32-10 network on digits with Adam and batches of 32 in a new order every epoch. An ordinary program
is the usual one with optax: a jitted step with a constant learning rate, a Python loop, and NumPy for shuffling. It is
compiled once per run, because the learning rate differs. Seconds include compilation for both. Rivals take turns: half
of the ordinary runs, the sweep, the other half. The median validation losses over the same rates and seeds are compared
at the end; single runs differ, because the shuffles do.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import Report, argument_parser, show

import nnlearn
from nnlearn.datasets import load
from nnlearn.models import mlp
from nnlearn.sweeps import choice, sweep

RATES, SEEDS, STEPS, BATCH = 64, 4, 1000, 32
QUICK = (8, 2, 100)
ORDINARY = 8  # number of ordinary runs that are timed
MODEL = mlp((64, 32, 10))


def make_problem(steps: int) -> tuple[nnlearn.Train, list[int]]:
    """The training run, and a list that grows with every trace of its loss."""
    digits, traces = load("digits"), []

    def loss_fn(params, batch, key):
        traces.append(1)
        return nnlearn.cross_entropy(MODEL.apply(params, batch.inputs), batch.targets)

    def metrics_fn(params, batch):
        logits = MODEL.apply(params, batch.examples.inputs)
        return {"loss": nnlearn.cross_entropy(logits, batch.examples.targets, where=batch.where)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hparams: nnlearn.adam(hparams["rate"]),
        nnlearn.shuffled(digits.train, BATCH, remainder="drop"),
        MODEL.init,
        steps=steps,
        evaluate=nnlearn.evaluation(metrics_fn, digits.validation),
        check_every=steps,
        record=(),
    )
    return train, traces


def ordinary_run(rate: float, seed: int, steps: int) -> float:
    """Make one ordinary run; returns its validation loss."""
    digits = load("digits")
    inputs, targets = (np.asarray(array) for array in digits.train)
    tx = optax.adam(rate)

    def loss_fn(params, inputs, targets):
        logits = MODEL.apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def step(params, opt_state, inputs, targets):
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, targets)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = MODEL.init(jax.random.key(seed))
    opt_state, shuffler = tx.init(params), np.random.default_rng(seed)
    made = 0
    while made < steps:
        order = shuffler.permutation(len(inputs))
        for rows in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)[: steps - made]:
            params, opt_state, _ = step(params, opt_state, inputs[rows], targets[rows])
            made += 1
    return float(loss_fn(params, *digits.validation))


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, float]]:
    """Call a function; returns its result, its seconds, and the number of cores that it kept busy."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return result, {"seconds": wall, "cpu_seconds": cpu, "cores_busy": cpu / wall}


def measure(rates: int, seeds: int, steps: int) -> tuple[list[dict], dict]:
    axis = choice(*np.geomspace(1e-4, 1e-1, rates).tolist())
    picked = [(axis.values[at * rates // ORDINARY], at % seeds) for at in range(ORDINARY)]
    train, traces = make_problem(steps)
    jax.jit(lambda key: jax.random.normal(key, (64, 64)) @ jnp.ones((64, 64)))(jax.random.key(0)).block_until_ready()
    ordinary_run(1.0, 0, 10)  # first uses of jax and of a GPU's libraries cost more
    ordinary, losses = [], []

    def some(runs):
        for rate, seed in runs:
            loss, facts = timed(ordinary_run, rate, seed, steps)
            ordinary.append(facts)
            losses.append(loss)

    some(picked[::2])
    results, facts = timed(lambda: sweep(train, {"rate": axis}, seeds, metric="loss"))
    some(picked[1::2])
    runs = rates * seeds
    scaled = {name: runs * statistics.mean(each[name] for each in ordinary) for name in ("seconds", "cpu_seconds")}
    values = results.values("loss")[0]
    mine = [values[axis.values.index(rate), seed] for rate, seed in picked[::2] + picked[1::2]]
    rows = [
        {"rival": "one sweep", "runs": runs, **facts, "traces": len(traces), **results.execution._asdict()},
        {
            "rival": "ordinary programs",
            "runs": runs,
            "timed": ORDINARY,
            **scaled,
            "cores_busy": scaled["cpu_seconds"] / scaled["seconds"],
            "each": ordinary,
            "traces": runs,
        },
    ]
    ratios = {f"ordinary programs / one sweep, {name}": scaled[name] / facts[name] for name in scaled}
    medians = {"one sweep": statistics.median(mine), "ordinary programs": statistics.median(losses)}
    return rows, {"ratios": ratios, "median_validation_loss": medians}


def main() -> None:
    parser = argument_parser(__doc__, "sweep_speed")
    options = parser.parse_args()
    report = Report(options)
    rows, ratios = measure(*(QUICK if options.quick else (RATES, SEEDS, STEPS)))
    report.add(rows, [ratios])
    cells = [
        [row["rival"], *(f"{row[name]:.1f}" for name in ("seconds", "cpu_seconds", "cores_busy")), str(row["traces"])]
        for row in rows
    ]
    show(f"{rows[0]['runs']} runs", ("rival", "seconds", "CPU seconds", "cores busy", "traces"), cells)
    for name, ratio in ratios["ratios"].items():
        print(f"{name}: {ratio:.1f}")
    for name, loss in ratios["median_validation_loss"].items():
        print(f"median validation loss of the same {ORDINARY} rates and seeds, {name}: {loss:.4f}")
    report.close()


if __name__ == "__main__":
    main()
