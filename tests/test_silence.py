"""No request is ignored silently: windows, callbacks, weights, dtypes, statistics."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnlearn
from nnlearn.data import MaskedBatch
from nnlearn.models import batch_norm, dense, sequential


def loss_fn(params, batch, key):
    return jnp.mean(params * batch)


def accumulating(tx, batches):
    """The state after some separate steps."""
    step, state = jax.jit(nnlearn.make_step(loss_fn, tx)), nnlearn.init_state(jnp.zeros(2), tx)
    for batch in batches:
        state, _ = step(state, jnp.full(2, batch))
    return state


def warned(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in caught if "accumulation window" in str(each.message)]


SGD = nnlearn.sgd(1.0)
WINDOWS = {
    "alone": (nnlearn.MultiSteps(SGD, 4), 2),
    "in a chain": (nnlearn.chain(nnlearn.clip(9.0), nnlearn.MultiSteps(SGD, 4)), 2),
    "longer than the run": (nnlearn.MultiSteps(SGD, 8), 6),
    "optax": (optax.MultiSteps(SGD, 4).gradient_transformation(), 2),
    "a schedule of k": (nnlearn.MultiSteps(SGD, lambda made: jnp.where(made < 1, 1, 3)), 2),
    "even": (nnlearn.MultiSteps(SGD, 3), 0),
    "none": (SGD, 0),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_an_incomplete_last_window_warns(name):
    tx, left = WINDOWS[name]
    step = nnlearn.make_step(loss_fn, tx)
    state = nnlearn.init_state(jnp.zeros(2), tx)
    streamed = warned(lambda: nnlearn.fit(step, state, [np.ones(2, np.float32)] * 6, progress=False))
    train = nnlearn.make_train(loss_fn, tx, nnlearn.generated(lambda key, step: jnp.ones(2)), jnp.zeros(2), steps=6)
    compiled = warned(lambda: jax.eval_shape(train, None, 0))
    for messages in (streamed, compiled):
        assert len(messages) == (left > 0) and all(f"last {left} mini-steps" in message for message in messages)


@pytest.mark.parametrize("use_grad_mean", [True, False])
def test_an_incomplete_window_is_applied_on_request(use_grad_mean):
    """Equals the explicit update: the mean or sum of the remaining gradients, and then the average."""
    tx = nnlearn.MultiSteps(nnlearn.sgd(1.0), 4, use_grad_mean=use_grad_mean)
    chained = nnlearn.chain(tx, nnlearn.average_params(0.5))
    state = accumulating(chained, [1.0, 2.0, 3.0, 4.0, 5.0, 7.0])
    gradients = np.array([[1, 2, 3, 4], [5, 7, np.nan, np.nan]]) / 2  # the loss is a mean over two elements
    first, last = np.nanmean(gradients, axis=1) if use_grad_mean else np.nansum(gradients, axis=1)
    np.testing.assert_allclose(state.params, -first, rtol=1e-6)
    closed = nnlearn.apply_accumulated(chained, state)
    np.testing.assert_allclose(closed.params, -first - last, rtol=1e-6)
    window, average = closed.opt_state
    assert (int(window.mini_step), int(window.gradient_step), int(average.count)) == (0, 2, 7)
    assert not np.any(window.acc_grads)
    again = nnlearn.apply_accumulated(chained, closed)
    for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(closed), strict=True):
        assert jnp.array_equal(leaf, other)  # without an open window nothing changes


def test_apply_accumulated_refuses_other_optimizers():
    for tx in (SGD, optax.MultiSteps(SGD, 2).gradient_transformation()):
        with pytest.raises(ValueError, match=r"nnlearn\.MultiSteps"):
            nnlearn.apply_accumulated(tx, nnlearn.init_state(jnp.zeros(2), tx))
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    tx = nnlearn.partition({"a": nnlearn.MultiSteps(SGD, 2), "b": SGD}, {"a": "a", "b": "b"})
    with pytest.raises(ValueError, match="all parameters"):
        nnlearn.apply_accumulated(tx, nnlearn.init_state(params, tx))


STEP = nnlearn.make_step(loss_fn, SGD)


def stopped_at(**options):
    state = nnlearn.init_state(jnp.zeros(2), SGD)
    batches = [np.ones(2, np.float32)] * 4
    return int(nnlearn.fit(STEP, state, batches, epochs=2, check_every=2, progress=False, **options).state.step)


@pytest.mark.parametrize("true", [True, np.True_, jnp.array(True), np.array([True]), 1, "stop"])
def test_any_true_value_ends_a_run(true):
    assert stopped_at(callbacks=lambda event: true) == 2


@pytest.mark.parametrize("false", [None, False, np.False_, jnp.array(False), 0])
def test_no_false_value_ends_a_run(false):
    assert stopped_at(callbacks=lambda event: false) == 8


def test_a_callback_result_without_truth_value_is_refused():
    with pytest.raises(TypeError, match="a callback must return one true or false value"):
        stopped_at(callbacks=nnlearn.train.every(2, lambda event: np.ones(2)))


def test_a_rule_stops_by_any_true_scalar():
    def rule(stop):
        return nnlearn.StopRule("mine", lambda: (), lambda state, metrics, step: (state, stop))

    assert stopped_at(stop=rule(2)) == stopped_at(stop=rule(np.float32(0.5))) == 2
    with pytest.raises(ValueError, match="'mine' must return"):
        stopped_at(stop=rule(jnp.array([True, False])))


def test_packed_accepts_numpy_booleans():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    assert not nnlearn.packing.is_packed(nnlearn.init_state(params, SGD, packed=np.False_).stored)
    assert nnlearn.packing.is_packed(nnlearn.init_state(params, SGD, packed=np.True_).stored)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
def test_a_mean_over_tokens_does_not_depend_on_the_batch_size(batch_size):
    """Equals NumPy; the third sequence has no tokens, and so no mean."""
    values = np.arange(20.0).reshape(5, 4)
    tokens = np.array([4, 1, 0, 3, 2])[:, None] > np.arange(4)

    def counted(batch):
        return batch.examples["tokens"] & batch.where[:, None]

    def metrics_fn(params, batch):
        return {"mean": params * jnp.mean(batch.examples["values"], where=counted(batch))}

    evaluate = nnlearn.evaluation(
        metrics_fn,
        {"values": jnp.asarray(values, jnp.float32), "tokens": jnp.asarray(tokens)},
        batch_size,
        batch_weight=lambda batch: jnp.sum(counted(batch)),
    )
    np.testing.assert_allclose(jax.jit(evaluate)(2.0)["mean"], 2 * values[tokens].mean(), rtol=1e-6)


def test_a_batch_weight_is_a_scalar():
    evaluate = nnlearn.evaluation(lambda p, b: {"x": p}, jnp.ones(4), 2, batch_weight=lambda batch: batch.where)
    with pytest.raises(ValueError, match="batch_weight must return a scalar"):
        evaluate(1.0)
    with pytest.raises(TypeError, match="batch_weight must take"):
        nnlearn.evaluation(lambda p, b: {"x": p}, jnp.ones(4), 2, batch_weight=lambda: 1.0)


X, Y = jnp.ones(2), jnp.full(2, 70_000.0)  # the largest float16 is 65,504
BATCHES = {
    "pair": ((X, Y), [True, False]),
    "dict": ({"x": X, "y": Y, "soft_labels": Y}, [False, True, False]),  # sorted by name
    "nested": (({"image": X, "depth": X}, Y), [True, True, False]),
    "masked": (MaskedBatch({"inputs": X, "targets": Y}, jnp.ones(2, bool)), [True, False, False]),
    "array": (X, [True]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_policy_casts_inputs_and_not_targets(name):
    batch, cast = BATCHES[name]
    seen = []

    def loss(params, batch, key):
        seen.append([leaf.dtype == jnp.float16 for leaf in jax.tree.leaves((params, batch))])
        return jnp.sum(params)

    policy = nnlearn.Policy(compute=jnp.float16)
    policy.wrap(loss)(X, batch, None)
    policy.wrap(loss, is_input=lambda path: True)(X, batch, None)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(batch)]
    assert seen == [[True, *cast], [True, *floating]]


def test_a_target_beyond_float16_does_not_overflow():
    loss = nnlearn.Policy(compute=jnp.float16).wrap(lambda params, batch, key: jnp.mean(params * batch[0] - batch[1]))
    np.testing.assert_allclose(loss(jnp.ones(2), (X, Y), None), 1 - 70_000.0)


@pytest.mark.slow
def test_batch_norm_refuses_to_train_on_one_value_per_feature():
    norm = batch_norm(3)
    params, statistics = norm.init(jax.random.key(0))
    key, one = jax.random.key(1), jnp.ones((1, 3))
    for x, options in ((one, {}), (jnp.ones((1, 1, 1, 3)), {}), (one, {"where": jnp.ones(1, bool)})):
        with pytest.raises(ValueError, match="more than one value per feature"):
            norm.apply(params, statistics, x, key, **options)
    norm.apply(params, statistics, one)  # evaluation
    norm.apply(params, statistics, jnp.ones((1, 2, 3)), key)  # one example, two positions
    spread = batch_norm(3, axis_name="data")
    jax.vmap(lambda x: spread.apply(params, statistics, x, key)[0], axis_name="data")(jnp.ones((2, 1, 3)))
    with pytest.raises(ValueError, match="more than one value per feature"):
        jax.vmap(lambda x: spread.apply(params, statistics, x, key)[0], axis_name="data")(jnp.ones((1, 1, 3)))
    # a traced mask may leave a single example: the statistics stay
    x, where = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), jnp.array([True, False])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, norm.apply(params, statistics, x, key, where)[1], statistics))


def test_microbatches_of_one_example_are_refused_too():
    model = sequential(dense(2, 3), batch_norm(3))
    params, statistics = model.init(jax.random.key(0))

    def loss(params, batch, key, model_state):
        y, model_state = model.apply(params, model_state, batch, key)
        return jnp.mean(y), {}, model_state

    state = nnlearn.init_state(params, SGD, model_state=statistics)
    with pytest.raises(ValueError, match="more than one value per feature"):
        nnlearn.make_step(loss, SGD, microbatches=2)(state, jnp.ones((2, 2)))


@pytest.mark.parametrize("make", [nnlearn.sgd, nnlearn.rmsprop])
def test_nesterov_without_momentum_warns(make):
    with pytest.warns(UserWarning, match="no effect without momentum"):
        make(0.1, nesterov=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(0.1, momentum=0.9, nesterov=True)


def test_a_guard_that_hides_overflows_from_the_scale_is_refused():
    scaled = nnlearn.dynamic_loss_scale(SGD)
    skipping = nnlearn.MultiSteps(scaled, 2, should_skip_update_fn=nnlearn.skip_not_finite)
    for tx in (nnlearn.apply_if_finite(nnlearn.chain(nnlearn.clip(1.0), scaled), 3), skipping):
        with pytest.raises(ValueError, match="put dynamic_loss_scale around"):
            tx.init(jnp.zeros(2))
    nnlearn.MultiSteps(scaled, 2).init(jnp.zeros(2))  # sees every window
    nnlearn.dynamic_loss_scale(nnlearn.apply_if_finite(SGD, 3)).init(jnp.zeros(2))


def test_several_loss_scales_are_refused():
    scaled = nnlearn.dynamic_loss_scale(SGD)
    for tx in (nnlearn.chain(scaled, scaled), nnlearn.dynamic_loss_scale(scaled)):
        with pytest.raises(ValueError, match="several loss scales"):
            nnlearn.current_loss_scale(tx.init(jnp.zeros(2)))
