"""What the checks look at. Everything is computed when the first check asks for it, and once."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.diagnose.plan import QUICK
from nnlearn.diagnose.rerun import Record, leaf_names, step_keys, watch
from nnlearn.diagnose.subject import Subject, Unknown
from nnlearn.tree import global_norm
from nnlearn.types import Params, PyTree

SEEDS = 3  # initial parameters that are drawn
BATCHES = 4  # consecutive batches whose gradients are compared at each snapshot
EXAMPLES = 512  # examples of each part that the network is evaluated on


class Data(NamedTuple):
    """The examples as plain arrays.

    Attributes:
      inputs: floats of shape (n, features).
      targets: as given, shape (n, ...).
      kind: ``"classes"`` (an integer per example), ``"one-hot"``, ``"sequence"`` (integers per position), ``"values"``
        (floats) or ``"none"``.
      labels: the class of each example, or None.
    """

    inputs: np.ndarray
    targets: Any
    kind: str
    labels: np.ndarray | None


class Slopes(NamedTuple):
    """Gradients at the snapshots, on consecutive batches with fixed parameters.

    Attributes:
      loss: shape (times, batches).
      leaf_norms: norm of each leaf's gradient, shape (times, batches, leaves).
      leaf_zeros: share of zeros in each leaf's gradient, shape (times, batches, leaves).
      mean_norms: norm of each leaf's mean gradient over the batches, shape (times, leaves).
      cosines: cosine of the gradients of neighbouring batches, shape (times, batches - 1).
      update_norms: norm of each leaf's update in the step that follows, shape (times, leaves).
      param_norms: norm of each leaf, shape (times, leaves).
      descent: cosine of the update with the negative gradient of the same batch, shape (times,).
      names: of the leaves.
    """

    loss: np.ndarray
    leaf_norms: np.ndarray
    leaf_zeros: np.ndarray
    mean_norms: np.ndarray
    cosines: np.ndarray
    update_norms: np.ndarray
    param_norms: np.ndarray
    descent: np.ndarray
    names: tuple[str, ...]


class Outputs(NamedTuple):
    """Predictions of the final parameters.

    Attributes:
      train, validation: outputs in evaluation mode; validation is None without validation data.
      train_targets, validation_targets: their targets.
      noisy: outputs on the same training examples in training mode, with two keys, or None.
    """

    train: np.ndarray
    train_targets: np.ndarray
    validation: np.ndarray | None
    validation_targets: np.ndarray | None
    noisy: tuple[np.ndarray, np.ndarray] | None


@dataclasses.dataclass(eq=False)
class Evidence:
    """The evidence of one run; see the properties."""

    subject: Subject

    @functools.cached_property
    def run(self) -> Record:
        """The run again, with its log and its snapshots."""
        return watch(self.subject, self.subject.plan, self.subject.start())

    @functools.cached_property
    def params(self) -> Params:
        """The final parameters."""
        return params_of(self.run.last)

    @functools.cached_property
    def initial(self) -> PyTree:
        """Initial parameters of several seeds, stacked along a leading axis; the run's own are the first."""
        keys = [self.subject.key, *(1_000_003 + seed for seed in range(1, SEEDS))]
        states = [self.subject.start(key).state for key in keys]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params_of(state) for state in states))

    @functools.cached_property
    def slopes(self) -> Slopes:
        """Gradients on consecutive batches at every snapshot."""
        return _slopes(self.subject, self.run)

    @functools.cached_property
    def data(self) -> Data:
        """The training examples as plain arrays."""
        return as_data(self.subject.inputs, self.subject.targets)

    @functools.cached_property
    def validation(self) -> Data:
        """The validation examples as plain arrays."""
        if self.subject.validation is None:
            raise Unknown("no validation data were given")
        return as_data(*self.subject.validation)

    @functools.cached_property
    def outputs(self) -> Outputs:
        """Predictions of the final parameters on some training and validation examples."""
        return _outputs(self.subject, self.run.last)

    @functools.cached_property
    def first_loss(self) -> float:
        """The mean loss of the first steps, before training changes much: that of the first snapshot if there is."""
        return float(self.run.loss[0])

    @functools.cached_property
    def last_loss(self) -> float:
        """The mean loss of the last tenth of the steps."""
        return float(np.mean(self.run.loss[-max(1, self.subject.steps // 10) :]))

    @functools.cached_property
    def curves(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The loss at every snapshot on some training examples and on validation, in evaluation mode if possible."""
        return _curves(self.subject, self.run)


def params_of(state: Any) -> Params:
    """The parameters in a state; of a custom state its ``params`` if it has such, else the floating leaves."""
    stored = state.stored
    if isinstance(stored, dict) and "params" in stored:
        return stored["params"]
    return getattr(stored, "params", stored)


def some(tree: PyTree, count: int = EXAMPLES) -> PyTree:
    """At most ``count`` examples of a tree of arrays, evenly spread."""
    size = len(jax.tree.leaves(tree)[0])
    rows = np.arange(size) if size <= count else np.linspace(0, size - 1, count).round().astype(int)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree)


def as_data(inputs: PyTree, targets: Any) -> Data:
    """Examples as plain arrays; of several input arrays those with numbers, side by side."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
    numbers = [leaf for leaf in leaves if leaf.dtype.kind in "fiub" or leaf.dtype.name == "bfloat16"]
    flat = [leaf.reshape(len(leaf), -1).astype(np.float64) for leaf in numbers]
    if not flat:
        raise Unknown("the inputs are not arrays of numbers")
    wide = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)
    if targets is None or not hasattr(targets, "shape"):
        return Data(wide, targets, "none", None)
    targets = np.asarray(targets)
    if targets.dtype.kind in "iub":
        if targets.ndim == 1 or (targets.ndim == 2 and targets.shape[1] == 1):
            return Data(wide, targets, "classes", targets.reshape(-1).astype(np.int64))
        return Data(wide, targets, "sequence", None)
    targets = targets.astype(np.float64)
    if targets.ndim == 2 and targets.shape[1] > 1 and _one_hot(targets):
        return Data(wide, targets, "one-hot", np.argmax(targets, -1))
    values = np.unique(targets[:4096])
    whole = len(values) <= 20 and np.all(values == np.round(values)) and len(values) < max(3, len(targets) // 8)
    if targets.size == len(targets) and whole:
        return Data(wide, targets, "classes", targets.reshape(-1).astype(np.int64))
    return Data(wide, targets, "values", None)


def _one_hot(targets: np.ndarray) -> bool:
    return bool(np.all((targets == 0) | (targets == 1)) and np.all(targets.sum(-1) == 1))


def leaf_norm(leaf: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(leaf.astype(jnp.float32)))))


def cosine(one: PyTree, other: PyTree) -> jax.Array:
    """The cosine of the angle between two trees; 0 if one of them is zero."""
    dots = jax.tree.map(lambda a, b: jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32)), one, other)
    total = sum(jax.tree.leaves(dots), jnp.zeros(()))
    norms = global_norm(one) * global_norm(other)
    return jnp.where(norms > 0, total / jnp.where(norms > 0, norms, 1), 0.0)


def _slopes(subject: Subject, run: Record) -> Slopes:
    subject.need_loss()
    step, plan, run_key = subject.step(), subject.plan, subject.start().state.key
    rows = plan.at(jnp.asarray(run.at)[:, None] + jnp.arange(BATCHES))
    keys = step_keys(run_key, subject.steps + 1)[run.at]

    def norms(tree):
        return jnp.stack([leaf_norm(leaf) for leaf in jax.tree.leaves(tree)])

    def one(state, key, rows, examples):
        state = state._replace(key=run_key)

        def slope(row):
            return jax.value_and_grad(subject.loss)(state.params, plan.batch(row, examples), key, state.model_state)

        losses, grads = jax.lax.map(slope, rows)
        each = [jax.tree.map(lambda leaf, index=index: leaf[index], grads) for index in range(BATCHES)]
        after, _ = step(state, plan.batch(jax.tree.map(lambda leaf: leaf[0], rows), examples), key=key)
        update = jax.tree.map(lambda new, old: new - old, after.params, state.params)
        mean = jax.tree.map(lambda leaf: jnp.mean(leaf.astype(jnp.float32), 0), grads)
        flat = [leaf.reshape(BATCHES, -1) for leaf in jax.tree.leaves(grads)]
        zeros = [jnp.mean(leaf == 0, axis=1, dtype=jnp.float32) for leaf in flat]
        return {
            "loss": losses,
            "leaf_norms": jnp.stack([norms(grad) for grad in each]),
            "leaf_zeros": jnp.stack(zeros, axis=-1),
            "mean_norms": norms(mean),
            "cosines": jnp.stack([cosine(a, b) for a, b in zip(each, each[1:], strict=False)]),
            "update_norms": norms(update),
            "param_norms": norms(state.params),
            "descent": cosine(update, jax.tree.map(jnp.negative, each[0])),
        }

    @functools.partial(jax.jit, compiler_options=QUICK)
    def program(states, keys, rows, examples):
        return jax.lax.map(lambda each: one(*each, examples), (states._replace(key=None), keys, rows))

    found = program(run.states, keys, rows, plan.examples)
    names = leaf_names(jax.eval_shape(lambda state: state.params, run.last))
    return Slopes(**{name: np.asarray(value, np.float64) for name, value in found.items()}, names=names)


def _outputs(subject: Subject, state: Any) -> Outputs:
    params, model_state = params_of(state), state.model_state
    evaluate = jax.jit(lambda inputs, key=None: subject.outputs(params, inputs, key, model_state), compiler_options=QUICK)

    def predict(inputs, key=None):
        return np.asarray(evaluate(inputs, key) if key is not None else evaluate(inputs), np.float32)

    inputs, targets = some((subject.inputs, subject.targets))
    validation = (None, None) if subject.validation is None else some(tuple(subject.validation))
    noisy = None
    if subject.key_mode != "never":
        noisy = (predict(inputs, jax.random.key(1)), predict(inputs, jax.random.key(2)))
    return Outputs(
        train=predict(inputs),
        train_targets=targets,
        validation=None if validation[0] is None else predict(validation[0]),
        validation_targets=validation[1],
        noisy=noisy,
    )


def _curves(subject: Subject, run: Record) -> tuple[np.ndarray, np.ndarray | None]:
    def curve(inputs, targets):
        batch = subject.batch_of(inputs, targets)

        def one(state):
            return subject.loss(params_of(state), batch, None, state.model_state)

        try:
            losses = jax.jit(lambda states: jax.lax.map(one, states), compiler_options=QUICK)(run.states)
        except Exception:  # a loss that needs a key
            keyed = lambda state: subject.loss(params_of(state), batch, jax.random.key(7), state.model_state)  # noqa: E731
            losses = jax.jit(lambda states: jax.lax.map(keyed, states), compiler_options=QUICK)(run.states)
        return np.asarray(losses, np.float64)

    inputs, targets = some((subject.inputs, subject.targets))
    validation = None if subject.validation is None else curve(*some(tuple(subject.validation)))
    return curve(inputs, targets), validation


__all__ = ["Data", "Evidence", "Outputs", "Slopes", "as_data", "cosine", "params_of", "some"]
