"""Tables and curves: regression and classification of a few features."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnlearn
from benchmarks.faults.case import (
    Fault,
    Program,
    balanced_accuracy,
    binary_accuracy,
    explained,
    squared_error,
)
from benchmarks.faults.development.nets import bce, mlp_apply, mlp_init, mse
from benchmarks.faults.sources import standardised, table
from nnlearn.models import from_linen, mlp

REGRESSION = {"metric": "mse", "mode": "min", "measure": squared_error, "score": explained}


def wine():
    """Tiny data: 100 rows, three classes."""
    train, validation, test = standardised(table("wine", (100, 30), 1))
    model = mlp((13, 16, 3))
    return Program(
        name="wine", kind="tabular", train=train, validation=validation, test=test,
        init=model.init, apply=lambda p, x: model.apply(p, x), loss=lambda o, y: nnlearn.cross_entropy(o, y),
        tx=lambda hp: nnlearn.adamw(hp["learning_rate"], weight_decay=0.01), hparams={"learning_rate": 1e-2},
        batch_size=20, steps=150, check_every=25, layout="examples",
    )  # fmt: skip


def purity(outputs, targets):
    """The accuracy after the best renumbering of three clusters."""
    said = jnp.argmax(outputs, -1)
    ways = jnp.array(list(itertools.permutations(range(3))))
    return jnp.max(jnp.mean(ways[:, said] == targets, axis=1))


def wine_clusters():
    """Mixture of three groups without labels; only the metric knows them."""
    train, validation, test = standardised(table("wine", (100, 30), 1))

    def init(key):
        return {"centres": jax.random.choice(key, jnp.asarray(train[0]), (3,), replace=False)}

    return Program(
        name="wine-clusters", kind="tabular", train=train, validation=validation, test=test, init=init,
        apply=lambda p, x: -0.2 * jnp.sum((x[:, None] - p["centres"]) ** 2, -1),
        loss=lambda o, y: -jnp.mean(jax.nn.logsumexp(o, -1)), tx=lambda hp: nnlearn.adam(hp["learning_rate"]),
        hparams={"learning_rate": 0.03}, batch_size=20, steps=200, measure=purity,
    )  # fmt: skip


def diabetes_parts():
    pieces = standardised(table("diabetes", (300, 60)))
    mean, scale = pieces[0][1].mean(), pieces[0][1].std()
    return [(x, ((y - mean) / scale)[:, None]) for x, y in pieces], pieces


def diabetes():
    (train, validation, test), _ = diabetes_parts()
    return Program(
        name="diabetes", kind="tabular", train=train, validation=validation, test=test,
        init=mlp_init((10, 16, 1), 1.0), apply=mlp_apply(jnp.tanh), loss=mse,
        tx=lambda hp: nnlearn.sgd(hp["learning_rate"], momentum=0.9), hparams={"learning_rate": 0.01},
        batch_size=50, steps=200, **REGRESSION,
    )  # fmt: skip


class Tumours(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Dense(24)(x))
        return nn.Dense(1)(x)


def breast_cancer():
    train, validation, test = standardised(table("breast_cancer", (300, 100)))
    model = from_linen(Tumours(), jnp.zeros((1, 30)))
    return Program(
        name="breast-cancer", kind="tabular", train=train, validation=validation, test=test,
        init=model.init, apply=lambda p, x: model.apply(p, x), loss=bce,
        tx=lambda hp: optax.sgd(hp["learning_rate"], momentum=0.9, nesterov=True), hparams={"learning_rate": 0.03},
        measure=binary_accuracy, layout="dict", steps=200,
    )  # fmt: skip


def curve(x):
    return jnp.sin(2 * x[:, :1]) + 0.5 * jnp.cos(3 * x[:, 1:])


def waves():
    """A curve with noise; batches are new at every step."""

    def generate(key, step):
        k1, k2 = jax.random.split(key)
        x = jax.random.uniform(k1, (64, 2), minval=-2.0, maxval=2.0)
        return x, curve(x) + 0.1 * jax.random.normal(k2, (64, 1))

    def held_out(seed):
        x = jax.random.uniform(jax.random.key(seed), (400, 2), minval=-2.0, maxval=2.0)
        return np.asarray(x), np.asarray(curve(x))

    return Program(
        name="waves", kind="regression", train=held_out(1), validation=held_out(2), test=held_out(3),
        init=mlp_init((2, 64, 64, 1), 1.5), apply=mlp_apply(jax.nn.silu), loss=mse, generate=generate,
        tx=lambda hp: nnlearn.adam(nnlearn.cosine_decay_schedule(hp["learning_rate"], 400)),
        hparams={"learning_rate": 5e-3}, steps=400, **REGRESSION,
    )  # fmt: skip


def parity():
    """The product of three signs among ten: a plateau, then a drop."""
    random = np.random.default_rng(7)
    x = random.choice([-1.0, 1.0], (2400, 10)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] * x[:, 2] > 0).astype(np.float32)
    cut = [(x[:1600], y[:1600]), (x[1600:1900], y[1600:1900]), (x[1900:], y[1900:])]
    return Program(
        name="parity", kind="mlp", train=cut[0], validation=cut[1], test=cut[2],
        init=mlp_init((10, 64, 1), 1.0), apply=mlp_apply(), loss=bce,
        tx=lambda hp: nnlearn.adam(hp["learning_rate"]), hparams={"learning_rate": 5e-3}, batch_size=64, steps=500,
        measure=binary_accuracy,
    )  # fmt: skip


def weighted_bce(weight):
    def loss(logits, labels):
        z = logits[:, 0]
        each = jnp.maximum(z, 0) - z * labels + jnp.log1p(jnp.exp(-jnp.abs(z)))
        w = jnp.where(labels > 0.5, weight, 1.0)
        return jnp.sum(w * each) / jnp.sum(w)

    return loss


def rare(seed=0, share=0.03, n=4000):
    random = np.random.default_rng(seed)
    y = (random.random(n) < share).astype(np.float32)
    x = random.normal(size=(n, 6)).astype(np.float32)
    x[:, :3] += 1.0 * y[:, None]
    return x, y


def rare_class():
    """Three percent of positives, weighted."""
    return Program(
        name="rare-class", kind="tabular", train=rare(0), validation=rare(1, n=1500), test=rare(2),
        init=mlp_init((6, 16, 1)), apply=mlp_apply(), loss=weighted_bce(32.0),
        tx=lambda hp: nnlearn.rmsprop(hp["learning_rate"]), hparams={"learning_rate": 2e-3}, batch_size=128,
        metric="balanced_accuracy", measure=balanced_accuracy, steps=300,
    )  # fmt: skip


PROGRAMS = [wine, wine_clusters, diabetes, breast_cancer, waves, parity, rare_class]


def raw_wine(p):
    return p.with_(**dict(zip(("train", "validation", "test"), table("wine", (100, 30), 1), strict=True)))


def raw_tumours(p):
    """Features from 0.001 to 4000, as the file has them."""
    return p.with_(**dict(zip(("train", "validation", "test"), table("breast_cancer", (300, 100)), strict=True)))


def raw_progression(p):
    """Targets from 25 to 346."""
    pieces = [(x, y[:, None]) for x, y in diabetes_parts()[1]]
    return p.with_(**dict(zip(("train", "validation", "test"), pieces, strict=True)))


def lifted(offset):
    """Targets far from zero."""

    def change(p):
        def generate(key, step):
            x, y = p.generate(key, step)
            return x, y + offset

        lift = {part: (getattr(p, part)[0], getattr(p, part)[1] + offset) for part in ("train", "validation", "test")}
        return p.with_(generate=generate, **lift)

    return change


def flat_targets(p):
    """Targets of shape (n,) against outputs of shape (n, 1): an (n, n) matrix of errors."""
    return p.with_(train=(p.train[0], p.train[1][:, 0]))


def summed(p):
    return p.with_(loss=lambda o, y: jnp.sum((o - y) ** 2))


def normalised_per_batch(p):
    """The features' mean over the wrong axis: each row by its own mean and deviation."""

    def apply(params, x):
        return p.apply(params, (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1e-6))

    return p.with_(apply=apply)


