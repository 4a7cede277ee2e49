"""Three regularisers against overfitting, each on its own, in one compiled program.

A network of 256 hidden units trains on 200 digits, one in five of them with a random label. Without regularisation it
memorises them, and its loss on other digits with equally noisy labels grows far above its training loss. Dropout,
weight decay and early stopping each reduce this gap. Eight seeds have their own digits, labels, initial parameters and
batches. The four variants differ only in hyper-parameters, so all 32 runs are one ``vmap``. On a CPU this takes about
15 seconds and prints::

    loss on other digits minus loss on the training digits, 8 seeds
    nothing         1.93 +- 0.14   accuracy on clean labels 82.9 % +- 4.1 %
    dropout         0.98 +- 0.08   accuracy on clean labels 90.0 % +- 2.6 %
    weight decay    1.16 +- 0.10   accuracy on clean labels 86.4 % +- 3.0 %
    early stopping  0.60 +- 0.06   accuracy on clean labels 89.5 % +- 2.6 %

The accuracy is measured on 270 digits of the test part with their correct labels. Early stopping uses the other digits,
so its gap is slightly optimistic; the test digits are not used for any choice.
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
    """Mean cross-entropy; with a key the model is in training mode, with the dropout rate of the hyper-parameters."""
    model = mlp((64, 256, 10), dropout=hparams["dropout"])
    return cross_entropy(model.apply(params, batch.inputs, key), batch.targets)


def noisy_parts(key):
    """Digits for training and 800 others, with some labels replaced by random ones."""
    order_key, which_key, label_key = jax.random.split(key, 3)
    size = len(DIGITS.train.targets)
    wrong = jax.random.bernoulli(which_key, WRONG, (size,))
    labels = jnp.where(wrong, jax.random.randint(label_key, (size,), 0, 10), DIGITS.train.targets)
    order = jax.random.permutation(order_key, size)
    return (take(Examples(DIGITS.train.inputs, labels), rows) for rows in (order[:SIZE], order[SIZE : SIZE + 800]))


def train(hparams, seed):
    """Train once; returns the losses on the training digits and the others, and the accuracy on clean labels."""
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
    """Returns by variant the gaps and the accuracies, shape (8,) each."""
    hparams = jax.tree.map(lambda *values: jnp.array(values), *WAYS.values())
    over_seeds = jax.vmap(train, in_axes=(None, 0))
    own, others, right = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))(hparams, jnp.arange(SEEDS))
    print(f"loss on other digits minus loss on the training digits, {SEEDS} seeds")
    found = {name: (others[way] - own[way], right[way]) for way, name in enumerate(WAYS)}
    for name, (gap, right_s) in found.items():
        share = f"{100 * right_s.mean():.1f} % +- {100 * right_s.std(ddof=1):.1f} %"
        print(f"{name:15} {gap.mean():.2f} +- {gap.std(ddof=1):.2f}   accuracy on clean labels {share}")
    return found


if __name__ == "__main__":
    main()
