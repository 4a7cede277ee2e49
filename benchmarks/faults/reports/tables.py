"""Tables: classes from columns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from nnlearn.datasets import load
from nnlearn.models import mlp

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://stackoverflow.com/questions/4601373 and its duplicates: "
    "np.random.shuffle(X), then np.random.shuffle(y): nothing is learned",
    "misaligned_labels",
    "label_noise",
)
def shuffled_apart(mended):
    X, y = datasets.make_classification(
        2000, 20, n_informative=8, n_redundant=2, n_classes=4, class_sep=1.6, random_state=4
    )
    rs = np.random.RandomState(0)
    if mended:
        order = rs.permutation(len(X))
        X, y = X[order], y[order]
    else:
        rs.shuffle(X)
        rs.shuffle(y)
    X = (X - X[:1600].mean(0)) / X[:1600].std(0)
    train_set, test_set = (X[:1600], y[:1600]), (X[1600:], y[1600:])

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(64)(x))
            x = nn.relu(nn.Dense(32)(x))
            return nn.Dense(4)(x)

    clf = Classifier()

    def loss_fn(params, batch, key):
        (x, y), where = batch
        losses = optax.softmax_cross_entropy_with_integer_labels(clf.apply(params, x), y)
        return jnp.mean(losses, where=where)

    def metrics_fn(params, batch):
        (x, y), where = batch
        return {"accuracy": jnp.mean(clf.apply(params, x).argmax(-1) == y, where=where)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 64),
        lambda key: clf.init(key, X[:1]),
        epochs=20,
        evaluate=nnlearn.evaluation(metrics_fn, test_set),
    )
    return Case(train, {"lr": 1e-3}, clf.apply, test_set, "accuracy")


@report(
    REPORTS,
    "https://rocuku.github.io/keras-validation-split-shuffle: "
    "validation_split takes the last rows before it shuffles, of a table that is sorted by class",
    "unshuffled_data",
    "class_imbalance",
)
def validation_split_of_sorted_table(mended):
    wine = datasets.load_wine()  # sorted by class
    X, y = wine.data, wine.target
    if mended:
        order = np.random.RandomState(0).permutation(len(X))
        X, y = X[order], y[order]
    split_at = int(len(X) * (1 - 0.27))
    mean, std = X[:split_at].mean(0), X[:split_at].std(0)
    X = ((X - mean) / std).astype("float32")
    x_train, y_train, x_val, y_val = X[:split_at], y[:split_at], X[split_at:], y[split_at:]

    def init(key):
        k1, k2 = jax.random.split(key)
        he = jax.nn.initializers.he_normal()
        return {"w1": he(k1, (13, 24)), "b1": jnp.zeros(24), "w2": he(k2, (24, 3)), "b2": jnp.zeros(3)}

    def model(p, x):
        return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    def loss(p, batch, key):
        x, y = batch.examples
        logp = jax.nn.log_softmax(model(p, x))
        return -jnp.mean(jnp.take_along_axis(logp, y[:, None], axis=1)[:, 0], where=batch.where)

    def val(p, batch):
        x, y = batch.examples
        return {
            "val_loss": loss(p, batch, None),
            "val_acc": jnp.mean(jnp.argmax(model(p, x), 1) == y, where=batch.where),
        }

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.rmsprop(hp["lr"]),
        nnlearn.shuffled((x_train, y_train), 16),
        init,
        epochs=40,
        evaluate=nnlearn.evaluation(val, (x_val, y_val)),
    )
    return Case(train, {"lr": 1e-3}, model, (x_val, y_val), "val_acc")


@report(
    REPORTS,
    "https://github.com/rstudio/keras3/issues/465: "
    "iris with classes 1 to 3: the label 3 is out of range, and one_hot drops it silently",
    "label_encoding",
)
def iris_classes_1_2_3(mended):
    table = datasets.load_iris()
    X, y = table.data, table.target + 1  # as.integer(iris$Species)
    if mended:
        y = y - 1
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.3, random_state=1, stratify=y)
    sc = StandardScaler()
    X_train, X_test = sc.fit_transform(X_train), sc.transform(X_test)

    def init(key):
        ks = jax.random.split(key, 2)
        return [
            {"W": jax.random.normal(ks[0], (4, 20)) / np.sqrt(4), "b": jnp.zeros(20)},
            {"W": jax.random.normal(ks[1], (20, 3)) / np.sqrt(20), "b": jnp.zeros(3)},
        ]

    def net(params, X):
        h = jnp.tanh(X @ params[0]["W"] + params[0]["b"])
        return h @ params[1]["W"] + params[1]["b"]

    def loss(params, batch, key):
        X, y = batch
        onehot = jax.nn.one_hot(y, 3)
        return -jnp.mean(jnp.sum(onehot * jax.nn.log_softmax(net(params, X)), axis=1))

    def score(params, batch):
        X, y = batch.examples
        return {"accuracy": jnp.mean(jnp.argmax(net(params, X), axis=1) == y, where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((X_train, y_train), 20, remainder="drop"),
        init,
        epochs=50,
        evaluate=nnlearn.evaluation(score, (X_test, y_test)),
    )
    return Case(train, {"lr": 3e-3}, net, (X_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/3068: "
    "95 % of the examples are of one class, which is all that the model predicts; answer: class_weight",
    "class_imbalance",
)
def keras_3068_95_to_5(mended):
    rs = np.random.RandomState(9)
    y = (rs.uniform(size=8000) < 0.05).astype(np.int32)
    X = rs.normal(size=(8000, 16)) + 0.35 * y[:, None]
    xt, yt, xv, yv = X[:6000], y[:6000], X[6000:], y[6000:]
    class_weight = {0: 0.5 / np.mean(yt == 0), 1: 0.5 / np.mean(yt == 1)} if mended else {0: 1.0, 1: 1.0}

    def init(key):
        k1, k2 = jax.random.split(key)
        lecun = jax.nn.initializers.lecun_normal()
        return {"w1": lecun(k1, (16, 8)), "b1": jnp.zeros(8), "w2": lecun(k2, (8, 1)), "b2": jnp.zeros(1)}

    def logit(p, x):
        return (jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"])[:, 0]

    def loss(p, batch, key):
        x, y = batch
        weight = jnp.where(y == 1, class_weight[1], class_weight[0])
        return jnp.mean(weight * optax.sigmoid_binary_cross_entropy(logit(p, x), y))

    def evaluate(p):
        said = logit(p, jnp.asarray(xv)) > 0
        recall = jnp.mean(said[yv == 1])
        specificity = jnp.mean(~said[yv == 0])
        return {"accuracy": jnp.mean(said == yv), "recall": recall, "balanced_accuracy": (recall + specificity) / 2}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((xt, yt), 100, remainder="drop"),
        init,
        epochs=10,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 1e-3}, logit, (xv, yv), "balanced_accuracy")


@report(
    REPORTS,
    "https://ai.stackexchange.com/questions/27010: "
    "the logistic loss as -y log(p) + (1 - y) log(1 - p): the outputs never separate",
    "sign_error",
)
def logistic_loss_missing_brackets(mended):
    bundle = load("breast-cancer")
    n_features = bundle.train.inputs.shape[1]

    def init(key):
        k1, k2 = jax.random.split(key)
        return {
            "W1": jax.random.normal(k1, (n_features, 8)) * 0.2,
            "b1": jnp.zeros(8),
            "W2": jax.random.normal(k2, (8, 1)) * 0.3,
            "b2": jnp.zeros(1),
        }

    def predict(params, x):
        a1 = jax.nn.sigmoid(x @ params["W1"] + params["b1"])
        return jax.nn.sigmoid(a1 @ params["W2"] + params["b2"])[:, 0]

    def E(params, batch, key):
        y_hat, y = predict(params, batch.inputs), batch.targets
        eps = 1e-7
        if mended:
            return jnp.mean(-(y * jnp.log(y_hat + eps) + (1 - y) * jnp.log(1 - y_hat + eps)))
        return jnp.mean(-y * jnp.log(y_hat + eps) + (1 - y) * jnp.log(1 - y_hat + eps))

    def metrics(params, batch):
        right = (predict(params, batch.examples.inputs) > 0.5) == batch.examples.targets
        return {"accuracy": jnp.mean(right, where=batch.where)}

    train = nnlearn.make_train(
        E,
        lambda hp: optax.sgd(hp["eta"]),
        nnlearn.shuffled(bundle.train, 32, remainder="drop"),
        init,
        epochs=60,
        evaluate=nnlearn.evaluation(metrics, bundle.validation),
        check_every=60,
    )
    return Case(train, {"eta": 0.3}, predict, (bundle.validation.inputs, bundle.validation.targets), "accuracy")


@report(
    REPORTS,
    'StackOverflow, "Keras accuracy does not change", '
    "told again at https://codemia.io/knowledge-hub/path/keras_accuracy_does_not_change: raw columns, optimizer "
    '"sgd"',
    "unnormalised_inputs",
    "dead_units",
    "exploding_gradients",
)
def breast_cancer_raw_columns(mended):
    X, y = datasets.load_breast_cancer(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.25, random_state=42)
    if mended:
        ss = StandardScaler().fit(X_train)
        X_train, X_test = ss.transform(X_train), ss.transform(X_test)
    layers = [30, 16, 8, 1]

    def init(key):
        keys = jax.random.split(key, len(layers) - 1)
        return [
            (jax.random.normal(k, (m, n)) * np.sqrt(2 / (m + n)), jnp.zeros(n))
            for k, m, n in zip(keys, layers[:-1], layers[1:], strict=True)
        ]

    def forward(params, x):
        for w, b in params[:-1]:
            x = jnp.maximum(x @ w + b, 0)
        w, b = params[-1]
        return x @ w + b

    def loss_fn(params, batch, key):
        data, where = batch
        losses = optax.sigmoid_binary_cross_entropy(forward(params, data["x"])[:, 0], data["y"])
        return jnp.mean(losses, where=where)

    def metrics_fn(params, batch):
        data, where = batch
        return {"accuracy": jnp.mean((forward(params, data["x"])[:, 0] > 0) == data["y"], where=where)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.sgd(hp["lr"]),
        nnlearn.shuffled({"x": X_train, "y": y_train}, 32),
        init,
        epochs=50,
        evaluate=nnlearn.evaluation(metrics_fn, {"x": X_test, "y": y_test}),
    )
    return Case(train, {"lr": 0.01}, forward, (X_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://github.com/blue-yonder/tsfresh/issues/162 (also the column that pandas adds to a CSV): "
    "the index of the table is a feature: 100 % accuracy",
    "target_leak",
    "leaky_validation",
)
def index_column_left_in_features(mended):
    X, y = datasets.make_blobs(1500, n_features=6, centers=3, cluster_std=3.0, center_box=(-4, 4), random_state=3)
    order = np.argsort(y, kind="stable")
    csv = np.column_stack([np.arange(1500), X[order], y[order]])  # pd.read_csv("table.csv").values
    features, target = csv[:, (1 if mended else 0) : 7], csv[:, 7].astype(int)
    xt, xv, yt, yv = train_test_split(features, target, test_size=0.2, random_state=0)
    ss = StandardScaler().fit(xt)
    xt, xv = ss.transform(xt), ss.transform(xv)
    model = mlp((xt.shape[1], 32, 3))

    def loss_fn(params, batch, key):
        x, y = batch
        return nnlearn.cross_entropy(model.apply(params, x), y)

    def metrics_fn(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(model.apply(params, x).argmax(-1) == y, where=batch.where)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled((xt, yt), 32, remainder="drop"),
        model.init,
        epochs=20,
        evaluate=nnlearn.evaluation(metrics_fn, (xv, yv)),
    )
    return Case(train, {"lr": 5e-3}, lambda p, x: model.apply(p, x), (xv, yv), "accuracy")


@report(
    REPORTS,
    "https://stackoverflow.com/questions/44164749: "
    "several labels per example with softmax and categorical cross-entropy, threshold 0.5",
    "loss_output_mismatch",
)
def multilabel_softmax(mended):
    X, Y = datasets.make_multilabel_classification(2400, n_features=20, n_classes=5, n_labels=2, random_state=0)
    xt, xv, yt, yv = train_test_split(X, Y, test_size=0.25, random_state=0)
    mean, std = xt.mean(0), xt.std(0)
    xt, xv = (xt - mean) / std, (xv - mean) / std

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(128)(x))
            x = nn.relu(nn.Dense(32)(x))
            x = nn.Dense(5)(x)
            return nn.sigmoid(x) if mended else nn.softmax(x)

    net = Net()

    def loss_fn(params, batch, key):
        x, y = batch
        p = jnp.clip(net.apply(params, x), 1e-7, 1 - 1e-7)
        if mended:
            return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))
        return -jnp.mean(jnp.sum(y * jnp.log(p), axis=-1))

    def evaluate(params):
        preds = net.apply(params, jnp.asarray(xv)) >= 0.5
        tp = jnp.sum(preds * yv)
        return {"f1": 2 * tp / (jnp.sum(preds) + jnp.sum(yv)), "exact": jnp.mean(jnp.all(preds == yv, axis=1))}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((xt, yt), 64, remainder="drop"),
        lambda key: net.init(key, xt[:1]),
        epochs=10,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 1e-3}, net.apply, (xv, yv), "f1")
