"""Functions that compare, print and pickle by the settings that they were made with.

``adam(1e-3)`` returns closures, and two closures are never equal: as a static argument of ``jax.jit``, an optimizer
made twice compiles twice. A factory decorated with ``comparable`` returns functions that compare and hash by the
factory and its settings, show them in their ``repr``, and pickle as a call of the factory.
"""

import collections
import copy
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

P = ParamSpec("P")
R = TypeVar("R")
HASHED = 1 << 24  # bytes; hashing a larger array costs more than a missed match
DICTS = (dict, collections.OrderedDict, collections.defaultdict)


class Same:
    """A wrapper of one object that compares by identity, and keeps the object alive so that its id is not reused."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def copied(value: Any) -> Any:
    """Copy a setting, so that later changes of the caller's dicts, lists, sets and NumPy arrays do not affect it.

    JAX arrays, functions and other immutable objects are returned unchanged, and so are objects of custom classes,
    which ``comparable`` never treats as equal to another object.

    >>> mask = {"w": [True]}
    >>> kept = copied(mask)
    >>> mask["w"][0] = False
    >>> kept
    {'w': [True]}
    """
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in DICTS:
        new = copy.copy(value)
        new.update({name: copied(part) for name, part in value.items()})
        return new
    if isinstance(value, set | bytearray):
        return copy.copy(value)
    if type(value) is list:
        return [copied(part) for part in value]
    if isinstance(value, tuple):
        parts = [copied(part) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        make = getattr(type(value), "_make", type(value))
        return make(parts)
    if type(value) is functools.partial:
        function, arguments, keywords = (copied(part) for part in (value.func, value.args, value.keywords))
        return functools.partial(function, *arguments, **keywords)
    if any(kind.__module__.startswith("flax.nnx") for kind in type(value).__mro__):
        return value  # a copied graph would lose its shared parts; from_nnx reads the arrays immediately
    leaves, treedef = _children(value)
    return value if treedef is None else jax.tree.unflatten(treedef, [copied(leaf) for leaf in leaves])


def _children(value: Any) -> tuple[list, Any]:
    """Return the children of a pytree node and its structure; for a leaf the structure is None."""
    leaves, treedef = jax.tree.flatten(value, is_leaf=lambda node: node is not value)
    return (leaves, None) if jax.tree_util.treedef_is_leaf(treedef) else (leaves, treedef)


def frozen(value: Any) -> Hashable:
    """Return a hashable key of a ``copied`` setting: by value where that is cheap and safe, else by identity.

    A missed match costs a compilation; a wrong match runs the wrong program. So a mutable object is compared by
    content, or never matches.
    """
    if isinstance(value, Tracer):
        return Same(value)
    if isinstance(value, float | complex):
        return (type(value).__name__, repr(value))  # 0.0 differs from -0.0, and NaN equals NaN
    if isinstance(value, bool | int | str | bytes | None):
        return (type(value).__name__, value)
    if isinstance(value, type | np.dtype):
        return _frozen_type(value)
    if isinstance(value, np.ndarray | np.generic):
        return _frozen_array(value)
    if isinstance(value, jax.Array):
        if value.size > 64 or value.is_deleted():  # reading it from a device costs more than a missed match
            return Same(value)
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)  # the dtype names the generator
        content = np.asarray(jax.random.key_data(value) if is_key else value)
        return ("array", str(value.dtype), value.shape, content.tobytes())
    if type(value) in DICTS:  # equal in any order
        return (type(value).__name__, frozenset((frozen(name), frozen(part)) for name, part in value.items()))
    if isinstance(value, set | frozenset):
        return (type(value).__name__, frozenset(map(frozen, value)))
    if type(value) is functools.partial:
        return ("partial", *(frozen(part) for part in (value.func, value.args, value.keywords)))
    if isinstance(value, types.MethodType):
        return ("method", value.__func__, frozen(value.__self__))
    leaves, treedef = _children(value)
    if treedef is not None:
        return ("tree", _hashed(treedef), tuple(frozen(leaf) for leaf in leaves))
    return _hashed(value)


def _hashed(value: Any) -> Hashable:
    """Return an object if its hash identifies what it does; else a key that equals nothing."""
    bound = isinstance(value, types.BuiltinMethodType) and not isinstance(value.__self__, types.ModuleType | None)
    # An object with attributes that hashes by identity is mutable; a wrapper of a function counts as the function.
    by_identity = type(value).__hash__ is object.__hash__ and not callable(getattr(value, "__wrapped__", None))
    is_function = isinstance(value, types.FunctionType | types.BuiltinFunctionType)
    if bound or (by_identity and not is_function and getattr(value, "__dict__", None)):
        return Same(object())
    try:
        hash(value)
    except TypeError:  # it is mutable
        return Same(object())
    return value


def _frozen_array(value: np.ndarray | np.generic) -> Hashable:
    if value.dtype.hasobject:
        return Same(object())
    if value.nbytes > HASHED:
        return Same(value)
    return ("array", str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).digest())


def _frozen_type(value: type | np.dtype) -> Hashable:
    """Return a dtype by its name, in any spelling; another class as itself."""
    try:
        dtype = np.dtype(value)
    except TypeError:
        return ("type", value)
    return ("type", value) if dtype.hasobject else ("dtype", dtype.name)


class Call:
    """A call of a factory, and the functions that it returned.

    Attributes:
      factory: the factory.
      bound: the settings, as ``inspect.BoundArguments``.
      functions: the functions in the result, by name; a single function has the name "".
      kind: the type of the result.
    """

    def __init__(self, factory: Callable, bound: inspect.BoundArguments, functions: dict[str, Callable], kind: type):
        self.factory, self.bound, self.functions, self.kind = factory, bound, functions, kind
        every = inspect.BoundArguments(bound.signature, dict(bound.arguments))
        every.apply_defaults()  # adam(0.1) equals adam(0.1, b1=0.9)
        # Computed now, because the functions use the current settings.
        self.identity = (factory, tuple((name, frozen(value)) for name, value in sorted(every.arguments.items())))

    def __eq__(self, other) -> bool:
        return isinstance(other, Call) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def parts(self) -> list["Made"]:
        """Return the functions, each with this call."""
        return [Made(self, name) for name in self.functions]

    def __reduce__(self):
        return _call_again, (self.factory, self.bound.args, self.bound.kwargs)


class Made:
    """A function together with the call of a factory that returned it.

    Calling it calls the function. Two are equal if the same factory returned them for equal settings. It is immutable,
    so a copy is the same object. It pickles as the factory and the settings, which must pickle: functions pickle by
    their name in a module (a lambda does not), arrays by value.
    """

    def __init__(self, call: Call, part: str = ""):
        # First, because it copies the attributes of another Made; inspect.signature follows __wrapped__.
        functools.update_wrapper(self, call.functions[part])
        self._call, self._part, self._function = call, part, call.functions[part]

    @property
    def function(self) -> Callable:
        """The function that a call runs."""
        return self._function

    @property
    def call(self) -> Call:
        """The call of the factory."""
        return self._call

    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return public methods of a function that is an object, such as those of ``clipped_value_and_grad``."""
        if name.startswith("_"):  # not yet set during construction
            raise AttributeError(name)
        return getattr(self._function, name)

    def __eq__(self, other) -> bool:
        if self is other:
            return True
        return isinstance(other, Made) and self._part == other._part and self._call == other._call

    def __hash__(self) -> int:
        return hash((self._part, self._call))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._call.bound.arguments.items())
        return f"{self._call.factory.__name__}({settings})" + (f".{self._part}" if self._part else "")

    def __copy__(self) -> "Made":
        return self

    def __deepcopy__(self, memo) -> "Made":
        return self

    def __reduce__(self):
        return Made, (self._call, self._part)


