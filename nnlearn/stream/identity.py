"""What a run is, in a few values that JSON can hold: to notice that a run is resumed as another one."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nnlearn.checkpoints import CheckpointError
from nnlearn.checks import as_key
from nnlearn.programs.fingerprint import program_hash
from nnlearn.train.run import Train
from nnlearn.tree import path_name
from nnlearn.types import Key, PyTree

SHOWN = 6


def identity_of(train: Train, hparams: PyTree, key: Key | int) -> dict[str, Any]:
    """The parts of a run that decide its numbers.

    Returns:
      ``hparams`` and ``key`` by value, ``shapes`` of everything that the run carries, ``settings``, and the hash of
      the ``program``: the operations of a step and the arrays that it captured, such as the data.

    >>> import jax.numpy as jnp, nnlearn
    >>> batches = nnlearn.generated(lambda key, step: step)
    >>> train = nnlearn.make_train(lambda p, b, k: p**2, nnlearn.sgd, batches, jnp.ones(()), steps=4)
    >>> identity_of(train, 0.5, 0)["hparams"]
    {'(root)': 0.5}
    """
    shapes = jax.eval_shape(train.start, hparams, key)
    count = min(train.check_every, train.steps)
    program = jax.make_jaxpr(train.advance, static_argnums=(2, 3))(hparams, shapes, 0, count)
    return {
        "hparams": _by_path(hparams, _value),
        "key": _value(jax.random.key_data(as_key(key))),
        "settings": {"steps": train.steps, "check_every": train.check_every, "record_every": train.record_every},
        "shapes": shapes_by_path(shapes),
        "program": {"jax": jax.__version__, "hash": program_hash(program)},
    }


def shapes_by_path(tree: PyTree) -> dict[str, str]:
    """The dtype and shape of each array of a tree, by path.

    >>> shapes_by_path({"w": np.zeros((2, 3), np.float32)})
    {'w': 'float32[2, 3]'}
    """
    return _by_path(tree, lambda leaf: f"{leaf.dtype}{list(leaf.shape)}")


def _by_path(tree: PyTree, describe: Any) -> dict[str, Any]:
    return {path_name(path): describe(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _value(leaf: Any) -> Any:
    """A number as it is, an array by dtype, shape and hash."""
    array = np.asarray(leaf)
    if array.ndim == 0 and array.dtype.kind in "biuf" and np.isfinite(array):
        return array.item()
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How a run differs from the one that was saved, in words; empty if it does not.

    >>> differences({"hparams": {"rate": 0.1}}, {"hparams": {"rate": 0.2}})
    ['hparams: rate was 0.1, is 0.2']
    """
    words = []
    for part in ("hparams", "key", "settings", "shapes"):
        old, new = saved.get(part), now.get(part)
        if old == new:
            continue
        if not isinstance(old, dict) or not isinstance(new, dict):
            words.append(f"{part} is another")
            continue
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        shown = [f"{name} was {old.get(name, 'not there')}, is {new.get(name, 'not there')}" for name in names[:SHOWN]]
        more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        words.append(f"{part}: {'; '.join(shown + more)}")
    old, new = saved.get("program", {}), now.get("program", {})
    if old.get("jax") != new.get("jax"):
        words.append(f"jax was {old.get('jax')}, is {new.get('jax')}, so that programs cannot be compared")
    elif old != new and not any(word.startswith("shapes") for word in words):
        words.append("the program is another: its loss, model, optimizer, data, rules or records")
    return words


def refuse_another(path: Path, saved: dict[str, Any], now: dict[str, Any], changed: str) -> None:
    """Refuse to resume another run, unless ``changed`` is ``"accept"``.

    Raises:
      CheckpointError: if the runs differ; the message says how.
    """
    differ = differences(saved, now)
    if differ and changed == "error":
        cure = "changed='accept' resumes it anyway; or give another folder"
        raise CheckpointError(path, f"it is of another run. {'. '.join(differ)}. {cure}")


__all__ = ["differences", "identity_of", "refuse_another", "shapes_by_path"]
