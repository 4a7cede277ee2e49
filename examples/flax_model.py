"""Train an unchanged flax network with four seeds in one program.

The network is a small residual network with batch normalisation and dropout in flax's usual style, independent of
nnlearn. ``from_linen`` turns it into a pure function of parameters, running statistics, inputs and key, so that whole
training runs can be compiled as one program and vmapped over seeds. It classifies 8 x 8 scans of digits, with 70 % of
them for training and 15 % for the test. The trained parameters are flax's own: ``ResNet().apply`` accepts them
unchanged. On a CPU this takes about 10 seconds and prints::

    test accuracy over 4 seeds: 99.2 % +- 0.4 %
    flax itself, of seed 0:     99.6 %

The last digit may differ between machines.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

import nnlearn
from nnlearn.datasets import load
from nnlearn.losses import accuracy, cross_entropy
from nnlearn.models.adapters import from_linen

SEEDS, EPOCHS, BATCH_SIZE = 4, 10, 64


class ResNet(nn.Module):
    """Blocks of normalisation, nonlinearity, dropout and a dense layer around skip connections."""

    width: int = 128

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(self.width)(x)
        for _ in range(2):
            y = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = x + nn.Dense(self.width)(nn.Dropout(0.3, deterministic=not train)(y))
        return nn.Dense(10)(nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)))


MODEL = from_linen(ResNet(), jax.ShapeDtypeStruct((1, 64), jnp.float32))


def loss_fn(params, batch, key, model_state):
    """Mean cross-entropy; with a key the model is in training mode: dropout is active, and statistics are updated."""
    logits, model_state = MODEL.apply(params, model_state, batch.inputs, key)
    return cross_entropy(logits, batch.targets), None, model_state


def make_run(examples):
    """``train(rate, key) -> (state, trace)``, a whole training run as a pure function."""
    # Only full batches: the padding of a partial batch would enter its statistics.
    batches = nnlearn.shuffled(examples, BATCH_SIZE, remainder="drop")
    steps = EPOCHS * (len(examples.targets) // BATCH_SIZE)

    def make_tx(rate):
        return nnlearn.adamw(nnlearn.cosine_decay_schedule(rate, steps), weight_decay=0.05)

    return nnlearn.make_train(loss_fn, make_tx, batches, MODEL.init, epochs=EPOCHS)


def main():
    """Returns the test accuracies, shape (4,), that of flax for the first seed, and the losses, shape (4, steps)."""
    parts = load("digits", seed=0).parts
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    states, trace = jax.jit(jax.vmap(make_run(parts.train), in_axes=(None, 0)))(1e-2, keys)

    @jax.jit
    @jax.vmap
    def test_accuracy(state):
        logits, _ = MODEL.apply(state.params, state.model_state, parts.test.inputs)
        return accuracy(logits, parts.test.targets)

    found = test_accuracy(states)
    print(f"test accuracy over {SEEDS} seeds: {100 * found.mean():.1f} % +- {100 * found.std(ddof=1):.1f} %")

    first = jax.tree.map(lambda leaf: leaf[0], states)
    logits = ResNet().apply({"params": first.params, **first.model_state}, parts.test.inputs, train=False)
    own = accuracy(jnp.asarray(logits), parts.test.targets)
    print(f"flax itself, of seed 0:     {100 * own:.1f} %")
    return found, own, trace.loss


if __name__ == "__main__":
    main()
