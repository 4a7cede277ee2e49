"""The parts of a run that a diagnosis takes apart: loss, optimizer, batches, examples, network."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.calls import asks_for, hand
from nnlearn.checks import as_key
from nnlearn.data import MaskedBatch, example_count
from nnlearn.diagnose.examples import in_form_of
from nnlearn.diagnose.parts import Unknown, parts_like, parts_of, with_parts
from nnlearn.diagnose.plan import Plan, make_plan, quick
from nnlearn.train.custom_step import is_carried, lift_step, made_step
from nnlearn.train.loop import Run
from nnlearn.train.run import Train, made_tx
from nnlearn.train.state import TrainState
from nnlearn.train.step import Info, make_step, step_key
from nnlearn.train.stopping import check_mode
from nnlearn.types import Batch, GradientTransformation, Key, Params, PyTree

SHORT = 1.5  # epochs in which a usual rate and network learn little
MORE = 4  # batches beyond the end of the run, for comparisons of neighbours
OUTPUTS = ("logits", "outputs", "output", "predictions", "prediction")  # names in a dict of results
GENERATED = 32  # generated batches that stand for the data


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A run and what belongs to it, as given to ``diagnose``.

    Attributes:
      train: the run.
      hparams, key: its arguments.
      predict: ``predict(params, inputs)`` or ``predict(params, inputs, key)``, or None.
      validation: ``(inputs, targets)``, or None.
      metric: the name of a metric of ``evaluate``, or None.
      mode: whether a large (``"max"``) or a small (``"min"``) metric is better.
    """

    train: Train
    hparams: PyTree
    key: Any
    predict: Callable[..., Any] | None = None
    validation: tuple[Any, Any] | None = None
    metric: str | None = None
    mode: Literal["min", "max"] = "max"

    @property
    def steps(self) -> int:
        return self.train.steps

    @property
    def epochs(self) -> float:
        """How often the run sees each example; infinite if the examples are generated."""
        per_epoch = self.train.batches.epoch_steps
        return self.steps / per_epoch if per_epoch else np.inf

    @functools.cached_property
    def plain_train(self) -> Train:
        """The run with unpacked parameters and without rules; its batches are in ``plan``."""
        batches = self.train.batches._replace(start=lambda key, stride: ())
        packing = {"packed": False, "labels": None} if self.has_loss else self.train.packing
        return dataclasses.replace(self.train, packing=packing, stop=(), evaluate=None, batches=batches)

    @property
    def has_loss(self) -> bool:
        """Whether the run has a loss function and an optimizer, instead of a step of its own."""
        return self.train.loss_fn is not None

    @functools.cached_property
    def tx(self) -> GradientTransformation:
        self.need_loss()
        return made_tx(self.train.make_tx, self.hparams)

    def need_loss(self) -> None:
        if not self.has_loss:
            raise Unknown("the run has a step of its own, not a loss_fn and an optimizer")

    def need_predict(self) -> None:
        if self.predict is None:
            raise Unknown("no predict was given")

    def step(self) -> Callable[..., tuple[TrainState, Info]]:
        """``step(state, batch, key=key) -> (state, info)``, the run's own."""
        if not self.has_loss:
            assert self.train.step is not None
            return lift_step(made_step(self.train.step, self.hparams), self.hparams)
        record = ("grad_norm", "update_norm")
        return make_step(self.train.loss_fn, self.tx, record=record, hparams=self.hparams, **self.train.options)

    def loss(self, params: Params, batch: Batch, key: Key | None, model_state: PyTree = None) -> jax.Array:
        """The loss of a batch, without aux and model state."""
        self.need_loss()
        result = hand(self.train.loss_fn, params, batch, key, model_state=model_state, hparams=self.hparams)
        return jnp.asarray(result[0] if isinstance(result, tuple) else result)

    @functools.cached_property
    def _start(self) -> Callable[[Key], Run]:
        return jax.jit(lambda key: self.plain_train.start(self.hparams, key), compiler_options=quick())

    def start(self, key: Any = None) -> Run:
        """The run before its first step, with unpacked parameters."""
        if key is None:
            return self._first
        return self._start(as_key(key))

    @functools.cached_property
    def _first(self) -> Run:
        return self._start(as_key(self.key))

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """The data of the random key of every step, and of a few more."""

        def all_keys(key):
            return jax.random.key_data(jax.vmap(step_key, (None, 0))(key, jnp.arange(self.steps + MORE)))

        return np.asarray(jax.jit(all_keys, compiler_options=quick())(self.start().state.key))

    def as_key(self, data: Any) -> Key:
        """A random key from its data."""
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(self.start().state.key))

    @functools.cached_property
    def plan(self) -> Plan:
        """The batches of the run, and a few more."""
        return make_plan(self.train.batches, self.start().data_key, self.steps + MORE)

    # -- data ----------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def examples(self) -> Batch:
        """All stored examples, or those of the first generated batches, as NumPy arrays."""
        if self.train.batches.examples is not None:
            return jax.tree.map(np.asarray, self.train.batches.examples())
        batches = self.plan.batches(np.arange(min(GENERATED, self.steps)))
        stacked = jax.tree.map(np.asarray, batches)
        leaves = jax.tree.leaves(stacked)
        if not leaves or any(leaf.ndim < 2 for leaf in leaves):
            raise Unknown("the batches are generated, and have no axis of examples")
        if isinstance(stacked, MaskedBatch):
            stacked = stacked.examples
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacked)

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any]:
        examples = self.examples
        if isinstance(examples, tuple | list) and len(examples) > 2 and not hasattr(examples, "inputs"):
            if self.validation is None:
                raise Unknown("the batches hold more than inputs and targets")
            return parts_like(examples, *self.validation)
        return parts_of(examples)

    @property
    def inputs(self) -> PyTree:
        """The inputs of all examples; raises ``Unknown`` if they cannot be told from the targets."""
        return self._parts[0]

    @property
    def targets(self) -> Any:
        """The targets of all examples, or None if there are none. The network of a reconstruction has its inputs."""
        inputs, targets = self._parts
        return inputs if targets is None and self._reconstructs else targets

    @functools.cached_property
    def _reconstructs(self) -> bool:
        """Whether batches are one array of numbers, and the network's outputs have its shape."""
        inputs = self._parts[0]
        if not hasattr(inputs, "dtype") or inputs.dtype.kind != "f" or inputs.ndim < 2 or inputs[0].size < 3:
            return False
        return self.output_shape == inputs.shape[1:]

    def batch_of(self, inputs: PyTree, targets: Any) -> Batch:
        """A batch of these examples, in the form that ``loss_fn`` takes."""
        like = jax.eval_shape(lambda: self.plan.batch(self.plan.at(0)))
        masked = isinstance(like, MaskedBatch)
        examples = with_parts(like.examples if masked else like, inputs, targets)
        if not masked:
            return examples
        return MaskedBatch(examples, jnp.ones(example_count(examples), bool))

    # -- network -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def key_mode(self) -> str:
        """How ``predict`` takes a key: ``"optional"``, ``"needed"`` or ``"never"``."""
        if self.predict is None:
            raise Unknown("no predict was given")
        try:
            parameters = [
                each
                for name, each in inspect.signature(self.predict).parameters.items()
                if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) and name != "model_state"
            ]
        except (TypeError, ValueError):
            return "never"
        if len(parameters) < 3:
            return "never"
        default = parameters[2].default
        if default is inspect.Parameter.empty:
            return "needed"
        is_key = default is None or isinstance(default, jax.Array)  # otherwise an option, such as train=False
        return "optional" if is_key else "never"

    @functools.cached_property
    def output_shape(self) -> tuple[int, ...] | None:
        """The shape of ``predict``'s output for one example, or None if it is not known."""
        try:
            inputs = jax.tree.map(lambda leaf: np.asarray(leaf)[:2], self.inputs)
            state = self.start().state
            key = None if self.key_mode != "needed" else jax.random.key(0)
            outputs = jax.eval_shape(
                lambda state, inputs: self.outputs(params_of(state), inputs, key, state.model_state), state, inputs
            )
            return tuple(outputs.shape[1:]) if outputs.shape[0] == 2 else None
        except Exception:  # no predict, or an odd one
            return None

    def outputs(self, params: Params, inputs: PyTree, key: Key | None = None, model_state: PyTree = None) -> Any:
        """The outputs of ``predict``, in training mode if there is a key.

        Raises:
          Unknown: if there is no ``predict``, or it takes no key.
        """
        if self.key_mode == "never" and key is not None:
            raise Unknown("predict takes no key")
        predict = self.predict
        assert predict is not None  # key_mode raises otherwise
        arguments = () if self.key_mode == "never" or (key is None and self.key_mode == "optional") else (key,)
        if model_state is not None and asks_for(predict, "model_state"):
            result = predict(params, inputs, *arguments, model_state=model_state)
        else:
            result = predict(params, inputs, *arguments)
        result = result[0] if isinstance(result, tuple) else result
        if isinstance(result, Mapping):
            named = [name for name in OUTPUTS if name in result]
            names = named or list(result)
            if not named and len(names) != 1:
                raise ValueError(
                    f"predict returns {', '.join(map(str, names))}; return the outputs alone, or as 'logits'"
                )
            result = result[names[0]]
        return result


