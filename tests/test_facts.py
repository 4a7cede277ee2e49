"""Facts that the program of a loss or a network shows."""

import jax
import jax.numpy as jnp
import optax
import pytest

import nnlearn
from nnlearn.programs.facts import inspect_function

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "v": jnp.ones((4, 4)), "unused": jnp.ones(2)}
BATCH = {"x": jnp.ones((5, 3)), "y": jnp.zeros(5, int), "z": jnp.ones(5), "spare": jnp.ones(5)}


def logits(params, batch):
    return jax.nn.relu(batch["x"] @ params["w"] + params["b"][None]) @ params["v"]


def inspected(loss):
    return inspect_function(loss, PARAMS, BATCH, jax.random.key(0))


CUTS = {
    "argmax": lambda h: jnp.argmax(h, axis=1).astype(float),
    "round": jnp.round,
    "stop_gradient": jax.lax.stop_gradient,
    "gt": lambda h: jnp.where(h > 0, 1.0, 0.0),
    "convert_element_type": lambda h: h.astype(int),
}


@pytest.mark.parametrize("name", CUTS)
def test_cut_gradients_are_found(name):
    def loss(params, batch, key):
        h = batch["x"] @ params["w"] + params["b"][None]
        return jnp.sum(CUTS[name](h)) + jnp.sum(params["b"]) + jnp.sum(params["v"])

    found = inspected(loss)
    assert found.params == {"w": "cut", "b": "smooth", "v": "smooth", "unused": "unused"}
    cut = next(fact for fact in found.of_kind("cut") if fact.operation == name)
    assert cut.leaves == ("w",) and cut.where.file == __file__ and cut.layer == "w"


def test_a_straight_through_gradient_and_a_rule_of_its_own_are_not_cut():
    @jax.custom_vjp
    def sign(x):
        return jnp.sign(x)

    sign.defvjp(lambda x: (sign(x), None), lambda _, g: (g,))

    def loss(params, batch, key):
        h = logits(params, batch)
        return jnp.sum(sign(h)) + jnp.sum(h + jax.lax.stop_gradient(jnp.round(h) - h))

    assert set(inspected(loss).params.values()) == {"smooth", "unused"} and not inspected(loss).of_kind("cut")


@pytest.mark.parametrize(("axis", "found"), [(None, 1), (1, 0), (0, 0)])
def test_a_norm_over_all_examples_is_found(axis, found):
    def loss(params, batch, key):
        h = logits(params, batch)
        return jnp.sum(h / jnp.linalg.norm(h, axis=axis, keepdims=True))

    assert len(inspected(loss).of_kind("norm")) == found


def test_a_loop_is_read():
    def loss(params, batch, key):
        def turn(h, x):
            return jnp.tanh(jax.lax.stop_gradient(h) @ params["v"] + x), None

        h, _ = jax.lax.scan(turn, jnp.zeros((5, 4)), jnp.stack([batch["x"] @ params["w"]] * 2))
        return jnp.mean(h * jax.lax.stop_gradient(params["b"])[None])

    assert inspected(loss).params == {"w": "smooth", "b": "cut", "v": "smooth", "unused": "unused"}


SOFTMAXES = {
    "ours": lambda h, y: nnlearn.cross_entropy(h, y),
    "optax": lambda h, y: optax.losses.softmax_cross_entropy_with_integer_labels(h, y).mean(),
    "by hand": lambda h, y: -jnp.mean(jnp.log(jax.nn.softmax(h))[jnp.arange(5), y]),
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmax_of_softmax_and_its_axes(name):
    def loss(params, batch, key):
        return SOFTMAXES[name](jax.nn.softmax(logits(params, batch), axis=0), batch["y"])

    first, second = inspected(loss).of_kind("softmax")
    assert (first.of, first.labels) == (("matmul",), ("batch",))
    assert (second.of, second.labels) == (("softmax",), ("unit",))


def test_unused_inputs_random_numbers_biases_and_half_precision():
    def loss(params, batch, key):
        keep = jax.random.bernoulli(key, 0.5, (5, 4))
        h = jnp.where(keep, logits(params, batch).astype(jnp.bfloat16), 0)
        return jnp.mean(h.astype(jnp.float32) * batch["z"][:, None])

    found = inspected(loss)
    assert found.inputs == {"0/spare": False, "0/x": True, "0/y": False, "0/z": True, "1": True}
    assert [fact.layer for fact in found.of_kind("bias")] == ["b"]
    assert [fact.layer for fact in found.of_kind("product")] == ["w", "v"]
    assert found.of_kind("random")[0].inputs == ("1",)
    assert found.of_kind("half")[0].of == ("matmul",)


def test_means_sums_and_a_silent_broadcast():
    def loss(params, batch, key):
        error = logits(params, batch)[:, :1] - batch["z"][None, :]
        return jnp.sum(jnp.mean(error**2, axis=0)) + nnlearn.mean_squared_error(logits(params, batch)[:, 0], batch["z"])

    found = inspected(loss)
    (pairs,) = found.of_kind("pairs")
    assert pairs.operation == "sub" and pairs.inputs == ("0/x", "0/z")
    sums = [(fact.operation, fact.labels) for fact in found.of_kind("reduction") if "0/z" in fact.inputs]
    assert sums[0] == ("mean", ("batch",)) and sums[1][0] == "reduce_sum" and ("mean", ("batch",)) in sums[2:]


@pytest.mark.parametrize(
    ("function", "guarded"),
    [
        (lambda h: jnp.log(jax.nn.softmax(h)), False),
        (lambda h: jnp.log(jax.nn.softmax(h) + 1e-6), True),
        (lambda h: jnp.log(jnp.maximum(h, 1e-6)), True),
        (lambda h: jnp.sqrt(jnp.sum(h**2)), False),
        (lambda h: 1.0 / (h + 1.0), True),
        (lambda h: 1.0 / jnp.where(h == 0, 1.0, h), True),
    ],
)
def test_guards(function, guarded):
    found = inspected(lambda params, batch, key: jnp.sum(function(logits(params, batch))))
    ours = [fact for fact in found.of_kind("domain") if fact.operation in ("log", "sqrt", "div")]
    assert ours[-1].guarded is guarded
