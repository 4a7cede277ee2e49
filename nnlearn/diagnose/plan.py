"""The batches of a run, drawn ahead: indices into the examples, or whole batches that are generated."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.data import MaskedBatch, example_count
from nnlearn.train.sampler import Sampler
from nnlearn.types import Batch, Key, PyTree

AHEAD = 128 << 20  # bytes of generated batches that are drawn ahead


class Plan(NamedTuple):
    """The batches of the first steps of a run.

    Attributes:
      examples: all examples, or None.
      rows: what ``batch`` takes for each step, stacked along a leading axis: indices, batches, or keys.
      sampler: makes the batches of keys; None if they are indices or drawn.
    """

    examples: Batch | None
    rows: PyTree
    sampler: Sampler | None = None

    def batch(self, row: PyTree, examples: Batch | None = None) -> Batch:
        """The batch of one row; ``examples`` in place of the plan's own, so that a program need not hold them."""
        if self.sampler is not None:
            return self.sampler.batch(row)
        examples = self.examples if examples is None else examples
        if examples is None:
            return row
        if isinstance(row, MaskedBatch):
            return MaskedBatch(jax.tree.map(lambda array: array[row.examples], examples), row.where)
        return jax.tree.map(lambda array: array[row], examples)

    def at(self, steps: Any) -> PyTree:
        """The rows of some steps."""
        return jax.tree.map(lambda leaf: leaf[steps], self.rows)

    def batches(self, steps: Any) -> Batch:
        """The batches of some steps, stacked."""
        return jax.jit(jax.vmap(self.batch), compiler_options=quick())(self.at(np.asarray(steps)))


def make_plan(sampler: Sampler, data_key: Key, steps: int) -> Plan:
    """Draw the batches of the first ``steps`` steps.

    >>> from nnlearn.train.sampler import shuffled
    >>> plan = make_plan(shuffled(jnp.arange(0, 60, 10), 2, shuffle=False, remainder="drop"), jax.random.key(0), 4)
    >>> plan.batches([0, 3]).tolist()
    [[0, 10], [0, 10]]
    """
    if sampler.over is not None:
        assert sampler.examples is not None
        examples = sampler.examples()
        rows = _drawn(sampler.over(jnp.arange(example_count(examples))), data_key, steps)
        return Plan(examples, on_host(rows))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_shape(sampler, data_key)))
    if size * steps <= AHEAD:
        return Plan(None, on_host(_drawn(sampler, data_key, steps)))
    return Plan(None, sampler.rows(data_key, sampler.start(data_key, 1), 0, steps, 1)[1], sampler)


def on_host(tree: PyTree) -> PyTree:
    """The leaves as NumPy arrays, except random keys: small operations on them need no compilation."""
    return jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf), tree
    )


def _shape(sampler: Sampler, data_key: Key) -> PyTree:
    """The shapes of one batch."""
    return jax.eval_shape(lambda key: _drawn_inside(sampler, key, 1), data_key)


def _drawn(sampler: Sampler, data_key: Key, steps: int) -> Batch:
    # Compiled without optimisation: it runs once.
    return jax.jit(lambda key: _drawn_inside(sampler, key, steps), compiler_options=quick())(data_key)


def _drawn_inside(sampler: Sampler, data_key: Key, steps: int) -> Batch:
    _, rows = sampler.rows(data_key, sampler.start(data_key, steps), 0, steps, steps)
    return jax.lax.map(sampler.batch, rows)


@functools.cache
def quick() -> dict[str, int]:
    """Options for programs that run once: compiling them takes longer than running them.

    A function, because asking for the backend starts it, which an import must not do.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


__all__ = ["Plan", "make_plan", "on_host", "quick"]
