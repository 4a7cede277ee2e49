"""Learn a straight line by gradient descent.

Ten thousand noisy points of y = 3 x + 1 and two parameters. Gradient descent finds what the closed form says, and
prints::

    gradient descent: w = 3.00, b = 1.00
    least squares:    w = 3.00, b = 1.00
"""

import jax
import jax.numpy as jnp

import nnlearn


def noisy_line(key, size=10_000, noise=0.1):
    """Inputs in [-1, 1] and targets 3 x + 1 with Gaussian noise, each of shape (size,)."""
    inputs_key, noise_key = jax.random.split(key)
    inputs = jax.random.uniform(inputs_key, size, minval=-1.0, maxval=1.0)
    return inputs, 3.0 * inputs + 1.0 + noise * jax.random.normal(noise_key, size)


def loss_fn(params, batch, key):
    """Mean squared error. Every loss is handed a key for dropout and the like; a line needs none."""
    inputs, targets = batch
    return jnp.mean((params["w"] * inputs + params["b"] - targets) ** 2)


def gradient_descent(batch, steps=200):
    """Start at zero, go downhill ``steps`` times."""
    tx = nnlearn.sgd(learning_rate=0.3)
    step = nnlearn.jit_step(nnlearn.make_step(loss_fn, tx))
    state = nnlearn.init_state({"w": jnp.zeros(()), "b": jnp.zeros(())}, tx)
    for _ in range(steps):
        state, info = step(state, batch)
    return float(state.params["w"]), float(state.params["b"])


def least_squares(batch):
    """The minimum of the same loss in closed form: the slope is covariance over variance."""
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
