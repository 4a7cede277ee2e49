"""What the checks look at. Everything is computed when the first check asks for it, and once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import with_extra_args_support

from nnlearn.diagnose.examples import EXAMPLES, Data, as_data, some
from nnlearn.diagnose.metric import measured
from nnlearn.diagnose.optimizer import Answer, ask, norm_on_host
from nnlearn.diagnose.parts import Unknown, map_parts
from nnlearn.diagnose.plan import quick
from nnlearn.diagnose.probes import FREQUENT, quality
from nnlearn.diagnose.rerun import Record, rerun
from nnlearn.diagnose.slopes import Slopes, slopes_of
from nnlearn.diagnose.subject import Subject, params_of
from nnlearn.diagnose.variants import Variant, all_variants, wide_variant
from nnlearn.programs.facts import Inspection, inspect_function
from nnlearn.programs.taps import Activation, activations
from nnlearn.tree import path_name

AHEAD = 0.15  # by which a score on validation is not higher by chance


class once(functools.cached_property):
    """A property that is computed once, also if it fails: its error is raised again."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        failed = getattr(instance, "__dict__", {}).get(f"no {self.attrname}")
        if failed is not None:
            raise failed
        try:
            return super().__get__(instance, owner)
        except Exception as error:
            instance.__dict__[f"no {self.attrname}"] = error
            raise


@dataclasses.dataclass(frozen=True)
class History:
    """The network at every snapshot, on some training and validation examples, in evaluation mode if possible.

    Attributes:
      train, validation: outputs, shape (times, n, ...); None without ``predict`` or validation data.
      train_targets, validation_targets: their targets; None if they are not one array.
      kind: of the targets, as in ``Data``.
      train_loss, validation_loss: shape (times,); NaN where the loss cannot be computed.
    """

    train: np.ndarray | None
    train_targets: Any
    train_loss: np.ndarray
    validation: np.ndarray | None
    validation_targets: Any
    validation_loss: np.ndarray
    kind: str

    @functools.cached_property
    def train_scores(self) -> np.ndarray:
        return _scores(self.train, self.train_targets, self.kind, self.train_loss)

    @functools.cached_property
    def validation_scores(self) -> np.ndarray:
        return _scores(self.validation, self.validation_targets, self.kind, self.validation_loss)


