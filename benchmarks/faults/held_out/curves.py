"""Tables, planes and curves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnlearn
from benchmarks.faults.case import Fault, Program, accuracy, balanced_accuracy, explained, squared_error
from benchmarks.faults.sources import standardised, table
from nnlearn.models import from_equinox, mlp

PARTS = ("train", "validation", "test")
REGRESSION = {"metric": "error", "mode": "min", "measure": squared_error, "score": explained}


def every_part(p, change):
    """The same change of inputs and targets in all three parts."""
    return p.with_(**{part: change(*getattr(p, part)) for part in PARTS})


def cut(x, y, *ends):
    return list(zip(np.split(x, ends), np.split(y, ends), strict=True))


# --- healthy programs


def iris():
    """Tiny data and the whole of it in a batch."""
    train, validation, test = standardised(table("iris", (75, 25), 3))
    model = from_equinox(lambda key: eqx.nn.MLP(4, 3, 12, 1, activation=jnp.tanh, key=key))
    return Program(
        name="iris", kind="tabular", train=train, validation=validation, test=test, init=model.init,
        apply=lambda p, x: model.apply(p, x),
        loss=lambda o, y: optax.softmax_cross_entropy(o, jax.nn.one_hot(y, 3)).mean(),
        tx=lambda hp: optax.adam(hp["learning_rate"]), hparams={"learning_rate": 0.02}, batch_size=75, steps=150,
        layout="dict",
    )  # fmt: skip


def moons_init(key):
    keys = jax.random.split(key, 3)
    shapes = [(2, 24), (24, 24), (24, 1)]
    return {
        f"dense{i}": {"kernel": jax.random.normal(k, s) / np.sqrt(s[0]), "bias": jnp.zeros(s[1])}
        for i, (k, s) in enumerate(zip(keys, shapes, strict=True))
    }


def moons_apply(activation=jnp.tanh):
    def apply(params, x):
        x = activation(x @ params["dense0"]["kernel"] + params["dense0"]["bias"])
        x = activation(x @ params["dense1"]["kernel"] + params["dense1"]["bias"])
        return (x @ params["dense2"]["kernel"] + params["dense2"]["bias"])[:, 0]

    return apply


def sign_accuracy(z, y):
    return jnp.mean((z > 0) == (y > 0.5))


def sigmoid_loss(z, y):
    return jnp.mean(nnlearn.sigmoid_binary_cross_entropy(z, y))


def moons():
    from sklearn.datasets import make_moons

    x, y = make_moons(1600, noise=0.12, random_state=0)
    train, validation, test = cut(x.astype(np.float32), y.astype(np.float32), 800, 1000)
    return Program(
        name="moons", kind="mlp", train=train, validation=validation, test=test, init=moons_init, apply=moons_apply(),
        loss=sigmoid_loss, measure=sign_accuracy, tx=lambda hp: nnlearn.rmsprop(hp["learning_rate"]),
        hparams={"learning_rate": 0.01}, batch_size=40, steps=300,
    )  # fmt: skip


def friedman():
    """Friedman's first problem: ten features, five of them useful."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(1500, noise=0.5, random_state=1)
    y = (y - y[:700].mean()) / y[:700].std()
    train, validation, test = standardised(cut(x.astype(np.float32), y[:, None].astype(np.float32), 700, 900))
    model = mlp((10, 48, 48, 1), residual=True, norm="layer", activation="silu")
    return Program(
        name="friedman", kind="regression", train=train, validation=validation, test=test, init=model.init,
        apply=lambda p, x: model.apply(p, x), loss=lambda o, y: jnp.mean(jnp.square(o - y)),
        tx=lambda hp: nnlearn.adamw(hp["learning_rate"], weight_decay=0.01), hparams={"learning_rate": 5e-3},
        batch_size=50, steps=300, layout="examples", **REGRESSION,
    )  # fmt: skip


