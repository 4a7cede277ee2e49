"""Custom gradients: the contract, private training over parts, loss scales, devices, Poisson batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nnlearn
from nnlearn.data import MaskedBatch

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
WHERE = np.arange(16) % 3 != 1


def loss_fn(params, batch, key):
    x, where = (batch.examples, batch.where) if isinstance(batch, MaskedBatch) else (batch, None)
    return jnp.mean(jnp.square(x @ params["w"] - 1), where=where)


def start(tx, **options):
    return nnlearn.init_state({"w": jnp.ones(3) / 2}, tx, **options)


def over_devices(step, count=4):
    def mapped(state, batch):
        parts = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)
        states, infos = quick_jit(jax.vmap(step, (None, 0), axis_name="d"))(state, parts)
        for leaf in jax.tree.leaves((states.params, states.opt_state, infos)):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
        return jax.tree.map(lambda leaf: leaf[0], (states, infos))

    return mapped


def over_mesh(step):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    return quick_jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("d")), out_specs=P()))


def private(loss_fn, **options):
    return nnlearn.clipped_value_and_grad(loss_fn, 0.5, 2.0, **options)


@pytest.mark.parametrize("batch_size", [None, 20.0])
@pytest.mark.slow
def test_noise_is_added_once_for_any_number_of_parts(batch_size):
    """All parts clip equally, so equal noise gives equal steps; n or ``batch_size`` divides both sum and noise."""
    tx, batch = nnlearn.sgd(0.1), MaskedBatch(jnp.asarray(X), jnp.asarray(WHERE))
    own = functools.partial(private, batch_size=batch_size)
    make = functools.partial(nnlearn.make_step, loss_fn, tx, value_and_grad=own)
    expected, _ = quick_jit(make())(start(tx), batch)
    runs = [over_devices(make(axis_name="d", microbatches=2)), over_mesh(make(axis_name="d"))]
    for run in [quick_jit(make(microbatches=4))] if batch_size else runs:
        np.testing.assert_allclose(run(start(tx), batch)[0].params["w"], expected.params["w"], rtol=1e-5)
    key = jax.random.fold_in(start(tx).key, 0)
    _, quiet = quick_jit(nnlearn.clipped_value_and_grad(loss_fn, 0.5))({"w": jnp.ones(3) / 2}, batch, key)
    size = batch_size or WHERE.sum()
    noise = (np.ones(3) / 2 - expected.params["w"]) / 0.1 - quiet["w"] * WHERE.sum() / size
    drawn = jax.random.normal(jax.random.fold_in(key, nnlearn.gradients.clipped.NOISE_STREAM), (3,))
    np.testing.assert_allclose(noise, drawn * 2.0 * 0.5 / size, rtol=1e-3, atol=1e-6)


def test_the_gradient_of_an_empty_poisson_batch_is_noise():
    tx, batch = nnlearn.sgd(0.1), MaskedBatch(jnp.asarray(X), jnp.zeros(16, bool))
    own = functools.partial(private, batch_size=4.0)
    step = nnlearn.make_step(loss_fn, tx, value_and_grad=own, record=("grad_norm",), microbatches=2)
    _, info = quick_jit(step)(start(tx), batch)
    assert 0.01 < info.grad_norm < 2


class TestContract:
    def test_packed_parameters_are_given_as_a_tree(self):
        def penalised(loss_fn):
            def with_penalty(params, batch, key):
                return loss_fn(params, batch, key) + jnp.sum(params["w"] ** 2), {"length": jnp.sum(params["w"])}

            return jax.value_and_grad(with_penalty, has_aux=True)

        tx = nnlearn.sgd(0.1)
        step = quick_jit(nnlearn.make_step(loss_fn, tx, value_and_grad=penalised))
        found = [step(start(tx, packed=packed), jnp.asarray(X)) for packed in (True, False)]
        grad = 2 * X.T @ (X @ np.full(3, 0.5) - 1) / 16 + 1
        for state, info in found:
            np.testing.assert_allclose(state.params["w"], 0.5 - 0.1 * grad, rtol=1e-5)
            assert info.aux["length"] == 1.5

    def test_a_penalty_on_the_gradient_is_not_scaled(self):
        """A penalty on the gradient's norm is not linear in the loss."""

        def flat(loss_fn):
            def penalised(params, batch, key):
                grads = jax.grad(loss_fn)(params, batch, key)
                return loss_fn(params, batch, key) + jnp.sum(grads["w"] ** 2)

            return jax.value_and_grad(penalised)

        found = []
        for tx in (nnlearn.sgd(0.01), nnlearn.dynamic_loss_scale(nnlearn.sgd(0.01), 1024.0)):
            step = quick_jit(nnlearn.make_step(loss_fn, tx, value_and_grad=flat))
            found.append(step(start(tx), jnp.asarray(X))[0].params["w"])
        np.testing.assert_allclose(*found, rtol=1e-6)
        hessian = 2 * X.T @ X / 16
        grad = hessian @ np.full(3, 0.5) - 2 * X.mean(0)
        np.testing.assert_allclose(found[0], 0.5 - 0.01 * (grad + 2 * hessian @ grad), rtol=1e-4)

    @pytest.mark.parametrize(
        ("bad", "error", "message"),
        [
            (lambda f: 3.0, TypeError, r"value_and_grad\(loss_fn\) must be a function"),
            (lambda f: lambda params: None, TypeError, r"value_and_grad\(loss_fn\) must take"),
            (nnlearn.clipped_value_and_grad(loss_fn, 1.0), TypeError, r"value_and_grad must take \(loss_fn\)"),
            (lambda f: lambda p, b, k: (0.0, None, p), TypeError, "a tuple of 3"),
            (lambda f: lambda p, b, k: (jnp.zeros(2), p), TypeError, r"real scalar loss; got shape \(2,\)"),
            (lambda f: lambda p, b, k: (0.0, p["w"]), ValueError, "grads like params"),
            (lambda f: lambda p, b, k: (0.0, {"w": p["w"][1:]}), ValueError, r"'w' has shape \(2,\)"),
            (lambda f: lambda p, b, k: (0.0, {"w": p["w"] * 1j}), TypeError, "'w' is complex"),
        ],
    )
    def test_violations_name_the_contract(self, bad, error, message):
        with pytest.raises(error, match=message):
            nnlearn.make_step(loss_fn, nnlearn.sgd(0.1), value_and_grad=bad)(start(nnlearn.sgd(0.1)), jnp.asarray(X))

    def test_a_dropped_model_state_is_refused(self):
        def stateful(params, batch, key, model_state):
            return loss_fn(params, batch, key), None, model_state + 1

        def forgetful(loss_fn):
            return jax.value_and_grad(lambda *arguments: loss_fn(*arguments)[0])

        tx = nnlearn.sgd(0.1)
        with pytest.raises(TypeError, match="must return the aux"):
            nnlearn.make_step(stateful, tx, value_and_grad=forgetful)(start(tx, model_state=jnp.zeros(1)), X)

    def test_effects_occur_once(self):
        seen = []

        def noisy(params, batch, key):
            jax.debug.callback(lambda: seen.append(0))
            return loss_fn(params, batch, key), {"norm": jnp.sum(params["w"])}

        tx, batch = nnlearn.sgd(0.1), jnp.asarray(X)
        clipped = functools.partial(nnlearn.clipped_value_and_grad, clip_norm=1.0)
        for loss, own, record in (
            (noisy, clipped, ("noise_scale",)),
            (lambda *arguments: noisy(*arguments)[0], clipped, ()),
            (noisy, None, ("noise_scale",)),
        ):
            seen.clear()
            step = quick_jit(nnlearn.make_step(loss, tx, value_and_grad=own, record=record))
            jax.block_until_ready(step(start(tx), batch))
            jax.effects_barrier()
            assert len(seen) == 1, (own, record)


