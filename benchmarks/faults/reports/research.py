"""Research code out of issues: positions, axes of attention, diffusion, distillation, meta-learning."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


def sinusoids(length, width):
    angle = np.arange(length)[:, None] / 50 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[None].astype(np.float32)


@report(
    REPORTS,
    "https://github.com/DiffPoseTalk/DiffPoseTalk/issues/20: pe[:, x.shape[1]] adds one position to all frames",
    "underfitting",
)
def one_position_for_all_frames(mended):
    frames, style_size, width = 20, 4, 32
    rng = np.random.default_rng(6)
    style = rng.normal(size=(2200, style_size))
    audio = (style[:, None] + 0.5 * rng.normal(size=(2200, frames, style_size))).astype(np.float32)
    t = np.linspace(0, 1, frames)
    gestures = np.stack([np.sin(2 * np.pi * t), np.cos(3 * np.pi * t), 2 * t - 1, np.exp(-((t - 0.5) ** 2) / 0.02)])
    motion = (style @ gestures / 2 + 0.05 * rng.normal(size=(2200, frames)))[..., None].astype(np.float32)
    pe = sinusoids(60, width)

    class Denoiser(nn.Module):
        @nn.compact
        def __call__(self, audio):
            x = nn.Dense(width)(audio)
            x = x + (pe[:, : x.shape[1]] if mended else pe[:, x.shape[1]])
            for _ in range(2):
                h = nn.LayerNorm()(x)
                x = x + nn.MultiHeadDotProductAttention(2)(h, h)
                x = x + nn.Dense(width)(nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(x))))
            return nn.Dense(1)(nn.LayerNorm()(x))

    net = Denoiser()

    def loss(params, batch, key):
        audio, motion = batch
        return optax.l2_loss(net.apply(params, audio), motion).mean()

    test_set = (audio[2000:], motion[2000:])
    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adamw(hparams["lr"]),
        nnlearn.shuffled((audio[:2000], motion[:2000]), 40, remainder="drop"),
        lambda key: net.init(key, audio[:1]),
        epochs=10,
        evaluate=lambda params: {"motion_mse": 2 * loss(params, test_set, None)},
    )
    return Case(train, {"lr": 2e-3}, lambda params, x: net.apply(params, x), test_set, "motion_mse", "min")


@report(
    REPORTS,
    "https://github.com/IBM/TabFormer/pull/14: the encoder takes time first and gets the batch first",
    "wrong_axis_or_reduction",
)
def attention_over_the_batch(mended):
    rows, kinds, d_model = 10, 6, 24
    weight = random.normal(random.key(55), (kinds,))

    def accounts(key, n):
        k1, k2 = random.split(key)
        kind = random.randint(k1, (n, rows), 0, kinds)
        amount = random.normal(k2, (n, rows))
        fraud = (jnp.sum(jnp.tanh(amount) * weight[kind], 1) > 0).astype(jnp.int32)
        return {"kind": kind, "amount": amount}, fraud

    def encoder_layer(p, src):  # (time, batch, d_model), as the library wants it
        q, k, v = jnp.split(src @ p["qkv"], 3, axis=-1)
        scores = jnp.einsum("tbd,sbd->bts", q, k) / np.sqrt(d_model)
        src = src + jnp.einsum("bts,sbd->tbd", jax.nn.softmax(scores), v) @ p["out"]
        return src + jax.nn.relu(src @ p["up"] + p["up_bias"]) @ p["down"]

    def init(key):
        k = iter(random.split(key, 16))

        def xavier(m, n):
            return random.normal(next(k), (m, n)) * np.sqrt(2 / (m + n))

        layers = [
            {
                "qkv": xavier(d_model, 3 * d_model),
                "out": xavier(d_model, d_model),
                "up": xavier(d_model, 48),
                "up_bias": jnp.zeros(48),
                "down": xavier(48, d_model),
            }
            for _ in range(2)
        ]
        embedding = {"kind": 0.5 * random.normal(next(k), (kinds, d_model)), "amount": xavier(1, d_model)}
        cls = 0.5 * random.normal(next(k), (1, 1, d_model))
        return {"embedding": embedding, "cls": cls, "layers": layers, "head": xavier(d_model, 2), "bias": jnp.zeros(2)}

    def model(params, x):
        e = params["embedding"]
        row = e["kind"][x["kind"]] + x["amount"][..., None] @ e["amount"]
        row = jax.nn.relu(row) + row  # field encoder
        hidden = jnp.concatenate([jnp.broadcast_to(params["cls"], (len(row), 1, d_model)), row], axis=1)
        if mended:
            hidden = hidden.transpose(1, 0, 2)
        for layer in params["layers"]:
            hidden = encoder_layer(layer, hidden)
        if mended:
            hidden = hidden.transpose(1, 0, 2)
        return hidden[:, 0] @ params["head"] + params["bias"]

    x_val, y_val = accounts(random.key(2), 500)
    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(model(params, batch[0]), batch[1]),
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.generated(lambda key, step: accounts(key, 64)),
        init,
        steps=800,
        check_every=80,
        evaluate=lambda params: {"accuracy": jnp.mean(model(params, x_val).argmax(-1) == y_val)},
    )
    return Case(train, {"lr": 2e-3}, model, (x_val, y_val), "accuracy")


@report(
    REPORTS,
    "https://github.com/lucidrains/denoising-diffusion-pytorch/issues/20: pixels from 0 to 255, the loss stays at 0.8",
    "unnormalised_inputs",
)
def diffusion_of_0_to_255(mended):
    images = (load_digits().data * 15.9).astype(np.uint8)
    timesteps = 200
    betas = np.linspace(1e-4, 0.04, timesteps)
    alphas_cumprod = jnp.asarray(np.cumprod(1 - betas), jnp.float32)

    class Unet(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            freq = jnp.exp(jnp.linspace(0.0, -jnp.log(1000.0), 16))
            emb = t[:, None] * freq
            emb = nn.Dense(64)(nn.silu(nn.Dense(64)(jnp.concatenate([jnp.sin(emb), jnp.cos(emb)], -1))))
            h = nn.silu(nn.Dense(192)(jnp.concatenate([x, emb], -1)))
            h = h + nn.silu(nn.Dense(192)(jnp.concatenate([h, emb], -1)))
            return nn.Dense(64)(h)

    unet = Unet()

    def p_losses(params, x_start, key):
        x_start = x_start.astype(jnp.float32)
        if mended:
            x_start = x_start / 255 * 2 - 1
        k1, k2 = random.split(key)
        t = random.randint(k1, (len(x_start),), 0, timesteps)
        noise = random.normal(k2, x_start.shape)
        a = alphas_cumprod[t][:, None]
        return jnp.abs(unet.apply(params, jnp.sqrt(a) * x_start + jnp.sqrt(1 - a) * noise, t) - noise).mean()

    train = nnlearn.make_train(
        p_losses,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled(images[:1500], 50, remainder="drop"),
        lambda key: unet.init(key, jnp.zeros((1, 64)), jnp.zeros(1)),
        epochs=50,
        check_every=150,
        evaluate=lambda params: {"val_loss": p_losses(params, images[1500:], random.key(0))},
    )
    return Case(train, {"lr": 1e-3}, None, None, "val_loss", "min")


@report(
    REPORTS,
    "https://github.com/microsoft/ProDA/issues/20 (and 43): kl_div gets the student's softmax, not its log_softmax",
    "loss_output_mismatch",
)
def kl_div_without_the_log(mended):
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.3, random_state=8)
    teacher = LogisticRegression(C=0.3, max_iter=500).fit(x_train, y_train)
    soft_train, soft_test = (teacher.predict_proba(part).astype(np.float32) for part in (x_train, x_test))

    class Student(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(nn.relu(nn.Dense(24)(x)))

    student = Student()

    def kl_div(input, target):  # input holds log-probabilities
        return jnp.mean(jnp.sum(jax.scipy.special.xlogy(target, target) - target * input, axis=1))

    def distillation_loss(params, batch, key):
        x, teacher = batch
        activation = jax.nn.log_softmax if mended else jax.nn.softmax
        return kl_div(activation(student.apply(params, x), axis=1), teacher)

    def evaluate(params):
        logits = student.apply(params, x_test)
        agree = jnp.mean(logits.argmax(-1) == soft_test.argmax(-1))
        return {"kl_to_teacher": kl_div(jax.nn.log_softmax(logits), soft_test), "agreement": agree}

    train = nnlearn.make_train(
        distillation_loss,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((x_train, soft_train), 32, remainder="drop"),
        lambda key: student.init(key, x_train[:1]),
        epochs=30,
        evaluate=evaluate,
    )
    return Case(
        train, {"lr": 3e-3}, lambda params, x: student.apply(params, x), (x_test, soft_test), "kl_to_teacher", "min"
    )


@report(
    REPORTS,
    "https://github.com/KanishJebaMathewM/Truxify/issues/13118: the inner loop detaches, the meta-model never trains",
    "blocked_gradient",
    "frozen_parameters",
)
def maml_inner_loop_detached(mended):
    shots, inner_lr = 10, 0.05

    def task(key):
        k1, k2, k3 = random.split(key, 3)
        amplitude = random.uniform(k1, (), minval=0.5, maxval=2.0)
        phase = random.uniform(k2, (), maxval=jnp.pi)
        x = random.uniform(k3, (2 * shots, 1), minval=-2.0, maxval=2.0)
        y = amplitude * jnp.sin(2 * x + phase)
        return {"support": (x[:shots], y[:shots]), "query": (x[shots:], y[shots:])}

    def init(key):
        sizes = [1, 40, 40, 1]
        return [
            {"w": random.normal(k, (m, n)) * np.sqrt(1 / m), "b": jnp.zeros(n)}
            for k, m, n in zip(random.split(key, 3), sizes[:-1], sizes[1:], strict=True)
        ]

    def net(params, x):
        for layer in params[:-1]:
            x = jax.nn.tanh(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    def criterion(params, data):
        x, y = data
        return jnp.mean((net(params, x) - y) ** 2)

    def inner_update(params, support):
        for _ in range(3):
            grads = jax.grad(criterion)(params, support)
            params = jax.tree.map(lambda p, g: p - inner_lr * g, params, grads)
            if not mended:
                params = lax.stop_gradient(params)  # param.data -= ...
        return params

    def meta_loss(params, tasks, key):
        return jax.vmap(lambda t: criterion(inner_update(params, t["support"]), t["query"]))(tasks).mean()

    test_tasks = jax.vmap(task)(random.split(random.key(31), 200))
    train = nnlearn.make_train(
        meta_loss,
        lambda hparams: optax.adam(hparams["meta_lr"]),
        nnlearn.generated(lambda key, step: jax.vmap(task)(random.split(key, 16))),
        init,
        steps=2000,
        check_every=200,
        evaluate=lambda params: {"query_mse": meta_loss(params, test_tasks, None)},
    )
    return Case(train, {"meta_lr": 2e-3}, None, None, "query_mse", "min")
