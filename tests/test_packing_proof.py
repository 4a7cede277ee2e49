"""``packing_difference`` accepts only transformations that are proven equal: chosen cases and random ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from packing_grammar import KNOWN_BY_LEAF, norm, on_leaves, random_transformation
from packing_runs import differs, random_problem

import nnlearn
from nnlearn import packing_difference
from nnlearn.packing import is_packed, pack_like, unpack

SHAPES = {"a": (2,), "b": (2, 3), "c": (4,), "one": (1,)}


def tree_of(dtype=jnp.float32, shapes=SHAPES, seed=0):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=shape), dtype) for name, shape in shapes.items()}


def mixed():
    return tree_of() | {"half": tree_of(jnp.bfloat16)}


def with_loss(change):
    """A transformation from ``change(value_fn, updates, params)``."""

    def update(updates, state, params, *, value_fn, **extra):
        return change(value_fn, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def ascended(value_fn, updates, params):
    """The gradient after a step of ascent, as in sharpness-aware minimisation."""
    length = optax.tree.norm(updates)
    return jax.grad(value_fn)(jax.tree.map(lambda p, u: p + 0.05 * u / length, params, updates))


def each(function, tree):
    return jax.tree.map(function, tree)


OF_THE_LOSS = {
    "ascent": (lambda f, u, p: ascended(f, u, p), True),
    "ascent, clipped": (lambda f, u, p: nnlearn.tree.scale_tree(g := ascended(f, u, p), 1 / optax.tree.norm(g)), True),
    "gradient": (lambda f, u, p: each(jnp.tanh, jax.grad(f)(p)), True),
    "value": (lambda f, u, p: each(lambda x: x * f(p), u), True),
    "slope along the update": (lambda f, u, p: each(lambda x: x * jax.jvp(f, (p,), (u,))[1], u), True),
    "second derivative": (lambda f, u, p: jax.jvp(jax.grad(f), (p,), (u,))[1], True),
    "second derivative in reverse": (lambda f, u, p: jax.vjp(jax.grad(f), p)[1](u)[0], True),
    "checkpoint": (lambda f, u, p: jax.grad(jax.checkpoint(f))(p), True),
    "in a branch": (
        lambda f, u, p: jax.lax.cond(f(p) > 0, lambda: jax.grad(f)(p), lambda: u),
        True,
    ),
    "largest entry of each leaf": (lambda f, u, p: each(lambda g: g / jnp.max(jnp.abs(g)), ascended(f, u, p)), False),
    "leaves that are finite": (
        lambda f, u, p: each(lambda g: jnp.where(jnp.all(jnp.isfinite(g)), g, 0), ascended(f, u, p)),
        False,
    ),
    "norm of each leaf": (lambda f, u, p: each(lambda g: g / norm(g), jax.grad(f)(p)), False),
    "norm of each leaf's curvature": (
        lambda f, u, p: each(lambda h: h / norm(h), jax.jvp(jax.grad(f), (p,), (u,))[1]),
        False,
    ),
    "value where a leaf is zero": (
        lambda f, u, p: each(lambda x: x * f(u), on_leaves(lambda xs: [0 * xs[0], *xs[1:]], u)),
        False,
    ),
    "value of one array": (lambda f, u, p: each(lambda x: x * f(jax.tree.leaves(p)[0]), u), False),
}


@pytest.mark.parametrize("name", OF_THE_LOSS)
def test_nothing_is_assumed_about_the_loss(name):
    change, accepted = OF_THE_LOSS[name]
    assert (packing_difference(with_loss(change), tree_of()) == "") is accepted


def by_callback(value, function):
    return jax.pure_callback(function, jax.ShapeDtypeStruct((), jnp.float32), value)


def in_a_loop(function):
    return jax.lax.fori_loop(0, 2, lambda _, x: by_callback(x, function), jnp.float32(0.5))


FUNCTIONS = {
    1: lambda x: np.float32(np.sin(x)),
    4: lambda x: np.float32(np.cos(x)),
    0: lambda x: np.float32(x / 2),
}


def first_two(function):
    return optax.stateless(lambda updates, params: on_leaves(function, updates))


HIDDEN = {
    "functions in a loop": first_two(lambda leaves: [x * in_a_loop(FUNCTIONS[len(leaves)]) for x in leaves]),
    "large constants in a loop": first_two(
        lambda leaves: [
            x * jax.lax.fori_loop(0, 2, lambda _, t: t * np.linspace(1, len(leaves), 2000, dtype=np.float32)[999], 1.0)
            for x in leaves
        ]
    ),
    **{name: KNOWN_BY_LEAF[name]() for name in ("ageing", "remembering", "counting", "leaf counts", "of a dict")},
}


@pytest.mark.parametrize("name", HIDDEN)
def test_differences_that_the_program_does_not_show(name):
    assert packing_difference(HIDDEN[name], tree_of()) != ""


def test_a_function_in_a_loop_is_recognised_as_the_same():
    tx = first_two(lambda leaves: [x * in_a_loop(FUNCTIONS[0]) for x in leaves])
    assert packing_difference(tx, tree_of()) == ""


def test_a_callback_may_return_another_value_at_every_call():
    def ask(x):
        return x * jax.experimental.io_callback(lambda: np.float32(1), jax.ShapeDtypeStruct((), jnp.float32))

    assert packing_difference(optax.stateless(lambda u, p: each(ask, u)), tree_of()) != ""
    once = optax.stateless(lambda u, p: (jax.debug.print("step"), each(jnp.sin, u))[1])
    assert packing_difference(once, tree_of()) == ""


def test_the_state_is_followed_until_its_structure_is_stable():
    def update(updates, state, params=None):
        return each(lambda u: u * state, updates), (state + 1).astype(jnp.float32)

    settles = optax.GradientTransformation(lambda params: jnp.zeros([], jnp.bfloat16), update)
    assert packing_difference(settles, tree_of()) == ""
    grows = optax.GradientTransformation(
        lambda params: jnp.zeros([1]),
        lambda updates, state, params=None: (updates, jnp.concatenate([state, state])),
    )
    assert "changes its structure, shapes or dtypes" in packing_difference(grows, tree_of())


CLIPS = {
    "clip_by_global_norm": lambda: nnlearn.clip_by_global_norm(0.5),
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(0.5),
    "clip": lambda: nnlearn.clip(0.3),
    "clip_by_block_rms": lambda: nnlearn.clip_by_block_rms(0.3),
    "adaptive_grad_clip": lambda: nnlearn.adaptive_grad_clip(0.1),
    "optax.clip": lambda: optax.clip(0.3),
    "optax.zero_nans": optax.zero_nans,
    "optax.normalize_by_update_norm": optax.normalize_by_update_norm,
    "optax.clip_by_block_rms": lambda: optax.clip_by_block_rms(0.3),
    "optax.adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
}
MANY = {f"{name}{at}": shape for at, shape in enumerate([(5, 7), (9,)]) for name in "abcdefghi"}


def numbers(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, jnp.bfloat16) for name in CLIPS), *((name, jnp.float16) for name in list(CLIPS)[:2])]
)
def test_parameters_are_not_packed_by_default_for_a_clip_in_low_precision(name, dtype):
    tx, params, gradient = CLIPS[name](), tree_of(dtype, MANY), tree_of(dtype, MANY, seed=1)
    stored = nnlearn.init_state(params, tx).stored
    assert is_packed(stored) is (name == "optax.clip" or not name.startswith("optax"))
    if not is_packed(stored):
        with pytest.raises(ValueError, match="packed=True, but this optimizer .* by_leaf"):
            nnlearn.init_state(params, tx, packed=True)
        assert packing_difference(nnlearn.by_leaf(tx), params) == ""
        return
    update = jax.jit(lambda gradient, params: tx.update(gradient, tx.init(params), params)[0])
    one, other = numbers(update(gradient, params)), numbers(unpack(update(pack_like(stored.layout, gradient), stored)))
    assert np.all(np.abs(one - other) <= float(jnp.finfo(dtype).eps) * np.abs(one))
    assert np.mean(one != other) <= 0.01  # where a product rounds in the other direction
    if name == "clip_by_global_norm":
        exact = numbers(gradient)
        expected = exact * 0.5 / np.linalg.norm(exact)
        for found in (one, other):
            smallest = float(jnp.finfo(dtype).smallest_subnormal)
            np.testing.assert_allclose(found, expected, rtol=float(jnp.finfo(dtype).eps), atol=smallest)


def wide(leaves):
    return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves)


LOW_SUMS = {
    "sum in float32": (lambda x: x, wide, True),
    "largest": (lambda x: x, lambda leaves: jnp.max(jnp.stack([jnp.max(x) for x in leaves])).astype(jnp.float32), True),
    "count": (lambda x: x, lambda leaves: sum(jnp.sum(x > 0) for x in leaves).astype(jnp.float32), True),
    "sum rounded": (lambda x: x, lambda leaves: wide(leaves).astype(jnp.bfloat16), False),
    "root of it rounded": (lambda x: x, lambda leaves: jnp.sqrt(abs(wide(leaves))).astype(jnp.float16), False),
    "fewer bits": (lambda x: x, lambda leaves: jax.lax.reduce_precision(wide(leaves), 8, 7), False),
    "sums in bfloat16": (lambda x: x.astype(jnp.bfloat16), lambda leaves: sum(map(jnp.sum, leaves)), False),
    "sums by dot": (lambda x: x.astype(jnp.bfloat16), lambda leaves: sum(jnp.vdot(x, x) for x in leaves), False),
    "rounded in a loop": (
        lambda x: x,
        lambda leaves: jax.lax.fori_loop(0, 2, lambda _, s: s.astype(jnp.bfloat16).astype(jnp.float32), wide(leaves)),
        False,
    ),
}


@pytest.mark.parametrize("name", LOW_SUMS)
def test_sums_below_float32_count_as_a_difference(name):
    before, total, accepted = LOW_SUMS[name]
    tx = optax.stateless(
        lambda u, p: each(lambda x: x * total([before(leaf) for leaf in jax.tree.leaves(u)]).astype(jnp.float32), u)
    )
    found = packing_difference(tx, tree_of())
    assert (found == "") is accepted
    assert accepted or "below float32" in found
    assert packing_difference(nnlearn.by_leaf(tx), tree_of()) == ""
    assert packing_difference(tx, {"alone": jnp.ones(3)}) == ""


def test_the_message_names_the_dtype_and_the_cure():
    with pytest.raises(ValueError, match=r"a sum in bfloat16, below float32, .*nnlearn's norms.*by_leaf"):
        nnlearn.init_state(mixed(), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), packed=True)
    assert is_packed(nnlearn.init_state(mixed(), nnlearn.clip_by_global_norm(1.0), packed=True).stored)
    assert packing_difference(nnlearn.by_leaf(optax.clip_by_global_norm(1.0)), mixed()) == ""
    assert packing_difference(optax.clip_by_global_norm(1.0), tree_of()) == ""


@pytest.mark.slow
def test_random_transformations_are_never_accepted_wrongly():
    """Accepted transformations take three steps with packed parameters and with leaves."""
    accepted = honest = 0
    with jax.enable_x64(True):
        for number in range(110):
            problem, (text, tx, is_honest) = random_problem(number), random_transformation(number)
            if packing_difference(tx, problem.params, problem.labels) == "":
                accepted, honest = accepted + 1, honest + is_honest
                assert not differs(lambda number=number: random_transformation(number)[1], problem), (number, text)
    assert accepted >= 55 and honest >= 40
