"""Objects of every kind that can be pickled, built equally in two processes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import nnlearn
from nnlearn import models, schedules, sweeps
from nnlearn.data import Examples
from nnlearn.gradients import clipped
from nnlearn.tasks import images, objectives, synthetic, text

PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2), "more": (jnp.ones(3), None)}
TEXT = "in the beginning was the word, " * 60


def loss_fn(params, batch, key):
    return jnp.sum(params["w"] * batch) + jnp.sum(params["b"])


def metrics_fn(params, batch):
    return {"mean": jnp.mean(params * batch.examples, where=batch.where)}


def batch_fn(key, step):
    return jax.random.normal(key)


def make_tx(hparams, decay=0.0):
    return nnlearn.adamw(hparams["rate"], weight_decay=decay)


def with_options(learning_rate, **options):
    return nnlearn.adam(learning_rate, **options)


def decays(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_train():
    batches = nnlearn.generated(batch_fn)
    rules = [nnlearn.patience("train_loss", 2)]
    tx = functools.partial(make_tx, decay=0.1)
    return nnlearn.make_train(loss_fn, tx, batches, PARAMS, steps=4, check_every=2, stop=rules, packed=True)


def equal_by_settings() -> dict:
    """Objects that must equal newly built ones in any process."""
    adam = nnlearn.adam(1e-3, b1=np.float32(0.8))
    injected = nnlearn.inject_hyperparams(with_options)
    cosine = schedules.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10)
    return {
        "optimizer": adam,
        "masked": nnlearn.adamw(cosine, weight_decay=0.1, mask={"w": True, "b": [False, True]}),
        "accumulated": nnlearn.MultiSteps(adam, 2),
        "guarded": nnlearn.apply_if_finite(adam, 3),
        "injected": injected(cosine, b1=0.5),
        "injection": injected,
        "schedule": schedules.join_schedules([cosine, schedules.constant_schedule(0.1)], [5]),
        "partial": nnlearn.sgd(functools.partial(schedules.linear_schedule(1.0, 0.0, 10))),
        "rule": nnlearn.packing.per_buffer(decays),
        "model": models.mlp((4, 8, 3), activation="gelu", norm="layer", dropout=0.1),
        "stateful model": models.convnet(1, 3, widths=(4,), blocks=1),
        "language model": models.transformer(8, layers=1, width=8, heads=2, max_length=4),
        "stop rule": nnlearn.patience("loss", 3),
        "sampler": nnlearn.generated(batch_fn),
        "shuffled": nnlearn.shuffled(np.arange(6.0), 2),
        "evaluation": nnlearn.evaluation(metrics_fn, np.arange(5.0), 2),
        "policy": nnlearn.Policy(),
        "wrapped": nnlearn.Policy(compute=jnp.bfloat16).wrap(loss_fn),
        "clipped": clipped.clipped_value_and_grad(loss_fn, 1.0),
        "objective": objectives.classification(models.mlp((4, 3)), label_smoothing=0.1),
        "space": {"rate": sweeps.log_uniform(1e-3, 1.0), "b1": sweeps.choice(0.8, 0.9), "decay": sweeps.uniform(0, 1)},
        "layout": nnlearn.pack(PARAMS, labels=decays).layout,
    }


def states() -> dict:
    """Pytrees whose structure and arrays must equal newly built ones."""
    halves = jax.make_mesh((2,), ("half",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    placed = jax.device_put(jnp.arange(4.0), jax.NamedSharding(halves, jax.P("half")))
    tx = nnlearn.chain(nnlearn.clip_by_global_norm(1.0), nnlearn.MultiSteps(nnlearn.adamw(1e-3), 2))
    return {
        "packed": nnlearn.pack(PARAMS, labels=decays),
        "plain state": nnlearn.init_state(PARAMS, tx, packed=False),
        "packed state": nnlearn.init_state(PARAMS, tx, packed=True),
        "spread": nnlearn.pack({"a": placed, "b": jnp.ones(3)}),
    }


def whole() -> dict:
    """Objects that must unpickle and work; they compare by identity."""
    data = Examples(np.linspace(0, 1, 40 * 16, dtype=np.float32).reshape(40, 4, 4, 1), np.arange(40) % 2)
    return {
        "train": make_train(),
        "mnist": images.mnist(data=data, widths=(4,), epochs=1, batch_size=8),
        "clicks": synthetic.clicks(examples=40, fields=2, values=3, features=2),
        "text": text.king_james(text=TEXT, layers=1, width=8, heads=2, context=8),
    }
