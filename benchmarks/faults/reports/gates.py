"""Issues of research repositories: clipped errors, gates, masks, mixed pictures, contrastive views."""

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


def linear(key, m, n, gain=2.0):
    return {"w": random.normal(key, (m, n)) * (gain / m) ** 0.5, "b": jnp.zeros(n)}


def apply(layer, x):
    return x @ layer["w"] + layer["b"]


@report(
    REPORTS,
    "https://github.com/devsisters/DQN-tensorflow/issues/16: the TD error goes through clip_by_value before the "
    "square, so the gradient is zero where the error is large; a Huber loss is meant",
    "blocked_gradient",
    "clipping_too_tight",
)
def td_error_through_clip_by_value(mended):
    moves, gamma, goal = jnp.array([-0.1, 0.0, 0.1]), 0.9, 0.9

    def environment(x, action):
        after = jnp.clip(x + moves[action], -1.0, 1.0)
        done = after > goal
        return after, jnp.where(done, 10.0, -0.1), done

    def init(key):
        k1, k2, k3 = random.split(key, 3)
        return {"l1": linear(k1, 1, 64), "l2": linear(k2, 64, 64), "q": linear(k3, 64, 3, 0.1)}

    def q_values(params, x):
        h = jax.nn.relu(apply(params["l1"], x[:, None]))
        return apply(params["q"], jax.nn.relu(apply(params["l2"], h)))

    def replay(key, step):
        k1, k2 = random.split(key)
        x = random.uniform(k1, (64,), minval=-1.0, maxval=goal)
        action = random.randint(k2, (64,), 0, 3)
        after, reward, done = environment(x, action)
        return {"x": x, "action": action, "reward": reward, "after": after, "done": done}

    def loss(params, batch, key):
        bootstrap = lax.stop_gradient(q_values(params, batch["after"]).max(-1))
        target = batch["reward"] + gamma * jnp.where(batch["done"], 0.0, bootstrap)
        q_acted = jnp.take_along_axis(q_values(params, batch["x"]), batch["action"][:, None], 1)[:, 0]
        delta = target - q_acted
        if mended:
            return optax.huber_loss(q_acted, target).mean()
        return jnp.mean(jnp.square(jnp.clip(delta, -1.0, 1.0)))

    starts = jnp.linspace(-0.95, 0.85, 64)

    def returns(params):
        def turn(carry, _):
            x, alive, total = carry
            after, reward, done = environment(x, q_values(params, x).argmax(-1))
            return (after, alive & ~done, total + jnp.where(alive, reward, 0.0)), None

        (_, _, total), _ = lax.scan(turn, (starts, starts < goal, jnp.zeros(64)), None, length=30)
        return {"return": total.mean()}

    train = nnlearn.make_train(
        loss,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.generated(replay),
        init,
        steps=2000,
        check_every=200,
        evaluate=returns,
    )
    return Case(train, {"lr": 1e-3}, None, None, "return")


