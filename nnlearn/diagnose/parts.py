"""Inputs and targets in a tree of examples: taken apart, and put together again."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from nnlearn.data import MaskedBatch
from nnlearn.types import Batch

INPUTS = (
    "inputs", "input", "x", "xs", "X", "image", "images", "features", "tokens", "data", "source", "src", "input_ids",
)  # fmt: skip
TARGETS = ("targets", "target", "y", "ys", "Y", "label", "labels", "tgt", "output", "outputs")


class Unknown(Exception):
    """Something that a check needs is not there; the message says what."""


def parts_of(examples: Batch) -> tuple[Any, Any]:
    """The inputs and the targets in a tree of examples.

    Raises:
      Unknown: if they cannot be told apart.

    >>> parts_of({"x": 1, "y": 2}), parts_of((3, 4))
    ((1, 2), (3, 4))
    """
    if hasattr(examples, "inputs") and hasattr(examples, "targets"):
        return examples.inputs, examples.targets
    if isinstance(examples, Mapping):
        inputs, targets = names_of(examples)
        return examples[inputs], examples[targets]
    if isinstance(examples, tuple | list) and len(examples) >= 2:
        return examples[0], examples[1]
    if hasattr(examples, "shape"):
        return examples, None
    raise Unknown(f"the examples are a {type(examples).__name__}, in which inputs and targets are not known")


def names_of(examples: Mapping) -> tuple[Any, Any]:
    """The names of the inputs and of the targets; of two names, one that is known tells the other.

    Raises:
      Unknown: if they cannot be told apart.

    >>> names_of({"text": 1, "label": 2}), names_of({"image": 1, "text": 2})
    (('text', 'label'), ('image', 'text'))
    """
    inputs = [name for name in INPUTS if name in examples]
    targets = [name for name in TARGETS if name in examples]
    if len(examples) == 2 and len(inputs) + len(targets) == 1:
        others = [name for name in examples if name not in (*inputs, *targets)]
        inputs, targets = inputs or others, targets or others
    if len(inputs) == 1 and len(targets) == 1:
        return inputs[0], targets[0]
    raise Unknown(f"which of {sorted(map(str, examples))} are inputs and targets is not known")


def parts_like(examples: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
    """The neighbouring members of a tuple that are like given inputs, and the last other member like given targets.

    Raises:
      Unknown: if there are none.

    >>> tokens, mask, label = np.zeros((5, 3), int), np.ones((5, 3), bool), np.ones(5, int)
    >>> parts_like((tokens, mask, label), (tokens[:2], mask[:2]), label[:2]) == ((tokens, mask), label)
    True
    """

    def kinds(tree):
        return [(np.shape(leaf)[1:], np.asarray(leaf).dtype.kind) for leaf in jax.tree.leaves(tree)]

    count = len(examples)
    for first, last in ((i, j) for i in range(count) for j in range(i + 1, count)):
        others = [*examples[:first], *examples[last:]]
        like = [each for each in others if kinds(each) == kinds(targets)]
        if kinds(examples[first:last]) == kinds(inputs) and like:
            leaves = jax.tree.leaves(examples[first:last])
            return jax.tree.unflatten(jax.tree.structure(inputs), leaves), like[-1]
    raise Unknown("the batches hold more than inputs and targets, and none like those of validation")


def with_parts(like: Any, inputs: Any, targets: Any) -> Any:
    """A tree of examples with other inputs and targets.

    Raises:
      Unknown: if the tree has more than inputs and targets.

    >>> with_parts({"x": 1, "y": 2}, 5, 6), with_parts((3, 4), 5, 6)
    ({'x': 5, 'y': 6}, (5, 6))
    """
    if hasattr(like, "inputs") and hasattr(like, "targets") and len(getattr(like, "_fields", ())) in (0, 2):
        return like._replace(inputs=inputs, targets=targets)
    made: Any = type(like)
    if isinstance(like, Mapping) and len(like) == 2:
        first, _ = names_of(like)
        return made({name: inputs if name == first else targets for name in like})
    if isinstance(like, tuple | list) and len(like) == 2:
        return made((inputs, targets)) if not hasattr(like, "_fields") else made(inputs, targets)
    if hasattr(like, "shape"):
        return inputs
    raise Unknown("the batches hold more than inputs and targets")


def map_parts(batch: Any, inputs: Callable[[Any], Any], targets: Callable[[Any], Any] = lambda targets: targets) -> Any:
    """A batch, masked or not, with functions of its inputs and targets in their place.

    Raises:
      Unknown: if they cannot be told apart, or the batch has more than inputs and targets.

    >>> map_parts({"x": 1, "y": 2}, lambda x: 10 * x)
    {'x': 10, 'y': 2}
    """
    if isinstance(batch, MaskedBatch):
        return batch._replace(examples=map_parts(batch.examples, inputs, targets))
    given, wanted = parts_of(batch)
    return with_parts(batch, inputs(given), targets(wanted))


__all__ = ["Unknown", "map_parts", "parts_like", "parts_of", "with_parts"]
