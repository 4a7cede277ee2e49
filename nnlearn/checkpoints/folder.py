"""One checkpoint: a folder with a manifest and a safetensors file, written whole or not at all."""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nnlearn.checkpoints.blobs import check_file, read_arrays, write_arrays
from nnlearn.checkpoints.errors import CheckpointError
from nnlearn.checkpoints.manifest import ARRAYS, NAME, Manifest, read_manifest, to_bytes
from nnlearn.checkpoints.nodes import Arrays, Node, build, describe, named_leaves, total_bytes
from nnlearn.checkpoints.restore import Fitting, LoadReport, Missing, Names, Rename, Unexpected, check
from nnlearn.files import explaining_full_disk, hold, sync_folder
from nnlearn.types import PyTree

LOCK = ".lock"


def save(
    folder: str | Path, tree: PyTree, *, metadata: Mapping[str, Any] | None = None, step: int | None = None
) -> None:
    """Save a pytree as a checkpoint that notices damage.

    The folder appears when everything is on the disk, or not at all. A checkpoint that is there already is replaced
    in one step. Drafts that killed processes have left are removed.

    Args:
      folder: where to save; its parents are made.
      tree: arrays of every dtype of JAX, NumPy arrays, typed random keys, Python numbers and strings, None, in any
        pytree: parameters, packed or not, optimizer states, ``TrainState``, flax and equinox trees. Functions in it
        are recorded by name, and come from ``like`` when it is loaded.
      metadata: JSON values to record, see ``read_metadata``.
      step: the step to record.

    Raises:
      TypeError: if a leaf cannot be saved, or ``metadata`` is not JSON; nothing is written.
      OSError: if the disk refuses, ``nnlearn.files.FullDiskError`` if it is full; an older checkpoint is unchanged.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/params", {"w": jnp.ones(2)})
    ...     load(folder + "/params", like={"w": jnp.zeros(2)})
    {'w': Array([1., 1.], dtype=float32)}
    """
    node, arrays = describe(tree)
    write(Path(folder), node, arrays, metadata, step)


def write(folder: Path, node: Node, arrays: Arrays, metadata: Mapping[str, Any] | None, step: int | None) -> None:
    """``save`` of a tree that is described already."""
    metadata = dict(metadata or {})
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be JSON values, and finite numbers: {error}; got {metadata!r}") from error
    safe = "The checkpoint that was there is unchanged" if folder.exists() else "Nothing was left behind"
    with explaining_full_disk(folder, safe, total_bytes(arrays)), _draft(folder) as draft:
        name = f"arrays-{os.urandom(8).hex()}.safetensors"
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with open(draft / name, "wb", buffering=0) as file, open(draft / NAME, "wb") as about:
            written = write_arrays(file, arrays)
            about.write(to_bytes(Manifest(step, metadata, library_versions(), node, {name: written}, created)))
            about.flush()
            os.fsync(file.fileno())
            os.fsync(about.fileno())
        sync_folder(draft)
        _commit(draft, folder, name)


