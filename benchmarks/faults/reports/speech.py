"""Research code out of issues: speech and graphs."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/apache/mxnet/pull/7727 (and crnn.pytorch#132): characters numbered from 0, 0 is the blank",
    "label_encoding",
)
def character_zero_is_the_blank(mended):
    rng = np.random.default_rng(19)
    alphabet, frames, longest, channels = 5, 18, 4, 8
    sound = rng.normal(size=(alphabet, channels))
    speech, text = np.zeros((3000, frames, channels)), np.full((3000, longest), -1)
    for clip, chars in zip(speech, text, strict=True):
        at = 0
        for i in range(rng.integers(2, longest + 1)):
            chars[i] = rng.integers(alphabet)
            at += rng.integers(1, 3)
            held = rng.integers(2, 4)
            clip[at : at + held] = sound[chars[i]]
            at += held
    speech = (speech + 0.3 * rng.normal(size=speech.shape)).astype(np.float32)
    padding = (text < 0).astype(np.float32)
    first = 1 if mended else 0
    targets = np.where(text < 0, 0, text + first).astype(np.int32)

    class AcousticModel(nn.Module):
        @nn.compact
        def __call__(self, speech):
            before, after = jnp.pad(speech, ((0, 0), (1, 0), (0, 0))), jnp.pad(speech, ((0, 0), (0, 1), (0, 0)))
            x = jnp.concatenate([before[:, :-1], speech, after[:, 1:]], -1)
            x = nn.relu(nn.Dense(32)(x))
            return nn.Dense(alphabet + 1)(x)

    acoustic = AcousticModel()

    def ctc(params, batch, key):
        logits = acoustic.apply(params, batch["speech"])
        no_padding = jnp.zeros(logits.shape[:2])
        return optax.ctc_loss(logits, no_padding, batch["targets"], batch["padding"], blank_id=0).mean()

    def greedy(params, speech):
        path = acoustic.apply(params, speech).argmax(-1)
        new = (path > 0) & (path != jnp.pad(path, ((0, 0), (1, 0)))[:, :-1])
        order = jnp.argsort(~new, axis=1, stable=True)
        chars = jnp.where(new, path - first, -1)
        return jnp.take_along_axis(chars, order, 1)[:, : longest + 1]

    reference = np.pad(text[2600:], ((0, 0), (0, 1)), constant_values=-1)

    def evaluate(params):
        return {"sequence_accuracy": jnp.mean(jnp.all(greedy(params, speech[2600:]) == reference, axis=1))}

    train = nnlearn.make_train(
        ctc,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled(
            {"speech": speech[:2600], "targets": targets[:2600], "padding": padding[:2600]}, 40, remainder="drop"
        ),
        lambda key: acoustic.init(key, speech[:1]),
        epochs=12,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 3e-3}, None, None, "sequence_accuracy")


@report(
    REPORTS,
    "https://github.com/snap-stanford/ogb/issues/285 (and StarE#3): the edge to predict is in the graph that it is "
    "predicted from",
    "target_leak",
    "preprocessing_mismatch",
)
def predicted_edge_stays_in_the_graph(mended):
    rng = np.random.default_rng(23)
    nodes, blocks = 160, np.arange(160) % 6
    chance = np.where(blocks[:, None] == blocks, 0.4, 0.02)
    upper = np.triu(rng.random((nodes, nodes)) < chance, 1)
    edges = rng.permutation(np.argwhere(upper))
    absent = rng.permutation(np.argwhere(np.triu(~upper, 1)))[: len(edges)]
    split = int(0.8 * len(edges))
    graph = np.zeros((nodes, nodes))
    graph[tuple(edges[:split].T)] = 1
    graph += graph.T

    def subgraph_features(pairs):
        """Logarithms of the degrees of both nodes and of the number of walks between them."""
        i, j = pairs.T
        rows = np.arange(len(pairs))
        removed = graph[i, j] if mended else np.zeros(len(pairs))
        walk, counts = np.eye(nodes)[i], []
        for _ in range(4):
            at_i, at_j = walk[rows, i].copy(), walk[rows, j].copy()
            walk = walk @ graph
            walk[rows, j] -= removed * at_i
            walk[rows, i] -= removed * at_j
            counts.append(walk[rows, j])
        degrees = graph.sum(1)
        return np.log1p(np.stack([degrees[i] - removed, degrees[j] - removed, *counts], 1)).astype(np.float32)

    pairs = np.concatenate([edges[:split], absent[:split]]), np.concatenate([edges[split:], absent[split:]])
    x_train, x_val = (subgraph_features(p) for p in pairs)
    y_train, y_val = (np.repeat([1.0, 0.0], len(p) // 2).astype(np.float32) for p in pairs)
    mean, std = x_train.mean(0), x_train.std(0) + 1e-6
    x_train, x_val = (x_train - mean) / std, (x_val - mean) / std

    class LinkPredictor(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(32)(x))
            return nn.Dense(1)(nn.relu(nn.Dense(32)(x)))[:, 0]

    predictor = LinkPredictor()

    def bce(params, batch, key):
        return optax.sigmoid_binary_cross_entropy(predictor.apply(params, batch[0]), batch[1]).mean()

    def accuracy(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean((predictor.apply(params, x) > 0) == (y > 0.5), where=batch.where)}

    train = nnlearn.make_train(
        bce,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((x_train, y_train), 64, remainder="drop"),
        lambda key: predictor.init(key, x_train[:1]),
        epochs=15,
        evaluate=nnlearn.evaluation(accuracy, (x_val, y_val)),
    )
    return Case(train, {"lr": 2e-3}, lambda params, x: predictor.apply(params, x), (x_val, y_val), "accuracy")
