"""A step that a guard skips has no effect: a run with bad batches equals the run without them, bit for bit."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnlearn

GOOD = np.array([[2.0, 4.0], [3.0, 6.0], [5.0, 1.0], [7.0, 2.0], [1.0, 3.0], [4.0, 2.0]], np.float32)
BAD = np.array([np.inf, 4.0], np.float32)
WITH_BAD = [GOOD[0], BAD, GOOD[1], BAD, BAD, GOOD[2], GOOD[3], BAD, GOOD[4], GOOD[5]]
PARAMS = {"a": jnp.ones(2), "b": jnp.ones(3)}
STATISTICS = {"mean": jnp.zeros(()), "seen": jnp.zeros((), jnp.int32)}
OWN = {"notfinite_count", "last_finite", "total_notfinite", "loss_scale", "good_steps", "skipped", "skip_state", "step"}


def loss_fn(params, batch, key, model_state):
    loss = jnp.mean((params["a"][0] - batch) ** 2) + jnp.mean((params["b"][1] - batch / 2) ** 2)
    mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(batch)
    return loss, {}, {"mean": mean, "seen": model_state["seen"] + 1}


def parts(a, b):
    return nnlearn.partition({"a": a, "b": b}, {"a": "a", "b": "b"})


def guarded(inner):
    return nnlearn.apply_if_finite(inner, 5)


def mini_steps(inner, k=2, skip=nnlearn.skip_not_finite):
    return nnlearn.MultiSteps(inner, k, should_skip_update_fn=skip)


class OwnState(NamedTuple):
    skipped: jax.Array
    inner_state: optax.OptState


def own_guard(inner):
    """A guard by a user: the update is 0 if a number is not finite."""

    def init(params):
        return OwnState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates, state, params=None):
        bad = ~jnp.isfinite(nnlearn.global_norm(updates))
        change, inner_state = inner.update(updates, state.inner_state, params)
        change = jax.tree.map(lambda leaf: jnp.where(bad, 0, leaf), change)
        kept = jax.tree.map(lambda old, new: jnp.where(bad, old, new), state.inner_state, inner_state)
        return change, OwnState(state.skipped + bad, kept)

    return optax.GradientTransformation(init, update)


chain, sgd, adam, average = nnlearn.chain, nnlearn.sgd, nnlearn.adam, nnlearn.average_params
FALLING = nnlearn.scale_by_learning_rate(nnlearn.linear_schedule(0.1, 0.0, 20))
LARGE = functools.partial(nnlearn.skip_large_updates, max_squared_norm=1e4)
OPTIMIZERS = {
    "average after": chain(guarded(sgd(0.1)), average(0.9)),
    "average before": chain(average(0.9), guarded(adam(0.1))),
    "average inside": guarded(chain(sgd(0.1), average(0.9))),
    "moments before": chain(optax.scale_by_adam(), nnlearn.dynamic_loss_scale(nnlearn.scale(-0.1)), average(0.9)),
    "decay and schedule after": chain(guarded(nnlearn.scale_by_adam()), nnlearn.add_decayed_weights(0.1), FALLING),
    "a mask": nnlearn.masked(guarded(sgd(0.1)), {"a": True, "b": False}),
    "one part": parts(guarded(sgd(0.1)), adam(0.1)),
    "one part, the other accumulates": parts(
        nnlearn.dynamic_loss_scale(sgd(0.1)), chain(nnlearn.MultiSteps(adam(0.1), 2), average(0.9))
    ),
    "mini-steps": chain(mini_steps(adam(0.1)), average(0.9)),
    "large mini-steps": mini_steps(chain(sgd(0.1), average(0.9)), skip=LARGE),
    "optax mini-steps": optax.MultiSteps(
        optax.adam(0.1), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "around mini-steps": guarded(nnlearn.MultiSteps(sgd(0.1), 2)),
    "two guards": nnlearn.dynamic_loss_scale(chain(guarded(sgd(0.1)), average(0.9))),
    "one of your own": chain(own_guard(sgd(0.1)), average(0.9)),
}


def start(tx, **options):
    return nnlearn.init_state(PARAMS, tx, model_state=STATISTICS, **options)


def run(tx, batches, **options):
    step = jax.jit(nnlearn.make_step(loss_fn, tx, **options))
    state, skipped = start(tx), []
    for batch in batches:
        state, info = step(state, batch)
        skipped.append(bool(info.skipped))
    return step, state, skipped


def check_same(state, expected):
    """Assert equality except for the number of batches and the counts of guards."""
    leaves = jax.tree.leaves_with_path((state.params, state.opt_state, state.model_state))
    others = jax.tree.leaves((expected.params, expected.opt_state, expected.model_state))
    for (path, leaf), other in zip(leaves, others, strict=True):
        if not OWN & {getattr(part, "name", None) for part in path}:
            np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_batches_change_nothing(name):
    step, state, skipped = run(OPTIMIZERS[name], WITH_BAD)
    assert skipped == [batch is BAD for batch in WITH_BAD]
    assert int(state.step) == len(WITH_BAD) and int(state.model_state["seen"]) == len(GOOD)
    expected = start(OPTIMIZERS[name])
    for batch in GOOD:
        expected, info = step(expected, batch)
        assert not info.skipped
    check_same(state, expected)


@pytest.mark.parametrize("options", [{"microbatches": 2}, {"record": ("grad_norm", "update_norm")}])
def test_bad_batches_change_nothing_for_any_step(options):
    tx = OPTIMIZERS["average after"]
    step, state, _ = run(tx, WITH_BAD, **options)
    expected = start(tx)
    for batch in GOOD:
        expected, _ = step(expected, batch)
    check_same(state, expected)


def test_bad_batches_change_nothing_with_packed_parameters_and_vmapped_runs():
    tx = OPTIMIZERS["moments before"]
    step = jax.jit(jax.vmap(nnlearn.make_step(loss_fn, tx, packed=True), in_axes=(None, 0)))
    state = start(tx, packed=True)
    good, _ = step(state, jnp.stack([GOOD[0], GOOD[0]]))
    both, infos = step(state, jnp.stack([BAD, GOOD[0]]))
    assert infos.skipped.tolist() == [True, False]
    check_same(jax.tree.map(lambda leaf: leaf[0], both), state)
    for leaf, other in zip(jax.tree.leaves(both.params), jax.tree.leaves(good.params), strict=True):
        np.testing.assert_array_equal(leaf[1], other[1])


def test_all_devices_skip_a_step_that_is_bad_on_one():
    tx = OPTIMIZERS["average after"]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = nnlearn.make_step(loss_fn, tx, axis_name="data")
    spec = jax.sharding.PartitionSpec
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=(spec(), spec())))
    first = start(tx)
    state, info = step(first, np.concatenate([GOOD[0], BAD]))
    assert info.skipped
    check_same(state, first)
    state, info = step(first, np.concatenate([GOOD[0], GOOD[1]]))
    assert not info.skipped and state.model_state["seen"] == 1


INJECTED = nnlearn.inject_hyperparams(nnlearn.apply_if_finite)


@pytest.mark.parametrize("apply_if_finite", [nnlearn.apply_if_finite, optax.apply_if_finite, INJECTED])
def test_an_accepted_update_is_complete(apply_if_finite):
    tx = chain(nnlearn.by_leaf(apply_if_finite(sgd(0.1), 2)), average(0.9))
    _, state, skipped = run(tx, [GOOD[0], BAD, BAD, BAD])
    assert skipped == [False, True, True, False]
    assert int(state.model_state["seen"]) == int(state.opt_state[1].count) == 2
    assert not np.isfinite(state.params["a"][0]) and not np.isfinite(state.model_state["mean"])


def test_a_mini_step_that_accumulates_is_not_skipped():
    tx = mini_steps(sgd(0.1), k=3)
    _, state, skipped = run(tx, [GOOD[0], BAD, GOOD[1]])
    assert skipped == [False, True, False] and int(state.opt_state.mini_step) == 2
    mean = 0.1 * GOOD[1].mean() + 0.9 * 0.1 * GOOD[0].mean()
    np.testing.assert_allclose(state.model_state["mean"], mean, rtol=1e-6)
    # It does not advance inside another MultiSteps, or when optax does not run it, and is not skipped either.
    nested = nnlearn.MultiSteps(mini_steps(sgd(0.1), k=2), 2)
    assert run(nested, [GOOD[0], GOOD[1], GOOD[2]])[2] == [False] * 3
    at_times = optax.conditionally_transform(mini_steps(sgd(0.1), k=2), lambda step: step % 2 == 0)
    assert run(at_times, [GOOD[0], GOOD[1], GOOD[2]])[2] == [False] * 3


def test_a_window_skipped_by_an_inner_guard_is_reset():
    tx = nnlearn.MultiSteps(guarded(sgd(0.1)), 2)
    _, state, skipped = run(tx, [BAD, GOOD[0], GOOD[1], GOOD[2]])
    assert skipped == [False, True, False, False]
    assert int(state.opt_state.gradient_step) == 2 and int(state.opt_state.inner_opt_state.total_notfinite) == 1
    check_same(
        state._replace(opt_state=(), model_state=()), run(tx, GOOD[1:3])[1]._replace(opt_state=(), model_state=())
    )


def test_was_skipped_is_none_without_guards():
    tx = adam(0.1)
    assert nnlearn.was_skipped(tx, tx.init(PARAMS), tx.init(PARAMS)) is None
    _, info = jax.eval_shape(nnlearn.make_step(loss_fn, tx), start(tx), GOOD[0])
    assert info.skipped is None


ROWS = jnp.array([1.0, np.nan, 2.0, 6.0, np.nan, np.nan, 3.0, 5.0, 7.0])  # the losses of nine steps, three to a check


def test_rules_count_only_steps_that_were_not_skipped():
    """``train_loss`` is the mean over them, in a compiled run and in a stream; a check without any is NaN."""

    def loss_fn(params, batch, key):
        return jnp.mean(batch) + 0 * jnp.sum(params * batch)

    tx = guarded(sgd(0.1))
    rules = (nnlearn.diverged(), nnlearn.keep_best("train_loss"))
    train = nnlearn.make_train(
        loss_fn, tx, nnlearn.generated(lambda key, step: ROWS[step]), jnp.ones(2), steps=9, check_every=3, stop=rules
    )
    final, trace = jax.jit(train)(None, 0)
    step = nnlearn.make_step(loss_fn, tx)
    result = nnlearn.fit(
        step,
        nnlearn.init_state(jnp.ones(2), tx),
        [np.asarray(row) for row in ROWS],
        check_every=3,
        stop=rules,
        steps_per_dispatch=2,
        progress=False,
    )
    for seen in (trace, result.trace):
        np.testing.assert_allclose(seen.metrics["train_loss"], [1.5, 6.0, 5.0], rtol=1e-6)
        np.testing.assert_array_equal(seen.info.skipped, np.isnan(ROWS))
        assert seen.stopped_by == "all steps" and int(seen.best_step) == 3
    empty = nnlearn.fit(
        step, nnlearn.init_state(jnp.ones(2), tx), [np.float32(np.nan)] * 2, stop=nnlearn.diverged(), progress=False
    )
    assert empty.stopped_by == "diverged(train_loss)"
