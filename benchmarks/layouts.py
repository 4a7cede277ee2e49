"""Layouts on 8 virtual CPU devices against one device: trajectories, bytes for each device, communication, sweeps.

Usage: python benchmarks/layouts.py [--explicit] [--rate RATE] [--float64] [--parts ...] [--layouts ...] [--add]

With --float64 only the trajectories are compared. Layouts that agree there differ in float32 by rounding alone.
With --add the rows of earlier runs stay in the JSON file, so the parts can run one after another.
"""

import functools
import json
import re
import sys
from typing import Any

import jax

DEVICES, FLOAT64 = 8, "--float64" in sys.argv
jax.config.update("jax_num_cpu_devices", DEVICES)  # before anything uses a device
jax.config.update("jax_enable_x64", FLOAT64)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from harness import Report, argument_parser, show  # noqa: E402

import nnlearn  # noqa: E402
from nnlearn import models, sharding  # noqa: E402

STEPS, VOCABULARY = 50, 64
DTYPE = jnp.float64 if FLOAT64 else jnp.float32
MODEL = models.transformer(
    VOCABULARY, layers=2, width=32, heads=4, max_length=16, scan=True, compute_dtype=DTYPE if FLOAT64 else None
)
BATCHES = [np.random.default_rng(step).integers(0, VOCABULARY, (16, 17)) for step in range(STEPS)]
RATE = float(sys.argv[sys.argv.index("--rate") + 1]) if "--rate" in sys.argv else 1e-3
RUN = {"dtype": jnp.dtype(DTYPE).name, "rate": RATE}
OPTIMIZERS = {"adamw": nnlearn.adamw(RATE), "muon": nnlearn.muon(RATE)}
PARTS = ("sweeps", *OPTIMIZERS, "collectives")
LAYOUTS = {
    "data": ("data=8", None, {}),
    "data, packed, shard_map": ("data=8", None, {"packed": True, "axis_name": "data"}),
    "zero": ("data=8", "zero", {}),
    "fsdp": ("data=8", sharding.fsdp(), {}),
    "fsdp, packed": ("data=8", sharding.fsdp(), {"packed": True}),
    "tensor": ("data=2,model=4", sharding.tensor_parallel(), {}),
    "fsdp and tensor": ("data=2,model=4", sharding.fsdp("data", sharding.tensor_parallel()), {}),
}


def start_params(key):
    return jax.tree.map(lambda leaf: leaf.astype(DTYPE), MODEL.init(key))


# float32 draws of two programs differ by rounding, so in float64 all layouts begin with the same arrays
START = start_params(jax.random.key(0)) if FLOAT64 else start_params


def loss_fn(params, batch, key):
    return nnlearn.cross_entropy(MODEL.apply(params, batch[:, :-1]), batch[:, 1:])


def whole_bytes(state: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves((state.stored, state.opt_state)))


@functools.cache
def one_device(name: str) -> tuple[np.ndarray, Any]:
    tx = OPTIMIZERS[name]
    step, losses = nnlearn.jit_step(nnlearn.make_step(loss_fn, tx)), []
    state = nnlearn.init_state(START, tx, packed=False)
    for batch in BATCHES:
        state, info = step(state, batch)
        losses.append(float(info.loss))
    return np.array(losses), state


@functools.cache
def rows_reversed(name: str) -> dict[str, Any]:
    """One device against itself with the rows of each batch in reverse order: the size of rounding."""
    tx, (losses, alone) = OPTIMIZERS[name], one_device(name)
    step, found = nnlearn.jit_step(nnlearn.make_step(loss_fn, tx)), []
    state = nnlearn.init_state(START, tx, packed=False)
    for batch in BATCHES:
        state, info = step(state, batch[::-1])
        found.append(float(info.loss))
    return RUN | {"layout": "one device, rows reversed", "optimizer": name} | differences(found, losses, state, alone)


def differences(found: list[float], losses: np.ndarray, state: Any, alone: Any) -> dict[str, float]:
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True)
    largest = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    return {"loss_difference": float(np.abs(np.array(found) - losses).max()), "parameter_difference": largest}


def layout(name: str, optimizer: str, explicit: bool) -> dict[str, Any]:
    axes, rules, options = LAYOUTS[name]
    mesh, tx = nnlearn.make_mesh(axes, explicit=explicit), OPTIMIZERS[optimizer]
    losses, alone = one_device(optimizer)
    if rules == "zero":
        tx, rules = sharding.zero(tx, mesh), None
    start = functools.partial(
        nnlearn.init_state, START, tx, mesh=mesh, rules=rules, packed=options.get("packed", False)
    )
    state = start(0)
    axis = options.get("axis_name")
    step = nnlearn.make_step(loss_fn, tx, axis_name=axis, mesh=mesh if axis else None)
    run, found = nnlearn.jit_step(step, like=state), []
    for batch in BATCHES:
        state, info = run(state, sharding.shard_batch(batch, mesh))
        found.append(float(info.loss))
    row = RUN | {"layout": name, "optimizer": optimizer, "axes": "explicit" if explicit else "auto"}
    row |= differences(found, losses, state, alone)
    if FLOAT64:
        return row
    used = sharding.bytes_per_device((state.stored, state.opt_state))
    row["bytes_of_one_device"] = max(used.values()) / whole_bytes(alone)
    memory = jax.jit(start).lower(jax.random.key(0)).compile().memory_analysis()
    leaf = max(leaf.nbytes for leaf in jax.tree.leaves(alone.params))
    row["peak_at_start"] = (memory.output_size_in_bytes + memory.temp_size_in_bytes) / whole_bytes(alone)
    row["largest_leaf"] = leaf / whole_bytes(alone)
    return row


