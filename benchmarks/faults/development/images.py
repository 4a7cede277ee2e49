"""Images: perceptrons and convolutions on handwritten digits."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnlearn
from benchmarks.faults.case import Fault, Program, accuracy, explained, squared_error
from benchmarks.faults.development.nets import convnet_apply, convnet_init, mlp_apply, mlp_init, mse, nll
from benchmarks.faults.sources import digits
from nnlearn.models import from_equinox, mlp


def images(part):
    return part[0].reshape(-1, 8, 8, 1), part[1]


def digits_mlp():
    train, validation, test = digits()
    return Program(
        name="digits-mlp", kind="mlp", train=train, validation=validation, test=test,
        init=mlp_init((64, 64, 10)), apply=mlp_apply(), loss=nll,
        tx=lambda hp: nnlearn.adam(hp["learning_rate"]), hparams={"learning_rate": 3e-3}, batch_size=64,
    )  # fmt: skip


def digits_convnet():
    train, validation, test = map(images, digits())

    def tx(hp):
        schedule = nnlearn.warmup_cosine_decay_schedule(0.0, hp["learning_rate"], 30, 300)
        return nnlearn.sgd(schedule, momentum=0.9)

    return Program(
        name="digits-convnet", kind="convnet", train=train, validation=validation, test=test,
        init=convnet_init, apply=convnet_apply, loss=nll, tx=tx, hparams={"learning_rate": 0.1}, layout="dict",
    )  # fmt: skip


def digits_autoencoder():
    train, validation, test = ((x, x) for x, _ in digits(600, seed=1))
    model = from_equinox(lambda key: eqx.nn.MLP(64, 64, 32, 2, activation=jax.nn.gelu, key=key))
    return Program(
        name="digits-autoencoder", kind="autoencoder", train=train, validation=validation, test=test,
        init=model.init, apply=lambda p, x: model.apply(p, x), loss=mse,
        tx=lambda hp: nnlearn.lion(hp["learning_rate"]), hparams={"learning_rate": 1e-3}, steps=400,
        metric="mse", mode="min", measure=squared_error, score=explained, layout="examples",
    )  # fmt: skip


def digits_full_batch():
    """Full-batch descent at a rate where the sharpness hovers at two over the rate."""
    train, validation, test = digits(400, seed=2)
    return Program(
        name="digits-full-batch", kind="mlp", train=train, validation=validation, test=test,
        init=mlp_init((64, 32, 10), 1.0), apply=mlp_apply(jnp.tanh), loss=nll,
        tx=lambda hp: nnlearn.sgd(hp["learning_rate"]), hparams={"learning_rate": 0.8}, batch_size=400, steps=300,
    )  # fmt: skip


def digits_smoothed():
    """Label smoothing: the loss has a floor far above zero."""
    train, validation, test = digits(800, seed=3)
    model = mlp((64, 64, 64, 10), activation="gelu", norm="layer")

    def loss(logits, labels, where=None):
        return nnlearn.cross_entropy(logits, labels, label_smoothing=0.2, where=where)

    return Program(
        name="digits-smoothed", kind="mlp", train=train, validation=validation, test=test,
        init=model.init, apply=lambda p, x: model.apply(p, x), loss=loss,
        tx=lambda hp: nnlearn.muon(hp["learning_rate"]), hparams={"learning_rate": 0.02}, layout="masked", steps=250,
    )  # fmt: skip


def digits_dropout():
    train, validation, test = digits(800, seed=4)
    model = mlp((64, 128, 10), dropout=0.3)
    return Program(
        name="digits-dropout", kind="mlp", train=train, validation=validation, test=test,
        init=model.init, apply=lambda p, x, key=None: model.apply(p, x, key), loss=nll, stochastic=True,
        tx=lambda hp: nnlearn.adamw(hp["learning_rate"], weight_decay=0.05), hparams={"learning_rate": 3e-3},
    )  # fmt: skip


def digits_deep():
    """Ten tanh layers, rightly scaled."""
    train, validation, test = digits(900, seed=5)
    sizes = (64, *[40] * 8, 10)
    return Program(
        name="digits-deep", kind="mlp", train=train, validation=validation, test=test,
        init=mlp_init(sizes, 1.0), apply=mlp_apply(jnp.tanh), loss=nll,
        tx=lambda hp: nnlearn.sgd(hp["learning_rate"], momentum=0.9), hparams={"learning_rate": 0.05}, batch_size=64,
    )  # fmt: skip


PROGRAMS = [
    digits_mlp, digits_convnet, digits_autoencoder, digits_full_batch, digits_smoothed, digits_dropout, digits_deep,
]  # fmt: skip


def on_train(change):
    """A fault that changes the training arrays only."""
    return lambda p: p.with_(train=change(*p.train))


def relabel(labels, share, classes, seed=0):
    random = np.random.default_rng(seed)
    return np.where(random.random(len(labels)) < share, random.integers(0, classes, len(labels)), labels).astype(
        np.int32
    )


def sort_by_class(x, y):
    order = np.argsort(y, kind="stable")
    return x[order], y[order]


def shifted_classes(p):
    """Classes numbered from 1: the last one does not exist for ten outputs."""
    return p.with_(
        train=(p.train[0], p.train[1] + 1),
        validation=(p.validation[0], p.validation[1] + 1),
        fault_score=lambda outputs, y: accuracy(outputs, y + 1),
    )


def flips(key, x, y):
    k1, k2 = jax.random.split(key)
    x = jnp.where(jax.random.bernoulli(k1, 0.5, (len(x), 1, 1, 1)), x[:, :, ::-1], x)
    return jnp.where(jax.random.bernoulli(k2, 0.5, (len(x), 1, 1, 1)), x[:, ::-1], x), y


def turns(key, x, y):
    """Each flat image turned by a random multiple of 90 degrees."""
    grid = x.reshape(-1, 8, 8)
    turned = jnp.stack([jnp.rot90(grid, k, (1, 2)) for k in range(4)])
    return turned[jax.random.randint(key, (len(x),), 0, 4), jnp.arange(len(x))].reshape(x.shape), y


def mixed(key, x, y):
    """Mixup that forgets to mix the labels."""
    k1, k2 = jax.random.split(key)
    share = jax.random.uniform(k1, (len(x), 1))
    return share * x + (1 - share) * x[jax.random.permutation(k2, len(x))], y


def biased(bias):
    def change(p):
        def init(key):
            params = p.init(key)
            return [*({**layer, "b": layer["b"] + bias} for layer in params[:-1]), params[-1]]

        return p.with_(init=init)

    return change


def with_noise_left_on(p):
    return p.with_(evaluate_with=lambda params, x: p.apply(params, x, jax.random.key(1)))


def more_dropout(rate):
    def change(p):
        model = mlp((64, 128, 10), dropout=rate)
        return p.with_(apply=lambda params, x, key=None: model.apply(params, x, key))

    return change


def restarted(every):
    """Moments that are thrown away at every ``every``-th step, as by ``tx.init`` inside the loop."""

    def change(p):
        def tx(hp):
            inner = p.tx(hp)

            def init(params):
                return {"inner": inner.init(params), "count": jnp.zeros([], jnp.int32)}

            def update(grads, state, params=None):
                fresh = inner.init(params)
                again = state["count"] % every == 0
                used = jax.tree.map(lambda new, old: jnp.where(again, new, old), fresh, state["inner"])
                updates, used = inner.update(grads, used, params)
                return updates, {"inner": used, "count": state["count"] + 1}

            return optax.GradientTransformation(init, update)

        return p.with_(tx=tx)

    return change


def summed_gradients(every):
    """Gradients added over a window and never divided by its length."""

    def change(p):
        def tx(hp):
            return optax.chain(optax.scale(float(every)), p.tx(hp))

        def multi(hp):
            inner = optax.MultiSteps(tx(hp), every)
            return optax.GradientTransformation(inner.init, inner.update)

        return p.with_(tx=multi)

    return change


def half_precision(p):
    """The whole network in float16, the loss multiplied by nothing."""

    def init(key):
        return jax.tree.map(lambda a: a.astype(jnp.float16), p.init(key))

    def loss(outputs, labels):
        probabilities = jax.nn.softmax(outputs.astype(jnp.float16))
        right = jnp.take_along_axis(probabilities, labels[:, None], 1)
        return -jnp.mean(jnp.log(right)).astype(jnp.float32)

    return p.with_(init=init, loss=loss, apply=lambda params, x: p.apply(params, x.astype(jnp.float16) * 16))


def constant(value):
    return lambda p: p.with_(
        init=lambda key: jax.tree.map(lambda a: jnp.full_like(a, value) if a.ndim > 1 else a, p.init(key))
    )


def scaled_init(factor):
    return lambda p: p.with_(init=lambda key: jax.tree.map(lambda a: a * factor if a.ndim > 1 else a, p.init(key)))


def trains_only(pick):
    """Only some leaves are given to the optimizer."""

    def change(p):
        def tx(hp):
            def labels(params):
                return jax.tree.map_with_path(
                    lambda path, a: "train" if pick(jax.tree_util.keystr(path), a) else "freeze", params
                )

            return optax.multi_transform({"train": p.tx(hp), "freeze": optax.set_to_zero()}, labels)

        return p.with_(tx=tx)

    return change


def sigmoid_layers(p):
    return p.with_(apply=mlp_apply(jax.nn.sigmoid))


def rectified_output(p):
    """Targets in [-1, 1], outputs that cannot be negative."""
    data = {part: (2 * x - 1, 2 * y - 1) for part in ("train", "validation", "test") for x, y in [getattr(p, part)]}
    return p.with_(**data, apply=lambda params, x: jax.nn.relu(p.apply(params, x)))


def softmax_over_batch(p):
    def loss(logits, labels):
        return -jnp.mean(jnp.sum(jax.nn.one_hot(labels, 10) * jax.nn.log_softmax(logits, axis=0), axis=-1))

    return p.with_(loss=loss)


def one_bit(params, x):
    """Binary hidden units, without a surrogate gradient."""
    for layer in params[:-1]:
        x = jnp.where(x @ layer["w"] + layer["b"] > 0, 1.0, 0.0)
    return x @ params[-1]["w"] + params[-1]["b"]


def ascent(hp):
    schedule = nnlearn.warmup_cosine_decay_schedule(0.0, hp["learning_rate"], 30, 300)
    return optax.chain(optax.trace(0.9), optax.scale_by_schedule(schedule))


def schedule_of_epochs(hp):
    """Decay steps counted in epochs: the rate is zero after ten steps."""
    return nnlearn.sgd(nnlearn.cosine_decay_schedule(hp["learning_rate"], 10), momentum=0.9)


def decays_every_step(hp):
    return nnlearn.adam(nnlearn.exponential_decay(hp["learning_rate"], 1, 0.9))


def clipped(norm):
    return lambda p: p.with_(tx=lambda hp: optax.chain(optax.clip_by_global_norm(norm), p.tx(hp)))


FAULTS = [
    Fault("learning_rate_too_high", "rate x100", "digits-mlp", lambda p: p.rate(100)),
    Fault("learning_rate_too_high", "rate x30", "digits-convnet", lambda p: p.rate(30), ("dead_units",)),
    Fault("learning_rate_too_low", "rate / 1000", "digits-mlp", lambda p: p.rate(1e-3)),
    Fault("learning_rate_too_low", "rate / 300", "digits-deep", lambda p: p.rate(1 / 300)),
    Fault("schedule_mistimed", "decay per step", "digits-mlp", lambda p: p.with_(tx=decays_every_step)),
    Fault("schedule_mistimed", "cosine over 10 steps", "digits-convnet", lambda p: p.with_(tx=schedule_of_epochs)),
    Fault("vanishing_gradients", "sigmoid in nine layers", "digits-deep", sigmoid_layers, ("saturated_activations",)),
    Fault("bad_initialisation", "weights x0.1 in nine layers", "digits-deep", scaled_init(0.1),
          ("vanishing_gradients",)),
    Fault("bad_initialisation", "weights x6", "digits-convnet", scaled_init(6.0), ("exploding_gradients",)),
    Fault("exploding_gradients", "weights x4 in nine relu layers", "digits-deep",
          lambda p: scaled_init(4.0)(p).with_(apply=mlp_apply()), ("bad_initialisation",)),
    Fault("saturated_activations", "weights x20, tanh", "digits-deep", scaled_init(20.0), ("bad_initialisation",)),
    Fault("dead_units", "bias -6", "digits-mlp", biased(-6.0), ("bad_initialisation",)),
    Fault("symmetric_initialisation", "zeros", "digits-mlp", constant(0.0)),
    Fault("symmetric_initialisation", "all 0.05", "digits-convnet", constant(0.05)),
    Fault("loss_output_mismatch", "softmax before cross-entropy", "digits-deep",
          lambda p: p.with_(apply=lambda params, x: jax.nn.softmax(p.apply(params, x)))),
    Fault("loss_output_mismatch", "rectified output", "digits-autoencoder",
          rectified_output),
    Fault("wrong_axis_or_reduction", "softmax over the batch", "digits-deep", softmax_over_batch),
    Fault("sign_error", "loss with the wrong sign", "digits-mlp", lambda p: p.with_(loss=lambda o, y: -nll(o, y))),
    Fault("sign_error", "gradient added", "digits-convnet", lambda p: p.with_(tx=ascent)),
    Fault("label_encoding", "classes from 1", "digits-mlp", shifted_classes),
    Fault("label_encoding", "validation from 1", "digits-convnet",
          lambda p: p.with_(validation=(p.validation[0], p.validation[1] + 1)), hides=True),
    Fault("misaligned_labels", "labels shuffled alone", "digits-convnet",
          on_train(lambda x, y: (x, np.random.default_rng(0).permutation(y)))),
    Fault("misaligned_labels", "labels moved by one row", "digits-mlp", on_train(lambda x, y: (x, np.roll(y, 1)))),
    Fault("label_noise", "60 % random", "digits-mlp", on_train(lambda x, y: (x, relabel(y, 0.6, 10)))),
    Fault("label_noise", "half random", "digits-dropout", on_train(lambda x, y: (x, relabel(y, 0.5, 10)))),
    Fault("unshuffled_data", "sorted by class", "digits-mlp",
          lambda p: p.with_(train=sort_by_class(*p.train), shuffle=False)),
    Fault("unshuffled_data", "sorted by class", "digits-convnet",
          lambda p: p.with_(train=sort_by_class(*p.train), shuffle=False)),
    Fault("augmentation_breaks_labels", "flips of digits", "digits-convnet", lambda p: p.with_(augment=flips)),
    Fault("augmentation_breaks_labels", "quarter turns", "digits-mlp", lambda p: p.with_(augment=turns)),
    Fault("preprocessing_mismatch", "validation 0 to 16", "digits-convnet",
          lambda p: p.with_(validation=(p.validation[0] * 16 - 8, p.validation[1])), hides=True),
    Fault("preprocessing_mismatch", "validation inverted", "digits-mlp",
          lambda p: p.with_(validation=(1 - p.validation[0], p.validation[1])), hides=True),
    Fault("frozen_parameters", "only biases train", "digits-convnet", trains_only(lambda name, a: a.ndim < 2)),
    Fault("frozen_parameters", "only the first layer trains", "digits-deep",
          trains_only(lambda name, a: name.startswith("[0]"))),
    Fault("blocked_gradient", "step functions", "digits-deep", lambda p: p.with_(apply=one_bit)),
    Fault("evaluation_in_training_mode", "dropout stays on", "digits-dropout",
          lambda p: with_noise_left_on(more_dropout(0.8)(p)), hides=True),
    Fault("excessive_regularisation", "dropout 0.97", "digits-dropout", more_dropout(0.97)),
    Fault("excessive_regularisation", "weight decay 100", "digits-dropout",
          lambda p: p.with_(tx=lambda hp: nnlearn.adamw(hp["learning_rate"], weight_decay=100.0))),
    Fault("clipping_too_tight", "norm 1e-3", "digits-convnet", clipped(1e-3)),
    Fault("clipping_too_tight", "norm 0.01", "digits-full-batch", clipped(0.01)),
    Fault("gradient_accumulation", "sums of 15 not divided", "digits-deep", summed_gradients(15),
          ("learning_rate_too_high",)),
    Fault("batch_too_small", "one example a step", "digits-convnet", lambda p: p.with_(batch_size=1),
          ("learning_rate_too_high",)),
    Fault("numerical_precision", "float16 and an unguarded log", "digits-mlp", half_precision),
    Fault("underfitting", "a twentieth of the steps", "digits-smoothed",
          lambda p: p.with_(steps=12, check_every=12), ("learning_rate_too_low",)),
    Fault("overfitting", "50 examples", "digits-smoothed",
          lambda p: p.with_(train=(p.train[0][:50], p.train[1][:50]))),
    Fault("optimizer_state_reset", "momentum lost at every step", "digits-convnet", restarted(1)),
]  # fmt: skip