def arms(key, n):
    """Points on two arms of a spiral."""
    k1, k2, k3 = jax.random.split(key, 3)
    y = jax.random.bernoulli(k1, 0.5, (n,)).astype(jnp.int32)
    t = jnp.sqrt(jax.random.uniform(k2, (n,))) * 7.0
    angle = t + jnp.pi * y
    x = jnp.stack([t * jnp.cos(angle), t * jnp.sin(angle)], 1) / 4.0
    return x + 0.03 * jax.random.normal(k3, (n, 2)), y


def spiral_init(key, sizes=(2, 64, 64, 2), gain=2.0):
    keys = jax.random.split(key, len(sizes))
    pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
    return {
        "kernels": [jax.random.normal(k, s) * (gain / s[0]) ** 0.5 for k, s in zip(keys, pairs, strict=False)],
        "biases": [0.1 * jax.random.normal(keys[-1], (s[1],)) for s in pairs],
    }


def spiral_apply(activation=jax.nn.gelu):
    def apply(params, x):
        layers = list(zip(params["kernels"], params["biases"], strict=True))
        for kernel, bias in layers[:-1]:
            x = activation(x @ kernel + bias)
        return x @ layers[-1][0] + layers[-1][1]

    return apply


def integer_loss(logits, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def spiral():
    """Endless data and a warm-up over a quarter of the run."""

    def tx(hp):
        return nnlearn.adam(nnlearn.warmup_cosine_decay_schedule(0.0, hp["learning_rate"], 100, 401))

    sets = [jax.tree.map(np.asarray, arms(jax.random.key(seed), 500)) for seed in (1, 2, 3)]
    return Program(
        name="spiral", kind="mlp", train=sets[0], validation=sets[1], test=sets[2], init=spiral_init,
        apply=spiral_apply(), loss=integer_loss, generate=lambda key, step: arms(key, 96), tx=tx,
        hparams={"learning_rate": 0.02}, steps=400,
    )  # fmt: skip


def ripple():
    """Full-batch momentum at the edge of stability."""
    x = np.linspace(-1, 1, 240, dtype=np.float32)[:, None]
    x = np.random.default_rng(0).permutation(x)
    y = np.sin(4 * x).astype(np.float32)
    noisy = y + 0.05 * np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    return Program(
        name="ripple", kind="regression", train=(x[:120], noisy[:120]), validation=(x[120:160], y[120:160]),
        test=(x[160:], y[160:]), init=lambda key: spiral_init(key, (1, 40, 40, 1), 1.5),
        apply=spiral_apply(jnp.tanh), loss=lambda o, y: jnp.mean((o - y) ** 2) / 2,
        tx=lambda hp: optax.sgd(hp["learning_rate"], momentum=0.9), hparams={"learning_rate": 0.1}, batch_size=120,
        steps=400, **REGRESSION,
    )  # fmt: skip


def saddle():
    """A linear map as a product of three small matrices: a long plateau at a saddle, then drops."""
    random = np.random.default_rng(2)
    x = random.normal(size=(900, 12)).astype(np.float32)
    y = (x @ (random.normal(size=(12, 3)) @ random.normal(size=(3, 4)) / 4)).astype(np.float32)
    train, validation, test = cut(x, y, 400, 500)

    def init(key):
        keys = jax.random.split(key, 3)
        shapes = [(12, 16), (16, 16), (16, 4)]
        return [0.5 * jax.random.normal(k, s) / np.sqrt(s[0]) for k, s in zip(keys, shapes, strict=True)]

    return Program(
        name="saddle", kind="regression", train=train, validation=validation, test=test, init=init,
        apply=lambda p, x: x @ p[0] @ p[1] @ p[2], loss=lambda o, y: jnp.mean((o - y) ** 2),
        tx=lambda hp: nnlearn.sgd(hp["learning_rate"], momentum=0.9), hparams={"learning_rate": 0.03}, batch_size=100,
        steps=300, **REGRESSION,
    )  # fmt: skip


def frauds(seed, n, share=0.04):
    random = np.random.default_rng(seed)
    y = (random.random(n) < share).astype(np.float32)
    x = random.normal(size=(n, 8)).astype(np.float32)
    x[:, :4] += y[:, None] * random.choice([-1.3, 1.3], (n, 1))
    return x, y


def fraud():
    """Four frauds in a hundred; frauds are drawn as often as the rest in training."""
    x, y = frauds(0, 4000)
    rows = np.concatenate([np.flatnonzero(y == 0), np.repeat(np.flatnonzero(y == 1), 24)])
    model = mlp((8, 32, 1))
    return Program(
        name="fraud", kind="tabular", train=(x[rows], y[rows]), validation=frauds(1, 1500), test=frauds(2, 4000),
        init=model.init, apply=lambda p, x: model.apply(p, x)[:, 0], loss=sigmoid_loss, measure=balanced_accuracy,
        metric="balanced", tx=lambda hp: optax.adamw(hp["learning_rate"], weight_decay=1e-3),
        hparams={"learning_rate": 5e-3}, batch_size=64, steps=300, layout="examples",
    )  # fmt: skip


PROGRAMS = [iris, moons, friedman, spiral, ripple, saddle, fraud]


# --- faults


def twelve_layers(gain):
    sizes = (2, *[24] * 11, 2)
    return lambda p: p.with_(init=lambda key: spiral_init(key, sizes, gain), apply=spiral_apply(jax.nn.relu))


def all_negative(p):
    """Positive inputs and negative weights: no rectified unit is on."""

    def init(key):
        params = p.init(key)
        first = {"kernel": -jnp.abs(params["dense0"]["kernel"]) - 0.1, "bias": params["dense0"]["bias"]}
        return params | {"dense0": first}

    q = every_part(p, lambda x, y: (x - x.min(0) + 0.5, y))
    return q.with_(init=init, apply=moons_apply(jax.nn.relu))


def plus_minus_one(p):
    """Labels -1 and 1 where the loss expects 0 and 1."""
    return p.with_(
        train=(p.train[0], 2 * p.train[1] - 1),
        loss=lambda z, y: jnp.mean(jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z)))),
        steps=400,
    )


