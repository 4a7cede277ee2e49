"""A whole training run as one pure function: ``state, trace = train(hparams, key)``."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, cast, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nnlearn.calls import asks_for, check_takes, explaining_hparams, hand
from nnlearn.checks import as_key, check_count, known
from nnlearn.programs.loops import stretch_length
from nnlearn.sharding.rules import Rules
from nnlearn.train.aux_metrics import aux_names
from nnlearn.train.custom_step import carry_state, check_step, lift_step, made_step, own_state
from nnlearn.train.loop import Loop, Run, segment_length
from nnlearn.train.sampler import Sampler
from nnlearn.train.state import TrainState, init_state, on_mesh
from nnlearn.train.step import Info, check_record, make_step
from nnlearn.train.stopping import Metrics, StopRule
from nnlearn.train.trace import Trace, leaf_names
from nnlearn.train.verdict import best_state, first_verdict, kept_metric, measure
from nnlearn.train.window import warn_of_last_window
from nnlearn.tree import is_function
from nnlearn.types import Batch, GradientTransformation, Key, LossFn, Params, PyTree, Scalar

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # typing.TypeVar has no default before Python 3.13

    State = TypeVar("State", covariant=True, default=Any)
else:
    from typing import TypeVar

    State = TypeVar("State")

MakeTx = Callable[[PyTree], GradientTransformation] | GradientTransformation
"""An optimizer, or a function of ``hparams`` that returns one."""
Stop = StopRule | Sequence[StopRule] | Callable[[PyTree], StopRule | Sequence[StopRule]]
"""Stopping rules, or a function of ``hparams`` that returns them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Train(Generic[State]):
    """A training run, made by ``make_train``. Call it, transform it, or run it in stretches.

    ``train(hparams, key)`` is ``start``, one ``advance`` over all steps, and ``finish``. All four are pure.

    Attributes:
      steps: steps of a run that no rule stops.
      check_every: steps between two checks, at which the run is evaluated and may stop.
    """

    loss_fn: Any  # a LossFn; None with a custom step, as is make_tx
    make_tx: MakeTx | None
    batches: Sampler
    init: Any
    steps: int
    check_every: int
    evaluate: Callable[..., Mapping[str, Scalar]] | None
    stop: Stop
    record: tuple[str, ...]
    record_every: int
    stretch: int
    options: dict[str, Any]
    packing: dict[str, Any]
    step: Callable[..., Any] | None = None
    aux_metrics: tuple[str, ...] = ()
    batch_axis: str | Sequence[str] = "data"

    def __call__(self, hparams: PyTree, key: Key | int) -> tuple[State, Trace]:
        run, trace = self.advance(hparams, self.start(hparams, key), 0, self.steps)
        return self.finish(run), trace

    def with_metrics(self, *names: str) -> "Train[State]":
        """The same run with additional metrics at its checks.

        Args:
          *names: ``aux/<path>`` for the mean of that scalar in ``info.aux`` over the steps since the last check that
            were not skipped. A rule or sweep then refers to it by this name. Other names are ignored.

        >>> import nnlearn
        >>> def loss_fn(params, batch, key):
        ...     return params**2, {"size": jnp.abs(params)}
        >>> batches = nnlearn.generated(lambda key, step: step)
        >>> train = nnlearn.make_train(loss_fn, nnlearn.sgd(0.25), batches, jnp.ones(()), steps=2)
        >>> train.with_metrics("aux/size")({}, 0)[1].metrics["aux/size"]
        Array([0.75], dtype=float32)
        """
        return dataclasses.replace(self, aux_metrics=aux_names((), (*self.aux_metrics, *names)))

    def start(self, hparams: PyTree, key: Key | int) -> Run:
        """The run before its first step."""
        init_key, state_key, data_key = jax.random.split(as_key(key), 3)
        state = self._first_state(hparams, init_key, state_key)
        order = self.batches.start(data_key, self.stretch)
        return Run(state, data_key, order, first_verdict(self._rules(hparams), state))

    def advance(self, hparams: PyTree, run: Run, first: int | jax.Array, count: int) -> tuple[Run, Trace]:
        """``count`` steps from step ``first``, and their trace.

        Args:
          hparams: as for the whole run; they may differ from those of earlier steps.
          run: the run after ``first`` steps.
          first: a multiple of ``check_every``. It may be traced, but under ``vmap`` it must be the same for all runs.
          count: a Python int, a multiple of ``check_every``, or the number of steps left to the end of the run.

        Raises:
          ValueError: if the steps do not begin and end at checks.
        """
        count = check_count("count", count)
        self._check_span(first, count)
        loop = self._loop(hparams, run)
        run, infos, metrics = loop.rounds(run, first, count)
        return run, self._trace(run, loop.rules, infos, metrics, first, count)

    def finish(self, run: Run) -> State:
        """The state at the end: the last one, or that of the best check if a rule keeps it.

        The state of the best check is complete: parameters, optimizer state, model state and ``step``, which is then
        ``trace.best_step`` and not ``trace.stop_step``. Training from it continues as it did after that check. With a
        custom step it has the type of the state that ``init`` makes.
        """
        return cast(State, own_state(best_state(run.verdict, run.state)))

    def _first_state(self, hparams: PyTree, init_key: Key, state_key: Key) -> TrainState:
        params = hand(self.init, init_key, hparams=hparams) if is_function(self.init) else self.init
        if self.step is not None:
            return carry_state(params, state_key)
        model_state = None
        if asks_for(self.loss_fn, "model_state"):
            if not isinstance(params, tuple) or len(params) != 2:
                raise ValueError("loss_fn takes model_state, so init must return (params, model_state)")
            params, model_state = params
        tx = made_tx(self.make_tx, hparams)
        warn_of_last_window(tx, self.steps)
        return init_state(params, tx, state_key, model_state=model_state, **self.packing)

    def _loop(self, hparams: PyTree, run: Run) -> Loop:
        """The loop of a run. All functions of ``hparams`` are called here."""
        rules = self._rules(hparams)
        if self.step is not None:
            step = lift_step(made_step(self.step, hparams), hparams)
        else:
            tx = made_tx(self.make_tx, hparams)
            step = make_step(self.loss_fn, tx, record=self.record, hparams=hparams, **self.options)
            if self.packing["mesh"] is not None:
                step = on_mesh(step, self.packing["mesh"], self.packing["rules"], self.batch_axis)
        return Loop(
            step=jax.jit(step),  # so that it is traced once, however often it occurs in the program
            batches=self.batches,
            measure=functools.partial(measure, self.evaluate, hparams=hparams),
            rules=rules,
            aux=aux_names(rules, self.aux_metrics),
            key=run.state.key,
            data_key=run.data_key,
            check_every=self.check_every,
            record_every=self.record_every,
            stretch=self.stretch,
            segment=segment_length(self.steps, self.check_every),
        )

    def _rules(self, hparams: PyTree) -> tuple[StopRule, ...]:
        with explaining_hparams("stop", hparams):
            rules: Any = self.stop(hparams) if callable(self.stop) else self.stop
        rules = (rules,) if isinstance(rules, StopRule) else tuple(rules)
        kept_metric(rules)  # refuses rules that keep the best state by different metrics
        return rules

    def _check_span(self, first: int | jax.Array, count: int) -> None:
        if not known(first):
            return
        last = int(first) + count
        if int(first) % self.check_every or last > self.steps or (count % self.check_every and last < self.steps):
            raise ValueError(
                f"first={first} and count={count} must be multiples of check_every={self.check_every}, or lead to "
                f"the end, {self.steps}"
            )

    def _trace(
        self, run: Run, rules: tuple[StopRule, ...], infos: Info, metrics: Metrics, first: Any, count: int
    ) -> Trace:
        rest = count % self.check_every
        checks = [*range(self.check_every, count + 1, self.check_every), *([count] if rest else [])]
        return Trace(
            step=first + jnp.arange(self.record_every, count + 1, self.record_every, dtype=jnp.int32),
            info=infos,
            check_step=first + jnp.array(checks, jnp.int32),
            metrics=metrics,
            stop_step=run.state.step,
            reason=run.verdict.reason,
            best_step=None if run.verdict.best is None else run.verdict.best.step,
            rules=tuple(rule.name for rule in rules),
            leaves=leaf_names(run.state) if _has_leaves(infos) else (),
        )