class TestLossScale:
    """Example gradients that underflow float16 unscaled, and overflow it with a large scale."""

    def step(self, scale, factor, **options):
        def half_loss(params, batch, key):
            half = (batch * params["w"][None]).astype(jnp.float16) * jnp.float16(factor)
            return jnp.mean(half.astype(jnp.float32)) * factor

        tx = nnlearn.dynamic_loss_scale(nnlearn.sgd(1.0), scale)
        own = functools.partial(nnlearn.clipped_value_and_grad, clip_norm=1e-8)
        step = nnlearn.make_step(half_loss, tx, value_and_grad=own, **options)
        return quick_jit(step)(start(tx), jnp.ones((2, 3)))

    def test_a_gradient_that_would_underflow_is_clipped_at_its_true_norm(self):
        for options in ({}, {"microbatches": 2}):
            state, info = self.step(2.0**15, 1e-4, **options)  # each entry has the gradient 1e-8 / 3
            np.testing.assert_allclose(info.grad_norm, 1e-8 / np.sqrt(3), rtol=2e-2)
            assert state.opt_state.skipped == 0
        assert self.step(1.0, 1e-4)[1].grad_norm == 0

    def test_an_overflow_skips_the_step_and_lowers_the_scale(self):
        state, info = self.step(2.0**20, 1.0)
        assert jnp.isinf(info.grad_norm) and state.opt_state.skipped == 1 and state.opt_state.loss_scale == 2.0**19
        np.testing.assert_array_equal(state.params["w"], np.full(3, 0.5))


@pytest.mark.parametrize(("mapped", "own"), [(over_mesh, None), (over_devices, jax.value_and_grad)])
def test_a_line_search_on_many_devices_uses_the_loss_of_all_devices(mapped, own):
    def update(updates, state, params, *, value, grad, value_fn, **extra_args):
        found = jax.value_and_grad(value_fn)(params)
        return jax.tree.map(lambda leaf: -leaf, found[1]), (value, grad, *found)

    zeros = (jnp.zeros([]), {"w": jnp.zeros(3)})
    tx = optax.GradientTransformationExtraArgs(lambda params: zeros * 2, update)
    batch, x = MaskedBatch(jnp.asarray(X), jnp.asarray(WHERE)), X[WHERE]
    step = nnlearn.make_step(loss_fn, tx, axis_name="d", value_and_grad=own, microbatches=2)
    state, _ = mapped(step)(start(tx), batch)
    residuals = x @ np.full(3, 0.5) - 1
    for value, grad in (state.opt_state[:2], state.opt_state[2:]):
        np.testing.assert_allclose(value, np.mean(residuals**2), rtol=1e-5)
        np.testing.assert_allclose(grad["w"], 2 * residuals @ x / len(x), rtol=1e-4)


