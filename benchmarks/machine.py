"""The machine of a benchmark: its description, its memory bandwidth, and the peak memory of the process."""

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import jax.numpy as jnp

import nnlearn

PACKAGES = ("nnlearn", "jax", "jaxlib", "optax", "flax", "torch", "numpy")
CPU_NUMBERS = 16_000_000  # elements of each of three arrays: 64 MB, several times the last cache
ACCELERATOR_NUMBERS = 256_000_000


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str | None:
    """The current commit, with a mark if files of the package differ from it."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--short", "--", "nnlearn") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine_facts() -> dict:
    """Hardware, versions, and the load of the machine."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "device": f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
        "devices": jax.device_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": _commit(),
        "native": nnlearn.native_status(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_at_start": list(os.getloadavg()),
    }


def peak_memory() -> dict[str, int]:
    """The peak memory of the process so far, and on an accelerator also of its first device, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peak["device"] = stats["peak_bytes_in_use"]
    return peak


class XlaTriad:
    """``b <- b + s * c`` with b donated: three arrays move, without new memory."""

    arrays = 3

    def __init__(self, numbers: int):
        self.numbers, self.b, self.c = numbers, jnp.zeros(numbers), jnp.ones(numbers)
        self.program = jax.jit(lambda b, c: b + 1e-6 * c, donate_argnums=0).lower(self.b, self.c).compile()

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.b = self.program(self.b, self.c)
        self.b.block_until_ready()


class XlaCopy(XlaTriad):
    """``b <- c`` into the memory of b: two arrays move."""

    arrays = 2

    def __init__(self, numbers: int):
        self.numbers, self.b, self.c = numbers, jnp.zeros(numbers), jnp.ones(numbers)
        # Without keep_unused, jit would drop the argument and its memory.
        copy = jax.jit(lambda b, c: jnp.copy(c), donate_argnums=0, keep_unused=True)
        self.program = copy.lower(self.b, self.c).compile()


class TorchTriad:
    """STREAM's triad ``a = b + s * c`` into existing memory; three arrays are counted, as STREAM does."""

    arrays = 3

    def __init__(self, numbers: int):
        import torch

        torch.set_num_threads(cores())
        self.add, self.numbers = torch.add, numbers
        self.a, self.b, self.c = torch.zeros(numbers), torch.ones(numbers), torch.ones(numbers)

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.add(self.b, self.c, alpha=3.0, out=self.a)


def bandwidth_rivals(quick: bool = False) -> "dict[str, XlaTriad | TorchTriad]":
    """The programs that measure memory bandwidth, to take turns with the rivals."""
    if not on_cpu():
        numbers = ACCELERATOR_NUMBERS // 16 if quick else ACCELERATOR_NUMBERS
        return {"xla triad": XlaTriad(numbers), "xla copy": XlaCopy(numbers)}
    numbers = CPU_NUMBERS // 4 if quick else CPU_NUMBERS
    rivals: dict[str, XlaTriad | TorchTriad] = {"xla triad": XlaTriad(numbers)}
    if _version("torch"):
        rivals["torch triad"] = TorchTriad(numbers)
    return rivals


def bytes_moved(rival: XlaTriad | TorchTriad) -> int:
    return rival.arrays * 4 * rival.numbers
