"""Networks of flax and equinox train as in the loops of their documentation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnlearn
from nnlearn.models.adapters import from_equinox, from_linen, from_nnx

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(10), (4, 16, 8, 8, 1))
TOKENS = jax.random.randint(jax.random.key(11), (4, 16, 6), 0, 11)
POINTS = jax.random.normal(jax.random.key(12), (4, 16, 5))
LABELS = (jnp.arange(64) % 3).reshape(4, 16)
TX = nnlearn.sgd(0.1, momentum=0.9)


def batches_of(inputs):
    return [{"x": x, "y": y} for x, y in zip(inputs, LABELS, strict=True)]


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def loss_of(model):
    if isinstance(model, nnlearn.types.Model):
        return lambda params, batch, key: cross_entropy(model.apply(params, batch["x"], key), batch)

    def loss_fn(params, batch, key, model_state):
        logits, model_state = model.apply(params, model_state, batch["x"], key)
        return cross_entropy(logits, batch), {"accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["y"])}, model_state

    return loss_fn


def begin(model, key=KEY, tx=TX, **options):
    made = jax.jit(model.init)(key)
    params, model_state = made if isinstance(model, nnlearn.types.StatefulModel) else (made, None)
    return nnlearn.init_state(params, tx, key, model_state=model_state, **options)


def trained(model, inputs, loss_fn=None, **options):
    """The state after a step on each batch."""
    step, state = jax.jit(nnlearn.make_step(loss_fn or loss_of(model), TX)), begin(model, **options)
    for batch in batches_of(inputs):
        state, info = step(state, batch)
    assert step._cache_size() == 1 and jnp.isfinite(info.loss)
    return state


def assert_close(got, expected, tolerance=1e-6):
    """Equal up to rounding, each leaf relative to its norm."""
    got, expected = (jax.tree.leaves(tree) for tree in (got, expected))
    assert len(got) == len(expected) > 0
    for left, right in zip(got, expected, strict=True):
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        assert left.shape == right.shape
        assert np.linalg.norm(left - right) <= tolerance * max(np.linalg.norm(right), 1e-2)


# --- modules as people write them -----------------------------------------------------------------------------------


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), use_bias=False)(x)))
        y = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        return nn.relu(x + y)


class ResNet(nn.Module):
    rate: float = 0.1

    @nn.compact
    def __call__(self, x, train: bool):
        x = Block(8)(nn.Conv(8, (3, 3), use_bias=False)(x), train)
        x = nn.Dropout(self.rate, deterministic=not train)(x.mean(axis=(1, 2)))
        return nn.Dense(3)(x)


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=deterministic)(nn.relu(nn.Dense(8)(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs, rate=0.1):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 8, dropout_rate=rate, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.output = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norms[0](x))
        x = x + self.dropout(self.down(nnx.gelu(self.up(self.norms[1](x)))))
        return self.output(x.mean(axis=1))


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(5, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout, self.last = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


RESNET = from_linen(ResNet(), IMAGES[0])
TRANSFORMER = from_nnx(Transformer)
NORMED = from_nnx(Normed)


# --- linen ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_linen_resnet_trains_as_in_the_loop_of_flax():
    from flax.training import train_state

    class TrainState(train_state.TrainState):
        batch_stats: dict

    state = trained(RESNET, IMAGES)
    variables = jax.jit(functools.partial(ResNet().init, train=False))(KEY, IMAGES[0])
    theirs = TrainState.create(
        apply_fn=ResNet().apply, params=variables["params"], batch_stats=variables["batch_stats"], tx=TX
    )

    @jax.jit
    def train_step(state, batch, key):
        def loss_fn(params):
            logits, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                batch["x"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return cross_entropy(logits, batch), updates

        grads, updates = jax.grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads).replace(batch_stats=updates["batch_stats"])

    for index, batch in enumerate(batches_of(IMAGES)):
        theirs = train_step(theirs, batch, jax.random.fold_in(state.key, index))
    assert_close(state.params, theirs.params)
    assert_close(state.model_state, {"batch_stats": theirs.batch_stats})

    running = {"params": state.params, **state.model_state}  # inference, as in flax
    assert_close(RESNET.apply(state.params, state.model_state, IMAGES[0])[0], ResNet().apply(running, IMAGES[0], False))


@pytest.mark.slow
def test_a_linen_module_without_state_is_a_model_with_a_train_argument_or_field():
    model = from_linen(Perceptron(), jax.ShapeDtypeStruct((1, 5), jnp.float32))
    params = model.init(KEY)
    theirs = Perceptron().init(KEY, POINTS[0])["params"]
    jax.tree.map(np.testing.assert_array_equal, params, theirs)
    apply = functools.partial(Perceptron().apply, {"params": theirs}, POINTS[0])
    key = jax.random.key(3)
    np.testing.assert_array_equal(model.apply(params, POINTS[0]), apply())
    np.testing.assert_array_equal(
        model.apply(params, POINTS[0], key), apply(deterministic=False, rngs={"dropout": key})
    )

    class Two(nn.Module):
        noisy: bool = False

        @nn.compact
        def __call__(self, x, y):
            x = nn.Dropout(0.5, deterministic=not self.noisy)(x)
            return x + y + jax.random.normal(self.make_rng("noise"), x.shape) if self.noisy else x + y

    two = from_linen(Two(), POINTS[0], POINTS[0], train_argument="noisy", rngs=("dropout", "noise"))
    params = two.init(KEY)
    assert params == {}
    np.testing.assert_array_equal(two.apply(params, (POINTS[0], POINTS[1])), POINTS[0] + POINTS[1])
    drop, noise = jax.random.split(key)
    expected = Two(noisy=True).apply({}, POINTS[0], POINTS[1], rngs={"dropout": drop, "noise": noise})
    np.testing.assert_array_equal(two.apply(params, (POINTS[0], POINTS[1]), key), expected)


# --- nnx ------------------------------------------------------------------------------------------------------------


def nnx_loop(module, inputs, state):
    """The loop in nnx's documentation; the random streams are set from the step's key, as the adapter does."""
    optimizer = nnx.Optimizer(module, TX, wrt=nnx.Param)
    module.train()

    @nnx.jit
    def train_step(module, optimizer, batch):
        grads = nnx.grad(lambda module: cross_entropy(module(batch["x"]), batch))(module)
        optimizer.update(module, grads)

    for index, batch in enumerate(batches_of(inputs)):
        keys = iter([jax.random.fold_in(jax.random.fold_in(state.key, index), stream) for stream in range(9)])

        def begin(path, variable, keys=keys):
            return variable.replace(next(keys) if isinstance(variable, nnx.RngKey) else jnp.uint32(0))

        nnx.update(module, nnx.map_state(begin, nnx.state(module, nnx.RngState)))
        train_step(module, optimizer, batch)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("net", "model", "inputs"), [(Transformer, TRANSFORMER, TOKENS), (Normed, NORMED, POINTS)])
def test_an_nnx_module_trains_as_in_the_loop_of_nnx(net, model, inputs):
    state = trained(model, inputs)
    make = nnx.jit(lambda: net(nnx.Rngs(KEY)))  # as one call, which is faster
    theirs = nnx_loop(make(), inputs, state)
    assert_close(state.params, nnx.to_pure_dict(nnx.state(theirs, nnx.Param)))
    theirs.eval()
    if model is NORMED:
        assert_close(state.model_state, nnx.to_pure_dict(nnx.state(theirs, nnx.BatchStat)))
        outputs = jax.jit(model.apply)(state.params, state.model_state, inputs[0])[0]
    else:
        assert state.model_state is None
        outputs = jax.jit(model.apply)(state.params, inputs[0])
    forward = nnx.jit(lambda module: module(inputs[0]))
    assert_close(outputs, forward(theirs))

    mine = make()  # conversion back to a module
    nnx.update(mine, state.params, state.model_state or {})
    mine.eval()
    assert_close(forward(mine), outputs)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_the_key_determines_the_random_numbers_of_each_nnx_layer():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))
            self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, rngs=None, training=False):
            assert (rngs is not None) == training
            self.calls[...] += 1
            self.sow(nnx.Intermediate, "inputs", x)
            return self.first(x), self.second(x), self.first(x)

    model = from_nnx(Twice)
    assert model.init(KEY) == ({}, {"calls": 0})
    x, before = jnp.ones((8, 16)), {"calls": jnp.int32(3)}
    (first, second, again), after = model.apply({}, before, x, KEY)
    assert after == {"calls": 4} and after["calls"].dtype == jnp.int32
    assert not np.array_equal(first, second) and not np.array_equal(first, again)
    np.testing.assert_array_equal(model.apply({}, before, x, KEY)[0][0], first)
    assert not np.array_equal(model.apply({}, before, x, jax.random.key(1))[0][0], first)
    (first, _, _), after = model.apply({}, before, x)
    np.testing.assert_array_equal(first, x)
    assert after == {"calls": 3}


def test_a_given_nnx_module_starts_from_its_current_parameters():
    module = Normed(nnx.Rngs(0))
    model = from_nnx(module)
    assert model == from_nnx(module)
    module.first.kernel[...] = module.first.kernel[...] + 1
    params, model_state = model.init(KEY)
    np.testing.assert_allclose(module.first.kernel[...], params["first"]["kernel"] + 1)
    assert model != from_nnx(module) and sorted(model_state) == ["norm"]
    with pytest.raises(ValueError, match="has 'first/bias', the given values do not"):
        model.apply({"first": {}}, model_state, POINTS[0])


# --- equinox --------------------------------------------------------------------------------------------------------


def equinox():
    return pytest.importorskip("equinox")


def equinox_net(rate=0.2):
    eqx = equinox()

    class Net(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        dropout: eqx.nn.Dropout
        last: eqx.nn.Linear

        def __init__(self, key):
            one, two = jax.random.split(key)
            self.first, self.last = eqx.nn.Linear(5, 8, key=one), eqx.nn.Linear(8, 3, key=two)
            self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
            self.dropout = eqx.nn.Dropout(rate)

        def __call__(self, x, state, *, key=None):
            x, state = self.norm(self.first(x), state)
            return self.last(self.dropout(jax.nn.relu(x), key=key)), state

    return eqx.nn.make_with_state(Net)


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_an_equinox_perceptron_trains_as_in_the_loop_of_equinox(given):
    eqx = equinox()
    module = eqx.nn.MLP(5, 3, 8, 1, key=KEY)
    model = from_equinox(module if given else functools.partial(eqx.nn.MLP, 5, 3, 8, 1))
    state = trained(model, POINTS)
    opt_state = TX.init(eqx.filter(module, eqx.is_inexact_array))
    theirs = module

    @eqx.filter_jit
    def train_step(module, opt_state, batch):
        grads = eqx.filter_grad(lambda module: cross_entropy(jax.vmap(module)(batch["x"]), batch))(module)
        updates, opt_state = TX.update(grads, opt_state, eqx.filter(module, eqx.is_inexact_array))
        return eqx.apply_updates(module, updates), opt_state

    for batch in batches_of(POINTS):
        theirs, opt_state = train_step(theirs, opt_state, batch)
    assert_close(state.params, eqx.filter(theirs, eqx.is_inexact_array))
    mine = eqx.combine(state.params, module)
    assert_close(jax.vmap(mine)(POINTS[0]), model.apply(state.params, POINTS[0]))
    assert_close(trained(model, POINTS, packed=True).params, state.params)
    assert model == from_equinox(module if given else functools.partial(eqx.nn.MLP, 5, 3, 8, 1)) or not given


@pytest.mark.slow
def test_an_equinox_module_with_batch_normalisation_trains_as_in_the_loop_of_equinox():
    eqx = equinox()
    make = equinox_net()
    model = from_equinox(make)
    state = trained(model, POINTS)
    module, net_state = make(KEY)
    opt_state = TX.init(eqx.filter(module, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(module, net_state, opt_state, batch, key):
        def loss_fn(module):
            keys = jax.random.split(key, len(batch["x"]))
            batched = jax.vmap(
                lambda x, state, key: module(x, state, key=key), (0, None, 0), (0, None), axis_name="batch"
            )
            logits, after = batched(batch["x"], net_state, keys)
            return cross_entropy(logits, batch), after

        grads, net_state = eqx.filter_grad(loss_fn, has_aux=True)(module)
        updates, opt_state = TX.update(grads, opt_state, eqx.filter(module, eqx.is_inexact_array))
        return eqx.apply_updates(module, updates), net_state, opt_state

    for index, batch in enumerate(batches_of(POINTS)):
        key = jax.random.fold_in(state.key, index)
        module, net_state, opt_state = train_step(module, net_state, opt_state, batch, key)
    assert_close(state.params, eqx.filter(module, eqx.is_inexact_array))
    assert_close(state.model_state[1], net_state)

    evaluated = jax.jit(model.apply)
    outputs, after = evaluated(state.params, state.model_state, POINTS[0])
    alone, _ = evaluated(state.params, state.model_state, POINTS[0][:1])
    assert_close(alone, outputs[:1])
    assert_close(outputs, jax.vmap(eqx.nn.inference_mode(module), (0, None))(POINTS[0], net_state)[0])
    assert_close(after, state.model_state, 0)


def test_untrained_equinox_arrays_are_state_and_modules_may_take_whole_batches():
    eqx = equinox()

    class Shifted(eqx.Module):
        scale: jax.Array
        order: jax.Array
        act: object = eqx.field(static=True)

        def __init__(self, key):
            self.scale, self.order = jnp.ones(5), jax.random.permutation(key, 5)
            self.act = lambda x: x  # another function every time

        def __call__(self, x, y, training):
            assert x.ndim == 2 or training
            return self.act(x[..., self.order] * self.scale.reshape((1,) * (x.ndim - 1) + (5,)) + y)

    model = from_equinox(lambda seed: Shifted(seed), per_example=False)
    params, model_state = model.init(KEY)
    outputs, after = model.apply(params, model_state, (POINTS[0], POINTS[1]))
    np.testing.assert_array_equal(outputs, POINTS[0][:, jax.random.permutation(KEY, 5)] + POINTS[1])
    assert_close(after, model_state, 0)
    frozen = from_equinox(Shifted, filter_spec=lambda leaf: False)
    assert jax.tree.leaves(frozen.init(KEY)[0]) == [] and len(jax.tree.leaves(frozen.init(KEY)[1])) == 2
    outputs, _ = frozen.apply(*frozen.init(KEY), (POINTS[0], POINTS[1]), KEY)
    np.testing.assert_array_equal(outputs, POINTS[0][:, jax.random.permutation(KEY, 5)] + POINTS[1])


# --- every library in every run -------------------------------------------------------------------------------------


def models():
    eqx = equinox()
    return {
        "linen": (RESNET, IMAGES),
        "nnx": (TRANSFORMER, TOKENS),
        "nnx with state": (NORMED, POINTS),
        "equinox": (from_equinox(eqx.nn.MLP(5, 3, 8, 1, key=KEY)), POINTS),
        "equinox with state": (from_equinox(equinox_net()), POINTS),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linen", "nnx", "nnx with state", "equinox", "equinox with state"])
def test_fit_and_make_train_accept_adapted_models(name):
    model, inputs = models()[name]
    loss_fn = loss_of(model)
    state = begin(model)
    got, trace = nnlearn.fit(nnlearn.make_step(loss_fn, TX), state, batches_of(inputs), progress=False)
    assert int(got.step) == 4 and np.all(np.isfinite(trace.loss))
    if state.model_state is not None:
        assert not np.array_equal(jax.tree.leaves(got.model_state)[0], jax.tree.leaves(state.model_state)[0])

    def metrics_fn(params, batch, model_state):
        stateful = model_state is not None
        logits = model.apply(params, *([model_state] if stateful else []), batch.examples["x"])
        logits = logits[0] if stateful else logits
        return {"loss": cross_entropy(logits, batch.examples)}

    examples = {"x": inputs.reshape(64, *inputs.shape[2:]), "y": LABELS.reshape(64)}
    sampler = nnlearn.shuffled(examples, 16, remainder="drop")
    evaluate = nnlearn.evaluation(metrics_fn, examples)
    train = nnlearn.make_train(
        loss_fn, lambda rate: nnlearn.adamw(rate), sampler, model.init, epochs=3, evaluate=evaluate
    )
    state, trace = jax.jit(jax.vmap(train, in_axes=(None, 0)))(1e-2, jax.random.split(KEY, 2))
    assert trace.loss.shape == (2, 12) and jnp.all(jnp.isfinite(trace.metrics["loss"]))
    assert jnp.all(trace.loss[:, -4:].mean(1) < trace.loss[:, :4].mean(1))
    assert not np.allclose(trace.loss[0], trace.loss[1])


# --- requirements of other libraries' models ------------------------------------------------------------------------


def test_state_without_a_mean_works_with_microbatches_and_devices():
    start = {
        "count": jnp.uint32(2**31 + 1),  # not representable in float32
        "flag": jnp.array(False),
        "key": jax.random.key(3),
        "mask": jnp.array([0.0, -jnp.inf]),
        "mean": jnp.asarray(1.0),  # weakly typed
    }

    def loss_fn(params, batch, key, model_state):
        new = {
            "count": model_state["count"] + 1,
            "flag": ~model_state["flag"],
            "key": jax.random.fold_in(model_state["key"], 1),
            "mean": jnp.mean(batch.examples, where=batch.where),
        }
        return jnp.sum((params - new["mean"]) ** 2), None, model_state | new

    tx = nnlearn.sgd(0.1)
    state = nnlearn.init_state(jnp.zeros(2), tx, model_state=start)
    batch = nnlearn.data.MaskedBatch(jnp.arange(8.0), jnp.arange(8) < 3)  # the second half is masked entirely
    whole = jax.jit(nnlearn.make_step(loss_fn, tx))
    parts = jax.jit(nnlearn.make_step(loss_fn, tx, microbatches=2))
    spread = nnlearn.make_step(loss_fn, tx, axis_name="device")
    mesh = jax.make_mesh((2,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    sharded = jax.jit(jax.shard_map(spread, mesh=mesh, in_specs=(spec(), spec("device")), out_specs=(spec(), spec())))
    for step in (whole, parts, sharded):
        got = step(state, batch)[0]
        got = step(got, batch)[0].model_state
        assert step._cache_size() <= (1 if step is not sharded else 2)  # its placement may change once
        assert int(got["count"]) == 2**31 + 3 and not got["flag"] and got["mean"] == 1.0
        assert jnp.all(got["mask"] == start["mask"])
        expected = jax.random.fold_in(jax.random.fold_in(start["key"], 1), 1)
        assert jnp.all(jax.random.key_data(got["key"]) == jax.random.key_data(expected))


def test_equinox_modules_are_treated_as_trees_not_as_functions():
    eqx = equinox()
    module = eqx.nn.MLP(5, 3, 8, 1, key=KEY)
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def loss_fn(params, batch, key):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(batch["x"]), batch)

    sampler = nnlearn.generated(lambda key, step: {"x": POINTS[0], "y": LABELS[0]})
    state, trace = nnlearn.make_train(loss_fn, TX, sampler, params, steps=2)({}, KEY)
    assert trace.loss[1] < trace.loss[0]
    matrices = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    tx = optax.chain(TX, nnlearn.freeze(matrices))
    state = nnlearn.init_state(params, tx, packed=True, labels=matrices)
    moved = jax.jit(nnlearn.make_step(loss_fn, tx))(state, {"x": POINTS[0], "y": LABELS[0]})[0].params
    np.testing.assert_array_equal(moved.layers[0].weight, module.layers[0].weight)
    assert not np.array_equal(moved.layers[0].bias, module.layers[0].bias)
    with pytest.raises(TypeError, match="'activation' is a .*, not an array; keep it out of params"):
        nnlearn.init_state(module, TX)


@pytest.mark.parametrize("tx", [TX, nnlearn.adamw(1e-2, weight_decay=0.1), nnlearn.lion(1e-2)])
def test_params_may_hold_leaves_without_gradient(tx):
    eqx = equinox()
    module = eqx.nn.MLP(5, 3, 8, 1, key=KEY)
    params = eqx.filter(module, eqx.is_inexact_array)
    state = tx.init(params)
    expected, _ = tx.update(params, state, params)
    got, _ = tx.update(params, state, module)  # as optax allows
    assert got.activation is None
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.slow
def test_a_loss_that_calls_the_module_itself_trains_too():
    def straight(params, batch, key):
        return cross_entropy(Perceptron().apply({"params": params}, batch["x"], False, rngs={"dropout": key}), batch)

    model = from_linen(Perceptron(), POINTS[0])
    assert_close(trained(model, POINTS, straight).params, trained(model, POINTS).params)

    graph, params, rest = nnx.split(Normed(nnx.Rngs(0)), nnx.Param, ...)

    def straight_nnx(params, batch, key, model_state):  # including random streams in the state
        module = nnx.merge(graph, params, model_state)
        loss = cross_entropy(module(batch["x"]), batch)
        return loss, None, nnx.state(module, nnx.Not(nnx.Param))

    for microbatches in (1, 2):
        step = jax.jit(nnlearn.make_step(straight_nnx, TX, microbatches=microbatches))
        state = nnlearn.init_state(params, TX, model_state=rest, packed=True)
        for batch in batches_of(POINTS) * 2:
            state, info = step(state, batch)
        assert step._cache_size() == 1 and jnp.isfinite(info.loss)
        assert state.model_state["dropout"]["rngs"]["count"][...] == 8


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="module must be an instance of flax.linen.Module, got <class"):
        from_linen(Perceptron)
    with pytest.raises(ValueError, match="train_argument='training' is not an argument of the module"):
        from_linen(Perceptron(), POINTS[0], train_argument="training")
    with pytest.raises(TypeError, match="module must make a flax.nnx.Module, it made 3"):
        from_nnx(lambda rngs: 3)
    with pytest.raises(ValueError, match="takes a state, but there is none: make it with equinox.nn.make_with_state"):
        from_equinox(equinox_net()(KEY)[0])
    with pytest.raises(TypeError, match="module must be or make an equinox.Module, got 3"):
        from_equinox(lambda key: 3)


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    import sys

    for package, make, extra in (("flax.linen", from_linen, "flax"), ("equinox", from_equinox, "equinox")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf'pip install "nnlearn\[{extra}\]"'):
            make(None)


def test_the_first_packed_tree_may_be_made_within_a_trace(monkeypatch):
    """Flax learns the type of random keys then, which is not that of a traced key."""
    monkeypatch.setattr(nnlearn.Packed, "_is_known_to_flax", False)
    jax.jit(lambda: nnlearn.pack({"w": jnp.ones(3)}).buffers)()
    module, words = nn.Embed(3, 2), jnp.array([0, 2])
    assert jax.jit(lambda key: module.apply(module.init(key, words), words))(jax.random.key(0)).shape == (2, 2)