@overload
def make_train(
    loss_fn: LossFn,
    make_tx: MakeTx,
    batches: Sampler,
    init: Callable[..., Params] | Params,
    *,
    step: None = None,
    steps: int | None = None,
    epochs: int | None = None,
    evaluate: Callable[..., Mapping[str, Scalar]] | None = None,
    check_every: int | None = None,
    stop: Stop = (),
    record: Collection[str] = ("grad_norm",),
    record_every: int = 1,
    packed: bool | None = None,
    labels: PyTree | Callable[[Params], PyTree] = None,
    axis_name: str | tuple[str, ...] | None = None,
    microbatches: int = 1,
    batch_weight: Callable[[Any], Scalar] | None = None,
    value_and_grad: Callable[[LossFn], Callable[..., Any]] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = None,
    batch_axis: str | Sequence[str] = "data",
) -> Train[TrainState]: ...
@overload
def make_train(
    *,
    step: Callable[..., tuple[State, Any]] | Callable[[PyTree], Callable[..., tuple[State, Any]]],
    batches: Sampler,
    init: PyTree | Callable[..., PyTree],
    steps: int | None = None,
    epochs: int | None = None,
    evaluate: Callable[..., Mapping[str, Scalar]] | None = None,
    check_every: int | None = None,
    stop: Stop = (),
    record_every: int = 1,
) -> Train[State]: ...
def make_train(
    loss_fn: LossFn | None = None,
    make_tx: MakeTx | None = None,
    batches: Sampler | None = None,
    init: Callable[..., Params] | Params = None,
    *,
    step: Callable[..., Any] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    evaluate: Callable[..., Mapping[str, Scalar]] | None = None,
    check_every: int | None = None,
    stop: Stop = (),
    record: Collection[str] = ("grad_norm",),
    record_every: int = 1,
    packed: bool | None = None,
    labels: PyTree | Callable[[Params], PyTree] = None,
    axis_name: str | tuple[str, ...] | None = None,
    microbatches: int = 1,
    batch_weight: Callable[[Batch], Scalar] | None = None,
    value_and_grad: Callable[[LossFn], Callable[..., Any]] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = None,
    batch_axis: str | Sequence[str] = "data",
) -> Train[Any]:
    """A training run as a pure function of its hyper-parameters and its key.

    ``train(hparams, key) -> (state, trace)`` draws the parameters and the batches, makes all the steps, evaluates and
    stops, without returning to Python in between: ``jax.jit`` it, ``jax.vmap`` it over hyper-parameters and keys,
    ``jax.grad`` its results. A derivative stores about as many states as the square root of the number of steps. The
    functions below are called during tracing. Each that has an argument named ``hparams`` receives the run's.

    Effects of these functions (``jax.debug.print``, ``io_callback``) occur once for each step or check, in order if
    they are ordered. Those of a schedule occur once more at the start, where its first rate is recorded. Under ``vmap``
    they still occur for a run that has stopped, and JAX refuses ``io_callback`` together with a stopping rule.

    Args:
      loss_fn: ``loss_fn(params, batch, key)``, see ``make_step``.
      make_tx: ``make_tx(hparams) -> tx``, which returns an nnlearn or optax optimizer, or the optimizer itself if it
        does not depend on the hyper-parameters.
      batches: ``shuffled(examples, batch_size)``, ``poisson_sampled(examples, batch_size)`` or ``generated(batch_fn)``.
      init: ``init(key) -> params``, such as ``model.init``, or the parameters. If ``loss_fn`` takes ``model_state``, it
        returns ``(params, model_state)``. With ``step``, the state or ``init(key) -> state``.
      step: a custom step ``step(state, batch, key) -> (state, info)`` in place of ``loss_fn`` and ``make_tx``, or a
        function of ``hparams`` that returns one: for several losses, optimizers or parameter trees in one run. The
        state is any pytree of arrays, ``info`` a dict or NamedTuple with a ``loss``. The module
        ``nnlearn.train.custom_step`` describes the protocol. A step from ``make_step`` also follows it.
      steps: the number of steps; alternatively give ``epochs``.
      epochs: the number of epochs, if ``batches`` has epochs.
      evaluate: ``evaluate(params) -> {"name": scalar}``, called at every check. It may also take ``hparams``,
        ``model_state`` and ``opt_state``. ``evaluation`` makes one from arrays. With ``step`` and a state that is not a
        ``TrainState``, ``evaluate(state)``.
      check_every: steps between two checks. By default an epoch, if there are epochs and something to check. The end of
        a run is always a check.
      stop: rules that stop the run at a check, such as ``patience("loss", 5)``, or a function of ``hparams`` that
        returns them. A stopped run does no more work. Under ``vmap`` it keeps its result while others continue.
      record: which norms the trace contains, see ``make_step``.
      record_every: steps between two records; must divide ``check_every``.
      packed, labels: see ``init_state``.
      axis_name, microbatches, batch_weight, value_and_grad: see ``make_step``.
      mesh, rules: the devices, and the sharding of the parameters, see ``init_state``. Each batch is sharded over
        ``batch_axis``. With ``axis_name`` the gradient runs as ``make_step`` describes for a mesh.
      batch_axis: the mesh axis or axes of the batch.

    Returns:
      A ``Train``. Call it, or run it in stretches with its ``start``, ``advance`` and ``finish``.

    Warns:
      UserWarning: at the start of a run that will end inside an accumulation window of ``MultiSteps``, if the length of
        the windows is known then; see ``apply_accumulated``.

    Raises:
      TypeError: if a function does not take the arguments above.
      ValueError: if ``step`` is given together with an argument of ``make_step``, a count is below 1, neither or both
        of ``steps`` and ``epochs`` are given, or ``record_every`` does not divide ``check_every``.

    >>> import nnlearn
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((params - batch) ** 2)
    >>> batches = nnlearn.shuffled(jnp.array([1.0, 2.0, 3.0, 4.0]), 2, remainder="drop")
    >>> train = make_train(loss_fn, lambda hparams: nnlearn.sgd(hparams["rate"]), batches, jnp.zeros(()), epochs=50)
    >>> state, trace = jax.jit(train)({"rate": 0.05}, jax.random.key(0))
    >>> state.params.round(1), trace.loss.shape
    (Array(2.5, dtype=float32), (100,))
    >>> jax.jit(jax.vmap(train, in_axes=(0, None)))({"rate": jnp.array([0.0, 0.05])}, 0)[0].params.round(1)
    Array([0. , 2.5], dtype=float32)
    """
    options = {
        "axis_name": axis_name,
        "microbatches": microbatches,
        "batch_weight": batch_weight,
        "value_and_grad": value_and_grad,
    }
    if mesh is not None and axis_name is not None:
        options["mesh"] = mesh
    if step is None:
        check_takes(loss_fn, "loss_fn", "params, batch, key", "hparams", "model_state")
        if make_tx is None:
            raise TypeError("make_train needs make_tx, an optimizer or a function of hparams that returns one")
    else:
        _check_step_alone(
            step, loss_fn=loss_fn, make_tx=make_tx, record=record, packed=packed, labels=labels, mesh=mesh, **options
        )
    batches = _check_sources(batches, init, evaluate, "parameters" if step is None else "state")
    check_record(record)
    total = _total_steps(steps, epochs, batches.epoch_steps)
    record_every = check_count("record_every", record_every)
    has_checks = evaluate is not None or callable(stop) or bool(stop)
    check_every = _check_interval(check_every, record_every, total, batches.epoch_steps if has_checks else total)
    return Train(
        loss_fn=loss_fn,
        make_tx=make_tx,
        batches=batches,
        init=init,
        steps=total,
        check_every=check_every,
        evaluate=evaluate,
        stop=stop,
        record=tuple(record),
        record_every=record_every,
        stretch=stretch_length(total, check_every, record_every, batches.epoch_steps),
        options=options,
        packing={"packed": packed, "labels": labels, "mesh": mesh, "rules": rules},
        step=step,
        batch_axis=batch_axis,
    )


