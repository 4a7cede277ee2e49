"""What the checks look at. Everything is computed when the first check asks for it, and once."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.diagnose.optimizer import Answer, ask
from nnlearn.diagnose.plan import on_host, quick
from nnlearn.diagnose.quality import quality
from nnlearn.diagnose.rerun import Record, leaf_names, rerun
from nnlearn.diagnose.subject import Subject, Unknown
from nnlearn.diagnose.variants import Change, Variant, input_statistics, length, run_variants
from nnlearn.programs.facts import Inspection, inspect_function
from nnlearn.programs.taps import Activation, activations
from nnlearn.tree import global_norm
from nnlearn.types import Params, PyTree

SEEDS = 3  # initial parameters that are drawn
BATCHES = 4  # consecutive batches whose gradients are compared at each snapshot
EXAMPLES = 256  # examples of each part that the network is evaluated on


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
      grads: the gradient at the first step, as a tree of NumPy arrays.
      change_norms: norm of each leaf's change until the next snapshot, shape (times - 1, leaves).
      param_norms: norm of each leaf, shape (times, leaves).
      descent: cosine of the change until the next snapshot with the negative gradient, shape (times - 1,).
      names: of the leaves.
    """

    loss: np.ndarray
    leaf_norms: np.ndarray
    leaf_zeros: np.ndarray
    mean_norms: np.ndarray
    cosines: np.ndarray
    grads: Params
    change_norms: np.ndarray
    param_norms: np.ndarray
    descent: np.ndarray
    names: tuple[str, ...]


