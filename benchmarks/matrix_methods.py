"""Matrix methods on 100 matrices: a step and its compilation, beside the matrix products of Muon alone.

    python benchmarks/matrix_methods.py

A step is ``update`` and ``apply_updates`` in one jitted program with donated parameters and state; the gradient is an
input. nnlearn's parameters are packed, or the tree; optax's are the tree. ``products`` are those of five steps of
Newton-Schulz on each matrix, by NumPy's BLAS (with its symmetric product for ``x @ x.T``) and by XLA as batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from harness import Compiled, Jitted, Report, Thunk, argument_parser, race, ratios_to, show, summarize

import nnlearn

SHAPES = {(64, 64): 30, (128, 128): 30, (64, 256): 15, (256, 64): 15, (256, 256): 10}
STEPS = 5
FAST = ("products, BLAS", "products, XLA", "muon", "muon, tree", "normuon", "adamw", "optax.contrib.muon")


def matrices(seed: int, scale: int) -> dict[str, jax.Array]:
    """The matrices in an order that mixes shapes, as a model's leaves are; with ``scale`` 1 / scale of them."""
    counts = {shape: max(1, count // scale) for shape, count in SHAPES.items()}
    shapes = [shape for shape, count in counts.items() for _ in range(count)]
    np.random.default_rng(0).shuffle(shapes)
    random = np.random.default_rng(seed)
    return {f"{n:03d}": jnp.asarray(random.normal(size=shape), jnp.float32) for n, shape in enumerate(shapes)}


def floating_operations(tree: dict[str, jax.Array]) -> int:
    """Those of the full products of Newton-Schulz, without use of symmetry."""
    sides = [(min(x.shape), max(x.shape)) for x in tree.values()]
    return sum(STEPS * (4 * short**2 * long + 2 * short**3) for short, long in sides)


def blas_products(tree: dict[str, jax.Array]) -> Thunk:
    """The products by BLAS, one matrix after another, without the sums between them."""
    wide = [np.array(x if x.shape[0] <= x.shape[1] else x.T) for x in tree.values()]
    short = {len(x): np.empty((2, len(x), len(x)), np.float32) for x in wide}
    results = {x.shape: np.empty_like(x) for x in wide}

    def run():
        for x in wide:
            gram, square = short[len(x)]
            for _ in range(STEPS):
                np.matmul(x, x.T, out=gram)
                np.matmul(gram, gram, out=square)
                np.matmul(square, x, out=results[x.shape])

    return Thunk(run)


def xla_products(tree: dict[str, jax.Array]) -> Compiled:
    """The products by XLA, matrices of one shape as a batch."""
    groups: dict[tuple[int, ...], list[jax.Array]] = {}
    for x in tree.values():
        groups.setdefault(tuple(sorted(x.shape)), []).append(x if x.shape[0] <= x.shape[1] else x.T)

    def products(stacks):
        for _ in range(STEPS):
            grams = [jnp.einsum("bij,bkj->bik", x, x) for x in stacks]
            squares = [jnp.einsum("bij,bjk->bik", gram, gram) for gram in grams]
            stacks = [1e-6 * jnp.einsum("bij,bjk->bik", square, x) for square, x in zip(squares, stacks, strict=True)]
        return stacks

    return Compiled(products, [jnp.stack(group) for group in groups.values()])


def stepping(tx: Any, params: Any, grads: Any) -> Jitted:
    tx = optax.with_extra_args_support(tx)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    own = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    return Jitted(jax.jit(step, donate_argnums=0), (own, tx.init(own)), grads)


def makers(params: dict, grads: dict) -> dict[str, Any]:
    """A function for each rival."""
    packed, tree = (nnlearn.pack(params), nnlearn.pack(grads)), (params, grads)
    methods = {
        "muon": nnlearn.muon(1e-3),
        "muon, polar_express": nnlearn.muon(1e-3, ns_coeffs="polar_express"),
        "normuon": nnlearn.normuon(1e-3),
        "soap": nnlearn.soap(1e-3),
        "soap, KL": nnlearn.soap(1e-3, kl=True),
        "soap, every 10": nnlearn.soap(1e-3, precondition_every=10),
        "shampoo": nnlearn.shampoo(1e-3),
        "shampoo, every 10": nnlearn.shampoo(1e-3, precondition_every=10),
        "adamw": nnlearn.adamw(1e-3),
    }
    found: dict[str, Any] = {
        "products, BLAS": lambda: blas_products(params),
        "products, XLA": lambda: xla_products(params),
        "muon, tree": lambda: stepping(methods["muon"], *tree),
        "optax.contrib.muon": lambda: stepping(optax.contrib.muon(1e-3), *tree),
    }
    return found | {name: lambda tx=tx: stepping(tx, *packed) for name, tx in methods.items()}


def main() -> None:
    parser = argument_parser(__doc__, "matrix_methods")
    parser.add_argument("--only", nargs="*", help="names of rivals")
    options = parser.parse_args()
    params, grads = (matrices(seed, 10 if options.quick else 1) for seed in range(2))
    flop = floating_operations(params)
    report = Report(options, note=f"{len(params)} matrices, {flop / 1e9:.2f} GFLOP of full products; times of a step")
    chosen = {name: make for name, make in makers(params, grads).items() if not options.only or name in options.only}
    parts = [[name for name in chosen if (name in FAST) == fast] for fast in (True, False)]
    for names, rounds in zip(parts, (15, 5), strict=True):
        if not names:
            continue
        rivals = {name: chosen[name]() for name in names}
        seconds, calls = race(rivals, rounds=options.rounds or rounds, warmup=2)
        rows = []
        for name, rival in rivals.items():
            compiling = getattr(rival, "compile", None)
            rows.append({"rival": name, **summarize(seconds[name]), "calls": calls, "compile": compiling})
            rows[-1]["gflops"] = flop / rows[-1]["median_ms"] / 1e6
        base = "products, BLAS"
        report.add(rows, [{"ratios": ratios_to(seconds, base, rivals)}] if base in rivals else [])
        cells = [
            (
                row["rival"],
                f"{row['median_ms']:.1f}",
                "{:.1f}-{:.1f}".format(*row["quartiles_ms"]),
                f"{row['compile']['total_seconds']:.2f}" if row["compile"] else "",
            )
            for row in rows
        ]
        show(f"{len(params)} matrices", ("rival", "ms", "quartiles", "compile s"), cells)
    report.close()


if __name__ == "__main__":
    main()
