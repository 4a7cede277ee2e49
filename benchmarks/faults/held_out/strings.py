"""Strings: characters, orders of events, tags and transcripts."""

import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnlearn
from benchmarks.faults.case import Fault, Program
from nnlearn.models import transformer

PAD = -1


def letters(length=16):
    """Windows of a module of Python's standard library, as numbers of characters, in three consecutive parts."""
    text = " ".join(inspect.getsource(textwrap).split()).lower()
    alphabet = sorted(set(text))
    codes = np.array([alphabet.index(character) for character in text], np.int32)
    starts = np.arange(0, len(codes) - length - 1, 3)
    windows = codes[starts[:, None] + np.arange(length + 1)]
    a, b = int(0.8 * len(windows)), int(0.88 * len(windows))
    sets = (windows[:a], windows[a + 6 : b], windows[b + 6 :])
    return [(w[:, :-1], w[:, 1:]) for w in sets], len(alphabet)


def next_token_loss(logits, targets):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def token_accuracy(logits, targets):
    return jnp.mean(jnp.argmax(logits, -1) == targets)


def characters():
    """The next character of a text; the loss has a floor, since text is not predictable."""
    (train, validation, test), size = letters()
    model = transformer(size, layers=1, width=32, heads=2, max_length=16)

    def tx(hp):
        return nnlearn.lion(nnlearn.warmup_constant_schedule(0.0, hp["learning_rate"], 30))

    return Program(
        name="characters", kind="transformer", train=train, validation=validation, test=test, init=model.init,
        apply=lambda p, x: model.apply(p, x), loss=next_token_loss, measure=token_accuracy, tx=tx,
        hparams={"learning_rate": 3e-3}, batch_size=48, steps=300, check_every=100,
    )  # fmt: skip


def events(seed, n, length=16):
    """One-hot symbols with padding; the class is whether the first "a" comes before the first "b"."""
    random = np.random.default_rng(seed)
    tokens = random.integers(2, 5, (n, length))
    lengths = random.integers(6, length + 1, n)
    y = random.integers(0, 2, n).astype(np.int32)
    for row in range(n):
        first, second = np.sort(random.choice(np.arange(0, 6), 2, replace=False))
        tokens[row, first], tokens[row, second] = (0, 1) if y[row] else (1, 0)
    x = np.eye(6)[np.where(np.arange(length) < lengths[:, None], tokens, 5)]
    return x.astype(np.float32), y


def lstm_init(key, hidden=24, forget=1.0, scale=1.0):
    k1, k2, k3 = jax.random.split(key, 3)
    bias = jnp.zeros((4, hidden)).at[1].set(forget)
    return {
        "x": scale * jax.random.normal(k1, (6, 4, hidden)) / 2,
        "h": scale * jax.random.normal(k2, (hidden, 4, hidden)) / hidden**0.5,
        "b": bias,
        "head": {"w": jax.random.normal(k3, (hidden, 2)) / hidden**0.5, "b": jnp.zeros(2)},
    }


def lstm_apply(keep="real", cut=False):
    """An LSTM whose state stands still where the last feature, padding, is one."""

    def apply(params, x):
        def cell(carry, x_t):
            h, c = jax.lax.stop_gradient(carry) if cut else carry
            i, f, g, o = jnp.moveaxis(
                jnp.einsum("bi,igh->bgh", x_t, params["x"]) + jnp.einsum("bi,igh->bgh", h, params["h"]) + params["b"],
                1, 0,
            )  # fmt: skip
            c_new = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h_new = jax.nn.sigmoid(o) * jnp.tanh(c_new)
            padding = x_t[:, 5:] > 0.5
            if keep == "all":
                return (h_new, c_new), None
            stays = padding if keep == "real" else ~padding
            return (jnp.where(stays, h, h_new), jnp.where(stays, c, c_new)), None

        zeros = jnp.zeros((x.shape[0], params["b"].shape[1]))
        (h, _), _ = jax.lax.scan(cell, (zeros, zeros), jnp.swapaxes(x, 0, 1))
        return h @ params["head"]["w"] + params["head"]["b"]

    return apply


