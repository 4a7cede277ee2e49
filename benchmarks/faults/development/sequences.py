"""Sequences: recurrent networks, transformers, padding and CTC."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnlearn
from benchmarks.faults.case import Fault, Program
from benchmarks.faults.development.nets import nll
from benchmarks.faults.sources import digits
from nnlearn.models import dense, encoder, gru, transformer

PAD = 0


def rows_of(part):
    return part[0].reshape(-1, 8, 8), part[1]


def digits_gru():
    """The rows of a digit as eight time steps."""
    train, validation, test = map(rows_of, digits(900, seed=6))
    cell, head = gru(8, 32), dense(32, 10)

    def init(key):
        k1, k2 = jax.random.split(key)
        return {"gru": cell.init(k1), "head": head.init(k2)}

    return Program(
        name="digits-gru", kind="rnn", train=train, validation=validation, test=test, init=init,
        apply=lambda p, x: head.apply(p["head"], cell.apply(p["gru"], x)[:, -1]), loss=nll,
        tx=lambda hp: optax.adam(hp["learning_rate"]), hparams={"learning_rate": 1e-2}, layout="dict", steps=250,
    )  # fmt: skip


def recall_init(key, hidden=32, spectral=1.0):
    k1, k2, k3 = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(k2, (hidden, hidden)))
    return {
        "in": jax.random.normal(k1, (6, hidden)) * 0.5,
        "rec": spectral * q,
        "bias": jnp.zeros(hidden),
        "out": jax.random.normal(k3, (hidden, 4)) * hidden**-0.5,
    }


def recall_apply(activation=jnp.tanh):
    def apply(params, x):
        def cell(h, x_t):
            return activation(x_t @ params["in"] + h @ params["rec"] + params["bias"]), None

        h, _ = jax.lax.scan(cell, jnp.zeros((x.shape[0], params["rec"].shape[0])), jnp.swapaxes(x, 0, 1))
        return h @ params["out"]

    return apply


def recall_data(seed, n, length=20):
    """Which of four symbols came first? The others are noise."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 4, n).astype(np.int32)
    x = 0.1 * random.normal(size=(n, length, 6))
    x[np.arange(n), 0, y] += 1.5
    x[:, :, 4] += random.normal(size=(n, length)) * 0.3
    return x.astype(np.float32), y


def recall_rnn():
    """A plain recurrent network that must keep the first of 20 symbols."""
    return Program(
        name="recall-rnn", kind="rnn", train=recall_data(0, 1200), validation=recall_data(1, 300),
        test=recall_data(2, 600), init=recall_init, apply=recall_apply(), loss=lambda o, y: nll(o, y, 4),
        tx=lambda hp: nnlearn.chain(nnlearn.clip_by_global_norm(1.0), nnlearn.adam(hp["learning_rate"])),
        hparams={"learning_rate": 3e-3}, steps=250,
    )  # fmt: skip


LENGTH, SYMBOLS = 6, 12


