"""Counterfactuals: short runs of the same program with one thing changed, all in one vmapped program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax import with_extra_args_support

from nnlearn.diagnose.examples import some
from nnlearn.diagnose.metric import measured
from nnlearn.diagnose.parts import Unknown, map_parts, with_parts
from nnlearn.diagnose.plan import on_host, quick
from nnlearn.diagnose.probes import quality
from nnlearn.diagnose.rerun import Record
from nnlearn.diagnose.subject import Subject
from nnlearn.train.state import TrainState
from nnlearn.train.step import make_step
from nnlearn.types import Batch, GradientTransformation, Key, Params, PyTree

SHARE = 0.13  # of the run's first LONG steps, so that all variants cost about one and a half runs
LONG = 1000
REST = 0.06  # of the other steps
FEWEST = 40


class Change(NamedTuple):
    """What a variant changes; every leaf is an array.

    Attributes:
      pace: factor on each step's change of the parameters, shape (steps,).
      decay: 0 if the optimizer sees parameters of zero, so that weight decay does nothing; else 1.
      shift, scale: inputs become ``(inputs - shift) / scale``, trees like the floating inputs; empty if unchanged.
    """

    pace: Any
    decay: Any
    shift: PyTree
    scale: PyTree


class Variant(NamedTuple):
    """The result of a variant.

    Attributes:
      name: what was changed.
      losses: the loss of each step.
      loss: the mean loss of the last steps.
      score, validation_score: the quality on training and validation examples after the last step; NaN if unknown.
      metric: the run's own metric after the last step, signed so that larger is better; NaN if unknown.
    """

    name: str
    losses: np.ndarray
    loss: float
    score: float
    validation_score: float
    metric: float


def length(steps: int) -> int:
    """The number of steps of a variant.

    >>> length(20), length(1000), length(11_000)
    (20, 130, 730)
    """
    return min(steps, max(FEWEST, int(SHARE * min(steps, LONG) + REST * max(steps - LONG, 0))))


def run_variants(
    subject: Subject,
    names: list[str],
    starts: TrainState,
    changes: Change,
    count: int,
    examples: list[tuple[Any, Any]],
    kind: str,
) -> dict[str, Variant]:
    """Run variants of a subject from their own first states.

    Args:
      subject: the run.
      names: the names of the variants.
      starts, changes: stacked over the variants; states without keys.
      count: the number of steps.
      examples: ``(inputs, targets)`` of training and of validation to judge the network on, as far as there are.
      kind: of the targets, as in ``Data``.
    """
    subject.need_loss()
    plan, tx = subject.plan, with_extra_args_support(subject.tx)
    options = subject.train.options

    def one_step(state, change, pace, batch, key):
        step = make_step(subject.train.loss_fn, with_decay(tx, change.decay), hparams=subject.hparams, **options)
        new, info = step(state._replace(key=key), changed_inputs(batch, change), key=key)
        stored = jax.tree.map(lambda old, new: (old + pace * (new - old)).astype(old.dtype), state.stored, new.stored)
        return new._replace(stored=stored, key=None), info.loss

    @jax.jit
    def program(states, changes, rows, keys, stored_examples):
        def at(states, inputs):
            row, key, pace = inputs
            batch = plan.batch(row, stored_examples)
            return jax.vmap(lambda state, change, pace: one_step(state, change, pace, batch, subject.as_key(key)))(
                states, changes, pace
            )

        return jax.lax.scan(at, states, (rows, keys, jnp.transpose(changes.pace)))

    states, losses = program(starts, changes, plan.at(slice(count)), subject.keys[:count], plan.examples)
    losses = np.asarray(losses, np.float64).T
    judged = [_scores(subject, states, changes, each, kind) for each in examples]
    judged += [[float("nan")] * len(names)] * (2 - len(judged))
    metrics = measured(subject, states)
    metrics[_moved(changes)] = np.nan
    tail = max(3, count // 8)
    return {
        name: Variant(name, losses[at], float(np.mean(losses[at, -tail:])), judged[0][at], judged[1][at], metrics[at])
        for at, name in enumerate(names)
    }


def _scores(subject: Subject, states: Any, changes: Change, examples: Any, kind: str) -> list[float]:
    inputs, targets = examples

    def predict(state, change):
        changed = jax.tree.map(jnp.asarray, inputs) if not change.shift else _standardised(inputs, change)
        return subject.outputs(state.params, changed, None, state.model_state)

    try:
        outputs = np.asarray(jax.jit(jax.vmap(predict))(states, changes))
        return [quality(each, targets, kind) for each in outputs]
    except Exception:  # a network that is not judged; the losses remain
        return [float("nan")] * len(changes.pace)


def _moved(changes: Change) -> np.ndarray:
    """Which variants have other inputs, of which ``evaluate`` knows nothing."""
    factors = [np.asarray(scale).reshape(len(scale), -1) for scale in changes.scale]
    return np.any(np.concatenate(factors, 1) != 1, axis=1) if factors else np.zeros(len(changes.pace), bool)


def with_decay(tx: Any, decay: Any) -> GradientTransformation:
    """The optimizer with its weight decay times ``decay``: it sees parameters of that size."""

    def update(grads, state, params=None, **extra):
        seen = None if params is None else jax.tree.map(lambda leaf: (leaf * decay).astype(leaf.dtype), params)
        return tx.update(grads, state, seen, **extra)

    return tx._replace(update=update) if hasattr(tx, "_replace") else type(tx)(tx.init, update)


def changed_inputs(batch: Batch, change: Change) -> Batch:
    """A batch with its floating inputs shifted and scaled."""
    return map_parts(batch, lambda inputs: _standardised(inputs, change)) if change.shift else batch


def _standardised(inputs: PyTree, change: Change) -> PyTree:
    leaves, structure = jax.tree.flatten(inputs)
    new = [
        (jnp.asarray(leaf) - shift) / scale if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf
        for leaf, shift, scale in zip(leaves, change.shift, change.scale, strict=True)
    ]
    new = [leaf.astype(jnp.result_type(old)) for leaf, old in zip(new, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


def input_statistics(subject: Subject) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Mean and scale of each floating input per feature; 0 and 1 for others. Nearly constant features are not blown up.

    Raises:
      Unknown: if no input is floating.
    """
    leaves = jax.tree.leaves(subject.inputs)
    if not any(leaf.dtype.kind == "f" for leaf in leaves):
        raise Unknown("the inputs are not floating")
    with_parts(subject.examples, subject.inputs, subject.targets)  # raises if they cannot be put back
    shifts, scales = [], []
    for leaf in leaves:
        if leaf.dtype.kind != "f":
            shifts.append(np.zeros((), np.float32))
            scales.append(np.ones((), np.float32))
            continue
        values = leaf.astype(np.float64)
        spread = values.std(0, keepdims=True)
        shifts.append(values.mean(0, keepdims=True).astype(np.float32))
        floor = 0.1 * np.median(spread[spread > 0]) if np.any(spread > 0) else 1.0
        scales.append(np.where(spread > 0, np.maximum(spread, floor), 1.0).astype(np.float32))
    return shifts, scales


