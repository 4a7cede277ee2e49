"""Every optimizer on the transformer of 288 leaves: bytes of state, milliseconds a step, seconds to compile.

    python benchmarks/optimizer_table.py                         # all of nnlearn's, and optax's adamw and muon
    python benchmarks/optimizer_table.py --only soap shampoo     # some; other rows of the result stay
    python benchmarks/optimizer_table.py --page                  # write the table of docs/optimizers.md from the result

A step is ``update`` and ``apply_updates`` in one jitted program with donated parameters and state; the gradient is an
input. nnlearn's parameters are packed, optax's are the tree. Bytes are those of all arrays in the state, by parameter.
"""

import inspect
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import optax
import optax.contrib
from harness import Jitted, Report, argument_parser, race, show
from problems import transformer

import nnlearn
import nnlearn.optimizers

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"
START, END = "<!-- table -->", "<!-- end -->"
RIVALS = ("adamw", "muon", "prodigy", "schedule_free_adamw")
NOT_ALONE = {"lookahead", "matrix_rules", "mechanize", "sam", "ema_nesterov", "ema_nesterov_eval_params"}  # wrappers
NOT_ALONE |= {"hutchinson_estimator_diag_hessian", "sophia"}  # they need the loss


def makers() -> dict[str, Any]:
    """A transformation for each row of the table."""
    names = [name for name, value in vars(nnlearn.optimizers).items() if inspect.isfunction(value)]
    names = sorted(name for name in names if not name.startswith("scale_by_") and name not in NOT_ALONE)
    rates = {name: {} if name == "polyak_sgd" else {"learning_rate": 1e-3} for name in names} | {"noisy_sgd": {}}
    rates["noisy_sgd"] = {"learning_rate": 1e-3, "key": 0}
    rates |= {name: {"learning_rate": 1e-3, "rank": 16} for name in ("galore", "apollo")}  # a quarter of most sides
    found = {name: getattr(nnlearn, name)(**rates[name]) for name in names}
    found["soap, KL"] = nnlearn.soap(1e-3, kl=True)
    found["sam"] = nnlearn.sam(nnlearn.sgd(1e-3), nnlearn.chain(nnlearn.normalize(), nnlearn.sgd(0.05)))
    found["mechanize(adamw)"] = nnlearn.mechanize(nnlearn.adamw(1.0))
    found["cautious(adamw)"] = nnlearn.cautious(nnlearn.adamw(1e-3))
    found["compress_state(adamw)"] = nnlearn.compress_state(nnlearn.adamw(1e-3))
    found["compress_state(muon)"] = nnlearn.compress_state(nnlearn.muon(1e-3))
    for name in RIVALS:
        theirs = getattr(optax, name, None) or getattr(optax.contrib, name)
        found[f"optax {name}"] = theirs(1e-3)
    return found


def measured(tx: Any, params: Any, grads: Any, rounds: int) -> dict[str, Any]:
    """Bytes of state by parameter, milliseconds of a step, seconds to compile."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params, value=jax.numpy.float32(1.0))
        return optax.apply_updates(params, updates), state

    own = jax.tree.map(lambda leaf: jax.numpy.array(leaf, copy=True), params)
    state = jax.tree.map(lambda leaf: jax.numpy.array(leaf, copy=True), tx.init(own))  # optax shares some buffers
    leaves = [leaf for leaf in jax.tree.leaves(state) if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    size = sum(leaf.nbytes for leaf in leaves) / count
    rival = Jitted(jax.jit(step, donate_argnums=0), (own, state), grads)
    seconds, _ = race({"step": rival}, rounds=rounds)
    return {
        "bytes": size,
        "milliseconds": 1e3 * statistics.median(seconds["step"]),
        "compile_seconds": rival.compile["total_seconds"],
    }


def write_page(rows: list[dict]) -> None:
    """Replace the table in the page."""
    lines = ["| optimizer | state, bytes a parameter | ms a step | compile, s |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["name"].startswith("optax"), row["name"])):
        numbers = f"{row['bytes']:.2f} | {row['milliseconds']:.2f} | {row['compile_seconds']:.2f}"
        lines.append(f"| `{row['name']}` | {numbers} |")
    text = PAGE.read_text()
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    PAGE.write_text(before + "\n" + "\n".join(lines) + "\n" + after)


def main() -> None:
    parser = argument_parser(__doc__, "optimizer_table")
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--page", action="store_true", help="write the page from the result, and measure nothing")
    options = parser.parse_args()
    result = Path(__file__).parent / "results" / "optimizer_table.json"
    kept = json.loads(result.read_text())["rows"] if result.exists() and (options.only or options.page) else []
    if options.page:
        write_page(kept)
        return
    report = Report(options, note="288 leaves, 1.19 million parameters; nnlearn's packed, optax's as a tree")
    params = transformer(**({"layers": 2} if options.quick else {})).params
    grads = jax.tree.map(lambda leaf: 0.01 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    packed = nnlearn.pack(params), nnlearn.pack(grads)
    chosen = {name: tx for name, tx in makers().items() if not options.only or name in options.only}
    report.add([row for row in kept if row["name"] not in chosen])
    for name, tx in chosen.items():
        trees = (params, grads) if name.startswith("optax") else packed
        row = {"name": name, **measured(tx, *trees, options.rounds or 15)}
        report.add([row])
        numbers = (f"{row[key]:.2f}" for key in ("bytes", "milliseconds", "compile_seconds"))
        show(name, ("bytes", "ms", "compile s"), [tuple(numbers)], left=0)
    report.close()


if __name__ == "__main__":
    main()
