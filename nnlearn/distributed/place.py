"""The place of a process among all: from arguments, the environment, SLURM or Kubernetes."""

import re
from collections.abc import Mapping
from typing import NamedTuple

PORT = 29_600  # the first of the ports that SLURM jobs use; the job's number is added
CURE = (
    "give start(coordinator='host:port', processes=4, process=0), set NNLEARN_COORDINATOR, NNLEARN_PROCESSES and "
    "NNLEARN_PROCESS, or run the script with 'nnlearn launch --processes 4 script.py' or srun"
)


class Place(NamedTuple):
    """The place of a process.

    Attributes:
      coordinator: ``host:port`` of process 0, at which the processes meet; "" if there is one process.
      processes: the number of processes.
      process: the number of this process, from 0.
      source: where that was found: ``arguments``, ``environment``, ``slurm``, ``kubernetes`` or ``alone``.
      local_device: the accelerator of this process on its host; None for all of them.
    """

    coordinator: str
    processes: int
    process: int
    source: str
    local_device: int | None = None


def find_place(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Place:
    """The place of this process; arguments come first, then NNLEARN_*, SLURM_* and Kubernetes' variables.

    Args:
      environment: the environment of the process.
      coordinator, processes, process: see ``start``.

    Raises:
      ValueError: if the values are incomplete or contradict each other.

    >>> find_place({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[03-04]"})
    Place(coordinator='n03:29607', processes=2, process=1, source='slurm', local_device=None)
    """
    given = (coordinator, processes, process)
    if any(value is not None for value in given):
        return _checked("arguments", *given)
    own = tuple(environment.get(f"NNLEARN_{name}") for name in ("COORDINATOR", "PROCESSES", "PROCESS"))
    if own[2] is not None or (own[0] is not None and "JOB_COMPLETION_INDEX" not in environment):
        return _checked("environment", *own)
    if "JOB_COMPLETION_INDEX" in environment:
        return _checked("kubernetes", own[0], own[1], environment["JOB_COMPLETION_INDEX"])
    if "SLURM_PROCID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        return _from_slurm(environment)
    return Place("", 1, 0, "alone")


def _from_slurm(environment: Mapping[str, str]) -> Place:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    coordinator = None
    if nodes is not None:
        port = PORT + int(environment.get("SLURM_JOB_ID", "0")) % 4000
        coordinator = environment.get("NNLEARN_COORDINATOR") or f"{first_host(nodes)}:{port}"
    place = _checked("slurm", coordinator, environment["SLURM_NTASKS"], environment["SLURM_PROCID"])
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "1"
    several = re.split(r"[(,]", tasks)[0] != "1"
    return place._replace(local_device=int(environment["SLURM_LOCALID"]) if several else None)


def first_host(nodes: str) -> str:
    """The first host of a node list of SLURM.

    >>> first_host("gpu[007-009,12],login1"), first_host("node1,node2"), first_host("a[1-2]-x")
    ('gpu007', 'node1', 'a1-x')
    """
    found = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,\[]*)", nodes)
    if found is None or not found[0]:
        raise ValueError(f"the node list {nodes!r} of SLURM names no host: set NNLEARN_COORDINATOR=host:port")
    return "".join(part or "" for part in found.groups())


def _checked(source: str, coordinator: str | None, processes: str | int | None, process: str | int | None) -> Place:
    missing = [
        name
        for name, value in {"coordinator": coordinator, "processes": processes, "process": process}.items()
        if value is None
    ]
    if missing and processes not in (1, "1"):
        raise ValueError(f"{source} gave no {' and no '.join(missing)}: {CURE}")
    try:
        count, number = int(processes or 1), int(process or 0)
    except ValueError as error:
        raise ValueError(
            f"{source} gave processes={processes!r} and process={process!r}, not numbers: {CURE}"
        ) from error
    if count < 1 or not 0 <= number < count:
        raise ValueError(f"{source} gave process={number} of processes={count}: processes count from 0")
    if count > 1 and not re.fullmatch(r".+:\d+", coordinator or ""):
        raise ValueError(f"coordinator must be 'host:port', got {coordinator!r} from {source}")
    return Place(coordinator or "", count, number, source)


__all__ = ["Place", "find_place", "first_host"]
