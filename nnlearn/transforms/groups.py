"""Different transformations for different leaves, by a rule that sees the leaves, packed or not."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from optax import MaskedState, PartitionState, partition, with_extra_args_support

from nnlearn.packing import Packed, is_packed
from nnlearn.packing.parts import divide, join
from nnlearn.settings import comparable
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, Params, PyTree


@comparable
def by_label(
    transforms: Mapping[Any, GradientTransformation], labels: Callable[[Params], PyTree]
) -> GradientTransformationExtraArgs:
    """``optax.partition`` by a rule about leaves, which also divides packed parameters by leaf.

    ``optax.partition`` sees the buffers of packed parameters, and needs ``pack(labels=...)`` and ``per_buffer``. Here
    the leaves of each label are taken out of the buffers, which costs a copy of gradients and parameters.

    Args:
      transforms: a transformation for each label.
      labels: maps the parameters, or a tree of their shapes, to a tree of labels; a prefix of the tree is enough.

    Returns:
      A transformation with optax's ``PartitionState``.

    Raises:
      ValueError: if a leaf has a label without a transformation.

    >>> import jax.numpy as jnp, nnlearn
    >>> rule = lambda params: jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "other", params)
    >>> tx = by_label({"matrix": nnlearn.scale(-1.0), "other": nnlearn.scale(-3.0)}, rule)
    >>> packed = nnlearn.pack({"w": jnp.ones((1, 2)), "b": jnp.ones(2)})
    >>> updates, state = tx.update(packed, tx.init(packed))
    >>> updates["w"], updates["b"]
    (Array([[-1., -1.]], dtype=float32), Array([-3., -3.], dtype=float32))
    """
    by_tree: Any = partition(transforms, labels)
    inner: dict[Any, Any] = {label: with_extra_args_support(tx) for label, tx in transforms.items()}

    def labels_of(packed: Packed) -> list[Any]:
        tree = packed.layout.tree()
        spread = jax.tree.map(lambda label, part: jax.tree.map(lambda _: label, part), labels(tree), tree)
        found = jax.tree.leaves(spread)
        if unknown := sorted(set(found) - set(inner)):
            raise ValueError(f"labels gives {unknown}, but transforms has {sorted(inner)}")
        return found

    def init(params):
        if not is_packed(params):
            return by_tree.init(params)
        parts = divide(params, labels_of(params), inner)
        return PartitionState({label: MaskedState(tx.init(parts[label])) for label, tx in inner.items()})

    def update(updates, state, params=None, **extra_args) -> Any:
        if not is_packed(updates):
            return by_tree.update(updates, state, params, **extra_args)
        found = labels_of(updates)
        parts = divide(updates, found, inner)
        held: dict[Any, Any] = dict.fromkeys(inner) if params is None else divide(params, found, inner)
        changes, states = {}, {}
        for label, tx in inner.items():
            inner_state = state.inner_states[label].inner_state
            changes[label], new_state = tx.update(parts[label], inner_state, held[label], **extra_args)
            states[label] = MaskedState(new_state)
        return join(updates.layout, found, changes), PartitionState(states)

    return GradientTransformationExtraArgs(init, update)


__all__ = ["by_label"]
