"""First classifiers: digits, flowers, cats and circles with small dense networks."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, make_circles
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from nnlearn.datasets import load

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://stackoverflow.com/questions/53654360: the fourth exercise of a course in Keras, 25 sigmoids with "
    "kernel_regularizer l2(1), stays at 10 %; the penalty of the course is divided by the number of examples",
    "excessive_regularisation",
)
def exercise_four_with_l2_of_one(mended):
    digits = load_digits()
    X_train, X_test, y_train, y_test = train_test_split(digits.data / 16, digits.target, test_size=0.25, random_state=1)
    Y_train = np.eye(10)[y_train]
    strength = 0.5 / len(X_train) if mended else 1.0

    def init(key):
        k1, k2 = jax.random.split(key)
        glorot = jax.nn.initializers.glorot_uniform()
        return {
            "theta1": glorot(k1, (64, 25)),
            "bias1": jnp.zeros(25),
            "theta2": glorot(k2, (25, 10)),
            "bias2": jnp.zeros(10),
        }

    def h(params, x):
        hidden = jax.nn.sigmoid(x @ params["theta1"] + params["bias1"])
        return hidden @ params["theta2"] + params["bias2"]

    def cost(params, batch, key):
        x, y = batch
        entropy = -jnp.mean(jnp.sum(y * jax.nn.log_softmax(h(params, x)), axis=1))
        penalty = jnp.sum(params["theta1"] ** 2) + jnp.sum(params["theta2"] ** 2)
        return entropy + strength * penalty

    def accuracy(params):
        return {"accuracy": jnp.mean(jnp.argmax(h(params, X_test), 1) == y_test)}

    train = nnlearn.make_train(
        cost,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((X_train, Y_train), 50, remainder="drop"),
        init,
        epochs=40,
        evaluate=accuracy,
    )
    return Case(train, {"lr": 0.01}, h, (X_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://pythoner.space/questions/the-cost-function-of-the-neural-network-is-failing-to-minimize : 784-30-10 from "
    "scratch, the cost only rises to 4.5: the error has the other sign than the update supposes",
    "sign_error",
)
def cost_rises_to_4_5(mended):
    mnist = load("mnist", seed=5)
    X = mnist.train.inputs.reshape(len(mnist.train.targets), 784)
    Y = np.eye(10, dtype=np.float32)[mnist.train.targets]
    X_val, y_val = mnist.validation.inputs.reshape(-1, 784), mnist.validation.targets

    def init(key):
        keys = jax.random.split(key, 2)
        sizes = [(784, 30), (30, 10)]
        return [(jax.random.normal(k, s) / np.sqrt(s[0]), jnp.zeros(s[1])) for k, s in zip(keys, sizes, strict=True)]

    def forward(weights, x):
        for W, B in weights:
            x = jax.nn.sigmoid(x @ W + B)
        return x

    def cost(weights, batch, key):
        inputs, outputs = batch
        return 0.5 * jnp.mean(jnp.sum((outputs - forward(weights, inputs)) ** 2, axis=1))

    def gradient_step(learning_rate):
        def update(gradients, state, params=None):
            step = -learning_rate if mended else learning_rate
            return jax.tree.map(lambda g: step * g, gradients), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    def evaluate(weights):
        said = forward(weights, X_val)
        right = jnp.argmax(said, axis=1) == y_val
        return {"cost": 0.5 * jnp.mean(jnp.sum((jax.nn.one_hot(y_val, 10) - said) ** 2, 1)), "accuracy": right.mean()}

    train = nnlearn.make_train(
        cost,
        lambda hp: gradient_step(hp["learning_rate"]),
        nnlearn.shuffled((X, Y), 50, remainder="drop"),
        init,
        epochs=15,
        evaluate=evaluate,
    )
    return Case(train, {"learning_rate": 2.0}, forward, (X_val, y_val), "accuracy")


@report(
    REPORTS,
    "http://pullrequest.ru/8687914 (StackOverflow): two similar ways to flatten the pictures of the cat exercise, "
    "reshape(64*64*3, m) mixes the pictures, reshape(m, -1).T does not",
    "misaligned_labels",
    "wrong_axis_or_reduction",
)
def pictures_flattened_into_columns(mended):
    rng = np.random.RandomState(7)
    m = 900
    side = 10
    y = rng.randint(0, 2, m)
    pictures = rng.randint(60, 150, (m, side, side, 3))
    rows, cols = np.mgrid[:side, :side]
    for picture, cat in zip(pictures, y, strict=True):
        r, c = rng.randint(3, side - 3, 2)
        blob = (rows - r) ** 2 + (cols - c) ** 2 <= 6
        picture[blob] += np.array([75, 20, 0] if cat else [0, 20, 75])
    pictures = np.clip(pictures, 0, 255)

    def flatten(pics):
        return (pics.reshape(len(pics), -1).T if mended else pics.reshape(-1, len(pics))) / 255.0

    X_train, X_test = flatten(pictures[:700]).T, flatten(pictures[700:]).T  # examples first, as the batches want them
    y_train, y_test = y[:700].astype(float), y[700:].astype(float)

    def init(key):
        k1, k2 = jax.random.split(key)
        n = side * side * 3
        return {
            "W1": jax.random.normal(k1, (n, 7)) / np.sqrt(n),
            "b1": jnp.zeros(7),
            "W2": jax.random.normal(k2, (7,)) / np.sqrt(7),
            "b2": jnp.zeros(()),
        }

    def AL(p, X):
        return jax.nn.sigmoid(jnp.tanh((X - 0.41) @ p["W1"] + p["b1"]) @ p["W2"] + p["b2"])

    def cost(p, batch, key):
        X, Y = batch
        A = jnp.clip(AL(p, X), 1e-7, 1 - 1e-7)
        return -jnp.mean(Y * jnp.log(A) + (1 - Y) * jnp.log(1 - A))

    train = nnlearn.make_train(
        cost,
        lambda hp: nnlearn.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled((X_train, y_train), 35, remainder="drop"),
        init,
        epochs=12,
        evaluate=lambda p: {"accuracy": jnp.mean((AL(p, X_test) > 0.5) == y_test)},
    )
    return Case(train, {"lr": 0.03}, AL, (X_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://datascience.stackexchange.com/questions/13163: an MLP with 8 hidden units predicts 0.45, 0.44, 0.46 for "
    "every iris, though it works on MNIST: a hundred examples make too few steps of SGD",
    "underfitting",
    "learning_rate_too_low",
)
def iris_barely_trained(mended):
    iris = load_iris()
    X = StandardScaler().fit_transform(iris.data)
    X_train, X_test, y_train, y_test = train_test_split(X, iris.target, test_size=50, random_state=3)

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.sigmoid(nn.Dense(8)(x))
            return nn.Dense(3)(x)

    mlp = MLP()

    def loss_fn(params, batch, key):
        logits = mlp.apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    def predict(params, x):
        return nn.softmax(mlp.apply({"params": params}, x))

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.sgd(hp["lr"]),
        nnlearn.shuffled({"x": X_train, "y": y_train}, 10, remainder="drop"),
        lambda key: mlp.init(key, X_train[:1])["params"],
        epochs=150 if mended else 10,
        evaluate=lambda params: {"accuracy": jnp.mean(predict(params, X_test).argmax(-1) == y_test)},
        check_every=100 if mended else 10,
    )
    return Case(train, {"lr": 0.1 if mended else 0.01}, predict, (X_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://machinelearningmastery.com/how-to-fix-vanishing-gradients-using-the-rectified-linear-activation-function/ "
    ": two circles, five tanh layers with weights uniform in 0 to 1 learn nothing; relu and he_uniform do",
    "vanishing_gradients",
    "saturated_activations",
    "bad_initialisation",
)
def circles_five_layers_of_tanh(mended):
    X, y = make_circles(n_samples=1000, noise=0.1, random_state=1, factor=0.5)
    train_x, test_x, train_y, test_y = X[:500], X[500:], y[:500], y[500:]
    widths = [2, 5, 5, 5, 5, 5, 1] if not mended else [2, 10, 10, 10, 10, 10, 1]
    kernel_init = jax.nn.initializers.he_uniform() if mended else jax.nn.initializers.uniform(1.0)
    activation = jax.nn.relu if mended else jnp.tanh

    def init(key):
        keys = jax.random.split(key, len(widths) - 1)
        pairs = itertools.pairwise(widths)
        return tuple({"w": kernel_init(k, p), "b": jnp.zeros(p[1])} for k, p in zip(keys, pairs, strict=True))

    def model(params, x):
        *hidden, last = params
        for layer in hidden:
            x = activation(x @ layer["w"] + layer["b"])
        return jnp.squeeze(x @ last["w"] + last["b"], axis=-1)

    def bce(params, batch, key):
        x, y = batch
        return jnp.mean(nnlearn.sigmoid_binary_cross_entropy(model(params, x), y.astype(jnp.float32)))

    train = nnlearn.make_train(
        bce,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled((train_x, train_y), 32, remainder="drop"),
        init,
        epochs=80,
        evaluate=lambda params: {"accuracy": jnp.mean((model(params, test_x) > 0) == (test_y == 1))},
        check_every=60,
    )
    return Case(train, {"lr": 0.01}, model, (test_x, test_y), "accuracy")


@report(
    REPORTS,
    "https://markaicode.com/custom-gradients-non-differentiable-losses : the loss casts y_pred > 0.5 to float, and no "
    "gradient reaches any variable",
    "blocked_gradient",
)
def loss_of_the_thresholded_prediction(mended):
    table = load_breast_cancer()
    X = StandardScaler().fit_transform(table.data).astype(np.float32)
    X_train, X_test, y_train, y_test = train_test_split(X, table.target, test_size=0.3, random_state=0)

    def init(key):
        k1, k2 = jax.random.split(key)
        he = jax.nn.initializers.he_normal()
        return {"hidden": (he(k1, (30, 12)), jnp.zeros(12)), "out": (he(k2, (12, 1)), jnp.zeros(1))}

    def predict(params, x):
        w, b = params["hidden"]
        h = jax.nn.relu(x @ w + b)
        w, b = params["out"]
        return jax.nn.sigmoid(h @ w + b)[:, 0]

    def loss(params, batch, key):
        x, y_true = batch
        y_pred = predict(params, x)
        if not mended:
            y_pred = (y_pred > 0.5).astype(jnp.float32)
        return jnp.mean(jnp.square(y_true - y_pred))

    def evaluate(params):
        return {"accuracy": jnp.mean((predict(params, X_test) > 0.5) == y_test)}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled((X_train, y_train), 32, remainder="drop"),
        init,
        epochs=15,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.003}, predict, (X_test, y_test), "accuracy")
