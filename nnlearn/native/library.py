"""Compiles C kernels once on the machine where they run, and stores them in the cache.

XLA's compiler for CPUs makes one loop for each result, and its scans cost microseconds per iteration. A few C kernels
are faster. Kernels run on XLA's threads. Without a C compiler XLA's own programs run instead, and ``native_status``
gives the reason.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import jax

from nnlearn.files import cache_folder
from nnlearn.native.folder import private_folder

HEADER = Path(__file__).with_name("parallel.h")
# No flag allows a compiler to change a result, by reordering a sum or skipping the rounding of a product.
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC", "-w")
FOR_THIS_PROCESSOR = ("-march=native", "-mcpu=native")  # the first one that the compiler accepts
PROBE = "XLA_FFI_Error* probe(XLA_FFI_CallFrame* frame) { answered(frame); return NULL; }\n"
LOCK = threading.Lock()  # XLA refuses to register a name twice
OFF = ("0", "off", "false", "no")
SECONDS = 60  # time limit of the compiler
# Suffix of a kernel's name, which JAX prints when it refuses to export a program or cannot load one.
CURE = "trace inside nnlearn.native_kernels(False) to export or serialize"

_enabled = jax.make_user_context(True)  # part of the keys of jax.jit's caches


class CannotCompile(Exception):
    """No C compiler works on this machine, or it rejected the source."""


def native_status() -> str:
    """Report whether C kernels are used: ``"on: gcc ..."``, or ``"off: ..."`` with the reason.

    ``NNLEARN_NATIVE=0`` in the environment disables them for a process, ``native_kernels(False)`` for a block. If there
    are several devices, programs use JAX's operations instead, because XLA cannot divide a kernel; the report says so.

    >>> native_status().split(":")[0] in ("on", "off")
    True
    """
    status, count = _status(), jax.device_count()
    if status.startswith("on") and count > 1:
        return f"{status}, but with {count} devices programs use JAX's operations"
    return status


def _status() -> str:
    if os.environ.get("NNLEARN_NATIVE", "").lower() in OFF:
        return "off: NNLEARN_NATIVE=0"
    if not _enabled.value:
        return "off: inside native_kernels(False)"
    fault = _fault()
    return f"off: {fault}" if fault else f"on: {_compiler()[1]}"


def is_native() -> bool:
    """Whether C kernels can be used in programs for the CPU."""
    return _status().startswith("on")


@contextlib.contextmanager
def native_kernels(enabled: bool) -> Iterator[None]:
    """Trace programs with or without C kernels inside this block.

    A compiled kernel exists on one machine only. A program that leaves the process, by ``jax.export`` or
    ``jax.experimental.serialize_executable``, must be traced without kernels. It then computes the same with JAX's
    operations. Functions that were compiled outside the block are traced again inside it.

    Args:
      enabled: False traces without kernels. True enables kernels again inside such a block.

    >>> import jax.export, jax.numpy as jnp
    >>> with native_kernels(False):
    ...     exported = jax.export.export(jax.jit(jnp.sin))(jnp.ones(2))
    ...     native_status()
    'off: inside native_kernels(False)'
    """
    with _enabled(bool(enabled)):
        yield


def target_name(name: str, source: str, flags: tuple[str, ...] = ()) -> str:
    """Compile and register a kernel on first use, and return the name by which XLA calls it.

    Args:
      name: the name of the handler, a C function ``XLA_FFI_Error* name(XLA_FFI_CallFrame*)``.
      source: C source, which may use the declarations in ``parallel.h``.
      flags: compiler flags beside ``FLAGS``.

    Raises:
      CannotCompile: if there is no working compiler or it rejects the source; see ``native_status``.
    """
    with LOCK:
        try:
            return _register(name, source, flags)
        except CannotCompile:
            raise
        except Exception as error:  # a program that runs without the kernel must not fail
            raise CannotCompile(f"{type(error).__name__}: {error}") from error


@functools.cache
def _register(name: str, source: str, flags: tuple[str, ...]) -> str:
    library, digest = _load(source, (*_tuning(), *flags))
    target = f"nnlearn_{name}_{digest} ({CURE})"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return target


@functools.cache
def _load(source: str, flags: tuple[str, ...] = ()) -> tuple[ctypes.CDLL, str]:
    command, compiler = _compiler()
    flags, header = (*FLAGS, *flags), HEADER.read_text(encoding="utf-8")
    facts = (source, header, compiler, " ".join(flags), version("jaxlib"), _processor())
    digest = _hash("\0".join(facts).encode())
    try:
        folder = private_folder(cache_folder() / "native")
        # Loading a truncated library would kill the process, so the name contains a hash of the content.
        for path in folder.glob(f"{digest}-*.so"):
            if path.stem.endswith(_hash(path.read_bytes())):
                return ctypes.CDLL(str(path)), digest
        return ctypes.CDLL(str(_compile(command, flags, header + source, folder / digest))), digest
    except OSError as error:
        raise CannotCompile(f"a kernel cannot be stored or loaded: {error}") from error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _compile(command: Sequence[str], flags: Sequence[str], text: str, start: Path) -> Path:
    """Compile a source and return the library's path, which begins with ``start``."""
    with tempfile.TemporaryDirectory(dir=start.parent, prefix="build-") as folder:
        source, built = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
        source.write_text(text, encoding="utf-8")
        words = [*command, *flags, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(built), "-lm"]
        done = _run(words)
        if done.returncode or not built.exists():
            said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            name = shlex.join(command)
            raise CannotCompile(f"{name} says: {said[0]}" if said else f"{name} made no library")
        path = start.with_name(f"{start.name}-{_hash(built.read_bytes())}.so")
        os.replace(built, path)  # atomic, as another process may compile the same kernel
        return path


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler with English messages, which may be in any encoding."""
    try:
        return subprocess.run(
            words,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise CannotCompile(f"{shlex.join(words[:1])} took more than {SECONDS} s") from error


@functools.cache
def _compiler() -> tuple[tuple[str, ...], str]:
    """Return the compiler's command with its options (``CC="ccache gcc"``) and the first line of its version."""
    for words in map(shlex.split, (os.environ.get("CC", ""), "cc", "gcc", "clang")):
        command = shutil.which(words[0]) if words else None
        if not command:
            continue
        try:
            said = _run([command, *words[1:], "--version"])
        except (OSError, CannotCompile):
            continue
        if said.returncode == 0 and said.stdout.strip():
            return (command, *words[1:]), said.stdout.strip().splitlines()[0]
    raise CannotCompile("there is no C compiler (cc, gcc or clang, or CC in the environment)")


@functools.cache
def _processor() -> str:
    """Describe the machine that code is compiled for: machines of several kinds may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    system = platform.system(), platform.machine(), platform.processor(), *platform.libc_ver()
    return "\n".join([*system, *sorted(set(kept))])


@functools.cache
def _tuning() -> tuple[str, ...]:
    """Return the flag that enables all instructions of this processor, if the compiler has one."""
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
    """Return why the smallest kernel cannot be compiled and loaded; empty if it can."""
    try:
        _tuning()
    except CannotCompile as error:
        return str(error)
    except Exception as error:  # a program that runs without the kernel must not fail
        return f"{type(error).__name__}: {error}"
    return ""


__all__ = ["CannotCompile", "is_native", "native_kernels", "native_status", "target_name"]
