"""Functions that remember what they were made from.

``adam(1e-3)`` returns closures, and two closures are never equal: an optimizer made twice compiles twice when it is a
static argument of ``jax.jit``. A factory marked ``comparable`` returns functions that compare and hash by the factory
and its settings, and that print them.
"""

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import numpy as np

from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs

Factory = TypeVar("Factory", bound=Callable)


def _frozen(value: Any) -> Hashable:
    """A hashable stand-in for one setting: by value where that is cheap and safe, else by identity."""
    if isinstance(value, jax.core.Tracer):
        return ("tracer", id(value))
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return (type(value).__name__, value)
    if isinstance(value, type | np.dtype):
        try:
            return ("dtype", np.dtype(value).name)
        except TypeError:
            return ("type", value)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        if value.size > 64:  # reading a large array back from a device costs more than a missed match
            return ("array", id(value))
        return ("array", str(value.dtype), value.shape, np.asarray(value).tobytes())
    leaves, treedef = jax.tree.flatten(value, is_leaf=lambda node: node is not value)
    if treedef != jax.tree.structure(0):
        return ("tree", treedef, tuple(_frozen(leaf) for leaf in leaves))
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return value


class Made:
    """A function together with the factory and the settings that made it.

    Calls go straight through. Two are equal when the same factory made them with equal settings.
    """

    def __init__(self, function: Callable, factory: Callable, arguments: dict[str, Any], part: str = ""):
        functools.update_wrapper(self, function)  # also keeps inspect.signature honest, through __wrapped__
        self._function, self._factory, self._arguments, self._part = function, factory, arguments, part

    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)

    @functools.cached_property
    def _identity(self) -> Hashable:
        bound = inspect.signature(self._factory).bind_partial()
        bound.apply_defaults()
        arguments = bound.arguments | self._arguments  # adam(0.1) is adam(0.1, b1=0.9)
        frozen = tuple((name, _frozen(value)) for name, value in sorted(arguments.items()))
        return (self._factory, self._part, frozen)

    def __eq__(self, other) -> bool:
        return isinstance(other, Made) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._arguments.items())
        return f"{self._factory.__name__}({settings})" + (f".{self._part}" if self._part else "")


def comparable(factory: Factory) -> Factory:
    """Mark a factory of functions or of gradient transformations, so that equal settings give equal results.

    Numbers, strings, dtypes and small arrays compare by value; tracers, large arrays and foreign objects that cannot be
    hashed compare by identity; functions made by a comparable factory compare by *their* settings.

    >>> import nnlearn
    >>> nnlearn.adam(1e-3) == nnlearn.adam(1e-3), nnlearn.adam(1e-3) == nnlearn.adam(1e-4)
    (True, False)
    >>> nnlearn.adam(1e-3, b1=0.8).update
    adam(learning_rate=0.001, b1=0.8).update
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args, **kwargs):
        made = factory(*args, **kwargs)
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        if isinstance(made, GradientTransformation):
            kind = type(made) if isinstance(made, GradientTransformationExtraArgs) else GradientTransformation
            return tuple.__new__(
                kind, (Made(made.init, make, arguments, "init"), Made(made.update, make, arguments, "update"))
            )
        return Made(made, make, arguments)

    return make