RATES = {"rate x0.01": 0.01, "rate x0.1": 0.1, "rate x0.33": 0.33, "rate x3": 3.0, "rate x10": 10.0, "rate x100": 100.0}


def all_variants(
    subject: Subject, run: Record, schedule: np.ndarray, *, decays: bool, goes_on: bool, kind: str
) -> dict[str, Variant]:
    """Other rates, the schedule held, no decay, a tenth of the rate at the end, other scales of inputs and weights.

    Args:
      subject, run: the run.
      schedule: the learning rate of every step relative to the largest one.
      decays: whether the optimizer has weight decay.
      goes_on: whether the run's last state can be continued.
      kind: of the targets, as in ``Data``.
    """
    first, last = run.first, run.last
    count = length(subject.steps)
    try:
        shift, scale = input_statistics(subject)
    except Unknown:
        shift, scale = [], []
    same = ([np.zeros_like(each) for each in shift], [np.ones_like(each) for each in scale])
    flat = np.ones(count)
    scaled = on_host(jax.jit(rescaled, compiler_options=quick())(first.stored, jax.random.key(0)))
    scaled = first._replace(stored=scaled)
    small = first._replace(stored=jax.tree.map(_tenth, first.stored))
    plan: list[tuple[str, Any, Any, float, Any]] = [
        (name, first, factor * flat, 1.0, same) for name, factor in RATES.items()
    ]
    schedule = schedule[:count]
    if np.min(schedule) < 0.5:
        plan.append(("rate held", first, 1 / np.maximum(schedule, 1e-6), 1.0, same))
    if decays:
        plan.append(("no decay", first, flat, 0.0, same))
        if goes_on:
            plan.append(("no decay at the end", last, flat, 0.0, same))
    if goes_on:
        plan.append(("rate x0.1 at the end", last, 0.1 * flat, 1.0, same))
    plan.append(("weights of unit scale", scaled, flat, 1.0, same))
    plan.append(("weights x0.1", small, flat, 1.0, same))
    if shift:
        plan.append(("inputs of unit scale", first, flat, 1.0, (shift, scale)))
        plan.append(("both of unit scale", scaled, flat, 1.0, (shift, scale)))
    stacked = [
        jax.tree.map(lambda *leaves: np.stack(leaves), *(each[column] for each in plan)) for column in (1, 2, 3, 4)
    ]
    changes = Change(stacked[1].astype(np.float32), stacked[2].astype(np.float32), *stacked[3])
    return run_variants(subject, [each[0] for each in plan], stacked[0], changes, count, _judged(subject), kind)


