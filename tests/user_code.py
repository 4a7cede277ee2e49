"""Code of a typical user: ``tests/test_types.py`` checks its types strictly and runs it."""

# pyright: strict

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nnlearn
from nnlearn.data import Examples, MaskedBatch
from nnlearn.models import mlp
from nnlearn.sweeps import log_uniform

inputs = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
data = Examples(inputs, inputs**2)
model = mlp((1, 8, 1))


def loss_fn(params: Any, batch: MaskedBatch, key: jax.Array | None) -> jax.Array:
    predictions = model.apply(params, batch.examples.inputs, key)
    errors = nnlearn.squared_error(predictions, batch.examples.targets)
    return jnp.mean(errors, where=batch.where[:, None])


def metrics_fn(params: Any, batch: MaskedBatch) -> dict[str, jax.Array]:
    return {"loss": loss_fn(params, batch, None)}


def make_tx(hparams: dict[str, Any]) -> nnlearn.GradientTransformationExtraArgs:
    schedule = nnlearn.warmup_cosine_decay_schedule(0.0, hparams["rate"], 4, 32)
    return nnlearn.chain(nnlearn.clip_by_global_norm(1.0), nnlearn.adamw(schedule, weight_decay=1e-3))


def whole_run() -> tuple[nnlearn.TrainState, nnlearn.Trace]:
    train = nnlearn.make_train(
        loss_fn,
        make_tx,
        nnlearn.shuffled(data, 16),
        model.init,
        epochs=4,
        evaluate=nnlearn.evaluation(metrics_fn, data, batch_size=16),
        stop=[nnlearn.patience("loss", 3), nnlearn.diverged()],
    )
    results = nnlearn.sweep(train, {"rate": log_uniform(1e-3, 1e-1)}, seeds=2, samples=2, method="quasi", metric="loss")
    best = results.best()
    print(best.mean, best.standard_error)
    state, trace = train(best.setting, jax.random.key(0))
    check = trace[2:4].metrics["loss"]
    print(trace.loss.shape, trace.stopped_by, check, state.step, sorted(trace.columns()), results.columns()["rate"])
    return state, trace


def batches(epoch: int) -> Iterator[MaskedBatch]:
    order = np.random.default_rng(epoch).permutation(64)
    for rows in np.split(order, 4):
        yield MaskedBatch(Examples(data.inputs[rows], data.targets[rows]), np.ones(16, bool))


def by_hand() -> nnlearn.TrainState:
    tx = nnlearn.adamw(0.01)
    step = nnlearn.make_step(loss_fn, tx)
    state = nnlearn.init_state(model.init(jax.random.key(0)), tx)
    state, info = nnlearn.jit_step(step)(state, next(batches(0)))
    print(info.loss, info.grad_norm, jax.tree.map(jnp.shape, state.params))
    result = nnlearn.fit(step, state, batches, epochs=2, progress=False)
    print(result.stopped_by, result.trace.loss.shape)
    return result.state


if __name__ == "__main__":
    whole_run()
    by_hand()
