"""Calls of user functions with the optional arguments that they name: ``hparams``, ``model_state``."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax


def asks_for(function: Callable, name: str) -> bool:
    """Whether a function has an argument with this name.

    >>> asks_for(lambda key, hparams: None, "hparams"), asks_for(lambda key, **others: None, "hparams")
    (True, False)
    """
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return False


def hand(function: Callable, *positional: Any, **offered: Any) -> Any:
    """Call a function with positional arguments and with those of ``offered`` that it has an argument for.

    ``model_state`` is passed in new containers with the same leaves: variables of nnx can be written only inside the
    derivative that created them, and equinox's ``State`` can be replaced only once.

    >>> hand(lambda key, hparams: (key, hparams), 1, hparams=2, model_state=3)
    (1, 2)
    """
    if "model_state" in offered:
        offered["model_state"] = jax.tree.map(lambda leaf: leaf, offered["model_state"])
    asked = {name: value for name, value in offered.items() if asks_for(function, name)}
    try:
        return function(*positional, **asked)
    except KeyError as error:
        hparams = asked.get("hparams")
        if isinstance(hparams, Mapping) and error.args and error.args[0] not in hparams:
            error.add_note(f"hparams has {sorted(hparams)}")
        raise


@contextlib.contextmanager
def explaining_hparams(name: str, hparams: Any) -> Iterator[None]:
    """Name a hyper-parameter that a function of ``hparams`` looks up, and that is not there.

    >>> with explaining_hparams("make_tx", {"lr": 0.1}):
    ...     {"lr": 0.1}["rate"]
    Traceback (most recent call last):
    ValueError: make_tx asked for 'rate', but hparams has ['lr']
    """
    try:
        yield
    except KeyError as error:
        if not isinstance(hparams, Mapping) or not error.args or error.args[0] in hparams:
            raise
        raise ValueError(f"{name} asked for {error.args[0]!r}, but hparams has {sorted(hparams)}") from error


def check_takes(function: Any, name: str, arguments: str, *optional: str) -> None:
    """Raise ``TypeError`` if a function cannot be called with these arguments.

    Args:
      function: the user's function.
      name: its name in the message.
      arguments: the positional arguments, such as ``"params, batch, key"``.
      *optional: names of optional arguments.

    >>> check_takes(lambda params: 0.0, "loss_fn", "params, batch")
    Traceback (most recent call last):
    TypeError: loss_fn must take (params, batch), but its arguments are (params)
    """
    if not callable(function):
        raise TypeError(f"{name} must be a function of ({arguments}), got {function!r}")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return
    try:
        asked = {extra: None for extra in optional if extra in signature.parameters}
        signature.bind(*arguments.split(", "), **asked)
    except TypeError as error:
        besides = f", and may take {' and '.join(optional)}" if optional else ""
        raise TypeError(f"{name} must take ({arguments}){besides}, but its arguments are {signature}") from error


__all__ = ["asks_for", "check_takes", "explaining_hparams", "hand"]
