"""Learn exclusive or, the smallest problem that is not linearly separable, with 100 networks in one program.

Each network has 2 inputs, 16 tanh units and 2 outputs (82 parameters), its own seed from 0 to 99, and trains for 200
steps of Adam on the four points. All of them solve the problem, and this prints::

    100 of 100 seeds solved exclusive or
"""

import jax
import jax.numpy as jnp

import nnlearn
from nnlearn.datasets import load
from nnlearn.losses import cross_entropy
from nnlearn.models import mlp

MODEL = mlp((2, 16, 2), activation="tanh")
POINTS = load("xor").train


def loss_fn(params, batch, key):
    """Mean cross-entropy between the network's outputs and the truth table."""
    return cross_entropy(MODEL.apply(params, batch.inputs, key), batch.targets)


def train(seed, steps=200):
    """Train once, as a pure function of a seed; returns the loss at each step, and whether all outputs are correct."""
    tx = nnlearn.adam(learning_rate=0.05)
    step = nnlearn.make_step(loss_fn, tx)
    state = nnlearn.init_state(MODEL.init(jax.random.key(seed)), tx)
    state, trace = jax.lax.scan(lambda state, _: step(state, POINTS), state, length=steps)
    answers = jnp.argmax(MODEL.apply(state.params, POINTS.inputs), axis=-1)
    return trace.loss, jnp.all(answers == POINTS.targets)


def main():
    """Returns the losses, shape (100, 200), and the number of networks that solved the problem."""
    losses, solved = jax.jit(jax.vmap(train))(jnp.arange(100))
    print(f"{solved.sum()} of {solved.size} seeds solved exclusive or")
    return losses, int(solved.sum())


if __name__ == "__main__":
    main()
