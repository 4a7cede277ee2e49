"""A learning rate from short runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.sweeps.learning_rate import _vertex

CURVATURE = jnp.array([1.0, 4.0])


def loss_fn(params, batch, key):
    return jnp.sum(CURVATURE * params**2) / 2


def quadratic(make_tx, steps=88, **options):
    batches = nnlearn.generated(lambda key, step: step)
    return nnlearn.make_train(loss_fn, make_tx, batches, jnp.ones(2), steps=steps, **options)


def test_a_rate_below_the_limit_of_a_quadratic_is_found():
    train = quadratic(
        lambda hparams: nnlearn.sgd(hparams["rate"]),
        evaluate=lambda params: {"loss": loss_fn(params, None, None)},
        check_every=8,
        stop=nnlearn.diverged(),
        steps=440,
    )
    found = nnlearn.find_learning_rate(train, 1e-3, 100.0, hparams={"rate": 0.0, "other": 1.0}, metric="loss", rates=8)
    assert 0.05 < found.rate < 0.5 and found.interval[0] <= found.rate <= found.interval[1]
    assert found.spent == 8 * 10 + 3 * 29 + 3 * 220 and len(found.rates) == len(found.losses) == 14
    assert np.all(np.diff(found.rates) >= 0) and str(found).startswith("rate ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1.0, "high": 0.1}, "high must be"),
        ({"hparams": {"decay": 1.0}}, "no entry for the rate"),
        ({"low": 1e30, "high": 1e32}, "every run diverged"),
        ({"rates": 2}, "rates must be"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        nnlearn.find_learning_rate(quadratic(nnlearn.sgd), **arguments)


def test_the_vertex_of_a_parabola():
    rates = np.array([0.1, 1.0, 10.0])
    assert _vertex(rates, np.array([1.0, 0.0, 1.0])) == pytest.approx(1.0)
    np.testing.assert_allclose(_vertex(rates, (np.log10(rates) - 0.2) ** 2), 10**0.2)
    assert _vertex(rates, np.array([np.inf, 1.0, 0.0])) == 10.0


def test_batch_costs_at_the_noise_scale():
    assert [float(each) for each in jax.jit(nnlearn.batch_cost)(64.0, 64.0)] == [2, 2]
    with pytest.raises(ValueError, match="batch_size must be"):
        nnlearn.batch_cost(1.0, 0)
