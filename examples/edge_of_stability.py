"""The edge of stability: full-batch gradient descent sharpens the loss until its steps are just about stable.

A step of gradient descent is stable along a direction of curvature c while c < 2 / rate. On a network the largest
curvature, the sharpness, is not constant: it rises while the loss falls smoothly, until it reaches 2 / rate. There it
stays. The loss then no longer falls in every step, but it goes on falling over many. So a loss that jumps a little is
no sign that the rate is too high. With 500 digits, a network of two tanh layers and three rates this prints::

      rate  2 / rate  sharpness: first  at the end  / (2 / rate)  steps in which the loss rose
      0.04      50.0              24.7        41.2          0.82                            0 %
      0.06      33.3              24.0        33.8          1.02                           43 %
      0.08      25.0              20.9        25.7          1.03                           43 %

and draws the loss and the sharpness in edge_of_stability.png, or in the file ``--out``.
"""

import argparse

import jax
import jax.numpy as jnp

import nnlearn
from nnlearn.datasets import load
from nnlearn.models import mlp

RATES = (0.04, 0.06, 0.08)
STEPS, EVERY = 3000, 50
MODEL = mlp((64, 32, 32, 10), activation="tanh")
DIGITS = jax.tree.map(lambda array: array[:500], load("digits").train)


def loss_fn(params, batch=None, key=None):
    """Squared error against one-hot labels, on all digits."""
    errors = MODEL.apply(params, 0.3 * DIGITS.inputs) - jax.nn.one_hot(DIGITS.targets, 10)
    return jnp.mean(jnp.sum(errors**2, axis=1))


@jax.jit
def descend(params, rate):
    """The losses of all steps, and the sharpness after every 50."""
    tx = nnlearn.sgd(rate)
    step = nnlearn.make_step(loss_fn, tx)

    def stretch(state, _):
        state, trace = jax.lax.scan(step, state, length=EVERY)
        return state, (trace.loss, nnlearn.sharpness(loss_fn, state.params, steps=12).value)

    _, (losses, sharp) = jax.lax.scan(stretch, nnlearn.init_state(params, tx), length=STEPS // EVERY)
    return losses.ravel(), sharp


def draw(runs, out):
    """Draw the losses above the sharpness, with each limit as a dashed line, as a PNG."""
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for number, (rate, (losses, sharp)) in enumerate(runs.items()):
        color = f"C{number}"
        top.semilogy(losses, color=color, linewidth=0.8, label=f"rate {rate:g}")
        bottom.plot(range(EVERY, STEPS + 1, EVERY), sharp, color=color)
        bottom.axhline(2 / rate, color=color, linestyle="--", linewidth=1)
    top.set(ylabel="loss on all digits")
    bottom.set(xlabel="step", ylabel="sharpness (dashed: 2 / rate)", ylim=(0, 60))
    top.legend()
    figure.savefig(out, dpi=120, format="png")
    plt.close(figure)


def main(out="edge_of_stability.png"):
    """Train at every rate, print the table and draw the figure; returns the runs."""
    params = MODEL.init(jax.random.key(0))
    runs = {rate: descend(params, rate) for rate in RATES}
    print("  rate  2 / rate  sharpness: first  at the end  / (2 / rate)  steps in which the loss rose")
    for rate, (losses, sharp) in runs.items():
        last = jnp.mean(sharp[-20:])
        rose = jnp.mean(losses[STEPS // 2 + 1 :] > losses[STEPS // 2 : -1])
        print(f"{rate:6g}{2 / rate:10.1f}{sharp[0]:18.1f}{last:12.1f}{last * rate / 2:14.2f}{100 * rose:29.0f} %")
    draw(runs, out)
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="edge_of_stability.png", help="the PNG to write")
    main(parser.parse_args().out)
