"""Guards for rare cases: each test fails if its guard is removed."""

import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.sweeps import choice, sweep
from nnlearn.tree import safe_divide


def run_of(evaluate, **options):
    """Four steps of plain descent on a bowl around 1, from 0, with a check after every second."""
    return nnlearn.make_train(
        lambda params, batch, key: (params - 1.0) ** 2,
        lambda hparams: nnlearn.sgd(hparams["rate"]),
        nnlearn.generated(lambda key, step: step),
        jnp.zeros(()),
        steps=4,
        check_every=2,
        evaluate=evaluate,
        **options,
    )


def test_a_setting_with_a_failed_seed_ranks_below_one_without():
    """The setting with the better mean has a failed seed, so it ranks second."""

    def evaluate(params, hparams):
        lost = (hparams["rate"] > 0.2) & (hparams["seed"] == 1)
        return {"score": jnp.where(lost, jnp.nan, -hparams["rate"])}

    train = run_of(evaluate)
    results = sweep(train, {"rate": choice(0.1, 0.3), "seed": choice(0, 1)}, 1, metric="score")
    # the choices of "seed" as seeds of one setting: two rows of one rate are joined
    traces = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(2, 2, *np.shape(leaf)[2:]), results.traces)
    joined = results.__class__(
        **{**vars(results), "settings": ({"rate": 0.1}, {"rate": 0.3}), "seeds": (0, 1), "traces": traces}
    )
    first, second = joined.ranking()
    assert (first.setting, first.failed) == ({"rate": 0.1}, 0)
    assert (second.setting, second.failed) == ({"rate": 0.3}, 1) and second.mean < first.mean
    assert joined.best().setting == {"rate": 0.1}


def test_a_run_whose_checks_are_all_nan_ends_with_trained_parameters():
    train = run_of(lambda params: {"score": params * jnp.nan}, stop=nnlearn.keep_best("score", mode="max"))
    state, trace = jax.jit(train)({"rate": 0.25}, 0)
    assert int(trace.best_step) == 2
    np.testing.assert_allclose(state.params, 0.75)  # after two steps, each of which halves the distance to 1


def test_integer_state_is_taken_from_the_first_device():
    def loss_fn(params, batch, key, model_state):
        return jnp.mean((params - batch) ** 2), {}, {"count": model_state["count"] + jax.lax.axis_index("d") + 5}

    tx = nnlearn.sgd(0.1)
    state = nnlearn.init_state(jnp.zeros(()), tx, model_state={"count": jnp.array(2)})
    step = nnlearn.make_step(loss_fn, tx, axis_name="d")
    new, _ = jax.vmap(step, in_axes=(None, 0), axis_name="d")(state, jnp.ones((3, 2)))
    assert new.model_state["count"].tolist() == [7, 7, 7]


def test_the_derivative_of_a_division_by_zero_is_zero():
    numerator, denominator = jnp.array([2.0, 0.0, 3.0]), jnp.array([0.0, 0.0, 2.0])
    slopes = jax.grad(lambda n, d: jnp.sum(safe_divide(n, d)), (0, 1))(numerator, denominator)
    np.testing.assert_array_equal(slopes[0], [0.0, 0.0, 0.5])
    np.testing.assert_array_equal(slopes[1], [0.0, 0.0, -0.75])


def test_a_sweep_of_the_older_format_is_not_resumed(tmp_path):
    train, space = run_of(lambda params: {"score": params}), {"rate": choice(0.1)}
    sweep(train, space, 1, metric="score", folder=tmp_path)
    header = tmp_path / "sweep.json"
    header.write_text(header.read_text().replace("nnlearn sweep 2", "nnlearn sweep 1"))
    with pytest.raises(ValueError, match="older nnlearn.*Results.load"):
        sweep(train, space, 1, metric="score", folder=tmp_path)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nnlearn.transforms.ema(1.5), "decay"),
        (lambda: nnlearn.transforms.trace(-0.5), "decay"),
        (lambda: nnlearn.transforms.clip(-1.0), "max_delta"),
        (lambda: nnlearn.transforms.clip_by_block_rms(-1.0), "threshold"),
        (lambda: nnlearn.transforms.clip_by_global_norm(-1.0), "max_norm"),
        (lambda: nnlearn.transforms.adaptive_grad_clip(-0.1), "clipping"),
        (lambda: nnlearn.schedule_free(nnlearn.sgd(0.1), 0.1, b1=1.5), "b1"),
        (lambda: nnlearn.skip_budget(total=0), "total"),
        (lambda: nnlearn.best_fixed_rate(0.0, 1.0), "low"),
        (lambda: nnlearn.smooth_labels(jnp.eye(2), 1.5), "alpha"),
    ],
)
def test_bad_hyperparameters_are_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_one_worker_per_core_that_the_process_may_use(monkeypatch):
    from nnlearn.sweeps.batches import default_workers

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert default_workers([types.SimpleNamespace(platform="cpu")]) == 5