def from_one(p):
    """Classes 1, 2, 3 for three outputs."""
    return p.with_(
        train=(p.train[0], p.train[1] + 1), validation=(p.validation[0], p.validation[1] + 1),
        fault_score=lambda o, y: accuracy(o, y + 1),
    )  # fmt: skip


def sigmoid_twice(p):
    """A sigmoid in the network, another one in the loss."""
    return p.with_(
        apply=lambda params, x: jax.nn.sigmoid(p.apply(params, x)), steps=300,
        measure=lambda z, y: jnp.mean((z > 0.5) == (y > 0.5)), score=lambda z, y: jnp.mean((z > 0) == (y > 0.5)),
    )  # fmt: skip


def rectified_logit(p):
    """A ReLU after the last layer, so that no logit says no."""
    return p.with_(apply=lambda params, x: jax.nn.relu(p.apply(params, x)))


def squared_error_of_softmax(p):
    """A regression on a softmax of one output."""
    return p.with_(apply=lambda params, x: jax.nn.softmax(p.apply(params, x), axis=-1))


def loss_over_rows(p):
    """Softmax over the examples of the batch."""

    def loss(logits, y):
        return -jnp.mean(jax.nn.log_softmax(logits[None], axis=1)[0][jnp.arange(len(y)), y])

    return p.with_(loss=loss)


def squeezed(p):
    """Outputs (n,), targets (n, 1)."""
    return p.with_(loss=lambda o, y: jnp.mean((o[:, 0] - y) ** 2))


def centred_over_features(p):
    """Each row minus its own mean over its deviation; columns were meant."""

    def apply(params, x):
        return p.apply(params, (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1e-6))

    return p.with_(apply=apply)


def sorted_rows(p, batch_size):
    order = np.argsort(p.train[1], kind="stable")
    return p.with_(train=(p.train[0][order], p.train[1][order]), shuffle=False, batch_size=batch_size)


def mirrored(p):
    """Points mirrored at the origin, which belong to the other arm."""

    def generate(key, step):
        x, y = p.generate(key, step)
        return jnp.where(jax.random.bernoulli(key, 0.5, (len(x), 1)), -x, x), y

    return p.with_(generate=generate)