def _has_leaves(infos: Any) -> bool:
    """Whether the records have values of single leaves."""
    return any(getattr(infos, name, None) is not None for name in ("leaf_grad_norms", "layers"))


def _check_step_alone(step: Any, **others: Any) -> None:
    defaults = {"record": ("grad_norm",), "microbatches": 1}
    given = [
        name
        for name, value in others.items()
        if value is not None and not (name in defaults and value == defaults[name])
    ]
    if given:
        raise ValueError(f"step makes whole steps, so {' and '.join(given)} would be ignored: give one or the other")
    check_step(step, factory=True)


def _check_sources(batches: Any, init: Any, evaluate: Any, what: str) -> Sampler:
    if init is None:
        raise TypeError(f"make_train needs init, the {what} or a function of a key")
    if is_function(init):
        check_takes(init, "init", "key", "hparams")
    if evaluate is not None:
        check_takes(evaluate, "evaluate", "params", "hparams", "model_state", "opt_state")
    if not isinstance(batches, Sampler):
        made = "shuffled(...), poisson_sampled(...) or generated(...)"
        raise TypeError(f"batches must be made by {made}, got {type(batches).__name__}")
    return batches


def _total_steps(steps: int | None, epochs: int | None, epoch_steps: int | None) -> int:
    if (steps is None) == (epochs is None):
        raise ValueError(f"give one of steps and epochs, got steps={steps!r} and epochs={epochs!r}")
    if steps is not None:
        return check_count("steps", steps)
    if epoch_steps is None:
        raise ValueError("epochs needs batches with epochs, such as shuffled(...); with generated(...), give steps")
    return check_count("epochs", epochs) * epoch_steps