def one_unit_softmax(p):
    def loss(logits, labels):
        probability = jax.nn.softmax(logits, axis=-1)[:, 0]
        return -jnp.mean(labels * jnp.log(probability + 1e-7) + (1 - labels) * jnp.log(1 - probability + 1e-7))

    return p.with_(loss=loss)


def squashed_output(p):
    """A sigmoid at the output of a regression whose targets are negative, too."""
    return p.with_(apply=lambda params, x: jax.nn.sigmoid(p.apply(params, x)))


def leaked(p):
    """The label is one of the features, a column that nobody dropped; at test time it is not known."""

    def widen(pair, known=True):
        x, y = pair
        column = (2 * y - 1)[:, None].astype(np.float32) if known else np.zeros((len(x), 1), np.float32)
        return np.concatenate([x, column], 1), y

    return p.with_(
        train=widen(p.train), validation=widen(p.validation), test=widen(p.test, False), init=mlp_init((11, 64, 1), 1.0)
    )


def leaked_progression(p):
    """A feature computed from the target, with a little noise."""
    random = np.random.default_rng(0)

    def widen(pair, known=True):
        x, y = pair
        column = y + 0.05 * random.normal(size=y.shape) if known else np.zeros_like(y)
        return np.concatenate([x, column], 1).astype(np.float32), y

    return p.with_(
        train=widen(p.train), validation=widen(p.validation), test=widen(p.test, False), init=mlp_init((11, 16, 1), 1.0)
    )


