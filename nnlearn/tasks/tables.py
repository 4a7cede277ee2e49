"""Tabular tasks: the price of diamonds, and the diagnosis of tumours."""

import functools
from collections.abc import Sequence

import numpy as np

from nnlearn.data import Examples, example_count, split, standardize
from nnlearn.datasets import load
from nnlearn.datasets.tables import diamonds as read_diamonds
from nnlearn.losses import huber_loss
from nnlearn.models import mlp
from nnlearn.tasks.baselines import linear_map, majority
from nnlearn.tasks.objectives import classification, regression
from nnlearn.tasks.task import Task, warmed_adamw


def diamonds(
    *, seed: int = 0, data: Examples | None = None, hidden: Sequence[int] = (128, 128), epochs: int = 60
) -> Task:
    """Predict the logarithm of a diamond's price from its size and quality; an absolute error of 0.1 is about 10 %.

    The loss is Huber's, because some rows have wrong lengths, such as 0. Baselines: the median, and least squares.

    Args:
      seed: seed of the split, 70 / 15 / 15.
      data: inputs (n, features) and prices (n, 1) above 0; None for the diamonds of ``nnlearn.datasets``.
      hidden: widths of the perceptron's hidden layers.
      epochs: passes over the training part.
    """
    data = read_diamonds() if data is None else data
    parts = split(Examples(data.inputs, np.log(data.targets)), seed=seed)
    inputs, _ = standardize(*(part.inputs for part in parts))
    # Missing and mistyped lengths lie dozens of standard deviations away.
    train, validation, test = (
        Examples(np.clip(one, -5, 5), part.targets) for one, part in zip(inputs, parts, strict=True)
    )
    middle = np.float32(np.median(train.targets))
    train, validation, test = (part._replace(targets=part.targets - middle) for part in (train, validation, test))
    model = mlp((train.inputs.shape[1], *hidden, 1), activation="gelu")
    loss_fn, metrics_fn = regression(model, functools.partial(huber_loss, delta=0.2))
    linear = linear_map(train.inputs, train.targets, test.inputs)
    batch_size = 256
    return Task(
        name="diamonds",
        train=train,
        validation=validation,
        test=test,
        model=model,
        loss_fn=loss_fn,
        metrics_fn=metrics_fn,
        metric="absolute_error",
        mode="min",
        target=0.075,
        baselines={
            "median": float(np.mean(np.abs(test.targets))),
            "least squares": float(np.mean(np.abs(linear - test.targets))),
        },
        make_tx=functools.partial(warmed_adamw, size=example_count(train), batch_size=batch_size, epochs=epochs),
        hparams={"learning_rate": 5e-3, "weight_decay": 0.1},
        batch_size=batch_size,
        epochs=epochs,
        source="53,940 diamonds of 2017, collected for ggplot2, from plotnine's diamonds.csv",
        licence="MIT (plotnine)",
    )


def breast_cancer(*, seed: int = 0, hidden: Sequence[int] = (32,), epochs: int = 40) -> Task:
    """Classify tumours as malignant or benign from 30 measurements of a cell sample. Baseline: the more frequent class.

    Args:
      seed: seed of the split, 70 / 15 / 15; the test part has 86 patients, so that each is more than 1 % of the
        accuracy.
      hidden: widths of the perceptron's hidden layers.
      epochs: passes over the training part.
    """
    bundle = load("breast-cancer", seed=seed)
    model = mlp((30, *hidden, 2))
    loss_fn, metrics_fn = classification(model, label_smoothing=0.05)
    batch_size = 32
    return Task(
        name="breast-cancer",
        train=bundle.train,
        validation=bundle.validation,
        test=bundle.test,
        model=model,
        loss_fn=loss_fn,
        metrics_fn=metrics_fn,
        metric="accuracy",
        mode="max",
        target=0.95,
        baselines={"majority": majority(bundle.train.targets, bundle.test.targets)},
        make_tx=functools.partial(warmed_adamw, size=example_count(bundle.train), batch_size=batch_size, epochs=epochs),
        hparams={"learning_rate": 3e-3, "weight_decay": 0.1},
        batch_size=batch_size,
        epochs=epochs,
        source=bundle.source,
        licence=bundle.licence,
    )
