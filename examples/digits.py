"""Classify handwritten digits: ten complete training runs as one compiled program.

The data are 1797 scans of 8 x 8 pixels. Each of ten seeds has its own split (70 % training, 15 % validation, 15 %
test), initial parameters, order of batches and dropout. The network has one hidden layer of 512 units with layer
normalisation. AdamW trains it for 40 epochs with a warmup and a cosine decay to zero. The hyper-parameters were chosen
by validation accuracy, without the test parts. (All seeds split the same scans, so the validation part of one seed
shares some scans with the test part of another.) On a CPU this takes about 15 seconds and prints::

    validation accuracy over 10 seeds: 98.4 % +- 0.7 %
    test accuracy over 10 seeds:       98.9 % +- 0.6 %

The last digit may differ between machines. The test accuracy is above the validation accuracy by chance: over seeds 10
to 29 both are 98.8 %.
"""

import jax
import jax.numpy as jnp

import nnlearn
from nnlearn.data import batch_count, example_count
from nnlearn.datasets import load
from nnlearn.losses import accuracy, cross_entropy
from nnlearn.models import mlp

SEEDS, EPOCHS, BATCH_SIZE = 10, 40, 64
MODEL = mlp((64, 512, 10), norm="layer", dropout=0.5)


def loss_fn(params, batch, key):
    """Mean cross-entropy with label smoothing; with a key the model is in training mode and dropout is active."""
    (inputs, targets), where = batch
    logits = MODEL.apply(params, inputs, key)
    return cross_entropy(logits, targets, label_smoothing=0.1, where=where)


def train(parts, key):
    """Train once, as a pure function of the data and a key.

    Returns the validation accuracy, the test accuracy, and the loss at every step of every epoch.
    """
    steps = EPOCHS * batch_count(example_count(parts.train), BATCH_SIZE)
    schedule = nnlearn.warmup_cosine_decay_schedule(0.0, 5e-3, warmup_steps=steps // 10, decay_steps=steps)
    tx = nnlearn.adamw(schedule, weight_decay=0.1)
    epoch = nnlearn.make_epoch(nnlearn.make_step(loss_fn, tx), parts.train, BATCH_SIZE)

    init_key, dropout_key, order_key = jax.random.split(key, 3)
    state = nnlearn.init_state(MODEL.init(init_key), tx, dropout_key)
    state, trace = jax.lax.scan(epoch, state, jax.random.split(order_key, EPOCHS))

    def accuracy_on(part):
        return accuracy(MODEL.apply(state.params, part.inputs), part.targets)

    return accuracy_on(parts.validation), accuracy_on(parts.test), trace.loss


def load_splits():
    """Ten splits of the data set: a ``Split`` whose arrays have a leading axis of seeds."""
    splits = [load("digits", seed=seed).parts for seed in range(SEEDS)]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *splits)


def main():
    """Returns validation and test accuracies, shape (10,) each, and the losses, shape (10, epochs, steps)."""
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    validation, test, losses = jax.jit(jax.vmap(train))(load_splits(), keys)
    for name, values in {"validation accuracy": validation, "test accuracy": test}.items():
        title = f"{name} over {SEEDS} seeds:"
        print(f"{title:34} {100 * values.mean():.1f} % +- {100 * values.std(ddof=1):.1f} %")
    return validation, test, losses


if __name__ == "__main__":
    main()
