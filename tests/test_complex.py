"""Complex parameters: steps decrease the loss, as in NumPy; per-example gradients follow JAX's convention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnlearn

SIZE, RATE, STEPS = 8, 0.05, 3
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_data():
    random = np.random.default_rng(1)

    def normal(*shape):
        return (random.normal(size=shape) + 1j * random.normal(size=shape)).astype(np.complex64)

    return (normal(SIZE, 3), normal(SIZE)), {"w": normal(3), "gain": np.float32(0.5)}


def loss_fn(params, batch, key):
    x, y = batch
    return jnp.mean(jnp.square(jnp.abs(params["gain"] * (x @ params["w"]) - y)))


def gradients(params, batch):
    """The gradient of each example, d/d real + i d/d imaginary, which points uphill."""
    (x, y), w, gain = batch, params["w"], params["gain"]
    residuals = gain * (x @ w) - y
    return {
        "w": 2 * gain * residuals[:, None] * x.conj(),
        "gain": 2 * np.real(residuals.conj() * (x @ w)),
    }


def descended():
    """The parameters after a few steps of gradient descent."""
    batch, params = make_data()
    for _ in range(STEPS):
        grads = gradients(params, batch)
        params = {name: params[name] - RATE * grads[name].mean(0) for name in params}
    return params


def by_jax(loss_fn):
    return jax.value_and_grad(loss_fn)


def many_steps(step, state):
    batch, _ = make_data()
    return quick_jit(lambda state: jax.lax.fori_loop(0, STEPS, lambda _, state: step(state, batch)[0], state))(
        state
    ).params


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packed": True, "microbatches": 2},
        {"value_and_grad": by_jax},
        {"value_and_grad": lambda loss_fn: nnlearn.clipped_value_and_grad(loss_fn, 1e6), "packed": True},
    ],
    ids=["plain", "parts", "jax", "clipped"],
)
def test_a_step_decreases_the_loss(options):
    tx = nnlearn.sgd(RATE)
    state = nnlearn.init_state(make_data()[1], tx, packed=options.get("packed"))
    found, expected = many_steps(nnlearn.make_step(loss_fn, tx, **options), state), descended()
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5), found, expected))


def test_steps_runs_and_fit_agree_on_several_devices():
    batch, params = make_data()
    tx = nnlearn.sgd(RATE)
    state, expected = nnlearn.init_state(params, tx), descended()
    step = nnlearn.make_step(loss_fn, tx, axis_name="d")
    parts = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), batch)
    over_parts = quick_jit(jax.vmap(step, (None, 0), axis_name="d"))
    for _ in range(STEPS):
        state = jax.tree.map(lambda leaf: leaf[0], over_parts(state, parts)[0])
    train = nnlearn.make_train(loss_fn, tx, nnlearn.generated(lambda key, step: batch), params, steps=STEPS)
    fitted = nnlearn.fit(
        nnlearn.make_step(loss_fn, tx), nnlearn.init_state(params, tx), [batch] * STEPS, progress=False
    )
    for found in (state, quick_jit(train)({}, 0)[0], fitted.state):
        np.testing.assert_allclose(found.params["w"], expected["w"], rtol=1e-4)
        np.testing.assert_allclose(found.params["gain"], expected["gain"], rtol=1e-4)


def test_a_transformation_receives_the_slope_of_the_loss():
    batch, params = make_data()
    seen = {}

    def update(updates, state, params=None, *, value, grad, value_fn, **extra_args):
        seen.update(value=value, value_fn=value_fn, grad=grad, updates=updates)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    nnlearn.make_step(loss_fn, tx)(nnlearn.init_state(params, tx), batch)
    slope = sum(np.sum(np.real(np.conj(seen["grad"][name]) * seen["updates"][name])) for name in params)
    further = jax.tree.map(lambda leaf, change: leaf + 1e-3 * change, params, seen["updates"])
    np.testing.assert_allclose((seen["value_fn"](further) - seen["value"]) / 1e-3, slope, rtol=0.05)
    assert slope > 0


def test_lbfgs_finds_the_minimum():
    target = jnp.array([1 + 2j, -3j, 2j - 1], jnp.complex64)
    loss_fn = lambda w, batch, key: jnp.sum(jnp.array([1.0, 4.0, 0.5]) * jnp.abs(w - target) ** 2)  # noqa: E731
    tx = optax.lbfgs()
    state = nnlearn.init_state(jnp.full(3, 0.1 - 0.3j, jnp.complex64), tx)
    state, _ = quick_jit(lambda state: jax.lax.scan(nnlearn.make_step(loss_fn, tx), state, jnp.zeros(10)))(state)
    np.testing.assert_allclose(state.params, target, atol=1e-4)


def test_a_backtracking_search_takes_the_slope_along_the_imaginary_axis():
    """A step of length 1 leads from 0 to 4j, where |w - 2j|^2 is the same; the next shorter length is 0.8."""
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15))
    step = quick_jit(nnlearn.make_step(lambda w, batch, key: jnp.abs(w - 2j) ** 2, tx))
    state, _ = step(nnlearn.init_state(jnp.zeros((), jnp.complex64), tx), None)
    np.testing.assert_allclose(state.params, 3.2j, rtol=1e-5)


def test_a_hyper_gradient_equals_the_closed_form():
    """On |w - t|^2 the distance shrinks by 1 - 2 rate at each step."""
    target = jnp.complex64(1 + 2j)
    batches = nnlearn.generated(lambda key, step: step)
    loss_fn = lambda w, batch, key: jnp.abs(w - target) ** 2  # noqa: E731
    train = nnlearn.make_train(loss_fn, nnlearn.sgd, batches, jnp.zeros((), jnp.complex64), steps=3)
    for mode in ("forward", "reverse"):
        last = lambda rate: jnp.abs(train(rate, 0)[0].params - target) ** 2  # noqa: E731
        value, slope = quick_jit(nnlearn.hyper_value_and_grad(last, mode=mode))(0.1)
        np.testing.assert_allclose(value, 5 * 0.8**6, rtol=1e-5)
        np.testing.assert_allclose(slope, 5 * 6 * 0.8**5 * -2, rtol=1e-5)


def test_norms_and_noise_scale():
    batch, params = make_data()
    tx = nnlearn.sgd(RATE)
    step = quick_jit(nnlearn.make_step(loss_fn, tx, record=("grad_norm", "leaf_grad_norms", "noise_scale")))
    _, info = step(nnlearn.init_state(params, tx), batch)
    grads = gradients(params, batch)
    squares_b = np.sum(np.abs(grads["w"]) ** 2, 1) + grads["gain"] ** 2
    norms = [abs(grads["gain"].mean()), np.linalg.norm(grads["w"].mean(0))]
    np.testing.assert_allclose(info.leaf_grad_norms, norms, rtol=1e-4)
    np.testing.assert_allclose(info.grad_norm, np.linalg.norm(norms), rtol=1e-4)
    noise = (squares_b.mean() - np.sum(np.square(norms))) / (1 - 1 / SIZE)
    np.testing.assert_allclose(info.noise_scale.noise, noise, rtol=1e-4)


def test_per_example_gradients_and_transformations_follow_the_convention_of_jax():
    batch, params = make_data()
    expected = gradients(params, batch)

    def all_three(params):
        _, mean = nnlearn.clipped_value_and_grad(loss_fn, 1e6)(params, batch, None)
        grads_b, norms_b = (f(loss_fn, params, batch) for f in (nnlearn.per_example_grads, nnlearn.per_example_norms))
        return grads_b, norms_b, mean

    grads_b, norms_b, mean = quick_jit(all_three)(params)
    np.testing.assert_allclose(grads_b["w"], expected["w"].conj(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(mean["w"], expected["w"].mean(0).conj(), rtol=1e-3, atol=1e-5)
    squares_b = np.sum(np.abs(expected["w"]) ** 2, 1) + expected["gain"] ** 2
    np.testing.assert_allclose(norms_b, np.sqrt(squares_b), rtol=1e-3)
    tx = nnlearn.sgd(RATE)
    np.testing.assert_allclose(tx.update(mean, tx.init(params))[0]["w"], -RATE * mean["w"], rtol=1e-6)