@functools.cache
def library_versions() -> dict[str, str]:
    """The installed versions of nnlearn and of the libraries that compute for it."""
    found = {}
    for name in ("nnlearn", "jax", "jaxlib", "optax", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder``, held until it is committed; removed after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder)
    draft = folder.parent / f".{folder.name}.{os.urandom(8).hex()}.draft"
    draft.mkdir()
    try:
        with open(draft / LOCK, "a") as lock:
            hold(lock)
            yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def remove_drafts(folder: Path) -> None:
    """Remove the drafts of ``folder`` whose writers have ended."""
    for draft in folder.parent.glob(f".{_escaped(folder.name)}.*.draft"):
        with contextlib.suppress(OSError), open(draft / LOCK, "a") as lock:
            if hold(lock):
                shutil.rmtree(draft, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _commit(draft: Path, folder: Path, name: str) -> None:
    """Put a complete draft in place: renamed where nothing is there, else moved in, the manifest last."""
    (draft / LOCK).unlink()
    if not folder.exists():
        os.rename(draft, folder)
    else:
        if not (folder / NAME).exists() and any(folder.iterdir()):
            raise FileExistsError(f"{str(folder)!r} is a folder with other files: give a new folder, or an empty one")
        os.rename(draft / name, folder / name)
        sync_folder(folder)
        os.replace(draft / NAME, folder / NAME)  # from here on it is the new checkpoint
        for old in folder.iterdir():
            if ARRAYS.fullmatch(old.name) and old.name != name:
                old.unlink()
        sync_folder(folder)
    sync_folder(folder.parent)


def load(
    folder: str | Path,
    like: PyTree | None = None,
    *,
    only: Names | None = None,
    rename: Rename | None = None,
    missing: Missing = "error",
    unexpected: Unexpected = "error",
    report: Callable[[LoadReport], Any] | None = None,
) -> PyTree:
    """Load a checkpoint; every byte is checked before it is used, and nothing in it can run code.

    Args:
      folder: what ``save`` wrote.
      like: a tree of the same structure; its leaves, arrays or ``jax.ShapeDtypeStruct``, give types, shapes and
        shardings. A packed tree and the same tree unpacked may be loaded into one another. None for nested dicts,
        lists and NumPy arrays.
      only: the leaves of ``like`` to load: a path, its beginning (``"encoder"``) or a pattern (``"*/bias"``), several
        of them, or a function from the path. Others keep their values.
      rename: new names of saved leaves: a dict of beginnings (``{"params": ""}``), or a function from a path to its new
        path, or to None to leave it out.
      missing: ``"error"``, or ``"keep"`` for leaves that were not saved, or have another shape or dtype, to keep
        their values.
      unexpected: ``"error"``, or ``"ignore"`` for saved leaves that ``like`` does not have.
      report: is called with a ``LoadReport``; ``print`` will do.

    Returns:
      A tree with the types of ``like``, or nested dicts, lists and NumPy arrays.

    Raises:
      FileNotFoundError: if there is no such folder.
      CheckpointError: if a file is damaged, or the saved tree does not fit ``like``; the message lists the leaves.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/old", {"encoder": jnp.ones(2), "head": jnp.ones(10)})
    ...     params = {"encoder": jnp.zeros(2), "head": jnp.zeros(3)}
    ...     params = load(folder + "/old", params, missing="keep", report=print)
    loaded (1): encoder
    does not fit (1): head: saved float32[10], wanted float32[3]
    """
    folder = Path(folder)
    check_options(like, missing, unexpected, any(option is not None for option in (only, rename, report)))
    manifest = read_manifest(folder)
    arrays = read_all(folder, manifest)
    return fit_tree(folder, manifest.tree, arrays, like, only, rename, missing, unexpected, report)


def check_options(like: PyTree | None, missing: str, unexpected: str, given: bool) -> None:
    """Refuse options of ``load`` that do not exist, or that need ``like``; ``given`` if there are others."""
    if like is None and (given or missing != "error" or unexpected != "error"):
        raise ValueError("only, rename, missing, unexpected and report need like, a tree to load into")
    if missing not in ("error", "keep"):
        raise ValueError(f"missing must be 'error' or 'keep', got {missing!r}")
    if unexpected not in ("error", "ignore"):
        raise ValueError(f"unexpected must be 'error' or 'ignore', got {unexpected!r}")


def load_parts(folder: Path, like: dict[str, PyTree], other: str) -> tuple[dict[str, PyTree], PyTree]:
    """Parts of a saved dict, read once: those of ``like`` with its types, and another as nested dicts.

    Raises:
      CheckpointError: if a file is damaged, or the saved parts do not fit ``like``.
    """
    manifest = read_manifest(folder)
    arrays = read_all(folder, manifest)
    parts = fit_tree(folder, manifest.tree, arrays, like, None, None, "error", "ignore", None)
    return parts, build(manifest.tree["children"][other], arrays)


def read_all(folder: Path, manifest: Manifest) -> Arrays:
    """The arrays of a checkpoint by name, once every byte is checked.

    Raises:
      CheckpointError: if the file of arrays is damaged, missing or replaced.
    """
    leaves = named_leaves(manifest.tree).values()
    nodes = [node for node in leaves if node["kind"] in ("array", "key")]
    ((name, written),) = manifest.files.items()
    return read_arrays(folder / name, written, nodes)


def fit_tree(
    source: Path,
    node: Node,
    arrays: Arrays,
    like: PyTree | None,
    only: Names | None,
    rename: Rename | None,
    missing: Missing,
    unexpected: Unexpected,
    report: Callable[[LoadReport], Any] | None,
) -> PyTree:
    """What was read as a tree like ``like``; see ``load``."""
    if like is None:
        return build(node, arrays)
    fitting = Fitting(named_leaves(node), arrays, only, rename)
    tree = fitting.fit(like)
    found = fitting.report()
    wrong = check(found, fitting.missing, missing, unexpected)
    if wrong:
        raise CheckpointError(
            source,
            f"the saved tree and `like` differ: {wrong}. missing='keep' and unexpected='ignore' load what fits; "
            "rename= gives saved leaves other paths",
        )
    if report is not None:
        report(found)
    return tree


def verify(folder: str | Path) -> None:
    """Check every byte of a checkpoint, without loading it.

    Args:
      folder: the folder of a checkpoint that ``save`` wrote.

    Raises:
      FileNotFoundError: if there is no such folder.
      CheckpointError: if a file is damaged, missing or replaced.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/one", {"w": jnp.ones(2)})
    ...     verify(folder + "/one")
    """
    folder = Path(folder)
    for name, written in read_manifest(folder).files.items():
        check_file(folder / name, written)


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """The metadata that was saved with a checkpoint.

    Args:
      folder: the folder of a checkpoint that ``save`` wrote.

    Returns:
      The dict that was given to ``save``, of JSON types.

    Raises:
      FileNotFoundError: if there is no such folder.
      CheckpointError: if the manifest is damaged.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/one", {"w": jnp.ones(2)}, metadata={"epoch": 3})
    ...     read_metadata(folder + "/one")
    {'epoch': 3}
    """
    return read_manifest(Path(folder)).metadata


__all__ = ["load", "read_metadata", "save", "verify"]