def test_an_ignored_signal_stays_ignored():
    from nnlearn.stream.interrupt import Interrupt

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Interrupt():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) != before
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_sharding_over_devices_that_are_not_here():
    from nnlearn.packing.serialization import find_sharding

    facts = {"axes": {"data": 1}, "types": ["Auto"], "spec": ["data"], "devices": [1234]}
    with pytest.raises(ValueError, match=r"has no devices \[1234\]"):
        find_sharding(facts)


def test_leaves_are_rounded_by_different_seeds():
    params = {name: jnp.ones(4000, jnp.bfloat16) for name in "ab"}
    for wrap in (nnlearn.round_stochastically, nnlearn.compact_master):
        tx = wrap(nnlearn.sgd(1e-3))
        new = nnlearn.apply_updates(params, tx.update(params, tx.init(params), params)[0])
        assert 0.2 < jnp.mean(new["a"] != new["b"]) < 0.5 or wrap is nnlearn.compact_master
    rest = tx.update(params, tx.init(params), params)[1].rest
    assert not np.array_equal(rest["a"], rest["b"])


def test_no_step_has_failed_before_the_first():
    state = nnlearn.apply_if_finite(nnlearn.sgd(0.1), 2).init(jnp.zeros(2))
    assert (int(state.notfinite_count), bool(state.last_finite), int(state.total_notfinite)) == (0, True, 0)


def test_the_best_value_of_a_table_is_the_best_of_the_checks_that_were_made():
    train = run_of(lambda params: {"score": -((params - 0.5) ** 2)})
    table = sweep(train, {"rate": choice(0.25)}, 1, metric="score", mode="max").columns()
    np.testing.assert_allclose(table["best_score"], [-0.0625])  # params 0.75, then 0.9375
    np.testing.assert_allclose(table["score"], [-(0.4375**2)])


def test_accumulators_of_complex_gradients_are_real():
    state = nnlearn.transforms.scale_by_rss().init(jnp.ones(2, jnp.complex64))
    assert state.sum_of_squares.dtype == jnp.float32


def test_an_infinite_gradient_is_clipped_to_a_finite_one():
    tx = nnlearn.transforms.adaptive_grad_clip(0.1)
    params = jnp.array([[3.0], [4.0]])
    update, _ = tx.update(jnp.array([[jnp.inf], [1.0]]), tx.init(params), params)
    assert jnp.all(jnp.isfinite(update))


def test_a_history_that_waited_for_space_ends_without_a_warning(tmp_path, recwarn):
    from nnlearn.stream.history import History

    class Disk:
        """The file, on a disk that takes nothing the first time."""

        def __init__(self, file):
            self.file, self.full = file, True

        def write(self, content):
            if self.full:
                self.full = False
                raise OSError(28, "No space left on device")
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    with History(tmp_path / "run.csv", ["step"]) as history:
        history._file = Disk(history._file)
        history.write([{"step": 1}, {"step": 2}])
    assert (tmp_path / "run.csv").read_text().split() == ["step", "1", "2"]
    assert [str(each.message) for each in recwarn if "lacks the last rows" in str(each.message)] == []


def test_the_page_of_a_sweep_has_its_seconds(tmp_path):
    results = sweep(run_of(lambda params: {"score": params}), {"rate": choice(0.1)}, 1, metric="score")
    assert "s with compilation" in results.report(tmp_path / "sweep.html").read_text()


def test_workers_share_the_runs_of_a_small_sweep():
    from nnlearn.sweeps.batches import CPU_WIDTH, Resources

    cpu = [types.SimpleNamespace(platform="cpu")]
    widths = [Resources(None, None, cpu, workers).width_for(runs) for workers, runs in ((1, 3), (2, 3), (2, 10**6))]
    assert widths == [CPU_WIDTH, 2, CPU_WIDTH]


def test_a_module_that_misses_another_one_is_not_called_missing(tmp_path, monkeypatch):
    from nnlearn.train.named import load_run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "needs_another.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_run("needs_another:train")
    with pytest.raises(ValueError, match="there is no module 'not_there'"):
        load_run("not_there:train")
