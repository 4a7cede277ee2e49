"""C that is compiled on the machine where it runs, once, and kept in the cache.

XLA's compiler for CPUs makes one loop for each result, and every iteration of a scan costs it microseconds. A few
kernels in C are faster. Without a C compiler ``native_status`` gives the reason, and XLA's own programs run instead.
Kernels run on XLA's threads.
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
from pathlib import Path

import jax
import jaxlib

from nnlearn.files import cache_folder
from nnlearn.native.folder import private_folder

HEADER = Path(__file__).with_name("parallel.h")
# No flag here lets a compiler change a number: reorder a sum, or skip the rounding of a product.
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC", "-w")
FOR_THIS_PROCESSOR = ("-march=native", "-mcpu=native")  # whichever the compiler knows
PROBE = "XLA_FFI_Error* probe(XLA_FFI_CallFrame* frame) { answered(frame); return NULL; }\n"
LOCK = threading.Lock()  # XLA refuses a name that it has already
OFF = ("0", "off", "false", "no")
SECONDS = 60  # a compiler that takes longer is broken
# What the name of a kernel ends with: JAX prints it where it refuses to export a program or cannot load one.
CURE = "trace inside nnlearn.native_kernels(False) to export or serialize"

_enabled = jax.make_user_context(True)  # a part of the keys of jax.jit's caches


class CannotCompile(Exception):
    """There is no working C compiler here, or it refused."""


def native_status() -> str:
    """Whether kernels in C are used: ``"on: gcc ..."``, or ``"off: ..."`` with the reason.

    ``NNLEARN_NATIVE=0`` in the environment switches them off for a process, ``native_kernels(False)`` for a block.

    >>> native_status().split(":")[0] in ("on", "off")
    True
    """
    if os.environ.get("NNLEARN_NATIVE", "").lower() in OFF:
        return "off: NNLEARN_NATIVE=0"
    if not _enabled.value:
        return "off: inside native_kernels(False)"
    fault = _fault()
    return f"off: {fault}" if fault else f"on: {_compiler()[1]}"


def is_native() -> bool:
    """Whether kernels in C can be used for programs of the CPU."""
    return native_status().startswith("on")


@contextlib.contextmanager
def native_kernels(enabled: bool) -> Iterator[None]:
    """Trace programs with or without kernels in C inside this block.

    A compiled kernel exists on one machine alone. A program that leaves the process, by ``jax.export`` or
    ``jax.experimental.serialize_executable``, has to be traced without kernels. It then computes the same with JAX's
    own operations. Functions that were compiled outside of the block are traced again inside it.

    Args:
      enabled: False traces without kernels. True goes back to kernels inside of such a block.

    >>> import jax.export, jax.numpy as jnp
    >>> with native_kernels(False):
    ...     exported = jax.export.export(jax.jit(jnp.sin))(jnp.ones(2))
    ...     native_status()
    'off: inside native_kernels(False)'
    """
    with _enabled(bool(enabled)):
        yield


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
        try:
            return _register(name, source, flags)
        except CannotCompile:
            raise
        except Exception as error:  # no kernel may end a program that runs without it
            raise CannotCompile(f"{type(error).__name__}: {error}") from error


@functools.cache
def _register(name: str, source: str, flags: tuple[str, ...]) -> str:
    library, digest = _load(source, (*_tuning(), *flags))
    target = f"nnlearn_{name}_{digest} ({CURE})"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return target


@functools.cache
def _load(source: str, flags: tuple[str, ...] = ()) -> tuple[ctypes.CDLL, str]:
    command, version = _compiler()
    flags, header = (*FLAGS, *flags), HEADER.read_text(encoding="utf-8")
    facts = (source, header, version, " ".join(flags), jaxlib.__version__, _processor())
    digest = _hash("\0".join(facts).encode())
    try:
        folder = private_folder(cache_folder() / "native")
        # Loading a truncated library would end the process, so the name holds a hash of the content.
        for path in folder.glob(f"{digest}-*.so"):
            if path.stem.endswith(_hash(path.read_bytes())):
                return ctypes.CDLL(str(path)), digest
        return ctypes.CDLL(str(_compile(command, flags, header + source, folder / digest))), digest
    except OSError as error:
        raise CannotCompile(f"a kernel cannot be stored or loaded: {error}") from error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _compile(command: str, flags: tuple[str, ...], text: str, start: Path) -> Path:
    """The library's path, which begins with ``start``."""
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
        os.replace(built, path)  # whole or not at all, whoever else compiles the same
        return path


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler, with its messages in English, and in whatever encoding they are."""
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
    """The command, which may have arguments of its own (``CC="ccache gcc"``), and the first line of its version."""
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
    """The machine that code is compiled for: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
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
    """Why the smallest kernel cannot be compiled and loaded; empty if it can."""
    try:
        _tuning()
    except CannotCompile as error:
        return str(error)
    except Exception as error:  # no kernel may end a program that runs without it
        return f"{type(error).__name__}: {error}"
    return ""


__all__ = ["CannotCompile", "is_native", "native_kernels", "native_status", "target_name"]
