"""Functions that remember what they were made from.

``adam(1e-3)`` returns closures, and two closures are never equal: an optimizer made twice compiles twice when it is a
static argument of ``jax.jit``. A factory marked ``comparable`` returns functions that compare and hash by the factory
and its settings, and that print them.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import numpy as np

from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs

Factory = TypeVar("Factory", bound=Callable)


class Same:
    """Stands for one object: equal to itself alone, and keeps it alive, so that its identity is never given away."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _frozen(value: Any) -> Hashable:
    """A hashable stand-in for one setting as it is now: by value where that is cheap and safe, else by identity.

    Too few matches cost a compilation; one too many runs the wrong program. So what may change without its identity
    changing is taken by content, or never matches.
    """
    if isinstance(value, jax.core.Tracer):
        return Same(value)
    if isinstance(value, float | complex):
        return (type(value).__name__, repr(value))  # apart: 0.0 and -0.0; together: NaN and NaN
    if isinstance(value, bool | int | str | bytes | None):
        return (type(value).__name__, value)
    if isinstance(value, type | np.dtype):
        return _frozen_type(value)
    if isinstance(value, np.ndarray | np.generic):
        return ("array", str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value)).digest())
    if isinstance(value, jax.Array):
        if value.size > 64 or value.is_deleted():  # reading it back from a device costs more than a missed match
            return Same(value)
        is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)  # whose dtype names the generator
        content = np.asarray(jax.random.key_data(value) if is_key else value)
        return ("array", str(value.dtype), value.shape, content.tobytes())
    leaves, treedef = jax.tree.flatten(value, is_leaf=lambda node: node is not value)
    if treedef != jax.tree.structure(0):
        return ("tree", treedef, tuple(_frozen(leaf) for leaf in leaves))
    try:
        hash(value)
    except TypeError:  # it may change
        return Same(object())
    return value


def _frozen_type(value: type | np.dtype) -> Hashable:
    """A dtype by its name, however it is spelt; another class as itself."""
    try:
        dtype = np.dtype(value)
    except TypeError:
        return ("type", value)
    return ("type", value) if dtype.hasobject else ("dtype", dtype.name)


class Made:
    """A function together with the factory and the settings that made it.

    Calls go straight through. Two are equal when the same factory made them with equal settings.
    """

    def __init__(self, function: Callable, factory: Callable, arguments: dict[str, Any], part: str = ""):
        functools.update_wrapper(self, function)  # also keeps inspect.signature honest, through __wrapped__
        self._function, self._factory, self._arguments, self._part = function, factory, arguments, part
        bound = inspect.signature(factory).bind_partial()
        bound.apply_defaults()
        settings = sorted((bound.arguments | arguments).items())  # adam(0.1) is adam(0.1, b1=0.9)
        # Now, not when asked: the function has seen the settings as they are now.
        self._identity = (factory, part, tuple((name, _frozen(value)) for name, value in settings))

    @property
    def function(self) -> Callable:
        """What a call runs."""
        return self._function

    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)

    def __eq__(self, other) -> bool:
        return isinstance(other, Made) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._arguments.items())
        return f"{self._factory.__name__}({settings})" + (f".{self._part}" if self._part else "")


def comparable(factory: Factory) -> Factory:
    """Mark a factory of functions or of gradient transformations, so that equal settings give equal results.

    Numbers, strings, dtypes, NumPy arrays and small JAX arrays compare by value, as they were when the factory was
    called; tracers, large JAX arrays and functions compare by identity; functions made by a comparable factory compare
    by *their* settings; an object that cannot be hashed equals nothing.

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
            parts = (Made(made.init, make, arguments, "init"), Made(made.update, make, arguments, "update"))
            copy = tuple.__new__(kind, parts)
            if hasattr(made, "__dict__"):  # what a subclass keeps beside the two functions
                vars(copy).update(vars(made))
            return copy
        return Made(made, make, arguments)

    return make
