"""Training code of issues: class folders, decoder inputs, weight decay, clipping, recurrent weights."""

import equinox as eqx
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
    "https://github.com/huggingface/pytorch-image-models/issues/957: an empty folder moves the validation's classes",
    "label_encoding",
)
def empty_validation_folder(mended):
    digits = load_digits()
    names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    folder = names[digits.target]
    images = (digits.images.astype(np.float32) / 16 - 0.305) / 0.376
    rng = np.random.default_rng(20)
    order = rng.permutation(len(folder))
    train_rows, val_rows = order[:1400], order[1400:]
    val_rows = val_rows[folder[val_rows] != "five"]  # all pictures of this folder went into training

    def read_folder(rows, class_to_idx=None):
        if class_to_idx is None:
            class_to_idx = {c: i for i, c in enumerate(sorted(set(folder[rows])))}
        return images[rows], np.array([class_to_idx[c] for c in folder[rows]]), class_to_idx

    x_train, y_train, class_to_idx = read_folder(train_rows)
    x_val, y_val, _ = read_folder(val_rows, class_to_idx if mended else None)

    def make(key):
        k1, k2, k3 = random.split(key, 3)
        layers = [
            eqx.nn.Conv2d(1, 8, 3, stride=2, padding=1, key=k1),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(128, 64, key=k2),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(64, 10, key=k3),
        ]
        return eqx.nn.Sequential(layers)

    _, static = eqx.partition(make(random.key(0)), eqx.is_array)

    def logits(params, x):
        return jax.vmap(eqx.combine(params, static))(x[:, None])

    def validate(params, batch):
        out, y = logits(params, batch.examples[0]), batch.examples[1]
        nll = optax.softmax_cross_entropy_with_integer_labels(out, y)
        return {
            "eval_loss": jnp.mean(nll, where=batch.where),
            "top1": 100 * jnp.mean(out.argmax(-1) == y, where=batch.where),
        }

    train = nnlearn.make_train(
        lambda p, batch, key: nnlearn.cross_entropy(logits(p, batch[0]), batch[1]),
        lambda hparams: optax.sgd(hparams["lr"], momentum=0.9, nesterov=True),
        nnlearn.shuffled((x_train, y_train), 35, remainder="drop"),
        lambda key: eqx.filter(make(key), eqx.is_array),
        epochs=8,
        evaluate=nnlearn.evaluation(validate, (x_val, y_val)),
    )
    return Case(train, {"lr": 0.02}, logits, (x_val, y_val), "top1")


@report(
    REPORTS,
    "https://github.com/jadore801120/attention-is-all-you-need-pytorch/issues/8: the decoder reads the target batch",
    "target_leak",
    "misaligned_labels",
)
def decoder_reads_the_target(mended):
    symbols, length, hidden = 8, 5, 64
    go = symbols

    def translate(key, n):
        source = random.randint(key, (n, length), 0, symbols)
        return source, (source[:, ::-1] + 3) % symbols

    def gru(key, inputs):
        bound = hidden**-0.5
        k1, k2 = random.split(key)
        return {
            "gates": random.uniform(k1, (inputs + hidden, 2 * hidden), minval=-bound, maxval=bound),
            "candidate": random.uniform(k2, (inputs + hidden, hidden), minval=-bound, maxval=bound),
        }

    def init(key):
        k = random.split(key, 5)
        return {
            "source": 0.5 * random.normal(k[0], (symbols, 24)),
            "target": 0.5 * random.normal(k[1], (symbols + 1, 24)),
            "encoder": gru(k[2], 24),
            "decoder": gru(k[3], 24),
            "project": random.normal(k[4], (hidden, symbols)) * hidden**-0.5,
        }

    def cell(p, h, x):
        r, z = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, h], -1) @ p["gates"]), 2, -1)
        c = jnp.tanh(jnp.concatenate([x, r * h], -1) @ p["candidate"])
        return (1 - z) * c + z * h

    def encode(params, source):
        h = jnp.zeros((len(source), hidden))
        h, _ = lax.scan(lambda h, x: (cell(params["encoder"], h, x), None), h, params["source"][source.T])
        return h

    def decode_step(params, h, token):
        h = cell(params["decoder"], h, params["target"][token])
        return h, h @ params["project"]

    def loss(params, batch, key):
        source, target = batch
        fed = jnp.pad(target, ((0, 0), (1, 0)), constant_values=go)[:, :-1] if mended else target
        _, out = lax.scan(lambda h, t: decode_step(params, h, t), encode(params, source), fed.T)
        return optax.softmax_cross_entropy_with_integer_labels(out, target.T).mean()

    source_val, target_val = translate(random.key(1001), 256)

    def greedy(params):
        def one(carry, _):
            h, logits = decode_step(params, *carry)
            return (h, logits.argmax(-1)), logits.argmax(-1)

        start = (encode(params, source_val), jnp.full(len(source_val), go))
        _, tokens = lax.scan(one, start, None, length=length)
        return {"token_accuracy": jnp.mean(target_val == tokens.T)}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(hparams["lr"])),
        nnlearn.generated(lambda key, step: translate(key, 64)),
        init,
        steps=1500,
        check_every=100,
        evaluate=greedy,
    )
    return Case(train, {"lr": 4e-3}, None, None, "token_accuracy")


