"""A hash of what a traced program computes: its operations and the arrays that it captured.

The hash is the same in every process: it identifies variables by their order, arrays by their content, and host
callbacks by their code and closures. It changes with the version of JAX, which may trace the same program differently.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from nnlearn.native.kernel import KERNEL

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
NAMES = ("name", "debug_info", "source_info", "ctx")  # parameters that do not affect the result
RULES = (
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
)  # their derivatives are already part of the trace


def program_hash(program: ClosedJaxpr) -> str:
    """The hash of a traced program, 64 hexadecimal digits.

    >>> import jax.numpy as jnp
    >>> def trace(table):
    ...     return jax.make_jaxpr(lambda x: jnp.sin(x) + table)(1.0)
    >>> one, same, other = (program_hash(trace(np.float32(value))) for value in (1.0, 1.0, 2.0))
    >>> one == same, one == other
    (True, False)
    """
    return _Writer().digest(program)


class _Writer:
    """Computes digests of objects, each object once."""

    def __init__(self):
        self._known: dict[int, tuple[Any, str]] = {}  # by address; holding the object keeps its address in use
        self._walked: list[int] = []  # the objects being visited

    def digest(self, value: Any) -> str:
        if isinstance(value, bool | int | float | complex | str | bytes | None):
            return _hash(type(value).__name__, repr(value))
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in self._walked:
            return _hash("again", str(len(self._walked) - self._walked.index(id(value))))
        self._walked.append(id(value))
        try:
            found = _hash(*self._parts(value))
        finally:
            self._walked.pop()
        self._known[id(value)] = (value, found)
        return found

    def _parts(self, value: Any) -> Iterator[str]:
        """Yield text that distinguishes a value from others."""
        yield type(value).__name__
        if isinstance(value, ClosedJaxpr):
            yield from self._jaxpr(value.jaxpr, value.consts)
        elif isinstance(value, Jaxpr):
            yield from self._jaxpr(value, ())
        elif isinstance(value, np.ndarray | np.generic | jax.Array) or hasattr(value, "__array__"):
            yield _array(value)
        elif isinstance(value, Mapping):
            yield from sorted(self.digest(name) + self.digest(part) for name, part in value.items())
        elif isinstance(value, set | frozenset):
            yield from sorted(map(self.digest, value))
        elif isinstance(value, tuple | list):
            yield from map(self.digest, value)
        elif isinstance(value, np.dtype | type | enum.Enum):
            yield ADDRESS.sub("", str(value))
        elif isinstance(value, jax.sharding.Mesh):
            yield repr(value)  # its attributes are caches that differ between processes
        elif isinstance(value, types.ModuleType):
            yield value.__name__
        elif isinstance(value, Var):
            yield str(value.aval)
        elif callable(value) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            yield from self._object(value)
        else:
            text = repr(value)
            yield ADDRESS.sub("", text)
            if ADDRESS.search(text):
                yield from self._object(value)

    def _jaxpr(self, jaxpr: Jaxpr, consts: Any) -> Iterator[str]:
        indices: dict[Any, int] = {}

        def name(atom: Any) -> str:
            if isinstance(atom, Literal):
                return _array(atom.val) + str(atom.aval)
            return f"{indices.setdefault(atom, len(indices))}:{atom.aval}"

        yield from map(self.digest, consts)
        yield " ".join(map(name, (*jaxpr.constvars, *jaxpr.invars)))
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            yield " ".join(map(name, (*equation.invars, *equation.outvars)))
            for key, value in sorted(equation.params.items()):
                skipped = equation.primitive.name in RULES and not isinstance(value, ClosedJaxpr | Jaxpr)
                if equation.primitive.name == KERNEL:
                    value = _kernel(value)
                if key not in NAMES and not skipped:
                    yield key + self.digest(value)
            yield str(getattr(equation.ctx, "threefry_partitionable", ""))
        yield " ".join(map(name, jaxpr.outvars))

    def _object(self, value: Any) -> Iterator[str]:
        """Describe a function by its code and closure, and any other object by its class and attributes."""
        if isinstance(value, functools.partial):
            yield from map(self.digest, (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            yield from map(self.digest, (value.__func__, value.__self__))
        elif isinstance(value, types.FunctionType):
            yield from self._code(value.__code__)
            yield from map(self.digest, (value.__defaults__, value.__kwdefaults__))
            captured = inspect.getclosurevars(value)
            reached = {} if _is_installed(value) else captured.globals
            yield self.digest({**reached, **captured.nonlocals})
        elif callable(getattr(value, "__wrapped__", None)):
            yield self.digest(value.__wrapped__)
        else:
            yield f"{type(value).__module__}.{type(value).__qualname__} {getattr(value, '__qualname__', '')}"
            slots = {name: getattr(value, name, None) for name in getattr(type(value), "__slots__", ())}
            yield self.digest({**slots, **getattr(value, "__dict__", {})})

    def _code(self, code: types.CodeType) -> Iterator[str]:
        yield code.co_code.hex() + " ".join(code.co_names)
        for constant in code.co_consts:
            yield from self._code(constant) if isinstance(constant, types.CodeType) else [self.digest(constant)]


def _kernel(call: Any) -> tuple[Any, ...]:
    """The parts of a call of native code that determine its result."""
    return type(call).__name__, call.source, call.handler, call.flags, call.in_place


def _is_installed(function: types.FunctionType) -> bool:
    """Whether a function belongs to a library, whose globals are caches and its own functions."""
    root = function.__module__.partition(".")[0] if function.__module__ else ""
    file = function.__code__.co_filename
    return root in ("jax", "nnlearn", *sys.stdlib_module_names) or "site-packages" in file or "dist-packages" in file


def _array(value: Any) -> str:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"{value.dtype}" + _array(jax.random.key_data(value))
    array = np.asarray(value)
    content = repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array)
    # Arrays are buffers, but Python 3.11 has no type for that; a memoryview would reject bfloat16.
    return f"{array.dtype}{array.shape}" + hashlib.sha256(content).hexdigest()  # pyright: ignore[reportArgumentType]


def _hash(*parts: str) -> str:
    joined = hashlib.sha256()
    for part in parts:  # with its length, so that different lists of parts never give the same text
        joined.update(f"{len(part)}:{part}".encode())
    return joined.hexdigest()


__all__ = ["program_hash"]
