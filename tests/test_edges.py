"""Edge cases of models, tasks, runs and sweeps where a wrong number would go unnoticed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn import losses
from nnlearn.data import Examples, MaskedBatch
from nnlearn.datasets.speech import change_speed
from nnlearn.models.convolution import max_pool
from nnlearn.models.embedding import embedding
from nnlearn.models.generation import generate
from nnlearn.models.graph import Graphs, graph_network
from nnlearn.models.layers import dense
from nnlearn.models.normalization import group_norm
from nnlearn.models.recurrent import gru
from nnlearn.models.spectrogram import log_mel_spectrogram, spec_augment
from nnlearn.models.transformer import transformer
from nnlearn.sweeps import choice
from nnlearn.sweeps.members import goodness
from nnlearn.tasks import text
from nnlearn.tasks.objectives import classification, regression
from nnlearn.tasks.synthetic import masked_digits
from nnlearn.train.trace import Trace

KEY = jax.random.key(0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_max_pooling_is_differentiable_under_jit(dtype):
    def total(x):
        return jnp.sum(max_pool(2, dimensions=1).apply({}, x).astype(jnp.float32))

    x = jnp.arange(4.0, dtype=dtype).reshape(1, 4, 1)
    for gradient in (jax.jit(jax.grad(total)), jax.grad(jax.jit(total)), jax.jit(jax.vmap(jax.grad(total)))):
        np.testing.assert_array_equal(gradient(x).astype(np.float32).ravel(), [0, 1, 0, 1])


@pytest.mark.slow
def test_edges_may_have_any_integer_dtype():
    net, nodes = graph_network(2, 4, 1, readout="nodes"), jnp.cos(jnp.arange(512.0)).reshape(256, 2)
    params = jax.jit(net.init)(KEY)

    def out(dtype):
        return net.apply(params, Graphs(nodes, jnp.array([0, 1, 200], dtype), jnp.array([1, 2, 3], dtype)))

    for dtype in (jnp.uint8, jnp.int16, jnp.uint32):
        np.testing.assert_array_equal(out(dtype), out(jnp.int32))


def test_negative_indices_of_small_integer_types_give_nan():
    for count in (256, 300):
        table = embedding(count, 2)
        got = table.apply(table.init(KEY), jnp.array([-1, 3], jnp.int8))
        assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()


@pytest.mark.parametrize(("width", "fraction", "most"), [(100, 0.05, 1), (100, 0.1, 3), (100, 0.01, 0), (4, 1.0, 4)])
def test_masks_over_time_have_all_allowed_widths_with_equal_probability(width, fraction, most):
    options = {"time_masks": 1, "time_width": width, "time_fraction": fraction, "mel_masks": 0}
    masked = spec_augment(KEY, jnp.ones((4000, 30, 1)), **options)
    shares = np.bincount(np.asarray((masked[:, :, 0] == 0).sum(1))) / 4000
    np.testing.assert_allclose(shares, np.full(most + 1, 1 / (most + 1)), atol=0.04)


def test_a_fourier_transform_of_odd_length_is_refused():
    with pytest.raises(ValueError, match=r"fft_size must be even and >= window=200, got 255"):
        log_mel_spectrogram(jnp.zeros(400), fft_size=255)


def test_change_of_speed_equals_resampling_by_scipy():
    signal = pytest.importorskip("scipy.signal")
    random = np.random.default_rng(0)
    for samples in (79, 80, 81):
        clip = random.normal(size=samples)
        for speed in (0.5, 0.8, 1.0, 1.25, 2.0):
            want = signal.resample(clip, round(samples / speed))
            np.testing.assert_allclose(change_speed(clip, speed), want, atol=1e-5)
    assert change_speed(np.zeros(1), 5.0).shape == (1,)


def test_generation_checks_its_arguments_and_the_cache_size():
    model = transformer(10, layers=1, width=8, heads=2, max_length=16)
    params = jax.jit(model.init)(KEY)
    for options, name in (({"top_k": 0}, "top_k"), ({"top_p": 0.0}, "top_p"), ({"top_p": 2.0}, "top_p")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            generate(model, params, jnp.array([[1, 2, 3]]), 5, 0, **options)
    with pytest.raises(ValueError, match="position=4 and 1 tokens go beyond the cache of 4"):
        model.decode(params, jnp.array([[5]]), model.empty_cache(1, 4), 4)


def test_an_empty_batch_is_accepted():
    norm, cell = group_norm(4, 2), gru(3, 2)
    assert norm.apply(norm.init(KEY), jnp.zeros((0, 2, 2, 4))).shape == (0, 2, 2, 4)
    assert cell.apply(cell.init(KEY), jnp.zeros((0, 5, 3))).shape == (0, 5, 2)


def test_equinox_modules_with_an_optional_state():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.Sequential([eqx.nn.Linear(3, 4, key=KEY), eqx.nn.Lambda(jax.nn.relu)])
    model = nnlearn.models.adapters.from_equinox(net)
    x = jnp.ones((2, 3))
    np.testing.assert_allclose(model.apply(model.init(KEY), x), jax.vmap(net)(x), rtol=1e-6)


def test_baselines_are_in_bits_per_character_for_any_alphabet():
    random = np.random.default_rng(0)
    numbers = random.integers(0, 32, 4000)
    small = {"layers": 1, "width": 8, "heads": 2, "context": 8}
    cyrillic, latin = ("".join(chr(start + number) for number in numbers) for start in (0x430, 0x40))
    one, other = (text.shakespeare(text=written, **small).baselines for written in (cyrillic, latin))
    assert one["gzip"] == pytest.approx(other["gzip"], abs=0.1) and one["gzip"] > 5
    with pytest.raises(ValueError, match="at most 256 different characters, for the baselines; got 300"):
        text.shakespeare(text="".join(map(chr, range(1000, 1300))) * 20, **small)


def test_objectives_of_a_fully_masked_batch_are_zero():
    model, nothing = dense(2, 2), jnp.zeros(3, bool)
    params = model.init(KEY)
    for make, targets in ((classification, jnp.zeros(3, jnp.int32)), (regression, jnp.zeros((3, 2)))):
        loss_fn, metrics_fn = make(model)
        batch = MaskedBatch(Examples(jnp.full((3, 2), jnp.nan), targets), nothing)
        assert float(loss_fn(params, batch, None)) == 0
        assert all(float(value) == 0 for value in metrics_fn(params, batch).values())


@pytest.mark.slow
def test_the_pixels_hidden_for_metrics_do_not_depend_on_the_batch_size():
    task = masked_digits(hidden=8)
    params = jax.jit(task.model.init)(KEY)
    values = [task.evaluation("validation", size)(params)["loss"] for size in (64, len(task.validation))]
    np.testing.assert_allclose(values, values[0], rtol=1e-5)


# Runs and sweeps


def make_run(**options):
    return nnlearn.make_train(
        lambda params, batch, key: (params - 3.0) ** 2,
        lambda hparams: nnlearn.sgd(hparams["rate"]),
        nnlearn.generated(lambda key, step: step),
        options.pop("init", jnp.zeros(())),
        **{"steps": 8, "check_every": 2} | options,
    )


def test_a_trace_in_bfloat16_can_be_saved_and_loaded(tmp_path):
    train = make_run(init=jnp.zeros((), jnp.bfloat16))
    _, trace = train({"rate": 0.1}, 0)
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert again.loss.dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.loss, trace.loss)
    options = {"metric": "train_loss", "folder": tmp_path / "sweep"}
    results = [nnlearn.sweep(train, {"rate": choice(0.1, 0.2)}, **options) for _ in range(2)]
    np.testing.assert_array_equal(results[0].values("train_loss"), results[1].values("train_loss"))


@pytest.mark.parametrize("kind", [bool, int])
def test_the_best_value_of_boolean_and_integer_metrics(kind):
    def evaluate(params):
        return {"high": params > 1} if kind is bool else {"high": jnp.where(params > 1, 5, 7)}

    stop = nnlearn.reached("high", 1, mode="max") if kind is bool else ()
    results = nnlearn.sweep(
        make_run(evaluate=evaluate, stop=stop), {"rate": choice(0.4, 0.45)}, metric="high", mode="min"
    )
    assert results.columns()["best_high"].tolist() == ([1, 1] if kind is bool else [5, 5])


def test_rules_and_evaluation_in_float64():
    with jax.enable_x64(True):
        state, trace = jax.jit(make_run(stop=nnlearn.converged(1e9), init=np.zeros(())))({"rate": 0.1}, 0)
        assert int(trace.stop_step) == 4 and state.params.dtype == jnp.float64
        mean = nnlearn.evaluation(lambda params, batch: {"mean": jnp.mean(batch.examples)}, np.arange(5.0) + 1e8)
        assert float(mean(0.0)["mean"]) == 100_000_002


def test_a_non_finite_score_is_the_worst():
    for mode in ("min", "max"):
        assert np.argmax(goodness(np.array([-np.inf, 1.0, np.inf, np.nan]), mode, np)) == 1


@pytest.mark.slow
def test_a_copied_member_is_never_replaced():
    from nnlearn.sweeps import log_uniform, train_population

    train = make_run(steps=12, check_every=4)
    for members in (2, 3, 5):
        space = {"rate": log_uniform(1e-3, 0.3)}
        found = train_population(train, space, members, ready_every=4, metric="train_loss", replaced=0.5)
        for parents in np.asarray(found.parents)[1:]:
            assert sum(parents != np.arange(members)) <= members // 2


# Losses


def test_directions_of_very_long_and_short_vectors_in_float64():
    with jax.enable_x64(True):
        for vector in ([1e100, 1e50], [1e-200, 0.0], [1e300, 0.0]):
            got = losses.cosine_similarity(jnp.array(vector), jnp.array([1.0, 0.0]))
            assert float(got) == pytest.approx(1.0, abs=1e-12)
        distance = losses.triplet_margin_loss(jnp.zeros(2), jnp.array([1e200, 0.0]), jnp.zeros(2), eps=0.0)
        assert float(distance) == pytest.approx(1e200)


def test_a_probability_slightly_above_one_by_rounding():
    one = jnp.full((1, 3, 1), np.float32(1.0000001))
    for gamma in (1.0, 4 / 3):
        value = losses.tversky_loss(one, jnp.ones((1, 3, 1)), apply_softmax=False, gamma=gamma)
        assert 0 <= float(value[0]) < 1e-6


@pytest.mark.slow
def test_large_integers_are_ordered_exactly():
    late = jnp.array([1_700_000_001, 1_700_000_000])
    scores = jnp.array([0.0, 5.0])
    for labels, small in ((late, jnp.array([1, 0])), (late[::-1], jnp.array([0, 1]))):
        for loss in (losses.pairwise_logistic_loss, losses.list_mle_loss):
            assert float(loss(scores, labels)) == pytest.approx(float(loss(scores, small)))
            masked = loss(jnp.append(scores, 9.0), jnp.append(labels, 0), where=jnp.array([True, True, False]))
            assert float(masked) == pytest.approx(float(loss(scores, small)), rel=1e-6)
