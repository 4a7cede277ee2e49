"""The contract of every optimizer: what users of optax can rely on, and what optax does not offer."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    BY_NAME,
    CASES,
    EVERYDAY,
    IN_A_LIBRARY,
    STEPS,
    Case,
    make_noise,
    make_params,
    named_states,
    relative_error,
    run,
    update_by_numpy,
)

import nnlearn

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_in_a_library = pytest.mark.parametrize("case", IN_A_LIBRARY, ids=lambda case: case.name)


def settings(case):
    return [case.varied, *(case.varied | flags for flags in case.flags)]


def test_the_table_has_every_optimizer_and_every_hyperparameter():
    import nnlearn.optimizers

    public = {name for name, value in vars(nnlearn.optimizers).items() if inspect.isfunction(value)}
    others = {"noisy_sgd", "matrix_rules", "ema_nesterov_eval_params", "hutchinson_estimator_diag_hessian"}
    assert {name for name in public if not name.startswith("scale_by_")} - others == set(BY_NAME)
    assert public <= set(nnlearn.optimizers.__all__) and all(hasattr(nnlearn, name) for name in public)
    for case in CASES:
        parameters = inspect.signature(case.ours).parameters
        numeric = {n for n, p in parameters.items() if type(p.default) in (int, float)} | {"learning_rate"}
        assert numeric <= set(case.varied) | set(case.fixed), case.name
        for name, value in case.varied.items():
            assert value != parameters[name].default


def test_a_method_without_a_judge_is_refused():
    for library in (None, optax):
        with pytest.raises(ValueError, match="no_such_method has no judge"):
            Case("no_such_method", {"learning_rate": 0.1}, library=library)
    assert Case("no_such_method", {"learning_rate": 0.1}, library=None, numpy=lambda *_, **__: None)


@each_in_a_library
def test_the_signature_starts_like_that_of_optax(case):
    function, reference = getattr(nnlearn, case.name), getattr(case.library, case.name)
    ours = list(inspect.signature(function).parameters.values())
    theirs = [p for p in inspect.signature(reference).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    for our, their in zip(ours, theirs, strict=False):
        both_are_made = all(isinstance(each.default, optax.GradientTransformation) for each in (our, their))
        assert our.name == their.name and (both_are_made or our.default == their.default)
    keyword_only = {p.name for p in inspect.signature(reference).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keyword_only <= {p.name for p in ours}
    rate = inspect.signature(case.ours).parameters["learning_rate"].annotation
    assert case.rate == "start" or rate in (optax.ScalarOrSchedule, optax.ScalarOrSchedule | None)
    assert list(inspect.signature(case.ours(0.1).update).parameters)[2] == "params"


def bowl(x):
    return 0.5 * (x[0] ** 2 + 10.0 * x[1] ** 2)


def rosenbrock(x):
    return (1.0 - x[0]) ** 2 + 100.0 * (x[1] - x[0] ** 2) ** 2


@each
@pytest.mark.parametrize(
    ("problem", "start", "below"), [(bowl, (1.5, -1.0), 1e-4), (rosenbrock, (-1.2, 1.0), 1e-2)], ids=["bowl", "banana"]
)
def test_converges(case, problem, start, below):
    rate, steps = case.bowl if problem is bowl else case.rosenbrock
    momentum = {"momentum": 0.9} if case.name == "sgd" else {}
    tx = case.ours(rate if case.rate == "start" else optax.cosine_decay_schedule(rate, steps), **momentum)

    @jax.jit
    def descend(x):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(problem)(x), state, x, value=problem(x))
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), None, length=steps)[0][0]

    x = descend(jnp.array(start))
    assert problem(x) < below < problem(jnp.array(start)) / 100


@each
def test_jit_equals_no_jit(case):
    tx, params, noise = case.ours(**case.varied), make_params(), make_noise(3)
    eager, state = params, tx.init(params)
    compiled = jax.jit(functools.partial(run, tx))(params, noise)
    for index in range(3):
        gradient = jax.tree.map(lambda p, n, i=index: p - 0.5 + n[i], eager, noise)
        updates, state = tx.update(gradient, state, eager)
        eager = optax.apply_updates(eager, updates)
    for ours, theirs in zip(jax.tree.leaves((eager, state)), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2 * case.float32, atol=0.1 * case.float32)


@each
def test_one_trace_while_values_change(case):
    traces = []

    @jax.jit
    def step(numbers, params, state):
        traces.append(None)
        updates, state = case.ours(**numbers).update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = make_params()
    state = case.ours(**case.varied).init(params)
    for factor in (1.0, 0.9, 0.8):
        params, state = step({name: value * factor for name, value in case.varied.items()}, params, state)
    assert len(traces) == 1

    numbers = {name: value for name, value in case.varied.items() if name not in case.apart}
    tx = nnlearn.inject_hyperparams(case.ours)(**numbers)
    update = jax.jit(tx.update)
    state = tx.init(params)
    changes = []
    for rate in (0.3, 0.6):
        state = nnlearn.set_hyperparams(state, learning_rate=rate)
        updates, new_state = update(params, state, params)
        changes.append(jax.tree.leaves(updates)[0])
    _, new_state = update(params, new_state, params)
    assert update._cache_size() == 1
    if case.rate == "factor":
        np.testing.assert_allclose(2 * changes[0], changes[1], rtol=1e-6)


@each
def test_vmap_over_each_numeric_argument_equals_the_loop(case):
    names = list(case.varied)
    rows = [dict(case.varied)] + [case.varied | {name: case.varied[name] * 0.7} for name in names]
    table = {name: jnp.array([row[name] for row in rows]) for name in names}
    params, noise = make_params(), make_noise(8)

    def train(numbers):
        return run(case.ours(**numbers), params, noise)[0]

    together = jax.jit(jax.vmap(train))(table)
    alone = jax.jit(train)
    for index in range(len(rows)):
        expected = alone(jax.tree.map(lambda column, i=index: column[i], table))
        got = jax.tree.map(lambda column, i=index: column[i], together)
        for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(left, right, rtol=2 * case.float32, atol=case.float32)
    for index, name in enumerate(names, start=1):
        moved = [np.max(np.abs(column[index] - column[0])) for column in jax.tree.leaves(together)]
        assert (max(moved) > (1e-6 if case.idle else 0)) == (name not in case.idle), f"{name} changes nothing"


@each
def test_gradient_through_20_steps_matches_finite_differences(case):
    with jax.enable_x64(True):
        params, noise = make_params(jnp.float64), make_noise(20, jnp.float64)
        numbers = {name: value for name, value in case.varied.items() if name not in case.rounded}

        @jax.jit
        def final_loss(rate):
            final, _ = run(case.ours(**(numbers | {"learning_rate": rate})), params, noise)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(final))

        rate, width = case.varied["learning_rate"], 1e-6
        slope = jax.jit(jax.grad(final_loss))(rate)
        if case.constant:
            assert np.isfinite(slope) and slope != 0
            return
        difference = (final_loss(rate + width) - final_loss(rate - width)) / (2 * width)
        np.testing.assert_allclose(slope, difference, rtol=1e-5)
        assert abs(slope) > 1e-3


@each
def test_meta_gradient_is_finite_at_zero_gradients(case):
    def final_loss(rate):
        tx = case.ours(rate)
        params = jnp.array([1.0, 0.0])
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jnp.array([2.0, 0.0]) * params, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params**2)

    assert np.isfinite(jax.grad(final_loss)(0.1))


def structure(tree):
    return jax.tree.map(jax.typeof, tree)


LOW = [jnp.float32, jnp.bfloat16, jnp.float16]


@each
@pytest.mark.parametrize("param_dtype", LOW, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("grad_dtype", LOW, ids=lambda dtype: dtype.__name__)
def test_dtypes_and_structure_are_stable_under_scan(case, param_dtype, grad_dtype):
    tx = case.ours(**case.varied)
    params, noise = make_params(param_dtype), make_noise(2, grad_dtype)
    before = tx.init(params)

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        assert all(jnp.result_type(u) == jnp.result_type(param_dtype, grad_dtype) for u in jax.tree.leaves(updates))
        return (optax.apply_updates(params, updates), state), None

    after, _ = jax.eval_shape(lambda carry: jax.lax.scan(step, carry, noise), (params, before))
    assert jax.tree.structure(after) == jax.tree.structure((params, before))
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves((params, before)), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(structure(before)))
    moments = [leaf for leaf in jax.tree.leaves(before) if leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.inexact)]
    assert all(leaf.dtype == jnp.float32 for leaf in moments)


@each
@pytest.mark.parametrize("dtype", LOW[:2], ids=lambda dtype: dtype.__name__)
def test_nothing_relies_on_implicit_dtype_promotion(case, dtype):
    params, noise = make_params(dtype), make_noise(1, dtype)
    gradient = jax.tree.map(lambda leaf: leaf[0], noise)
    with jax.numpy_dtype_promotion("strict"):
        for tx in (case.ours(**case.varied), nnlearn.MultiSteps(case.ours(**case.varied), 2)):
            jax.eval_shape(lambda tx=tx: tx.update(gradient, tx.init(params), params))


def scenarios():
    """Ways in which optax and flax run an optimizer of another library."""
    chained = lambda case: optax.chain(optax.clip_by_global_norm(1e9), case.ours(**case.varied))  # noqa: E731
    every = lambda case: optax.MultiSteps(case.ours(**case.varied), 1).gradient_transformation()  # noqa: E731
    injected = lambda case: optax.inject_hyperparams(case.ours)(**case.varied)  # noqa: E731
    finite = lambda case: optax.apply_if_finite(case.ours(**case.varied), 3)  # noqa: E731
    parted = lambda case: optax.partition({"all": case.ours(**case.varied)}, "all")  # noqa: E731
    return {"chain": chained, "MultiSteps": every, "inject": injected, "apply_if_finite": finite, "partition": parted}


@each
@pytest.mark.parametrize("wrap", scenarios().values(), ids=scenarios().keys())
def test_works_inside_optax(case, wrap):
    params, noise = make_params(), make_noise(5)
    expected, _ = jax.jit(functools.partial(run, case.ours(**case.varied)))(params, noise)
    got, _ = jax.jit(functools.partial(run, wrap(case)))(params, noise)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)  # injected numbers are rounded to float32


@each
def test_works_in_flax(case):
    nnx = pytest.importorskip("flax.nnx")
    from flax.training.train_state import TrainState

    def loss(kernel):
        return jnp.sum((kernel - 0.5) ** 2)

    kernel = jnp.ones((3, 2))
    plain_tx = case.ours(**case.varied)
    plain, opt_state = kernel, plain_tx.init({"kernel": kernel})
    state = TrainState.create(apply_fn=None, params={"kernel": kernel}, tx=case.ours(**case.varied))
    model = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = kernel
    optimizer = nnx.Optimizer(model, case.ours(**case.varied), wrt=nnx.Param)
    for _ in range(3):
        updates, opt_state = plain_tx.update({"kernel": jax.grad(loss)(plain)}, opt_state, {"kernel": plain})
        plain = plain + updates["kernel"]
        state = state.apply_gradients(grads={"kernel": jax.grad(loss)(state.params["kernel"])})
        optimizer.update(model, nnx.grad(lambda model: loss(model.kernel[...]))(model))
    np.testing.assert_allclose(state.params["kernel"], plain, rtol=1e-6)
    np.testing.assert_allclose(model.kernel[...], plain, rtol=1e-6)


def exact_run(tx, params, noise):
    """Final parameters and states by name, of the same run in float64."""

    def widen(leaf):
        return jnp.asarray(np.asarray(leaf, complex if jnp.iscomplexobj(leaf) else float))

    with jax.enable_x64(True):
        final, state = jax.jit(functools.partial(run, tx))(*jax.tree.map(widen, (params, noise)))
        return {name: np.asarray(leaf) for name, leaf in {**final, **named_states(state)}.items()}


PRECISIONS = [
    pytest.param(jnp.float32, 1e-6, id="float32"),
    pytest.param(jnp.float64, 1e-12, id="float64"),
    pytest.param(jnp.complex64, 1e-6, id="complex64"),
]


def marked(case):
    return pytest.param(case, marks=pytest.mark.always if case.name in EVERYDAY else (), id=case.name)


@pytest.mark.parametrize("case", list(map(marked, IN_A_LIBRARY)))
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_200_steps_and_states_equal_those_of_optax(case, dtype, tolerance):
    if dtype is jnp.complex64 and not case.complex:
        pytest.skip("optax squares complex gradients without conjugating them, or drops their imaginary part")
    tolerance = case.float64 if dtype is jnp.float64 else max(tolerance, case.float32)
    with jax.enable_x64(dtype == jnp.float64):
        params, noise = make_params(dtype), make_noise(STEPS, dtype)
        both = settings(case) if dtype is not jnp.complex64 else settings(case)[:1]
        for numbers in both:
            ours = jax.jit(functools.partial(run, case.ours(**numbers)))(params, noise)
            theirs = jax.jit(functools.partial(run, case.theirs(**numbers)))(params, noise)
            pairs = zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0]), strict=True)
            assert all(left.dtype == right.dtype == dtype for left, right in pairs)
            ours, theirs = ({**final, **named_states(state)} for final, state in (ours, theirs))
            assert set(theirs) <= set(ours)
            apart = [name for name in theirs if relative_error(ours[name], theirs[name]) > tolerance]
            if apart:  # then ours must be near the exact trajectory, or nearer than optax
                exact = exact_run(case.theirs(**numbers), params, noise)
                for name in apart:
                    assert relative_error(ours[name], theirs[name]) <= 10 * tolerance, name
                    error = relative_error(theirs[name], exact[name])
                    assert relative_error(ours[name], exact[name]) <= max(error, tolerance), name


@each_in_a_library
def test_default_settings_equal_those_of_optax(case):
    params, noise = make_params(), make_noise(50)
    ours = jax.jit(functools.partial(run, case.ours(0.01)))(params, noise)[0]
    theirs = jax.jit(functools.partial(run, case.theirs(0.01)))(params, noise)[0]
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert relative_error(left, right) <= case.float32


@each_in_a_library
def test_bfloat16_follows_the_exact_trajectory_at_least_as_well_as_optax(case):
    """Compare runs with bfloat16 parameters and gradients with float64 from the same rounded start."""
    params, noise = make_params(jnp.bfloat16), make_noise(STEPS, jnp.bfloat16)
    ours = jax.jit(functools.partial(run, case.ours(**case.varied)))(params, noise)[0]
    mastered = jax.jit(functools.partial(run, case.ours(**case.varied, master_dtype=jnp.float32)))(params, noise)[0]
    theirs = jax.jit(functools.partial(run, case.theirs(**case.varied)))(params, noise)[0]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), (params, noise))
        exact = jax.jit(functools.partial(run, case.ours(**case.varied)))(*wide)[0]

    def error(tree):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(exact), strict=True)
        return max(float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b)))) for a, b in pairs)

    assert error(mastered) <= 0.03
    assert error(ours) <= max(1.25 * error(theirs), 0.1)  # a different sign moves a weight by two learning rates


@pytest.mark.parametrize("case", [case for case in CASES if case.torch], ids=lambda case: case.name)
def test_200_steps_equal_those_of_torch(case, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)  # NAdam keeps a product of decays in it
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())  # Muon multiplies matrices in it
    with jax.enable_x64(True):
        params, noise = make_params(jnp.float64), make_noise(STEPS, jnp.float64)
        ours, _ = jax.jit(functools.partial(run, case.ours(**case.torch_settings)))(params, noise)
        names = case.torch_leaves or tuple(params)
        tensors = {name: torch.tensor(np.array(params[name]), requires_grad=True) for name in names}
        optimizer = case.torch(torch, list(tensors.values()))
        for index in range(STEPS):
            for name, tensor in tensors.items():
                tensor.grad = tensor.detach() - 0.5 + torch.tensor(np.array(noise[name][index]))
            optimizer.step()
        for name, tensor in tensors.items():
            assert relative_error(ours[name], tensor.detach().numpy()) <= 1e-12


@pytest.mark.parametrize("case", [case for case in CASES if case.numpy], ids=lambda case: case.name)
def test_200_steps_equal_those_of_the_numpy_loop(case):
    with jax.enable_x64(True):
        params, noise = make_params(jnp.float64), make_noise(STEPS, jnp.float64)
        ours, _ = jax.jit(functools.partial(run, case.ours(**case.varied)))(params, noise)
        expected = update_by_numpy(case, params, noise, case.varied)
        for name, value in ours.items():
            assert relative_error(value, expected[name]) <= max(1e-10, case.float64)


@each
def test_equal_settings_compare_and_hash_equal(case):
    assert case.ours(**case.varied) == case.ours(**case.varied)
    assert hash(case.ours(**case.varied)) == hash(case.ours(**case.varied))
    for name, value in case.varied.items():
        assert case.ours(**case.varied) != case.ours(**(case.varied | {name: value * 0.5}))
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, params):
        traces.append(None)
        return tx.update(params, tx.init(params), params)[0]

    for _ in range(2):
        step(case.ours(**case.varied), make_params())
    assert len(traces) == 1


@each
def test_init_accepts_shapes_and_unusual_trees(case):
    tx = case.ours(**case.varied)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), make_params())
    assert structure(tx.init(shapes)) == structure(tx.init(make_params()))
    for params in ({}, {"a": jnp.zeros((0, 3))}, {"a": None, "b": jnp.array(1.0)}, (jnp.ones(2), [jnp.ones(())])):
        updates, _ = tx.update(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


@each
def test_errors_name_wrong_gradients(case):
    if case.name in ("sign_sgd", "polyak_sgd"):
        pytest.skip("has no state and does not use parameters")
    params = make_params()
    tx = case.ours(**case.varied)
    with pytest.raises(ValueError, match="b"):
        tx.update({"w": params["w"], "s": params["s"]}, tx.init(params), params)
    with pytest.raises(ValueError, match=r"'w'"):
        tx.update(params | {"w": jnp.ones((2, 2))}, tx.init(params), params)


@each
def test_errors_name_bad_hyperparameters(case):
    for name in case.varied:
        for bad in (float("nan"), *([] if name in case.signed else [-0.5])):
            with pytest.raises(ValueError, match=name if name != "momentum" else "decay|momentum"):
                case.ours(**(case.varied | {name: bad}))
    with pytest.raises(TypeError, match="learning_rate"):
        case.ours("fast")
