"""The run on handwritten digits that the pages of findings break, one part at a time."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import nnlearn


def digits():
    """1,000 training and 400 validation examples: 64 pixels from 0 to 1, and the class."""
    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    inputs, labels = (pixels[order] / 16).astype(np.float32), classes[order].astype(np.int32)
    return (inputs[:1000], labels[:1000]), (inputs[1000:1400], labels[1000:1400])


def layers(*sizes, scale=2.0):
    """``init(key)`` of dense layers: weights with standard deviation sqrt(scale / inputs), biases 0."""

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            {"w": jax.random.normal(key, (m, n)) * (scale / m) ** 0.5, "b": jnp.zeros(n)}
            for key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    return init


def forward(params, inputs, activation=jax.nn.relu):
    """The outputs of dense layers, with an activation between them."""
    for layer in params[:-1]:
        inputs = activation(inputs @ layer["w"] + layer["b"])
    return inputs @ params[-1]["w"] + params[-1]["b"]


def cross_entropy(logits, labels):
    return jnp.mean(nnlearn.cross_entropy(logits, labels))


def squared_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def accuracy(outputs, labels):
    return jnp.mean(jnp.argmax(outputs, -1) == labels)


def make_run(
    init=None,
    predict=forward,
    *,
    tx=None,
    training=None,
    validation=None,
    loss=cross_entropy,
    metric="accuracy",
    measure=accuracy,
    mode="max",
    steps=200,
    batch_size=32,
    shuffle=True,
    augment=None,
    training_predict=None,
):
    """A run, and the other arguments of ``nnlearn.diagnose`` for it.

    Args:
      init, predict: ``init(key)`` and ``predict(params, inputs)`` of the network; by default one hidden layer.
      tx: by default ``nnlearn.adam(3e-3)``.
      training, validation: inputs and targets; by default handwritten digits.
      augment: ``augment(key, inputs)`` in training.
      training_predict: ``training_predict(params, inputs, key)`` in place of ``predict`` in training.
    """
    digits_training, digits_validation = digits()
    validation = digits_validation if validation is None else validation

    def loss_fn(params, batch, key):
        inputs, targets = batch
        if augment is not None:
            inputs = augment(key, inputs)
        outputs = training_predict(params, inputs, key) if training_predict else predict(params, inputs)
        return loss(outputs, targets)

    def metrics_fn(params, batch):
        inputs, targets = batch.examples
        return {metric: measure(predict(params, inputs), targets)}

    train = nnlearn.make_train(
        loss_fn,
        nnlearn.adam(3e-3) if tx is None else tx,
        nnlearn.shuffled(
            digits_training if training is None else training, batch_size, shuffle=shuffle, remainder="drop"
        ),
        layers(64, 64, 10) if init is None else init,
        steps=steps,
        evaluate=nnlearn.evaluation(metrics_fn, validation),
        check_every=20,
    )
    return train, {"predict": predict, "validation": validation, "metric": metric, "mode": mode}
