"""Training loops: frozen parts, accumulated gradients, sampled episodes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/harvitronix/five-video-classification-methods/pull/26: "
    "the new layers are frozen together with the base",
    "frozen_parameters",
)
def fine_tuning_all_frozen(mended):
    X, y = datasets.load_digits(return_X_y=True)
    X = X / 16
    x_train, x_test, y_train, y_test = train_test_split(X, y, test_size=0.25, random_state=0)
    pca = PCA(40, whiten=True, random_state=0).fit(x_train)  # in place of a downloaded model
    base = {"kernel": jnp.asarray(pca.components_.T / np.sqrt(pca.explained_variance_)), "mean": jnp.asarray(pca.mean_)}

    def init(key):
        k1, k2 = jax.random.split(key)
        g = jax.nn.initializers.glorot_uniform()
        return {
            "base": base,
            "top": {
                "fc": {"w": g(k1, (40, 64)), "b": jnp.zeros(64)},
                "predictions": {"w": g(k2, (64, 10)), "b": jnp.zeros(10)},
            },
        }

    def model(params, x):
        x = jnp.tanh((x - params["base"]["mean"]) @ params["base"]["kernel"])
        x = jax.nn.relu(x @ params["top"]["fc"]["w"] + params["top"]["fc"]["b"])
        return x @ params["top"]["predictions"]["w"] + params["top"]["predictions"]["b"]

    def trainable(params):
        top = "train" if mended else "freeze"
        return {
            "base": jax.tree.map(lambda _: "freeze", params["base"]),
            "top": jax.tree.map(lambda _: top, params["top"]),
        }

    def make_tx(hp):
        return optax.multi_transform({"train": optax.rmsprop(hp["lr"]), "freeze": optax.set_to_zero()}, trainable)

    def loss_fn(params, batch, key):
        x, y = batch
        return nnlearn.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()

    def evaluate(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(model(params, x).argmax(1) == y, where=batch.where)}

    train = nnlearn.make_train(
        loss_fn,
        make_tx,
        nnlearn.shuffled((x_train, y_train), 32, remainder="drop"),
        init,
        epochs=15,
        evaluate=nnlearn.evaluation(evaluate, (x_test, y_test)),
    )
    return Case(train, {"lr": 1e-3}, model, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://github.com/google-deepmind/optax/issues/296 and https://github.com/netket/netket/issues/916: "
    "optax.masked passes the gradients of the rest unchanged: the frozen part climbs",
    "sign_error",
    "learning_rate_too_high",
    "exploding_gradients",
)
def optax_masked_does_not_freeze(mended):
    digits = datasets.load_digits()
    x, y = digits.data / 16, digits.target
    pca = PCA(24, random_state=0).fit(x)

    def init(key):  # "pretrained" features, new head
        backbone = {"kernel": jnp.asarray(pca.components_.T, jnp.float32), "shift": jnp.asarray(pca.mean_, jnp.float32)}
        return {
            "backbone": backbone,
            "head": {"kernel": 0.05 * jax.random.normal(key, (24, 10)), "bias": jnp.zeros(10)},
        }

    def model(params, x):
        features = (x - params["backbone"]["shift"]) @ params["backbone"]["kernel"]
        return features @ params["head"]["kernel"] + params["head"]["bias"]

    def loss(params, batch, key):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()

    if not mended:
        tx = optax.masked(optax.adam(1e-2), {"backbone": False, "head": True})  # train the head only
    else:
        tx = optax.multi_transform(
            {"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, {"backbone": "freeze", "head": "train"}
        )

    train = nnlearn.make_train(
        loss,
        tx,
        nnlearn.shuffled((x[:1300], y[:1300]), 64, remainder="drop"),
        init,
        epochs=40,
        evaluate=lambda params: {"top1": jnp.mean(model(params, x[1300:]).argmax(-1) == y[1300:])},
    )
    return Case(train, {}, model, (x[1300:], y[1300:]), "top1")


@report(
    REPORTS,
    "https://github.com/borisdayma/dalle-mini/pull/122 and https://github.com/google-deepmind/optax/pull/596: "
    "optax.apply_every adds the updates of k batches: a rate k times too high; MultiSteps averages",
    "gradient_accumulation",
    "learning_rate_too_high",
)
def apply_every_sums(mended):
    data = datasets.load_diabetes(scaled=True)
    x = data.data * np.sqrt(len(data.data))
    y = (data.target - data.target.mean()) / data.target.std()
    x_train, x_test, y_train, y_test = x[:360], x[360:], y[:360], y[360:]

    def init(key):
        a, b = jax.random.split(key)
        return {
            "w1": jax.random.normal(a, (10, 16)) / np.sqrt(10),
            "b1": jnp.zeros(16),
            "w2": jax.random.normal(b, (16,)) / 4,
            "b2": jnp.zeros(()),
        }

    def f(p, x):
        return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    def loss(p, batch, key):
        x, y = batch
        return 0.5 * jnp.mean((f(p, x) - y) ** 2)

    if not mended:
        tx = optax.chain(optax.sgd(0.1), optax.apply_every(k=30))
    else:
        tx = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=30).gradient_transformation()
    train = nnlearn.make_train(
        loss,
        tx,
        nnlearn.shuffled((x_train, y_train), 4, remainder="drop"),
        init,
        epochs=30,
        evaluate=lambda p: {"mse": jnp.mean((f(p, x_test) - y_test) ** 2)},
    )
    return Case(train, {}, f, (x_test, y_test), "mse", "min")


@report(
    REPORTS,
    "https://datascience.stackexchange.com/questions/57114: log_prob * reward is minimised: the reward falls",
    "sign_error",
)
def reinforce_without_minus(mended):
    n_state, n_action, horizon, gamma = 9, 2, 12, 0.95  # a corridor of 9 cells, the reward is at the right end

    def init(key):
        k1, k2 = jax.random.split(key)
        return {
            "affine1": 0.3 * jax.random.normal(k1, (n_state, 32)),
            "action_head": 0.1 * jax.random.normal(k2, (32, n_action)),
        }

    def policy(params, state):
        return jax.nn.relu(jax.nn.one_hot(state, n_state) @ params["affine1"]) @ params["action_head"]

    def episode(params, state, key):
        def step(state, key):
            action = jax.random.categorical(key, jax.lax.stop_gradient(policy(params, state)))
            new = jnp.clip(state + 2 * action - 1, 0, n_state - 1)
            return new, (state, action, jnp.where(new == n_state - 1, 1.0, -0.1))

        return jax.lax.scan(step, state, jax.random.split(key, horizon))[1]

    def policy_loss(params, start, key):
        states, actions, rewards = jax.vmap(lambda s, k: episode(params, s, k))(
            start, jax.random.split(key, len(start))
        )
        returns = jax.lax.scan(lambda g, r: (r + gamma * g,) * 2, jnp.zeros(len(start)), rewards.T, reverse=True)[1].T
        returns = (returns - returns.mean()) / (returns.std() + 1e-6)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(policy(params, states)), actions[..., None], -1)[..., 0]
        loss = jnp.mean(jnp.sum(log_prob * returns, axis=1))
        return (-loss if mended else loss), {"reward": rewards.sum(1).mean()}

    def evaluate(params):
        _, _, rewards = jax.vmap(lambda s, k: episode(params, s, k))(
            jnp.arange(64) % (n_state - 1), jax.random.split(jax.random.key(7), 64)
        )
        return {"reward": rewards.sum(1).mean()}

    train = nnlearn.make_train(
        policy_loss,
        optax.adam(1e-2),
        nnlearn.generated(lambda key, step: jax.random.randint(key, (32,), 0, n_state - 1)),
        init,
        steps=300,
        evaluate=evaluate,
        check_every=50,
    )
    return Case(train, {}, None, None, "reward")
