"""Settings that compare equal must give the same program; a false inequality only costs a compilation."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnlearn
from nnlearn.settings import comparable


@comparable
def factory(value=None, *, other=1.0):
    return lambda x: (value, other, x)


class First:
    pass


class Second:
    pass


@dataclasses.dataclass
class Mutable:
    rate: float

    def __call__(self, step):
        return self.rate


SAME = [
    (0.1, 0.1),
    (float("nan"), float("nan")),
    (jnp.bfloat16, jnp.dtype("bfloat16")),
    (np.dtype("float32"), jnp.float32),
    (np.arange(200.0), np.arange(200.0)),
    (jnp.float32(0.1), jnp.float32(0.1)),
    ({"a": True, "b": [1, 2]}, {"a": True, "b": [1, 2]}),
    (jax.random.key(1), jax.random.key(1)),
    (First, First),
    (nnlearn.cosine_decay_schedule(0.1, 10), nnlearn.cosine_decay_schedule(0.1, 10)),
]
DIFFERENT = [
    (0.0, -0.0),
    (1, 1.0),
    (1, True),
    (0.1, jnp.float32(0.1)),
    (First, Second),
    (First(), First()),
    (jax.random.key(0), jax.random.PRNGKey(0)),
    (jax.random.key(0), jax.random.key(1)),
    (jax.random.key(0, impl="rbg"), jax.random.key(0, impl="unsafe_rbg")),
    (np.arange(200.0), np.arange(200.0) + 1e-9),
    (np.zeros(2, np.float32), np.zeros(2, np.int32)),
    ({"a": True}, {"a": False}),
    (lambda: 0, lambda: 0),
    (Mutable(0.1), Mutable(0.1)),
    (nnlearn.cosine_decay_schedule(0.1, 10), nnlearn.cosine_decay_schedule(0.1, 11)),
]


@pytest.mark.parametrize(("left", "right"), SAME, ids=[str(i) for i in range(len(SAME))])
def test_equal_settings(left, right):
    assert factory(left) == factory(right) and hash(factory(left)) == hash(factory(right))
    assert factory(left) != factory(left, other=2.0)


@pytest.mark.parametrize(("left", "right"), DIFFERENT, ids=[str(i) for i in range(len(DIFFERENT))])
def test_different_settings(left, right):
    assert factory(left) != factory(right)


def test_settings_are_copied_when_given():
    decay = np.array(0.9)
    before = nnlearn.scale_by_adam(b1=decay)
    decay[...] = 0.0
    assert before != nnlearn.scale_by_adam(b1=decay)
    table = np.full(100, 0.1)
    first = factory(table)
    table[:] = 0.5
    assert first != factory(table)
    schedule = Mutable(0.1)
    tx = nnlearn.sgd(schedule)
    schedule.rate = 0.5
    assert tx != nnlearn.sgd(schedule)


def test_temporary_objects_of_a_pytree_are_not_confused():
    class Node:
        def __init__(self, value):
            self.value = value

    jax.tree_util.register_pytree_node(
        Node, lambda node: ((jnp.full(100, node.value),), None), lambda _, leaves: Node(leaves[0])
    )
    made = [factory(Node(float(value))) for value in range(20)]
    assert all(other != made[0] for other in made[1:])


def test_tracers_never_equal_others():
    seen = []

    @jax.jit
    def trace_two(a, b):
        seen.append((nnlearn.sgd(a) == nnlearn.sgd(b), nnlearn.sgd(a) == nnlearn.sgd(a)))
        return a

    trace_two(0.1, 0.1)
    assert seen == [(False, True)]


def test_plain_transformations_may_be_marked_too():
    @comparable
    def halve():
        return optax.GradientTransformation(lambda params: (), lambda updates, state, params=None: (updates / 2, state))

    assert halve() == halve()
    assert (
        float(optax.chain(halve(), nnlearn.sgd(1.0)).update(jnp.ones(()), ((), nnlearn.sgd(1.0).init(1.0)))[0]) == -0.5
    )


def test_accumulation_can_be_copied_and_marked():
    tx = nnlearn.MultiSteps(nnlearn.sgd(0.1), 2)
    assert copy.deepcopy(tx).inner_opt.init(jnp.zeros(1))[0] == tx.inner_opt.init(jnp.zeros(1))[0]

    @comparable
    def every_other(rate):
        return nnlearn.MultiSteps(nnlearn.sgd(rate), 2)

    assert every_other(0.1) == every_other(0.1) != every_other(0.2)
    assert every_other(0.1).inner_opt == nnlearn.sgd(0.1)