def wide_variant(subject: Subject, run: Record, count: int, kind: str) -> Variant:
    """The first ``count`` steps of the run with 16-bit parameters and moments in float32."""

    def wide(leaf):
        half = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 2
        return leaf[None].astype(np.float32) if half else leaf[None]

    change = Change(np.ones((1, count), np.float32), np.ones(1, np.float32), [], [])
    starts = jax.tree.map(wide, run.first)
    return run_variants(subject, ["float32"], starts, change, count, _judged(subject), kind)["float32"]


def _judged(subject: Subject) -> list[tuple[Any, Any]]:
    """Training and validation examples to judge a network on, as far as there are."""
    try:
        if subject.predict is None or subject.targets is None:
            return []
        parts = [
            (subject.inputs, subject.targets),
            *([] if subject.validation is None else [tuple(subject.validation)]),
        ]
        return [some(part) for part in parts]
    except Unknown:
        return []


def _tenth(leaf: np.ndarray) -> np.ndarray:
    """A tenth of a matrix; another leaf as it is."""
    is_matrix = leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    return (0.1 * leaf).astype(leaf.dtype) if is_matrix else leaf


def rescaled(params: Params, key: Key, gain: Any = 2.0) -> Params:
    """Parameters whose matrices have variance ``gain / inputs``; matrices of equal numbers become random."""

    def one(at, leaf):
        leaf = jnp.asarray(leaf)
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        values = leaf.astype(jnp.float32)
        spread, drawn = jnp.std(values), jax.random.normal(jax.random.fold_in(key, at), leaf.shape)
        drawn = jnp.where(spread > 1e-8, (values - jnp.mean(values)) / jnp.maximum(spread, 1e-8), drawn)
        return (drawn * jnp.sqrt(gain / np.prod(leaf.shape[:-1]))).astype(leaf.dtype)

    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [one(at, leaf) for at, leaf in enumerate(leaves)])


__all__ = ["RATES", "Variant", "all_variants", "rescaled", "wide_variant", "with_decay"]