def make_subject(
    train: Train,
    hparams: PyTree,
    key: Key | int,
    predict: Callable[..., Any] | None = None,
    validation: Any = None,
    metric: str | None = None,
    mode: Literal["min", "max"] = "max",
) -> Subject:
    """A ``Subject`` of checked arguments.

    Raises:
      TypeError: if ``train`` is not made by ``make_train``.
      ValueError: if ``mode`` or ``metric`` is unknown, ``predict`` fails on the inputs, or ``validation`` is no pair.
      Exception: what ``train`` itself raises when it is traced.
    """
    if not isinstance(train, Train):
        raise TypeError(
            f"train must be made by make_train, got {type(train).__name__}; for a run of fit, give its trace to "
            "nnlearn.diagnose_trace, or write it with make_train as in the documentation, 'My run is a fit'"
        )
    check_mode(mode)
    subject = Subject(train, hparams, as_key(key), predict, _pair(validation), metric, mode)
    _check_run(subject)
    if subject.validation is not None:
        with contextlib.suppress(Exception):  # parts that are not known; the checks say so
            inputs, targets = subject.validation
            subject = dataclasses.replace(subject, validation=(inputs, in_form_of(targets, subject.targets)))
    if predict is not None:
        _check_predict(subject)
    return subject


def _pair(validation: Any) -> tuple[Any, Any] | None:
    """``(inputs, targets)`` of validation examples in any form that tells them apart."""
    if validation is None:
        return None
    try:
        inputs, targets = parts_of(validation)
    except Unknown:
        inputs, targets = None, None
    if targets is None or (type(validation) in (tuple, list) and len(validation) != 2):
        given = f"the keys {sorted(map(str, validation))}" if isinstance(validation, Mapping) else ""
        given = given or (f"{len(validation)} parts" if isinstance(validation, tuple | list) else "no parts")
        raise ValueError(
            f"validation must be a pair (inputs, targets), got a {type(validation).__name__} with {given}; several "
            "inputs are a pair, too: ((tokens, mask), labels)"
        )
    return inputs, targets