@report(
    REPORTS,
    "https://github.com/tensorflow/similarity/issues/237: l2_normalize without axis=-1 divides the embeddings by the "
    "norm of the whole batch; the SimCLR loss stays high",
    "wrong_axis_or_reduction",
)
def l2_normalize_without_axis(mended):
    rng = np.random.default_rng(8)
    tones = rng.uniform(1.0, 8.0, size=(1800, 3, 1))
    t = np.linspace(0, 1, 56)
    phases = rng.uniform(0, 2 * np.pi, size=(1800, 3, 1))
    records = (rng.uniform(0.5, 1.5, (1800, 3, 1)) * np.sin(2 * np.pi * tones * t + phases)).sum(1)[..., None]
    records = records.astype(np.float32)

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(16, (8,), strides=(4,))(x))
            x = nn.relu(nn.Dense(96)(x.reshape(len(x), -1)))
            return nn.Dense(32)(x)

    net = Encoder()

    def view(key, x):
        k1, k2 = random.split(key)
        starts = random.randint(k1, (len(x),), 0, 8)
        crops = jax.vmap(lambda row, s: lax.dynamic_slice_in_dim(row, s, 48))(x, starts)
        return crops + 0.3 * random.normal(k2, crops.shape)

    def similarities(params, x, key):
        ka, kb = random.split(key)
        za, zb = net.apply(params, view(ka, x)), net.apply(params, view(kb, x))
        axis = -1 if mended else None
        za = za / jnp.linalg.norm(za, axis=axis, keepdims=True)
        zb = zb / jnp.linalg.norm(zb, axis=axis, keepdims=True)
        return za @ zb.T / 0.1

    def nt_xent(params, x, key):
        logits, labels = similarities(params, x, key), jnp.arange(len(x))
        a = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        b = optax.softmax_cross_entropy_with_integer_labels(logits.T, labels)
        return jnp.mean(a + b) / 2

    held_out = records[1600:]

    def matches(params):
        logits = similarities(params, held_out, random.key(99))
        return {"matched": jnp.mean(logits.argmax(-1) == jnp.arange(len(held_out)))}

    train = nnlearn.make_train(
        nt_xent,
        lambda hparams: optax.adam(hparams["learning_rate"]),
        nnlearn.shuffled(records[:1600], 64, remainder="drop"),
        lambda key: net.init(key, jnp.zeros((1, 48, 1))),
        epochs=20,
        evaluate=matches,
    )
    return Case(train, {"learning_rate": 1e-3}, None, None, "matched")


@report(
    REPORTS,
    "https://github.com/davidmrau/mixture-of-experts/issues/27: softmax over the top-k logits; with k = 1 the gate's "
    "weight is always 1 and w_gate has zero gradient (also jingyaogong/minimind#859)",
    "blocked_gradient",
    "frozen_parameters",
)
def gate_of_the_single_expert(mended):
    rng = np.random.default_rng(3)
    features, experts = 6, 6
    centers = 2.5 * rng.normal(size=(experts, features))
    weights = rng.normal(size=(experts, features))
    kind = rng.integers(experts, size=6000)
    x = (centers[kind] + rng.normal(size=(6000, features))).astype(np.float32)
    y = np.einsum("nd,nd->n", x - centers[kind], weights[kind]) + 2 * np.tanh(weights[kind, 0])
    x, y = x / 2.5, ((y - y.mean()) / y.std()).astype(np.float32)

    def init(key):
        k1, k2 = random.split(key)
        return {
            "w_gate": 0.3 * random.normal(k1, (features, experts)),
            "experts": random.normal(k2, (experts, features)) * features**-0.5,
            "biases": jnp.zeros(experts),
        }

    def model(params, x):
        logits = x @ params["w_gate"]
        if mended:
            gates, top = lax.top_k(jax.nn.softmax(logits, axis=1), 2)
            gates = gates / gates.sum(1, keepdims=True)
        else:
            top_logits, top = lax.top_k(logits, 1)
            gates = jax.nn.softmax(top_logits, axis=1)
        each = x @ params["experts"].T + params["biases"]
        return jnp.sum(gates * jnp.take_along_axis(each, top, axis=1), axis=1)

    def mse(params, batch, key):
        return jnp.mean((model(params, batch[0]) - batch[1]) ** 2)

    test = (x[5000:], y[5000:])
    train = nnlearn.make_train(
        mse,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((x[:5000], y[:5000]), 100, remainder="drop"),
        init,
        epochs=40,
        evaluate=lambda params: {"mse": mse(params, test, None)},
    )
    return Case(train, {"lr": 5e-3}, model, test, "mse", "min")