def flipped(share):
    def change(p):
        random = np.random.default_rng(4)
        x, y = p.train
        return p.with_(train=(x, np.where(random.random(len(y)) < share, 1 - y, y).astype(y.dtype)))

    return change


def plain_frauds(p):
    return p.with_(train=frauds(0, 4000))


def two_percent(p):
    return p.with_(train=frauds(0, 4000, 0.015), tx=lambda hp: nnlearn.sgd(0.05, momentum=0.9))


def split_after_oversampling(p):
    """Copies of the same frauds, and rows that a large network knows by heart, on both sides of the split."""
    x, y = frauds(0, 600)
    rows = np.concatenate([np.flatnonzero(y == 0), np.repeat(np.flatnonzero(y == 1), 24)])
    rows = np.random.default_rng(0).permutation(rows)
    model = mlp((8, 256, 256, 1))
    return p.with_(
        train=(x[rows[:900]], y[rows[:900]]), validation=(x[rows[900:]], y[rows[900:]]), init=model.init,
        apply=lambda params, x: model.apply(params, x)[:, 0], steps=300,
    )  # fmt: skip


def thirty_rows(p):
    model = mlp((10, 400, 400, 1))
    return p.with_(
        train=(p.train[0][:30], p.train[1][:30]), init=model.init, apply=lambda params, x: model.apply(params, x),
        batch_size=15, steps=400,
    )  # fmt: skip


def validated_on_training(p):
    q = thirty_rows(p)
    return q.with_(
        validation=tuple(np.concatenate([a[:28], b[:4]]) for a, b in zip(q.train, p.validation, strict=True))
    )


def answer_column(p):
    """A column with the target itself; not known at test time."""

    def swap(x, y):
        x = x.copy()
        x[:, 9:] = y
        return x, y

    return p.with_(train=swap(*p.train), validation=swap(*p.validation))


def raw_ranges(p):
    """Columns in their own units, from thousandths to thousands."""
    units = np.float32([1e3, 300.0, 1e-3, 50.0, 1.0, 1e3, 20.0, 1e-2, 500.0, 5.0])
    q = every_part(p, lambda x, y: (x * units + units, y))
    model = mlp((10, 48, 48, 1), activation="silu")
    return q.with_(init=model.init, apply=lambda params, x: model.apply(params, x))


def validation_as_read(p):
    """The validation part in its own units, [0, 1], training standardised."""
    x, y = p.validation
    return p.with_(validation=(x * 0.29 + 0.5, y))


def scaled_targets(scale, offset):
    return lambda p: every_part(p, lambda x, y: (x, y * scale + offset))


def step_units(p):
    return p.with_(apply=spiral_apply(lambda x: (x > 0).astype(x.dtype)))


def detached(p):
    """Features computed outside of the loss, so their gradient is cut."""

    def apply(params, x):
        features = {"kernels": params["kernels"][:-1], "biases": params["biases"][:-1]}
        for kernel, bias in zip(*jax.lax.stop_gradient(list(features.values())), strict=True):
            x = jax.nn.gelu(x @ kernel + bias)
        return x @ params["kernels"][-1] + params["biases"][-1]

    return p.with_(apply=apply, init=lambda key: spiral_init(key, (2, 24, 24, 2)))


def head_only(p):
    def tx(hp):
        def mask(params):
            return {name: [i < len(leaves) - 1 for i in range(len(leaves))] for name, leaves in params.items()}

        return optax.chain(p.tx(hp), optax.masked(optax.set_to_zero(), mask))

    return p.with_(tx=tx, init=lambda key: spiral_init(key, (2, 24, 24, 2)))


def l2(strength):
    return lambda p: p.with_(penalty=lambda q: strength * sum(jnp.sum(a * a) for a in jax.tree.leaves(q)))


def decay_of(strength):
    return lambda p: p.with_(tx=lambda hp: nnlearn.adamw(hp["learning_rate"], weight_decay=strength))