def test_the_derivative_of_a_run_is_the_same_on_many_devices():
    """Differentiates inside the mapped axis, with respect to the rate and a hyper-parameter of the loss."""

    def ridge(params, batch, key, hparams):
        return loss_fn(params, batch, key) + hparams["ridge"] * jnp.sum(params["w"] ** 2)

    def last(settings, batch):
        tx = nnlearn.sgd(settings["rate"])
        step, state = nnlearn.make_step(ridge, tx, axis_name="d", hparams=settings), start(tx)
        for _ in range(2):
            state, _ = step(state, batch)
        return jnp.sum(state.params["w"] ** 2)

    def by_numpy(rate, ridge):
        w = np.full(3, 0.5)
        for _ in range(2):
            w = w - rate * (2 * X.T.astype(float) @ (X @ w - 1) / 16 + 2 * ridge * w)
        return np.sum(w**2)

    found = quick_jit(jax.vmap(jax.grad(last), (None, 0), axis_name="d"))(
        {"rate": jnp.float32(0.1), "ridge": jnp.float32(0.3)}, X.reshape(4, 4, 3)
    )
    rate = (by_numpy(0.1 + 1e-5, 0.3) - by_numpy(0.1 - 1e-5, 0.3)) / 2e-5
    weight = (by_numpy(0.1, 0.3 + 1e-5) - by_numpy(0.1, 0.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(found["rate"], np.full(4, rate), rtol=1e-3)
    np.testing.assert_allclose(found["ridge"], np.full(4, weight), rtol=1e-3)


class TestPoisson:
    def draw(self, steps=400, **options):
        sampler = nnlearn.poisson_sampled(jnp.arange(30), 6, **options)
        _, rows = sampler.rows(jax.random.key(0), sampler.start(None, steps), 0, steps, steps)
        return jax.tree.map(np.asarray, quick_jit(jax.vmap(sampler.batch))(rows))

    def test_examples_are_drawn_independently_at_the_rate(self):
        batches = self.draw()
        joined = np.zeros((400, 30))
        for row, (examples, where) in zip(joined, zip(*batches, strict=True), strict=True):
            np.add.at(row, examples[where], 1)
        assert joined.max() == 1  # no example twice in a batch
        deviation = np.sqrt(0.2 * 0.8 / 400)
        assert np.abs(joined.mean(0) - 0.2).max() < 4 * deviation
        correlations = np.corrcoef(joined.T)[np.triu_indices(30, 1)]
        assert np.abs(correlations).max() < 4.5 / np.sqrt(400)
        sizes = joined.sum(1)
        assert abs(sizes.mean() - 6) < 4 * np.sqrt(4.8 / 400) and abs(sizes.var() - 4.8) < 1.5

    def test_a_batch_depends_only_on_key_and_step(self):
        sampler = nnlearn.poisson_sampled(jnp.arange(30), 6)
        _, later = sampler.rows(jax.random.key(0), (), 3, 2, 1)
        together = self.draw(steps=5)
        for found, expected in zip(quick_jit(jax.vmap(sampler.batch))(later), together, strict=True):
            np.testing.assert_array_equal(found, expected[3:])

    def test_arguments_are_checked(self):
        for batch_size, options, message in (
            (31, {}, "batch_size=31"),
            (6, {"capacity": 5}, "capacity=5"),
            (0, {}, "batch_size"),
            (6, {"epoch_steps": 0}, "epoch_steps"),
        ):
            with pytest.raises(ValueError, match=message):
                nnlearn.poisson_sampled(jnp.arange(30), batch_size, **options)
        assert nnlearn.poisson_sampled(jnp.arange(30), 7).epoch_steps == 5
        assert self.draw(capacity=8).where.shape == (400, 8)

    def test_a_private_run_learns(self):
        target = jnp.array([1.0, -2.0, 0.5])
        loss_fn = lambda w, batch, key: jnp.mean(jnp.square(batch.examples @ (w - target)), where=batch.where)  # noqa: E731
        batches = nnlearn.poisson_sampled(jnp.asarray(np.tile(X, (16, 1))), 64)
        own = functools.partial(nnlearn.clipped_value_and_grad, clip_norm=1.0, noise_multiplier=0.5, batch_size=64)
        train = nnlearn.make_train(
            loss_fn, nnlearn.sgd, batches, jnp.zeros(3), steps=100, microbatches=2, value_and_grad=own
        )
        state, _ = quick_jit(train)(0.1, 0)
        np.testing.assert_allclose(state.params, target, atol=0.1)
