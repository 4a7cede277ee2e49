"""Three cures for learning by heart, each on its own, in one compiled program.

A network of 256 hidden units sees 200 digits, of which one in five was given a label at random. Left alone it learns
them all by heart, and its loss on other digits, whose labels are as noisy, grows far above that on its own. Dropout,
weight decay and early stopping each narrow that gap. Eight seeds draw their own digits, labels, start and batches,
and what the four ways differ in is numbers alone, so that all 32 runs are one ``vmap``. On a CPU this takes some 15
seconds and prints::

    loss on others less loss on the training digits, 8 seeds
    nothing         1.93 +- 0.14   accuracy on clean labels 82.9 % +- 4.1 %
    dropout         0.98 +- 0.08   accuracy on clean labels 90.0 % +- 2.6 %
    weight decay    1.16 +- 0.10   accuracy on clean labels 86.4 % +- 3.0 %
    early stopping  0.60 +- 0.06   accuracy on clean labels 89.5 % +- 2.6 %

The accuracy is that on 270 digits of the test part, with their right labels. Early stopping looks at the other digits,
so its gap flatters it a little; the test digits have chosen nothing.
"""

import jax
import jax.numpy as jnp

import nnlearn
from nnlearn.data import Examples, take
from nnlearn.datasets import load
from nnlearn.losses import accuracy, cross_entropy
from nnlearn.models import mlp

SEEDS, EPOCHS, SIZE, WRONG, NEVER = 8, 100, 200, 0.2, 1e9
WAYS = {
    "nothing": {"dropout": 0.0, "decay": 0.0, "patience": NEVER},
    "dropout": {"dropout": 0.8, "decay": 0.0, "patience": NEVER},
    "weight decay": {"dropout": 0.0, "decay": 1.0, "patience": NEVER},
    "early stopping": {"dropout": 0.0, "decay": 0.0, "patience": 5.0},
}
DIGITS = load("digits")


def loss_fn(params, batch, key, hparams):
    """Mean cross-entropy; with a key the network drops as many of its units as the hyper-parameters say."""
    model = mlp((64, 256, 10), dropout=hparams["dropout"])
    return cross_entropy(model.apply(params, batch.inputs, key), batch.targets)


def noisy_parts(key):
    """Digits to train on and 800 others, with some labels replaced by any of the ten."""
    order_key, which_key, label_key = jax.random.split(key, 3)
    size = len(DIGITS.train.targets)
    wrong = jax.random.bernoulli(which_key, WRONG, (size,))
    labels = jnp.where(wrong, jax.random.randint(label_key, (size,), 0, 10), DIGITS.train.targets)
    order = jax.random.permutation(order_key, size)
    return (take(Examples(DIGITS.train.inputs, labels), rows) for rows in (order[:SIZE], order[SIZE : SIZE + 800]))


def train(hparams, seed):
    """A whole run: the losses on its own digits and on the others, and the accuracy on clean ones."""
    data_key, run_key = jax.random.split(jax.random.key(seed))
    own, others = noisy_parts(data_key)
    run = nnlearn.make_train(
        loss_fn,
        lambda hparams: nnlearn.adamw(3e-3, weight_decay=hparams["decay"]),
        nnlearn.shuffled(own, 50, remainder="drop"),
        mlp((64, 256, 10)).init,
        epochs=EPOCHS,
        evaluate=lambda params, hparams: {"others": loss_fn(params, others, None, hparams)},
        stop=lambda hparams: nnlearn.patience("others", hparams["patience"], restore_best=False),
    )
    params = run(hparams, run_key)[0].params
    right = accuracy(mlp((64, 256, 10)).apply(params, DIGITS.test.inputs), DIGITS.test.targets)
    return loss_fn(params, own, None, hparams), loss_fn(params, others, None, hparams), right


def main():
    """Returns the gaps and the accuracies by way, shape (8,) each."""
    hparams = jax.tree.map(lambda *values: jnp.array(values), *WAYS.values())
    over_seeds = jax.vmap(train, in_axes=(None, 0))
    own, others, right = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))(hparams, jnp.arange(SEEDS))
    print(f"loss on others less loss on the training digits, {SEEDS} seeds")
    found = {name: (others[way] - own[way], right[way]) for way, name in enumerate(WAYS)}
    for name, (gap, right_s) in found.items():
        share = f"{100 * right_s.mean():.1f} % +- {100 * right_s.std(ddof=1):.1f} %"
        print(f"{name:15} {gap.mean():.2f} +- {gap.std(ddof=1):.2f}   accuracy on clean labels {share}")
    return found


if __name__ == "__main__":
    main()