def growing(hp):
    """``params -= rate * (grads - decay * params)``."""
    return optax.chain(optax.add_decayed_weights(-2.0), optax.sgd(5 * hp["learning_rate"]))


def reset_each(period):
    """The optimizer is made anew after every ``period`` steps."""

    def change(p):
        def tx(hp):
            core = p.tx(hp)

            def init(params):
                return core.init(params), jnp.int32(0)

            def update(grads, state, params=None):
                inner, t = state
                inner = jax.lax.cond(t % period == 0, lambda: core.init(params), lambda: inner)
                updates, inner = core.update(grads, inner, params)
                return updates, (inner, t + 1)

            return optax.GradientTransformation(init, update)

        return p.with_(tx=tx)

    return change


def hoarded(hp):
    """The gradient buffer is never set to zero."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads, total, params=None):
        total = jax.tree.map(jnp.add, total, grads)
        return jax.tree.map(lambda g: -100 * hp["learning_rate"] * g, total), total

    return optax.GradientTransformation(init, update)


def half_squares(p):
    """Squared errors of targets around 400 in float16, which ends at 65504."""

    def loss(o, y):
        gap = o.astype(jnp.float16) - y.astype(jnp.float16)
        return jnp.mean(gap * gap).astype(jnp.float32)

    return scaled_targets(100.0, 300.0)(p).with_(loss=loss)


def zero_deviation(p):
    """Division by the deviation of a column that is constant."""
    q = every_part(p, lambda x, y: (np.concatenate([x, np.ones((len(x), 1), np.float32)], 1), y))
    deviation = jnp.concatenate([jnp.ones(4), jnp.zeros(1)])
    model = from_equinox(lambda key: eqx.nn.MLP(5, 3, 12, 1, activation=jnp.tanh, key=key))
    return q.with_(init=model.init, apply=lambda params, x: model.apply(params, (x - x[0] * 0 - 1.0) / deviation))


def linear_moons(p):
    """No hidden layer."""
    return p.with_(apply=lambda params, x: (x @ params["dense0"]["kernel"])[:, 0] + params["dense2"]["bias"])


def unbiased(p):
    """Two units and no bias."""
    return p.with_(
        init=lambda key: spiral_init(key, (2, 4, 2)),
        apply=lambda params, x: spiral_apply()(params | {"biases": [0.0, 0.0]}, x),
    )


def batch_statistics(p):
    """Each batch of two is normalised by itself."""

    def apply(params, x):
        x = jnp.tanh(x @ params["dense0"]["kernel"])
        x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
        x = jnp.tanh(x @ params["dense1"]["kernel"] + params["dense1"]["bias"])
        return (x @ params["dense2"]["kernel"] + params["dense2"]["bias"])[:, 0]

    return p.with_(apply=apply, batch_size=2)


def with_tx(make):
    return lambda p: p.with_(tx=make)


def init_all(value):
    return lambda p: p.with_(init=lambda key: jax.tree.map(lambda a: jnp.full_like(a, value), p.init(key)))


def init_times(factor):
    return lambda p: p.with_(init=lambda key: jax.tree.map(lambda a: a * factor, p.init(key)))


FAULTS = [
    Fault("learning_rate_too_high", "rate x300", "friedman", lambda p: p.rate(300)),
    Fault("learning_rate_too_high", "rate x30", "saddle", lambda p: p.rate(30)),
    Fault("learning_rate_too_low", "rate / 500", "moons", lambda p: p.rate(1 / 500)),
    Fault("schedule_mistimed", "0.95 per step, not per epoch", "spiral",
          with_tx(lambda hp: nnlearn.adam(nnlearn.exponential_decay(hp["learning_rate"], 1, 0.9)))),
    Fault("exploding_gradients", "three factors of six times the scale", "saddle", init_times(6.0),
          ("bad_initialisation", "learning_rate_too_high")),
    Fault("vanishing_gradients", "twelve layers of a third of the scale", "spiral", twelve_layers(0.15),
          ("bad_initialisation",)),
    Fault("dead_units", "negative weights, positive inputs", "moons", all_negative, ("bad_initialisation",)),
    Fault("saturated_activations", "weights x60", "moons", init_times(60.0), ("bad_initialisation",)),
    Fault("symmetric_initialisation", "zeros", "moons", init_all(0.0)),
    Fault("symmetric_initialisation", "factors at zero", "saddle", init_all(0.0)),
    Fault("unnormalised_inputs", "columns in their own units", "friedman", raw_ranges),
    Fault("unnormalised_targets", "x200 + 1000", "friedman", scaled_targets(200.0, 1000.0)),
    Fault("unnormalised_targets", "offset 100", "ripple", scaled_targets(1.0, 100.0)),
    Fault("loss_output_mismatch", "sigmoid twice", "moons", sigmoid_twice),
    Fault("loss_output_mismatch", "rectified logit", "fraud", rectified_logit),
    Fault("loss_output_mismatch", "softmax of one output", "friedman", squared_error_of_softmax),
    Fault("wrong_axis_or_reduction", "(n,) minus (n, 1)", "friedman", squeezed),
    Fault("wrong_axis_or_reduction", "softmax over the rows", "iris", loss_over_rows),
    Fault("sign_error", "negative squared error", "friedman",
          lambda p: p.with_(loss=lambda o, y: -jnp.mean((o - y) ** 2))),
    Fault("sign_error", "decay with the wrong sign", "moons", with_tx(growing)),
    Fault("label_encoding", "classes from one", "iris", from_one),
    Fault("label_encoding", "labels -1 and 1", "moons", plus_minus_one),
    Fault("misaligned_labels", "targets moved by one row", "friedman",
          lambda p: p.with_(train=(p.train[0], np.roll(p.train[1], 1, 0)))),
    Fault("label_noise", "40 % flipped", "moons", flipped(0.4)),
    Fault("class_imbalance", "frauds as they come", "fraud", plain_frauds),
    Fault("class_imbalance", "1.5 % of frauds", "fraud", two_percent),
    Fault("unshuffled_data", "sorted, batches of 40", "moons", lambda p: sorted_rows(p, 40)),
    Fault("augmentation_breaks_labels", "mirrored arms", "spiral", mirrored),
    Fault("preprocessing_mismatch", "validation not standardised", "friedman", validation_as_read, hides=True),
    Fault("leaky_validation", "split after oversampling", "fraud", split_after_oversampling, ("overfitting",), True),
    Fault("leaky_validation", "training rows in validation", "friedman", validated_on_training,
          ("overfitting",), True),
    Fault("target_leak", "target as a column", "friedman", answer_column),
    Fault("frozen_parameters", "head only", "spiral", head_only),
    Fault("blocked_gradient", "step units", "spiral", step_units),
    Fault("blocked_gradient", "detached features", "spiral", detached, ("frozen_parameters",)),
    Fault("excessive_regularisation", "L2 of 0.3", "moons", l2(0.3)),
    Fault("excessive_regularisation", "decay 60", "friedman", decay_of(60.0)),
    Fault("clipping_too_tight", "norm 0.001", "ripple",
          lambda p: p.with_(tx=lambda hp: optax.chain(optax.clip_by_global_norm(1e-3), p.tx(hp)))),
    Fault("optimizer_state_reset", "momentum lost at every step", "saddle", reset_each(1)),
    Fault("optimizer_state_reset", "moments lost at every step", "spiral", reset_each(1)),
    Fault("gradient_accumulation", "never zeroed", "moons", with_tx(hoarded)),
    Fault("batch_too_small", "statistics of two rows", "moons", batch_statistics),
    Fault("numerical_precision", "squares in float16", "friedman", half_squares, ("unnormalised_targets",)),
    Fault("numerical_precision", "division by a zero deviation", "iris", zero_deviation),
    Fault("underfitting", "no hidden layer", "moons", linear_moons),
    Fault("underfitting", "four units without bias", "spiral", unbiased),
    Fault("overfitting", "30 rows", "friedman", thirty_rows),
]  # fmt: skip
