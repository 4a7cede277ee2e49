"""Transformations that the table of optimizers does not hold, against optax and by their own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from contract import make_noise, make_params, named_states, relative_error, run

import nnlearn

PAIRS = {
    "normalize": (nnlearn.normalize, optax.contrib.normalize, {}),
    "normalize_by_update_norm": (
        nnlearn.normalize_by_update_norm, optax.normalize_by_update_norm, {"scale_factor": 0.3, "eps": 1e-2},
    ),
    "scale_by_param_block_norm": (nnlearn.scale_by_param_block_norm, optax.scale_by_param_block_norm, {"min_scale": 1}),
    "scale_by_distance_over_gradients": (
        nnlearn.scale_by_distance_over_gradients,
        optax.scale_by_distance_over_gradients,
        {"reps_rel": 0.02, "eps": 1e-2, "global_scale": 0.8},
    ),
    "scale_by_sm3": (nnlearn.scale_by_sm3, optax.scale_by_sm3, {"b1": 0.8, "b2": 0.9, "eps": 1e-3}),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_trajectories_are_optax_s_packed_too(name):
    make, theirs, settings = PAIRS[name]
    params, noise = make_params(), make_noise(30)
    if name in ("scale_by_sm3", "scale_by_distance_over_gradients"):  # optax's take no scalars
        params, noise = ({k: v for k, v in tree.items() if k != "s"} for tree in (params, noise))
    chains = (optax.chain(one(**settings), optax.scale(-0.1)) for one in (make, theirs))
    with jax.numpy_rank_promotion("allow"):  # optax's distance over gradients needs it
        (ours, state), (expected, reference) = (jax.jit(run, static_argnums=0)(tx, params, noise) for tx in chains)
    for key in params:
        assert relative_error(ours[key], expected[key]) < 2e-6
    assert set(named_states(reference)) <= set(named_states(state))
    tx = make(**settings)
    packed = nnlearn.pack(params)
    plain, _ = tx.update(params, tx.init(params), params)
    as_packed, _ = tx.update(packed, tx.init(packed), packed)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(nnlearn.unpack(as_packed)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_normalize_leaves_zero_as_it_is():
    assert np.array_equal(nnlearn.normalize().update(jnp.zeros(2), nnlearn.EmptyState())[0], jnp.zeros(2))


def test_the_noise_of_noisy_sgd_has_the_size_of_that_of_optax():
    """The variance is ``eta / (count + 1) ** gamma``; the draws themselves differ."""
    params = jnp.ones(10_000)
    ours, theirs = nnlearn.noisy_sgd(0.1, 0.2, 0.3, key=7), optax.noisy_sgd(0.1, 0.2, 0.3, key=jax.random.key(7))
    pairs = [(tx, tx.init(params)) for tx in (ours, theirs)]
    for count in range(2):
        found = [tx.update(params, state, params) for tx, state in pairs]
        pairs = [(tx, state) for (tx, _), (_, state) in zip(pairs, found, strict=True)]
        for update, _ in found:
            noise = np.asarray(update + 0.1 * params) / -0.1
            assert abs(np.mean(noise)) < 0.02
            assert np.isclose(np.var(noise), 0.2 / (count + 1) ** 0.3, rtol=0.06)
    assert nnlearn.noisy_sgd(0.1, key=7) == nnlearn.noisy_sgd(0.1, key=7)


PLATEAU = {"factor": 0.5, "patience": 3, "rtol": 0.01, "atol": 0.02, "cooldown": 2, "accumulation_size": 2}


@pytest.mark.parametrize("shift", [0.0, -10.0], ids=["positive", "negative"])
def test_reduce_on_plateau_follows_optax_where_losses_are_positive(shift):
    losses = np.concatenate([np.linspace(3, 1, 20), np.full(40, 1.0)]).astype(np.float32) + shift
    scales = []
    for make in (nnlearn.reduce_on_plateau, optax.contrib.reduce_on_plateau):
        tx = make(**PLATEAU, min_scale=0.1)

        def step(state, loss, tx=tx):
            update, state = tx.update(jnp.ones(()), state, value=loss)
            return state, update

        scales.append(jax.lax.scan(step, tx.init(jnp.ones(())), losses)[1])
    if shift == 0:
        np.testing.assert_allclose(*scales, rtol=1e-6)
    assert scales[0][-1] < 0.2
    assert shift == 0 or scales[1][-1] == 1  # optax takes every negative loss for an improvement


def test_reduce_on_plateau_takes_tracers_and_names_bad_numbers():
    def last(numbers):
        tx = nnlearn.reduce_on_plateau(**numbers)
        state = tx.init(jnp.ones(()))
        for _ in range(5):
            update, state = tx.update(jnp.ones(()), state, value=1.0)
        return update

    table = {name: jnp.array([value, value]) for name, value in PLATEAU.items()} | {"factor": jnp.array([0.5, 0.25])}
    table |= {"patience": jnp.array([1, 1]), "accumulation_size": jnp.array([1, 1]), "cooldown": jnp.array([0, 9])}
    np.testing.assert_allclose(jax.jit(jax.vmap(last))(table), [0.5**4, 0.25])
    for bad in ({"factor": 1.0}, {"rtol": -1.0}, {"patience": 0}, {"rtol": 0.0, "atol": 0.0}, {"cooldown": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            nnlearn.reduce_on_plateau(**bad)
    for tx in (nnlearn.reduce_on_plateau(), nnlearn.momo(), nnlearn.polyak_sgd()):
        with pytest.raises((TypeError, ValueError), match="value=loss"):
            tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))


def test_schedule_free_weighs_by_the_rate_and_evaluates_the_average():
    params, noise = make_params(), make_noise(40)
    schedule = optax.linear_schedule(0.01, 0.1, 40)
    for power in (1.0, 2.0):
        ours = nnlearn.schedule_free(nnlearn.sgd(schedule), schedule, 0.8, power)
        theirs = optax.contrib.schedule_free(optax.sgd(schedule), schedule, 0.8, power)
        (y, state), (expected, reference) = (jax.jit(run, static_argnums=0)(tx, params, noise) for tx in (ours, theirs))
        x = nnlearn.schedule_free_eval_params((state, ()), y)
        x_expected = optax.contrib.schedule_free_eval_params(reference, expected)
        for key in params:
            assert relative_error(y[key], expected[key]) < 1e-5 and relative_error(x[key], x_expected[key]) < 1e-5
    zero = nnlearn.schedule_free(nnlearn.sgd(0.1), 0.1, b1=0.0)
    y, state = run(zero, params, noise)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(nnlearn.schedule_free_eval_params(state, y)))
    with pytest.raises(ValueError, match="holds 0"):
        nnlearn.schedule_free_eval_params(nnlearn.sgd(0.1).init(params), params)


def test_opaque_sam_makes_the_step_of_two_transparent_ones():
    params = jnp.array([1.0, -2.0])
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(p) + p**2))
    climb = nnlearn.chain(nnlearn.normalize(), nnlearn.sgd(0.1))
    once = nnlearn.sam(nnlearn.sgd(0.2), climb, opaque_mode=True)
    change, _ = once.update(gradient(params), once.init(params), params, grad_fn=lambda p, _: gradient(p))
    twice, point = nnlearn.sam(nnlearn.sgd(0.2), climb), params
    state = twice.init(params)
    for _ in range(2):
        updates, state = twice.update(gradient(point), state, point)
        point = optax.apply_updates(point, updates)
    np.testing.assert_allclose(params + change, point, rtol=1e-6)
    with pytest.raises(ValueError, match="grad_fn"):
        once.update(params, once.init(params), params)


def test_cautious_mars_hyperball_and_depth_packed_too():
    random = np.random.default_rng(0)
    shapes = {"embed": (4, 3), "body": (4, 3), "b": (3,)}
    params, grads, more = (
        {name: jnp.asarray(random.normal(size=size), jnp.float32) for name, size in shapes.items()} for _ in range(3)
    )
    tx = optax.chain(
        nnlearn.scale_by_mars(0.3, 0.5),
        nnlearn.cautious(nnlearn.sgd(0.1, 0.9)),
        nnlearn.scale_by_depth(0.5, {"embed": 0}, layers=2),
        nnlearn.hyperball(),
    )

    def two_steps(params, grads, more):
        state = tx.init(params)
        first, state = tx.update(grads, state, params)
        second, _ = tx.update(more, state, params)
        return first, second

    first, second = jax.jit(two_steps)(params, grads, more)
    packed = jax.jit(two_steps)(*map(nnlearn.pack, (params, grads, more)))
    for name in shapes:
        np.testing.assert_allclose(second[name], nnlearn.unpack(packed[1])[name], rtol=1e-5, atol=1e-7)
        w, g, h = (np.asarray(tree[name], np.float64) for tree in (params, grads, more))
        corrected = [g, h + 0.3 * (h - g)]
        corrected = [c / max(1, np.linalg.norm(c)) for c in corrected]
        trace = 0
        for c in corrected:
            trace = c + 0.9 * trace
        update = -0.1 * trace
        keep = update * corrected[1] < 0
        update = update * keep * keep.size / max(keep.sum(), 1) * (0.25 if name == "embed" else 1)
        moved = w + update
        expected = moved * np.linalg.norm(w) / np.linalg.norm(moved) - w if w.ndim > 1 else update
        np.testing.assert_allclose(second[name], expected, rtol=1e-4, atol=1e-6)
    assert first["body"].shape == (4, 3)


@pytest.mark.parametrize("preset", ["standard", "polar_express"])
def test_singular_values_lie_in_the_published_band(preset):
    from nnlearn.transforms.orthogonal import PRESETS, newton_schulz

    random = np.random.default_rng(0)
    rows = jnp.asarray(PRESETS[preset], jnp.float32)
    run_it = jax.jit(jax.vmap(lambda x: newton_schulz(x, rows, 5, 1e-8, "frobenius")))
    left, right = (np.linalg.qr(random.normal(size=(size, size)))[0] for size in (16, 24))
    low, high = (0.68, 1.21) if preset == "standard" else (0.87, 1.13)
    matrices = []
    for rank in (16, 5, 1, 0):
        values = np.zeros(16)
        values[:rank] = np.geomspace(1, 0.02, rank) if rank else []
        matrices.append(left * values @ right[:16])
    found = np.linalg.svd(run_it(jnp.asarray(np.stack(matrices), jnp.float32)), compute_uv=False)
    for rank, values in zip((16, 5, 1, 0), found, strict=True):
        assert np.all((values[:rank] > low) & (values[:rank] < high)) and np.all(values[rank:] < 1e-3)
    low_precision = jax.vmap(lambda x: newton_schulz(x, rows.astype(x.dtype), 5, 1e-8, "frobenius"))
    rough = low_precision(jnp.asarray(np.stack(matrices[:1]), jnp.bfloat16)).astype(jnp.float32)
    values = np.linalg.svd(rough, compute_uv=False)
    assert np.all((values > low - 0.1) & (values < high + 0.1))


def test_kl_soap_follows_its_loop():
    from contract import numpy_soap

    with jax.enable_x64(True):
        params, noise = make_params(jnp.float64), make_noise(50, jnp.float64)
        tx = nnlearn.soap(0.03, 0.8, 0.9, 0.9, 1e-3, kl=True)
        final, _ = jax.jit(run, static_argnums=0)(tx, params, noise)
        numbers = {"learning_rate": 0.03, "b1": 0.8, "b2": 0.9, "shampoo_beta": 0.9, "eps": 1e-3, "weight_decay": 0.0}
        for name, value in params.items():
            value, memory = np.asarray(value), {}
            for index in range(50):
                gradient = value - 0.5 + np.asarray(noise[name][index])
                value = numpy_soap(index + 1, value, gradient, memory, **numbers, precondition_every=1, kl=True)
            assert relative_error(final[name], value) < 1e-10


def test_average_from_is_the_mean_of_the_chosen_steps():
    tx = nnlearn.chain(nnlearn.sgd(1.0), nnlearn.average_from(3, every=2))
    params, state, seen = jnp.zeros(()), tx.init(jnp.zeros(())), []
    for step in range(1, 8):
        updates, state = tx.update(jnp.asarray(-float(step)), state, params)
        params = nnlearn.apply_updates(params, updates)
        seen.append(float(params))
        expected = np.mean(seen[2::2]) if step >= 3 else seen[-1]
        assert np.isclose(float(nnlearn.averaged_params(state)), expected, rtol=1e-6), step
    with pytest.raises(ValueError, match="every"):
        nnlearn.average_from(1, 0)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 2, 3)])
def test_the_orthogonal_pull_is_the_gradient_of_its_penalty(shape):
    w = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def penalty(w):
        flat = w.reshape(-1, shape[-1])
        flat = flat if flat.shape[0] >= flat.shape[1] else flat.T
        return jnp.sum((flat.T @ flat - jnp.eye(flat.shape[1])) ** 2) / 4

    tx = nnlearn.add_orthogonal_pull(0.3)
    for tree in ({"w": w}, nnlearn.pack({"w": w, "v": w})):
        zero = jax.tree.map(jnp.zeros_like, tree)
        found = nnlearn.unpack(tx.update(zero, tx.init(tree), tree)[0])["w"]
        np.testing.assert_allclose(found, 0.3 * jax.grad(penalty)(w), rtol=1e-4, atol=1e-5)


def test_steps_by_width_scale_hidden_matrices_alone():
    def shapes(d):
        return {"embed": (50, d), "layers": (3, d, d), "conv": (3, 3, d, d), "b": (d,)}

    base, wide = ({name: jnp.ones(shape) for name, shape in shapes(d).items()} for d in (8, 32))
    tx = nnlearn.scale_by_width(base)
    updates, _ = tx.update(wide, tx.init(wide))
    factors = {name: float(leaf.ravel()[0]) for name, leaf in updates.items()}
    assert factors == {"embed": 1, "layers": 0.25, "conv": 0.25, "b": 1}
    with pytest.raises(ValueError, match="base has no leaf 'other'"):
        tx.update({"other": jnp.ones((2, 2))}, tx.init({}))
