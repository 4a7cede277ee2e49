"""Read handwritten digits: ten trainings with everything in them, as one compiled program.

The data are 1797 scans of 8 x 8 pixels. Each of ten seeds draws its own split (70 % to learn from, 15 % to choose
settings by, 15 % to test), its own start, its own order of the batches and its own dropout. The network has one hidden
layer of 512 units with layer normalisation; AdamW trains it for 40 epochs, with a rate that warms up and then follows a
cosine down to zero. The settings below were chosen by validation accuracy, without a look at the test parts (though all
seeds split the same scans, so that one's validation part shares some with another's test part). On a CPU this takes
some 15 seconds and prints::

    validation accuracy over 10 seeds: 98.4 % +- 0.7 %
    test accuracy over 10 seeds:       98.9 % +- 0.6 %

The last digit may differ between machines. That the test came out above the validation is chance: over the seeds 10 to
29 both are 98.8 %.
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
    """Mean cross-entropy with smoothed labels; the key makes it training, so that dropout is active."""
    (inputs, targets), where = batch
    logits = MODEL.apply(params, inputs, key)
    return cross_entropy(logits, targets, label_smoothing=0.1, where=where)


def train(parts, key):
    """A whole run, a pure function of its data and its key.

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
    """The data set split in ten ways: a ``Split`` whose arrays have a leading axis of seeds."""
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
