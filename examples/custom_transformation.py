"""Write a custom gradient transformation in a few lines, and chain it with optax's and nnlearn's.

The example is momentum with steps of constant length (Cutkosky and Mehta 2020, arXiv:2002.03305)::

    m = decay m + (1 - decay) g,    update = m / |m|

The kernel computes only this, on the arrays of one parameter. ``from_kernel`` adds trees of parameters, state,
precision, and hyper-parameters that can be traced. A network of 30 inputs, 16 tanh units and 2 outputs learns in 100
steps to classify 398 breast tumours as malignant or benign. This prints::

    loss before: 0.83
    loss after:  0.01
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import nnlearn
from nnlearn.datasets import load
from nnlearn.losses import cross_entropy
from nnlearn.models import mlp
from nnlearn.transforms import Slot, from_kernel
from nnlearn.types import Updates


class NormalizedMomentumState(NamedTuple):
    """``momentum``: the moving average of the gradients, a tree like the parameters."""

    momentum: Updates


def normalized_momentum_kernel(g, momentum, *, decay):
    """One step on the arrays of one parameter; returns the update and the new momentum."""
    momentum = decay * momentum + (1 - decay) * g
    return momentum / (jnp.linalg.norm(momentum.ravel()) + 1e-12), momentum


def scale_by_normalized_momentum(decay=0.9):
    """The transformation: a kernel, the type of its state, the initial arrays and the hyper-parameters."""
    return from_kernel(
        normalized_momentum_kernel,
        NormalizedMomentumState,
        slots={"momentum": Slot(fill=0.0)},
        hyperparams={"decay": decay},
    )


def main(steps=100):
    """Returns the loss before and after training."""
    model = mlp((30, 16, 2), activation="tanh")
    batch = load("breast-cancer").train

    def loss_fn(params, batch, key):
        return cross_entropy(model.apply(params, batch.inputs, key), batch.targets)

    tx = optax.chain(
        nnlearn.centralize(),
        scale_by_normalized_momentum(decay=0.9),
        optax.add_decayed_weights(1e-3),
        nnlearn.scale_by_learning_rate(optax.cosine_decay_schedule(0.1, steps)),
    )
    step = nnlearn.jit_step(nnlearn.make_step(loss_fn, tx))
    state = nnlearn.init_state(model.init(jax.random.key(0)), tx)
    before = float(loss_fn(state.params, batch, None))
    for _ in range(steps):
        state, info = step(state, batch)
    after = float(loss_fn(state.params, batch, None))
    print(f"loss before: {before:.2f}\nloss after:  {after:.2f}")
    return before, after


if __name__ == "__main__":
    main()
