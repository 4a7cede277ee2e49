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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_staggered_refreshes_are_spread_over_the_steps(name):
    random = np.random.default_rng(0)
    params = {f"{index}": jnp.asarray(random.normal(size=(4, 3)), jnp.float32) for index in range(8)}
    params["wide"] = jnp.ones((2, 5))
    tx = getattr(nnlearn, name)(0.1, precondition_every=4, stagger=True)

    def steps(params):
        def step(state, key):
            noise = [
                jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape) for leaf in jax.tree.leaves(params)
            ]
            updates, new = tx.update(jax.tree.unflatten(jax.tree.structure(params), noise), state, params)
            return new, (updates, new)

        return jax.jit(lambda: jax.lax.scan(step, tx.init(params), jax.random.split(jax.random.key(0), 9))[1])()

    updates, states = steps(params)
    kept = states[0].basis_right if name == "soap" else states[0].root_right
    changed = {name: np.any(np.diff(np.asarray(leaf), axis=0), axis=(1, 2)) for name, leaf in kept.items()}
    equal = np.array([changed[f"{index}"] for index in range(8)])
    assert np.all(equal.sum(0) == 2) and np.all(equal.sum(1) == 2), (
        equal
    )  # two of eight at each step, each every fourth
    assert changed["wide"].sum() == 2
    plain = getattr(nnlearn, name)(0.1, precondition_every=4)
    one = {"0": params["0"]}  # a leaf alone has phase 0: as if it were not staggered
    alone = getattr(nnlearn, name)(0.1, precondition_every=4, stagger=True)
    for first, second in zip(
        *(jax.tree.leaves(run(each, one, make_noise_like(one))) for each in (plain, alone)), strict=True
    ):
        np.testing.assert_allclose(first, second, rtol=1e-6)
    packed = nnlearn.pack(params)
    state, plain_state = tx.init(packed), tx.init(params)
    for _ in range(3):
        change, state = tx.update(packed, state, packed)
        expected, plain_state = tx.update(params, plain_state, params)
    for first, second in zip(jax.tree.leaves(nnlearn.unpack(change)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-5)


def make_noise_like(tree):
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=(6, *leaf.shape)), jnp.float32), tree)


@pytest.mark.parametrize("decades", [0, 4], ids=["alike", "decaying"])
def test_the_gram_form_of_wide_matrices_is_the_plain_one(decades):
    from nnlearn.native.polynomial import WIDE, polynomials, polynomials_by_xla
    from nnlearn.transforms.orthogonal import PRESETS

    random = np.random.default_rng(0)
    left, _, right = np.linalg.svd(random.normal(size=(24, 24 * WIDE + 7)), full_matrices=False)
    exact = (left * np.logspace(0, -decades, 24)) @ right
    exact /= np.linalg.norm(exact)
    x = jnp.asarray(exact, jnp.float32)
    rows = np.asarray(PRESETS["polar_express"])
    for a, b, c in rows:
        gram = exact @ exact.T
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    for found in (polynomials(x, jnp.asarray(rows, jnp.float32)), polynomials_by_xla(x, jnp.asarray(rows, jnp.float32)),
                  polynomials(x.T, jnp.asarray(rows, jnp.float32)).T):  # fmt: skip
        assert relative_error(found, exact) < 1e-4


def test_the_latest_parameters_are_averaged_packed_and_in_batches():
    params = {"a": jnp.arange(3.0), "b": jnp.array(1.0)}

    def train(params, rate):
        tx = nnlearn.chain(nnlearn.sgd(rate), nnlearn.average_latest(3, every=2, start=2))
        state, seen = tx.init(params), []
        for _ in range(9):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            params = nnlearn.apply_updates(params, updates)
            seen.append(nnlearn.unpack(params)["a"])
        return state, jnp.stack(seen)

    for given in (params, nnlearn.pack(params)):
        state, seen = jax.vmap(train, in_axes=(None, 0))(given, jnp.array([0.1, 0.2]))
        got = nnlearn.averaged_params(state)
        np.testing.assert_allclose(got["a"], np.mean(np.asarray(seen)[:, [3, 5, 7]], axis=1), rtol=1e-6)
        assert got["b"].shape == (2,)
    tx = nnlearn.average_latest(4)
    np.testing.assert_array_equal(nnlearn.averaged_params(tx.init(params))["a"], params["a"])
    with pytest.raises(ValueError, match="length"):
        nnlearn.average_latest(0)


