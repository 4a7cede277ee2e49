"""Scaling over processes on this host, and the step of a transformer with 7 billion parameters on 256 virtual devices.

Usage: python benchmarks/scaling.py [--quick]

Weak and strong scaling: one process on one core against two processes on a core each, with gloo between them. This
shows the cost of communication and of the Python side for a small model. It cannot show a network of machines.

The large step is compiled for 256 virtual CPU devices, 32 over data and 8 over the model, and nothing is allocated. Its
memory for each device and the bytes of its collectives come from the compiled program, and are compared with what the
layout says on paper.
"""

import json
import math
import re
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness import Report, argument_parser, show
from processes import finish, logs, start

import nnlearn
from nnlearn import models, sharding

ITEM = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s64": 8, "u8": 1, "s8": 1, "u64": 8}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def scaling(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Seconds a step with one and two processes; weak: the batch grows with them, strong: it does not."""
    sizes = {
        "width": 128,
        "layers": 2,
        "vocabulary": 256,
        "length": 64,
        "examples": 512,
        "one_core": True,
        "mapped": True,
        "save": False,
    }
    batch, rows = 32, []
    for kind, count, size in (("both", 1, batch), ("weak", 2, 2 * batch), ("strong", 2, batch)):
        place = folder / kind
        codes = finish(start(count, place, **sizes | {"batch": size, "epochs": 1 if quick else 2 * size // batch}))
        text = logs(place, count)
        if any(codes):
            raise RuntimeError("\n".join(text))
        times = json.loads(next(line for line in text[0].splitlines() if line.startswith("{")))["times"][2:]
        rows.append({"case": kind, "processes": count, "batch": size, "seconds": statistics.median(times)})
    base = rows[0]["seconds"]
    rows[1]["efficiency"], rows[2]["efficiency"] = base / rows[1]["seconds"], base / rows[2]["seconds"] / 2
    return rows


def collective_bytes(program: str) -> dict[str, dict[int, int]]:
    """Bytes of the results of a program's collectives on a device, by kind and by the size of their groups."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in program.splitlines():
        if (begin := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)) is not None:
            name = begin[1]
            bodies[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif name:
            bodies[name].append(line)
    found: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))

    def visit(name: str, times: int) -> None:
        for line in bodies[name]:
            made = re.search(r"= (.*?) (" + "|".join(COLLECTIVES) + r")(?:-start)?\(", line)
            if made is not None:
                found[made[2]][group_size(line)] += times * size_of(made[1])
            if (loop := re.search(r" while\(.*body=%?([\w.\-]+)", line)) is not None:
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                visit(loop[1], times * (int(turns[1]) if turns else 1))
            for called in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line):
                if made is None:
                    visit(called, times)

    visit(entry, 1)
    return {kind: dict(sizes) for kind, sizes in found.items()}


def size_of(types: str) -> int:
    total = 0
    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", types):
        count = 1
        for length in filter(None, shape.split(",")):
            count *= int(length)
        total += count * ITEM[kind]
    return total


def group_size(line: str) -> int:
    """The number of devices in each group of a collective; 0 if it has pairs."""
    if (named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if (compact := re.search(r"replica_groups=\[(\d+),(\d+)\]", line)) is not None:
        return int(compact[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else 0


def large_step(quick: bool) -> dict[str, Any]:
    """The FSDP and tensor-parallel step of a transformer, compiled for 256 virtual devices."""
    data, model_axis = (8, 2) if quick else (32, 8)
    layers, width, hidden, heads, vocabulary, length = (
        (4, 256, 1024, 4, 1024, 128) if quick else (32, 4096, 11008, 32, 32000, 2048)
    )
    batch = data
    mesh = nnlearn.make_mesh(f"data={data},model={model_axis}")
    model = models.transformer(
        vocabulary, layers=layers, width=width, heads=heads, hidden=hidden, activation="swiglu", max_length=length,
        tied=False, scan=True, remat=True, compute_dtype=jnp.bfloat16,
    )  # fmt: skip

    def loss_fn(params, tokens, key):
        return nnlearn.cross_entropy(model.apply(params, tokens), jnp.roll(tokens, -1, 1))

    tx, rules = nnlearn.adamw(3e-4), sharding.fsdp("data", sharding.tensor_parallel())
    shapes = jax.eval_shape(lambda key: nnlearn.init_state(model.init, tx, key, packed=False), jax.random.key(0))
    places = nnlearn.state_shardings(shapes, mesh, rules)

    def placed(leaf, place):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("data")))
    step = nnlearn.make_step(loss_fn, tx, axis_name="data", mesh=mesh)
    step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    began = time.perf_counter()
    compiled = step.lower(jax.tree.map(placed, shapes, places), tokens).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes.stored))
    activations = batch // data * length * width
    paper = {
        "state_bytes": 12 * count // mesh.size,
        "parameters_gathered_over_data": 4 * count // model_axis,
        "gradients_summed_over_data": 4 * count // model_axis,
        # two sums a layer forward, two in the recomputation, two backward; XLA on CPUs sums bfloat16 in float32
        "activations_summed_over_model": 4 * 6 * layers * activations,
    }
    return {
        "case": "large step",
        "mesh": dict(mesh.shape),
        "parameters": count,
        "batch": batch,
        "length": length,
        "compile_seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collective_bytes": collective_bytes(compiled.as_text()),
        "paper": paper,
    }


def main() -> None:
    options = argument_parser(__doc__, "scaling").parse_args()
    jax.config.update("jax_num_cpu_devices", 16 if options.quick else 256)
    report = Report(options)
    row = large_step(options.quick)
    report.add([row])
    print(json.dumps(row, indent=1))
    with tempfile.TemporaryDirectory() as name:
        rows = scaling(Path(name), options.quick)
    report.add(rows)
    table = [
        (row["case"], str(row["processes"]), f"{1e3 * row['seconds']:.1f} ms", f"{row.get('efficiency', 1):.2f}")
        for row in rows
    ]
    show("scaling", ("case", "processes", "step", "efficiency"), table)
    report.close()


if __name__ == "__main__":
    main()
