"""A cache of the compiled programs of steps, so that a second run with the same step compiles nothing."""

import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Program = TypeVar("Program")

# By step and kind of program: the settings of the latest program, and the program.
_PROGRAMS: weakref.WeakKeyDictionary[Callable[..., Any], dict[str, tuple[tuple[Any, ...], Any]]]
_PROGRAMS = weakref.WeakKeyDictionary()


def cached_program(
    step: Callable[..., Any], kind: str, settings: tuple[Any, ...], make: Callable[[Callable[..., Any]], Program]
) -> Program:
    """``make(step)``, or the program of an earlier call with the same step, kind and settings.

    The cache keeps the latest program of each kind, as long as the step lives.

    Args:
      step: a training step. Only programs of Python functions are cached: other callables may compare by value, or be
        made anew at each access, as methods are.
      kind: which program of the step.
      settings: what the program depends on besides the step; compared by equality.
      make: makes the program. Its argument calls ``step`` without keeping it alive, so a cached program works only
        while the caller holds the step.

    >>> def step(state, batch): ...
    >>> cached_program(step, "block", (), lambda step: object()) is cached_program(step, "block", (), id)
    True
    """
    if not isinstance(step, types.FunctionType):
        return make(step)
    programs = _PROGRAMS.setdefault(step, {})
    found = programs.get(kind)
    if found is None or found[0] != settings:
        found = programs[kind] = (settings, make(_weakly(step)))
    return found[1]


def _weakly(step: types.FunctionType) -> Callable[..., Any]:
    """A function with the signature of ``step`` that calls it through a weak reference.

    A value of a ``WeakKeyDictionary`` that referred to its key would keep the entry for ever.
    """
    reference = weakref.ref(step)

    def call(*args: Any, **kwargs: Any) -> Any:
        target = reference()
        assert target is not None, "a program of a step outlived the step"
        return target(*args, **kwargs)

    call.__name__ = step.__name__
    call.__signature__ = inspect.signature(step)  # pyright: ignore[reportFunctionMemberAccess]
    return call


__all__ = ["cached_program"]