def copies(seed, n):
    """Six symbols, a separator, and the six symbols backwards; the second half is to be predicted."""
    random = np.random.default_rng(seed)
    first = random.integers(2, SYMBOLS, (n, LENGTH))
    tokens = np.concatenate([first, np.ones((n, 1), int), first[:, ::-1]], 1).astype(np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
    targets[:, :LENGTH] = PAD  # cannot be predicted
    return inputs, targets


def masked_nll(logits, targets):
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return jnp.sum(each * (targets != PAD)) / jnp.maximum(jnp.sum(targets != PAD), 1)


def masked_accuracy(logits, targets):
    return jnp.mean(jnp.argmax(logits, -1) == targets, where=targets != PAD)


def reversal():
    model = transformer(SYMBOLS, layers=2, width=32, heads=2, max_length=16, positions="learned", tied=False, scan=True)

    def tx(hp):
        schedule = nnlearn.warmup_cosine_decay_schedule(0.0, hp["learning_rate"], 40, 301)
        return nnlearn.adamw(schedule, weight_decay=0.01)

    return Program(
        name="reversal", kind="transformer", train=copies(0, 3000), validation=copies(1, 200), test=copies(2, 400),
        init=model.init, apply=lambda p, x: model.apply(p, x), loss=masked_nll, tx=tx,
        hparams={"learning_rate": 1e-2}, steps=300, batch_size=32, measure=masked_accuracy, layout="examples",
    )  # fmt: skip


def bags(seed, n, length=24):
    """Sequences of 3 to 24 tokens; the class is the more frequent of two kinds of tokens, among others."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, n).astype(np.int32)
    lengths = random.integers(3, 8, n)
    where = np.arange(length) < lengths[:, None]
    kind = np.where(random.random((n, length)) < 0.75, y[:, None], 1 - y[:, None])
    tokens = np.where(random.random((n, length)) < 0.7, 1 + kind * 10 + random.integers(0, 10, (n, length)), 21)
    return np.where(where, tokens, PAD).astype(np.int32), y


def padded_text():
    """An encoder on padded sequences; padding is neither attended to nor averaged."""
    model = encoder(22, 2, layers=1, width=16, heads=2, max_length=24)
    return Program(
        name="padded-text", kind="transformer", train=bags(0, 1500), validation=bags(1, 300), test=bags(2, 600),
        init=model.init, apply=lambda p, x: model.apply(p, x, where=x != PAD), loss=lambda o, y: nll(o, y, 2),
        tx=lambda hp: nnlearn.adam(hp["learning_rate"]), hparams={"learning_rate": 1e-2}, steps=200,
    )  # fmt: skip


def spoken(seed, n, frames=24, labels=4):
    """Frames of four to eight "phones", each held for some frames, with noise; labels are padded with 0."""
    random = np.random.default_rng(seed)
    codes = np.random.default_rng(99).normal(size=(6, 8))
    x, y = np.zeros((n, frames, 8)), np.zeros((n, labels), np.int32)
    for row in range(n):
        count = random.integers(2, labels + 1)
        chosen = [int(random.integers(1, 6))]
        while len(chosen) < count:
            chosen.append(int(random.choice([c for c in range(1, 6) if c != chosen[-1]])))
        edges = np.sort(random.choice(np.arange(1, frames), count - 1, replace=False))
        for code, part in zip(chosen, np.split(np.arange(frames), edges), strict=True):
            x[row, part] = codes[code]
        y[row, :count] = chosen
    return (x + 0.3 * random.normal(size=x.shape)).astype(np.float32), y


def phones_ctc():
    cell, head = gru(8, 24, bidirectional=True), dense(48, 6)

    def init(key):
        k1, k2 = jax.random.split(key)
        return {"gru": cell.init(k1), "head": head.init(k2)}

    def apply(params, x):
        return head.apply(params["head"], cell.apply(params["gru"], x))

    def loss(logits, labels):
        return nnlearn.ctc_loss(logits, jnp.zeros(logits.shape[:2]), labels, labels == 0, reduction="mean")

    def sequence_accuracy(logits, labels):
        """The share of sequences that are read without an error."""
        said = jnp.argmax(logits, -1)
        new = (said != 0) & (said != jnp.pad(said, ((0, 0), (1, 0)))[:, :-1])
        place = jnp.where(new, jnp.cumsum(new, 1) - 1, labels.shape[1])
        read = jnp.zeros((len(labels), labels.shape[1] + 1), said.dtype)
        read = read.at[jnp.arange(len(labels))[:, None], place].max(said, mode="drop")[:, :-1]
        return jnp.mean(jnp.all(read == labels, 1) & (jnp.sum(new, 1) == jnp.sum(labels != 0, 1)))

    return Program(
        name="phones-ctc", kind="ctc", train=spoken(0, 800), validation=spoken(1, 200), test=spoken(2, 400),
        init=init, apply=apply, loss=loss, measure=sequence_accuracy, metric="sequence_accuracy",
        tx=lambda hp: nnlearn.adam(hp["learning_rate"]), hparams={"learning_rate": 1e-2}, steps=250, layout="dict",
    )  # fmt: skip


PROGRAMS = [digits_gru, recall_rnn, reversal, padded_text, phones_ctc]


def without_positions(p):
    """No information about positions reaches the network: attention sees a bag of tokens."""
    model = transformer(SYMBOLS, layers=2, width=32, heads=2, max_length=16, positions="learned", tied=False, scan=True)

    def apply(params, x):
        return model.apply(params | {"positions": jax.tree.map(jnp.zeros_like, params["positions"])}, x)

    return p.with_(apply=apply)


def loss_on_padding(p):
    """The mean over all positions, most of which are padding."""

    def widen(pair):
        x, y = pair
        more = np.zeros((len(x), 48), np.int32)
        return np.concatenate([x, more], 1), np.concatenate([y, more], 1)

    model = transformer(SYMBOLS, layers=2, width=32, heads=2, max_length=64, positions="learned", tied=False, scan=True)
    return p.with_(
        train=widen(p.train), validation=widen(p.validation), test=widen(p.test), init=model.init, steps=150,
        apply=lambda params, x: model.apply(params, x), batch_size=16, loss=lambda o, y: nll(o, y, SYMBOLS),
    )  # fmt: skip


def averaged_padding(p):
    """Padding enters attention and the mean over tokens: a short sequence is mostly padding."""
    model = encoder(22, 2, layers=1, width=16, heads=2, max_length=24)
    return p.with_(apply=lambda params, x: model.apply(params, x), steps=60, check_every=20)


def inverted_mask(p):
    model = encoder(22, 2, layers=1, width=16, heads=2, max_length=24)
    return p.with_(apply=lambda params, x: model.apply(params, x, where=x == PAD))


def targets_not_shifted(p):
    """Targets two positions ahead: shifted twice, by the data and by the loss."""

    def twice(pair):
        x, y = pair
        return x, np.concatenate([y[:, 1:], np.zeros((len(y), 1), y.dtype)], 1)

    return p.with_(train=twice(p.train))


def cut_memory(p):
    """The state is cut from the graph at every step, so nothing is learned through time."""

    def apply(params, x):
        def cell(h, x_t):
            h = jax.lax.stop_gradient(h)
            return jnp.tanh(x_t @ params["in"] + h @ params["rec"] + params["bias"]), None

        h, _ = jax.lax.scan(cell, jnp.zeros((x.shape[0], 32)), jnp.swapaxes(x, 0, 1))
        return h @ params["out"]

    return p.with_(apply=apply)


def without_clipping(hp):
    return nnlearn.sgd(0.1, momentum=0.9)


def longer(p, length=60):
    return p.with_(
        train=recall_data(0, 1200, length), validation=recall_data(1, 300, length), test=recall_data(2, 600, length)
    )


def first_step(p):
    """The output of the wrong time step: batch and time are mixed up."""

    def apply(params, x):
        return p.apply(params, jnp.swapaxes(x.reshape(x.shape[1], x.shape[0], x.shape[2]), 0, 1))

    return p.with_(apply=apply)


def hints(p):
    """The target symbol is at the last position of the input, in training and validation."""

    def widen(pair, known=True):
        x, y = pair
        x = x.copy()
        x[:, -1, 5] = (y - 1.5) * 4 if known else 0.0
        return x, y

    return p.with_(train=widen(p.train), validation=widen(p.validation), test=widen(p.test, False))


def shifted_labels(p):
    """Labels from zero, where zero is the blank."""
    down = lambda y: np.where(y > 0, y - 1, 0).astype(np.int32)  # noqa: E731
    return p.with_(train=(p.train[0], down(p.train[1])))


def new_optimizer_every(steps):
    def change(p):
        def tx(hp):
            inner = p.tx(hp)

            def init(params):
                return (inner.init(params), jnp.zeros([], jnp.int32))

            def update(grads, state, params=None):
                old, count = state
                fresh = inner.init(params)
                old = jax.tree.map(lambda a, b: jnp.where(count % steps == 0, a, b), fresh, old)
                updates, new = inner.update(grads, old, params)
                return updates, (new, count + 1)

            return optax.GradientTransformation(init, update)

        return p.with_(tx=tx)

    return change


FAULTS = [
    Fault("underfitting", "no positions", "reversal", without_positions),
    Fault("mask_ignored", "padding in attention and mean", "padded-text", averaged_padding),
    Fault("mask_ignored", "mask inverted", "padded-text", inverted_mask),
    Fault("mask_ignored", "loss on padding", "reversal", loss_on_padding),
    Fault("misaligned_labels", "targets shifted twice", "reversal", targets_not_shifted),
    Fault("vanishing_gradients", "recurrent weights x0.3, 40 steps", "recall-rnn",
          lambda p: longer(p, 40).with_(init=lambda key: recall_init(key, spectral=0.3)), ("bad_initialisation",)),
    Fault("vanishing_gradients", "sigmoid over 60 steps", "recall-rnn",
          lambda p: longer(p).with_(apply=recall_apply(jax.nn.sigmoid)), ("saturated_activations",)),
    Fault("exploding_gradients", "linear state x1.6, no clipping", "recall-rnn",
          lambda p: p.with_(init=lambda key: recall_init(key, spectral=1.6), apply=recall_apply(lambda h: h),
                            tx=without_clipping), ("bad_initialisation",)),
    Fault("exploding_gradients", "rectified state x2, no clipping", "recall-rnn",
          lambda p: p.with_(init=lambda key: recall_init(key, spectral=2.0), apply=recall_apply(jax.nn.relu),
                            tx=without_clipping), ("bad_initialisation",)),
    Fault("saturated_activations", "recurrent weights x10", "recall-rnn",
          lambda p: p.with_(init=lambda key: recall_init(key, spectral=10.0)),
          ("bad_initialisation", "exploding_gradients")),
    Fault("blocked_gradient", "state cut at every step", "recall-rnn", cut_memory),
    Fault("wrong_axis_or_reduction", "reshape mixes batch and time", "digits-gru", first_step),
    Fault("target_leak", "label in the last frame", "recall-rnn", hints),
    Fault("augmentation_breaks_labels", "rows permuted", "digits-gru",
          lambda p: p.with_(augment=lambda key, x, y: (jax.random.permutation(key, x, axis=1, independent=True), y))),
    Fault("label_encoding", "labels from 0, the blank", "phones-ctc", shifted_labels),
    Fault("learning_rate_too_high", "rate x100", "digits-gru", lambda p: p.rate(100)),
    Fault("learning_rate_too_high", "rate x30", "reversal", lambda p: p.rate(30)),
    Fault("learning_rate_too_low", "rate / 1000", "phones-ctc", lambda p: p.rate(1e-3)),
    Fault("schedule_mistimed", "warm-up over 100,000 steps", "reversal",
          lambda p: p.with_(tx=lambda hp: nnlearn.adamw(
              nnlearn.warmup_cosine_decay_schedule(0.0, hp["learning_rate"], 100_000, 200_000)))),
    Fault("frozen_parameters", "everything but the head", "digits-gru",
          lambda p: p.with_(init=lambda key: jax.tree.map(lambda a: 0.3 * a, p.init(key)), tx=lambda hp: optax.chain(
              p.tx(hp), optax.masked(optax.set_to_zero(), {"gru": True, "head": False})))),
    Fault("unshuffled_data", "sorted by class", "digits-gru", lambda p: p.with_(
        train=(lambda order: (p.train[0][order], p.train[1][order]))(np.argsort(p.train[1], kind="stable")),
        shuffle=False)),
    Fault("optimizer_state_reset", "a new optimizer at every step", "reversal", new_optimizer_every(1)),
    Fault("excessive_regularisation", "weight decay 30", "reversal",
          lambda p: p.with_(tx=lambda hp: nnlearn.adamw(hp["learning_rate"] / 3, weight_decay=30.0))),
]  # fmt: skip
