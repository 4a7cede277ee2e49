"""The library in JAX's debugging modes: debug_nans, strict promotion, x64, leak checks."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import CASES

import nnlearn
from nnlearn import losses
from nnlearn.data import MaskedBatch

RNG = np.random.default_rng(0)
X, Y, Z = (RNG.normal(size=(4, 3)).astype(np.float32) for _ in range(3))
P, Q = (np.asarray(jax.nn.softmax(array)) for array in (Y, Z))
LABELS, ROWS = np.array([0, 2, 1, 0]), np.array([True, False, True, False])
BINARY, SIGNS, PAIRS = (X > 0).astype(np.float32), np.sign(Y), np.array([0, 0, 0, 1])
ONE_HOT, ELEMENTS = np.eye(3, dtype=np.float32)[LABELS], np.broadcast_to(ROWS[:, None], (4, 3))
CLASS_WEIGHTS = {"class_weights": np.ones(3, np.float32), "label_smoothing": 0.1, "z_loss": 1e-3}

# loss: arrays, options
LOSSES = {
    **{name: ((X, Y), {}) for name in ("squared_error", "l2_loss", "huber_loss", "log_cosh", "absolute_error")},
    **{name: ((X, Y), {"where": ROWS}) for name in ("mean_squared_error", "mean_absolute_error", "cosine_distance",
                                                    "cosine_similarity", "info_nce_loss", "sigmoid_pair_loss",
                                                    "gaussian_kl_divergence")},
    **{name: ((np.log(P), Q), {"where": ROWS}) for name in ("convex_kl_divergence", "generalized_kl_divergence",
                                                            "kl_divergence", "kl_divergence_with_log_targets")},
    **{name: ((X, SIGNS), {}) for name in ("hinge_loss", "perceptron_loss")},
    **{name: ((X, LABELS), {}) for name in ("multiclass_hinge_loss", "multiclass_perceptron_loss")},
    **{name: ((X, LABELS), {"where": ROWS}) for name in ("accuracy", "multiclass_sparsemax_loss")},
    **{name: ((X, PAIRS), {"where": ROWS}) for name in ("ntxent", "supervised_contrastive_loss",
                                                        "batch_hard_triplet_loss")},
    **{name: ((X, ONE_HOT), {"where": ROWS}) for name in ("dice_loss", "iou_loss", "multiclass_generalized_dice_loss",
                                                          "tversky_loss", "softmax_cross_entropy",
                                                          "poly_loss_cross_entropy")},
    **{name: ((X, BINARY), {"where": ELEMENTS}) for name in ("list_mle_loss", "pairwise_logistic_loss",
                                                             "ranking_softmax_loss", "binary_dice_loss")},
    **{name: ((X, BINARY), {}) for name in ("sigmoid_binary_cross_entropy", "sigmoid_focal_loss",
                                            "safe_softmax_cross_entropy")},
    "cross_entropy": ((X, LABELS), {"where": ROWS, **CLASS_WEIGHTS}),
    "softmax_cross_entropy_with_integer_labels": ((X, LABELS), {"where": ROWS, **CLASS_WEIGHTS}),
    "linear_cross_entropy": ((X, Y[:3], LABELS), {"where": ROWS, "softcap": 5.0, **CLASS_WEIGHTS}),
    "gaussian_negative_log_likelihood": ((X, Y, P), {"where": ELEMENTS, "full": True}),
    "negative_evidence_lower_bound": ((X[:, 0], Y[:, 0]), {"where": ROWS}),
    "poisson_negative_log_likelihood": ((X, ONE_HOT), {"where": ELEMENTS, "full": True}),
    "quantile_loss": ((X, Y), {"where": ELEMENTS, "quantile": 0.7}),
    "margin_ranking_loss": ((X[:, 0], Y[:, 0], SIGNS[:, 0]), {"where": ROWS, "margin": 0.5}),
    "triplet_margin_loss": ((X, Y, Z), {"where": ROWS, "norm_degree": 3.0}),
    "smooth_labels": ((P,), {"where": ROWS, "alpha": 0.1}),
    "sparsemax": ((X,), {"where": ROWS}),
    "sparsemax_loss": ((X[:, 0], BINARY[:, 0]), {"where": ROWS}),
    "ctc_loss": ((X[:, :, None] * Y[:, None], X > 9, PAIRS[:, None] + 1, PAIRS[:, None] > 5), {"where": ROWS}),
    "edit_distance": ((LABELS[:, None], LABELS[:, None] > 5, PAIRS[:, None], PAIRS[:, None] > 5), {}),
    "ctc_greedy_decode": ((X[:, :, None] * Y[:, None], X > 9), {}),
    "ctc_beam_search_decode": ((X[:, :, None] * Y[:, None], X > 9), {"beam_width": 2}),
}  # fmt: skip
WITHOUT_ARRAYS = {"character_error_rate", "word_error_rate", "make_fenchel_young_loss"}

SCHEDULES = {
    "constant_schedule": {"value": 0.1},
    "exponential_decay": {"init_value": 0.1, "transition_steps": 10, "decay_rate": 0.9, "transition_begin": 2},
    "linear_schedule": {"init_value": 0.1, "end_value": 0.0, "transition_steps": 10},
    "polynomial_schedule": {"init_value": 0.1, "end_value": 0.0, "power": 2.0, "transition_steps": 10},
    "cosine_annealing_schedule": {"init_value": 0.1, "decay_steps": 10},
    "cosine_decay_schedule": {"init_value": 0.1, "decay_steps": 10, "exponent": 2.0},
    "join_schedules": {"schedules": [nnlearn.constant_schedule(0.1), lambda count: 0.2], "boundaries": [3]},
    "cosine_onecycle_schedule": {"transition_steps": 10, "peak_value": 0.1},
    "linear_onecycle_schedule": {"transition_steps": 10, "peak_value": 0.1},
    "piecewise_constant_schedule": {"init_value": 0.1, "boundaries_and_scales": {3: 0.5}},
    "piecewise_interpolate_schedule": {
        "interpolate_type": "cosine", "init_value": 0.1, "boundaries_and_scales": {3: 0.5},
    },
    "cosine_annealing_warm_restarts_schedule": {"init_value": 0.1, "first_cycle_steps": 4, "cycle_factor": 2.0},
    "sgdr_schedule": {"cosine_kwargs": [{
        "init_value": 0.0, "peak_value": 0.1, "warmup_steps": 2, "decay_steps": 5, "end_value": 0.0,
    }]},
    "inverse_square_root_schedule": {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 3},
    "warmup_constant_schedule": {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 3},
    "warmup_cosine_decay_schedule": {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 3, "decay_steps": 9},
    "warmup_exponential_decay_schedule": {
        "init_value": 0.0, "peak_value": 0.1, "warmup_steps": 3, "transition_steps": 5, "decay_rate": 0.9,
    },
    "warmup_stable_decay_schedule": {
        "init_value": 0.0, "peak_value": 0.1, "warmup_steps": 3, "stable_steps": 4, "decay_steps": 5,
    },
}  # fmt: skip


@contextlib.contextmanager
def strict_x64():
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        yield


def dtypes(tree):
    return jax.tree.map(lambda leaf: jnp.result_type(leaf).name, tree)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_losses_keep_float32_under_strict_promotion_and_x64(low):
    assert set(LOSSES) | WITHOUT_ARRAYS == {
        name for name, value in vars(losses).items() if callable(value) and not isinstance(value, type)
    }
    for name, (arrays, options) in LOSSES.items():
        floats = [place for place, array in enumerate(arrays) if array.dtype == np.float32]
        if low and not floats:
            continue
        kinds = {"f": jnp.bfloat16, "i": jnp.uint8} if low else {}  # labels of another dtype, too
        arrays = [jnp.asarray(array, kinds.get(array.dtype.kind)) for array in arrays]
        loss = functools.partial(getattr(losses, name), **options)

        def both(*arrays, loss=loss, floats=floats):
            value = loss(*arrays)
            if not isinstance(value, jax.Array) or not jnp.issubdtype(value.dtype, jnp.floating):
                return value, None
            return value, jax.grad(lambda *arrays: jnp.sum(loss(*arrays)), floats)(*arrays) if floats else None

        with strict_x64():
            value, grads = jax.eval_shape(both, *arrays)
        assert all(leaf.dtype.itemsize == 4 for leaf in jax.tree.leaves(value)), name
        assert grads is None or [leaf.dtype for leaf in grads] == [arrays[place].dtype for place in floats], name


def test_schedules_run_under_strict_promotion():
    public = {name for name in vars(nnlearn.schedules) if name.endswith(("schedule", "schedules", "decay"))}
    assert set(SCHEDULES) == public
    for name, settings in SCHEDULES.items():
        schedule = getattr(nnlearn.schedules, name)(**settings)
        counts = [jnp.int32(4), jnp.float32(2.5)] + ([np.uint8(3), 7] if "cosine" in name else [])
        with jax.numpy_dtype_promotion("strict"):
            for count in counts:
                assert jax.eval_shape(schedule, count).dtype == jnp.float32, name


@pytest.mark.slow
def test_optimizers_keep_dtypes_under_strict_promotion_and_x64():
    for case in CASES:
        for dtype in ("float32", "bfloat16"):
            with strict_x64():
                tx = case.ours(**case.varied)
                params = {"w": jnp.ones((3, 2), dtype), "b": jnp.zeros(2, dtype)}
                state = jax.eval_shape(tx.init, params)
                updates, after = jax.eval_shape(tx.update, params, state, params)
                stepped, _ = jax.eval_shape(
                    lambda params, state, tx=tx: nnlearn.apply_gradients(tx, params, params, state), params, state
                )
            assert dtypes(after) == dtypes(state) and dtypes(stepped) == dtypes(params), case.name
            assert "float64" not in jax.tree.leaves(dtypes((updates, after))), case.name


@pytest.mark.parametrize("mode", [functools.partial(jax.numpy_dtype_promotion, "strict"),
                                  functools.partial(jax.enable_x64, True)], ids=["strict", "x64"])  # fmt: skip
def test_elementwise_optimizers_are_packed(mode):
    with mode():
        params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(3, jnp.float32)}
        for make in (nnlearn.adamw, nnlearn.radam):
            assert nnlearn.packing_difference(make(0.1), params) == ""


def loss_fn(params, batch, key):
    where, batch = (batch.where, batch.examples) if isinstance(batch, MaskedBatch) else (None, batch)
    return nnlearn.mean_squared_error(jnp.broadcast_to(params["w"], batch.shape), batch, where=where)


def metrics_fn(params, batch):
    return {"error": jnp.mean(jnp.square(params["w"] - batch.examples), where=batch.where)}


PARAMS = {"w": jnp.float32(2.0), "v": jnp.float32(1.0)}
EXAMPLES = np.linspace(0, 1, 5, dtype=np.float32)


def make_run(tx, stop, **options):
    return nnlearn.make_train(
        loss_fn, tx, nnlearn.shuffled(EXAMPLES, 2), PARAMS, steps=12, check_every=2,
        evaluate=nnlearn.evaluation(metrics_fn, EXAMPLES, 2), stop=stop,
        record=("grad_norm", "update_norm", "leaf_grad_norms"), **options,
    )  # fmt: skip


def test_a_run_keeps_its_dtypes_in_every_mode():
    run = make_run(nnlearn.adam(0.1), [nnlearn.patience("error", 2), nnlearn.converged(1e-9), nnlearn.diverged()])
    plain = dtypes(jax.eval_shape(run, {}, jax.random.key(0)))
    for mode in (strict_x64(), jax.checking_leaks(), jax.default_matmul_precision("highest")):
        with mode:
            state, trace = jax.eval_shape(run, {}, jax.random.key(0))
        assert "float64" not in jax.tree.leaves(dtypes((state.params, trace)))
        assert jax.tree.structure(dtypes((state, trace))) == jax.tree.structure(plain)
    with strict_x64():
        metrics = nnlearn.evaluation(metrics_fn, EXAMPLES, 2)(PARAMS)
    np.testing.assert_allclose(metrics["error"], np.mean((2.0 - EXAMPLES.astype(float)) ** 2), rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_healthy_runs_compute_no_nan():
    run = jax.jit(make_run(nnlearn.sgd(0.5), nnlearn.reached("error", 0.6)))
    before = run({}, 0)[1]
    assert not before.made.all() and before.made.sum() == before.stop_step
    tx = optax.sgd(0.1)
    step = nnlearn.make_step(loss_fn, tx)
    stepped = nnlearn.jit_step(step)(nnlearn.init_state(PARAMS, tx), EXAMPLES)[1]
    with jax.debug_nans(True):
        trace = run({}, 0)[1]  # the program that was compiled before debug_nans was set
        np.testing.assert_array_equal(trace.loss, before.loss)
        assert len(trace.columns()["loss"]) == before.stop_step
        info = nnlearn.jit_step(step)(nnlearn.init_state(PARAMS, tx), EXAMPLES)[1]
        assert info.learning_rate is None and stepped.learning_rate is None
        result = nnlearn.fit(step, nnlearn.init_state(PARAMS, tx), [EXAMPLES[:2], EXAMPLES[2:4]], epochs=2,
                             stop=nnlearn.patience("train_loss", 3), progress=False)  # fmt: skip
        assert "learning_rate" not in result.trace.columns() and result.trace.loss.shape == (4,)
        sweep = nnlearn.sweep(
            make_run(lambda hparams: nnlearn.sgd(hparams["rate"]), nnlearn.reached("error", 0.6)),
            {"rate": nnlearn.sweeps.choice(0.1, 0.5)}, metric="error",
        )  # fmt: skip
        assert sweep.best().setting["rate"] in (0.1, 0.5)


@pytest.mark.slow
def test_masked_labels_and_rows_compute_no_nan_even_eagerly():
    logits, labels = jnp.asarray(X), jnp.array([0, -100, 2, 99])
    keep = jnp.asarray(ROWS)
    frames, bad = jnp.zeros((2, 3, 3), jnp.bfloat16).at[1].set(jnp.inf), jnp.array([[1], [-100]])
    paddings, no_padding = jnp.zeros((2, 3)), jnp.zeros((2, 1))
    cases = [
        (lambda x: nnlearn.cross_entropy(x, labels, where=keep), logits),
        (lambda x: nnlearn.linear_cross_entropy(x, jnp.asarray(Y[:3]), labels, where=keep), logits),
        (lambda x: jnp.sum(nnlearn.ctc_loss(x, paddings, bad, no_padding, where=jnp.array([True, False]))), frames),
    ]
    with jax.debug_nans(True):
        for loss, x in cases:
            assert np.isfinite(jax.grad(loss)(x).astype(jnp.float32)).all()
    assert np.isnan(nnlearn.cross_entropy(logits, labels))  # a NaN in a valid entry is still an error
