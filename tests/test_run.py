"""A whole run as a pure function: its steps, how it stops, and its transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nnlearn
from nnlearn.data import Examples, MaskedBatch
from nnlearn.models import mlp
from nnlearn.train.run import Run
from nnlearn.train.trace import join

SIZE, FEATURES = 40, 5
MODEL = mlp((FEATURES, 8, 3))


def make_examples(size=SIZE, seed=0, noise=0.0):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(size, FEATURES)).astype(np.float32)
    targets = np.argmax(inputs[:, :3] + 0.3 * inputs[:, 2:], axis=1).astype(np.int32)
    wrong = random.random(size) < noise
    return Examples(inputs, np.where(wrong, random.integers(0, 3, size), targets).astype(np.int32))


EXAMPLES, HELD_OUT = make_examples(), make_examples(seed=1)


def loss_fn(params, batch, key):
    return nnlearn.cross_entropy(MODEL.apply(params, batch.inputs, key), batch.targets)


def masked_loss(params, batch, key):
    examples, where = batch
    return nnlearn.cross_entropy(MODEL.apply(params, examples.inputs, key), examples.targets, where=where)


def metrics_fn(params, batch):
    logits, targets = MODEL.apply(params, batch.examples.inputs), batch.examples.targets
    return {
        "loss": nnlearn.cross_entropy(logits, targets, where=batch.where),
        "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == targets, where=batch.where),
    }


evaluate = nnlearn.evaluation(metrics_fn, HELD_OUT)


def batches(size=8, remainder="drop"):
    return nnlearn.shuffled(EXAMPLES, size, remainder=remainder)


def adam(rate):
    return nnlearn.adam(rate)


def same(left, right):
    plain = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), left, right)


def close(left, right, **tolerances):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 1e-6} | tolerances), left, right
    )


@pytest.mark.slow
@pytest.mark.parametrize("stretch", [1, 4, 10])  # with 1 an epoch is so long that its order is stored between stretches
def test_a_run_equals_a_loop_over_the_same_batches(stretch):
    sampler = nnlearn.shuffled(EXAMPLES, 4)  # ten steps per epoch
    train = nnlearn.make_train(masked_loss, adam, sampler, MODEL.init, steps=23, check_every=stretch)
    state, trace = jax.jit(train)(0.01, 3)

    init_key, state_key, data_key = jax.random.split(jax.random.key(3), 3)
    tx = adam(0.01)
    step = jax.jit(nnlearn.make_step(masked_loss, tx))
    expected, losses = nnlearn.init_state(MODEL.init(init_key), tx, state_key), []
    for index in range(23):
        order, where = nnlearn.data.epoch_indices(jax.random.fold_in(data_key, index // 10), SIZE, 4)
        batch = MaskedBatch(nnlearn.data.take(EXAMPLES, order[index % 10]), where[index % 10])
        expected, info = step(expected, batch)
        losses.append(info.loss)
    close(state.params, expected.params)
    np.testing.assert_allclose(trace.loss, losses, rtol=1e-5)
    assert int(state.step) == int(trace.stop_step) == 23 and trace.stopped_by == "all steps"
    np.testing.assert_array_equal(trace.step, np.arange(1, 24))
    np.testing.assert_array_equal(trace.check_step, [*range(stretch, 23, stretch), 23])
    np.testing.assert_allclose(trace.metrics["train_loss"][0], np.mean(losses[:stretch]), rtol=1e-5)


def test_every_example_counts_once_per_epoch_ragged_or_not():
    def count(params, batch, key):
        examples, where = batch
        return params**2, jnp.sum(jax.nn.one_hot(examples, 11) * where[:, None], axis=0)

    train = nnlearn.make_train(count, nnlearn.sgd(0.0), nnlearn.shuffled(jnp.arange(11), 4), jnp.ones(()), epochs=6)
    _, trace = jax.jit(train)(None, 0)
    seen = trace.info.aux.reshape(6, 3, 11)
    np.testing.assert_array_equal(seen.sum(axis=1), np.ones((6, 11)))
    assert not np.array_equal(seen[0], seen[1])  # in another order


@pytest.mark.slow
def test_the_loss_is_traced_once_for_any_lengths():
    calls = []

    def counted(params, batch, key):
        calls.append(1)
        return loss_fn(params, batch, key)

    train = nnlearn.make_train(
        counted, adam, batches(), MODEL.init, steps=23, check_every=5, evaluate=evaluate, stop=nnlearn.diverged()
    )
    jax.jit(jax.vmap(train, in_axes=(0, None)))(jnp.array([0.1, 0.2]), 0)
    assert len(calls) == 1


def test_a_resumed_run_equals_a_whole_run_bit_for_bit():
    rules = [nnlearn.patience("loss", 50), nnlearn.converged(0.0)]
    train = nnlearn.make_train(
        loss_fn, adam, batches(), MODEL.init, steps=30, check_every=4, evaluate=evaluate, stop=rules
    )
    state, trace = jax.jit(train)(0.02, 1)
    run, first = jax.jit(functools.partial(train.advance, first=0, count=12))(0.02, train.start(0.02, 1))
    run = jax.tree.unflatten(jax.tree.structure(run), jax.tree.leaves(run))  # as restored from a checkpoint
    assert isinstance(run, Run) and int(run.state.step) == 12
    run, second = jax.jit(lambda run, first: train.advance(0.02, run, first, 18))(run, 12)
    same(train.finish(run), state)
    same(join([first, second]), trace)
    with pytest.raises(ValueError, match=r"first=3.*check_every=4"):
        train.advance(0.02, run, 3, 4)


@pytest.mark.slow
def test_thinned_records_are_those_of_the_whole_trace():
    make = functools.partial(nnlearn.make_train, loss_fn, adam, batches(), MODEL.init, steps=24)
    _, whole = jax.jit(make(check_every=12))(0.1, 0)
    _, thin = jax.jit(make(check_every=12, record_every=3, record=("grad_norm", "update_norm")))(0.1, 0)
    np.testing.assert_array_equal(thin.step, np.arange(3, 25, 3))
    np.testing.assert_allclose(thin.loss, whole.loss[2::3], rtol=1e-5)
    np.testing.assert_allclose(thin.metrics["train_loss"], whole.metrics["train_loss"], rtol=1e-5)
    assert thin.info.update_norm.shape == (8,)
    with pytest.raises(ValueError, match=r"record_every=5 must divide check_every=12"):
        make(check_every=12, record_every=5)


def every_number():
    numbers = dict(rate=0.01, decay=0.01, b1=0.9, b2=0.99, clip=2.5, warmup=5.5, dropout=0.2, smoothing=0.1, scale=1.0)
    return numbers | {"weight": 0.5}


def build_with_everything(hparams=None):
    """A run in which every number of ``hparams`` has an effect."""

    def loss(params, batch, key, hparams):
        model = mlp((FEATURES, 8, 3), dropout=hparams["dropout"])
        logits = model.apply(params, batch.inputs, key)
        smooth = nnlearn.cross_entropy(logits, batch.targets, label_smoothing=hparams["smoothing"])
        return smooth + hparams["weight"] * jnp.mean(logits**2)

    def make_tx(hparams):
        schedule = nnlearn.warmup_cosine_decay_schedule(0.0, hparams["rate"], hparams["warmup"], 20)
        adamw = nnlearn.adamw(schedule, b1=hparams["b1"], b2=hparams["b2"], weight_decay=hparams["decay"])
        return nnlearn.chain(nnlearn.clip_by_global_norm(hparams["clip"]), adamw)

    def init(key, hparams):
        return jax.tree.map(lambda leaf: hparams["scale"] * leaf, MODEL.init(key))

    return nnlearn.make_train(loss, make_tx, batches(), init, steps=20, evaluate=evaluate)


@pytest.mark.slow
def test_every_hyper_parameter_may_be_vmapped():
    """One row for each number with that number halved, in one program."""
    train, chosen = build_with_everything(), every_number()
    rows = [chosen] + [chosen | {name: 0.5 * value} for name, value in chosen.items()]
    stacked = {name: jnp.array([row[name] for row in rows]) for name in chosen}
    _, trace = jax.jit(jax.vmap(train, in_axes=(0, None)))(stacked, 0)
    alone = jax.jit(train)
    for index, row in enumerate(rows):
        _, expected = alone(row, 0)
        close(trace.run(index).metrics, expected.metrics, rtol=1e-4)
        close(trace.run(index).loss, expected.loss, rtol=1e-4)
    finals = np.asarray(trace.metrics["loss"][:, -1]).tolist()
    assert len(set(finals)) == len(rows)  # each has an effect


@pytest.mark.slow
def test_a_diverging_run_does_not_affect_vmapped_neighbours():
    train = nnlearn.make_train(
        loss_fn, nnlearn.sgd, batches(), MODEL.init, epochs=4, evaluate=evaluate, stop=nnlearn.diverged()
    )
    program = jax.jit(jax.vmap(train, in_axes=(0, None)))
    good, _ = program(jnp.array([0.1, 0.1, 0.2]), 0)
    mixed, trace = program(jnp.array([0.1, 1e38, 0.2]), 0)
    for run in (0, 2):
        same(*(jax.tree.map(lambda leaf, run=run: leaf[run], states.params) for states in (good, mixed)))
    assert list(trace.stopped_by) == ["all steps", "diverged(train_loss)", "all steps"]
    assert trace.stop_step.tolist() == [20, 5, 20]
    assert np.isinf(trace.loss[1, 5:]).all() and np.isinf(trace.metrics["loss"][1, 1:]).all()
    np.testing.assert_array_equal(trace.made, np.arange(1, 21)[None] <= np.array([[20], [5], [20]]))


@pytest.mark.slow
def test_a_stopped_run_does_no_more_work():
    """A conditional skips the work after the stop, so 50 times as many steps take hardly longer."""
    import time

    def timed(epochs):
        train = nnlearn.make_train(
            loss_fn,
            adam,
            batches(),
            MODEL.init,
            epochs=epochs,
            evaluate=evaluate,
            stop=nnlearn.reached("train_loss", 10.0),
        )
        program = jax.jit(train)
        _, trace = jax.block_until_ready(program(0.01, 0))
        assert int(trace.stop_step) == 5 and trace.stopped_by == "reached(train_loss)"
        seconds = []
        for _ in range(5):
            began = time.process_time()
            jax.block_until_ready(program(0.01, 0))
            seconds.append(time.process_time() - began)
        return min(seconds)

    unstopped = nnlearn.make_train(loss_fn, adam, batches(), MODEL.init, epochs=2000, evaluate=evaluate, check_every=5)
    program = jax.jit(unstopped)
    jax.block_until_ready(program(0.01, 0))
    began = time.process_time()
    jax.block_until_ready(program(0.01, 0))
    assert timed(2000) < 0.3 * (time.process_time() - began)


def fingerprint(params):
    """A number that changes with any bit of the parameters."""
    bits = [jax.lax.bitcast_convert_type(leaf, jnp.int32).ravel() for leaf in jax.tree.leaves(params)]
    return sum(jnp.sum(word * (2 * jnp.arange(word.size) + 1)) for word in bits)


@pytest.mark.slow
@pytest.mark.parametrize("vmapped", [False, True])
def test_early_stopping_restores_the_best_check_to_the_bit(vmapped):
    """60 examples, 40 % with wrong labels: the validation loss rises, and the run ends with its best state."""
    noisy = make_examples(60, seed=2, noise=0.4)
    model = mlp((FEATURES, 64, 3))

    def loss(params, batch, key):
        return nnlearn.cross_entropy(model.apply(params, batch.inputs), batch.targets)

    def measure(params):
        loss = nnlearn.cross_entropy(model.apply(params, HELD_OUT.inputs), HELD_OUT.targets)
        return {"loss": loss, "print": fingerprint(params)}

    sampler = nnlearn.shuffled(noisy, 10, remainder="drop")
    make = functools.partial(nnlearn.make_train, loss, adam, sampler, model.init, evaluate=measure, check_every=6)
    train = make(epochs=60, stop=[nnlearn.patience("loss", 8)])
    if vmapped:
        states, traces = jax.jit(jax.vmap(train, in_axes=(0, None)))(jnp.array([0.01, 0.02]), 0)
        state, trace = jax.tree.map(lambda leaf: leaf[1], states), traces.run(1)
    else:
        state, trace = jax.jit(train)(0.02, 0)
    losses = np.asarray(trace.metrics["loss"])
    best = int(np.nanargmin(losses))
    assert trace.stopped_by == "patience(loss)" and int(trace.best_step) == 6 * (best + 1)
    assert int(trace.stop_step) == int(trace.best_step) + 8 * 6 < 360
    assert losses[best] < 0.9 * losses[best + 8]  # the run was overfitting
    prints = np.asarray(trace.metrics["print"])
    assert prints[best] == fingerprint(state.params) and len(set(prints[: best + 9].tolist())) == best + 9


def test_rules_stop_at_the_documented_step():
    def made(rule, rate=0.1, **options):
        train = nnlearn.make_train(
            loss_fn, adam, batches(), MODEL.init, epochs=30, evaluate=evaluate, stop=rule, **options
        )
        return jax.jit(train)(rate, 0)[1]

    trace = made([nnlearn.reached("accuracy", 0.7, mode="max"), nnlearn.diverged()])
    checked = np.asarray(trace.metrics["accuracy"])[: int(trace.stop_step) // 5]
    assert checked[-1] >= 0.7 and (checked[:-1] < 0.7).all() and trace.stopped_by == "reached(accuracy)"
    trace = made(nnlearn.converged(0.02, checks=3))
    changes = np.abs(np.diff(trace.metrics["train_loss"][: int(trace.stop_step) // 5]))
    assert (changes[-3:] <= 0.02).all() and trace.stopped_by == "converged(train_loss)"
    still = [(changes[at : at + 3] <= 0.02).all() for at in range(len(changes) - 2)]
    assert not any(still[:-1])
    # a rule may depend on hyper-parameters
    trace = made(lambda rate: [nnlearn.reached("loss", 100 * rate), nnlearn.keep_best("accuracy", "max")])
    assert int(trace.stop_step) == 5


def test_nan_at_the_first_check_does_not_remain_the_best():
    values = jnp.array([jnp.nan, 3.0, 2.0, 4.0])
    train = nnlearn.make_train(
        lambda params, batch, key: (params - batch) ** 2,
        nnlearn.sgd(0.1),
        nnlearn.generated(lambda key, step: step.astype(jnp.float32)),
        jnp.ones(()),
        steps=4,
        check_every=1,
        evaluate=lambda params, opt_state: {"loss": values[opt_state[-1].step - 1]},
        stop=nnlearn.keep_best("loss"),
    )
    assert int(jax.jit(train)(None, 0)[1].best_step) == 3


@pytest.mark.parametrize("packed", [False, True])
def test_packed_and_unpacked_runs_are_equal(packed):
    rule = nnlearn.patience("loss", 30)
    train = nnlearn.make_train(
        loss_fn, adam, batches(), MODEL.init, epochs=4, evaluate=evaluate, stop=rule, packed=packed
    )
    state, trace = jax.jit(jax.vmap(train, in_axes=(0, None)))(jnp.array([0.01, 0.1]), 0)
    plain = nnlearn.make_train(
        loss_fn, adam, batches(), MODEL.init, epochs=4, evaluate=evaluate, stop=rule, packed=False
    )
    expected, expected_trace = jax.jit(plain)(0.1, 0)
    close(jax.tree.map(lambda leaf: leaf[1], state.params), expected.params)
    close(trace.run(1).metrics, expected_trace.metrics)


@pytest.mark.slow
def test_runs_on_four_devices_and_one_are_equal():
    """Each device draws a quarter of each batch; parameters, trace and stopping equal those of the whole batch."""
    inputs = jnp.asarray(EXAMPLES.inputs)

    def whole(key, step):
        return nnlearn.data.take(EXAMPLES, jax.random.choice(key, SIZE, (16,), replace=False))

    def quarter(key, step):
        return jax.tree.map(
            lambda leaf: leaf.reshape(4, 4, *leaf.shape[1:])[jax.lax.axis_index("data")], whole(key, step)
        )

    def run_of(batch_fn, **options):
        make = nnlearn.make_train(
            loss_fn, adam, nnlearn.generated(batch_fn), MODEL.init, steps=20, check_every=5, evaluate=evaluate,
            stop=nnlearn.reached("loss", 0.9), **options,
        )  # fmt: skip
        return lambda rate: make(rate, 0)

    assert inputs.shape == (SIZE, FEATURES)
    expected, trace = jax.jit(run_of(whole))(0.05)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(run_of(quarter, axis_name="data"), mesh=mesh, in_specs=P(), out_specs=P())
    state, got = jax.jit(sharded)(0.05)
    close(state.params, expected.params)
    close(got.metrics, trace.metrics)
    assert int(got.stop_step) == int(trace.stop_step) < 20


@pytest.mark.slow
def test_the_gradient_of_a_run_equals_central_differences():
    with jax.enable_x64(True):
        train, chosen = build_with_everything(), every_number() | {"dropout": 0.0}
        keep = ("rate", "decay", "b1", "b2", "clip", "warmup", "smoothing", "scale", "weight")
        examples = jax.tree.map(jnp.asarray, HELD_OUT)

        def objective(point):
            def cast(params):
                return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)

            double = nnlearn.make_train(
                train.loss_fn, train.make_tx, batches(), lambda key, hparams: cast(train.init(key, hparams)), steps=20
            )
            state, _ = double(chosen | point, 0)
            return nnlearn.cross_entropy(
                MODEL.apply(state.params, examples.inputs.astype(jnp.float64)), examples.targets
            )

        point = {name: jnp.float64(chosen[name]) for name in keep}
        value, gradient = jax.jit(nnlearn.hyper_value_and_grad(objective, mode="reverse"))(point)
        program = jax.jit(objective)
        for name in keep:
            width = 1e-5 * max(abs(chosen[name]), 0.1)
            ends = [program(point | {name: point[name] + sign * width}) for sign in (1, -1)]
            np.testing.assert_allclose(gradient[name], (ends[0] - ends[1]) / (2 * width), rtol=1e-6, atol=1e-9)
        two = {name: point[name] for name in ("rate", "decay")}
        rest = {name: point[name] for name in keep if name not in two}
        forward = jax.jit(nnlearn.hyper_value_and_grad(lambda two: objective(rest | two), mode="forward"))(two)
        close(forward, (value, {name: gradient[name] for name in two}), rtol=1e-9)


@pytest.mark.slow
def test_per_example_weights_and_a_schedule_have_gradients_too():
    def loss(params, batch, key, hparams):
        (inputs, targets), index = batch
        losses = nnlearn.softmax_cross_entropy_with_integer_labels(MODEL.apply(params, inputs), targets)
        return jnp.mean(hparams["weights"][index] * losses)

    sampler = nnlearn.shuffled((EXAMPLES, jnp.arange(SIZE)), 8, remainder="drop")
    make_tx = lambda h: nnlearn.sgd(nnlearn.piecewise_interpolate_schedule("linear", 0.1, {10: h["a"], 20: h["b"]}))  # noqa: E731
    train = nnlearn.make_train(loss, make_tx, sampler, MODEL.init, steps=20, evaluate=evaluate)
    hparams = {"weights": jnp.ones(SIZE), "a": 1.5, "b": 0.5}
    gradient = jax.jit(jax.grad(lambda h: train(h, 0)[1].metrics["loss"][-1]))(hparams)
    assert np.isfinite(gradient["weights"]).all() and (gradient["weights"] != 0).all()
    assert gradient["a"] != 0 and gradient["b"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("check_every", [None, 4])
def test_the_memory_of_a_derivative_grows_at_most_as_the_square_root_of_the_steps(check_every):
    def temporaries(steps):
        train = nnlearn.make_train(
            loss_fn, adam, batches(), MODEL.init, steps=steps, record=(), record_every=4, check_every=check_every
        )
        objective = lambda rate: evaluate(train(rate, 0)[0].params)["loss"]  # noqa: E731
        return jax.jit(jax.grad(objective)).lower(0.01).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(6400) < 8 * temporaries(100)


@pytest.mark.slow
def test_the_memory_of_a_forward_run_does_not_grow_with_its_steps():
    def temporaries(steps):
        train = nnlearn.make_train(loss_fn, adam, batches(), MODEL.init, steps=steps, check_every=100, record_every=100)
        return jax.jit(train).lower(0.01, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(20_000) < 1.2 * temporaries(1_000)


def test_model_state_is_updated_evaluated_and_restored():
    def loss(params, batch, key, model_state):
        mean = jnp.mean(batch.inputs, axis=0)
        return (
            loss_fn(params, batch, key),
            None,
            {"mean": 0.9 * model_state["mean"] + 0.1 * mean, "seen": model_state["seen"] + 1},
        )

    start = {"mean": jnp.zeros(FEATURES), "seen": jnp.zeros([], jnp.int32)}
    train = nnlearn.make_train(
        loss,
        adam,
        batches(),
        lambda key: (MODEL.init(key), start),
        epochs=3,
        evaluate=lambda params, model_state: {"seen": model_state["seen"]},
        stop=nnlearn.keep_best("seen", "min"),
    )
    state, trace = jax.jit(train)(0.01, 0)
    assert trace.metrics["seen"].tolist() == [5, 10, 15] and int(state.model_state["seen"]) == 5
    with pytest.raises(ValueError, match=r"init must return \(params, model_state\)"):
        nnlearn.make_train(loss, adam, batches(), MODEL.init, epochs=3)(0.01, 0)


@pytest.mark.slow
def test_a_trace_can_be_sliced_tabulated_saved_and_plotted(tmp_path):
    pandas = pytest.importorskip("pandas")
    train = nnlearn.make_train(
        lambda p, b, k: (loss_fn(p, b, k), {"inner": {"norm": jnp.ones(())}}),
        nnlearn.sgd, batches(), MODEL.init, epochs=4, evaluate=evaluate, stop=nnlearn.diverged(),
    )  # fmt: skip
    _, trace = jax.jit(jax.vmap(train, in_axes=(0, None)))(jnp.array([0.1, 1e38]), 0)
    part = trace[6:11]
    assert part.step[0].tolist() == [6, 7, 8, 9, 10] and part.check_step[0].tolist() == [10]
    table = trace.to_pandas()
    assert isinstance(table, pandas.DataFrame) and len(table) == 20 + 5  # the lost run has five rows
    assert table.loc[(table.run_0 == 0) & (table.step == 10), "accuracy"].item() == trace.metrics["accuracy"][0, 1]
    assert np.isnan(table.loc[(table.run_0 == 0) & (table.step == 9), "accuracy"].item())
    assert "aux/inner/norm" in table
    trace.save(tmp_path / "trace.npz")
    same(nnlearn.Trace.load(tmp_path / "trace.npz"), trace)
    assert nnlearn.Trace.load(tmp_path / "trace.npz").rules == trace.rules
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]
    trace.plot(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 10_000
    whole = (tmp_path / "trace.npz").read_bytes()
    refused = 0
    for at in range(0, len(whole), len(whole) // 60):  # one flipped bit is refused or has no effect
        (tmp_path / "damaged.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            same(nnlearn.Trace.load(tmp_path / "damaged.npz"), trace)
        except ValueError as error:
            assert "damaged.npz" in str(error)
            refused += 1
    assert refused > 30
    (tmp_path / "text.npz").write_text("no trace")
    with pytest.raises(ValueError, match="text.npz"):
        nnlearn.Trace.load(tmp_path / "text.npz")
    with pytest.raises(TypeError, match="run\\(3\\)"):
        trace[3]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": None}, ValueError, "one of steps and epochs"),
        ({"epochs": 3}, ValueError, "one of steps and epochs"),
        ({"steps": 0}, ValueError, "steps must be an int >= 1"),
        ({"check_every": 0}, ValueError, "check_every must be an int >= 1"),
        ({"batches": EXAMPLES}, TypeError, "batches must be made by shuffled"),
        ({"loss_fn": lambda params, batch: 0.0}, TypeError, r"loss_fn must take \(params, batch, key\)"),
        ({"init": lambda: 0.0}, TypeError, r"init must take \(key\)"),
        ({"evaluate": lambda: {"a": 1.0}}, TypeError, r"evaluate must take \(params\)"),
        ({"record": ("norm",)}, ValueError, "record must be a collection"),
        ({"batches": nnlearn.generated(lambda key, t: t), "steps": None, "epochs": 2}, ValueError, "epochs needs"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_when_the_run_is_built(change, error, message):
    good = {"loss_fn": loss_fn, "make_tx": adam, "batches": batches(), "init": MODEL.init, "steps": 5}
    with pytest.raises(error, match=message):
        nnlearn.make_train(**good | change)


def test_a_bad_metric_is_named_when_the_run_is_traced():
    make = functools.partial(nnlearn.make_train, loss_fn, adam, batches(), MODEL.init, steps=5)
    with pytest.raises(ValueError, match=r"no metric 'los'.*accuracy.*loss"):
        make(evaluate=evaluate, stop=nnlearn.patience("los", 2))(0.1, 0)
    with pytest.raises(TypeError, match="dict of scalars"):
        make(evaluate=lambda params: jnp.zeros(3))(0.1, 0)
    with pytest.raises(ValueError, match="train_loss"):
        make(evaluate=lambda params: {"train_loss": 0.0})(0.1, 0)
    with pytest.raises(ValueError, match="restore_best=False"):
        make(evaluate=evaluate, stop=[nnlearn.patience("loss", 2), nnlearn.keep_best("accuracy", "max")])(0.1, 0)