def overgrown(p):
    """Twelve hundred units for 40 patients, long after the training error is gone."""
    return p.with_(
        train=tuple(part[:40] for part in p.train), init=mlp_init((10, 600, 600, 1), 2.0), apply=mlp_apply(),
        tx=lambda hp: nnlearn.adam(3e-3), batch_size=20, steps=400,
    )  # fmt: skip


def validation_from_training(p):
    """Split after the rows were repeated: validation examples are training examples."""
    q = overgrown(p)
    return q.with_(validation=tuple(part[:40] for part in p.train))


def leaky_parity(p):
    """A noisy label, learned by heart, and a validation part that is taken from the training rows."""
    random = np.random.default_rng(1)
    x, y = p.train
    y = np.where(random.random(len(y)) < 0.25, 1 - y, y)[:150]
    return p.with_(
        train=(x[:150], y), validation=(x[:100], y[:100]), init=mlp_init((10, 256, 1), 2.0), batch_size=50, steps=400
    )


def lookalike(p):
    x, y = p.train
    return p.with_(train=(x, np.random.default_rng(3).permutation(y)))


def linear(sizes):
    return lambda p: p.with_(init=mlp_init(sizes, 1.0))


def without_bias(p):
    def apply(params, x):
        return mlp_apply(jax.nn.relu)([{"w": layer["w"], "b": 0.0} for layer in params], x)

    return p.with_(apply=apply)


def stopped_hidden(p):
    def apply(params, x):
        for layer in params[:-1]:
            x = jax.lax.stop_gradient(jax.nn.silu(x @ layer["w"] + layer["b"]))
        return x @ params[-1]["w"] + params[-1]["b"]

    return p.with_(apply=apply)


def rounded_output(p):
    """The loss of the rounded prediction, which has no gradient."""
    return p.with_(loss=lambda o, y: mse(jnp.round(10 * o) / 10, y))


def l2(strength):
    def penalty(params):
        return strength * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    return lambda p: p.with_(penalty=penalty)


def never_cleared(hp):
    """Gradients are added up from the first step to the last."""
    tx = optax.sgd(hp["learning_rate"])

    def init(params):
        return {"sum": jax.tree.map(jnp.zeros_like, params), "inner": tx.init(params)}

    def update(grads, state, params=None):
        total = jax.tree.map(jnp.add, state["sum"], grads)
        updates, inner = tx.update(total, state["inner"], params)
        return updates, {"sum": total, "inner": inner}

    return optax.GradientTransformation(init, update)


def growing_weights(p):
    """Decay with the wrong sign: weights grow by themselves."""
    return p.with_(tx=lambda hp: optax.chain(optax.add_decayed_weights(-3.0), p.tx(hp)))


def endless_warmup(hp):
    return nnlearn.adam(nnlearn.linear_schedule(0.0, hp["learning_rate"], 100_000))


def batch_normalised(p, size):
    """Statistics of the batch in training, those of the whole set in evaluation; the batch has two rows."""

    def apply(params, x, key=None):
        for layer in params[:-1]:
            x = x @ layer["w"] + layer["b"]
            x = jax.nn.relu((x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5))
        return x @ params[-1]["w"] + params[-1]["b"]

    return p.with_(apply=apply, batch_size=size)


def unguarded_log(p):
    """The logarithm of features, some of which are zero."""
    return raw_tumours(p).with_(apply=lambda params, x: p.apply(params, jnp.log(x)))