def collectives(microbatches: int, packed: bool, mapped: bool) -> dict[str, Any]:
    """The collectives of more than one element in a compiled data-parallel step."""
    mesh, tx = nnlearn.make_mesh("data=8"), OPTIMIZERS["adamw"]
    state = nnlearn.init_state(MODEL.init, tx, mesh=mesh, packed=packed)
    options = {"axis_name": "data", "mesh": mesh} if mapped else {}
    step = jax.jit(nnlearn.make_step(loss_fn, tx, microbatches=microbatches, **options))
    batch = sharding.shard_batch(np.concatenate(BATCHES[:2]), mesh)
    program = step.lower(state, batch).compile().as_text()
    sizes = []
    for line in re.findall(r"= (.*?) (?:all-reduce|reduce-scatter|all-gather)(?:-start)?\(", program):
        sizes += [int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r"f32\[([\d,]+)\]", line)]
    sizes = [size for size in sizes if size > 1]
    how = "shard_map" if mapped else "jit"
    return {"step": how, "packed": packed, "microbatches": microbatches, "collectives": len(sizes), "elements": sizes}


def sweep(name: str) -> dict[str, Any]:
    """64 members on 8 devices and on one, compared bit for bit."""
    if name == "mlp":
        examples = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
        model = models.mlp((8, 16, 8))

        def loss(params, batch, key):
            return jnp.mean((model.apply(params, batch.examples) - batch.examples) ** 2)
    else:
        examples = np.random.default_rng(0).integers(0, 16, (32, 9))
        model = models.transformer(16, layers=1, width=16, heads=2, max_length=8)

        def loss(params, batch, key):
            return nnlearn.cross_entropy(model.apply(params, batch.examples[:, :-1]), batch.examples[:, 1:]).mean()

    train = nnlearn.make_train(
        loss, lambda hparams: nnlearn.adamw(hparams["rate"]), nnlearn.shuffled(examples, 8), model.init, steps=40
    )
    axes = {"rate": nnlearn.sweeps.choice(*np.geomspace(1e-4, 1e-1, 64).tolist())}
    row: dict[str, Any] = {"sweep of": name, "members": 64, "native": nnlearn.native_status()}
    found = {}
    # 8 members on each device, then the default: 32 on one device, 8 on each of eight
    for count, width in ((1, 8), (8, 64), (1, None)):
        run = nnlearn.sweep(
            train, axes, metric="train_loss", width=width, devices=jax.devices()[:count], workers=1, full=True
        )
        found[count, width] = run.traces[0]
    leaves = [jax.tree.leaves(found[case]) for case in ((1, 8), (8, 64))]
    row["bit_equal"] = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*leaves, strict=True))
    first = [np.asarray(found[case].info.loss)[..., :10] for case in ((1, None), (8, 64))]
    row["loss_difference_in_10_steps_at_another_width"] = float(np.abs(first[0] - first[1]).max())
    return row


def keep_earlier(report: Report) -> None:
    """Put the rows of the JSON file before those of this run, and the facts of their runs under ``earlier``."""
    if report.path is not None and report.path.exists():
        found = json.loads(report.path.read_text())
        report.document["rows"] = found.pop("rows")
        report.document["earlier"] = [*found.pop("earlier", []), found]


def main() -> None:
    parser = argument_parser(__doc__, "layouts")
    parser.add_argument("--explicit", action="store_true", help="also with Explicit axes")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--float64", action="store_true", help="compare trajectories in float64")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="the layouts to run")
    parser.add_argument("--add", action="store_true", help="keep the rows of earlier runs in the JSON file")
    options = parser.parse_args()
    report = Report(options, devices=DEVICES, steps=STEPS)
    if options.add:
        keep_earlier(report)
    if "sweeps" in options.parts and not FLOAT64:
        for name in ("mlp", "transformer"):
            report.add([sweep(name)])
            print(report.document["rows"][-1], flush=True)
    rows = []
    for optimizer in (name for name in OPTIMIZERS if name in options.parts):
        rows.append(rows_reversed(optimizer))
        report.add(rows[-1:])
        print(rows[-1], flush=True)
        for explicit in (False, True) if options.explicit else (False,):
            for name in options.layouts:
                rows.append(layout(name, optimizer, explicit))
                report.add(rows[-1:])
                print(rows[-1], flush=True)
    cases = ((1, True, True), (4, True, True), (1, False, True), (4, True, False))
    for case in cases if "collectives" in options.parts and not FLOAT64 else ():
        report.add([collectives(*case)])
        print(report.document["rows"][-1], flush=True)
    table = [
        (
            row["layout"],
            row["optimizer"],
            row.get("axes", ""),
            f"{row['loss_difference']:.1e}",
            f"{row['parameter_difference']:.1e}",
            f"{row['bytes_of_one_device']:.4f}" if "bytes_of_one_device" in row else "",
            f"{row['peak_at_start']:.4f}" if "peak_at_start" in row else "",
        )
        for row in rows
    ]
    show("layouts", ("layout", "optimizer", "axes", "loss", "params", "bytes", "peak at start"), table, left=3)
    report.close()


if __name__ == "__main__":
    main()
