"""Functions that remember what they were made from.

``adam(1e-3)`` returns closures, and two closures are never equal: an optimizer made twice compiles twice when it is a
static argument of ``jax.jit``. A factory marked ``comparable`` returns functions that compare and hash by the factory
and its settings, that print them, and that pickle as a call of the factory.
"""

import collections
import copy
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import numpy as np

Factory = TypeVar("Factory", bound=Callable)
HASHED = 1 << 24  # bytes; to hash a larger array costs more than a missed match
DICTS = (dict, collections.OrderedDict, collections.defaultdict)


class Same:
    """Stands for one object: equal to itself alone, and keeps it alive, so that its identity is never given away."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def copied(value: Any) -> Any:
    """A setting that later changes of the caller's dicts, lists, sets and NumPy arrays do not reach.

    JAX arrays, functions and other immutable objects are returned as they are; so is an object of the caller's own
    class, which ``comparable`` then never takes for another one.

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
        return type(value)._make(parts) if hasattr(value, "_fields") else type(value)(parts)
    if type(value) is functools.partial:
        function, arguments, keywords = (copied(part) for part in (value.func, value.args, value.keywords))
        return functools.partial(function, *arguments, **keywords)
    if any(kind.__module__.startswith("flax.nnx") for kind in type(value).__mro__):
        return value  # a graph, whose shared parts would come apart; from_nnx takes its numbers at once
    leaves, treedef = _children(value)
    return value if treedef is None else jax.tree.unflatten(treedef, [copied(leaf) for leaf in leaves])


def _children(value: Any) -> tuple[list, Any]:
    """The children of a node of a pytree and its own structure; None in place of that for a leaf."""
    leaves, treedef = jax.tree.flatten(value, is_leaf=lambda node: node is not value)
    return (leaves, None) if jax.tree_util.treedef_is_leaf(treedef) else (leaves, treedef)


def frozen(value: Any) -> Hashable:
    """A hashable stand-in for a setting that was ``copied``: by value where that is cheap and safe, else by identity.

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
        return _frozen_array(value)
    if isinstance(value, jax.Array):
        if value.size > 64 or value.is_deleted():  # reading it back from a device costs more than a missed match
            return Same(value)
        is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)  # whose dtype names the generator
        content = np.asarray(jax.random.key_data(value) if is_key else value)
        return ("array", str(value.dtype), value.shape, content.tobytes())
    if type(value) in DICTS:  # equal whatever their order is
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
    """An object as itself, if its hash says what it does; else what nothing else equals."""
    bound = isinstance(value, types.BuiltinMethodType) and not isinstance(value.__self__, types.ModuleType | None)
    # An object with attributes that hashes by identity may be changed; one that wraps a function stands for that.
    by_identity = type(value).__hash__ is object.__hash__ and not callable(getattr(value, "__wrapped__", None))
    is_function = isinstance(value, types.FunctionType | types.BuiltinFunctionType)
    if bound or (by_identity and not is_function and getattr(value, "__dict__", None)):
        return Same(object())
    try:
        hash(value)
    except TypeError:  # it may change
        return Same(object())
    return value


def _frozen_array(value: np.ndarray | np.generic) -> Hashable:
    if value.dtype.hasobject:
        return Same(object())
    if value.nbytes > HASHED:
        return Same(value)
    return ("array", str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value)).digest())


def _frozen_type(value: type | np.dtype) -> Hashable:
    """A dtype by its name, however it is spelt; another class as itself."""
    try:
        dtype = np.dtype(value)
    except TypeError:
        return ("type", value)
    return ("type", value) if dtype.hasobject else ("dtype", dtype.name)


class Call:
    """One call of a factory, and the functions that it made.

    Attributes:
      factory: what was called.
      bound: with which settings, as ``inspect.BoundArguments``.
      functions: by name, what the result consists of; one function alone has the name "".
    """

    def __init__(self, factory: Callable, bound: inspect.BoundArguments, functions: dict[str, Callable]):
        self.factory, self.bound, self.functions = factory, bound, functions
        every = inspect.BoundArguments(bound.signature, dict(bound.arguments))
        every.apply_defaults()  # adam(0.1) is adam(0.1, b1=0.9)
        # Now, not when asked: the function has seen the settings as they are now.
        self.identity = (factory, tuple((name, frozen(value)) for name, value in sorted(every.arguments.items())))

    def __eq__(self, other) -> bool:
        return isinstance(other, Call) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def parts(self) -> list["Made"]:
        """The functions, each of which remembers the call."""
        return [Made(self, name) for name in self.functions]

    def __reduce__(self):
        return _call_again, (self.factory, self.bound.args, self.bound.kwargs)


class Made:
    """A function together with the call of a factory that made it.

    Calls go straight through. Two are equal when the same factory made them with equal settings. It is immutable: a
    copy is itself. It pickles as the factory and the settings, so both must pickle: functions by their name in a module
    (a lambda among the settings does not), arrays by value.
    """

    def __init__(self, call: Call, part: str = ""):
        # Before the rest, as it takes over the attributes of another Made; inspect.signature follows __wrapped__.
        functools.update_wrapper(self, call.functions[part])
        self._call, self._part, self._function = call, part, call.functions[part]

    @property
    def function(self) -> Callable:
        """What a call runs."""
        return self._function

    @property
    def call(self) -> Call:
        """What made it."""
        return self._call

    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Public methods of a function that is an object, such as those of ``clipped_value_and_grad``."""
        if name.startswith("_"):  # not there yet while it is made
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
    """The arguments of a call by name, ``copied``.

    Raises:
      TypeError: they do not fit the signature.
    """
    bound = signature.bind(*args, **kwargs)
    bound.arguments = {name: copied(value) for name, value in bound.arguments.items()}
    return bound