def _check_interval(check_every: int | None, record_every: int, total: int, default: int | None) -> int:
    check_every = (default or total) if check_every is None else check_count("check_every", check_every)
    check_every = min(check_every, total)
    if check_every % record_every and check_every < total:
        raise ValueError(
            f"record_every={record_every} must divide check_every={check_every}, so that every check is also a record"
        )
    return check_every


def made_tx(make_tx: Any, hparams: PyTree) -> GradientTransformation:
    """The optimizer itself, or the one that a function of ``hparams`` returns.

    Raises:
      TypeError: if the function fails on ``hparams``, or does not return an optimizer.
      ValueError: if ``hparams`` lacks a name that the function looks up.
    """
    if is_transformation(make_tx):
        return make_tx
    try:
        with explaining_hparams("make_tx", hparams):
            tx = make_tx(hparams)
    except TypeError as error:
        name = getattr(make_tx, "__name__", "make_tx")
        if not isinstance(hparams, dict) or name == "<lambda>":
            raise
        raise TypeError(
            f"{name}(hparams) failed: {error}. It is called with all of hparams, a dict with {sorted(hparams)}: "
            f"write make_tx=lambda hparams: nnlearn.{name}(hparams[...])"
        ) from error
    if not is_transformation(tx):
        raise TypeError(
            f"make_tx must be an optimizer, or a function of hparams that returns one; it returned {type(tx).__name__}"
        )
    return tx


def is_transformation(value: Any) -> bool:
    """Whether a value follows optax's protocol: it has an ``init`` and an ``update``.

    >>> import nnlearn
    >>> is_transformation(nnlearn.sgd(0.1)), is_transformation(nnlearn.sgd)
    (True, False)
    """
    return hasattr(value, "init") and hasattr(value, "update")


__all__ = ["Run", "Train", "make_train"]