@dataclasses.dataclass(eq=False)
class Evidence:
    """The evidence of one run; see the properties."""

    subject: Subject

    @once
    def run(self) -> Record:
        """The run again, with its log and its snapshots."""
        return rerun(self.subject, self.subject.plan, self.subject.start())

    @once
    def slopes(self) -> Slopes:
        """Gradients on consecutive batches at every snapshot."""
        return slopes_of(self.subject, self.run)

    @once
    def data(self) -> Data:
        """The training examples as plain arrays."""
        data = as_data(self.subject.inputs, self.subject.targets, self.subject.output_shape)
        unknown = np.asarray(data.targets).dtype.kind == "f" and np.isnan(data.targets).any()  # marked by NaN
        if unknown or not self.targets_count:
            return data._replace(kind="none", labels=None)
        shape = self.subject.output_shape
        if data.kind != "classes" or not shape or data.labels is None or data.labels.max() < np.prod(shape):
            return data
        # Outputs that are no scores of classes: of an ordinal loss, or an embedding.
        named = np.prod(shape) == 1 or self.program.of_kind("softmax")
        return data if named else data._replace(kind="none", labels=None)

    @once
    def targets_count(self) -> bool:
        """Whether the loss depends on the targets. That of clusters does not, so their numbers are free."""
        plan = self.subject.plan
        batch = jax.eval_shape(lambda: plan.batch(plan.at(0)))
        try:
            mark = lambda tree, value: jax.tree.map(lambda _: value, tree)  # noqa: E731
            marks = map_parts(batch, lambda inputs: mark(inputs, False), lambda targets: mark(targets, True))
            used = self.program.inputs
            names = [path_name(path) for path, is_target in jax.tree.leaves_with_path(marks) if is_target is True]
            known = [used[f"0/{name}"] for name in names]
        except Exception:  # a step of its own, or batches whose parts are not known
            return True
        return any(known) or not known

    @property
    def kind(self) -> str:
        """The kind of the targets, as in ``Data``; ``"none"`` if they are not known."""
        try:
            return self.data.kind
        except Unknown:
            return "none"

    @once
    def validation(self) -> Data:
        """The validation examples as plain arrays."""
        if self.subject.validation is None:
            raise Unknown("no validation data were given")
        data = as_data(*self.subject.validation, self.subject.output_shape)
        return data._replace(kind="none", labels=None) if self.kind == "none" else data

    @once
    def history(self) -> History:
        """Outputs and losses of some training and validation examples at every snapshot."""
        return _history(self.subject, self.run, self.kind)

    @once
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

    @once
    def program(self) -> Inspection:
        """What the program of the loss shows."""
        self.subject.need_loss()
        plan, state = self.subject.plan, self.run.last
        batch = jax.eval_shape(lambda: plan.batch(plan.at(0)))
        key = jax.random.key(0)
        model_state = jax.tree.map(jnp.asarray, state.model_state)
        return inspect_function(
            lambda params, batch: self.subject.loss(params, batch, key, model_state), params_of(state), batch
        )

    @once
    def clips(self) -> bool:
        """Whether the optimizer takes the smaller of two numbers for each entry, as clipping to a range does."""
        params = params_of(self.run.last)
        tx = with_extra_args_support(self.subject.tx)
        extra = {"value": jnp.ones(()), "grad": params, "value_fn": lambda _: jnp.ones(())}
        program = jax.make_jaxpr(lambda g, p: tx.update(g, tx.init(p), p, **extra)[0])(params, params)
        return any(f" {name} " in str(program) for name in ("min", "clamp"))

    @once
    def loops(self) -> bool:
        """Whether the loss runs through time, so that gradients can grow there."""
        plan, state = self.subject.plan, self.run.last
        program = jax.make_jaxpr(
            lambda params, batch, model_state: self.subject.loss(params, batch, jax.random.key(0), model_state)
        )(params_of(state), jax.eval_shape(lambda: plan.batch(plan.at(0))), state.model_state)
        return any(f" {name}[" in str(program) for name in ("scan", "while"))

    @once
    def first_loss(self) -> float:
        """The mean loss of the first batches before the first step."""
        try:
            return float(np.mean(self.slopes.loss[0]))
        except Exception:  # a step of its own
            return float(self.run.loss[0])

    @once
    def same_losses(self) -> tuple[float, float]:
        """The loss at the start and at the end of the same examples, or else of the first and last batches."""
        try:
            losses = self.history.train_loss
        except Exception:  # batches in which inputs and targets are not known
            losses = np.array([np.nan])
        if np.isfinite(losses[0]) and np.isfinite(losses[-1]):
            return float(losses[0]), float(losses[-1])
        return self.first_loss, self.last_loss

    @once
    def last_loss(self) -> float:
        """The mean loss of the last tenth of the steps."""
        return float(np.mean(self.run.loss[-max(1, self.subject.steps // 10) :]))

    @once
    def answer(self) -> Answer:
        """How the optimizer alone answers to constant gradients."""
        grads = self.slopes.grads
        size = norm_on_host(grads)
        if not np.isfinite(size) or size == 0:
            grads = jax.tree.map(
                lambda leaf: 0.01 * np.cos(1.0 + np.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), grads
            )
        return ask(self.subject, params_of(self.run.first), grads, self.subject.steps)

    @once
    def schedule(self) -> np.ndarray:
        """The learning rate of every step relative to the largest one: as recorded, or as the optimizer shows it."""
        rate = self.run.rate
        if rate is None:
            pace, coasting = self.answer.pace, self.answer.coasting
            keeps = coasting[1] / coasting[0] if coasting[0] > 1e-3 * pace[-1] > 0 else 0.0
            if keeps > 0.999 and coasting[0] > 0.5 * pace[-1]:
                pace = np.ones_like(pace)  # gradients that add up for ever; the schedule does not show
            later = min(10, len(pace) - 1)
            gathered = (1 - keeps ** (1 + later)) / (1 - keeps) if 0 < keeps < 1 else np.inf
            if later > 0 and abs(pace[later] / max(pace[0], 1e-30) / gathered - 1) < 0.1:
                pace = pace / (1 - keeps ** (1 + np.arange(len(pace))))  # momentum that builds up
            rate = np.concatenate([pace, np.full(self.subject.steps - len(pace), pace[-1])])
        top = np.max(np.abs(rate))
        return np.abs(rate) / top if np.isfinite(top) and top > 0 else np.ones(self.subject.steps)

    @once
    def variants(self) -> dict[str, Variant]:
        """Short runs with one thing changed."""
        return all_variants(
            self.subject,
            self.run,
            self.schedule,
            decays=abs(self.answer.drift) > 0,
            goes_on=bool(np.isfinite(self.last_loss)),
            kind=self.kind,
        )

    @once
    def in_float32(self) -> Variant | None:
        """The first half of the run with parameters and moments in float32; None if it cannot run."""
        count = max(1, int(self.run.at[len(self.run.at) // 2]))
        try:
            return wide_variant(self.subject, self.run, count, self.kind)
        except Exception:  # a program that fixes its types
            return None

    @once
    def metrics(self) -> np.ndarray:
        """The run's own metric at every snapshot, signed so that larger is better; NaN if it is not known."""
        return measured(self.subject, self.run.states)

    def score_at(self, step: int) -> float:
        """The quality of the parameters on training examples at a snapshot; NaN if it cannot be judged."""
        at = np.flatnonzero(self.run.at == step)
        return self._score("train_scores", int(at[0])) if len(at) else float("nan")

    @property
    def score(self) -> float:
        """The quality of the final parameters on training examples; NaN if it cannot be judged.

        If they are far better on validation, ``predict`` takes other inputs than the batches hold, and this counts.
        """
        on_training, on_validation = self._score("train_scores", -1), self.validation_score
        return on_validation if on_validation > on_training + AHEAD else on_training

    @property
    def first_score(self) -> float:
        """The quality of the initial parameters on training examples."""
        return self._score("train_scores", 0)

    @property
    def validation_score(self) -> float:
        """The quality of the final parameters on validation examples."""
        return self._score("validation_scores", -1)

    @once
    def misread(self) -> bool:
        """Whether the run's own metric, a share, is far above the validation score: outputs have another meaning."""
        if self.subject.validation is None or self.subject.mode != "max":
            return False
        try:
            metric, score, labels = self.metrics[-1], self.history.validation_scores[-1], self.validation.labels
        except Exception:  # outputs that cannot be judged
            return False
        if labels is not None and np.max(np.unique(labels, return_counts=True)[1]) > FREQUENT * len(labels):
            return False  # where a class is frequent, the score is the mean over classes
        return bool(1 >= metric > score + AHEAD)

    def _score(self, name: str, at: int) -> float:
        try:
            return float("nan") if self.misread else float(getattr(self.history, name)[at])
        except Exception:  # outputs that cannot be judged
            return float("nan")


def _scores(outputs: Any, targets: Any, kind: str, losses: np.ndarray) -> np.ndarray:
    """The quality at every snapshot; NaN if it is not known, or counts positions that the loss does not.

    A wrong answer costs a cross-entropy of log 2 at least. A smaller mean loss leaves positions out, such as padding.
    """
    if outputs is None or targets is None:
        return np.full(len(losses), np.nan)
    scores = np.array([quality(each, targets, kind) for each in outputs])
    masked = kind == "sequence" and np.any(losses < 0.5 * np.log(2) * (1 - scores))
    return np.full(len(losses), np.nan) if masked else scores


def _history(subject: Subject, run: Record, kind: str) -> History:
    train = some((subject.inputs, subject.targets), EXAMPLES)
    validation = None if subject.validation is None else some(tuple(subject.validation), EXAMPLES)
    parts = [train] if validation is None else [train, validation]

    def losses(state, part, key):
        return subject.loss(params_of(state), subject.batch_of(*part), key, state.model_state)

    def works(function, state):
        """Whether a function of a state can be traced."""
        try:
            jax.eval_shape(function, state)
            return True
        except Exception:
            return False

    first, key = run.first, jax.random.key(7)
    keys = [each for each in (None, key) if works(lambda state, key=each: losses(state, train, key), first)]
    judged = [bool(keys) and works(lambda state, part=part: losses(state, part, keys[0]), first) for part in parts]

    def outputs_of(state, part):
        return subject.outputs(params_of(state), part[0], None, state.model_state)

    has_outputs = subject.predict is not None and all(
        works(lambda state, part=part: outputs_of(state, part), first) for part in parts
    )

    def one(state):
        result = []
        for part, has_loss in zip(parts, judged, strict=True):
            loss = losses(state, part, keys[0]) if has_loss else jnp.full((), jnp.nan)
            outputs = outputs_of(state, part) if has_outputs else None
            result.append((loss, outputs))
        return result

    found = jax.jit(lambda states: jax.lax.map(one, states))(run.states)
    found = [
        (np.asarray(loss, np.float64), None if outputs is None else np.asarray(outputs)) for loss, outputs in found
    ]
    (train_loss, train_outputs), *others = found
    loss, outputs = others[0] if others else (np.full(len(train_loss), np.nan), None)
    targets = None if validation is None else _only(validation[1])
    return History(train_outputs, _only(train[1]), train_loss, outputs, targets, loss, kind)


def _only(targets: Any) -> np.ndarray | None:
    """The only array of targets, or None if there are several."""
    leaves = jax.tree.leaves(targets)
    return np.asarray(leaves[0]) if len(leaves) == 1 else None


__all__ = ["Evidence", "History", "Slopes", "once"]
