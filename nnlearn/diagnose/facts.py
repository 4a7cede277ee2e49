"""Facts about the examples that several checks of the data need, computed once for each diagnosis."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.diagnose.evidence import Evidence, once
from nnlearn.diagnose.examples import Data, one_array, some
from nnlearn.diagnose.formulas import binary_formulas, value_formulas, wrong_entropies
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.plan import quick
from nnlearn.diagnose.probes import (
    FREQUENT,
    ROWS,
    Smoother,
    dependence,
    neighbours,
    one_hot,
    ridge,
    row_keys,
    scores,
    separated,
    shared_rows,
    standard,
)
from nnlearn.diagnose.subject import Subject, params_of

UNLOGGED = "give the loss log-probabilities: jax.nn.log_softmax(logits)"
FEWEST = 50  # different examples
SHUFFLES = 10  # permutations of the targets that show what chance gives


class Outputs(NamedTuple):
    """Outputs of the final parameters in evaluation mode, and their targets; validation may be None."""

    train: np.ndarray
    train_targets: Any
    validation: np.ndarray | None
    validation_targets: Any


@dataclasses.dataclass(eq=False)
class Facts:
    """What can be predicted from the examples, and what the network predicts."""

    evidence: Evidence

    @once
    def data(self) -> Data:
        return self.evidence.data

    @once
    def classes(self) -> np.ndarray:
        """The labels that occur, sorted; raises ``Unknown`` if the targets are not classes."""
        if self.data.labels is None:
            raise Unknown("the targets are not classes")
        return np.unique(self.data.labels)

    @once
    def rows(self) -> np.ndarray:
        """The training examples that the predictors look at."""
        rows = np.arange(len(self.data.inputs))
        if self.evidence.subject.train.batches.examples is None and self.evidence.subject.validation is not None:
            # Generated batches may hold an example many times; its copies tell its target, but not those of new ones.
            _, once_each = np.unique(row_keys(self.data.inputs), return_index=True)
            validation = self.evidence.validation.inputs
            alike = validation.shape[1] == self.data.inputs.shape[1]
            new = alike and shared_rows(validation, self.data.inputs) < 0.2
            rows = np.sort(once_each) if new and len(once_each) >= FEWEST else rows
        return np.sort(np.random.default_rng(0).permutation(rows)[:ROWS])

    @once
    def validation_rows(self) -> np.ndarray:
        count = len(self.evidence.validation.inputs)
        return np.sort(np.random.default_rng(1).permutation(count)[: ROWS // 2])

    @once
    def tokens(self) -> int | None:
        """The number of different tokens if the inputs are sequences of integers, else None."""
        leaves = jax.tree.leaves(self.evidence.subject.inputs)
        if len(leaves) != 1 or np.asarray(leaves[0]).dtype.kind not in "iu" or np.ndim(leaves[0]) != 2:
            return None
        largest = int(np.max(leaves[0]))
        return largest + 1 if 1 < largest < 100_000 else None

    def features(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs as features: for tokens, how often each occurs and which stands first and last."""
        if self.tokens is None or self.tokens > 1000:
            return inputs
        tokens = np.clip(inputs.astype(np.int64), 0, self.tokens - 1)
        counts = np.zeros((len(tokens), self.tokens))
        np.add.at(counts, (np.arange(len(tokens))[:, None], tokens), 1.0)
        ends = [one_hot(tokens[:, at], np.arange(self.tokens)) for at in (0, -1)] if self.tokens <= 100 else []
        return np.concatenate([counts, *ends], 1)

    @once
    def smoothers(self) -> tuple[Smoother, ...]:
        """Predictors of training examples from the other ones."""
        (features,) = standard(self.features(self.data.inputs[self.rows]))
        if len(features) < 20:
            raise Unknown(f"{len(features)} examples are too few to predict one from the others")
        return neighbours(features, features), ridge(features, features)

    @once
    def validation_smoothers(self) -> tuple[Smoother, ...]:
        """Predictors of validation examples from training examples."""
        train = self.features(self.data.inputs[self.rows])
        train, validation = standard(train, self.features(self.evidence.validation.inputs[self.validation_rows]))
        return neighbours(validation, train), ridge(validation, train)

    @property
    def is_classes(self) -> bool:
        return self.data.labels is not None

    def columns(self, data: Data, rows: np.ndarray) -> np.ndarray:
        """The targets as columns of numbers, one per class or value."""
        if self.is_classes:
            if data.labels is None:
                raise Unknown("the targets of validation are not classes")
            return one_hot(data.labels[rows], self.classes)
        if self.data.kind not in ("values", "labels"):
            raise Unknown("the targets are neither one class nor one value per example")
        return np.asarray(data.targets, np.float64).reshape(len(data.inputs), -1)[rows][:, :64]

    @once
    def targets(self) -> np.ndarray:
        """The targets of ``rows`` as columns."""
        return self.columns(self.data, self.rows)

    def predictable(self, targets: np.ndarray) -> float:
        """How well the better predictor does on targets of ``rows``."""
        return max(self._score(each.weights @ targets, targets) for each in self.smoothers)

    def _score(self, predictions: np.ndarray, targets: np.ndarray) -> float:
        """The score of predictions; if a class is rare, of those that are above its share."""
        shares = self.targets.mean(0)
        if self.is_classes and shares.max() > FREQUENT:
            predictions = predictions / np.maximum(shares, 1e-12)
        if self.data.kind == "labels":
            predictions = predictions + np.where(np.abs(shares - 0.5) > 0.2, 0.5 - shares, 0)
        return scores(predictions, targets, self.data.kind)

    @once
    def attainable(self) -> float:
        """What simple predictors reach on unseen training examples."""
        if self.data.kind == "sequence":
            return self.attainable_by_position
        return self.predictable(self.targets)

    @once
    def attainable_by_position(self) -> float:
        """What a table of the tokens at the best position of the input gives for the target at each position."""
        if self.tokens is None or self.tokens > 1000:
            raise Unknown("the inputs are not sequences of tokens")
        tokens, targets = one_array(self.evidence.subject.inputs)[self.rows], np.asarray(self.data.targets)[self.rows]
        if targets.ndim != 2 or len(tokens) < 40:
            raise Unknown("the targets are not one class per position")
        classes, numbers = np.unique(targets, return_inverse=True)
        if len(classes) > 1000:
            raise Unknown("there are too many classes")
        numbers = numbers.reshape(targets.shape)
        fitted = np.arange(len(tokens)) % 2 == 0
        spots = np.unique(np.linspace(0, targets.shape[1] - 1, 12).round().astype(int))
        places = np.unique(np.linspace(0, tokens.shape[1] - 1, 64).round().astype(int))
        right, used = [], []
        # A network that predicts the next token does not see it.
        follows = targets.shape == tokens.shape and np.mean(targets[:, :-1] == tokens[:, 1:]) > 0.5
        for spot in spots:
            best = 0.0
            wanted = targets[~fitted, spot] >= 0
            for place in {*places, min(spot, tokens.shape[1] - 1)}:
                if follows and place > spot:
                    continue
                table = np.zeros((self.tokens, len(classes)))
                np.add.at(table, (tokens[fitted, place], numbers[fitted, spot]), 1.0)
                said = np.argmax(table, 1)[tokens[~fitted, place]]
                best = max(best, float(np.sum((said == numbers[~fitted, spot]) & wanted)))
            right.append(best)
            used.append(wanted.sum())
        return float(np.sum(right) / max(np.sum(used), 1))

    def dependence(self, targets: np.ndarray) -> float:
        """The correlation of the better predictor's predictions with targets of ``rows``."""
        return max(dependence(each, targets) for each in self.smoothers)

    @once
    def by_chance(self) -> tuple[float, float]:
        """Mean and deviation of ``dependence`` for shuffled targets."""
        random = np.random.default_rng(2)
        values = [self.dependence(self.targets[random.permutation(len(self.rows))]) for _ in range(SHUFFLES)]
        return float(np.mean(values)), float(np.std(values))

    @once
    def are_dependent(self) -> bool:
        """Whether the targets depend on the inputs, more than shuffled ones by 5 deviations."""
        mean, deviation = self.by_chance
        return self.dependence(self.targets) > mean + max(5 * deviation, 0.03)

    @once
    def attainable_on_validation(self) -> float:
        """What simple predictors reach on validation."""
        train = self.targets
        targets = self.columns(self.evidence.validation, self.validation_rows)
        return max(self._score(each.weights @ train, targets) for each in self.validation_smoothers)

    @once
    def guessing(self) -> float:
        """The quality of the best constant answer on validation: 0 for values."""
        if self.data.kind == "labels":
            targets = self.columns(self.evidence.validation, self.validation_rows)
            return scores(np.broadcast_to(targets.mean(0), targets.shape), targets, "labels")
        if not self.is_classes:
            return 0.0
        labels = self.evidence.validation.labels
        if labels is None:
            raise Unknown("the targets of validation are not classes")
        shares = np.unique(labels, return_counts=True)[1]
        largest = float(shares.max() / shares.sum())
        return largest if largest <= FREQUENT else 1 / len(shares)

    # -- network -------------------------------------------------------------------------------------------------------

    @once
    def outputs(self) -> Outputs:
        """The final outputs; raises ``Unknown`` without ``predict``."""
        history = self.evidence.history
        if history.train is None:
            raise Unknown("no predict was given, or the parts of the batches are not known")
        last = None if history.validation is None else history.validation[-1]
        return Outputs(history.train[-1], history.train_targets, last, history.validation_targets)

    @property
    def reached(self) -> float:
        """The quality of the network's outputs on training examples."""
        return _known(self.evidence.score, self.evidence.subject)

    @property
    def reached_on_validation(self) -> float:
        """The quality of the network's outputs on validation examples."""
        if self.evidence.subject.validation is None:
            raise Unknown("no validation data were given")
        return _known(self.evidence.validation_score, self.evidence.subject)

    @once
    def evaluate(self) -> Any:
        """``evaluate(inputs, key=None)``: the outputs of the final parameters, as a NumPy array."""
        subject, state = self.evidence.subject, self.evidence.run.last
        held = (params_of(state), state.model_state)  # arguments, because XLA would fold constants

        @functools.partial(jax.jit, compiler_options=quick())
        def compiled(held, inputs, key=None):
            return subject.outputs(held[0], inputs, key, held[1])

        def evaluate(inputs, key=None):
            return np.asarray(compiled(held, inputs) if key is None else compiled(held, inputs, key), np.float32)

        return evaluate

    @once
    def loss(self) -> Any:
        """``loss(inputs, targets, key)``: the loss of the final parameters on these examples."""
        return self._loss(self.evidence.run.last)

    @once
    def loss_at_start(self) -> Any:
        """``loss(inputs, targets, key)``: the loss of the initial parameters on these examples."""
        return self._loss(self.evidence.run.first)

    def _loss(self, state: Any) -> Any:
        held = (params_of(state), state.model_state)

        def loss(inputs, targets, key=None):
            batch = jax.tree.map(jnp.asarray, self.evidence.subject.batch_of(inputs, targets))
            return float(self._compiled_loss(held, batch, jax.random.key(3) if key is None else key))

        return loss

    @once
    def _compiled_loss(self) -> Any:
        @functools.partial(jax.jit, compiler_options=quick())
        def compiled(held, batch, key):
            return self.evidence.subject.loss(held[0], batch, key, held[1])

        return compiled

    @once
    def fairly_reached(self) -> float:
        """``reached``, or more if the loss gives outputs another meaning than the targets have.

        For values with another loss than the squared error, the squared correlation: the outputs of a quantile loss are
        off the mean by design. For two classes with distances as outputs, the accuracy at the best threshold.
        """
        if self.is_classes and self.reached < 0.97 and self.ranks_only:
            return max(self.reached, separated(self.outputs.train, self.outputs.train_targets))
        if self.data.kind != "values" or self.is_squared_error:
            return self.reached
        outputs, targets = self.outputs.train, np.asarray(self.outputs.train_targets, np.float64)
        outputs = np.asarray(outputs, np.float64).reshape(len(targets), -1)
        if outputs.shape[1] != targets.size // len(targets) or not np.all(np.isfinite(outputs)):
            return self.reached
        outputs, targets = outputs - outputs.mean(0), targets.reshape(len(targets), -1) - targets.mean(0)
        sizes = np.sum(outputs**2) * np.sum(targets**2)
        agreement = np.sum(outputs * targets)
        return max(self.reached, float(agreement**2 / sizes)) if sizes > 0 and agreement > 0 else self.reached

    @once
    def ranks_only(self) -> bool:
        """Whether outputs are single numbers for two classes that no usual loss compares with 0 and 1: distances."""
        outputs, labels = self.outputs.train, self.data.labels
        if labels is None or len(self.classes) != 2 or outputs.size != len(outputs):
            return False
        inputs, targets = some((self.evidence.subject.inputs, self.evidence.subject.targets), 64)
        flat = self.evaluate(inputs).reshape(-1).astype(np.float64)
        numbers = np.asarray(targets, np.float64).reshape(-1)
        try:
            loss = self.loss(inputs, targets)
        except Unknown:  # the batches hold more than inputs and targets
            return True
        squashed = bool(flat.min() >= 0 and flat.max() <= 1)
        usual = [binary_formulas(flat, numbers, squashed)["right"], value_formulas(flat, numbers)["right"]]
        return not any(abs(loss - each) <= 0.02 * abs(each) for each in usual)

    @once
    def wrong_entropy(self) -> str:
        """The formula of the loss if it is a cross-entropy without logarithms or of one class, at all snapshots."""
        history = self.evidence.history
        if history.train is None:
            return ""
        finite = np.isfinite(history.train_loss) & np.all(
            np.isfinite(history.train), axis=tuple(range(1, history.train.ndim))
        )
        losses, outputs = history.train_loss[finite], np.asarray(history.train[finite], np.float64)
        if len(losses) < 2:
            return ""
        known = [wrong_entropies(each, np.asarray(history.train_targets)) for each in outputs]
        names = [name for name in known[0] if all(name in formulas for formulas in known)]
        tables = {name: np.array([formulas[name] for formulas in known]) for name in names}
        return next((name for name, each in tables.items() if np.allclose(losses, each, rtol=0.01, atol=1e-3)), "")

    @once
    def unbounded_entropy(self) -> bool:
        """Whether the first loss is the cross-entropy of one output with targets beyond 0 and 1: it has no minimum."""
        history = self.evidence.history
        if history.train is None or history.train[0].size != np.size(history.train_targets):
            return False
        outputs, targets = (
            np.asarray(each, np.float64).reshape(-1) for each in (history.train[0], history.train_targets)
        )
        if targets.min() >= 0 and targets.max() <= 1:
            return False
        squashed = bool(outputs.min() >= 0 and outputs.max() <= 1)
        usual = binary_formulas(outputs, targets, squashed)["right"]
        return bool(abs(history.train_loss[0] - usual) <= 0.02 * abs(usual))

    @once
    def is_squared_error(self) -> bool:
        """Whether the loss is the squared error of ``predict``'s outputs, up to a factor."""
        ratios = []
        inputs, targets = self.evidence.subject.inputs, self.evidence.subject.targets
        count = min(32, len(self.data.inputs) // 2)
        try:
            for part in (slice(0, count), slice(count, 2 * count)):
                some_inputs, wanted = jax.tree.map(lambda leaf, part=part: np.asarray(leaf)[part], (inputs, targets))
                gap = np.reshape(self.evaluate(some_inputs), np.shape(wanted)) - wanted
                ratios.append(self.loss(some_inputs, wanted) / np.mean(np.square(gap)))
        except Exception:  # shapes that do not fit, or a loss that needs more
            return False
        return bool(abs(ratios[0] - ratios[1]) <= 0.02 * abs(ratios[1]))

    @once
    def fairly_reached_on_validation(self) -> float:
        """``reached_on_validation``, with the best threshold for distances."""
        reached, outputs = self.reached_on_validation, self.outputs
        if self.is_classes and reached < 0.97 and self.ranks_only and outputs.validation is not None:
            return max(reached, separated(outputs.validation, outputs.validation_targets))
        return reached

    @property
    def behind_on_validation(self) -> float:
        """How much the network is worse on validation than simple predictors; 0 if these are not known."""
        try:
            return self.attainable_on_validation - self.fairly_reached_on_validation
        except Unknown:
            return 0.0

    @property
    def shortfall(self) -> float:
        """How much the network is worse than simple predictors, on training or on validation examples."""
        return max(self.attainable - self.fairly_reached, self.behind_on_validation)

    def falls_short(self, margin: float) -> bool:
        """Whether simple predictors are better by this margin, on training or validation; True if it is not known."""
        try:
            return self.shortfall > margin
        except Unknown:
            return True

    def short_of(self, margin: float) -> bool:
        """Whether the network is worse on training examples than simple predictors are on unseen ones."""
        return self.fairly_reached < self.attainable - margin


def _known(value: float, subject: Subject) -> float:
    if np.isnan(value):
        subject.need_predict()
        raise Unknown("the shapes of predict's outputs and the targets do not tell how good they are")
    return value


def facts_of(evidence: Evidence) -> Facts:
    """The facts of an evidence, the same object each time."""
    if not hasattr(evidence, "_facts"):
        evidence._facts = Facts(evidence)  # type: ignore[attr-defined]
    return evidence._facts  # type: ignore[attr-defined]


__all__ = ["Facts", "facts_of"]
