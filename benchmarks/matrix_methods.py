"""Matrix methods on 100 matrices: a step and its compilation, beside the matrix products of Muon alone.

    python benchmarks/matrix_methods.py
    python benchmarks/matrix_methods.py --only kron dion    # some; other rows of the result stay

A step is ``update`` and ``apply_updates`` in one jitted program with donated parameters and state; the gradient is an
input. nnlearn's parameters are packed, or the tree; optax's are the tree. ``products`` are those of five steps of
Newton-Schulz on each matrix, by NumPy's BLAS (with its symmetric product for ``x @ x.T``) and by XLA as batches.
``longest_ms`` is the longest of 20 steps. The ``wide`` rows are the polynomials alone, of 24 matrices of 128 x 1024, in
Gram form, which nnlearn takes for them, and in the plain form.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from harness import Compiled, Jitted, Report, Thunk, argument_parser, output_path, race, ratios_to, show, summarize

import nnlearn
from nnlearn.native import polynomial
from nnlearn.native.kernel import call_kernel

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


class PlainKernel(polynomial.PolynomialKernel):
    """The C kernel without the Gram form."""

    flags = ("-ffp-contract=fast", "-DWIDE=1000000")


def wide_makers() -> dict[str, Any]:
    """The polynomials of wide matrices in both forms, by the C kernel and by XLA."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(24, 128, 1024)), jnp.float32)
    x = x / jnp.linalg.norm(x, axis=(1, 2), keepdims=True)
    rows = jnp.asarray([(3.4445, -4.7750, 2.0315)] * STEPS, jnp.float32)

    def by_xla(ratio):
        def run(x):
            kept, polynomial.WIDE = polynomial.WIDE, ratio
            try:
                return jax.vmap(polynomial.polynomials_by_xla, in_axes=(0, None))(x, rows)
            finally:
                polynomial.WIDE = kept

        return Compiled(run, x)

    return {
        "wide, Gram form, C": lambda: Compiled(lambda x: call_kernel(polynomial.PolynomialKernel(), x, rows)[0], x),
        "wide, plain form, C": lambda: Compiled(lambda x: call_kernel(PlainKernel(), x, rows)[0], x),
        "wide, Gram form, XLA": lambda: by_xla(2),
        "wide, plain form, XLA": lambda: by_xla(10**6),
    }


def longest_step(rival: Any) -> float:
    """Milliseconds of the longest of 20 steps."""
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        rival.run(1)
        seconds.append(time.perf_counter() - start)
    return 1e3 * max(seconds)


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
        "soap, every 10, staggered": nnlearn.soap(1e-3, precondition_every=10, stagger=True),
        "shampoo, every 10, staggered": nnlearn.shampoo(1e-3, precondition_every=10, stagger=True),
        "kron": nnlearn.kron(1e-3),
        "kron, 3 % of the steps": nnlearn.kron(1e-3, preconditioner_update_probability=0.03),
        "dion": nnlearn.dion(1e-3),
        "galore": nnlearn.galore(1e-3, rank=16),
        "apollo": nnlearn.apollo(1e-3, rank=16),
        "adamw": nnlearn.adamw(1e-3),
    }
    found: dict[str, Any] = {
        "products, BLAS": lambda: blas_products(params),
        "products, XLA": lambda: xla_products(params),
        "muon, tree": lambda: stepping(methods["muon"], *tree),
        "optax.contrib.muon": lambda: stepping(optax.contrib.muon(1e-3), *tree),
    }
    found |= wide_makers()
    return found | {name: lambda tx=tx: stepping(tx, *packed) for name, tx in methods.items()}


def main() -> None:
    parser = argument_parser(__doc__, "matrix_methods")
    parser.add_argument("--only", nargs="*", help="names of rivals")
    options = parser.parse_args()
    params, grads = (matrices(seed, 10 if options.quick else 1) for seed in range(2))
    flop = floating_operations(params)
    report = Report(options, note=f"{len(params)} matrices, {flop / 1e9:.2f} GFLOP of full products; times of a step")
    kept = json.loads(path.read_text()) if options.only and (path := output_path(options)) and path.exists() else {}
    report.add([row for row in kept.get("rows", []) if row["rival"] not in options.only], kept.get("ratios", []))
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
            if name.startswith("wide"):
                continue
            rows[-1]["gflops"] = flop / rows[-1]["median_ms"] / 1e6
            if "every 10" in name:
                rows[-1]["longest_ms"] = longest_step(rival)
        base = "products, BLAS"
        report.add(rows, [{"ratios": ratios_to(seconds, base, rivals)}] if base in rivals else [])
        cells = [
            (
                row["rival"],
                f"{row['median_ms']:.1f}",
                "{:.1f}-{:.1f}".format(*row["quartiles_ms"]),
                f"{row['compile']['total_seconds']:.2f}" if row["compile"] else "",
                f"{row['longest_ms']:.1f}" if "longest_ms" in row else "",
            )
            for row in rows
        ]
        show(f"{len(params)} matrices", ("rival", "ms", "quartiles", "compile s", "longest ms"), cells)
    report.close()


if __name__ == "__main__":
    main()
