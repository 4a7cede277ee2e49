"""C compiled on the machine that it runs on, once, and kept in the cache.

XLA's compiler for CPUs makes one loop of each result, and a loop over frames costs it microseconds a turn. A few
kernels in C do better, where there is a C compiler; where there is none, everything here says so and XLA's programs
stand. Kernels run on XLA's own threads.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jaxlib

from nnlearn.files import cache_folder

HEADER = Path(__file__).with_name("parallel.h")
# No flag here lets a compiler change a number: reorder a sum, or skip the rounding of a product.
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC", "-w")
FOR_THIS_PROCESSOR = ("-march=native", "-mcpu=native")  # whichever the compiler knows
PROBE = "XLA_FFI_Error* probe(XLA_FFI_CallFrame* frame) { answered(frame); return NULL; }\n"
LOCK = threading.Lock()  # XLA refuses a name that it has already
OFF = ("0", "off", "false", "no")
SECONDS = 60  # a compiler that takes longer is broken


class CannotCompile(Exception):
    """There is no working C compiler here, or it refused."""


def native_status() -> str:
    """Whether kernels in C are used, in words: ``"on: gcc ..."`` or ``"off: ..."`` and why.

    ``NNLEARN_NATIVE=0`` in the environment switches them off.

    >>> native_status().split(":")[0] in ("on", "off")
    True
    """
    if os.environ.get("NNLEARN_NATIVE", "").lower() in OFF:
        return "off: NNLEARN_NATIVE=0"
    fault = _fault()
    return f"off: {fault}" if fault else f"on: {_compiler()[1]}"


def is_native() -> bool:
    """Whether kernels in C can be used for programs of the CPU."""
    return native_status().startswith("on")


def target_name(name: str, source: str, flags: tuple[str, ...] = ()) -> str:
    """What XLA calls the kernel of that name in a source; registered here on first use.

    Args:
      name: of the handler, a C function ``XLA_FFI_Error* name(XLA_FFI_CallFrame*)``.
      source: C, which may use what ``parallel.h`` declares.
      flags: for the compiler, beside ``FLAGS``.

    Raises:
      CannotCompile: see ``native_status``.
    """
    with LOCK:
        return _register(name, source, flags)


@functools.cache
def _register(name: str, source: str, flags: tuple[str, ...]) -> str:
    library, digest = _load(source, (*_tuning(), *flags))
    target = f"nnlearn_{name}_{digest}"
    try:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except Exception as error:  # whatever XLA has against it: no kernel may end a program that runs without
        raise CannotCompile(f"XLA does not take the kernel: {error}") from error
    return target


@functools.cache
def _load(source: str, flags: tuple[str, ...] = ()) -> tuple[ctypes.CDLL, str]:
    command, version = _compiler()
    flags, header = (*FLAGS, *flags), HEADER.read_text()
    facts = (source, header, version, " ".join(flags), jaxlib.__version__, _processor())
    digest = _hash("\0".join(facts).encode())
    try:
        folder = _own_folder(cache_folder() / "native")
        # One that has been cut short would end the process when it is read, so each bears its content in its name.
        for path in folder.glob(f"{digest}-*.so"):
            if path.stem.endswith(_hash(path.read_bytes())):
                return ctypes.CDLL(str(path)), digest
        return ctypes.CDLL(str(_compile(command, flags, header + source, folder / digest))), digest
    except OSError as error:
        raise CannotCompile(f"a kernel could not be kept or read: {error}") from error


def _own_folder(folder: Path) -> Path:
    """The folder, made if need be, for this user alone: what lies there is run."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise CannotCompile(f"others may write to {folder}: take their right to (chmod go-w), or set NNLEARN_CACHE")
    return folder


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _compile(command: str, flags: tuple[str, ...], text: str, start: Path) -> Path:
    """The library's path, which begins with ``start``."""
    with tempfile.TemporaryDirectory(dir=start.parent, prefix="build-") as folder:
        source, built = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
        source.write_text(text)
        words = [command, *flags, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(built), "-lm"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            raise CannotCompile(f"{command} took over {SECONDS} s") from error
        if done.returncode or not built.exists():
            said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise CannotCompile(f"{command} says: {said[0]}" if said else f"{command} made nothing")
        path = start.with_name(f"{start.name}-{_hash(built.read_bytes())}.so")
        os.replace(built, path)  # whole or not at all, whoever else compiles the same
        return path


@functools.cache
def _compiler() -> tuple[str, str]:
    """The command, and the first line of what it says of its version."""
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        command = shutil.which(name)
        if not command:
            continue
        try:
            said = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if said.returncode == 0 and said.stdout:
            return command, said.stdout.splitlines()[0]
    raise CannotCompile("there is no C compiler (cc, gcc or clang, or CC in the environment)")


@functools.cache
def _processor() -> str:
    """The machine that code is compiled for: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    system = platform.system(), platform.machine(), platform.processor(), *platform.libc_ver()
    return "\n".join([*system, *sorted(set(kept))])


@functools.cache
def _tuning() -> tuple[str, ...]:
    """The flag that lets the compiler use all of this processor, if it has one."""
    for flag in FOR_THIS_PROCESSOR:
        try:
            _load(PROBE, (flag,))
        except CannotCompile:
            continue
        return (flag,)
    _load(PROBE, ())
    return ()


@functools.cache
def _fault() -> str:
    """Why the smallest of kernels cannot be compiled and loaded; empty if it can."""
    try:
        _tuning()
    except CannotCompile as error:
        return str(error)
    return ""


__all__ = ["CannotCompile", "is_native", "native_status", "target_name"]
