"""Handwritten digits: 5,000 MNIST images for a convolutional network, and small scans for a perceptron."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.data import Examples, Split, split
from nnlearn.datasets import load
from nnlearn.losses import accuracy, cross_entropy
from nnlearn.models import mlp
from nnlearn.models.convnet import convnet
from nnlearn.settings import comparable
from nnlearn.tasks.baselines import linear_map, majority
from nnlearn.tasks.objectives import classification
from nnlearn.tasks.task import Task, warmed_adamw
from nnlearn.types import Key, StatefulModel


def mnist(
    *,
    seed: int = 0,
    data: Examples | None = None,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int | Sequence[int] = 1,
    stride: int = 2,
    shift: int = 2,
    epochs: int = 20,
    batch_size: int = 64,
    method: Literal["auto", "convolution", "patches"] = "auto",
) -> Task:
    """Classify 28 x 28 images of digits with a residual network with batch normalisation.

    Every training image is shifted by a few pixels at random. Baselines: the most frequent digit, and ridge regression.

    Args:
      seed: seed of the split, 70 / 15 / 15.
      data: images (n, rows, columns, channels) in [0, 1] and their classes (n,); None for MNIST.
      widths, blocks, stride, method: arguments of ``convnet``.
      shift: the largest shift of a training image in each direction, in pixels.
      epochs: passes over the training part.
      batch_size: number of images in a batch.
    """
    parts, source, licence = _images("mnist", seed, data)
    classes = int(np.max(parts.train.targets)) + 1
    model = convnet(parts.train.inputs.shape[-1], classes, widths=widths, blocks=blocks, stride=stride, method=method)
    assert isinstance(model, StatefulModel)  # batch normalisation has running statistics
    return Task(
        name="mnist",
        **parts._asdict(),
        model=model,
        loss_fn=_shifting_loss(model, shift),
        metrics_fn=classification(model)[1],
        metric="accuracy",
        mode="max",
        target=0.98,
        baselines=_baselines(parts),
        make_tx=functools.partial(warmed_adamw, size=len(parts.train.targets), batch_size=batch_size, epochs=epochs),
        hparams={"learning_rate": 1e-2, "weight_decay": 0.05},
        batch_size=batch_size,
        epochs=epochs,
        source=source,
        licence=licence,
    )


def digits(*, seed: int = 0, data: Examples | None = None, hidden: Sequence[int] = (512,), epochs: int = 40) -> Task:
    """Classify 8 x 8 scans of digits with a perceptron. Baselines: the most frequent digit, and ridge regression.

    Args:
      seed: seed of the split, 70 / 15 / 15.
      data: images (n, rows, columns, channels) in [0, 1] and their classes (n,); None for scikit-learn's digits.
      hidden: widths of the perceptron's hidden layers.
      epochs: passes over the training part.
    """
    parts, source, licence = _images("digits", seed, data)
    classes = int(np.max(parts.train.targets)) + 1
    parts = Split(*(part._replace(inputs=_flat(part.inputs)) for part in parts))
    model = mlp((parts.train.inputs.shape[1], *hidden, classes), norm="layer", dropout=0.5)
    loss_fn, metrics_fn = classification(model, label_smoothing=0.1)
    batch_size = 64
    return Task(
        name="digits",
        **parts._asdict(),
        model=model,
        loss_fn=loss_fn,
        metrics_fn=metrics_fn,
        metric="accuracy",
        mode="max",
        target=0.97,
        baselines=_baselines(parts),
        make_tx=functools.partial(warmed_adamw, size=len(parts.train.targets), batch_size=batch_size, epochs=epochs),
        hparams={"learning_rate": 5e-3, "weight_decay": 0.1},
        batch_size=batch_size,
        epochs=epochs,
        source=source,
        licence=licence,
    )


@comparable
def _shifting_loss(model: StatefulModel, shift: int) -> Callable:
    def loss_fn(params, batch, key, model_state):
        (images, labels), where = batch
        shift_key, model_key = jax.random.split(key)
        images = shifted(shift_key, images, shift)
        logits, model_state = model.apply(params, model_state, images, model_key, where=where)
        loss = cross_entropy(logits, labels, label_smoothing=0.1, where=where)
        return loss, {"accuracy": accuracy(logits, labels, where)}, model_state

    return loss_fn


def shifted(key: Key, images: jax.Array, most: int) -> jax.Array:
    """Shift every image of a batch by up to ``most`` pixels, vertically and horizontally, and fill with 0.

    >>> shifted(jax.random.key(0), jnp.ones((5, 8, 8, 1)), 2).shape
    (5, 8, 8, 1)
    """
    size, rows, columns, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    moves = jax.random.randint(key, (size, 2), 0, 2 * most + 1)

    def one(image, move):
        return jax.lax.dynamic_slice(image, (move[0], move[1], 0), (rows, columns, channels))

    return jax.vmap(one)(padded, moves)


def _images(name: str, seed: int, data: Examples | None) -> tuple[Split, str, str]:
    """The three parts, with images of shape (n, rows, columns, channels), and their source and licence."""
    if data is not None:
        return split(data, seed=seed, stratify=data.targets), "given by the caller", "the caller's"
    bundle = load(name, seed=seed)
    shape = (-1, *bundle.input_shape, 1)
    parts = Split(*(part._replace(inputs=part.inputs.reshape(shape)) for part in bundle.parts))
    return parts, bundle.source, bundle.licence


def _baselines(parts: Split) -> dict[str, float]:
    """The test accuracy of the most frequent training class, and of a linear map to one-hot codes."""
    train, test = parts.train, parts.test
    one_hot = np.eye(int(np.max(train.targets)) + 1)[train.targets]
    scores = linear_map(train.inputs, one_hot, test.inputs, ridge=1e-2)  # some pixels are always 0
    return {
        "majority": majority(train.targets, test.targets),
        "ridge regression": float(np.mean(test.targets == np.argmax(scores, axis=1))),
    }


def _flat(inputs: np.ndarray) -> np.ndarray:
    return inputs.reshape(len(inputs), -1)
