"""Gradient descent in a quadratic bowl with learning rates that are too small, good, optimal and too large.

On f(x) = (a x1^2 + b x2^2) / 2 with a < b, a step multiplies x1 by 1 - rate a and x2 by 1 - rate b. The larger factor
determines the speed, so the best rate makes the two equal and opposite: with rate = 2 / (a + b), both are
(k - 1) / (k + 1) in magnitude, where k = b / a is the condition number. Above 2 / b gradient descent diverges. With
a = 1 and b = 10 this prints::

    learning rate          shrinks by: predicted  measured  steps to 1e-6
    too small      0.0100                 0.9900    0.9900           1306
    good           0.1000                 0.9000    0.9000            125
    best           0.1818                 0.8182    0.8182             66
    too large      0.2100                 1.1000    1.1000          never

and draws the four paths in bowl.png, or in the file ``--out``.
"""

import argparse

import jax
import jax.numpy as jnp

import nnlearn

CURVATURES = jnp.array([1.0, 10.0])
START = jnp.array([0.5, 0.1])
RATES = {"too small": 0.01, "good": 0.1, "best": 2 / (1 + 10), "too large": 0.21}


def bowl(point, batch=None, key=None):
    """The height at ``point``, and the point itself as aux, so that the trace holds the path."""
    return jnp.sum(CURVATURES * point**2) / 2, point


def descend(learning_rate, steps=1500):
    """The points on the path, shape (steps, 2)."""
    tx = nnlearn.sgd(learning_rate)
    step = nnlearn.make_step(bowl, tx)
    _, trace = jax.lax.scan(step, nnlearn.init_state(START, tx), length=steps)
    return trace.aux


def draw(paths, out):
    """Draw the first steps of the four paths over the contour lines of the bowl, as a PNG."""
    import matplotlib.pyplot as plt

    x1, x2 = jnp.meshgrid(jnp.linspace(-0.6, 0.6, 121), jnp.linspace(-0.3, 0.3, 61))
    heights = jax.vmap(jax.vmap(lambda *point: bowl(jnp.stack(point))[0]))(x1, x2)
    figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharex=True, sharey=True, layout="constrained")
    for (name, rate), path, ax in zip(RATES.items(), paths, axes.flat, strict=True):
        ax.contour(x1, x2, heights, levels=12, colors="0.8", linewidths=0.8)
        ax.plot(*path[:12].T, "o-", color="tab:blue", markersize=3, linewidth=1)
        ax.plot(0, 0, "k+", markersize=12)
        ax.set(title=f"{name}: learning rate {rate:.3g}", xlim=(-0.6, 0.6), ylim=(-0.3, 0.3), aspect="equal")
    figure.supxlabel("x1")
    figure.supylabel("x2")
    figure.savefig(out, dpi=150, format="png")
    plt.close(figure)


def main(out="bowl.png"):
    """Returns by name the predicted and the measured factor per step, and the number of steps to 1e-6 or None."""
    rates = jnp.array(list(RATES.values()))
    paths = jax.jit(jax.vmap(descend))(rates)  # learning rates can be traced: four runs, one program
    distances = jnp.linalg.norm(paths, axis=-1)
    predicted = jnp.max(jnp.abs(1 - jnp.outer(rates, CURVATURES)), axis=-1)
    measured = distances[:, 100] / distances[:, 99]  # the faster coordinate is negligible by then
    close = distances <= 1e-6

    found = {}
    print("learning rate          shrinks by: predicted  measured  steps to 1e-6")
    for index, (name, rate) in enumerate(RATES.items()):
        steps = int(close[index].argmax()) if close[index].any() else None
        found[name] = float(predicted[index]), float(measured[index]), steps
        print(f"{name:13}  {rate:.4f}  {predicted[index]:21.4f}  {measured[index]:8.4f}  {steps or 'never':>13}")
    draw(paths, out)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bowl.png", help="file for the figure (default: %(default)s)")
    main(parser.parse_args().out)
