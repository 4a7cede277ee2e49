"""Training code of issues: precision, quantised weights, policies, batch norm, shuffling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from sklearn.datasets import load_digits, load_iris
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/qualcomm/aimet/issues/236: the quantize op of the weights has no straight-through gradient",
    "blocked_gradient",
    "frozen_parameters",
)
def quantised_weights_rounded(mended):
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=4)
    levels = 7

    def init(key):
        sizes = [64, 48, 10]
        keys = random.split(key, 2)
        return [
            {"kernel": random.normal(k, (m, n)) * (2 / m) ** 0.5, "bias": jnp.zeros(n)}
            for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    def fake_quant(w):
        scale = lax.stop_gradient(jnp.max(jnp.abs(w))) / levels
        q = jnp.clip(jnp.round(w / scale), -levels, levels) * scale
        return w + lax.stop_gradient(q - w) if mended else q

    def forward(params, x):
        h = jax.nn.relu(x @ fake_quant(params[0]["kernel"]) + params[0]["bias"])
        return h @ fake_quant(params[1]["kernel"]) + params[1]["bias"]

    def accuracy(params, batch):
        x, y = batch.examples
        return {"top1": jnp.mean(forward(params, x).argmax(-1) == y, where=batch.where)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(forward(params, batch[0]), batch[1]),
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((x_train, y_train), 64, remainder="drop"),
        init,
        epochs=25,
        evaluate=nnlearn.evaluation(accuracy, (x_test, y_test)),
    )
    return Case(train, {"lr": 2e-3}, forward, (x_test, y_test), "top1")


@report(
    REPORTS,
    "https://github.com/meta-pytorch/torchtune/issues/2254: very bad convergence with parameters in bfloat16",
    "numerical_precision",
)
def parameters_in_bfloat16(mended):
    x, y = load_digits(return_X_y=True)
    x = ((x - x.mean()) / x.std()).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=400, random_state=2)

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32 if mended else jnp.bfloat16}
            x = nn.gelu(nn.Dense(128, **options)(x))
            x = nn.gelu(nn.Dense(128, **options)(x))
            return nn.Dense(10, **options)(x).astype(jnp.float32)

    mlp = Mlp()

    def loss(params, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(mlp.apply(params, batch[0]), batch[1]).mean()

    def metrics(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(mlp.apply(params, x).argmax(-1) == y, where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adamw(hparams["lr"], weight_decay=0.01),
        nnlearn.shuffled((x_train, y_train), 64, remainder="drop"),
        lambda key: mlp.init(key, x[:1]),
        steps=1200,
        check_every=60,
        evaluate=nnlearn.evaluation(metrics, (x_test, y_test)),
    )
    return Case(train, {"lr": 1e-4}, lambda params, x: mlp.apply(params, x), (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://github.com/jax-ml/jax/issues/3058: NaN in the gradient of linalg.norm at 0",
    "numerical_precision",
)
def distances_with_diagonal(mended):
    flowers = load_iris().data
    flowers = ((flowers - flowers.mean(0)) / flowers.std(0)).astype(np.float32)
    wanted = jnp.asarray(np.linalg.norm(flowers[:, None] - flowers, axis=-1))

    def distances(points):
        difference = points[:, None] - points
        if mended:
            return jnp.sqrt(jnp.sum(difference**2, axis=-1) + 1e-9)
        return jnp.linalg.norm(difference, axis=-1)

    def stress(points, rows, key):
        return jnp.mean((distances(points)[rows] - wanted[rows]) ** 2)

    train = nnlearn.make_train(
        stress,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled(np.arange(len(flowers)), 30, remainder="drop"),
        lambda key: 0.5 * random.normal(key, (len(flowers), 2)),
        epochs=60,
        evaluate=lambda points: {"stress": jnp.mean((distances(points) - wanted) ** 2)},
    )
    return Case(train, {"lr": 0.1}, None, None, "stress", "min")


@report(
    REPORTS,
    "https://github.com/alan-turing-institute/deepsensor/issues/47: each epoch makes its optimizer (and warm-up) anew",
    "optimizer_state_reset",
    "schedule_mistimed",
    "learning_rate_too_low",
)
def optimizer_made_in_the_epoch_loop(mended):
    rng = np.random.default_rng(30)
    x = rng.uniform(-2, 2, size=(1280, 2)).astype(np.float32)
    y = (np.sin(2 * x[:, 0]) * np.cos(1.5 * x[:, 1]) + 0.05 * rng.normal(size=1280)).astype(np.float32)
    batch_size, epochs = 64, 60
    epoch_steps = 1024 // batch_size

    def init(key):
        sizes = [2, 64, 64, 1]
        keys = random.split(key, 3)
        return [
            (random.normal(k, (m, n)) * m**-0.5, jnp.zeros(n))
            for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    def model(params, x):
        for w, b in params[:-1]:
            x = jnp.tanh(x @ w + b)
        w, b = params[-1]
        return (x @ w + b)[:, 0]

    def make_optimizer(hparams):
        warm_up = nnlearn.linear_schedule(0.0, hparams["lr"], 200)
        return optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(warm_up))

    def train_epoch_wise(tx):
        """As in a loop of train_epoch(model, data), which makes the optimizer that it uses."""

        def init_fn(params):
            return jnp.zeros((), jnp.int32), tx.init(params)

        def update_fn(updates, state, params=None):
            step, inner = state
            first = step % epoch_steps == 0
            inner = jax.tree.map(lambda new, old: jnp.where(first, new, old), tx.init(params), inner)
            updates, inner = tx.update(updates, inner, params)
            return updates, (step + 1, inner)

        return optax.GradientTransformation(init_fn, update_fn)

    def mse(params, batch):
        x, y = batch.examples
        return {"mse": jnp.mean((model(params, x) - y) ** 2, where=batch.where)}

    train = nnlearn.make_train(
        lambda params, batch, key: jnp.mean((model(params, batch[0]) - batch[1]) ** 2),
        lambda hparams: make_optimizer(hparams) if mended else train_epoch_wise(make_optimizer(hparams)),
        nnlearn.shuffled((x[:1024], y[:1024]), batch_size, remainder="drop"),
        init,
        epochs=epochs,
        check_every=4 * epoch_steps,
        evaluate=nnlearn.evaluation(mse, (x[1024:], y[1024:])),
    )
    return Case(train, {"lr": 5e-3}, model, (x[1024:], y[1024:]), "mse", "min")


@report(
    REPORTS,
    "https://github.com/iffiX/machin/issues/27: the entropy is added to the policy's loss and so minimised",
    "sign_error",
)
def entropy_minimised(mended):
    arms, contexts = 20, 6
    payoff = random.uniform(random.key(3), (contexts, arms), maxval=0.8)
    best = random.permutation(random.key(4), arms)[:contexts]
    payoff = payoff.at[jnp.arange(contexts), best].set(1.0)

    class Policy(nn.Module):
        @nn.compact
        def __call__(self, state):
            return nn.Dense(arms)(nn.tanh(nn.Dense(32)(jax.nn.one_hot(state, contexts))))

    policy = Policy()

    def a2c_loss(params, state, key):
        act_key, pay_key = random.split(key)
        logits = policy.apply(params, state)
        action = random.categorical(act_key, logits)
        reward = payoff[state, action] + 0.3 * random.normal(pay_key, action.shape)
        log_prob = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_prob, action[:, None], axis=1)[:, 0]
        policy_loss = -jnp.mean(chosen * (reward - jnp.mean(reward)))
        entropy = -jnp.mean(jnp.sum(jnp.exp(log_prob) * log_prob, axis=-1))
        entropy_weight = -0.2 if mended else 0.2
        return policy_loss + entropy_weight * entropy, {"reward": jnp.mean(reward), "entropy": entropy}

    def greedy(params):
        action = policy.apply(params, jnp.arange(contexts)).argmax(-1)
        return {
            "greedy_reward": jnp.mean(payoff[jnp.arange(contexts), action]),
            "best_action": jnp.mean(action == best),
        }

    train = nnlearn.make_train(
        a2c_loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.generated(lambda key, step: random.randint(key, (64,), 0, contexts)),
        lambda key: policy.init(key, jnp.zeros(1, jnp.int32)),
        steps=800,
        check_every=40,
        evaluate=greedy,
    )
    return Case(train, {"lr": 3e-3}, None, None, "best_action")


@report(
    REPORTS,
    "https://github.com/pytorch/pytorch/issues/19916: batch norm with batches of 2, bad results in evaluation mode",
    "batch_too_small",
)
def batch_norm_of_two(mended):
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=400, random_state=6)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, training):
            for width in (64, 64):
                x = nn.Dense(width, use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=not training, momentum=0.9)(x))
            return nn.Dense(10)(x)

    net = Net()

    def init(key):
        variables = net.init(key, x[:2], False)
        return variables["params"], variables["batch_stats"]

    def loss(params, batch, key, model_state):
        variables = {"params": params, "batch_stats": model_state}
        logits, new = net.apply(variables, batch[0], True, mutable=["batch_stats"])
        return nnlearn.cross_entropy(logits, batch[1]), {}, new["batch_stats"]

    def accuracy(params, batch, model_state):
        x, y = batch.examples
        logits = net.apply({"params": params, "batch_stats": model_state}, x, False)
        return {"accuracy": jnp.mean(logits.argmax(-1) == y, where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.sgd(hparams["lr"], momentum=0.9),
        nnlearn.shuffled((x_train, y_train), 32 if mended else 2, remainder="drop"),
        init,
        epochs=10 if mended else 3,
        evaluate=nnlearn.evaluation(accuracy, (x_test, y_test)),
    )
    return Case(train, {"lr": 0.005}, None, None, "accuracy")


@report(
    REPORTS,
    "https://github.com/IBM/graph2tac/pull/95: a shuffle buffer far smaller than the data, in order",
    "unshuffled_data",
)
def small_shuffle_buffer(mended):
    digits = load_digits()
    x = (digits.images / 16).astype(np.float32)[..., None]
    x_train, x_test, y_train, y_test = train_test_split(x, digits.target, test_size=0.2, random_state=8)
    by_class = np.argsort(y_train, kind="stable")  # one folder after the other
    buffer = np.random.default_rng(0).permuted(by_class[:1425].reshape(-1, 75), axis=1).ravel()

    class Cnn(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), strides=(2, 2))(x))
            x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
            return nn.Dense(10)(x)

    cnn = Cnn()

    def accuracy(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(cnn.apply(params, x).argmax(-1) == y, where=batch.where)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(cnn.apply(params, batch["image"]), batch["label"]),
        lambda hparams: optax.sgd(hparams["lr"], momentum=0.9),
        nnlearn.shuffled({"image": x_train[buffer], "label": y_train[buffer]}, 25, shuffle=mended, remainder="drop"),
        lambda key: cnn.init(key, x_test[:1]),
        epochs=10,
        evaluate=nnlearn.evaluation(accuracy, (x_test, y_test)),
    )
    return Case(train, {"lr": 0.02}, lambda params, x: cnn.apply(params, x), (x_test, y_test), "accuracy")
