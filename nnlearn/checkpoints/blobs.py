"""One safetensors file and its hash: written and synced, read back strictly."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from nnlearn.checkpoints.errors import CheckpointError
from nnlearn.checkpoints.nodes import DTYPES, Arrays, Node, byte_count, expected

CHUNK = 256 << 10  # bytes that are hashed while they are in the processor's cache
LARGE = 8 << 20  # bytes for which a thread is worth its start
LARGE_CHUNK = 4 << 20  # bytes that are worth handing to another thread
ALIGNMENT = 64  # bytes, of memory that JAX on a CPU takes over without a copy
MAX_HEADER = 64 << 20

FLOAT8 = {"e4m3": "e4m3fn", "e5m2": "e5m2", "e8m0": "e8m0fnu", "e4m3fnuz": "e4m3fnuz", "e5m2fnuz": "e5m2fnuz"}
FOREIGN = {
    **{f"{kind[0].upper()}{bits}": DTYPES[f"{kind}{bits}"] for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": DTYPES[f"float{bits}"] for bits in (16, 32, 64)},
    **{f"F8_{name.upper()}": DTYPES[f"float8_{dtype}"] for name, dtype in FLOAT8.items()},
    "BOOL": DTYPES["bool"],
    "BF16": DTYPES["bfloat16"],
    "C64": DTYPES["complex64"],
}
"""The dtypes of safetensors by its names for them."""
NAMES = {dtype: name for name, dtype in FOREIGN.items()}


class Written(NamedTuple):
    """A file as a manifest records it: its size in bytes and its BLAKE3 hash in hexadecimal."""

    bytes: int
    blake3: str


def write_arrays(file: Any, arrays: Mapping[str, np.ndarray]) -> Written:
    """Write arrays in the format of safetensors, and hash them.

    A large file is on the disk when this returns, because the hash is computed meanwhile. Call ``os.fsync`` for others.

    Args:
      file: an unbuffered file, open for writing.
      arrays: contiguous arrays by name. A dtype that safetensors does not have is written as bytes.

    Raises:
      OSError: if the disk is full or refuses.
    """
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # aligned, as the format asks
    header: dict[str, Any] = {"__metadata__": {"written_by": "nnlearn"}}
    at = 0
    for name in names:
        array = arrays[name]
        known = NAMES.get(array.dtype)
        shape = [array.nbytes] if known is None else list(array.shape)
        header[name] = {"dtype": known or "U8", "shape": shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts: list[Any] = [len(text).to_bytes(8, "little") + text]
    parts += [arrays[name].reshape(-1).view(np.uint8) for name in names if arrays[name].nbytes]
    for part in parts:
        write_all(file, part)
    hasher = blake3()
    with ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, file.fileno()) if at > LARGE else None
        for part in parts:
            hasher.update(part)
        if synced is not None:
            synced.result()
    return Written(8 + len(text) + at, hasher.hexdigest())


def write_all(file: Any, content: Any) -> None:
    """Write all of some bytes to an unbuffered file; one call writes 2 GiB at most."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def hash_file(file: Any) -> str:
    """The BLAKE3 hash of an open file."""
    hasher = blake3()
    chunk = memoryview(bytearray(CHUNK))
    while count := file.readinto(chunk):
        hasher.update(chunk[:count])
    return hasher.hexdigest()


def check_file(path: Path, written: Written) -> None:
    """Compare a file with its recorded size and hash.

    Raises:
      CheckpointError: if it is missing, or its size or hash is another.
    """
    with _opened(path, written) as file:
        _check_hash(path, hash_file(file), written)


def _opened(path: Path, written: Written) -> Any:
    try:
        size = path.stat().st_size
        if size != written.bytes:  # before anything is allocated
            raise CheckpointError(path, f"it has {size} bytes, and {written.bytes} were saved: truncated or replaced")
        return open(path, "rb", buffering=0)
    except FileNotFoundError as error:
        raise CheckpointError(path, "the file is missing") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error


def _check_hash(path: Path, digest: str, written: Written) -> None:
    if digest != written.blake3:
        raise CheckpointError(path, "its content changed after it was saved (BLAKE3 differs): damaged or replaced")


