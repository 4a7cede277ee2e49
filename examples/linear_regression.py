"""Fit a straight line by gradient descent.

The data are ten thousand noisy points of y = 3 x + 1, the model has two parameters, and gradient descent reaches the
closed-form solution. This prints::

    gradient descent: w = 3.00, b = 1.00
    least squares:    w = 3.00, b = 1.00
"""

import jax
import jax.numpy as jnp

import nnlearn


def noisy_line(key, size=10_000, noise=0.1):
    """Inputs in [-1, 1] and targets 3 x + 1 with Gaussian noise, each of shape (size,)."""
    inputs_key, noise_key = jax.random.split(key)
    inputs = jax.random.uniform(inputs_key, (size,), minval=-1.0, maxval=1.0)
    return inputs, 3.0 * inputs + 1.0 + noise * jax.random.normal(noise_key, (size,))


def loss_fn(params, batch, key):
    """Mean squared error. Every loss receives a key, for example for dropout; this one does not use it."""
    inputs, targets = batch
    return jnp.mean((params["w"] * inputs + params["b"] - targets) ** 2)


def gradient_descent(batch, steps=200):
    """``(w, b)`` after ``steps`` steps of gradient descent from zero."""
    tx = nnlearn.sgd(learning_rate=0.3)
    step = nnlearn.jit_step(nnlearn.make_step(loss_fn, tx))
    state = nnlearn.init_state({"w": jnp.zeros(()), "b": jnp.zeros(())}, tx)
    for _ in range(steps):
        state, info = step(state, batch)
    return float(state.params["w"]), float(state.params["b"])


def least_squares(batch):
    """``(w, b)`` in closed form: the slope is the covariance divided by the variance."""
    inputs, targets = batch
    w = jnp.mean((inputs - inputs.mean()) * (targets - targets.mean())) / jnp.var(inputs)
    return float(w), float(targets.mean() - w * inputs.mean())


def main():
    """Returns ``(w, b)`` by gradient descent and in closed form."""
    batch = noisy_line(jax.random.key(0))
    learned, exact = gradient_descent(batch), least_squares(batch)
    print("gradient descent: w = {:.2f}, b = {:.2f}".format(*learned))
    print("least squares:    w = {:.2f}, b = {:.2f}".format(*exact))
    return learned, exact


if __name__ == "__main__":
    main()
