"""Series and sequences: loads, windows, embeddings and recurrent networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://www.drjamesfroggatt.com/python-and-neural-networks/normalising-training-and-test-data-for-neural-networks/:"
    " fit_transform of the test data, too, so that they are scaled by their own minimum and maximum",
    "preprocessing_mismatch",
)
def test_data_scaled_by_themselves(mended):
    rng = np.random.RandomState(0)
    hours = np.arange(24 * 365)
    temperature = 10 - 9 * np.cos(2 * np.pi * hours / 8760) - 4 * np.cos(2 * np.pi * hours / 24) + rng.randn(8760)
    wind = np.abs(rng.gamma(2.0, 2.0, 8760))
    heating = np.maximum(18 - temperature, 0)
    load = 20 + 1.5 * heating + 0.2 * heating * wind**0.5 + 6 * np.sin(2 * np.pi * (hours % 24 - 6) / 24)
    load += 0.5 * rng.randn(8760)
    table = np.stack([temperature, wind, np.sin(hours * np.pi / 12), np.cos(hours * np.pi / 12)], 1)
    april = (hours // 24 >= 90) & (hours // 24 < 120)
    x_train, x_test = table[~april][::4], table[april]
    y_mean, y_std = load[~april].mean(), load[~april].std()
    y_train, y_test = (load[~april][::4] - y_mean) / y_std, (load[april] - y_mean) / y_std

    def fit_transform(x):
        low, high = x.min(0), x.max(0)
        return (x - low) / (high - low)

    if mended:
        low, high = x_train.min(0), x_train.max(0)
        x_test = (x_test - low) / (high - low)
    else:
        x_test = fit_transform(x_test)
    x_train = fit_transform(x_train)

    class Load(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (32, 16):
                x = nn.tanh(nn.Dense(width)(x))
            return nn.Dense(1)(x)[..., 0]

    model = Load()

    def mse(params, batch, key):
        return jnp.mean((model.apply(params, batch["x"]) - batch["y"]) ** 2)

    def metrics(params, batch):
        error = model.apply(params, batch.examples["x"]) - batch.examples["y"]
        return {"val_mse": jnp.mean(error**2, where=batch.where)}

    train = nnlearn.make_train(
        mse,
        lambda hp: nnlearn.nadam(hp["lr"]),
        nnlearn.shuffled({"x": x_train, "y": y_train}, 32, remainder="drop"),
        lambda key: model.init(key, x_train[:1]),
        epochs=25,
        evaluate=nnlearn.evaluation(metrics, {"x": x_test, "y": y_test}),
    )
    return Case(train, {"lr": 0.005}, model.apply, (x_test, y_test), "val_mse", mode="min")


@report(
    REPORTS,
    "https://github.com/you915/Sentiment-Analysis-of-Twitter-Data-for-predicting-Apple-stock-price/issues/2: the "
    "target value is set as input feature of the LSTM (also Soroush98/LSTM-CNN_Stock#1)",
    "target_leak",
)
def target_in_the_lstm_window(mended):
    rng = np.random.RandomState(1)
    days, lookback = 1300, 10
    sentiment, volume, change = np.zeros(days), rng.randn(days), np.zeros(days)
    for t in range(2, days):
        sentiment[t] = 0.5 * sentiment[t - 1] + rng.randn()
        change[t] = 0.7 * sentiment[t - 1] - 0.4 * sentiment[t - 2] + 0.3 * volume[t - 1] + 0.4 * rng.randn()
    df = np.stack([sentiment, volume, change], 1).astype(np.float32)
    df = (df - df[:1000].mean(0)) / df[:1000].std(0)
    X, y = [], []
    for i in range(lookback, days):
        X.append(df[i - lookback : i] if mended else df[i - lookback + 1 : i + 1])
        y.append(df[i, 2])
    X, y = np.array(X), np.array(y)
    X_train, y_train, X_test, y_test = X[:1000], y[:1000], X[1000:], y[1000:]

    class Lstm(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(16))(x)
            return nn.Dense(1)(x[:, -1])[:, 0]

    model = Lstm()

    def loss_fn(params, batch, key):
        x, y = batch
        return jnp.mean(optax.squared_error(model.apply(params, x), y))

    def evaluate(params):
        error = model.apply(params, X_test) - y_test
        return {"rmse": jnp.sqrt(jnp.mean(error**2)), "mae": jnp.mean(jnp.abs(error))}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((X_train, y_train), 25, remainder="drop"),
        lambda key: model.init(key, X[:1]),
        epochs=12,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.005}, model.apply, (X_test, y_test), "rmse", mode="min")


@report(
    REPORTS,
    "https://github.com/Kim-Minseon/RoCL/issues/3: a missing negative: cosine similarity as the training loss would "
    "actually minimize it (also hundredblocks/semantic-search#4)",
    "sign_error",
)
def cosine_similarity_minimised(mended):
    rng = np.random.RandomState(2)
    words = rng.randn(12, 25)  # word vectors of the labels
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    prototypes = rng.randn(12, 40)
    label = rng.randint(0, 12, 1500)
    features = np.maximum(prototypes[label] + 0.7 * rng.randn(1500, 40), 0).astype(np.float32)
    train_set = (features[:1200], words[label[:1200]])
    test_x, test_label = features[1200:], label[1200:]

    def init(key):
        k1, k2 = random.split(key)
        he = jax.nn.initializers.he_uniform()
        return {"fc1": he(k1, (40, 64)), "b1": jnp.zeros(64), "fc2": he(k2, (64, 25)), "b2": jnp.zeros(25)}

    def embed(p, x):
        return jax.nn.leaky_relu(x @ p["fc1"] + p["b1"]) @ p["fc2"] + p["b2"]

    def loss(p, batch, key):
        similarity = optax.cosine_similarity(embed(p, batch[0]), batch[1], epsilon=1e-6)
        return jnp.mean(-similarity) if mended else jnp.mean(similarity)

    def evaluate(p):
        found = jnp.argmax(embed(p, test_x) @ words.T, axis=1)
        return {"top1": jnp.mean(found == test_label)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 40, remainder="drop"),
        init,
        epochs=12,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.001}, embed, (test_x, words[test_label]), "top1")


@report(
    REPORTS,
    "https://github.com/hirofumi0810/neural_sp/issues/137: warmup_n_steps is 25000, the learning rate goes straight up "
    "until the end of the training, and the result is not good",
    "schedule_mistimed",
    "learning_rate_too_low",
)
def warmup_of_25000_steps(mended):
    length, symbols, width = 8, 10, 32
    n_steps = 500
    warmup_n_steps = 100 if mended else 25000

    def batch_of_reversed(key, step):
        source = random.randint(key, (32, length), 0, symbols)
        return source, source[:, ::-1]

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(symbols, width)(tokens)
            x = x + self.param("positions", nn.initializers.normal(0.5), (length, width))
            for _ in range(2):
                x = x + nn.SelfAttention(num_heads=4)(nn.LayerNorm()(x))
                x = x + nn.Dense(width)(nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(x))))
            return nn.Dense(symbols)(nn.LayerNorm()(x))

    model = Transformer()

    def noam(lr):
        def schedule(step):
            step = step + 1
            return lr * warmup_n_steps**0.5 * jnp.minimum(step * warmup_n_steps**-1.5, step**-0.5)

        return schedule

    def loss_fn(params, batch, key):
        logits = model.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    x_dev, y_dev = batch_of_reversed(random.key(99), 0)

    def evaluate(params):
        logits = model.apply(params, x_dev)
        return {"token_accuracy": jnp.mean(logits.argmax(-1) == y_dev)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(noam(hp["lr"]), b2=0.98),
        nnlearn.generated(batch_of_reversed),
        lambda key: model.init(key, x_dev[:1]),
        steps=n_steps,
        evaluate=evaluate,
        check_every=50,
    )
    return Case(train, {"lr": 0.003}, model.apply, (x_dev, y_dev), "token_accuracy")


@report(
    REPORTS,
    'https://github.com/keras-team/keras/issues/7742 (and a course\'s "Vanishing gradients with RNNs"): a gap of many '
    "steps between the cause and the output is not learnt by a plain recurrent network",
    "vanishing_gradients",
)
def rnn_forgets_the_first_symbol(mended):
    hidden, length = 28, 40

    def draw(key, n):  # the first symbol decides, noise follows
        k1, k2 = random.split(key)
        first = random.randint(k1, (n,), 0, 4)
        noise = random.normal(k2, (n, length, 4)) * 0.5
        return noise.at[:, 0].add(2.0 * jax.nn.one_hot(first, 4)), first

    def init(key):
        k = random.split(key, 3)
        bound = hidden**-0.5
        gates = 3 if mended else 1
        bias = jnp.zeros((gates, hidden))
        return {
            "ih": random.uniform(k[0], (gates, 4, hidden), minval=-bound, maxval=bound),
            "hh": random.uniform(k[1], (gates, hidden, hidden), minval=-bound, maxval=bound),
            "b": bias.at[1].set(3.0) if mended else bias,
            "out": random.uniform(k[2], (hidden, 4), minval=-bound, maxval=bound),
        }

    def rnn_cell(p, h, x):
        return jnp.tanh(x @ p["ih"][0] + h @ p["hh"][0] + p["b"][0])

    def gru_cell(p, h, x):
        r = jax.nn.sigmoid(x @ p["ih"][0] + h @ p["hh"][0] + p["b"][0])
        z = jax.nn.sigmoid(x @ p["ih"][1] + h @ p["hh"][1] + p["b"][1])
        n = jnp.tanh(x @ p["ih"][2] + r * (h @ p["hh"][2]) + p["b"][2])
        return z * h + (1 - z) * n

    def classify(p, xs):
        cell = gru_cell if mended else rnn_cell
        h0 = jnp.zeros((len(xs), hidden))
        h, _ = lax.scan(lambda h, x: (cell(p, h, x), None), h0, jnp.swapaxes(xs, 0, 1))
        return h @ p["out"]

    def loss(p, batch, key):
        return nnlearn.cross_entropy(classify(p, batch[0]), batch[1])

    x_val, y_val = draw(random.key(7), 256)

    def evaluate(p):
        return {"accuracy": jnp.mean(classify(p, x_val).argmax(-1) == y_val)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.generated(lambda key, step: draw(key, 32)),
        init,
        steps=600,
        evaluate=evaluate,
        check_every=50,
    )
    return Case(train, {"lr": 0.005}, classify, (x_val, y_val), "accuracy")
