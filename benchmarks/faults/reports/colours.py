"""Colours, counts, encoders, genes and micro-batches: what the maintainers answered."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/AlexeyAB/darknet/issues/2451: which light is on, red, yellow or green? Set hue=0.05 before the "
    "training, since the augmentation changes the colour",
    "augmentation_breaks_labels",
)
def hue_of_traffic_lights(mended):
    rng = np.random.default_rng(33)
    count, size = 1500, 8
    colours = np.array([[0.9, 0.15, 0.1], [0.85, 0.75, 0.1], [0.1, 0.8, 0.35]])
    state = rng.integers(3, size=count)
    rows, columns = np.mgrid[:size, :size]
    center = rng.uniform(2.5, 4.5, size=(count, 2, 1, 1))
    lamp = (rows - center[:, 0]) ** 2 + (columns - center[:, 1]) ** 2 < 5
    pictures = 0.25 + 0.2 * rng.uniform(size=(count, 1, 1, 3)) + 0.08 * rng.normal(size=(count, size, size, 3))
    pictures = np.where(
        lamp[..., None], colours[state][:, None, None] * rng.uniform(0.6, 1, (count, 1, 1, 1)), pictures
    )
    pictures = pictures.astype(np.float32)
    hue = 0.05 if mended else 0.5

    def jitter(key, picture):  # turns the colours about the grey axis, by up to hue of a circle
        k1, k2 = random.split(key)
        angle = 2 * jnp.pi * hue * random.uniform(k1, minval=-1.0, maxval=1.0)
        axis = jnp.full(3, 3**-0.5)
        cross = jnp.cross(axis, picture)
        along = (picture @ axis)[..., None] * axis * (1 - jnp.cos(angle))
        turned = picture * jnp.cos(angle) + cross * jnp.sin(angle) + along
        return turned * random.uniform(k2, minval=1 / 1.5, maxval=1.5)

    class Detector(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(12, (4, 4), strides=(4, 4))(x - 0.4))
            return nn.Dense(3)(nn.relu(nn.Dense(32)(x.reshape(len(x), -1))))

    net = Detector()

    def loss(params, batch, key):
        pictures, state = batch
        pictures = jax.vmap(jitter)(random.split(key, len(pictures)), pictures)
        return nnlearn.cross_entropy(net.apply(params, pictures), state)

    def accuracy(params, batch):
        pictures, state = batch.examples
        return {"accuracy": jnp.mean(net.apply(params, pictures).argmax(1) == state, where=batch.where)}

    test = (pictures[1200:], state[1200:])
    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.sgd(hparams["lr"], momentum=0.9),
        nnlearn.shuffled((pictures[:1200], state[:1200]), 30, remainder="drop"),
        lambda key: net.init(key, pictures[:1]),
        epochs=12,
        evaluate=nnlearn.evaluation(accuracy, test),
    )
    return Case(train, {"lr": 0.03}, net.apply, test, "accuracy")


@report(
    REPORTS,
    "https://github.com/pytorch/pytorch/issues/184030 (and pull 187251): PoissonNLLLoss(log_input=False) after a "
    "linear layer takes the logarithm of negative rates, NaN",
    "loss_output_mismatch",
    "numerical_precision",
)
def poisson_loss_of_negative_rates(mended):
    rng = np.random.default_rng(71)
    hour, warm = rng.uniform(0, 24, 3000), rng.normal(size=3000)
    holiday = rng.integers(2, size=3000)
    rate = np.exp(1 + 0.8 * np.sin(2 * np.pi * (hour - 9) / 24) + 0.4 * warm - 0.7 * holiday)
    rentals = rng.poisson(rate).astype(np.float32)
    clock = 2 * np.pi * hour / 24
    table = np.stack([np.sin(clock), np.cos(clock), warm, holiday], axis=1).astype(np.float32)

    def init(key):
        k1, k2 = random.split(key)
        return {
            "hidden": (random.normal(k1, (4, 24)) * 0.5, jnp.zeros(24)),
            "out": (random.normal(k2, (24, 1)) * 0.2, jnp.zeros(1)),
        }

    def forward(params, x):
        h = jnp.tanh(x @ params["hidden"][0] + params["hidden"][1])
        return (h @ params["out"][0] + params["out"][1])[:, 0]

    def poisson_nll(output, target, log_input, eps=1e-8):
        if log_input:
            return jnp.mean(jnp.exp(output) - target * output)
        return jnp.mean(output - target * jnp.log(output + eps))

    def loss(params, batch, key):
        table, rentals = batch
        return poisson_nll(forward(params, table), rentals, log_input=mended)

    def rmse(params):
        predicted = forward(params, table[2500:])
        predicted = jnp.exp(predicted) if mended else predicted
        return {"rmse": jnp.sqrt(jnp.mean((predicted - rentals[2500:]) ** 2))}

    train = nnlearn.make_train(
        loss,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((table[:2500], rentals[:2500]), 50, remainder="drop"),
        init,
        epochs=20,
        evaluate=rmse,
    )
    return Case(train, {"lr": 5e-3}, forward, (table[2500:], rentals[2500:]), "rmse", "min")


@report(
    REPORTS,
    "https://github.com/huggingface/transformers/issues/735 (also nlp-tutorial#77, 12041): the encoder gives one "
    "output for all inputs; a learning rate of 5e-5 and not 0.01",
    "learning_rate_too_high",
)
def encoder_with_one_output_for_all(mended):
    vocab, length, width = 30, 13, 32

    def sentences(key, n):
        ids = random.randint(key, (n, length), 1, vocab).at[:, 0].set(0)  # [CLS]
        both = jnp.any(ids[:, 1:] < 4, axis=1) & jnp.any(ids[:, 1:] > 26, axis=1)
        return ids, both.astype(jnp.int32)

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(vocab, width)(ids) + self.param("positions", nn.initializers.normal(0.02), (length, width))
            for _ in range(3):
                x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(4)(x, x))
                x = nn.LayerNorm()(x + nn.Dense(width)(nn.gelu(nn.Dense(2 * width)(x))))
            return nn.Dense(2)(nn.tanh(nn.Dense(width)(x[:, 0])))

    net = Encoder()

    def loss(params, batch, key):
        ids, label = batch
        return nnlearn.cross_entropy(net.apply(params, ids), label)

    ids, label = sentences(random.key(404), 400)

    def evaluate(params):
        logits = net.apply(params, ids)
        return {"accuracy": jnp.mean(logits.argmax(1) == label), "spread": jnp.std(logits[:, 0])}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adamw(hparams["lr"]),
        nnlearn.generated(lambda key, step: sentences(key, 24)),
        lambda key: net.init(key, ids[:1]),
        steps=400,
        check_every=50,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 5e-4 if mended else 0.01}, None, None, "accuracy")


@report(
    REPORTS,
    "https://github.com/pycaret/pycaret/issues/1874 (also scikit-learn#14643): the features are selected on all rows, "
    "the validation rows with them, and the accuracy is too good",
    "leaky_validation",
)
def genes_selected_on_all_rows(mended):
    rng = np.random.default_rng(9)
    patients, genes, kept = 160, 4000, 30
    disease = rng.integers(2, size=patients)
    expression = rng.normal(size=(patients, genes))
    expression[:, :18] += 1.0 * disease[:, None]
    rows = np.arange(patients) < 110

    def select_k_best(x, y):
        a, b = x[y == 0], x[y == 1]
        t = np.abs(a.mean(0) - b.mean(0)) / np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        return np.argsort(-t)[:kept]

    best = select_k_best(expression[rows], disease[rows]) if mended else select_k_best(expression, disease)
    x = expression[:, best].astype(np.float32)
    held_out = (x[~rows], disease[~rows])

    def init(key):
        return {"w": 0.1 * random.normal(key, (kept,)), "b": jnp.zeros(())}

    def logit(params, x):
        return x @ params["w"] + params["b"]

    def loss(params, batch, key):
        x, y = batch
        return optax.sigmoid_binary_cross_entropy(logit(params, x), y).mean() + 0.05 * jnp.sum(params["w"] ** 2)

    def evaluate(params, batch):
        x, y = batch.examples
        z = logit(params, x)
        losses = optax.sigmoid_binary_cross_entropy(z, y)
        right = (z > 0) == (y == 1)
        return {"accuracy": jnp.mean(right, where=batch.where), "loss": jnp.mean(losses, where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled((x[rows], disease[rows]), 22, remainder="drop"),
        init,
        epochs=40,
        evaluate=nnlearn.evaluation(evaluate, held_out),
    )
    return Case(train, {"lr": 0.01}, logit, held_out, "accuracy")


@report(
    REPORTS,
    "https://github.com/bytetriper/RAE/issues/67 (also torchtitan#3575, accelerate#1299): zero_grad is called for "
    "every micro-batch, the accumulated gradients are thrown away",
    "gradient_accumulation",
    "batch_too_small",
)
def zero_grad_for_every_micro_batch(mended):
    rng = np.random.default_rng(28)
    classes, features, accumulate = 8, 16, 16
    centers = rng.normal(size=(classes, 2, features))
    label = rng.integers(classes, size=4000)
    x = centers[label, rng.integers(2, size=4000)] + 0.5 * rng.normal(size=(4000, features))
    x = x.astype(np.float32)

    def accumulated(inner, every):
        def init(params):
            zeros = jax.tree.map(jnp.zeros_like, params)
            return {"inner": inner.init(params), "grad": zeros, "micro": jnp.zeros((), jnp.int32)}

        def update(grad, state, params=None):
            kept = state["grad"]
            if not mended:
                kept = jax.tree.map(jnp.zeros_like, kept)  # zero_grad(set_to_none=True)
            kept = jax.tree.map(lambda a, g: a + g / every, kept, grad)
            micro = state["micro"] + 1
            step = micro % every == 0
            updates, new = inner.update(kept, state["inner"], params)
            updates = jax.tree.map(lambda u: jnp.where(step, u, 0.0), updates)
            new = jax.tree.map(lambda a, b: jnp.where(step, a, b), new, state["inner"])
            kept = jax.tree.map(lambda g: jnp.where(step, 0.0, g), kept)
            return updates, {"inner": new, "grad": kept, "micro": micro}

        return optax.GradientTransformation(init, update)

    def init(key):
        keys = random.split(key, 2)
        return [
            (random.normal(k, (m, n)) * (2 / m) ** 0.5, jnp.zeros(n))
            for k, m, n in zip(keys, (features, 64), (64, classes), strict=True)
        ]

    def model(params, x):
        (w1, b1), (w2, b2) = params
        return jax.nn.relu(x @ w1 + b1) @ w2 + b2

    def accuracy(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(model(params, x).argmax(1) == y, where=batch.where)}

    test = (x[3200:], label[3200:])
    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(model(params, batch[0]), batch[1]),
        lambda hparams: accumulated(optax.sgd(hparams["lr"]), accumulate),
        nnlearn.shuffled((x[:3200], label[:3200]), 4, remainder="drop"),
        init,
        epochs=4,
        evaluate=nnlearn.evaluation(accuracy, test),
    )
    return Case(train, {"lr": 0.3}, model, test, "accuracy")
