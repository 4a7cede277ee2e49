"""Registration of training states with ``jax.export``, so that exported steps and runs can be loaded."""

import contextlib
import inspect
import sys
from typing import Any

import jax.export
import optax

# modules of the named tuples that a step or a run takes or returns
ROOMS = ("nnlearn.train.state", "nnlearn.train.step", "nnlearn.train.loop", "nnlearn.train.verdict")
ROOMS += ("nnlearn.gradients.noise_scale", "nnlearn.transforms.", "nnlearn.data", "nnlearn.models.", "nnlearn.losses.")


def register_for_export() -> None:
    """Register nnlearn's named tuples of arrays, and optax's states, with ``jax.export``.

    ``import nnlearn`` calls it. Exported programs can then take and return training states.

    >>> import jax.numpy as jnp, nnlearn
    >>> state = nnlearn.adam(0.1).init(jnp.ones(2))
    >>> with nnlearn.native_kernels(False):
    ...     exported = jax.export.export(jax.jit(lambda state: state))(state)
    >>> loaded = jax.export.deserialize(exported.serialize())
    >>> jax.tree.structure(loaded.call(state)) == jax.tree.structure(state)
    True
    """
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith(ROOMS)]
    for module in modules:
        for kind in vars(module).values():
            if getattr(kind, "__module__", None) == module.__name__:
                _register(kind, f"nnlearn.{kind.__name__}")
    for name, kind in vars(optax).items():
        if name.endswith(("State", "Node")):
            _register(kind, f"optax.{name}")


def _register(kind: Any, name: str) -> None:
    if not inspect.isclass(kind) or not issubclass(kind, tuple) or not hasattr(kind, "_fields"):
        return
    with contextlib.suppress(ValueError):  # already registered
        jax.export.register_namedtuple_serialization(kind, serialized_name=name)


__all__ = ["register_for_export"]
