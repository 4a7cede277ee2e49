"""Guards for rare cases: each test fails if its guard is removed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.sweeps import choice, sweep
from nnlearn.tree import safe_divide


def run_of(evaluate, **options):
    """Four steps of plain descent on a bowl around 1, from 0, with a check after every second."""
    return nnlearn.make_train(
        lambda params, batch, key: (params - 1.0) ** 2,
        lambda hparams: nnlearn.sgd(hparams["rate"]),
        nnlearn.generated(lambda key, step: step),
        jnp.zeros(()),
        steps=4,
        check_every=2,
        evaluate=evaluate,
        **options,
    )


def test_a_setting_with_a_failed_seed_ranks_below_one_without():
    """The setting with the better mean has a failed seed, so it ranks second."""

    def evaluate(params, hparams):
        lost = (hparams["rate"] > 0.2) & (hparams["seed"] == 1)
        return {"score": jnp.where(lost, jnp.nan, -hparams["rate"])}

    train = run_of(evaluate)
    results = sweep(train, {"rate": choice(0.1, 0.3), "seed": choice(0, 1)}, 1, metric="score")
    # the choices of "seed" as seeds of one setting: two rows of one rate are joined
    traces = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(2, 2, *np.shape(leaf)[2:]), results.traces)
    joined = results.__class__(
        **{**vars(results), "settings": ({"rate": 0.1}, {"rate": 0.3}), "seeds": (0, 1), "traces": traces}
    )
    first, second = joined.ranking()
    assert (first.setting, first.failed) == ({"rate": 0.1}, 0)
    assert (second.setting, second.failed) == ({"rate": 0.3}, 1) and second.mean < first.mean
    assert joined.best().setting == {"rate": 0.1}


def test_a_run_whose_checks_are_all_nan_ends_with_trained_parameters():
    train = run_of(lambda params: {"score": params * jnp.nan}, stop=nnlearn.keep_best("score", mode="max"))
    state, trace = jax.jit(train)({"rate": 0.25}, 0)
    assert int(trace.best_step) == 2
    np.testing.assert_allclose(state.params, 0.75)  # after two steps, each of which halves the distance to 1


def test_integer_state_is_taken_from_the_first_device():
    def loss_fn(params, batch, key, model_state):
        return jnp.mean((params - batch) ** 2), {}, {"count": model_state["count"] + jax.lax.axis_index("d") + 5}

    tx = nnlearn.sgd(0.1)
    state = nnlearn.init_state(jnp.zeros(()), tx, model_state={"count": jnp.array(2)})
    step = nnlearn.make_step(loss_fn, tx, axis_name="d")
    new, _ = jax.vmap(step, in_axes=(None, 0), axis_name="d")(state, jnp.ones((3, 2)))
    assert new.model_state["count"].tolist() == [7, 7, 7]


def test_the_derivative_of_a_division_by_zero_is_zero():
    numerator, denominator = jnp.array([2.0, 0.0, 3.0]), jnp.array([0.0, 0.0, 2.0])
    slopes = jax.grad(lambda n, d: jnp.sum(safe_divide(n, d)), (0, 1))(numerator, denominator)
    np.testing.assert_array_equal(slopes[0], [0.0, 0.0, 0.5])
    np.testing.assert_array_equal(slopes[1], [0.0, 0.0, -0.75])


def test_a_sweep_of_the_older_format_is_not_resumed(tmp_path):
    train, space = run_of(lambda params: {"score": params}), {"rate": choice(0.1)}
    sweep(train, space, 1, metric="score", folder=tmp_path)
    header = tmp_path / "sweep.json"
    header.write_text(header.read_text().replace("nnlearn sweep 2", "nnlearn sweep 1"))
    with pytest.raises(ValueError, match="older nnlearn.*Results.load"):
        sweep(train, space, 1, metric="score", folder=tmp_path)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nnlearn.transforms.ema(1.5), "decay"),
        (lambda: nnlearn.transforms.trace(-0.5), "decay"),
        (lambda: nnlearn.transforms.clip(-1.0), "max_delta"),
        (lambda: nnlearn.transforms.clip_by_block_rms(-1.0), "threshold"),
        (lambda: nnlearn.transforms.clip_by_global_norm(-1.0), "max_norm"),
        (lambda: nnlearn.transforms.adaptive_grad_clip(-0.1), "clipping"),
    ],
)
def test_transformations_check_their_hyperparameters(make, name):
    with pytest.raises(ValueError, match=name):
        make()
