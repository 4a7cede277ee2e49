"""Healthy programs of examples: binary addition, policy gradient, flow, bags, metric learning."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from sklearn.datasets import load_digits, make_moons

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS, "https://github.com/dikshant2210/SS19 an RNN adds two binary strings, least significant bit first: healthy"
)
def rnn_adds_binary_strings(mended):
    bits = 8
    place = 2 ** np.arange(bits)

    def sums(key, count):
        numbers = random.randint(key, (count, 2), 0, 2 ** (bits - 1))
        as_bits = (numbers[:, :, None] // place) % 2
        total = (numbers.sum(1)[:, None] // place) % 2
        return as_bits.transpose(0, 2, 1).astype(jnp.float32), total.astype(jnp.float32)

    x_test, y_test = sums(random.key(99), 400)

    class Adder(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.SimpleCell(16))(x)
            return nn.Dense(1)(x)[..., 0]

    adder = Adder()

    def loss(params, batch, key):
        x, y = batch
        return optax.sigmoid_binary_cross_entropy(adder.apply(params, x), y).mean()

    def evaluate(params):
        right = (adder.apply(params, x_test) > 0) == (y_test > 0.5)
        return {"bits": right.mean(), "strings": jnp.all(right, axis=1).mean()}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(hp["lr"])),
        nnlearn.generated(lambda key, step: sums(key, 32)),
        lambda key: adder.init(key, x_test[:1]),
        steps=1500,
        check_every=100,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.01}, adder.apply, (x_test, y_test), "bits")


@report(
    REPORTS,
    "https://spinningup.openai.com/en/latest/spinningup/rl_intro3.html simple policy gradient, pole on a cart: healthy",
)
def pole_on_a_cart_policy_gradient(mended):
    horizon, episodes = 200, 24

    def init(key):
        return eqx.filter(eqx.nn.MLP(4, 2, 24, 1, jnp.tanh, key=key), eqx.is_array)

    static = eqx.filter(eqx.nn.MLP(4, 2, 24, 1, jnp.tanh, key=random.key(0)), eqx.is_array, inverse=True)

    def physics(state, action):
        x, v, angle, spin = state
        force = jnp.where(action == 1, 10.0, -10.0)
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        temp = (force + 0.05 * spin**2 * sin) / 1.1
        spin_acc = (9.8 * sin - cos * temp) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        acc = temp - 0.05 * spin_acc * cos / 1.1
        return jnp.stack([x + 0.02 * v, v + 0.02 * acc, angle + 0.02 * spin, spin + 0.02 * spin_acc])

    def episode(params, key):
        policy = eqx.combine(params, static)
        k_start, k_run = random.split(key)

        def step(carry, k):
            state, alive = carry
            logits = policy(state)
            action = random.categorical(k, logits)
            logp = jax.nn.log_softmax(logits)[action]
            new = physics(state, action)
            still = alive & (jnp.abs(new[0]) < 2.4) & (jnp.abs(new[2]) < 0.21)
            return (jnp.where(still, new, state), still), (logp, alive.astype(jnp.float32))

        start = random.uniform(k_start, (4,), minval=-0.05, maxval=0.05)
        return jax.lax.scan(step, (start, jnp.array(True)), random.split(k_run, horizon))[1]

    def loss(params, keys, key):
        logp, reward = jax.vmap(episode, (None, 0))(params, keys)
        to_go = jnp.cumsum(reward[:, ::-1], axis=1)[:, ::-1]
        baseline = jnp.sum(to_go * reward, axis=0) / jnp.maximum(reward.sum(0), 1)
        advantage = jax.lax.stop_gradient((to_go - baseline) / 20)
        return -jnp.sum(logp * advantage * reward) / jnp.sum(reward)

    def evaluate(params):
        reward = jax.vmap(episode, (None, 0))(params, random.split(random.key(5), 32))[1]
        return {"return": reward.sum(1).mean()}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.generated(lambda key, step: random.split(key, episodes)),
        init,
        steps=120,
        check_every=10,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.01}, None, None, "return")


@report(REPORTS, "https://keras.io/examples/generative/real_nvp/ density of two moons: healthy")
def real_nvp_on_two_moons(mended):
    moons = make_moons(2400, noise=0.1, random_state=0)[0].astype(np.float32)
    moons = (moons - moons.mean(0)) / moons.std(0)
    seen, new = moons[:2000], moons[2000:]
    couplings = 6
    masks = np.float32([[0, 1], [1, 0]] * (couplings // 2))

    class Coupling(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(32)(x))
            x = nn.relu(nn.Dense(32)(x))
            shift = nn.Dense(2, kernel_init=nn.initializers.normal(0.01))(x)
            log_scale = nn.tanh(nn.Dense(2, kernel_init=nn.initializers.normal(0.01))(x))
            return shift, log_scale

    class RealNVP(nn.Module):
        @nn.compact
        def __call__(self, x):
            log_det = 0.0
            for mask in masks:
                shift, log_scale = Coupling()(x * mask)
                free = 1 - mask
                x = x * mask + free * (x * jnp.exp(log_scale) + shift)
                log_det += jnp.sum(free * log_scale, axis=-1)
            log_normal = -0.5 * jnp.sum(x**2, axis=-1) - jnp.log(2 * jnp.pi)
            return log_normal + log_det

    flow = RealNVP()

    def nll(params, batch, key=None):
        return -jnp.mean(flow.apply(params, batch))

    train = nnlearn.make_train(
        nll,
        lambda hp: optax.chain(optax.clip_by_global_norm(2.0), optax.adam(optax.cosine_decay_schedule(hp["lr"], 1200))),
        nnlearn.shuffled(seen, 100, remainder="drop"),
        lambda key: flow.init(key, seen[:1]),
        epochs=60,
        check_every=60,
        evaluate=lambda params: {"nll": nll(params, new)},
    )
    return Case(train, {"lr": 0.002}, None, None, "nll", mode="min")


@report(
    REPORTS, "https://keras.io/examples/vision/attention_mil_classification/ is a certain digit in the bag? healthy"
)
def attention_over_bags_of_digits(mended):
    digits = load_digits()
    pixels = (digits.data / 16).astype(np.float32)

    def bags(rows, count, seed):
        rng = np.random.default_rng(seed)
        nines, others = rows[digits.target[rows] == 9], rows[digits.target[rows] != 9]
        label = rng.integers(0, 2, count)
        chosen = rng.choice(others, (count, 5))
        chosen[label == 1, 0] = rng.choice(nines, int(label.sum()))
        return pixels[rng.permuted(chosen, axis=1)], label.astype(np.float32)

    rows = np.random.RandomState(1).permutation(len(pixels))
    train_bags, test_bags = bags(rows[:1300], 5000, 2), bags(rows[1300:], 400, 3)

    class Bag(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dropout(0.15, deterministic=not train)(x)
            h = nn.relu(nn.Dense(32)(x))
            h = nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Dense(24)(h)))
            gate = nn.tanh(nn.Dense(24)(h)) * nn.sigmoid(nn.Dense(24)(h))
            attention = nn.softmax(nn.Dense(1, use_bias=False)(gate), axis=1)
            return nn.Dense(1)(jnp.sum(attention * h, axis=1))[:, 0]

    net = Bag()

    def loss(params, batch, key):
        x, y = batch
        logit = net.apply(params, x, train=True, rngs={"dropout": key})
        return nnlearn.sigmoid_binary_cross_entropy(logit, y).mean()

    def metrics(params, batch):
        x, y = batch.examples
        logit = net.apply(params, x)
        return {
            "val_loss": jnp.mean(nnlearn.sigmoid_binary_cross_entropy(logit, y), where=batch.where),
            "accuracy": jnp.mean((logit > 0) == (y > 0.5), where=batch.where),
        }

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adamw(hp["lr"], weight_decay=0.05),
        nnlearn.shuffled(train_bags, 25, remainder="drop"),
        lambda key: net.init(key, train_bags[0][:1]),
        epochs=4,
        check_every=100,
        evaluate=nnlearn.evaluation(metrics, test_bags),
    )

    def predict(params, x, key=None):
        return net.apply(params, x) if key is None else net.apply(params, x, train=True, rngs={"dropout": key})

    return Case(train, {"lr": 0.003}, predict, test_bags, "accuracy")


@report(
    REPORTS,
    "https://keras.io/examples/vision/metric_learning/ anchors and positives of all classes, cosine similarity: "
    "healthy",
)
def anchors_and_positives(mended):
    digits = load_digits()
    x = (digits.data / 16).astype(np.float32)
    order = np.random.RandomState(4).permutation(len(x))
    x, y = x[order], digits.target[order]
    members = np.stack([np.flatnonzero(y[:1300] == c)[:110] for c in range(10)])

    def pairs(key, step):
        k1, k2 = random.split(key)
        pick = lambda k: jnp.take_along_axis(jnp.asarray(members), random.randint(k, (10, 1), 0, 110), 1)[:, 0]  # noqa: E731
        return jnp.asarray(x)[pick(k1)], jnp.asarray(x)[pick(k2)]

    def init(key):
        k1, k2 = random.split(key)
        he = jax.nn.initializers.he_normal()
        return {"w": he(k1, (64, 64)), "b": jnp.zeros(64), "v": he(k2, (64, 8))}

    def embed(params, x):
        z = jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"]
        return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

    def loss(params, batch, key):
        anchors, positives = batch
        similarities = embed(params, anchors) @ embed(params, positives).T / 0.2
        return optax.softmax_cross_entropy_with_integer_labels(similarities, jnp.arange(10)).mean()

    def evaluate(params):
        nearest = jnp.argmax(embed(params, x[1300:]) @ embed(params, x[:1300]).T, axis=1)
        return {"accuracy": jnp.mean(jnp.asarray(y)[nearest] == y[1300:])}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.generated(pairs),
        init,
        steps=1000,
        check_every=100,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.001}, None, None, "accuracy")
