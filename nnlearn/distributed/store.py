"""The store of short strings that all processes share, which the coordinator of ``jax.distributed`` keeps."""

import json
import time
from typing import Any

import jax


def client() -> Any:
    """The connection to the coordinator; None if there is one process."""
    from jax._src import distributed  # no public module has it

    return distributed.global_state.client


class Meeting:
    """Exchanges values under a name; every process must call it, the same number of times for each name."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def exchange(self, name: str, value: Any, timeout: float) -> list[Any]:
        """The values of all processes, in their order.

        Raises:
          TimeoutError: if processes do not give theirs in time; the message names them.
        """
        count, own = jax.process_count(), jax.process_index()
        if count == 1:
            return [value]
        number = self._counts[name] = self._counts.get(name, 0) + 1
        store, folder = client(), f"nnlearn/{name}/{number}/"
        store.key_value_set(f"{folder}{own}", json.dumps(value))
        end, found = time.monotonic() + timeout, {}
        while True:
            found = {int(key.rsplit("/", 1)[1]): text for key, text in store.key_value_dir_get(folder)}
            if len(found) == count:
                return [json.loads(found[index]) for index in range(count)]
            if time.monotonic() > end:
                missing = [str(index) for index in range(count) if index not in found]
                raise TimeoutError(
                    f"process {own} waited {timeout:g} s at {name!r}, and process {', '.join(missing)} of {count} did "
                    "not arrive: run the same script with the same arguments in all processes, or give a longer timeout"
                )
            time.sleep(0.002 if time.monotonic() < end - timeout + 1 else 0.05)


_MEETING = Meeting()


def exchange(name: str, value: Any, timeout: float = 300.0) -> list[Any]:
    """Give a value to all processes, and get theirs.

    Args:
      name: what is exchanged, the same in all processes.
      value: a JSON value, up to some kilobytes.
      timeout: seconds to wait for the other processes.

    Returns:
      The values of all processes, in their order.

    Raises:
      TimeoutError: if processes do not give theirs in time; the message names them.

    >>> exchange("seed", 3)
    [3]
    """
    return _MEETING.exchange(name, value, timeout)


def barrier(name: str, timeout: float = 300.0) -> None:
    """Wait until all processes are here.

    Args:
      name: the place in the program, the same in all processes.
      timeout: seconds to wait.

    Raises:
      TimeoutError: if processes do not arrive in time; the message names them.

    >>> barrier("data is ready")
    """
    exchange(name, None, timeout)


def check_equal(name: str, value: Any, timeout: float = 300.0) -> None:
    """Check that all processes have the same value, such as settings, or the hash of a program.

    Args:
      name: what is compared.
      value: a JSON value.
      timeout: seconds to wait for the other processes.

    Raises:
      RuntimeError: if a process has another value; the message names it.
      TimeoutError: if processes do not arrive in time.

    >>> check_equal("batch size", 64)
    """
    values = exchange(name, value, timeout)
    for index, other in enumerate(values):
        if other != values[0]:
            raise RuntimeError(
                f"the processes differ in {name}: process 0 has {values[0]!r}, process {index} has {other!r}. Run the "
                "same script with the same arguments and library versions in all processes"
            )


__all__ = ["barrier", "check_equal", "client", "exchange"]
