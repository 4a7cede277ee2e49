"""The place in a stream of batches: a resumed run continues with the batch after the last one that it used."""

import base64
import importlib
import itertools
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nnlearn.types import Batch

SAVERS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))  # grain; torchdata
SILENT = 1000  # batches that are read and skipped without a warning


class Place(NamedTuple):
    """How far a stream has been read.

    Attributes:
      epoch: passes that are complete.
      batches: batches used in the present pass.
      state: the state of the iterator in JSON values, or None if it has none.
    """

    epoch: int
    batches: int
    state: Any = None


START = Place(0, 0)


def iterator_state(*readers: Any) -> Any:
    """The state of the first reader that has one, in JSON values; None if none has one that can be written.

    >>> iterator_state(iter([1, 2])) is None
    True
    """
    for reader in readers:
        for get, _ in SAVERS:
            if hasattr(reader, get):
                try:
                    found = to_json(getattr(reader, get)())
                    json.dumps(found)
                    return {"by": get, "state": found}
                except TypeError:
                    return None
    return None


def resumed(batches: Iterable[Batch], place: Place) -> Iterator[Batch]:
    """An iterator over the batches of an epoch from ``place`` on.

    An iterator or a loader with a state of its own is set to it. A sequence is entered by index, and anything else is
    read, and its batches skipped, with a warning if there are many.
    """
    if place.state is not None:
        setter = dict(SAVERS)[place.state["by"]]
        state = from_json(place.state["state"])
        if hasattr(batches, setter):
            getattr(batches, setter)(state)
            return iter(batches)
        iterator = iter(batches)
        if hasattr(iterator, setter):
            getattr(iterator, setter)(state)
            return iterator
    if isinstance(batches, Sequence):
        return (batches[at] for at in range(place.batches, len(batches)))
    if place.batches > SILENT:
        warnings.warn(
            f"resuming: the first {place.batches} batches of the epoch are read again and skipped; an iterator with "
            "get_state and set_state, or state_dict and load_state_dict, saves that",
            stacklevel=2,
        )
    return itertools.islice(iter(batches), place.batches, None)


def to_json(value: Any) -> Any:
    """An iterator's state in JSON values: numbers, strings, None, bytes, arrays, and nestings of them.

    Raises:
      TypeError: if it has anything else.

    >>> from_json(to_json({"seen": (1, b"x"), "rng": np.arange(2)}))
    {'seen': (1, b'x'), 'rng': array([0, 1])}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [to_json(part) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [to_json(part) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[to_json(key), to_json(part)] for key, part in value.items()]}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        array = np.ascontiguousarray(value)
        return {"array": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": np.shape(value)}
    if type(value).__module__ == "torch":
        return {"torch": to_json(np.asarray(value))}
    if hasattr(value, "__array__"):  # an array of another library
        return to_json(np.asarray(value))
    raise TypeError(f"cannot write a {type(value).__name__}")


def from_json(value: Any) -> Any:
    """The reverse of ``to_json``; arrays of other libraries than PyTorch come back as NumPy arrays."""
    if isinstance(value, list):
        return [from_json(part) for part in value]
    if not isinstance(value, dict):
        return value
    if "bytes" in value:
        return base64.b64decode(value["bytes"])
    if "tuple" in value:
        return tuple(from_json(part) for part in value["tuple"])
    if "torch" in value:
        return importlib.import_module("torch").from_numpy(from_json(value["torch"]))  # its loader has imported it
    if "dict" in value:
        return {from_json(key): from_json(part) for key, part in value["dict"]}
    content = np.frombuffer(base64.b64decode(value["array"]), np.dtype(value["dtype"]))
    return content.reshape(value["shape"]).copy()


__all__ = ["START", "Place", "iterator_state", "resumed"]