def bfloat16_weights(p):
    """Weights in bfloat16: most updates are lost in rounding."""
    return p.with_(
        init=lambda key: jax.tree.map(lambda a: a.astype(jnp.bfloat16), p.init(key)),
        apply=lambda params, x: p.apply(params, x.astype(jnp.bfloat16)).astype(jnp.float32),
    )


FAULTS = [
    Fault("unnormalised_inputs", "raw columns", "wine", raw_wine),
    Fault("unnormalised_inputs", "raw columns", "breast-cancer", raw_tumours),
    Fault("unnormalised_targets", "raw targets", "diabetes", raw_progression, ("learning_rate_too_high",)),
    Fault("unnormalised_targets", "offset 300", "waves", lifted(300.0)),
    Fault("wrong_axis_or_reduction", "(n, 1) minus (n,)", "diabetes", flat_targets),
    Fault("wrong_axis_or_reduction", "sum, not mean", "diabetes", summed, ("learning_rate_too_high",)),
    Fault("loss_output_mismatch", "softmax of one unit", "breast-cancer", one_unit_softmax),
    Fault("loss_output_mismatch", "sigmoid for targets below zero", "diabetes", squashed_output),
    Fault("target_leak", "label among the features", "parity", leaked),
    Fault("target_leak", "feature made from the target", "diabetes", leaked_progression),
    Fault("overfitting", "1200 units, 40 rows", "diabetes", overgrown),
    Fault("leaky_validation", "validation rows out of training", "diabetes", validation_from_training,
          ("overfitting",), True),
    Fault("leaky_validation", "noisy rows learned by heart", "parity", leaky_parity, ("overfitting",), True),
    Fault("misaligned_labels", "labels permuted", "breast-cancer", lookalike),
    Fault("underfitting", "no hidden layer", "parity", linear((10, 1))),
    Fault("underfitting", "no hidden layer", "waves", linear((2, 1))),
    Fault("blocked_gradient", "stop_gradient in hidden layers", "waves", stopped_hidden, ("frozen_parameters",)),
    Fault("blocked_gradient", "rounded prediction", "diabetes", rounded_output),
    Fault("excessive_regularisation", "L2 of strength 1", "waves", l2(1.0)),
    Fault("gradient_accumulation", "never cleared", "diabetes", lambda p: p.with_(tx=never_cleared)),
    Fault("sign_error", "decay with the wrong sign", "breast-cancer", growing_weights),
    Fault("schedule_mistimed", "warm-up of 100,000 steps", "parity", lambda p: p.with_(tx=endless_warmup),
          ("learning_rate_too_low",)),
    Fault("class_imbalance", "no weights", "rare-class", lambda p: p.with_(loss=bce)),
    Fault("class_imbalance", "one percent, no weights", "rare-class",
          lambda p: p.with_(loss=bce, train=rare(3, 0.01), batch_size=64)),
    Fault("batch_too_small", "batch statistics of two rows", "parity", lambda p: batch_normalised(p, 2)),
    Fault("numerical_precision", "log of features that can be zero", "breast-cancer", unguarded_log),
    Fault("numerical_precision", "bfloat16 weights", "waves", bfloat16_weights),
    Fault("learning_rate_too_high", "rate x300", "diabetes", lambda p: p.rate(300)),
    Fault("learning_rate_too_low", "rate / 1000", "breast-cancer", lambda p: p.rate(1e-3)),
    Fault("symmetric_initialisation", "zeros", "waves",
          lambda p: p.with_(init=lambda key: jax.tree.map(jnp.zeros_like, p.init(key)))),
    Fault("saturated_activations", "inputs x1000 into tanh", "diabetes",
          lambda p: p.with_(**{part: (300 * getattr(p, part)[0], getattr(p, part)[1])
                               for part in ("train", "validation", "test")}), ("unnormalised_inputs",)),
    Fault("bad_initialisation", "weights x10", "waves",
          lambda p: p.with_(init=lambda key: jax.tree.map(lambda a: 10 * a, p.init(key)))),
    Fault("frozen_parameters", "the last layer only, of 64", "waves",
          lambda p: p.with_(tx=lambda hp: optax.chain(
              p.tx(hp), optax.masked(optax.set_to_zero(), [True, True, False])))),
]  # fmt: skip
