"""Networks of flax and equinox: they train unchanged, and as the loops of their own documentation train them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnlearn
from nnlearn.models.adapters import from_equinox, from_linen, from_nnx
from nnlearn.models.adapters.mode import mode_flags

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
    """Equal but for rounding, each leaf relative to its own norm."""
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
        self.sow(nnx.Intermediate, "inputs", x)
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


RESNET = from_linen(ResNet(), IMAGES[0])
TRANSFORMER = from_nnx(Transformer)
NORMED = from_nnx(Normed)


# --- linen ----------------------------------------------------------------------------------------------------------


def test_a_linen_resnet_trains_as_in_flaxs_own_loop():
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

    running = {"params": state.params, **state.model_state}  # at inference, as flax itself would
    assert_close(RESNET.apply(state.params, state.model_state, IMAGES[0])[0], ResNet().apply(running, IMAGES[0], False))


def test_a_linen_module_without_state_is_a_model_and_its_flag_may_be_named_or_a_field():
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
    """The loop of nnx's documentation; random streams are set to the step's key as the adapter sets them."""
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


@pytest.mark.parametrize(("net", "model", "inputs"), [(Transformer, TRANSFORMER, TOKENS), (Normed, NORMED, POINTS)])
def test_an_nnx_module_trains_as_in_nnxs_own_loop(net, model, inputs):
    state = trained(model, inputs)
    make = nnx.jit(lambda: net(nnx.Rngs(KEY)))  # all at once, which takes less time
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

    mine = make()  # and the numbers go back into a module
    nnx.update(mine, state.params, state.model_state or {})
    mine.eval()
    assert_close(forward(mine), outputs)


def test_an_nnx_models_randomness_is_its_keys_and_each_layers_own():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, rngs=None, training=False):
            assert (rngs is not None) == training
            return self.first(x), self.second(x), self.first(x)

    model = from_nnx(Twice)
    assert model.init(KEY) == {}
    x = jnp.ones((8, 16))
    first, second, again = model.apply({}, x, KEY)
    assert not np.array_equal(first, second) and not np.array_equal(first, again)
    np.testing.assert_array_equal(model.apply({}, x, KEY)[0], first)
    assert not np.array_equal(model.apply({}, x, jax.random.key(1))[0], first)
    np.testing.assert_array_equal(model.apply({}, x)[1], x)


def test_an_nnx_module_that_is_given_begins_with_its_numbers_of_now():
    module = Normed(nnx.Rngs(0))
    model = from_nnx(module)
    assert model == from_nnx(module)
    module.first.kernel[...] = module.first.kernel[...] + 1
    params, model_state = model.init(KEY)
    np.testing.assert_allclose(module.first.kernel[...], params["first"]["kernel"] + 1)
    assert model != from_nnx(module) and sorted(model_state) == ["norm"]
    with pytest.raises(ValueError, match="has 'first/bias', the given numbers do not"):
        model.apply({"first": {}}, model_state, POINTS[0])


# --- equinox --------------------------------------------------------------------------------------------------------
