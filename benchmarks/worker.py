"""One process of ``benchmarks/processes.py`` and ``benchmarks/scaling.py``; its options are a JSON object."""

import json
import os
import sys
import time

if json.loads(sys.argv[1]).get("one_core"):  # before XLA starts its threads
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["NNLEARN_PROCESS"]) % len(cores)]})

import jax  # noqa: E402

from nnlearn import distributed  # noqa: E402

place = distributed.start()

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import nnlearn  # noqa: E402
from nnlearn import models, sharding  # noqa: E402

OPTIONS = {"folder": None, "epochs": 2, "stop_at": None, "raise_at": None, "width": 16, "batch": 8, "length": 8}
OPTIONS |= {
    "examples": 30,
    "layers": 1,
    "vocabulary": 32,
    "packed": None,
    "one_core": False,
    "save": True,
    "mapped": False,
}


def main() -> None:
    options = OPTIONS | json.loads(sys.argv[1])
    width, length, vocabulary = options["width"], options["length"], options["vocabulary"]
    mesh = nnlearn.make_mesh("data")
    model = models.transformer(vocabulary, layers=options["layers"], width=width, heads=2, max_length=length)

    def loss_fn(params, batch, key):
        examples, where = batch
        logits, targets = model.apply(params, examples["tokens"][:, :-1]), examples["tokens"][:, 1:]
        used = jnp.zeros(count).at[examples["index"]].add(where)  # what the program itself has trained on
        return nnlearn.cross_entropy(logits, targets, where=where[:, None] & jnp.ones_like(targets, bool)), used

    count = options["examples"]
    tokens = np.random.default_rng(0).integers(0, vocabulary, (count, length))
    batches = distributed.own_batches({"tokens": tokens, "index": np.arange(count)}, options["batch"])
    times = []

    def callback(event):
        times.append(time.perf_counter())
        if distributed.is_first():
            print(f"step {event.step}", flush=True)
        if event.step == options["raise_at"]:
            raise RuntimeError("the data of this process are damaged")
        return event.step == options["stop_at"]

    tx = nnlearn.adamw(1e-3)
    state = nnlearn.init_state(model.init, tx, mesh=mesh, rules=sharding.fsdp(), packed=options["packed"])
    how = {"axis_name": "data", "mesh": mesh} if options["mapped"] else {}
    result = nnlearn.fit(
        nnlearn.make_step(loss_fn, tx, **how),
        state,
        batches,
        epochs=options["epochs"],
        sharding=jax.NamedSharding(mesh, jax.P("data")),
        checkpoints=options["folder"] if options["save"] else None,
        callbacks=nnlearn.train.every(1, callback),
        steps_per_dispatch=1,
        prefetch=0,
        changed="accept",
        progress=False,
    )
    if distributed.is_first():
        loss, seen = np.asarray(result.trace.loss).tolist(), np.asarray(result.trace.info.aux).tolist()
        print(json.dumps({"loss": loss, "seen": seen, "times": np.diff(times).tolist()}), flush=True)


main()
