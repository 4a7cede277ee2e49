"""Optimizers in fewer bytes: the time of a step, and the final loss of 10 seeds beside that of float32.

    python benchmarks/state_bits.py --speed       # 16 million parameters, packed
    python benchmarks/state_bits.py --seeds       # two tasks, 10 seeds; the other part of the result stays

The step is ``nnlearn.apply_gradients`` in one jitted program with donated parameters and state. The seeds of a variant
run as one vmapped program. All variants start from the same weights and see the same batches; gradients are float32, of
the stored parameters. ``gap`` is the mean over the seeds of ``loss / loss in float32 - 1`` in percent, with its 95 %
interval (Student's t), and ``spread`` the standard deviation of the float32 losses over the seeds in percent.
"""

import argparse as parser_source
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import Jitted, Report, argument_parser, output_path, race, ratios_to, show, summarize

import nnlearn

QUANTILE = 2.262  # of Student's t with 9 degrees of freedom, two-sided 95 %
CONTEXT = 16  # bytes that predict the next


def digits() -> tuple:
    """1,797 images of 8 x 8, with a perceptron of 128 hidden units: (inputs, labels, init, apply)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    model = nnlearn.models.mlp((64, 128, 10))
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels), model.init, model.apply


def text() -> tuple:
    """The source of Python's argparse, of which 16 bytes predict the next: (inputs, labels, init, apply)."""
    content = np.frombuffer(Path(parser_source.__file__).read_bytes(), np.uint8).astype(np.int32) % 128
    windows = np.lib.stride_tricks.sliding_window_view(content, CONTEXT + 1)[::4]
    model = nnlearn.models.mlp((CONTEXT * 12, 128, 128))

    def init(key):
        first, second = jax.random.split(key)
        return {"table": 0.3 * jax.random.normal(first, (128, 12)), "mlp": model.init(second)}

    def apply(params, inputs):
        return model.apply(params["mlp"], params["table"][inputs].reshape(len(inputs), -1))

    return jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, -1]), init, apply


TASKS = {"digits": (digits, 600, 1e-3), "text": (text, 800, 2e-3)}


def variants(rate: Any, seed: Any) -> dict[str, tuple[Any, Any]]:
    """The dtype of the parameters and the optimizer, by name."""
    adamw, half = nnlearn.adamw(rate), jnp.bfloat16
    return {
        "float32": (jnp.float32, adamw),
        "8-bit state": (jnp.float32, nnlearn.compress_state(adamw, key=seed)),
        "bfloat16 parameters, stochastic": (half, nnlearn.round_stochastically(adamw, key=seed)),
        "24-bit masters": (half, nnlearn.compact_master(adamw, key=seed)),
        "24-bit masters, 8-bit state": (
            half,
            nnlearn.compact_master(nnlearn.compress_state(adamw, key=seed), key=seed + 1000),
        ),
        "bfloat16 parameters, to nearest": (half, adamw),
    }


def final_losses(task: str, name: str, seeds: int, quick: bool) -> np.ndarray:
    """The loss on all data after training, for each seed."""
    make, steps, peak = TASKS[task]
    inputs, labels, init, apply = make()
    steps = 20 if quick else steps
    rate = nnlearn.cosine_decay_schedule(peak, steps)

    def loss(params, inputs, labels):
        return nnlearn.losses.cross_entropy(apply(params, inputs), labels)

    def train(seed):
        dtype, tx = variants(rate, seed)[name]
        start, batches = jax.random.split(jax.random.key(seed))
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), init(start))

        def step(carry, key):
            params, state = carry
            at = jax.random.randint(key, (64,), 0, len(inputs))
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
            updates, state = tx.update(jax.grad(loss)(wide, inputs[at], labels[at]), state, params)
            return (nnlearn.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(batches, steps))
        return loss(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), inputs, labels)

    return np.asarray(jax.jit(jax.vmap(train))(jnp.arange(seeds)))


def measure_seeds(options) -> list[dict]:
    rows, seeds = [], 10
    for task in TASKS:
        exact = final_losses(task, "float32", seeds, options.quick)
        spread = 100 * float(np.std(exact, ddof=1) / np.mean(exact))
        rows.append({"task": task, "variant": "float32", "loss": float(np.mean(exact)), "spread": spread})
        for name in list(variants(0.1, 0))[1:]:
            gaps = 100 * (final_losses(task, name, seeds, options.quick) / exact - 1)
            half = QUANTILE * float(np.std(gaps, ddof=1)) / seeds**0.5
            rows.append({"task": task, "variant": name, "gap": float(np.mean(gaps)), "half_interval": half})
            rows[-1]["gaps"] = gaps.tolist()
            print(f"{task}, {name}: {rows[-1]['gap']:+.2f} +- {half:.2f} %", flush=True)
    return rows


def measure_speed(options) -> tuple[list[dict], list[dict]]:
    size = 100_000 if options.quick else 16_000_000
    random = np.random.default_rng(0)
    params, grads = (jnp.asarray(random.normal(size=size), jnp.float32) for _ in range(2))
    rivals = {}
    methods = {"adamw": nnlearn.adamw(1e-3), "lion": nnlearn.lion(1e-4)}
    compressed = {f"compress_state({name})": nnlearn.compress_state(tx) for name, tx in methods.items()}
    for name, tx in (methods | compressed).items():

        def step(carry, grads, tx=tx):
            return nnlearn.apply_gradients(tx, carry[0], grads, carry[1])

        own = nnlearn.pack({"w": jnp.array(params, copy=True)})
        carry, packed = (own, tx.init(own)), nnlearn.pack({"w": grads})
        rivals[name] = Jitted(jax.jit(step, donate_argnums=0), carry, packed)
    seconds, calls = race(rivals, rounds=options.rounds or 15)
    rows = [{"rival": name, "parameters": size, "calls": calls, **summarize(seconds[name])} for name in rivals]
    for row in rows:
        row["ns_per_parameter"] = 1e6 * row["median_ms"] / size
        row["compile"] = rivals[row["rival"]].compile
    return rows, [{"ratios": ratios_to(seconds, name, [name, f"compress_state({name})"])} for name in methods]


def main() -> None:
    parser = argument_parser(__doc__, "state_bits")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--seeds", action="store_true")
    options = parser.parse_args()
    path = output_path(options)
    kept = json.loads(path.read_text()) if path and path.exists() else {"rows": [], "ratios": []}
    report = Report(options)
    if options.speed:
        rows, ratios = measure_speed(options)
        report.add([row | {"date": report.document["date"]} for row in rows], ratios)
        report.add([row for row in kept["rows"] if "task" in row])
        cells = [(row["rival"], f"{row['median_ms']:.1f}", f"{row['ns_per_parameter']:.2f}") for row in rows]
        show(f"{rows[0]['parameters']} parameters", ("rival", "ms", "ns a parameter"), cells)
        for each in ratios:
            print({name: round(value["median"], 2) for name, value in each["ratios"].items()})
    if options.seeds:
        report.add([row | {"date": report.document["date"]} for row in measure_seeds(options)])
        report.add([row for row in kept["rows"] if "task" not in row], kept["ratios"])
    losses = [row["loss"] for row in report.document["rows"] if "loss" in row]
    if losses:
        print(f"mean final loss in float32: {statistics.mean(losses):.4f}")
    report.close()


if __name__ == "__main__":
    main()