def _call_again(factory: Callable, args: tuple, kwargs: dict[str, Any]) -> Call:
    result = factory(*args, **kwargs)
    parts = [result] if isinstance(result, Made) else [part for part in result if isinstance(part, Made)]
    return parts[0].call


def bind(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """Bind the arguments of a call to their names, ``copied``.

    Raises:
      TypeError: if they do not match the signature.
    """
    bound = signature.bind(*args, **kwargs)
    bound.arguments = {name: copied(value) for name, value in bound.arguments.items()}
    return bound


def remember(factory: Callable, bound: inspect.BoundArguments, made: Any) -> Any:
    """Wrap every function in a factory's result as ``Made``.

    Args:
      factory: a callable that returns the same result again; it compares and pickles.
      bound: the settings, as ``bind`` returns them.
      made: a function, or a tuple with functions in it, such as a gradient transformation or a model.
    """
    if not isinstance(made, tuple):
        return Call(factory, bound, {"": made}, type(made)).parts()[0]
    names = getattr(made, "_fields", None) or tuple(map(str, range(len(made))))
    functions = {name: part for name, part in zip(names, made, strict=True) if isinstance(part, Callable)}
    parts = dict(zip(functions, Call(factory, bound, functions, type(made)).parts(), strict=True))
    new = tuple.__new__(type(made), [parts.get(name, part) for name, part in zip(names, made, strict=True)])
    if hasattr(made, "__dict__"):  # attributes of a subclass
        vars(new).update(vars(made))
    return new


def comparable(factory: Callable[P, R]) -> Callable[P, R]:
    """Decorate a factory of functions, or of tuples of functions such as optimizers and models, so that equal settings
    give equal results.

    Numbers, strings, dtypes, NumPy arrays and small JAX arrays compare by their value when the factory is called.
    Dicts, lists, sets, other trees and ``functools.partial`` compare by their content; the factory receives copies of
    them, so its result does not change with the caller's objects. Tracers, large JAX arrays and functions compare by
    identity; functions of a comparable factory compare by *their* settings. A mutable object whose content is unknown
    (it cannot be hashed, or it hashes by identity and has attributes) equals nothing.

    The result pickles if the factory and its settings do: a function of a module does; a lambda does not, and neither
    do the functions that ``optax.chain`` and other functions of optax return. In another process the result equals that
    of the same call there.

    >>> import nnlearn
    >>> nnlearn.adam(1e-3) == nnlearn.adam(1e-3), nnlearn.adam(1e-3) == nnlearn.adam(1e-4)
    (True, False)
    >>> nnlearn.adam(1e-3, b1=0.8).update
    adam(learning_rate=0.001, b1=0.8).update
    >>> import pickle
    >>> pickle.loads(pickle.dumps(nnlearn.adam(1e-3))) == nnlearn.adam(1e-3)
    True
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = bind(signature, args, kwargs)
        except TypeError:
            return factory(*args, **kwargs)  # its message names the function
        return remember(make, bound, factory(*bound.args, **bound.kwargs))

    return make
