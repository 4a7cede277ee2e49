"""From data to a trained model with the public interface: learning, resuming, vmapping and comparing."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.data import Examples
from nnlearn.datasets import load
from nnlearn.losses import accuracy, cross_entropy, squared_error
from nnlearn.models import mlp

EPOCHS, BATCH_SIZE = 6, 32
STEPS = 500

LINE_OPTIMIZERS = {
    "sgd": lambda rate: nnlearn.sgd(rate),
    "momentum": lambda rate: nnlearn.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: nnlearn.sgd(rate, momentum=0.9, nesterov=True),
    "rmsprop": lambda rate: nnlearn.rmsprop(rate),
    "adam": lambda rate: nnlearn.adam(rate),
    "nadam": lambda rate: nnlearn.nadam(rate),
    "lion": lambda rate: nnlearn.lion(rate),
    "sign_sgd": lambda rate: nnlearn.sign_sgd(rate),
}

# Every function whose first argument is a learning rate, so that later optimizers are tested too.
OPTIMIZERS = sorted(
    name
    for name, value in vars(nnlearn.optimizers).items()
    if inspect.isfunction(value) and next(iter(inspect.signature(value).parameters), "") == "learning_rate"
    if not name.startswith("scale_by_")  # these give a direction, not a descent
)


def numbers(state):
    """A state as NumPy arrays, with the key as its integers."""
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))


def line_points(size=256):
    random = np.random.default_rng(0)
    inputs = random.uniform(-1, 1, size)
    targets = 3 * inputs + 1 + random.normal(0, 0.01, size)
    return Examples(jnp.asarray(inputs, jnp.float32), jnp.asarray(targets, jnp.float32))


def line_loss(params, batch, key):
    return jnp.mean(squared_error(params["w"] * batch.inputs + params["b"], batch.targets))


@pytest.mark.parametrize("name", LINE_OPTIMIZERS)
def test_the_line_is_recovered(name):
    points = line_points()
    exact = np.polyfit(np.asarray(points.inputs, np.float64), np.asarray(points.targets, np.float64), deg=1)
    assert np.round(exact, 2).tolist() == [3.0, 1.0]

    tx = LINE_OPTIMIZERS[name](nnlearn.cosine_decay_schedule(0.1, STEPS))
    step = nnlearn.make_step(line_loss, tx)
    start = nnlearn.init_state({"w": jnp.zeros(()), "b": jnp.zeros(())}, tx)
    state, trace = jax.jit(lambda state: jax.lax.scan(lambda s, _: step(s, points), state, length=STEPS))(start)
    learned = [float(state.params["w"]), float(state.params["b"])]
    assert np.round(learned, 2).tolist() == [3.0, 1.0]
    np.testing.assert_allclose(learned, exact, atol=2e-3)
    assert trace.loss[-1] < 2e-4  # the variance of the noise is 1e-4
    assert int(state.step) == STEPS


@pytest.fixture(scope="module")
def cancer():
    return load("breast-cancer")


def dropout_run(train):
    """An epoch of a network with dropout, a remainder of the batches and a schedule; and its initial state."""
    model = mlp((30, 16, 2), dropout=0.3, norm="layer")

    def loss_fn(params, batch, key):
        (inputs, targets), where = batch
        logits = model.apply(params, inputs, key)
        return cross_entropy(logits, targets, where=where), {"accuracy": accuracy(logits, targets, where)}

    tx = nnlearn.adamw(nnlearn.warmup_cosine_decay_schedule(0.0, 1e-2, 10, EPOCHS * 13), weight_decay=1e-2)
    epoch = nnlearn.make_epoch(nnlearn.make_step(loss_fn, tx), train, BATCH_SIZE)
    return epoch, nnlearn.init_state(model.init(jax.random.key(1)), tx, key=2)


@pytest.mark.slow
def test_resumed_epochs_end_with_the_same_bits(cancer):
    epoch, start = dropout_run(cancer.train)
    keys = jax.random.split(jax.random.key(3), EPOCHS)
    epochs = jax.jit(lambda state, keys: jax.lax.scan(epoch, state, keys))
    whole, trace = epochs(start, keys)

    middle, first = epochs(start, keys[: EPOCHS // 2])
    saved = numbers(middle)  # as stored in a file
    restored = jax.tree.map(jnp.asarray, saved)._replace(key=jax.random.wrap_key_data(saved.key))
    resumed, second = epochs(restored, keys[EPOCHS // 2 :])
    jax.tree.map(np.testing.assert_array_equal, numbers(whole), numbers(resumed))
    pieces = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)
    jax.tree.map(np.testing.assert_array_equal, trace, pieces)

    assert trace.loss.shape == (EPOCHS, 13)
    assert trace.loss[-1].mean() < 0.5 * trace.loss[0].mean()
    assert trace.aux["accuracy"][-1].mean() > 0.95


@pytest.mark.slow
def test_another_key_gives_another_run(cancer):
    epoch, start = dropout_run(cancer.train)
    epoch = jax.jit(epoch)
    _, one = epoch(start, jax.random.key(0))
    _, again = epoch(start, jax.random.key(0))
    _, other_order = epoch(start, jax.random.key(1))
    _, other_dropout = epoch(start._replace(key=jax.random.key(9)), jax.random.key(0))
    np.testing.assert_array_equal(one.loss, again.loss)
    assert jnp.all(one.loss != other_order.loss)
    assert jnp.all(one.loss != other_dropout.loss)


@pytest.mark.slow
def test_a_grid_of_seeds_and_rates_equals_its_single_runs(cancer):
    model = mlp((30, 8, 2), activation="tanh")

    def train(seed, rate):
        tx = nnlearn.adam(rate)
        step = nnlearn.make_step(lambda p, b, k: cross_entropy(model.apply(p, b.inputs, k), b.targets), tx)
        state = nnlearn.init_state(model.init(jax.random.key(seed)), tx)
        state, trace = jax.lax.scan(lambda s, _: step(s, cancer.train), state, length=30)
        return state.params, trace

    seeds, rates = jnp.arange(3), jnp.array([1e-3, 1e-2, 1e-1])
    over_rates = jax.vmap(train, in_axes=(None, 0))
    grid = jax.jit(jax.vmap(over_rates, in_axes=(0, None)))(seeds, rates)
    single = jax.jit(train)
    for row, seed in enumerate(seeds):
        for column, rate in enumerate(rates):
            cell = jax.tree.map(lambda leaf, row=row, column=column: leaf[row, column], grid)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), cell, single(seed, rate))
    assert single._cache_size() == 1  # a new rate needs no new program
    _, trace = grid
    np.testing.assert_array_equal(trace.learning_rate[1, :, -1], rates)
    final = trace.loss[:, :, -1]
    assert len(np.unique(final)) == 9
    assert jnp.all(final[:, 1] < final[:, 0])  # 30 steps of Adam with 0.001 are not enough


def test_the_optimizers_were_found():
    assert {"sgd", "adam", "adamw", "lion", "lamb", "lars", "adadelta"} <= set(OPTIMIZERS)
    assert "make_step" not in OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_decreases(name, cancer):
    """The best of six rates takes 40 % off the loss in 60 steps, and a rate of 0 changes nothing."""
    model = mlp((30, 8, 2), activation="tanh")

    def losses(rate):
        tx = getattr(nnlearn.optimizers, name)(rate)
        step = nnlearn.make_step(lambda p, b, k: cross_entropy(model.apply(p, b.inputs, k), b.targets), tx)
        state = nnlearn.init_state(model.init(jax.random.key(0)), tx)
        return jax.lax.scan(lambda s, _: step(s, cancer.train), state, length=60)[1].loss

    still, *moving = jax.jit(jax.vmap(losses))(jnp.array([0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0]))
    if name not in ("madgrad", "rprop"):  # one adds eps to the rate, for the other it is the first of its step sizes
        np.testing.assert_allclose(still, still[0], rtol=1e-6)
    assert jnp.nanmin(jnp.stack(moving)[:, -1]) < 0.6 * still[0]
