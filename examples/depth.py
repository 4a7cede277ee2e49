"""Vanishing gradients in fifty hidden layers, and the network design that avoids them.

Both networks classify 8 x 8 digits with 50 hidden layers of 32 units, and train for 300 steps of Adam at four learning
rates in one program. The first network has plain sigmoid layers. Its gradient shrinks in every layer during
backpropagation, so the first layers receive almost none, and even at the best rate it predicts the same class for all
digits. The second network adds the input of each layer to its output (a skip connection), normalises before each
activation (RMSNorm), and uses GELU. On a CPU this takes about 15 seconds and prints::

    norm of the first gradient     layer 1   layer 10  layer 20  layer 30  layer 40  layer 50
    plain, sigmoid                 1.2e-32   2.8e-27   5.8e-21   2.4e-14   7.4e-08   1.6e-01
    residual, RMSNorm, GELU        8.8e-01   2.6e-01   2.4e-01   1.9e-01   1.7e-01   1.6e-01
    plain, sigmoid: validation accuracy 10.0 % at the best of 4 learning rates
    residual, RMSNorm, GELU: validation accuracy 97.4 % at the best of 4 learning rates

With ``--figure depth.png`` it also draws the norms of all layers.
"""

import argparse

import jax
import jax.numpy as jnp

import nnlearn
from nnlearn.datasets import load
from nnlearn.losses import accuracy, cross_entropy
from nnlearn.models import dense, rms_norm, sequential

LAYERS, WIDTH, STEPS = 50, 32, 300
SHOWN = (1, 10, 20, 30, 40, 50)
RATES = jnp.array([1e-4, 1e-3, 1e-2, 1e-1])
DIGITS = load("digits")
FIRST, NORMED_LAST = dense(64, WIDTH), sequential(rms_norm(WIDTH), dense(WIDTH, 10))
# For each network a hidden layer, the last layer, and the weight of the skip connections.
NETWORKS = {
    "plain, sigmoid": (sequential(dense(WIDTH, WIDTH, kernel_init="glorot"), jax.nn.sigmoid), dense(WIDTH, 10), 0),
    "residual, RMSNorm, GELU": (sequential(rms_norm(WIDTH), jax.nn.gelu, dense(WIDTH, WIDTH)), NORMED_LAST, 1),
}


def train(hidden, last, skip):
    """The norm of every hidden layer's initial gradient, and the final validation accuracy at each rate."""

    def init(key):  # hidden layers have stacked parameters: a scan compiles faster than fifty layers
        first_key, hidden_key, last_key = jax.random.split(key, 3)
        stacked = jax.vmap(hidden.init)(jax.random.split(hidden_key, LAYERS))
        return FIRST.init(first_key), stacked, last.init(last_key)

    def apply(params, x):
        first, stacked, end = params
        h, _ = jax.lax.scan(lambda h, part: (skip * h + hidden.apply(part, h), None), FIRST.apply(first, x), stacked)
        return last.apply(end, h)

    def loss_fn(params, batch, key):
        return cross_entropy(apply(params, batch.inputs), batch.targets)

    params = init(jax.random.key(0))

    def run(rate):
        batches = nnlearn.shuffled(DIGITS.train, 64, remainder="drop")
        state, _ = nnlearn.make_train(loss_fn, nnlearn.adam, batches, params, steps=STEPS)(rate, jax.random.key(1))
        return accuracy(apply(state.params, DIGITS.validation.inputs), DIGITS.validation.targets)

    grads = jax.jit(jax.grad(loss_fn))(params, DIGITS.train, None)
    (kernels,) = [leaf for leaf in jax.tree.leaves(grads[1]) if leaf.ndim == 3]
    largest = jnp.max(jnp.abs(kernels), axis=(1, 2), keepdims=True)  # their small squares underflow
    norms = largest * jnp.linalg.norm(kernels / largest, axis=(1, 2), keepdims=True)
    return norms.ravel(), jax.jit(jax.vmap(run))(RATES)


def draw(norms, figure):
    """Draw the norms of all layers on a logarithmic scale, as a PNG."""
    import matplotlib.pyplot as plt

    picture, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in norms.items():
        ax.semilogy(range(1, LAYERS + 1), values, "o-", markersize=3, label=name)
    ax.set(xlabel="hidden layer", ylabel="norm of the first gradient", title=f"{LAYERS} hidden layers on digits")
    ax.legend()
    picture.savefig(figure, dpi=120, format="png")
    plt.close(picture)


def main(figure=None):
    """Returns by network the norms of the first gradient, shape (50,), and the accuracies, shape (4,)."""
    found = {name: train(*network) for name, network in NETWORKS.items()}
    print(f"{'norm of the first gradient':29}" + "".join(f"  {f'layer {layer}':8}" for layer in SHOWN).rstrip())
    for name, (norms, _) in found.items():
        print(f"{name:29}" + "".join(f"  {norms[layer - 1]:.1e} " for layer in SHOWN).rstrip())
    for name, (_, accuracies) in found.items():
        print(f"{name}: validation accuracy {100 * accuracies.max():.1f} % at the best of {len(RATES)} learning rates")
    if figure is not None:
        draw({name: norms for name, (norms, _) in found.items()}, figure)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", help="file for a figure of the norms")
    main(parser.parse_args().figure)
