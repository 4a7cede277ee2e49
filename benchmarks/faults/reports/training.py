"""Research code out of issues: Q-learning, accumulation, schedules, unregistered cells."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/simoninithomas/Deep_reinforcement_learning_Course/issues/51: reduce_sum of Q without axis=1",
    "wrong_axis_or_reduction",
)
def q_summed_over_the_batch(mended):
    length, gamma, actions = 9, 0.8, 3
    effect = jnp.array([-1, 0, 1])

    def replay(key, step):
        k1, k2, k3 = random.split(key, 3)
        place = random.randint(k1, (64,), 0, length)
        action = random.randint(k2, (64,), 0, actions)
        after = jnp.clip(place + effect[action], 0, length - 1)
        state, next_state = jax.nn.one_hot(place, length), jax.nn.one_hot(after, length)
        sensor = 0.05 * random.normal(k3, (2, 64, length))
        return (
            state + sensor[0],
            jax.nn.one_hot(action, actions),
            (after == length - 1).astype(jnp.float32),
            next_state + sensor[1],
            after == length - 1,
        )

    class DQNetwork(nn.Module):
        @nn.compact
        def __call__(self, state):
            return nn.Dense(actions)(nn.elu(nn.Dense(48)(state)))

    network = DQNetwork()

    def loss(params, batch, key):
        state, action, reward, next_state, done = batch
        best = jnp.max(lax.stop_gradient(network.apply(params, next_state)), axis=1)
        target_q = jnp.where(done, reward, reward + gamma * best)
        q = jnp.sum(network.apply(params, state) * action, axis=1 if mended else None)
        return jnp.mean(jnp.square(target_q - q))

    place = jnp.arange(length - 1)
    optimal = gamma ** (length - 2.0 - place)

    def evaluate(params):
        q = network.apply(params, jax.nn.one_hot(place, length))
        return {"value_error": jnp.mean(jnp.abs(q.max(1) - optimal)), "goes_right": jnp.mean(q.argmax(1) == 2)}

    train = nnlearn.make_train(
        loss,
        lambda hparams: nnlearn.adam(hparams["learning_rate"]),
        nnlearn.generated(replay),
        lambda key: network.init(key, jnp.zeros((1, length))),
        steps=2500,
        check_every=125,
        evaluate=evaluate,
    )
    return Case(train, {"learning_rate": 5e-3}, None, None, "value_error", "min")


@report(
    REPORTS,
    "https://github.com/fastai/fastai/issues/3023: accumulated gradients are summed, the loss is not divided",
    "gradient_accumulation",
    "learning_rate_too_high",
)
def accumulated_gradients_summed(mended):
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=6)
    n_acc = 16

    class Learner(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(64)(x))
            x = nn.relu(nn.Dense(32)(x))
            return nn.Dense(10)(x)

    learner = Learner()

    def accuracy(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(learner.apply(params, x).argmax(-1) == y, where=batch.where)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(learner.apply(params, batch[0]), batch[1]),
        lambda hparams: optax.MultiSteps(
            optax.sgd(hparams["lr"], momentum=0.9), n_acc, use_grad_mean=mended
        ).gradient_transformation(),
        nnlearn.shuffled((x_train, y_train), 8, remainder="drop"),
        lambda key: learner.init(key, x_train[:1]),
        steps=4480,
        check_every=320,
        evaluate=nnlearn.evaluation(accuracy, (x_test, y_test)),
    )
    return Case(train, {"lr": 0.1}, lambda params, x: learner.apply(params, x), (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://github.com/leftthomas/SRGAN/issues/94: the scheduler steps at every batch, the rate is soon zero",
    "schedule_mistimed",
    "learning_rate_too_low",
)
def generator_scheduler_in_the_batch_loop(mended):
    fine = (load_digits().images / 16).astype(np.float32)
    coarse = fine.reshape(-1, 4, 2, 4, 2).mean((2, 4))
    blocky = coarse.repeat(2, axis=1).repeat(2, axis=2).reshape(-1, 64)
    pixels, target = coarse.reshape(-1, 16), fine.reshape(-1, 64)
    epochs, per_epoch = 24, 46

    def init(key):
        keys = random.split(key, 3)
        sizes = [16, 96, 96, 64]
        return {
            f"conv{i}": {"kernel": random.normal(k, (m, n)) * np.sqrt(2 / m), "bias": jnp.zeros(n)}
            for i, (k, m, n) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
        }

    def generator(params, batch):
        h = batch["low"] - 0.3
        for name in ("conv0", "conv1"):
            h = jax.nn.leaky_relu(h @ params[name]["kernel"] + params[name]["bias"], 0.2)
        return batch["upsampled"] + h @ params["conv2"]["kernel"] + params["conv2"]["bias"]

    def image_loss(params, batch, key):
        return jnp.mean(jnp.square(generator(params, batch) - batch["high"]))

    data = {"low": pixels, "upsampled": blocky, "high": target}
    train_set, val_set = {k: v[:1480] for k, v in data.items()}, {k: v[1480:] for k, v in data.items()}

    def make_tx(hparams):
        step_size = epochs // 2 * (per_epoch if mended else 1)
        return optax.adam(optax.exponential_decay(hparams["lr"], step_size, 0.1, staircase=True))

    train = nnlearn.make_train(
        image_loss,
        make_tx,
        nnlearn.shuffled(train_set, 32, remainder="drop"),
        init,
        epochs=epochs,
        evaluate=lambda params: {"psnr": -10 * jnp.log10(image_loss(params, val_set, None))},
    )
    return Case(train, {"lr": 2e-3}, None, None, "psnr")


@report(
    REPORTS,
    "https://github.com/ikostrikov/pytorch-meta-optimizer/issues/11: cells in a Python list are not registered",
    "frozen_parameters",
)
def cells_in_a_python_list(mended):
    rng = np.random.default_rng(10)
    tokens, length, hidden = 8, 12, 24
    sequence = rng.integers(tokens, size=(4400, length)).astype(np.int32)
    key_place = rng.integers(length - 1, size=4400)
    sequence[sequence == 0] = 1
    sequence[np.arange(4400), key_place] = 0  # the answer is the token after the mark
    answer = sequence[np.arange(4400), key_place + 1] - 1

    def init(key):
        k = random.split(key, 3)
        bound = hidden**-0.5
        wx = random.uniform(k[0], (tokens, 3 * hidden), minval=-bound, maxval=bound)
        wh = random.uniform(k[1], (hidden, 3 * hidden), minval=-bound, maxval=bound)
        return {
            "cells": [{"wx": wx, "wh": wh, "b": jnp.zeros(3 * hidden)}],
            "head": {"w": random.uniform(k[2], (hidden, tokens - 1), minval=-bound, maxval=bound), "b": jnp.zeros(7)},
        }

    def forward(params, sequence):
        x = jnp.swapaxes(jax.nn.one_hot(sequence, tokens), 0, 1)
        for cell in params["cells"]:

            def gru(h, gate_x, cell=cell):
                gate_h = h @ cell["wh"]
                xr, xz, xn = jnp.split(gate_x, 3, -1)
                hr, hz, hn = jnp.split(gate_h, 3, -1)
                z = jax.nn.sigmoid(xz + hz)
                n = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
                h = (1 - z) * n + z * h
                return h, h

            _, x = lax.scan(gru, jnp.zeros((x.shape[1], hidden)), x @ cell["wx"] + cell["b"])
        return x[-1] @ params["head"]["w"] + params["head"]["b"]

    def make_tx(hparams):
        adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(hparams["lr"]))
        if mended:
            return adam
        labels = {"cells": "not registered", "head": "parameters()"}
        return optax.multi_transform({"parameters()": adam, "not registered": optax.set_to_zero()}, labels)

    def accuracy(params, batch):
        sequence, answer = batch.examples
        return {"accuracy": jnp.mean(forward(params, sequence).argmax(-1) == answer, where=batch.where)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(forward(params, batch[0]), batch[1]),
        make_tx,
        nnlearn.shuffled((sequence[:4000], answer[:4000]), 50, remainder="drop"),
        init,
        epochs=15,
        evaluate=nnlearn.evaluation(accuracy, (sequence[4000:], answer[4000:])),
    )
    return Case(train, {"lr": 5e-3}, forward, (sequence[4000:], answer[4000:]), "accuracy")
