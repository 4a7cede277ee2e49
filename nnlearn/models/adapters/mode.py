"""Inspection of modules for all adapters: their arguments, and the flags that switch training mode."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

TRAINING = ("train", "training", "is_training")
INFERENCE = ("deterministic", "use_running_average", "inference")


def mode_flags(known: Collection[str], named: str | None = None) -> tuple[dict[str, bool], dict[str, bool]]:
    """The flags that switch a module to training mode, and those that switch it to inference mode.

    Args:
      known: names of the arguments of the module.
      named: the flag's name, or None to look for the usual ones, ``train``, ``training`` and ``is_training``, and, of
        opposite meaning, ``deterministic``, ``use_running_average`` and ``inference``.

    Raises:
      ValueError: if ``named`` is not among the names.

    >>> mode_flags(["x", "train"]), mode_flags(["x", "deterministic"])
    (({'train': True}, {'train': False}), ({'deterministic': False}, {'deterministic': True}))
    """
    if named is not None and named not in known:
        raise ValueError(f"train_argument={named!r} is not an argument of the module, which takes {sorted(known)}")
    names = TRAINING + INFERENCE if named is None else (named,)
    training = {name: name not in INFERENCE for name in names if name in known}
    return training, {name: not value for name, value in training.items()}


def arguments_of(function: Callable) -> dict[str, inspect.Parameter]:
    """The arguments of a function that can be passed by name; none if it has no signature.

    >>> list(arguments_of(lambda x, *others, key=None: x))
    ['x', 'key']
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in by_name}


def make_with(make: Callable, name: str, value: Any) -> Any:
    """Call ``make(value)``, by name if the function accepts that name.

    >>> make_with(lambda *, key: key, "key", 1), make_with(lambda seed: seed, "key", 2)
    (1, 2)
    """
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(make).parameters.values())
    return make(**{name: value}) if takes_any or name in arguments_of(make) else make(value)


def as_arguments(inputs: Any) -> tuple[Any, ...]:
    """The positional arguments for a module: a plain tuple is several arguments, anything else is one.

    >>> as_arguments(3), as_arguments((3, 4))
    ((3,), (3, 4))
    """
    return inputs if type(inputs) is tuple else (inputs,)


__all__ = ["INFERENCE", "TRAINING", "arguments_of", "as_arguments", "make_with", "mode_flags"]