def _check_run(subject: Subject) -> None:
    """Raise what the run itself raises, and if it has no metric of this name."""
    try:
        _, trace = jax.eval_shape(lambda key: subject.train(subject.hparams, key), subject.key)
    except Exception as error:
        error.add_note("train(hparams, key) raises this by itself, so there is no run to diagnose.")
        raise
    known = trace.metrics
    if subject.metric is not None and isinstance(known, Mapping) and subject.metric not in known:
        raise ValueError(f"metric must be one of the metrics of evaluate, {', '.join(known)}; got {subject.metric!r}")


def _check_predict(subject: Subject) -> None:
    """Raise if ``predict`` fails on two training inputs and on two validation inputs."""
    given = [] if subject.validation is None else [subject.validation[0]]
    try:
        state = subject.start().state
        given.append(subject.inputs)
    except Exception:  # the checks say why the run cannot start, or that its inputs are not known
        if not given:
            return
    failures: list[Exception] = []
    for inputs in given:
        few = jax.tree.map(lambda leaf: np.asarray(leaf)[:2], inputs)
        key = jax.random.key(0) if subject.key_mode == "needed" else None

        def call(state: Any, few: Any, key: Any = key) -> Any:
            return subject.outputs(params_of(state), few, key, state.model_state)

        try:
            jax.eval_shape(call, state, few)
            return
        except Exception:  # a function in NumPy fails as a program, and works on arrays
            try:
                call(state, few)
                return
            except Exception as error:
                failures.append(error)
    text = str(failures[-1]).strip().split("\n")[0]
    form = "params, inputs" + ("" if subject.key_mode == "never" else ", key")
    raise ValueError(
        f"predict({form}) failed on two inputs: {type(failures[-1]).__name__}: {text}. If the model has running "
        "statistics, take them by name: lambda params, x, model_state: net.apply(params, model_state, x)[0]"
    ) from failures[-1]


def params_of(state: Any) -> Params:
    """The parameters in a state; of a custom state its ``params`` if it has such, else all of it."""
    if isinstance(state, TrainState) and not is_carried(state):
        return state.params
    own = state.stored if isinstance(state, TrainState) else state
    return own["params"] if isinstance(own, dict) and "params" in own else getattr(own, "params", own)


__all__ = ["SHORT", "Subject", "make_subject", "params_of"]
