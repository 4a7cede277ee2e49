"""``manifest.json``: what a checkpoint holds, with a hash of itself. It is checked before it is parsed."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from nnlearn.checkpoints.blobs import Written, refuse_duplicates
from nnlearn.checkpoints.errors import CheckpointError
from nnlearn.checkpoints.nodes import Node, byte_count, named_leaves
from nnlearn.checkpoints.pieces import in_files

NAME = "manifest.json"
FORMAT, VERSION = "nnlearn.checkpoint", 1
DIVIDED = 2  # the version of checkpoints with several files
MAX_BYTES = 64 << 20
ARRAYS = re.compile(r"arrays-[0-9a-f]{16}\.safetensors")  # the only names of files that are opened
FRAME = re.compile(rb'\{"blake3": "([0-9a-f]{64})", "manifest": ')


class Manifest(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: the step at which it was saved, or None.
      metadata: what the caller recorded; JSON values.
      libraries: versions of the libraries that wrote it, by name.
      tree: the description of the tree, see ``nnlearn.checkpoints.nodes``.
      files: the size and hash of each file, by name.
      created: the time in ISO 8601, UTC.
    """

    step: int | None
    metadata: dict[str, Any]
    libraries: dict[str, str]
    tree: Node
    files: dict[str, Written]
    created: str


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest as JSON: an object with the hash of the rest in front."""
    version = VERSION if len(manifest.files) == 1 else DIVIDED
    facts = manifest._asdict() | {"format": FORMAT, "version": version}
    facts["files"] = {name: written._asdict() for name, written in manifest.files.items()}
    body = json.dumps(facts, allow_nan=False).encode()
    return b'{"blake3": "' + blake3(body).hexdigest().encode() + b'", "manifest": ' + body + b"}\n"


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a checkpoint.

    Raises:
      FileNotFoundError: if there is no such folder.
      CheckpointError: if the manifest is missing, damaged, or of a newer format.
    """
    path = folder / NAME
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(path, f"it has {size} bytes, and a manifest has {MAX_BYTES} at most")
        content = path.read_bytes()
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no checkpoint {str(folder)!r}") from error
        raise CheckpointError(folder, f"it has no {NAME}: it is no checkpoint, or was not completely copied") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error
    return parse(path, content)


def parse(path: Path, content: bytes) -> Manifest:
    """The manifest in some bytes.

    Raises:
      CheckpointError: if the hash is another, or the content is not a manifest.
    """
    frame = FRAME.match(content)
    if frame is None or not content.endswith(b"}\n"):
        raise CheckpointError(path, "it does not begin and end as a manifest: it is damaged, truncated or replaced")
    body = content[frame.end() : -2]
    if blake3(body).hexdigest().encode() != frame[1]:
        raise CheckpointError(path, "its content changed after it was saved (BLAKE3 differs): the file is damaged")
    try:
        facts = json.loads(body, object_pairs_hook=refuse_duplicates)
        if facts.pop("format") != FORMAT:
            raise ValueError("it is of another format")
        if (version := facts.pop("version")) not in (VERSION, DIVIDED):
            raise ValueError(
                f"it has format version {version}, and this nnlearn reads up to {DIVIDED}: upgrade nnlearn"
            )
        files = {name: Written(**written) for name, written in facts.pop("files").items()}
        manifest = Manifest(files=files, **facts)
        _check(manifest)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Refuse names that could be paths, and sizes that no file of that size can hold."""
    for name, written in manifest.files.items():
        if not ARRAYS.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a checkpoint's file")
        if type(written.bytes) is not int or not re.fullmatch("[0-9a-f]{64}", str(written.blake3)):
            raise ValueError(f"the size or hash of {name!r} is {written}")
    if not manifest.files:
        raise ValueError("it names no file of arrays")
    arrays = [node for node in named_leaves(manifest.tree).values() if node["kind"] in ("array", "key")]
    total = sum(map(byte_count, arrays))
    if total > sum(written.bytes for written in manifest.files.values()):
        raise ValueError(f"its arrays need {total} bytes, more than its files have")
    if len({node["name"] for node in arrays}) < len(arrays):
        raise ValueError("two arrays have one name")
    in_files(arrays, len(manifest.files))


__all__ = ["ARRAYS", "NAME", "Manifest", "read_manifest", "to_bytes"]
