"""One checkpoint: a folder with a manifest and a safetensors file, written whole or not at all."""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from nnlearn.checkpoints.blobs import Written, check_file, read_arrays, write_arrays
from nnlearn.checkpoints.errors import CheckpointError
from nnlearn.checkpoints.manifest import ARRAYS, NAME, Manifest, read_manifest, to_bytes
from nnlearn.checkpoints.nodes import Arrays, Node, build, describe, named_leaves, total_bytes
from nnlearn.checkpoints.pieces import assemble, in_files, pieces_of, unpacked
from nnlearn.checkpoints.restore import Fitting, LoadReport, Missing, Names, Rename, Unexpected, check
from nnlearn.distributed import exchange
from nnlearn.files import explaining_full_disk, hold, sync_folder
from nnlearn.types import PyTree

LOCK = ".lock"
WAIT = 1800.0  # seconds that processes wait for the slowest disk


def save(
    folder: str | Path, tree: PyTree, *, metadata: Mapping[str, Any] | None = None, step: int | None = None
) -> None:
    """Save a pytree as a checkpoint that notices damage.

    The folder appears when everything is on the disk, or not at all. A checkpoint that is there already is replaced
    in one step. Drafts that killed processes have left are removed.

    Args:
      folder: where to save; its parents are made. With several processes, all call this with the same folder on one
        file system, and each writes the parts of arrays that it has.
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
    node, arrays = describe(unpacked(tree))
    write(Path(folder), node, arrays, metadata, step)


def write(folder: Path, node: Node, arrays: Arrays, metadata: Mapping[str, Any] | None, step: int | None) -> None:
    """``save`` of a tree that is described already."""
    metadata = dict(metadata or {})
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be JSON values, and finite numbers: {error}; got {metadata!r}") from error
    if jax.process_index() > 0:  # process 0 writes what all have
        arrays = pieces_of(named_leaves(node).values(), arrays)
    safe = "The checkpoint that was there is unchanged" if folder.exists() else "Nothing was left behind"
    run = _write_alone if jax.process_count() == 1 else _write_together
    with explaining_full_disk(folder, safe, total_bytes(arrays)):
        run(folder, arrays, lambda files: to_bytes(Manifest(step, metadata, library_versions(), node, files, _now())))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write_alone(folder: Path, arrays: Arrays, manifest: Callable[[dict[str, Written]], bytes]) -> None:
    with _draft(folder) as draft:
        files = dict([_write_file(draft, arrays)])
        _finish(draft, folder, files, manifest(files))


def _write_together(folder: Path, arrays: Arrays, manifest: Callable[[dict[str, Written]], bytes]) -> None:
    """Each process writes its arrays to one draft; the first one then puts it in place.

    Raises:
      OSError: in all processes, if one of them could not write.
    """
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        names = _agree("the draft of a checkpoint", lambda: stack.enter_context(_draft(folder)).name if first else None)
        draft = folder.parent / names[0]
        written = _agree("the files of a checkpoint", lambda: _write_file(draft, arrays))
        files = {name: Written(*facts) for name, facts in written}
        _agree("the end of a checkpoint", lambda: first and _finish(draft, folder, files, manifest(files)))


def _agree(name: str, action: Callable[[], Any]) -> list[Any]:
    """The results of an action in all processes.

    Raises:
      OSError: if it failed in another process; in this one, its own error.
    """
    result, failed = None, None
    try:
        result = action()
    except Exception as error:
        failed = error
    answers = exchange(name, [result, None if failed is None else f"{type(failed).__name__}: {failed}"], WAIT)
    if failed is not None:
        raise failed
    for index, (_, error) in enumerate(answers):
        if error is not None:
            raise OSError(f"process {index} could not save its part of a checkpoint: {error}")
    return [result for result, _ in answers]


def _write_file(draft: Path, arrays: Arrays) -> tuple[str, Written]:
    """Write arrays to a new file of a draft, and wait until it is on the disk."""
    if not draft.is_dir():
        raise FileNotFoundError(f"there is no folder {str(draft)!r}: all processes need the same file system")
    name = f"arrays-{os.urandom(8).hex()}.safetensors"
    with open(draft / name, "wb", buffering=0) as file:
        written = write_arrays(file, arrays)
        os.fsync(file.fileno())
    return name, written


def _finish(draft: Path, folder: Path, names: Iterable[str], manifest: bytes) -> None:
    """Complete a draft with its manifest, and put it in place."""
    with open(draft / NAME, "wb") as about:
        about.write(manifest)
        about.flush()
        os.fsync(about.fileno())
    sync_folder(draft)
    _commit(draft, folder, tuple(names))


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


def _commit(draft: Path, folder: Path, names: Sequence[str]) -> None:
    """Put a complete draft in place: renamed where nothing is there, else moved in, the manifest last."""
    (draft / LOCK).unlink()
    if not folder.exists():
        os.rename(draft, folder)
    else:
        if not (folder / NAME).exists() and any(folder.iterdir()):
            raise FileExistsError(f"{str(folder)!r} is a folder with other files: give a new folder, or an empty one")
        for name in names:
            os.rename(draft / name, folder / name)
        sync_folder(folder)
        os.replace(draft / NAME, folder / NAME)  # from here on it is the new checkpoint
        for old in folder.iterdir():
            if ARRAYS.fullmatch(old.name) and old.name not in names:
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
    arrays: Arrays = {}
    for (name, written), inside in zip(manifest.files.items(), in_files(nodes, len(manifest.files)), strict=True):
        arrays |= read_arrays(folder / name, written, inside)
    return assemble(nodes, arrays)


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
