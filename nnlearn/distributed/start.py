"""Start a process of a run over several processes."""

import atexit
import os
from typing import Any

import jax

from nnlearn.distributed.place import Place, find_place
from nnlearn.distributed.watch import Watch

_started: dict[str, Any] = {}


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = 300,
    silence: float = 8.0,
) -> Place:
    """Join the processes of a run, with ``jax.distributed``; call it before anything else uses a device.

    Without arguments the place of the process comes from ``NNLEARN_COORDINATOR``, ``NNLEARN_PROCESSES`` and
    ``NNLEARN_PROCESS``, as ``nnlearn launch`` sets them, from SLURM (``srun``), or from an indexed Job of Kubernetes.
    In a program that was started in no such way it does nothing, so the same script also runs alone.

    If a process dies or fails, all others end within about 12 seconds, and name it and the cause. If process 0 is
    killed, JAX's runtime ends them at once, with a message about the leader.

    Args:
      coordinator: ``host:port`` of process 0.
      processes: the number of processes.
      process: the number of this process, from 0.
      timeout: seconds to wait for all processes at the start.
      silence: seconds without a sign of life after which a process counts as dead.

    Returns:
      The place of this process. ``jax.devices()`` has the devices of all processes from now on.

    Raises:
      ValueError: if the place of the process is incomplete or contradictory.
      RuntimeError: if the processes cannot be joined.

    >>> start(processes=1).source
    'arguments'
    """
    place = find_place(os.environ, coordinator, processes, process)
    if place.processes == 1:
        return place
    if _started:
        if _started["place"][:3] != place[:3]:
            raise RuntimeError(f"this process has already joined others as {_started['place']}: call start once")
        return place
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids=place.local_device,
            initialization_timeout=timeout,
            cluster_detection_method="deactivate",
        )
    except Exception as error:
        raise RuntimeError(
            f"process {place.process} could not join {place.processes} processes at {place.coordinator}: {error}. Call "
            "nnlearn.distributed.start() before anything uses a device, and check that all processes start within "
            f"{timeout} s and reach that address"
        ) from error
    watch = Watch(place.process, place.processes, silence)
    watch.start()
    atexit.register(watch.close)  # before JAX's own function, which waits for the others
    _started.update(place=place, watch=watch)
    return place


def announce_failure(error: BaseException) -> None:
    """Tell the other processes that this one fails, before it ends; they end, too.

    >>> announce_failure(ValueError("with one process there is nobody to tell"))
    """
    if "watch" in _started:
        _started["watch"].announce(error)


def is_first() -> bool:
    """Whether this is process 0, which writes the files of a run and shows its progress.

    >>> is_first()
    True
    """
    return jax.process_index() == 0


__all__ = ["announce_failure", "is_first", "start"]