def integer_loss(logits, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def order():
    return Program(
        name="order", kind="rnn", train=events(0, 1200), validation=events(1, 300), test=events(2, 600),
        init=lstm_init, apply=lstm_apply(), loss=integer_loss, tx=lambda hp: optax.adam(hp["learning_rate"]),
        hparams={"learning_rate": 1e-2}, batch_size=64, steps=250, layout="dict",
    )  # fmt: skip


def tagged(seed, n, length=14):
    """Each token's tag depends on it and its left neighbour; short rows are padded with tag -1."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 9, (n, length))
    before = np.concatenate([np.zeros((n, 1), int), tokens[:, :-1]], 1)
    tags = ((tokens + before) % 3).astype(np.int32)
    real = np.arange(length) < random.integers(3, 9, n)[:, None]
    return np.where(real, tokens, 0).astype(np.int32), np.where(real, tags, PAD)


def tagger_init(key):
    k1, k2, k3 = jax.random.split(key, 3)
    return {
        "table": 0.5 * jax.random.normal(k1, (9, 12)),
        "mix": {"w": jax.random.normal(k2, (36, 64)) / 6, "b": jnp.zeros(64)},
        "out": {"w": jax.random.normal(k3, (64, 3)) / 8, "b": jnp.zeros(3)},
    }


def tagger_apply(params, tokens):
    x = params["table"][tokens]
    near = [jnp.pad(x, ((0, 0), (1, 1), (0, 0)))[:, i : i + x.shape[1]] for i in range(3)]
    h = jax.nn.relu(jnp.concatenate(near, -1) @ params["mix"]["w"] + params["mix"]["b"])
    return h @ params["out"]["w"] + params["out"]["b"]


def tag_loss(logits, tags):
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(tags, 0))
    return jnp.mean(each, where=tags != PAD)


def tagger():
    return Program(
        name="tagger", kind="convnet", train=tagged(0, 1000), validation=tagged(1, 250), test=tagged(2, 500),
        init=tagger_init, apply=tagger_apply, loss=tag_loss,
        measure=lambda o, y: jnp.mean(jnp.argmax(o, -1) == y, where=y != PAD),
        tx=lambda hp: nnlearn.adamw(hp["learning_rate"], weight_decay=1e-3), hparams={"learning_rate": 1e-2},
        batch_size=40, steps=250, layout="examples",
    )  # fmt: skip


def beeps(seed, n, frames=20, count=3):
    """Three tones, each held for some frames, to be read as three labels out of four."""
    random = np.random.default_rng(seed)
    y = np.zeros((n, count), np.int32)
    x = 0.3 * random.normal(size=(n, frames, 5))
    for row in range(n):
        edges = np.sort(random.choice(np.arange(2, frames - 1, 2), count - 1, replace=False))
        for k, part in enumerate(np.split(np.arange(frames), edges)):
            y[row, k] = random.choice([c for c in range(1, 5) if k == 0 or c != y[row, k - 1]])
            x[row, part, y[row, k]] += 1.2
    return x.astype(np.float32), y


def beep_init(key):
    k1, k2 = jax.random.split(key)
    return {
        "near": {"w": jax.random.normal(k1, (25, 48)) / 5, "b": jnp.zeros(48)},
        "out": {"w": jax.random.normal(k2, (48, 5)) / 7, "b": jnp.zeros(5)},
    }


def beep_apply(params, x):
    padded = jnp.pad(x, ((0, 0), (2, 2), (0, 0)))
    near = jnp.concatenate([padded[:, i : i + x.shape[1]] for i in range(5)], -1)
    return jax.nn.relu(near @ params["near"]["w"] + params["near"]["b"]) @ params["out"]["w"] + params["out"]["b"]


def transcript_loss(logits, y):
    return jnp.mean(nnlearn.ctc_loss(logits, jnp.zeros(logits.shape[:2]), y, jnp.zeros(y.shape)))


def transcripts_right(logits, y):
    said = jnp.argmax(logits, -1)
    new = (said != 0) & (said != jnp.pad(said, ((0, 0), (1, 0)))[:, :-1])
    place = jnp.where(new, jnp.cumsum(new, 1) - 1, 99)
    read = jnp.zeros(y.shape, said.dtype).at[jnp.arange(len(y))[:, None], place].set(said, mode="drop")
    return jnp.mean(jnp.all(read == y, 1) & (jnp.sum(new, 1) == y.shape[1]))


def beeps_ctc():
    return Program(
        name="beeps-ctc", kind="ctc", train=beeps(0, 600), validation=beeps(1, 200), test=beeps(2, 400),
        init=beep_init, apply=beep_apply, loss=transcript_loss, measure=transcripts_right, metric="right",
        tx=lambda hp: nnlearn.adam(hp["learning_rate"]), hparams={"learning_rate": 1e-2}, batch_size=40, steps=250,
    )  # fmt: skip


PROGRAMS = [characters, order, tagger, beeps_ctc]


def growing_state(p):
    """A rectified recurrent network whose state doubles with every symbol, and plain descent without clipping."""

    def init(key):
        params = lstm_init(key)
        return {"x": params["x"][:, 0], "h": 2.0 * jnp.eye(24), "b": jnp.zeros(24), "head": params["head"]}

    def apply(params, x):
        def cell(h, x_t):
            return jnp.where(x_t[:, 5:] > 0.5, h, jax.nn.relu(x_t @ params["x"] + h @ params["h"] + params["b"])), None

        h, _ = jax.lax.scan(cell, jnp.zeros((len(x), 24)), jnp.swapaxes(x, 0, 1))
        return h @ params["head"]["w"] + params["head"]["b"]

    return p.with_(init=init, apply=apply, tx=lambda hp: optax.sgd(0.05))


def slow_start(hp):
    """A warm-up of 50,000 steps, out of a recipe for a larger run."""
    return nnlearn.lion(nnlearn.warmup_constant_schedule(0.0, hp["learning_rate"], 50_000))


def not_shifted(p):
    """The target is the token that the network sees."""
    return p.with_(train=(p.train[0], p.train[0]), validation=(p.validation[0], p.validation[0]))


def two_ahead(p):
    """Shifted once in the data and once more in the loss."""
    return p.with_(
        train=(p.train[0][:, :-1], p.train[1][:, 1:]), validation=(p.validation[0][:, :-1], p.validation[1][:, 1:])
    )


def upwards(hp):
    return optax.chain(optax.scale_by_adam(), optax.scale(0.3 * hp["learning_rate"]))


def all_positions(p):
    """Padding counts as tag 0."""

    def loss(logits, tags):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(tags, 0)))

    def widen(x, y):
        more = ((0, 0), (0, 50))
        return np.pad(x, more), np.pad(y, more, constant_values=PAD)

    parts = {part: widen(*getattr(p, part)) for part in ("train", "validation", "test")}
    return p.with_(loss=loss, **parts, steps=40, check_every=20)


def only_padding(p):
    def loss(logits, tags):
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(tags, 0))
        return jnp.mean(each, where=tags == PAD)

    return p.with_(loss=loss)


def frozen_body(p):
    def tx(hp):
        return optax.chain(p.tx(hp), optax.masked(optax.set_to_zero(), {"near": True, "out": False}))

    return p.with_(tx=tx, init=lambda key: jax.tree.map(lambda a: a[..., :6] if a.shape[-1] == 48 else a[:6]
                   if a.shape[0] == 48 else a, beep_init(key)))  # fmt: skip


def hard_tokens(p):
    """The loss of the chosen tags: argmax has no gradient."""

    def loss(logits, tags):
        chosen = jax.nn.one_hot(jnp.argmax(logits, -1), 3) * 4.0 + 0.0 * logits
        return tag_loss(chosen, tags)

    return p.with_(loss=loss)


FAULTS = [
    Fault("learning_rate_too_high", "rate x100", "characters", lambda p: p.rate(100)),
    Fault("learning_rate_too_low", "rate / 1000", "beeps-ctc", lambda p: p.rate(1e-3)),
    Fault("schedule_mistimed", "warm-up of 50,000 steps", "characters", lambda p: p.with_(tx=slow_start)),
    Fault("vanishing_gradients", "forget gates shut", "order",
          lambda p: p.with_(init=lambda key: lstm_init(key, forget=-6.0)), ("bad_initialisation",)),
    Fault("exploding_gradients", "state doubled at every symbol", "order", growing_state, ("bad_initialisation",)),
    Fault("saturated_activations", "gates x40", "order",
          lambda p: p.with_(init=lambda key: lstm_init(key, scale=40.0)), ("bad_initialisation",)),
    Fault("sign_error", "updates added with a plus", "characters", lambda p: p.with_(tx=upwards)),
    Fault("misaligned_labels", "not shifted", "characters", not_shifted, ("target_leak",)),
    Fault("misaligned_labels", "two ahead", "characters", two_ahead),
    Fault("mask_ignored", "mask inverted", "tagger", only_padding),
    Fault("mask_ignored", "state inverted over padding", "order", lambda p: p.with_(apply=lstm_apply("padding"))),
    Fault("mask_ignored", "loss on padding", "tagger", all_positions),
    Fault("frozen_parameters", "body frozen", "beeps-ctc", frozen_body),
    Fault("blocked_gradient", "argmax in the loss", "tagger", hard_tokens),
    Fault("blocked_gradient", "no gradient through time", "order", lambda p: p.with_(apply=lstm_apply(cut=True))),
    Fault("label_encoding", "labels from zero, the blank", "beeps-ctc",
          lambda p: p.with_(train=(p.train[0], p.train[1] - 1))),
    Fault("underfitting", "ten steps", "characters", lambda p: p.with_(steps=10, check_every=10),
          ("learning_rate_too_low",)),
    Fault("excessive_regularisation", "decay 40", "tagger",
          lambda p: p.with_(tx=lambda hp: nnlearn.adamw(hp["learning_rate"], weight_decay=40.0))),
]  # fmt: skip
