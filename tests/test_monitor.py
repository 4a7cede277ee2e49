"""Statistics of every layer while training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnlearn

KEY = jax.random.key(0)
PARAMS = {"w": jax.random.normal(KEY, (3, 4)), "b": jnp.ones(4), "unused": jnp.ones(2)}


def loss_fn(params, batch, key):
    return jnp.mean((batch @ params["w"] + params["b"][None]) ** 2)


def batch_at(key, step):
    return jax.random.normal(jax.random.fold_in(KEY, step), (8, 3))


def reference(steps, rate):
    """The statistics of plain gradient descent, in NumPy, at every step."""
    params, last, rows = dict(PARAMS), None, []
    signal, power = np.zeros(3), np.zeros(3)
    for step in range(steps):
        grads = jax.grad(loss_fn)(params, batch_at(None, step), None)
        row = {}
        for at, name in enumerate(sorted(params)):
            g, p = np.asarray(grads[name], np.float64).ravel(), np.asarray(params[name], np.float64).ravel()
            before, change = (
                (np.zeros_like(g), np.zeros_like(p)) if last is None else (last[0][name], p - last[1][name])
            )
            if last is not None:
                before, change = last[0][name], p - last[1][name]
                signal[at] += 0.1 * (g @ before - signal[at])
                power[at] += 0.1 * ((g @ g + before @ before) / 2 - power[at])
            noise, size = power[at] - signal[at], np.linalg.norm(g) * np.linalg.norm(before)
            row[name] = [
                np.linalg.norm(g),
                np.linalg.norm(change),
                np.linalg.norm(p),
                np.linalg.norm(change) / np.linalg.norm(p),
                g @ before / size if size else 0,
                signal[at] / noise if signal[at] > 0 else 0,
                np.mean(g == 0),
                0,
            ]
        rows.append(np.transpose([row[name] for name in sorted(params)]))
        last = [{name: np.asarray(tree[name], np.float64).ravel() for name in tree} for tree in (grads, params)]
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    return np.array(rows)


@pytest.mark.parametrize("packed", [False, True])
def test_statistics_are_those_of_numpy(packed):
    tx = nnlearn.monitor_layers(nnlearn.sgd(0.3), every=1)
    train = nnlearn.make_train(loss_fn, tx, nnlearn.generated(batch_at), PARAMS, steps=6, packed=packed)
    trace = jax.jit(train)({}, 0)[1]
    assert trace.leaves == ("b", "unused", "w")
    found = np.moveaxis(np.array(trace.info.layers), 0, 1)
    np.testing.assert_allclose(found, reference(6, 0.3), rtol=2e-3, atol=1e-5)
    assert "layers/cosine/w" in trace.columns()


def test_every_third_step_is_measured_and_the_updates_are_those_of_the_optimizer():
    each, third = (nnlearn.monitor_layers(optax.adam(0.1), every=every) for every in (1, 3))
    source = nnlearn.generated(batch_at)
    runs = {
        name: jax.jit(nnlearn.make_train(loss_fn, tx, source, PARAMS, steps=6, record_every=every))({}, 0)
        for name, tx, every in (("each", each, 1), ("third", third, 3), ("plain", optax.adam(0.1), 1))
    }
    one, other = (runs[name][1].info.layers for name in ("each", "third"))
    for name in ("grad_norm", "update_norm", "cosine", "zero"):
        np.testing.assert_allclose(getattr(one, name)[2::3], getattr(other, name), rtol=1e-5, err_msg=name)
    for name in ("each", "third"):
        jax.tree.map(np.testing.assert_array_equal, runs[name][0].params, runs["plain"][0].params)
    assert runs["plain"][1].info.layers is None


def test_a_batch_of_runs_and_gradients_that_are_not_finite():
    def train(rate):
        tx = nnlearn.monitor_layers(nnlearn.sgd(rate), every=2)
        source = nnlearn.generated(batch_at)
        return nnlearn.make_train(loss_fn, tx, source, PARAMS, steps=4, record_every=2)({}, 0)[1].info.layers

    found = jax.jit(jax.vmap(train))(jnp.array([0.1, jnp.inf]))
    alone = jax.jit(train)(0.1)
    np.testing.assert_allclose(found.update_ratio[0], alone.update_ratio, rtol=1e-5)
    assert float(found.nonfinite[0].max()) == 0 and float(found.nonfinite[1].max()) == 1
    np.testing.assert_array_equal(found.zero[0, :, 1], [1, 1])


def test_it_needs_params():
    tx = nnlearn.monitor_layers(nnlearn.sgd(0.1))
    with pytest.raises(ValueError, match="needs params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="every must be"):
        nnlearn.monitor_layers(nnlearn.sgd(0.1), every=0)