@report(
    REPORTS,
    "https://github.com/milesial/Pytorch-UNet/issues/78 (and 84, 320): the loss is negative; the masks are 0 and 255 "
    "where the binary cross-entropy wants 0 and 1",
    "label_encoding",
    "unnormalised_targets",
)
def masks_of_0_and_255(mended):
    rng = np.random.default_rng(21)
    size = 12
    rows, columns = np.mgrid[:size, :size]
    centers, radius = rng.uniform(3, size - 3, (900, 2, 1, 1)), rng.uniform(2, 4, (900, 1, 1))
    inside = (rows - centers[:, 0]) ** 2 + (columns - centers[:, 1]) ** 2 < radius**2
    images = (0.3 + 0.3 * inside + 0.15 * rng.normal(size=inside.shape)).clip(0, 1)[..., None].astype(np.float32)
    masks = (255 * inside).astype(np.uint8)

    def preprocess(mask):
        mask = mask.astype(np.float32)[..., None]
        return mask / 255 if mended else mask

    class TinyUNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x1 = nn.relu(nn.Conv(8, (3, 3))(x))
            x2 = nn.relu(nn.Conv(16, (3, 3))(nn.avg_pool(x1, (2, 2), (2, 2))))
            x3 = jnp.repeat(jnp.repeat(x2, 2, axis=1), 2, axis=2)
            return nn.Conv(1, (3, 3))(jnp.concatenate([x1, x3], axis=-1))

    unet = TinyUNet()

    def criterion(params, batch, key):
        images, masks = batch
        return optax.sigmoid_binary_cross_entropy(unet.apply(params, images), masks).mean()

    def dice(params, batch):
        images, masks = batch.examples
        predicted, true = unet.apply(params, images) > 0, masks > 0
        overlap = 2 * jnp.sum(predicted & true, axis=(1, 2, 3)) / jnp.sum(predicted * 1 + true, axis=(1, 2, 3))
        return {"dice": jnp.mean(overlap, where=batch.where)}

    test = (images[700:], preprocess(masks[700:]))
    train = nnlearn.make_train(
        criterion,
        lambda hparams: optax.rmsprop(hparams["lr"]),
        nnlearn.shuffled((images[:700], preprocess(masks[:700])), 20, remainder="drop"),
        lambda key: unet.init(key, images[:1]),
        epochs=8,
        evaluate=nnlearn.evaluation(dice, test),
    )
    return Case(train, {"lr": 3e-3}, lambda params, x: unet.apply(params, x), test, "dice")


@report(
    REPORTS,
    "https://github.com/sayakpaul/FunMatch-Distillation/issues/1 (also USCL#3, tsai#791): mixup mixes the pictures and "
    "returns the labels as they were",
    "augmentation_breaks_labels",
    "label_noise",
)
def mixup_of_pictures_only(mended):
    pixels, digit = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(pixels, np.eye(10, dtype=np.float32)[digit], random_state=4)

    def mixup(key, images, labels):
        alpha = random.uniform(key)
        mixed = alpha * images + (1 - alpha) * images[::-1]
        return mixed, (alpha * labels + (1 - alpha) * labels[::-1] if mended else labels)

    class Student(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (128, 128):
                x = nn.relu(nn.Dense(features)(x))
            return nn.Dense(10)(x)

    student = Student()

    def loss(params, batch, key):
        images, labels = mixup(key, *batch)
        return optax.softmax_cross_entropy(student.apply(params, images), labels).mean()

    def evaluate(params, batch):
        images, labels = batch.examples
        logits = student.apply(params, images)
        return {
            "loss": jnp.mean(optax.softmax_cross_entropy(logits, labels), where=batch.where),
            "accuracy": jnp.mean(logits.argmax(-1) == labels.argmax(-1), where=batch.where),
        }

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled((x_train, y_train), 32, remainder="drop"),
        lambda key: student.init(key, x_train[:1]),
        epochs=40,
        evaluate=nnlearn.evaluation(evaluate, (x_test, y_test)),
    )
    return Case(train, {"lr": 1e-3}, lambda p, x: student.apply(p, x), (x_test, y_test), "loss", "min")
