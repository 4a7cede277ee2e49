"""Perceptrons on handwritten digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from nnlearn.datasets import load
from nnlearn.models import mlp

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://datascience.stackexchange.com/questions/38604: "
    "MNIST with Dense(1, sigmoid), binary cross-entropy and labels 0 to 9: the loss is -55",
    "loss_output_mismatch",
    "label_encoding",
    "unnormalised_inputs",
)
def mnist_one_sigmoid(mended):
    mnist = load("mnist")
    x_train = np.round(mnist.train.inputs * 255).astype(np.uint8).reshape(-1, 784)
    x_test = np.round(mnist.validation.inputs * 255).astype(np.uint8).reshape(-1, 784)
    y_train, y_test = mnist.train.targets, mnist.validation.targets
    hl1_nodes, output_nodes = 64, 10 if mended else 1
    glorot = jax.nn.initializers.glorot_uniform()

    def init(key):
        k1, k2 = jax.random.split(key)
        return {
            "hidden": {"kernel": glorot(k1, (784, hl1_nodes)), "bias": jnp.zeros(hl1_nodes)},
            "out": {"kernel": glorot(k2, (hl1_nodes, output_nodes)), "bias": jnp.zeros(output_nodes)},
        }

    def model(params, x):
        x = x.astype(jnp.float32)
        if mended:
            x = x / 255
        h = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        z = h @ params["out"]["kernel"] + params["out"]["bias"]
        return jax.nn.softmax(z) if mended else jax.nn.sigmoid(z)

    def binary_crossentropy(y, p):
        p = jnp.clip(p, 1e-7, 1 - 1e-7)
        return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))

    def loss_fn(params, batch, key):
        x, y = batch
        p = model(params, x)
        if mended:
            return -jnp.mean(jnp.log(jnp.take_along_axis(p, y[:, None], 1) + 1e-7))
        return binary_crossentropy(y[:, None], p)

    def evaluate(params, batch):
        x, y = batch.examples
        p = model(params, x)
        hit = jnp.argmax(p, 1) == y if mended else jnp.round(p[:, 0]) == y
        return {"acc": jnp.mean(hit, where=batch.where)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((x_train, y_train), 32, remainder="drop"),
        init,
        epochs=10,
        evaluate=nnlearn.evaluation(evaluate, (x_test, y_test)),
    )
    return Case(train, {"lr": 1e-3}, model, (x_test, y_test), "acc")


@report(
    REPORTS,
    "https://stats.stackexchange.com/questions/316898: "
    "the MNIST tutorial with a sigmoid hidden layer and all weights zero: 25 % accuracy",
    "symmetric_initialisation",
    "bad_initialisation",
)
def tf_zeros_hidden_layer(mended):
    mnist = load("mnist", seed=1)
    eye = np.eye(10, dtype=np.float32)
    data = (mnist.train.inputs.reshape(-1, 784), eye[mnist.train.targets])
    test = (mnist.test.inputs.reshape(-1, 784), eye[mnist.test.targets])

    def variables(key):
        k1, k2 = jax.random.split(key)
        if mended:
            W, W2 = 0.05 * jax.random.normal(k1, (784, 100)), 0.1 * jax.random.normal(k2, (100, 10))
        else:
            W, W2 = jnp.zeros((784, 100)), jnp.zeros((100, 10))
        return W, jnp.zeros(100), W2, jnp.zeros(10)

    def y_of(v, x):
        W, b, W2, b2 = v
        h1 = jax.nn.sigmoid(jnp.matmul(x, W) + b)
        return jnp.matmul(h1, W2) + b2

    def cross_entropy(v, batch, key):
        x, y_ = batch
        return jnp.mean(optax.softmax_cross_entropy(y_of(v, x), y_))

    def accuracy(v, batch):
        x, y_ = batch.examples
        correct = jnp.argmax(y_of(v, x), 1) == jnp.argmax(y_, 1)
        return {"accuracy": jnp.mean(correct, where=batch.where)}

    train = nnlearn.make_train(
        cross_entropy,
        lambda hp: optax.sgd(hp["step"]),
        nnlearn.shuffled(data, 100, remainder="drop"),
        variables,
        steps=1000,
        evaluate=nnlearn.evaluation(accuracy, test),
        check_every=100,
    )
    return Case(train, {"step": 0.5}, y_of, test, "accuracy")


@report(
    REPORTS,
    "https://github.com/nfmcclure/tensorflow_cookbook/issues/86 "
    "and https://github.com/aymericdamien/TensorFlow-Examples/issues/50: softmax before "
    "softmax_cross_entropy_with_logits",
    "loss_output_mismatch",
)
def softmax_twice(mended):
    digits = load("digits", seed=2)

    def init(key):
        k1, k2, k3 = jax.random.split(key, 3)
        n = jax.random.truncated_normal
        return {
            "W1": 0.1 * n(k1, -2, 2, (64, 60)),
            "b1": jnp.zeros(60),
            "W2": 0.1 * n(k2, -2, 2, (60, 40)),
            "b2": jnp.zeros(40),
            "W3": 0.1 * n(k3, -2, 2, (40, 10)),
            "b3": jnp.zeros(10),
        }

    def logits_out(p, x):
        h = jax.nn.relu(x @ p["W1"] + p["b1"])
        h = jax.nn.relu(h @ p["W2"] + p["b2"])
        out = h @ p["W3"] + p["b3"]
        return out if mended else jax.nn.softmax(out)

    def losses(p, batch, key):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_out(p, batch.inputs), batch.targets))

    def accuracy(p, batch):
        hit = jnp.argmax(logits_out(p, batch.examples.inputs), 1) == batch.examples.targets
        return {"accuracy": jnp.mean(hit, where=batch.where)}

    train = nnlearn.make_train(
        losses,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled(digits.train, 50, remainder="drop"),
        init,
        steps=750,
        evaluate=nnlearn.evaluation(accuracy, digits.validation),
        check_every=50,
    )
    return Case(train, {"lr": 0.01}, logits_out, (digits.validation.inputs, digits.validation.targets), "accuracy")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/12689: "
    "training accuracy 0.96, validation accuracy 1/n: two ways of preprocessing",
    "preprocessing_mismatch",
)
def keras_12689_two_preprocessings(mended):
    bundle = load("mnist", seed=3)

    def preprocess_input(x):
        return x.astype(np.float32) / 127.5 - 1

    def pixels(part):
        return np.round(part.inputs * 255).astype(np.uint8).reshape(len(part.targets), -1)

    x_train = preprocess_input(pixels(bundle.train))
    x_val = pixels(bundle.validation)
    x_val = preprocess_input(x_val) if mended else x_val.astype(np.float32) / 255
    y_train, y_val = bundle.train.targets, bundle.validation.targets
    model = mlp((784, 64, 10), activation="relu")

    def loss_fn(params, batch, key):
        examples, where = batch
        return nnlearn.cross_entropy(model.apply(params, examples[0], key), examples[1], where=where)

    def metrics_fn(params, batch):
        (x, y), where = batch
        logits = model.apply(params, x)
        return {
            "loss": nnlearn.cross_entropy(logits, y, where=where),
            "accuracy": jnp.mean(logits.argmax(-1) == y, where=where),
        }

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: nnlearn.adamw(hp["rate"]),
        nnlearn.shuffled((x_train, y_train), 64),
        model.init,
        epochs=8,
        evaluate=nnlearn.evaluation(metrics_fn, (x_val, y_val)),
    )
    return Case(train, {"rate": 1e-3}, lambda params, x: model.apply(params, x), (x_val, y_val), "accuracy")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/8086, 2808 and 9938: "
    "SGD's decay is meant as lr / (1 + decay * epoch), but acts on every batch",
    "schedule_mistimed",
    "learning_rate_too_low",
)
def keras_8086_decay_per_batch(mended):
    X, y = datasets.load_digits(return_X_y=True)
    X = X / 16.0
    x_train, x_test, y_train, y_test = train_test_split(X, y, test_size=0.25, random_state=2, stratify=y)
    batch_size = 32
    steps_per_epoch = len(x_train) // batch_size
    model = mlp((64, 64, 32, 10))

    def make_tx(hp):
        def lr(iterations):
            t = iterations // steps_per_epoch if mended else iterations
            return hp["lr"] / (1 + hp["decay"] * t)

        return optax.sgd(lr)

    def loss_fn(params, batch, key):
        x, y = batch
        logits = model.apply(params, x)
        return nnlearn.cross_entropy(logits, y), {"acc": jnp.mean(jnp.argmax(logits, -1) == y)}

    def test(params, batch):
        x, y = batch.examples
        return {"val_acc": jnp.mean(jnp.argmax(model.apply(params, x), -1) == y, where=batch.where)}

    train = nnlearn.make_train(
        loss_fn,
        make_tx,
        nnlearn.shuffled((x_train, y_train), batch_size, remainder="drop"),
        model.init,
        epochs=20,
        evaluate=nnlearn.evaluation(test, (x_test, y_test)),
    )
    return Case(train, {"lr": 0.1, "decay": 0.1}, lambda p, x: model.apply(p, x), (x_test, y_test), "val_acc")


@report(
    REPORTS,
    "https://github.com/sinhasam/vaal/issues/2 (also https://github.com/dlsyscourse/hw2/issues/13): "
    "the test accuracy is computed without eval(), dropout is still on",
    "evaluation_in_training_mode",
)
def model_eval_forgotten(mended):
    digits = datasets.load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        digits.data.astype(np.float32) / 16, digits.target, test_size=0.3, random_state=3
    )

    def init(key):
        k = jax.random.split(key, 3)
        return {
            f"fc{i}": (jax.random.normal(k[i], (m, n)) * np.sqrt(2 / m), jnp.zeros(n))
            for i, (m, n) in enumerate([(64, 64), (64, 48), (48, 10)])
        }

    def net(params, x, key, training):
        for i in range(2):
            w, b = params[f"fc{i}"]
            x = jax.nn.relu(x @ w + b)
            if training:
                key, sub = jax.random.split(key)
                x = jnp.where(jax.random.bernoulli(sub, 0.4, x.shape), x / 0.4, 0.0)
        w, b = params["fc2"]
        return x @ w + b

    def criterion(params, batch, key):
        (x, y), where = batch
        return nnlearn.cross_entropy(net(params, x, key, True), y, where=where)

    def predict(params, x):
        return net(params, x, jax.random.key(1), training=not mended)

    def test(params, batch):
        (x, y), where = batch
        return {"accuracy": jnp.mean(predict(params, x).argmax(1) == y, where=where)}

    train = nnlearn.make_train(
        criterion,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((x_train, y_train), 64),
        init,
        epochs=30,
        evaluate=nnlearn.evaluation(test, (x_test, y_test)),
    )
    return Case(train, {"lr": 2e-3}, predict, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://discuss.pytorch.org/t/adam-half-precision-nans/1765 and "
    "https://github.com/pytorch/pytorch/issues/8860: "
    "model.half() with Adam, whose eps of 1e-8 is then 0: NaN; answer: weights in float32",
    "numerical_precision",
)
def half_precision_adam(mended):
    digits = datasets.load_digits()
    x = (digits.data / 16).astype(np.float16)
    xtr, xte, ytr, yte = train_test_split(x, digits.target, random_state=1)
    dtype = jnp.float32 if mended else jnp.float16  # of the weights that the optimizer sees

    def init(key):
        ks = jax.random.split(key, 3)
        shapes = [(64, 64), (64, 32), (32, 10)]
        return [
            {"W": (jax.random.normal(k, s) * np.sqrt(2 / s[0])).astype(dtype), "b": jnp.zeros(s[1], dtype)}
            for k, s in zip(ks, shapes, strict=True)
        ]

    def forward(params, x):
        h = x.astype(jnp.float16)
        for i, p in enumerate(params):
            h = h @ p["W"].astype(jnp.float16) + p["b"].astype(jnp.float16)
            if i < len(params) - 1:
                h = jax.nn.relu(h)
        return h

    def loss(params, batch, key):
        x, y = batch
        logp = jax.nn.log_softmax(forward(params, x).astype(jnp.float32))
        return -jnp.mean(logp[jnp.arange(len(y)), y])

    train = nnlearn.make_train(
        loss,
        optax.adam(1e-3),
        nnlearn.shuffled((xtr, ytr), 32, remainder="drop"),
        init,
        epochs=12,
        evaluate=lambda params: {"acc": jnp.mean(forward(params, xte).argmax(1) == yte)},
    )
    return Case(train, {}, forward, (xte, yte), "acc")