class History(NamedTuple):
    """The network at every snapshot, on some training and validation examples, in evaluation mode if possible.

    Attributes:
      train, validation: outputs, shape (times, n, ...); None without ``predict`` or validation data.
      train_targets, validation_targets: their targets.
      train_loss, validation_loss: shape (times,); NaN where the loss cannot be computed.
    """

    train: np.ndarray | None
    train_targets: Any
    train_loss: np.ndarray
    validation: np.ndarray | None
    validation_targets: Any
    validation_loss: np.ndarray

    @property
    def train_scores(self) -> np.ndarray:
        return _scores(self.train, self.train_targets, len(self.train_loss))

    @property
    def validation_scores(self) -> np.ndarray:
        return _scores(self.validation, self.validation_targets, len(self.train_loss))


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
        return rerun(self.subject, self.subject.plan, self.subject.start())

    @functools.cached_property
    def params(self) -> Params:
        """The final parameters."""
        return params_of(self.run.last)

    @functools.cached_property
    def initial(self) -> PyTree:
        """Initial parameters of several seeds, stacked along a leading axis; the run's own are the first."""
        keys = [self.subject.key, *(1_000_003 + seed for seed in range(1, SEEDS))]
        states = [self.subject.start(key).state for key in keys]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(on_host(params_of(state)) for state in states))

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
    def history(self) -> History:
        """Outputs and losses of some training and validation examples at every snapshot."""
        return _history(self.subject, self.run)

    @functools.cached_property
    def outputs(self) -> Outputs:
        """Predictions of the final parameters on some training and validation examples."""
        subject, history, state = self.subject, self.history, self.run.last
        subject.need_predict()
        if history.train is None:
            raise Unknown("predict cannot be called with the inputs of the examples")
        noisy = None
        if subject.key_mode != "never":
            inputs = some(subject.inputs)
            predict = jax.jit(
                lambda key: subject.outputs(params_of(state), inputs, key, state.model_state), compiler_options=quick()
            )
            noisy = (np.asarray(predict(jax.random.key(1))), np.asarray(predict(jax.random.key(2))))
        validation = None if history.validation is None else history.validation[-1]
        return Outputs(history.train[-1], history.train_targets, validation, history.validation_targets, noisy)

    @property
    def curves(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The loss at every snapshot on some training examples and on validation, in evaluation mode if possible."""
        validation = self.history.validation_loss
        return self.history.train_loss, validation if np.any(np.isfinite(validation)) else None

    @functools.cached_property
    def activations(self) -> list[Activation]:
        """Activations of some training examples at the first, the middle and the last snapshot, in evaluation mode."""
        subject, states = self.subject, self.run.states
        subject.need_predict()
        chosen = [0, len(self.run.at) // 2, len(self.run.at) - 1]
        params, model_state = jax.tree.map(lambda leaf: leaf[chosen], (params_of(states), states.model_state))
        inputs = some(subject.inputs, 256)

        def one(params, model_state):
            return activations(
                lambda params, inputs: subject.outputs(params, inputs, None, model_state), params, inputs
            )

        return jax.jit(jax.vmap(one), compiler_options=quick())(params, model_state)

    @functools.cached_property
    def network(self) -> Inspection:
        """What the program of ``predict`` shows."""
        self.subject.need_predict()
        inputs, state = some(self.subject.inputs, 8), self.run.last

        def function(params, inputs):
            return self.subject.outputs(params, inputs, None, state.model_state)

        return inspect_function(function, params_of(state), inputs)

    @functools.cached_property
    def program(self) -> Inspection:
        """What the program of the loss shows."""
        self.subject.need_loss()
        plan, state = self.subject.plan, self.run.last
        batch = jax.eval_shape(lambda: plan.batch(plan.at(0)))
        key = jax.random.key(0)
        return inspect_function(
            lambda params, batch: self.subject.loss(params, batch, key, state.model_state), params_of(state), batch
        )

    @functools.cached_property
    def first_loss(self) -> float:
        """The mean loss of the first batches before the first step."""
        try:
            return float(np.mean(self.slopes.loss[0]))
        except Exception:  # a step of its own
            return float(self.run.loss[0])

    @functools.cached_property
    def same_losses(self) -> tuple[float, float]:
        """The loss at the start and at the end of the same examples, or else of the first and last batches."""
        try:
            losses = self.history.train_loss
        except Exception:  # batches in which inputs and targets are not known
            losses = np.array([np.nan])
        if np.isfinite(losses[0]) and np.isfinite(losses[-1]):
            return float(losses[0]), float(losses[-1])
        return self.first_loss, self.last_loss

    @functools.cached_property
    def last_loss(self) -> float:
        """The mean loss of the last tenth of the steps."""
        return float(np.mean(self.run.loss[-max(1, self.subject.steps // 10) :]))

    @functools.cached_property
    def answer(self) -> Answer:
        """How the optimizer alone answers to constant gradients."""
        grads = self.slopes.grads
        size = float(np.sqrt(sum(np.sum(np.square(leaf.astype(np.float64))) for leaf in jax.tree.leaves(grads))))
        if not np.isfinite(size) or size == 0:
            grads = jax.tree.map(
                lambda leaf: 0.01 * np.cos(1.0 + np.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), grads
            )
        return ask(self.subject, params_of(self.run.first), grads, self.subject.steps)

    @functools.cached_property
    def schedule(self) -> np.ndarray:
        """The learning rate of every step relative to the largest one: as recorded, or as the optimizer shows it."""
        rate = self.run.rate
        if rate is None:
            pace, coasting = self.answer.pace, self.answer.coasting
            keeps = coasting[1] / coasting[0] if coasting[0] > 1e-3 * pace[-1] > 0 else 0.0
            if 0 < keeps < 1 and len(pace) > 1 and abs(pace[1] / max(pace[0], 1e-30) - (1 + keeps)) < 0.2:
                pace = pace / (1 - keeps ** (1 + np.arange(len(pace))))  # momentum that builds up
            rate = np.concatenate([pace, np.full(self.subject.steps - len(pace), pace[-1])])
        top = np.max(np.abs(rate))
        return np.abs(rate) / top if np.isfinite(top) and top > 0 else np.ones(self.subject.steps)

    @functools.cached_property
    def variants(self) -> dict[str, Variant]:
        """Short runs with one thing changed."""
        return _variants(self)

    @property
    def score(self) -> float:
        """The quality of the final parameters on training examples; NaN if it cannot be judged."""
        return self._score("train_scores", -1)

    @property
    def first_score(self) -> float:
        """The quality of the initial parameters on training examples."""
        return self._score("train_scores", 0)

    @property
    def validation_score(self) -> float:
        """The quality of the final parameters on validation examples."""
        return self._score("validation_scores", -1)

    def _score(self, name: str, at: int) -> float:
        try:
            return float(getattr(self.history, name)[at])
        except Exception:  # outputs that cannot be judged
            return float("nan")


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
    plan = subject.plan
    near = run.at[:, None] + np.arange(BATCHES)

    def norms(tree):
        return jnp.stack([leaf_norm(leaf) for leaf in jax.tree.leaves(tree)])

    @functools.partial(jax.jit, compiler_options=quick())
    def program(states, keys, rows, examples):
        def slope(state, key, row):
            batch = plan.batch(row, examples)
            return jax.value_and_grad(subject.loss)(params_of(state), batch, subject.as_key(key), state.model_state)

        def one(each):
            state, key, rows = each
            losses, grads = jax.lax.map(lambda row: slope(state, key, row), rows)
            batches = [jax.tree.map(lambda leaf, index=index: leaf[index], grads) for index in range(BATCHES)]
            flat = [leaf.reshape(BATCHES, -1) for leaf in jax.tree.leaves(grads)]
            return {
                "loss": losses,
                "leaf_norms": jax.vmap(norms)(grads),
                "leaf_zeros": jnp.stack([jnp.mean(leaf == 0, axis=1, dtype=jnp.float32) for leaf in flat], axis=-1),
                "mean_norms": norms(jax.tree.map(lambda leaf: jnp.mean(leaf.astype(jnp.float32), 0), grads)),
                "cosines": jnp.stack([cosine(a, b) for a, b in zip(batches, batches[1:], strict=False)]),
                "first": batches[0],
            }

        return jax.lax.map(one, (states, keys, rows))

    found = program(run.states, subject.keys[run.at], plan.at(near), plan.examples)
    grads = on_host(found.pop("first"))
    params = params_of(run.states)
    changes = jax.tree.map(lambda leaf: np.diff(leaf, axis=0), params)
    return Slopes(
        **{name: np.asarray(value, np.float64) for name, value in found.items()},
        grads=jax.tree.map(lambda leaf: leaf[0], grads),
        change_norms=_norms(changes),
        param_norms=_norms(params),
        descent=-_cosines(changes, jax.tree.map(lambda leaf: leaf[:-1], grads)),
        names=leaf_names(params),
    )


def _norms(tree: PyTree) -> np.ndarray:
    """The norm of each leaf, for each row of its leading axis: shape (rows, leaves)."""
    flat = [leaf.reshape(len(leaf), -1).astype(np.float64) for leaf in jax.tree.leaves(tree)]
    return np.stack([np.sqrt(np.sum(np.square(leaf), axis=1)) for leaf in flat], axis=-1)


def _cosines(one: PyTree, other: PyTree) -> np.ndarray:
    """The cosine of the angle between two trees, for each row of their leading axis; 0 if one is zero."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    dots = sum(np.sum((a.astype(np.float64) * b).reshape(len(a), -1), axis=1) for a, b in pairs)
    sizes = np.sqrt(np.sum(_norms(one) ** 2, axis=1) * np.sum(_norms(other) ** 2, axis=1))
    return np.divide(dots, sizes, out=np.zeros_like(sizes), where=sizes > 0)


RATES = {"rate x0.01": 0.01, "rate x0.1": 0.1, "rate x0.33": 0.33, "rate x3": 3.0, "rate x10": 10.0, "rate x100": 100.0}


def _variants(evidence: Evidence) -> dict[str, Variant]:
    """Other rates, the schedule held, no decay, a tenth of the rate at the end, inputs and weights of unit scale."""
    subject, first, last = evidence.subject, evidence.run.first, evidence.run.last
    count = length(subject.steps)
    try:
        shift, scale = input_statistics(subject)
    except Unknown:
        shift, scale = [], []
    same = ([np.zeros_like(each) for each in shift], [np.ones_like(each) for each in scale])
    flat = np.ones(count)
    plan: list[tuple[str, Any, Any, float, Any]] = [
        (name, first, factor * flat, 1.0, same) for name, factor in RATES.items()
    ]
    schedule = evidence.schedule[:count]
    if np.min(schedule) < 0.5:
        plan.append(("rate held", first, 1 / np.maximum(schedule, 1e-6), 1.0, same))
    if abs(evidence.answer.drift) > 0:
        plan.append(("no decay", first, flat, 0.0, same))
    if np.isfinite(evidence.last_loss):
        plan.append(("rate x0.1 at the end", last, 0.1 * flat, 1.0, same))
    plan.append(("weights of unit scale", _rescaled(first), flat, 1.0, same))
    if shift:
        plan.append(("inputs of unit scale", first, flat, 1.0, (shift, scale)))
        plan.append(("both of unit scale", _rescaled(first), flat, 1.0, (shift, scale)))
    stacked = [
        jax.tree.map(lambda *leaves: np.stack(leaves), *(each[column] for each in plan)) for column in (1, 2, 3, 4)
    ]
    changes = Change(stacked[1].astype(np.float32), stacked[2].astype(np.float32), *stacked[3])
    return run_variants(subject, [each[0] for each in plan], stacked[0], changes, count, _judged(subject))


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


def _rescaled(state: Any) -> Any:
    """A state whose matrices have the scale of He's initialisation; zeros become random."""

    def one(number, leaf):
        if leaf.ndim < 2:
            return leaf
        wanted, spread = np.sqrt(2 / np.prod(leaf.shape[:-1])), np.std(leaf.astype(np.float64))
        drawn = (leaf - np.mean(leaf)) / spread if spread > 0 else np.random.default_rng(number).normal(size=leaf.shape)
        return (wanted * drawn).astype(leaf.dtype)

    leaves, structure = jax.tree.flatten(state.stored)
    return state._replace(stored=jax.tree.unflatten(structure, [one(at, leaf) for at, leaf in enumerate(leaves)]))


def _scores(outputs: Any, targets: Any, count: int) -> np.ndarray:
    if outputs is None or targets is None:
        return np.full(count, np.nan)
    return np.array([quality(each, targets) for each in outputs])


def _history(subject: Subject, run: Record) -> History:
    train = some((subject.inputs, subject.targets), EXAMPLES)
    validation = None if subject.validation is None else some(tuple(subject.validation), EXAMPLES)
    parts = [train] if validation is None else [train, validation]

    def losses(state, part, key):
        return subject.loss(params_of(state), subject.batch_of(*part), key, state.model_state)

    def judge(function, *arguments):
        """Whether a function can be traced."""
        try:
            jax.eval_shape(function, *arguments)
            return True
        except Exception:
            return False

    first, key = run.first, jax.random.key(7)
    keys = [each for each in (None, key) if judge(lambda key=each: losses(first, train, key))]
    has_outputs = subject.predict is not None and all(
        judge(lambda part=part: subject.outputs(params_of(first), part[0], None, first.model_state)) for part in parts
    )

    def one(state):
        result = []
        for part in parts:
            loss = losses(state, part, keys[0]) if keys else jnp.full((), jnp.nan)
            outputs = subject.outputs(params_of(state), part[0], None, state.model_state) if has_outputs else None
            result.append((loss, outputs))
        return result

    found = jax.jit(lambda states: jax.lax.map(one, states), compiler_options=quick())(run.states)
    found = [
        (np.asarray(loss, np.float64), None if outputs is None else np.asarray(outputs)) for loss, outputs in found
    ]
    (train_loss, train_outputs), *others = found
    loss, outputs = others[0] if others else (np.full(len(train_loss), np.nan), None)
    targets = None if validation is None else validation[1]
    return History(train_outputs, train[1], train_loss, outputs, targets, loss)


__all__ = ["Data", "Evidence", "History", "Outputs", "Slopes", "as_data", "cosine", "params_of", "some"]