def read_arrays(path: Path, written: Written, nodes: Sequence[Node]) -> Arrays:
    """Read a file that ``write_arrays`` has written.

    Args:
      path: the file.
      written: its recorded size and hash.
      nodes: the descriptions of its arrays.

    Returns:
      Arrays by name; each has memory of its own.

    Raises:
      CheckpointError: if the file is damaged, or its arrays are not those described.
    """
    hasher, data = blake3(), sum(map(byte_count, nodes))
    with _opened(path, written) as file:
        entries = _read_entries(path, file, written.bytes - data, data, hasher)
        arrays, at = _allocated(path, entries, nodes), 0
        with ThreadPoolExecutor(1) as pool:  # it hashes a part of a large array while the next one is read
            for name in sorted(arrays, key=lambda name: entries[name]["data_offsets"]):
                if entries[name]["data_offsets"][0] != at:
                    raise CheckpointError(path, f"its header has array {name!r} in a wrong place: damaged or replaced")
                memory = arrays[name].reshape(-1).view(np.uint8)
                if memory.nbytes >= LARGE or at >= LARGE:
                    at += _read_into(file, memory, lambda part: pool.submit(hasher.update, part), LARGE_CHUNK)
                else:
                    at += _read_into(file, memory, hasher.update)
    _check_hash(path, hasher.hexdigest(), written)
    return arrays


def _read_entries(path: Path, file: Any, start: int, data: int, hasher: Any) -> dict[str, Any]:
    """``parse_entries`` of an open file whose arrays must begin at ``start``."""
    length, header = np.empty(8, np.uint8), np.empty(max(start - 8, 0), np.uint8)
    _read_into(file, length, hasher.update)
    if int.from_bytes(length.tobytes(), "little") != start - 8:
        raise CheckpointError(path, "its header has another length than that which was saved: damaged or replaced")
    _read_into(file, header, hasher.update)
    return parse_entries(path, header.tobytes(), data)


def _allocated(path: Path, entries: Mapping[str, Any], nodes: Sequence[Node]) -> Arrays:
    """Empty arrays for the descriptions, which the header must agree with."""
    arrays: Arrays = {}
    for node in nodes:
        name, (dtype, shape), size = node["name"], expected(node), byte_count(node)
        if name not in entries:
            raise CheckpointError(path, f"it has no array {name!r}, which the manifest describes")
        begin, end = entries[name]["data_offsets"]
        if end - begin != size:
            raise CheckpointError(path, f"array {name!r} has {end - begin} bytes, but {dtype.name}{shape} needs {size}")
        arrays[name] = _empty(size).view(dtype).reshape(shape)
    return arrays


def _empty(size: int) -> np.ndarray:
    memory = np.empty(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size]


def _read_into(file: Any, memory: np.ndarray, update: Callable[[memoryview], Any], chunk: int = CHUNK) -> int:
    """Fill memory from a file, and hash what was read; returns the bytes read, fewer at the end of the file."""
    at, view = 0, memoryview(memory.data)
    while count := file.readinto(view[at : at + chunk]):
        update(view[at : at + count])
        at += count
    return at


def parse_entries(path: Path, text: bytes, data: int) -> dict[str, Any]:
    """The checked entries of the header of a safetensors file by name, see ``write_arrays``.

    Args:
      path: the file, for messages.
      text: the header.
      data: the number of bytes after it.

    Raises:
      CheckpointError: if the header is not JSON, names an array twice, or points outside of the file.
    """
    try:
        header = json.loads(text, object_pairs_hook=refuse_duplicates)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            if not (type(begin) is int and type(end) is int and 0 <= begin <= end <= data):
                raise ValueError(f"array {name!r} lies at {begin}..{end} of {data} bytes")
        return entries
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(path, f"its header cannot be read: {error}") from error


def read_header_file(path: Path) -> Arrays:
    """The arrays of any safetensors file by name, without a hash to compare.

    Raises:
      FileNotFoundError: if it is not there.
      CheckpointError: if its header is damaged, or an array has a dtype that is not known.
    """
    content = np.fromfile(path, np.uint8)
    length = int.from_bytes(content[:8].tobytes(), "little")
    if len(content) < 8 or length > min(len(content) - 8, MAX_HEADER):
        raise CheckpointError(path, f"its header says that it has {length} bytes, in a file of {len(content)}")
    start = 8 + length
    entries = parse_entries(path, content[8:start].tobytes(), len(content) - start)
    arrays: Arrays = {}
    for name, entry in entries.items():
        try:
            dtype = np.dtype(FOREIGN[entry["dtype"]])
            begin, end = entry["data_offsets"]
            arrays[name] = content[start + begin : start + end].copy().view(dtype).reshape(entry["shape"])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(path, f"array {name!r} cannot be read: {error}") from error
    return arrays


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict.

    Raises:
      ValueError: if a key stands there twice.
    """
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return table


__all__ = ["Written", "check_file", "read_arrays", "read_header_file", "refuse_duplicates", "write_arrays"]
