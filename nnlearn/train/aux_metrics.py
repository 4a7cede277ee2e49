"""Metrics from the records of steps: ``aux/<path>`` is the mean of a scalar in ``info.aux`` since the last check."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from nnlearn.train.stopping import StopRule
from nnlearn.tree import path_name


def is_aux(metric: str) -> bool:
    """Whether the name of a metric refers to ``info.aux``.

    >>> is_aux("aux/accuracy"), is_aux("aux"), is_aux("accuracy")
    (True, True, False)
    """
    return metric == "aux" or metric.startswith("aux/")


def aux_names(rules: Iterable[StopRule], others: Iterable[str] = ()) -> tuple[str, ...]:
    """The names in ``info.aux`` that rules use, and those among ``others``."""
    kept = [rule.keep[0] for rule in rules if rule.keep is not None]
    asked = [*(name for rule in rules for name in rule.metrics), *kept, *others]
    return tuple(sorted({name for name in asked if is_aux(name)}))


def counted_aux(info: Any, name: str) -> jax.Array:
    """A scalar in ``info.aux`` by name, in float32 or wider; 0 for skipped steps.

    Args:
      info: the info of one step, or of many steps with their axis in front.
      name: ``aux/<path>``, or ``aux`` if that is itself a scalar.

    Raises:
      ValueError: if there is no real scalar of that name.

    >>> from nnlearn.train.step import Info
    >>> counted_aux(Info(1.0, None, None, None, {"right": jnp.array(True)}), "aux/right")
    Array(1., dtype=float32)
    """
    axes = jnp.ndim(info.loss)
    scalars = {
        f"aux/{path_name(path)}" if path else "aux": leaf
        for path, leaf in jax.tree.leaves_with_path(getattr(info, "aux", None))
        if jnp.ndim(leaf) == axes and not jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating)
    }
    if name not in scalars:
        raise ValueError(f"there is no metric {name!r}: the real scalars in aux of each step are {sorted(scalars)}")
    value = jnp.asarray(scalars[name])
    value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    skipped = getattr(info, "skipped", None)
    return value if skipped is None else jnp.where(skipped, jnp.zeros_like(value), value)


__all__ = ["aux_names", "counted_aux", "is_aux"]
