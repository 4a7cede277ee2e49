"""One safetensors file and its hash: written and synced, read back strictly."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3
from safetensors import TensorSpec, serialize_file

from nnlearn.checkpoints.errors import CheckpointError
from nnlearn.checkpoints.nodes import DTYPES, Arrays, Node, byte_count, expected

CHUNK = 8 << 20
MAX_HEADER = 64 << 20
READABLE = {  # what other readers of safetensors know; the rest is written as bytes
    *("bool", "float16", "float32", "float64", "bfloat16", "complex64"),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
}

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


class Written(NamedTuple):
    """A file as a manifest records it: its size in bytes and its BLAKE3 hash in hexadecimal."""

    bytes: int
    blake3: str


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> Written:
    """Write a safetensors file, wait until it is on the disk, and hash it.

    Raises:
      OSError: if the disk is full or refuses.
    """
    specs = {name: _spec(array) for name, array in arrays.items()}
    with _library_errors_as_os_errors(path):
        serialize_file(specs, str(path), metadata={"written_by": "nnlearn"})
    with open(path, "rb") as file, ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, file.fileno())  # hashing takes less time than the disk
        digest, size = hash_file(file)
        synced.result()
    return Written(size, digest)


class _library_errors_as_os_errors:
    """The library raises its own class for a full disk; turn that into the ``OSError`` that it holds in its text."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        from safetensors import SafetensorError

        if isinstance(error, SafetensorError):
            code = next((n for n in (28, 122, 27, 5, 13) if f"os error {n}" in str(error)), 5)
            raise OSError(code, os.strerror(code), str(self.path)) from error


def _spec(array: np.ndarray) -> TensorSpec:
    known = array.dtype.name in READABLE
    shape = array.shape if known else (array.nbytes,)
    dtype = array.dtype.name if known else "uint8"
    return TensorSpec(dtype=dtype, shape=shape, data_ptr=array.ctypes.data, data_len=array.nbytes)


def hash_file(file: Any) -> tuple[str, int]:
    """The BLAKE3 hash of an open file, and its size."""
    hasher, size = blake3(), 0
    chunk = memoryview(bytearray(CHUNK))
    while count := file.readinto(chunk):
        hasher.update(chunk[:count])
        size += count
    return hasher.hexdigest(), size


def check_file(path: Path, written: Written) -> None:
    """Compare a file with its recorded size and hash.

    Raises:
      CheckpointError: if it is missing, or its size or hash is another.
    """
    with _opened(path, written) as file:
        _check_hash(path, hash_file(file)[0], written)


def _opened(path: Path, written: Written) -> Any:
    try:
        size = path.stat().st_size
        if size != written.bytes:  # before anything is allocated
            raise CheckpointError(path, f"it has {size} bytes, and {written.bytes} were saved: truncated or replaced")
        return open(path, "rb")
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
      Arrays by name, as views of one buffer.

    Raises:
      CheckpointError: if the file is damaged, or its arrays are not those described.
    """
    with _opened(path, written) as file:
        content, hasher = np.empty(written.bytes, np.uint8), blake3()
        view, at = memoryview(content.data), 0
        while count := file.readinto(view[at : at + CHUNK]):
            hasher.update(view[at : at + count])
            at += count
    if at != written.bytes:
        raise CheckpointError(path, f"it ended after {at} of {written.bytes} bytes")
    _check_hash(path, hasher.hexdigest(), written)
    places = read_header(path, content)
    arrays: Arrays = {}
    for node in nodes:
        name, (dtype, shape), size = node["name"], expected(node), byte_count(node)
        if name not in places:
            raise CheckpointError(path, f"it has no array {name!r}, which the manifest describes")
        begin, end = places[name]
        if end - begin != size:
            raise CheckpointError(path, f"array {name!r} has {end - begin} bytes, but {dtype.name}{shape} needs {size}")
        part = content[begin:end]
        if begin % dtype.itemsize:
            part = part.copy()
        arrays[name] = part.view(dtype).reshape(shape)
    return arrays


def read_header(path: Path, content: np.ndarray) -> dict[str, tuple[int, int]]:
    """Where each array lies in the bytes of a safetensors file; see ``read_entries``."""
    start, entries = read_entries(path, content)
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for name, entry in entries.items()
    }


def read_entries(path: Path, content: np.ndarray) -> tuple[int, dict[str, Any]]:
    """Where the data begin in the bytes of a safetensors file, and the checked entries of its header by name.

    Raises:
      CheckpointError: if the header is too long, is not JSON, names an array twice, or points outside of the file.
    """
    length = int.from_bytes(content[:8].tobytes(), "little")
    if len(content) < 8 or length > min(len(content) - 8, MAX_HEADER):
        raise CheckpointError(path, f"its header says that it has {length} bytes, in a file of {len(content)}")
    try:
        header = json.loads(content[8 : 8 + length].tobytes(), object_pairs_hook=refuse_duplicates)
        data = len(content) - 8 - length
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            if not (type(begin) is int and type(end) is int and 0 <= begin <= end <= data):
                raise ValueError(f"array {name!r} lies at {begin}..{end} of {data} bytes")
        return 8 + length, entries
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(path, f"its header cannot be read: {error}") from error


def read_header_file(path: Path) -> Arrays:
    """The arrays of any safetensors file by name, without a hash to compare.

    Raises:
      FileNotFoundError: if it is not there.
      CheckpointError: if its header is damaged, or an array has a dtype that is not known.
    """
    content = np.fromfile(path, np.uint8)
    start, entries = read_entries(path, content)
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
