"""A whole training run as one pure function: ``state, trace = train(hparams, key)``."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.calls import asks_for, check_takes, hand
from nnlearn.checks import as_key, check_count, known
from nnlearn.programs.loops import blank, end_to_end, followed_by, lean_scan, scan_in_segments, stretch_length
from nnlearn.sums import long_sum
from nnlearn.train.aux_metrics import aux_names, counted_aux
from nnlearn.train.custom_step import carry_state, check_step, lift_step, made_step, own_state
from nnlearn.train.sampler import Sampler
from nnlearn.train.state import TrainState, init_state
from nnlearn.train.step import check_record, count_skipped, counted_loss, make_step, step_key
from nnlearn.train.stopping import StopRule
from nnlearn.train.trace import Trace, leaf_names
from nnlearn.train.verdict import Verdict, best_state, first_verdict, judge, kept_metric, measure
from nnlearn.train.window import warn_of_last_window
from nnlearn.tree import is_function
from nnlearn.types import Batch, GradientTransformation, Key, LossFn, Params, PyTree, Scalar


class Run(NamedTuple):
    """A run under way: all that the rest of it needs, as a pytree, to be saved and taken up again.

    Attributes:
      state: parameters, optimizer and random key; its ``step`` stands still once the run has stopped. A state of
        another type, which a step of your own has, is its ``stored``.
      data_key: where the batches come from.
      order: what the sampler keeps.
      verdict: what the stopping rules carry: their states, which has stopped the run, the best check so far.
    """

    state: TrainState
    data_key: Key
    order: PyTree
    verdict: Verdict


@dataclasses.dataclass(frozen=True, eq=False)
class Train:
    """A whole run; made by ``make_train``. Call it, transform it, or run it in stretches.

    ``train(hparams, key)`` is ``start``, one ``advance`` over all steps, and ``finish``. All four are pure.

    Attributes:
      steps: steps of a run that nothing stops.
      check_every: steps between two checks, where it is evaluated and may stop.
    """

    loss_fn: LossFn | None
    make_tx: Any
    batches: Sampler
    init: Any
    steps: int
    check_every: int
    evaluate: Callable | None
    stop: Any
    record: tuple[str, ...]
    record_every: int
    stretch: int
    options: dict[str, Any]
    packing: dict[str, Any]
    step: Callable | None = None
    aux_metrics: tuple[str, ...] = ()

    def __call__(self, hparams: PyTree, key: Key | int) -> tuple[TrainState, Trace]:
        run, trace = self.advance(hparams, self.start(hparams, key), 0, self.steps)
        return self.finish(run), trace

    def with_metrics(self, *names: str) -> "Train":
        """The same run, with more metrics at its checks.

        Args:
          *names: ``aux/<path>`` for the mean of that scalar in ``info.aux`` over the steps since the last check that
            were not skipped. Rules and sweeps that go by such a name need no more than the name; others are ignored.

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
        params = hand(self.init, init_key, hparams=hparams) if is_function(self.init) else self.init
        if self.step is not None:
            state = carry_state(params, state_key)
            order = self.batches.start(data_key, self.stretch)
            return Run(state, data_key, order, first_verdict(self._rules(hparams), state))
        model_state = None
        if asks_for(self.loss_fn, "model_state"):
            if not isinstance(params, tuple) or len(params) != 2:
                raise ValueError("loss_fn takes model_state, so init must return (params, model_state)")
            params, model_state = params
        tx = self._tx(hparams)
        warn_of_last_window(tx, self.steps)
        state = init_state(params, tx, state_key, model_state=model_state, **self.packing)
        order = self.batches.start(data_key, self.stretch)
        return Run(state, data_key, order, first_verdict(self._rules(hparams), state))

    def advance(self, hparams: PyTree, run: Run, first: int | jax.Array, count: int) -> tuple[Run, Trace]:
        """``count`` steps from step ``first`` on, and their trace.

        Args:
          hparams: as for the whole run; they may be others than before.
          run: the run after ``first`` steps.
          first: a multiple of ``check_every``; may be traced, but under ``vmap`` be one number for all runs.
          count: a Python int, a multiple of ``check_every``; or whatever is left to the run's end.

        Raises:
          ValueError: the steps do not begin and end at checks.
        """
        rounds, rest = divmod(check_count("count", count), self.check_every)
        if known(first):
            last = int(first) + count
            if int(first) % self.check_every or last > self.steps or (rest and last < self.steps):
                raise ValueError(
                    f"first={first} and count={count} must be multiples of check_every={self.check_every}, or lead to "
                    f"the end, {self.steps}"
                )
        rules = self._rules(hparams)
        names = aux_names(rules, self.aux_metrics)
        step = jax.jit(self._step(hparams))  # so that it is traced once, however often it stands in the program
        keys = (run.state.key, run.data_key)
        # The keys stay out of the loop: what a vmapped conditional returns is one for each run, and so would be they,
        # and all random numbers drawn from them, where runs share a key.
        run = run._replace(state=run.state._replace(key=None), data_key=None)

        def one_round(run, first, count):
            return self._round(hparams, step, rules, names, keys, run, first, count)

        def at_round(run, index):
            return one_round(run, first + index * self.check_every, self.check_every)

        if self.stretch < self.check_every:  # then a derivative keeps the states between stretches
            run, (infos, metrics) = jax.lax.scan(at_round, run, jnp.arange(rounds))
        else:
            at_once = max(1, math.isqrt(self.steps) // self.check_every)
            run, (infos, metrics) = scan_in_segments(at_round, run, rounds, at_once)
        infos = end_to_end(infos)
        if rest:
            run, (last_infos, last_metrics) = one_round(run, first + rounds * self.check_every, rest)
            infos = followed_by(infos, last_infos)
            metrics = jax.tree.map(lambda many, one: jnp.append(many, one), metrics, last_metrics)
        run = run._replace(state=run.state._replace(key=keys[0]), data_key=keys[1])
        checks = [*range(self.check_every, count + 1, self.check_every), *([count] if rest else [])]
        trace = Trace(
            step=first + jnp.arange(self.record_every, count + 1, self.record_every, dtype=jnp.int32),
            info=infos,
            check_step=first + jnp.array(checks, jnp.int32),
            metrics=metrics,
            stop_step=run.state.step,
            reason=run.verdict.reason,
            best_step=None if run.verdict.best is None else run.verdict.best.step,
            rules=tuple(rule.name for rule in rules),
            leaves=leaf_names(run.state) if "leaf_grad_norms" in self.record else (),
        )
        return run, trace

    def finish(self, run: Run) -> Any:
        """The state at the end: the run's last, or the best check's where a rule keeps that.

        The best check's state is whole: parameters, optimizer state, model state and ``step``, which is then
        ``trace.best_step`` and not ``trace.stop_step``. Training goes on from it as it went on from that check. With
        a step of your own it is a state like the one that ``init`` makes.
        """
        return own_state(best_state(run.verdict, run.state))

    def _step(self, hparams: PyTree) -> Callable:
        if self.step is not None:
            return lift_step(made_step(self.step, hparams), hparams)
        return make_step(self.loss_fn, self._tx(hparams), record=self.record, hparams=hparams, **self.options)

    def _tx(self, hparams: PyTree) -> GradientTransformation:
        if is_transformation(self.make_tx):
            return self.make_tx
        try:
            tx = self.make_tx(hparams)
        except TypeError as error:
            name = getattr(self.make_tx, "__name__", "make_tx")
            if not isinstance(hparams, dict) or name == "<lambda>":
                raise
            raise TypeError(
                f"{name}(hparams) failed: {error}. It is called with all of hparams, a dict with {sorted(hparams)}: "
                f"write make_tx=lambda hparams: nnlearn.{name}(hparams[...])"
            ) from error
        if not is_transformation(tx):
            raise TypeError(
                f"make_tx must be an optimizer, or a function of hparams that returns one; it returned "
                f"{type(tx).__name__}"
            )
        return tx

    def _rules(self, hparams: PyTree) -> tuple[StopRule, ...]:
        rules = self.stop(hparams) if callable(self.stop) else self.stop
        rules = (rules,) if isinstance(rules, StopRule) else tuple(rules)
        kept_metric(rules)
        return rules

    def _round(self, hparams, step, rules, names, keys, run: Run, first, count: int):
        """So many steps and a check; or nothing at all, if the run has stopped."""

        def go(run):
            run, infos, sums, skipped = self._steps(step, names, keys, run, first, count)
            made = (count - skipped).astype(jnp.float32)
            metrics = {name: total / made for name, total in sums.items()}
            metrics |= measure(self.evaluate, run.state, hparams=hparams)
            return run._replace(verdict=judge(run.verdict, rules, run.state, metrics)), (infos, metrics)

        if not rules:
            return go(run)

        def hold(run):
            return run, jax.tree.map(blank, jax.eval_shape(go, run)[1])

        return jax.lax.cond(run.verdict.reason > 0, hold, go, run)

    def _steps(self, step, names, keys, run: Run, first, count: int):
        """So many steps in stretches; a derivative keeps the state before each, and works the rest out again."""

        def stretch(carry, first, count):
            state, order = carry
            order, rows = self.batches.rows(keys[1], order, first, count, self.stretch)
            step_keys = jax.vmap(step_key, in_axes=(None, 0))(keys[0], first + jnp.arange(count))

            def one(state, inputs):
                row, key = inputs
                state, info = step(state._replace(key=keys[0]), self.batches.batch(row), key=key)
                return state._replace(key=None), info

            state, infos = lean_scan(one, state, (rows, step_keys))
            thinned = jax.tree.map(lambda leaf: leaf[self.record_every - 1 :: self.record_every], infos)
            skipped = jnp.asarray(count_skipped(infos), jnp.int32)
            sums = {"train_loss": long_sum(counted_loss(infos))}
            sums |= {name: long_sum(counted_aux(infos, name)) for name in names}
            return (state, order), (thinned, sums, skipped)

        carry = (run.state, run.order)
        many, rest = divmod(count, self.stretch)
        if many == 1 and not rest:
            carry, (infos, sums, skipped) = stretch(carry, first, count)
        else:
            segment = jax.checkpoint(lambda carry, at: stretch(carry, at, self.stretch), prevent_cse=False)
            carry, (infos, sums, skipped) = jax.lax.scan(segment, carry, first + self.stretch * jnp.arange(many))
            infos = end_to_end(infos)
            if rest:
                carry, (last, last_sums, last_skipped) = stretch(carry, first + many * self.stretch, rest)
                infos, sums = followed_by(infos, last), jax.tree.map(jnp.append, sums, last_sums)
                skipped = jnp.append(skipped, last_skipped)
            sums, skipped = jax.tree.map(long_sum, sums), jnp.sum(skipped, dtype=jnp.int32)
        state, order = carry
        return run._replace(state=state, order=order), infos, sums, skipped


def make_train(
    loss_fn: LossFn | None = None,
    make_tx: Callable[[PyTree], GradientTransformation] | GradientTransformation | None = None,
    batches: Sampler | None = None,
    init: Callable[..., Params] | Params = None,
    *,
    step: Callable[..., Any] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    evaluate: Callable[..., Mapping[str, Scalar]] | None = None,
    check_every: int | None = None,
    stop: StopRule | Sequence[StopRule] | Callable[[PyTree], StopRule | Sequence[StopRule]] = (),
    record: Collection[str] = ("grad_norm",),
    record_every: int = 1,
    packed: bool | None = None,
    labels: PyTree | Callable[[Params], PyTree] = None,
    axis_name: str | tuple[str, ...] | None = None,
    microbatches: int = 1,
    batch_weight: Callable[[Batch], Scalar] | None = None,
    value_and_grad: Callable[[LossFn], Callable] | None = None,
) -> Train:
    """A training run as a pure function of its hyper-parameters and its key.

    ``train(hparams, key) -> (state, trace)`` draws the parameters and the batches, makes all the steps, evaluates and
    stops, with no Python in between: ``jax.jit`` it, ``jax.vmap`` it over hyper-parameters and keys, ``jax.grad`` what
    comes out of it. A derivative keeps about the square root of the steps in memory. The functions below are called
    while that is traced; each that has an argument named ``hparams`` is given the run's.

    Effects of these functions (``jax.debug.print``, ``io_callback``) occur once for each step or check, in order if
    they are ordered; those of a schedule once more at the start, where its first rate is recorded. Under ``vmap`` they
    still occur for a run that has stopped, and JAX refuses ``io_callback`` beside a stopping rule.

    Args:
      loss_fn: ``loss_fn(params, batch, key)``, see ``make_step``.
      make_tx: ``make_tx(hparams) -> tx``, an optimizer of nnlearn's or optax's; or one that needs no hyper-parameters.
      batches: ``shuffled(examples, batch_size)``, ``poisson_sampled(examples, batch_size)`` or ``generated(batch_fn)``.
      init: ``init(key) -> params``, such as ``model.init``, or the parameters. If ``loss_fn`` takes ``model_state``, it
        returns ``(params, model_state)``. With ``step``, the state or ``init(key) -> state``.
      step: in place of ``loss_fn`` and ``make_tx``, a step of your own, ``step(state, batch, key) -> (state, info)``,
        or a function of ``hparams`` that returns one: for several losses, optimizers or parameter trees in one run. The
        state is any pytree of arrays, ``info`` a dict or NamedTuple with a ``loss``; the module
        ``nnlearn.train.custom_step`` describes the protocol. What ``make_step`` returns is such a step, too.
      steps: the steps of a run; or give ``epochs``.
      evaluate: ``evaluate(params) -> {"name": scalar}``, called at every check; may ask for ``model_state`` and
        ``opt_state`` besides ``hparams``. ``evaluation`` makes one from arrays. With ``step`` and a state that is no
        ``TrainState``, ``evaluate(state)``.
      check_every: steps between two checks; an epoch where there are epochs and something to check. The end of a run is
        always one.
      stop: rules that stop the run at a check, such as ``patience("loss", 5)``; or a function of ``hparams`` to them. A
        run that has stopped does no more work when alone; vmapped beside others it holds its result.
      record: which norms the trace holds, see ``make_step``.
      record_every: record every so many steps; must divide ``check_every``.
      packed, labels: see ``init_state``.
      axis_name, microbatches, batch_weight, value_and_grad: see ``make_step``.

    Returns:
      A ``Train``: call it, or run it in stretches with its ``start``, ``advance`` and ``finish``.

    Warns:
      UserWarning: the run, when it is started, will end inside an accumulation window of ``MultiSteps``, as far as its
        k is known then; see ``apply_accumulated``.

    Raises:
      TypeError: a function does not take the arguments above.
      ValueError: ``step`` is given beside what only ``make_step`` takes; a number is below 1, neither or both of
        ``steps`` and ``epochs`` are given, or ``record_every`` does not divide ``check_every``.

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
    if step is None:
        check_takes(loss_fn, "loss_fn", "params, batch, key", "hparams", "model_state")
        if make_tx is None:
            raise TypeError("make_train needs make_tx, an optimizer or a function of hparams that returns one")
    else:
        _check_step_alone(
            step, loss_fn=loss_fn, make_tx=make_tx, record=record, packed=packed, labels=labels, **options
        )
    if init is None:
        raise TypeError(
            f"make_train needs init, the {'parameters' if step is None else 'state'} or a function of a key"
        )
    if is_function(init):
        check_takes(init, "init", "key", "hparams")
    if evaluate is not None:
        check_takes(evaluate, "evaluate", "params", "hparams", "model_state", "opt_state")
    if not isinstance(batches, Sampler):
        made = "shuffled(...), poisson_sampled(...) or generated(...)"
        raise TypeError(f"batches must be made by {made}, got {type(batches).__name__}")
    check_record(record)
    total = _total_steps(steps, epochs, batches.epoch_steps)
    record_every = check_count("record_every", record_every)
    checked = evaluate is not None or callable(stop) or bool(stop) or check_every is not None
    if check_every is None:
        check_every = min(batches.epoch_steps or total, total) if checked else total
    check_every = min(check_count("check_every", check_every), total)
    if check_every % record_every and check_every < total:
        raise ValueError(
            f"record_every={record_every} must divide check_every={check_every}, so that every check lies at a record"
        )
    stretch = stretch_length(total, check_every, record_every, batches.epoch_steps)
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
        stretch=stretch,
        options=options,
        packing={"packed": packed, "labels": labels},
        step=step,
    )


def _check_step_alone(step: Any, **others: Any) -> None:
    defaults = {"record": ("grad_norm",), "microbatches": 1}
    given = [
        name
        for name, value in others.items()
        if value is not None and not (name in defaults and value == defaults[name])
    ]
    if given:
        raise ValueError(
            f"step makes whole steps, so {' and '.join(given)} would be ignored: leave out one or the other"
        )
    check_step(step, factory=True)


def is_transformation(value: Any) -> bool:
    """Whether a value speaks optax's protocol: has an ``init`` and an ``update``.

    >>> import nnlearn
    >>> is_transformation(nnlearn.sgd(0.1)), is_transformation(nnlearn.sgd)
    (True, False)
    """
    return hasattr(value, "init") and hasattr(value, "update")


def _total_steps(steps: int | None, epochs: int | None, epoch_steps: int | None) -> int:
    if (steps is None) == (epochs is None):
        raise ValueError(f"give one of steps and epochs, got steps={steps!r} and epochs={epochs!r}")
    if steps is not None:
        return check_count("steps", steps)
    if epoch_steps is None:
        raise ValueError("epochs needs batches that have them, shuffled(...); with generated(...) give steps")
    return check_count("epochs", epochs) * epoch_steps


__all__ = ["Run", "Train", "make_train"]
