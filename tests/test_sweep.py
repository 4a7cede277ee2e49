"""Sweeps, successive halving and populations: equality with single runs, files, limits, errors."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn import models
from nnlearn.sweeps import (
    Results,
    SweepInterrupted,
    batches,
    choice,
    divided,
    list_settings,
    log_uniform,
    successive_halving,
    sweep,
    train_population,
    uniform,
)
from nnlearn.sweeps.program import BatchShape, batch_shape, trace_member
from nnlearn.train.trace import Trace

EXAMPLES = jnp.asarray(np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32))
SPACE = {"rate": choice(0.01, 0.03, 0.1, 0.3, 0.5), "momentum": 0.5, "noise": choice(0.0, 0.2)}
ONE = {"devices": jax.devices()[:1]}


def number_of(key):
    """A value in [0, 1) that depends on the key; a random draw would take seconds to compile."""
    return jax.random.key_data(key)[-1].astype(jnp.float32) / 2.0**32


class Counted:
    """A small problem whose ``loss_fn`` counts how often Python calls it."""

    def __init__(self, steps=30, check_every=10, **options):
        self.calls = 0
        self.train = nnlearn.make_train(
            self.loss_fn,
            lambda hparams: nnlearn.sgd(hparams["rate"], hparams["momentum"]),
            nnlearn.generated(lambda key, step: jnp.roll(EXAMPLES, -8 * step, axis=0)[:8]),  # compiles fast
            lambda key: {"w": number_of(key) + jnp.arange(12.0).reshape(3, 4) / 12},
            steps=steps,
            check_every=check_every,
            evaluate=lambda params: {"loss": jnp.mean((EXAMPLES @ params["w"] - 1.0) ** 2)},
            **options,
        )

    def loss_fn(self, params, batch, key, hparams):
        self.calls += 1
        return jnp.mean((batch @ params["w"] - 1.0 + hparams["noise"] * number_of(key)) ** 2)


def assert_same(left, right):
    """Assert bitwise equality, NaN included."""
    left, right = left.columns(), right.columns()
    assert list(left) == list(right)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_axes_cover_their_range():
    space = {"a": uniform(-2, 2), "b": log_uniform(1e-6, 1.0), "c": choice(1, 2, 4), "d": "kept"}
    for method in ("random", "quasi"):
        settings = list_settings(space, 256, method, seed=1)
        assert settings == list_settings(space, 256, method, seed=1)
        assert settings != list_settings(space, 256, method, seed=2)
        a, b, c = (np.array([setting[name] for setting in settings]) for name in "abc")
        assert -2 <= a.min() < -1.9 and 1.9 < a.max() <= 2
        np.testing.assert_allclose(np.mean(b < 1e-3), 0.5, atol=0.08)
        assert set(c.tolist()) == {1, 2, 4} and isinstance(settings[0]["c"], int)
        assert {setting["d"] for setting in settings} == {"kept"}


def test_quasi_random_draws_are_more_even_than_random_draws():
    def unevenness(method):
        numbers = np.sort([setting["a"] for setting in list_settings({"a": uniform(0, 1)}, 64, method)])
        return np.max(np.abs(numbers - (np.arange(64) + 0.5) / 64))

    assert unevenness("quasi") < 1 / 64 < unevenness("random")


def test_a_grid_has_every_combination():
    settings = list_settings(SPACE)
    assert len(settings) == 10 and len({tuple(setting.values()) for setting in settings}) == 10
    assert settings[1] == {"rate": 0.01, "momentum": 0.5, "noise": 0.2}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: uniform(2.0, 1.0), "uniform needs low < high, got low=2.0, high=1.0"),
        (lambda: log_uniform(0.0, 1.0), "log_uniform needs 0 < low"),
        (lambda: uniform(0.0, float("inf")), "uniform: high must be in"),
        (lambda: choice(), "at least one number"),
        (lambda: choice(1, 1.0), "twice"),
        (lambda: choice(np.ones(2)), "twice"),
        (lambda: choice(np.ones((2, 2))), "a value of choice"),
        (lambda: list_settings({"rate": 0.1}), "no settings to try: of \\['rate'\\] none is"),
        (lambda: list_settings({"rate": uniform(0, 1)}), "'rate' is uniform\\(0.0, 1.0\\), which has no list"),
        (lambda: list_settings({"rate": uniform(0, 1)}, method="random"), "needs samples"),
        (lambda: list_settings({"rate": choice(1, 2)}, 3), "leave samples out"),
        (lambda: list_settings({"rate": choice(1, 2)}, method="sobol"), "method must be one of"),
        (
            lambda: sweep(Counted().train, SPACE, metric="accuracy"),
            "no metric 'accuracy' to compare; there are loss, train_loss",
        ),
        (lambda: sweep(Counted().train, SPACE, [1, 1], metric="loss"), "all different"),
        (lambda: sweep(Counted().train, SPACE, metric="loss", mode="least"), "mode must be"),
        (
            lambda: sweep(Counted().train, SPACE, metric="loss", memory_limit=9, workers=2, **ONE),
            "the limit is 4: give a larger",
        ),
        (lambda: sweep(Counted().train, SPACE, metric="loss", static={"width": 3}), "static: 'width' must be a list"),
    ],
)
@pytest.mark.slow
def test_errors_name_the_fault(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_train_of_another_type_is_rejected():
    with pytest.raises(TypeError, match=r"made by make_train"):
        sweep(lambda hparams, key: None, SPACE, metric="loss")


def test_one_trace_serves_all_runs_and_each_equals_its_single_run():
    problem = Counted()
    results = sweep(problem.train, SPACE, seeds=[3, 5, 7], metric="loss", width=4, full=True, **ONE)
    assert problem.calls == 1
    assert results.done.all() and results.execution.batches == 9 and results.execution.width == 4
    table = results.columns()
    assert len(table["seed"]) == 30
    for index, seed in ((0, 3), (7, 5), (9, 7)):
        setting = results.settings[index]
        state, trace = jax.jit(problem.train)(setting, seed)
        mine = results.run(index, results.seeds.index(seed))
        np.testing.assert_allclose(mine.loss, trace.loss, rtol=1e-5)
        np.testing.assert_allclose(mine.metrics["loss"], trace.metrics["loss"], rtol=1e-5)
        row = (table["rate"] == setting["rate"]) & (table["noise"] == setting["noise"]) & (table["seed"] == seed)
        np.testing.assert_allclose(table["loss"][row], trace.metrics["loss"][-1:], rtol=1e-5)


@pytest.fixture(scope="module")
def at_once():
    """All runs of a sweep in one batch on one device."""
    return sweep(Counted().train, SPACE, 3, metric="loss", width=100, workers=1, **ONE)


@pytest.mark.parametrize("options", [{}, {"width": 5}, {"width": 1, "workers": 3, **ONE}])
def test_results_do_not_depend_on_width_devices_and_workers(at_once, options):
    results = sweep(Counted().train, SPACE, 3, metric="loss", **options)
    assert results.execution.devices == len(options.get("devices", jax.devices()))
    table, expected = results.columns(), at_once.columns()
    for name, column in expected.items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(table[name], column, rtol=1e-5)
        else:
            np.testing.assert_array_equal(table[name], column)


def test_runs_are_equal_to_the_bit_on_any_number_of_devices():
    model = models.mlp((3, 4, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0))

    def init(key):
        return jax.tree.map(lambda leaf: jnp.sin(jnp.arange(1.0, leaf.size + 1)).reshape(leaf.shape), shapes)

    def loss_fn(params, batch, key):
        return jnp.mean((model.apply(params, batch) - batch) ** 2)

    batches = nnlearn.generated(lambda key, step: EXAMPLES)
    train = nnlearn.make_train(loss_fn, lambda hparams: nnlearn.adam(hparams["rate"]), batches, init, steps=5)
    space = {"rate": choice(*np.geomspace(1e-3, 1e-1, 8))}
    one, four = (
        sweep(train, space, metric="train_loss", width=2 * count, devices=jax.devices()[:count], full=True)
        for count in (1, 4)
    )
    assert one.execution.width == 2 and four.execution.width == 8
    jax.tree.map(np.testing.assert_array_equal, one.traces, four.traces)


@pytest.mark.parametrize("copies", [True, False])
def test_each_device_executes_its_part_of_a_batch(copies, monkeypatch):
    if not copies:  # as on a backend that cannot copy programs
        monkeypatch.setattr(divided, "_copy", None)
    shapes = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    batch = divided.DividedBatch(jax.jit(lambda x, key: x[:, None] + key[None]), shapes, 0, jax.devices()[1:3])
    assert batch(np.arange(4, dtype=np.float32), np.ones(1, np.int32)).tolist() == [[1], [2], [3], [4]]


@pytest.mark.parametrize("devices", [1, 4])
def test_batches_respect_the_width_and_share_devices_equally(devices):
    for settings, seeds, width in itertools.product((1, 2, 3, 10, 41), (1, 3, 5, 17), (1, 4, 7, 20, 100)):
        counts = BatchShape(seeds, settings)
        shape = batch_shape(width, counts, devices)
        assert min(shape) >= 1 and shape.seeds * shape.settings <= max(width, devices)
        assert shape.settings % devices == 0 or shape.seeds % devices == 0


def test_many_seeds_of_few_settings_use_all_devices(at_once):
    results = sweep(Counted().train, SPACE | {"rate": 0.1}, 9, metric="loss")
    assert results.execution.width == 24 and results.done.all()
    assert [setting["rate"] for setting in at_once.settings[4:6]] == [0.1, 0.1]
    np.testing.assert_allclose(results.values("loss")[0, :, :3], at_once.values("loss")[0, 4:6], rtol=1e-5)


def test_a_diverging_run_does_not_affect_the_others():
    space = {"rate": choice(0.01, 0.03, 0.1, 0.3), "momentum": 0.5, "noise": 0.0}
    bad = space | {"rate": choice(0.01, 0.03, 1e30, 0.3)}
    calm = sweep(Counted().train, space, 2, metric="loss", full=True, **ONE)
    wild = sweep(Counted().train, bad, 2, metric="loss", full=True, **ONE)
    lost = wild.values("loss")[0, 2]
    assert not np.isfinite(lost).any()
    for index in (0, 1, 3):
        for seed in (0, 1):
            jax.tree.map(np.testing.assert_array_equal, calm.run(index, seed), wild.run(index, seed))
    assert wild.best().failed == 0 and wild.ranking()[-1].failed == 2
    assert wild.best().setting == {"rate": 0.3, "momentum": 0.5, "noise": 0.0}


def test_the_best_setting_has_a_mean_and_an_error_over_seeds(at_once):
    best, values = at_once.best(), at_once.values("loss")[0]
    at = int(np.argmin(values.mean(axis=1)))
    assert best.setting == at_once.settings[at] and best.seeds == 3
    np.testing.assert_allclose(best.mean, values[at].mean())
    np.testing.assert_allclose(best.standard_error, values[at].std(ddof=1) / 3**0.5)


def test_settings_of_a_seed_share_training_batches():
    member = trace_member(Counted().train, list_settings(SPACE)[0], ["rate", "noise"], full=False).member
    values = {"rate": jnp.zeros(7), "noise": jnp.zeros(7)}
    program = str(jax.make_jaxpr(jax.vmap(member, in_axes=(0, None)))(values, jax.random.key(0)))
    assert "f32[7,3,4]" in program and "f32[8,3]" in program  # one set of parameters per run, one batch for all
    assert "f32[7,8,3]" not in program and "f32[10,7,8,3]" not in program


def test_stopped_runs_are_scored_at_their_end():
    problem = Counted(stop=[nnlearn.patience("loss", 1), nnlearn.diverged(1e3)], steps=60)
    space = {"rate": choice(0.1, 0.9, 50.0), "momentum": 0.9, "noise": 0.0}
    results = sweep(problem.train, space, 2, metric="loss", **ONE)
    assert problem.calls == 1
    table = results.columns()
    assert set(table["stopped_by"][table["rate"] == 50.0]) == {"diverged(train_loss)"} or np.all(
        table["stop_step"][table["rate"] == 50.0] < 60
    )
    alone = jax.jit(lambda rate: problem.train(results.settings[0] | {"rate": rate}, 1)[0].params["w"])
    for index, rate in enumerate((0.1, 0.9)):
        expected = jnp.mean((EXAMPLES @ alone(rate) - 1.0) ** 2)  # of the best parameters, not the last
        np.testing.assert_allclose(results.values("loss")[0, index, 1], expected, rtol=1e-4)


@pytest.mark.slow
def test_each_static_choice_is_a_separate_program(tmp_path):
    made = []

    def train_of(choice):
        made.append(Counted(steps=sum(choice["steps"])))
        return made[-1].train

    static = {"steps": [(10,), (10, 20)], "kind": ["plain"]}
    results = sweep(train_of, SPACE, 2, metric="loss", static=static, devices=jax.devices()[2:3])
    assert [problem.calls for problem in made] == [1, 1]
    table = results.columns()
    assert len(table["loss"]) == 40 and results.best().static == {"steps": (10, 20), "kind": "plain"}
    np.testing.assert_array_equal(table["stop_step"], np.where(table["steps"] == "[10]", 10, 30))
    results.save(tmp_path)
    assert_same(Results.load(tmp_path), results)
    pytest.importorskip("matplotlib")
    figure = results.plot()
    assert len(figure.axes) == 4
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["[10]", "[10, 20]"]


def test_a_hyper_parameter_may_have_the_metric_s_name():
    results = sweep(bowl_train(2), {"loss": choice(0.1, 0.2), "rate": 0.1}, metric="loss", **ONE)
    table = results.columns()
    np.testing.assert_array_equal(table["loss"], [0.1, 0.2])
    np.testing.assert_allclose(table["check/loss"], 0.9**4 / 2, rtol=1e-5)
    pytest.importorskip("matplotlib")
    heights = results.plot().axes[0].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(heights, table["check/loss"])


@pytest.mark.slow
def test_a_width_that_takes_too_much_memory_is_reduced_once():
    problem = Counted(steps=200, check_every=1)
    wide = sweep(problem.train, SPACE, 4, metric="loss", width=40, workers=1, full=True, **ONE)
    limit = int(wide.execution.bytes * 0.6)
    narrow = sweep(problem.train, SPACE, 4, metric="loss", width=40, workers=1, full=True, memory_limit=limit, **ONE)
    assert problem.calls == 2  # one per sweep, independent of compilations
    assert 0.3 * limit < narrow.execution.bytes <= limit and narrow.execution.width < wide.execution.width
    np.testing.assert_allclose(narrow.values("loss"), wide.values("loss"), rtol=1e-5)


def test_an_interrupted_sweep_resumes(tmp_path):
    options = {"metric": "loss", "width": 5, "full": True, "workers": 1, **ONE}
    whole = sweep(Counted().train, SPACE, 3, **options)

    def interrupt(finished, total):
        assert total == 30
        if finished >= 10:
            raise KeyboardInterrupt

    with pytest.raises(SweepInterrupted) as caught:
        sweep(Counted().train, SPACE, 3, folder=tmp_path, progress=interrupt, **options)
    partial = caught.value.results
    finished = int(partial.done.sum())
    assert 10 <= finished < 30 and len(partial.columns()["loss"]) == finished
    assert partial.best().seeds >= 1
    assert_same(Results.load(tmp_path), partial)
    resumed = sweep(Counted().train, SPACE, 3, folder=tmp_path, **options)
    assert resumed.execution.batches == 6 - finished // 5
    assert_same(resumed, whole)
    again = Counted()
    again_results = sweep(again.train, SPACE, 3, folder=tmp_path, **options)
    assert_same(again_results, whole)
    assert again.calls == 1 and again_results.execution is None  # traced to identify it, not compiled


def test_a_folder_of_another_sweep_is_rejected(tmp_path):
    sweep(Counted().train, SPACE, 1, metric="loss", folder=tmp_path, **ONE)
    with pytest.raises(ValueError, match="holds another sweep, which differs in seeds"):
        sweep(Counted().train, SPACE, 2, metric="loss", folder=tmp_path, **ONE)
    header = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps(header | {"seeds": [1]}))
    with pytest.raises(ValueError, match="fingerprint"):
        Results.load(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="belong to no sweep"):
        sweep(Counted().train, SPACE, 1, metric="loss", folder=tmp_path / "other", **ONE)


def test_results_are_saved_tabulated_and_plotted(tmp_path):
    space = {"rate": log_uniform(1e-3, 1e3), "momentum": uniform(0.0, 0.9), "noise": 0.0}
    results = sweep(Counted().train, space, 2, metric="loss", samples=8, method="quasi", **ONE)
    results.save(tmp_path / "saved")
    loaded = Results.load(tmp_path / "saved")
    assert_same(loaded, results)
    assert loaded.best() == results.best() and loaded.logarithmic == ("rate",)
    frame = pytest.importorskip("pandas") and results.to_pandas()
    assert len(frame) == 16 and {"rate", "momentum", "seed", "loss", "best_loss", "stopped_by"} <= set(frame)
    pytest.importorskip("matplotlib")
    figure = results.plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "linear"]
    assert isinstance(results.run(0), Trace) and results.run(0).columns()["loss"].shape == (3,)


def bowl_train(steps=27, check_every=1, stop=()):
    """Gradient descent on w**2 / 2: the loss after t steps is (1 - rate) ** (2 t) / 2."""
    return nnlearn.make_train(
        lambda params, batch, key: params**2 / 2,
        lambda hparams: nnlearn.sgd(hparams["rate"]),
        nnlearn.generated(lambda key, step: step),
        jnp.ones(()),
        steps=steps,
        check_every=check_every,
        evaluate=lambda params: {"loss": params**2 / 2},
        stop=stop,
    )


@pytest.mark.parametrize("stop", [(), (nnlearn.diverged(1e6),)])
def test_halving_finds_the_same_winner_as_whole_runs(stop):
    train = bowl_train(check_every=3, stop=stop)
    rates = np.random.default_rng(0).permutation([0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.9, 3.0, *[0.03] * 18])
    settings = [{"rate": float(rate)} for rate in rates]
    halving = successive_halving(train, settings, metric="loss")
    finals = jax.jit(jax.vmap(lambda rate: train({"rate": rate}, 0)[1].metrics["loss"][-1]))(jnp.asarray(rates))
    assert halving.best == {"rate": 0.7} == settings[int(jnp.nanargmin(finals))]
    assert [tuple(rung) for rung in halving.rungs] == [(27, 3), (9, 9), (3, 27)]
    assert halving.steps == 27 * 3 + 9 * 6 + 3 * 18 < 27 * 27
    state, _ = train(halving.best, 0)
    np.testing.assert_allclose(halving.state.params, state.params, rtol=1e-5)
    table = halving.columns()
    assert len(table["rate"]) == 39 and table["kept"].sum() == 9 + 3 + 1
    assert not table["kept"][table["rate"] == 3.0].any()


def test_halving_ranks_nan_last_and_rejects_invalid_arguments():
    train = bowl_train()
    settings = [{"rate": rate} for rate in (float("nan"), 0.1, 0.2)]
    assert successive_halving(train, settings, metric="loss", rungs=[(3, 2), (1, 27)]).best == {"rate": 0.2}
    for arguments, message in (
        ({"metric": "accuracy"}, "no metric 'accuracy'"),
        ({"metric": "loss", "rungs": 9}, "allow 2"),
        ({"metric": "loss", "rungs": [(3, 9), (4, 27)]}, "fewer members"),
        ({"metric": "loss", "eta": 1}, "eta must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            successive_halving(train, settings, **arguments)
    with pytest.raises(ValueError, match="at least two settings"):
        successive_halving(train, settings[:1], metric="loss")


def test_halving_members_share_batches_and_equal_their_single_runs():
    problem = Counted(steps=40, check_every=10)
    settings = list_settings(SPACE)
    halving = successive_halving(problem.train, settings, 3, metric="loss", eta=2)
    for member, score in zip(halving.members[-1], halving.scores[-1], strict=True):
        _, trace = jax.jit(problem.train)(settings[member], 3)
        np.testing.assert_allclose(score, trace.metrics["loss"][-1], rtol=1e-5)


def toy_train():
    """The quadratic of the paper: each member minimises a surrogate that depends on its hyper-parameters."""

    def surrogate(params, batch, key, hparams):
        return hparams["h0"] * params[0] ** 2 + hparams["h1"] * params[1] ** 2 - 1.2

    return nnlearn.make_train(
        surrogate,
        nnlearn.sgd(0.02),
        nnlearn.generated(lambda key, step: step),
        jnp.array([0.9, 0.9]),
        steps=200,
        check_every=4,
        evaluate=lambda params: {"value": 1.2 - jnp.sum(params**2)},
    )


@pytest.mark.slow
def test_a_population_improves_on_independent_members():
    start = [{"h0": 1.0, "h1": 0.0}, {"h0": 0.0, "h1": 1.0}]
    space = {"h0": uniform(0.0, 1.0), "h1": uniform(0.0, 1.0)}
    options = {"ready_every": 4, "metric": "value", "mode": "max", "start": start}
    alone = train_population(toy_train(), space, 2, replaced=0, **options)
    np.testing.assert_allclose(alone.scores[-1], 1.2 - 0.81, atol=1e-3)  # the limit for one coordinate
    assert np.all(alone.parents == [0, 1])
    together = train_population(toy_train(), space, 2, replaced=0.5, **options)
    assert together.best_score > 1.15
    _, trace = toy_train()(start[1], 0)
    np.testing.assert_allclose(alone.scores[:, 1], trace.metrics["value"], rtol=1e-5)


def test_a_population_records_parents_and_hyper_parameters():
    space = {"rate": log_uniform(1e-3, 1.0), "kind": choice(1, 2, 4), "held": 7}
    population = train_population(bowl_train(40, 2), space, 10, 1, ready_every=4, metric="loss", replaced=0.3)
    rates, parents = population.hparams["rate"], population.parents
    assert rates.shape == parents.shape == population.scores.shape == (10, 10) and population.fixed == {"held": 7}
    assert np.all((rates >= 1e-3) & (rates <= 1.0)) and set(np.unique(population.hparams["kind"])) <= {1, 2, 4}
    moved = parents != np.arange(10)
    assert not moved[0].any() and np.all(moved[1:].sum(axis=1) <= 3) and moved.sum() > 9
    for generation in range(1, 10):
        before = np.argsort(population.scores[generation - 1], kind="stable")
        assert set(parents[generation][moved[generation]]) <= set(before[:3])
        assert set(np.flatnonzero(moved[generation])) <= set(before[-3:])
        kept = ~moved[generation]
        np.testing.assert_array_equal(rates[generation][kept], rates[generation - 1][kept])
    # the recorded schedule determines the best member's loss
    weight = np.prod((1 - population.schedule()["rate"]) ** 4)
    np.testing.assert_allclose(population.best_score, weight**2 / 2, rtol=1e-3)
    np.testing.assert_allclose(population.state.params, weight, rtol=1e-3)
    assert len(population.columns()["loss"]) == 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ready_every": 3}, "ready_every=3 must be a multiple of check_every=2"),
        ({"replaced": 0.7}, "replaced must be in"),
        ({"metric": "accuracy"}, "no metric 'accuracy'"),
        ({"start": [{"rate": 0.1}]}, "each of the 4 members"),
        ({"start": [{"rat": 0.1}] * 4}, "every axis"),
    ],
)
def test_invalid_arguments_of_a_population_are_rejected(arguments, message):
    arguments = {"ready_every": 4, "metric": "loss"} | arguments
    with pytest.raises(ValueError, match=message):
        train_population(bowl_train(40, 2), {"rate": uniform(0.1, 0.2)}, 4, **arguments)


def test_the_devices_of_a_cpu_and_the_workers_share_its_memory(monkeypatch):
    monkeypatch.setattr(batches, "free_bytes", lambda device: 2400)
    shared = batches.Resources(None, None, jax.devices()[:4], workers=3)
    assert shared.limit() == 200 and shared._replace(memory_limit=300).limit() == 100
