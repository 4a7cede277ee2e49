"""The names of the columns of a run: the values of ``Info`` and the metrics of checks."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.tree import path_name


def info_columns(info: Any, lead: int, leaves: Sequence[str]) -> list[tuple[str, int, int | None]]:
    """The columns of ``info``: for each its name, the index of its leaf, and an index into the last axis or None.

    Args:
      info: ``Info`` whose leaves have the axes of the runs and then the axis of the records in front.
      lead: the number of axes of runs.
      leaves: the names of the parameters.

    >>> from nnlearn.train import Info
    >>> info = Info(np.ones(3), None, None, np.ones((3, 2)), None, np.ones((3, 1)))
    >>> [name for name, _, _ in info_columns(info, 0, ["w"])]
    ['loss', 'learning_rate/0', 'learning_rate/1', 'leaf_grad_norms/w']
    """
    columns: list[tuple[str, int, int | None]] = []
    for at, (path, leaf) in enumerate(jax.tree.leaves_with_path(info)):
        name, axes = path_name(path), np.ndim(leaf) - lead - 1
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            continue
        if axes == 0:
            columns.append((name, at, None))
        elif axes == 1 and name.startswith(("leaf_grad_norms", "learning_rate", "layers/")):
            parts = leaves if name != "learning_rate" and leaves else range(leaf.shape[-1])
            columns += [(f"{name}/{part}", at, index) for index, part in enumerate(parts)]
    return columns


def metric_column(metric: str, taken: Collection[str]) -> str:
    """The column name of a metric, different from the names already taken.

    >>> metric_column("accuracy", ["step", "loss"]), metric_column("loss", ["step", "loss"])
    ('accuracy', 'check/loss')
    """
    while metric in taken:
        metric = f"check/{metric}"
    return metric


__all__ = ["info_columns", "metric_column"]
