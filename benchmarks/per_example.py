"""The norms of per-example gradients, and their clipped mean, compared with one plain gradient of the batch.

    python benchmarks/per_example.py                     # two perceptrons, batches of 256
    python benchmarks/per_example.py --quick             # the smaller one, few rounds, writes nothing

``gradient`` is ``jax.grad`` of the batch's loss, the cost of training without norms. ``vmapped norms`` uses
``jax.vmap(jax.grad)``, which stores a gradient for each example. ``memory MB`` is the scratch memory of the compiled
program, without arguments and results. All norms must agree.
"""

import jax
import jax.numpy as jnp
import numpy as np
from harness import Compiled, Report, argument_parser, race, ratios_to, show, summarize

import nnlearn
from nnlearn.gradients.clipped import clipped_value_and_grad
from nnlearn.gradients.per_example import per_example_grads, per_example_norms

SIZES = ((64, 128, 128, 10), (784, 256, 256, 10))
BATCH_SIZE = 256
FLOOR, NORMS, NAIVE = "gradient", "per_example_norms", "vmapped norms"
DIFFERENT = 1e-5  # relative
HEADINGS = ("rival", "ms", "quartiles", "/ gradient", "compile s", "memory MB")


def make_rivals(sizes: tuple[int, ...]) -> dict[str, Compiled]:
    model, keys = nnlearn.models.mlp(sizes), jax.random.split(jax.random.key(0), 4)
    inputs = jax.random.normal(keys[1], (BATCH_SIZE, sizes[0]))
    batch = inputs, jax.random.randint(keys[2], (BATCH_SIZE,), 0, sizes[-1])

    def loss_fn(params, batch, key):
        return nnlearn.cross_entropy(model.apply(params, batch[0]), batch[1])

    def vmapped_norms(params, batch, key):
        grads = per_example_grads(loss_fn, params, batch)
        squares = [jnp.sum(jnp.square(leaf.reshape(BATCH_SIZE, -1)), axis=1) for leaf in jax.tree.leaves(grads)]
        return jnp.sqrt(sum(squares))

    functions = {
        FLOOR: lambda params, batch, key: jax.grad(loss_fn)(params, batch, None),
        NORMS: lambda params, batch, key: per_example_norms(loss_fn, params, batch),
        NAIVE: vmapped_norms,
        "clipped gradient": lambda params, batch, key: clipped_value_and_grad(loss_fn, 1.0)(params, batch, None),
        "clipped gradient + noise": clipped_value_and_grad(loss_fn, 1.0, 1.0),
    }
    params = model.init(keys[0])
    return {name: Compiled(function, params, batch, keys[3]) for name, function in functions.items()}


def measure(sizes: tuple[int, ...], rounds: int) -> tuple[list[dict], list[dict]]:
    """For one model, a row for each rival, and the ratio of its time to that of the plain gradient."""
    rivals = make_rivals(sizes)
    seconds, calls = race(rivals, rounds=rounds)
    worst = float(np.max(np.abs(rivals[NORMS].result / rivals[NAIVE].result - 1)))
    if not worst < DIFFERENT:
        print(f"  DIFFERENT NORMS: by {worst:.1e}", flush=True)
    head = {"sizes": list(sizes), "batch_size": BATCH_SIZE, "calls": calls, "largest_relative_difference": worst}
    rows = [
        head | {"rival": name, **summarize(seconds[name]), "compile": rival.compile} for name, rival in rivals.items()
    ]
    return rows, [head | {"ratios": ratios_to(seconds, FLOOR, rivals)}]


def print_rows(rows: list[dict], ratios: dict) -> None:
    def cells(row):
        to_floor, compiling = ratios.get(f"{row['rival']} / {FLOOR}"), row["compile"]
        return (
            row["rival"],
            f"{row['median_ms']:.3f}",
            "{:.3f}-{:.3f}".format(*row["quartiles_ms"]),
            f"{to_floor['median']:.2f}" if to_floor else "",
            f"{compiling['total_seconds']:.2f}",
            f"{compiling['temp_bytes'] / 1e6:.2f}",
        )

    show(f"mlp{tuple(rows[0]['sizes'])}, {BATCH_SIZE} examples", HEADINGS, map(cells, rows))


def main() -> None:
    options = argument_parser(__doc__, "per_example").parse_args()
    rounds = options.rounds or (5 if options.quick else 40)
    report = Report(options)
    for sizes in SIZES[:1] if options.quick else SIZES:
        rows, ratios = measure(sizes, rounds)
        report.add(rows, ratios)
        print_rows(rows, ratios[0]["ratios"])
    report.close()


if __name__ == "__main__":
    main()