@pytest.mark.slow
def test_blocks_are_leaves_of_their_own_packed_or_not():
    random = np.random.default_rng(0)
    params = {"w": jnp.asarray(random.normal(size=(5, 6)), jnp.float32), "b": jnp.ones(6), "s": jnp.ones((2, 3, 3))}
    elementwise = nnlearn.in_blocks(nnlearn.adamw(0.1), 3)
    assert relative_error(run(elementwise, params, make_noise_like(params))[0]["w"],
                          run(nnlearn.adamw(0.1), params, make_noise_like(params))[0]["w"]) < 1e-6  # fmt: skip
    tx, alone = nnlearn.in_blocks(nnlearn.soap(0.1), 3), nnlearn.soap(0.1)
    packed = nnlearn.pack(params)
    change, _ = tx.update(params, tx.init(params), params)
    as_packed, _ = tx.update(packed, tx.init(packed), packed)
    block = params["w"][2:, 3:]  # rows 0 to 2 and 2 to 5
    expected, _ = alone.update(block, alone.init(block), block)
    np.testing.assert_allclose(change["w"][2:, 3:], expected, rtol=1e-5)
    for name, leaf in nnlearn.unpack(as_packed).items():
        np.testing.assert_allclose(leaf, change[name], rtol=1e-5)


@pytest.mark.slow
def test_galore_projects_the_leaves_that_its_dimension_numbers_name():
    random = np.random.default_rng(0)
    params = {"heads": (5, 2, 2), "plain": (5, 4), "same": (5, 4), "b": (4,)}
    params = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in params.items()}
    numbers = nnlearn.GaLoreDimensionNumbers
    spec = {"heads": numbers(0, (1, 2)), "plain": numbers(1, 0), "same": None, "b": None}
    for given in (spec, lambda tree: {name: spec[name] for name in tree}):
        ours = nnlearn.galore(0.1, 2, 2, weight_dimension_numbers=given)
        theirs = optax.contrib.galore(0.1, 2, 2, weight_dimension_numbers=given)
        noise = make_noise_like(params)
        (found, state), (expected, reference) = (run(tx, params, noise) for tx in (ours, theirs))
        assert jax.tree.map(jnp.shape, state[0]) == jax.tree.map(jnp.shape, reference[0])
        packed = nnlearn.pack(params)
        first, _ = ours.update(packed, ours.init(packed), packed)
        again, _ = ours.update(params, ours.init(params), params)
        for name in params:
            assert relative_error(found[name], expected[name]) < 1e-4
            np.testing.assert_allclose(nnlearn.unpack(first)[name], again[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="must name all axes"):
        nnlearn.galore(0.1, weight_dimension_numbers=numbers(0, 1)).init(params)


def test_ema_nesterov_is_evaluated_behind_the_point_of_its_gradients():
    params = make_params()
    tx = nnlearn.ema_nesterov(nnlearn.sgd(0.1), optax.linear_schedule(0.0, 0.0, 5), 0.9)
    y, state = run(tx, params, make_noise(5))
    np.testing.assert_array_equal(nnlearn.ema_nesterov_eval_params((state,), y)["w"], y["w"])  # it does not look ahead
    plain, _ = run(nnlearn.sgd(0.1), params, make_noise(5))
    np.testing.assert_allclose(y["w"], plain["w"], rtol=1e-6)
    with pytest.raises(ValueError, match="holds 0"):
        nnlearn.ema_nesterov_eval_params(nnlearn.sgd(0.1).init(params), params)