def remember(factory: Callable, bound: inspect.BoundArguments, made: Any) -> Any:
    """What a factory made, with every function in it as ``Made``.

    Args:
      factory: what a call of makes it again; compares and pickles.
      bound: the settings, of ``bind``.
      made: a function, or a tuple with functions in it, such as a gradient transformation or a model.
    """
    if not isinstance(made, tuple):
        return Call(factory, bound, {"": made}).parts()[0]
    names = getattr(made, "_fields", None) or tuple(map(str, range(len(made))))
    functions = {name: part for name, part in zip(names, made, strict=True) if isinstance(part, Callable)}
    parts = dict(zip(functions, Call(factory, bound, functions).parts(), strict=True))
    new = tuple.__new__(type(made), [parts.get(name, part) for name, part in zip(names, made, strict=True)])
    if hasattr(made, "__dict__"):  # what a subclass keeps beside the functions
        vars(new).update(vars(made))
    return new


def comparable(factory: Factory) -> Factory:
    """Mark a factory of functions, or of tuples of them such as optimizers and models, so that equal settings give
    equal results.

    Numbers, strings, dtypes, NumPy arrays and small JAX arrays compare by value, as they were when the factory was
    called; dicts, lists, sets, other trees and ``functools.partial`` by what they hold. The factory is given copies of
    those, so that what it made does not change with the caller's. Tracers, large JAX arrays and functions compare by
    identity; functions made by a comparable factory compare by *their* settings. An object that may be changed and
    that says nothing of its content (one that cannot be hashed, or hashes by identity and has attributes) equals
    nothing.

    What was made pickles, if the factory and its settings do: a function of a module does; a lambda does not, nor do
    the functions that ``optax.chain`` and other functions of optax return. In another process it equals what the same
    call makes there.

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
    def make(*args, **kwargs):
        try:
            bound = bind(signature, args, kwargs)
        except TypeError:
            return factory(*args, **kwargs)  # whose message names the function
        return remember(make, bound, factory(*bound.args, **bound.kwargs))

    return make