@report(
    REPORTS,
    "https://github.com/tflearn/tflearn/issues/772: a weight decay of 10 with Adam; decoupled it is far too much",
    "excessive_regularisation",
)
def weight_decay_of_ten(mended):
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split((x / 16).astype(np.float32), y, test_size=0.2, random_state=15)

    class Dnn(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (96, 48):
                x = nn.elu(nn.Dense(width)(x))
            return nn.Dense(10)(x)

    dnn = Dnn()

    def evaluate(params, batch):
        x, y = batch.examples
        return {"acc": jnp.mean(dnn.apply(params, x).argmax(-1) == y, where=batch.where)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(dnn.apply(params, batch[0]), batch[1]),
        lambda hparams: optax.adamw(hparams["lr"], weight_decay=hparams["wd"]),
        nnlearn.shuffled((x_train, y_train), 48, remainder="drop"),
        lambda key: dnn.init(key, x_train[:1]),
        epochs=15,
        evaluate=nnlearn.evaluation(evaluate, (x_test, y_test)),
    )
    settings = {"lr": 2e-3, "wd": 0.01 if mended else 10.0}
    return Case(train, settings, lambda params, x: dnn.apply(params, x), (x_test, y_test), "acc")


@report(
    REPORTS,
    "https://github.com/facebookresearch/detr/issues/198: gradient norms of 10 to 100, clip_max_norm=0.1",
    "clipping_too_tight",
    "learning_rate_too_low",
)
def clip_max_norm_tenth(mended):
    rng = np.random.default_rng(44)
    x = rng.normal(size=(2000, 12)).astype(np.float32)
    box = np.stack([np.sin(x[:, 0]) + x[:, 1], x[:, 2] * x[:, 3], np.abs(x[:, 4]), np.tanh(x[:, 5] - x[:, 6])], 1)
    box = (box + 0.1 * rng.normal(size=box.shape)).astype(np.float32)
    box = (box - box.mean(0)) / box.std(0)

    def init(key):
        k = random.split(key, 3)
        return {
            "w1": random.normal(k[0], (12, 64)) * (2 / 12) ** 0.5,
            "b1": jnp.zeros(64),
            "w2": random.normal(k[1], (64, 64)) * (2 / 64) ** 0.5,
            "b2": jnp.zeros(64),
            "w3": random.normal(k[2], (64, 4)) * (1 / 64) ** 0.5,
            "b3": jnp.zeros(4),
        }

    def regress(p, x):
        h = jax.nn.relu(x @ p["w1"] + p["b1"])
        h = jax.nn.relu(h @ p["w2"] + p["b2"])
        return h @ p["w3"] + p["b3"]

    def loss(params, batch, key):
        return 5.0 * jnp.abs(regress(params, batch[0]) - batch[1]).sum(-1).mean()  # weighted as boxes are

    def metrics(params, batch):
        error = jnp.abs(regress(params, batch.examples[0]) - batch.examples[1]).mean(-1)
        return {"l1": jnp.mean(error, where=batch.where)}

    def make_tx(hparams):
        clip = optax.clip_by_global_norm(35.0 if mended else 0.1)
        return optax.chain(clip, optax.sgd(hparams["lr"], momentum=0.9))

    train = nnlearn.make_train(
        loss,
        make_tx,
        nnlearn.shuffled((x[:1600], box[:1600]), 50, remainder="drop"),
        init,
        epochs=15,
        evaluate=nnlearn.evaluation(metrics, (x[1600:], box[1600:])),
    )
    return Case(train, {"lr": 1e-3}, regress, (x[1600:], box[1600:]), "l1", "min")


@report(
    REPORTS,
    "https://github.com/jihunchoi/recurrent-batch-normalization-pytorch/issues/5: 1/sqrt(hidden) mends the RNN cell",
    "bad_initialisation",
    "exploding_gradients",
    "saturated_activations",
)
def recurrent_weights_of_randn(mended):
    digits = load_digits()
    rows = (digits.images / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(rows, digits.target, test_size=0.2, random_state=33)
    hidden_size = 128

    def init(key):
        k = random.split(key, 4)
        shapes = {"ih": (8, hidden_size), "hh": (hidden_size, hidden_size), "bias": (hidden_size,)}
        stdv = hidden_size**-0.5
        cell = {}
        for (name, shape), ki in zip(shapes.items(), k, strict=False):
            if mended:
                cell[name] = random.uniform(ki, shape, minval=-stdv, maxval=stdv)
            else:
                cell[name] = random.normal(ki, shape)
        out = {"w": random.uniform(k[3], (hidden_size, 10), minval=-stdv, maxval=stdv), "b": jnp.zeros(10)}
        return {"cell": cell, "out": out}

    def rnn(params, x):
        cell = params["cell"]

        def step(h, row):
            return jnp.tanh(row @ cell["ih"] + h @ cell["hh"] + cell["bias"]), None

        h, _ = lax.scan(step, jnp.zeros((len(x), hidden_size)), jnp.swapaxes(x, 0, 1))
        return h @ params["out"]["w"] + params["out"]["b"]

    def accuracy(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(rnn(params, x).argmax(-1) == y, where=batch.where)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(rnn(params, batch[0]), batch[1]),
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((x_train, y_train), 50, remainder="drop"),
        init,
        epochs=15,
        evaluate=nnlearn.evaluation(accuracy, (x_test, y_test)),
    )
    return Case(train, {"lr": 1e-3}, rnn, (x_test, y_test), "accuracy")
