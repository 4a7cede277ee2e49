"""Synthetic tasks: reconstruction of masked digits, prediction of clicks, and classification of graphs."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.data import Examples, split
from nnlearn.datasets import DataBundle, load
from nnlearn.losses import sigmoid_binary_cross_entropy
from nnlearn.losses.arguments import weighted_mean
from nnlearn.models import mlp
from nnlearn.models.embedding import factorization_machine
from nnlearn.models.graph import Graphs, graph_network
from nnlearn.optimizers import adam
from nnlearn.settings import comparable
from nnlearn.tasks.baselines import majority
from nnlearn.tasks.objectives import Objective, classification
from nnlearn.tasks.task import Task, warmed_adamw
from nnlearn.types import GradientTransformation, Model


def masked_digits(
    *, seed: int = 0, data: DataBundle | None = None, hidden: int = 256, share: float = 0.5, epochs: int = 60
) -> Task:
    """Reconstruct the hidden pixels of a digit from the others; ``loss`` is the mean squared error of hidden pixels.

    Training hides other random pixels at every step; the metrics always hide the same ones. Baseline: the mean of each
    pixel over the training part.

    Args:
      seed: seed of the split.
      data: a data set of images in [0, 1]; None for scikit-learn's digits.
      hidden: width of the perceptron's two hidden layers.
      share: probability of hiding a pixel, in (0, 1).
      epochs: passes over the training part.
    """
    bundle = load("digits", seed=seed) if data is None else data
    train, validation, test = (part.inputs for part in bundle.parts)
    pixels = train.shape[1]
    model = mlp((2 * pixels, hidden, hidden, pixels), activation="gelu")
    loss_fn, metrics_fn = _reconstruction(model, share, pixels)
    return Task(
        name="masked-digits",
        train=train,
        validation=validation,
        test=test,
        model=model,
        loss_fn=loss_fn,
        metrics_fn=metrics_fn,
        metric="loss",
        mode="min",
        target=0.045,
        baselines={"mean": float(np.mean(np.square(test - np.mean(train, axis=0, keepdims=True))))},
        make_tx=functools.partial(warmed_adamw, size=len(train), batch_size=64, epochs=epochs),
        hparams={"learning_rate": 2e-3, "weight_decay": 0.1},
        batch_size=64,
        epochs=epochs,
        source=bundle.source,
        licence=bundle.licence,
    )


@comparable
def _reconstruction(model: Model, share: float, pixels: int) -> Objective:
    def loss_of(params, batch, hidden_bp, drop=None):
        shown_bp = jnp.where(hidden_bp, 0, batch.examples)
        guessed_bp = model.apply(params, jnp.concatenate([shown_bp, hidden_bp.astype(shown_bp.dtype)], axis=-1), drop)
        return weighted_mean(jnp.square(guessed_bp - batch.examples), None, hidden_bp & batch.where[:, None])

    def loss_fn(params, batch, key):
        return loss_of(params, batch, jax.random.bernoulli(key, share, batch.examples.shape), key)

    def metrics_fn(params, batch):
        hidden_p = jax.random.bernoulli(jax.random.key(0), share, (pixels,))  # the same pixels for any batch size
        return {"loss": loss_of(params, batch, jnp.broadcast_to(hidden_p[None], batch.examples.shape))}

    return loss_fn, metrics_fn


@comparable
def _click_objective(model: Model) -> Objective:
    def loss_fn(params, batch, key):
        logits = model.apply(params, batch.examples.inputs, key)
        return weighted_mean(sigmoid_binary_cross_entropy(logits, batch.examples.targets), None, batch.where)

    def metrics_fn(params, batch):
        return {"loss": loss_fn(params, batch, None)}

    return loss_fn, metrics_fn


def _adam_at(hparams: Mapping[str, Any]) -> GradientTransformation:
    return adam(hparams["learning_rate"])


def clicks(
    *, seed: int = 0, examples: int = 40_000, fields: int = 6, values: int = 200, features: int = 8, epochs: int = 8
) -> Task:
    """Predict clicks from categories with few frequent values: a batch uses few rows of the embedding tables.

    The click probabilities come from a random factorisation machine, so the smallest possible ``loss``, that of the
    true probabilities, is known. Baselines: that loss, and the loss of the mean click rate.

    Args:
      seed: seed of the data and of the split.
      examples: number of examples, split 70 / 15 / 15.
      fields: number of categories of an example.
      values: number of values of a category.
      features: length of the model's vectors.
      epochs: passes over the training part.
    """
    random = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, values + 1)
    shown = random.choice(values, (examples, fields), p=frequency / frequency.sum()).astype(np.int32)
    columns = np.arange(fields)
    weights = random.normal(0, 0.5, (fields, values))[columns, shown]
    vectors = random.normal(0, 0.45, (fields, values, 4))[columns, shown]
    pairs = (np.square(vectors.sum(axis=1)).sum(axis=1) - np.square(vectors).sum(axis=(1, 2))) / 2
    logits = weights.sum(axis=1) + pairs - 1.0
    clicked = (random.random(examples) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    everything = split({"shown": shown, "clicked": clicked, "logits": logits}, seed=seed)
    train, validation, test = (Examples(part["shown"], part["clicked"]) for part in everything)
    model = factorization_machine((values,) * fields, features)
    loss_fn, metrics_fn = _click_objective(model)

    def entropy(logits):
        return float(np.mean(np.logaddexp(0, logits) - test.targets * logits))

    rate = np.mean(train.targets)
    baselines = {
        "mean rate": entropy(np.log(rate / (1 - rate))),
        "true probabilities": entropy(everything.test["logits"]),
    }
    return Task(
        name="clicks",
        train=train,
        validation=validation,
        test=test,
        model=model,
        loss_fn=loss_fn,
        metrics_fn=metrics_fn,
        metric="loss",
        mode="min",
        target=(baselines["mean rate"] + baselines["true probabilities"]) / 2,
        baselines=baselines,
        make_tx=_adam_at,
        hparams={"learning_rate": 3e-3},
        batch_size=256,
        epochs=epochs,
        source="drawn at random",
        licence="none needed",
    )


def graphs(*, seed: int = 0, examples: int = 2000, nodes: int = 16, hidden: int = 32, epochs: int = 20) -> Task:
    """Classify graphs by whether their edges join nodes of equal or of different colours.

    Half of the graphs join nodes of equal colour with probability 0.35 and nodes of different colour with 0.15, the
    other half the reverse. Neither colours nor edges alone determine the class. Baseline: the more frequent class.

    Args:
      seed: seed of the data and of the split.
      examples: number of graphs, split 70 / 15 / 15.
      nodes: largest number of nodes of a graph; every graph has at least half as many.
      hidden: number of features of a node within the network.
      epochs: passes over the training part.
    """
    random = np.random.default_rng(seed)
    labels = (np.arange(examples) % 2).astype(np.int32)
    colour_gn = random.integers(0, 2, (examples, nodes))
    there_gn = np.arange(nodes) < random.integers(nodes // 2, nodes + 1, (examples, 1))
    same_gnm = colour_gn[:, :, None] == colour_gn[:, None, :]
    chance_gnm = np.where(same_gnm == (labels == 1)[:, None, None], 0.35, 0.15)
    upper_gnm = np.triu(random.random((examples, nodes, nodes)) < chance_gnm, k=1)
    joined_gnm = (upper_gnm | upper_gnm.transpose(0, 2, 1)) & there_gn[:, :, None] & there_gn[:, None, :]
    most = int(joined_gnm.sum(axis=(1, 2)).max())
    senders, receivers = np.zeros((2, examples, most), np.int32)
    edge_where = np.zeros((examples, most), bool)
    for graph, joined_nm in enumerate(joined_gnm):
        ends = np.nonzero(joined_nm)
        senders[graph, : len(ends[0])], receivers[graph, : len(ends[1])] = ends
        edge_where[graph, : len(ends[0])] = True
    arrays: Any = np.eye(2, dtype=np.float32)[colour_gn], senders, receivers, there_gn, edge_where
    parts = split(Examples(Graphs(*arrays), labels), seed=seed, stratify=labels)
    model = graph_network(2, hidden, 2, layers=2)
    loss_fn, metrics_fn = classification(model)
    return Task(
        name="graphs",
        train=parts.train,
        validation=parts.validation,
        test=parts.test,
        model=model,
        loss_fn=loss_fn,
        metrics_fn=metrics_fn,
        metric="accuracy",
        mode="max",
        target=0.9,
        baselines={"majority": majority(parts.train.targets, parts.test.targets)},
        make_tx=functools.partial(warmed_adamw, size=len(parts.train.targets), batch_size=64, epochs=epochs),
        hparams={"learning_rate": 2e-3, "weight_decay": 0.1},
        batch_size=64,
        epochs=epochs,
        source="drawn at random",
        licence="none needed",
    )
