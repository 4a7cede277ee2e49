"""The loss of a language model's last layer and its gradients, with and without the logits.

    python benchmarks/linear_cross_entropy.py            # 4,096 tokens, width 512, 50,257 classes
    python benchmarks/linear_cross_entropy.py --gpu      # 8,192 tokens, width 4,096, 131,072 classes, bfloat16
    python benchmarks/linear_cross_entropy.py --quick    # 1,024 tokens, 8,192 classes, few rounds, writes nothing

Every rival computes the loss and its gradients with respect to hidden, weight and bias. ``dense`` is
``nnlearn.cross_entropy(hidden @ weight + bias, labels)``, and ``optax`` is the same with optax's loss. ``embedding``
has a weight of shape [classes, width], which ``embedding.T`` transposes. TFLOP/s count the three dense matrix products
for every rival. ``temp MB`` is the scratch memory of the compiled program, without arguments and results, and
``/ logits`` is its ratio to the logits in float32. All losses must agree.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from harness import Report, argument_parser, compile_timed, race, ratios_to, show, summarize

import nnlearn
from nnlearn.losses.linear_cross_entropy import linear_cross_entropy

SIZES = (4096, 512, 50_257)
QUICK_SIZES = (1024, 512, 8192)
GPU_SIZES = (8192, 4096, 131_072)
OURS, DENSE = "linear_cross_entropy", "dense"
DIFFERENT = {"float32": 1e-5, "bfloat16": 1e-2}  # relative; dense logits are rounded to their dtype
HEADINGS = ("rival", "ms", "quartiles", "TFLOP/s", "/ dense", "compile s", "temp MB", "/ logits")


class Compiled:
    """A rival that is the compiled value and gradients of a loss at constant arguments."""

    def __init__(self, loss: Any, *inputs: jax.Array):
        self.compiled, self.compile = compile_timed(jax.jit(jax.value_and_grad(loss, (0, 1, 2))), *inputs)
        self.inputs = inputs
        self.value: Any = None

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.value, _ = jax.block_until_ready(self.compiled(*self.inputs))


def dense(hidden, weight, bias, labels):
    return nnlearn.cross_entropy(hidden @ weight + bias[None], labels)


def optax_dense(hidden, weight, bias, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(hidden @ weight + bias[None], labels))


def make_rivals(sizes: tuple[int, int, int], dtype: str, names: list[str] | None) -> dict[str, Compiled]:
    tokens, width, classes = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, width), dtype)
    weight = jax.random.normal(keys[1], (width, classes), dtype) / jnp.sqrt(width).astype(dtype)
    bias, labels = jnp.zeros(classes, dtype), jax.random.randint(keys[2], (tokens,), 0, classes)
    losses = {
        OURS: lambda h, w, b, y: linear_cross_entropy(h, w, y, b),
        DENSE: dense,
        "optax": optax_dense,
        "embedding": lambda h, w, b, y: linear_cross_entropy(h, w, y, b, transposed=True),
        "embedding.T": lambda h, w, b, y: linear_cross_entropy(h, w.T, y, b),
    }
    table = weight.T
    return {
        name: Compiled(loss, hidden, table if "embedding" in name else weight, bias, labels)
        for name, loss in losses.items()
        if names is None or name in names
    }


def measure(sizes: tuple[int, int, int], dtype: str, rounds: int, names: list[str] | None) -> tuple[list, list]:
    """A row for each rival, and the ratio of its time to that of the dense loss."""
    rivals = make_rivals(sizes, dtype, names)
    seconds, calls = race(rivals, rounds=rounds, warmup=1)
    values = {name: float(rival.value) for name, rival in rivals.items()}
    worst = max(abs(value / values[OURS] - 1) for value in values.values())
    if not worst < DIFFERENT[dtype]:
        print(f"  DIFFERENT LOSSES: {values}", flush=True)
    tokens, width, classes = sizes
    head = {"tokens": tokens, "width": width, "classes": classes, "dtype": dtype, "calls": calls,
            "largest_relative_difference": worst, "logits_bytes": 4 * tokens * classes}  # fmt: skip
    rows = []
    for name, rival in rivals.items():
        row = head | {"rival": name, **summarize(seconds[name]), "compile": rival.compile}
        rows.append(row | {"tflops": 6e-9 * tokens * width * classes / row["median_ms"]})
    return rows, [head | {"ratios": ratios_to(seconds, DENSE, rivals) if DENSE in rivals else {}}]


def print_rows(rows: list[dict], ratios: dict) -> None:
    def cells(row):
        to_dense, compiling = ratios.get(f"{row['rival']} / {DENSE}"), row["compile"]
        return (
            row["rival"],
            f"{row['median_ms']:.0f}",
            "{:.0f}-{:.0f}".format(*row["quartiles_ms"]),
            f"{row['tflops']:.3f}",
            f"{to_dense['median']:.2f}" if to_dense else "",
            f"{compiling['total_seconds']:.2f}",
            f"{compiling['temp_bytes'] / 1e6:.1f}",
            f"{compiling['temp_bytes'] / row['logits_bytes']:.3f}",
        )

    first = rows[0]
    title = f"{first['tokens']} tokens, width {first['width']}, {first['classes']} classes, {first['dtype']}"
    show(title, HEADINGS, map(cells, rows))


def main() -> None:
    parser = argument_parser(__doc__, "linear_cross_entropy")
    parser.add_argument("--gpu", action="store_true", help="the larger shape, only in bfloat16")
    parser.add_argument("--dtypes", nargs="+", choices=DIFFERENT, help="by default float32 and bfloat16")
    parser.add_argument("--rivals", nargs="+", help="names; by default all")
    options = parser.parse_args()
    if options.gpu:
        options.name = "linear_cross_entropy_gpu"
    sizes = GPU_SIZES if options.gpu else QUICK_SIZES if options.quick else SIZES
    rounds = options.rounds or (30 if options.gpu else 3 if options.quick else 5)
    report = Report(options)
    for dtype in options.dtypes or (["bfloat16"] if options.gpu else list(DIFFERENT)):
        rows, ratios = measure(sizes, dtype, rounds, options.rivals)
        report.add(rows, ratios)
        print_rows(rows, ratios[0]["ratios"])
    report.close()


if __name__ == "__main__":
    main()
