"""The host-driven run, for data that do not fit into a program: batches from any iterable, with the same step."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nnlearn.calls import check_takes
from nnlearn.checks import check_count
from nnlearn.stream.callbacks import Callback, Calls, Every
from nnlearn.stream.history import History, check_history
from nnlearn.stream.host_metrics import HostMetrics
from nnlearn.stream.interrupt import Interrupt
from nnlearn.stream.progress import show_progress
from nnlearn.stream.record import Recorder
from nnlearn.stream.running import FitResult, Running
from nnlearn.stream.stack import Stacker
from nnlearn.stream.stream import Plan, Prefetch, known_length, passes, read_blocks
from nnlearn.train.custom_step import carry_state, check_step, is_carried
from nnlearn.train.stopping import StopRule
from nnlearn.train.trace import leaf_names
from nnlearn.train.window import warn_of_open_window
from nnlearn.types import Batch, Scalar


def fit(
    step: Callable[..., Any],
    state: Any,
    batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    *,
    steps: int | None = None,
    epochs: int | None = None,
    evaluate: Callable[..., Mapping[str, Scalar]] | None = None,
    host_metrics: Callable[[Any], Mapping[str, float]] | None = None,
    check_every: int | None = None,
    stop: StopRule | Sequence[StopRule] = (),
    record_every: int = 1,
    callbacks: Callback | Every | Sequence[Callback | Every] = (),
    save: Callable[[str, Any, int], Any] | None = None,
    history: str | Path | None = None,
    progress: Any = None,
    ragged: str = "error",
    steps_per_dispatch: int | None = None,
    prefetch: int = 2,
    sharding: jax.sharding.Sharding | None = None,
    donate: bool = False,
) -> FitResult:
    """Train on a stream of batches, with evaluation, early stopping, callbacks, a progress bar and files.

    Several batches at a time are stacked by a thread, put on the device and trained on in one call. The parameters
    are, to the bit, those of ``jax.lax.scan(step, state, batches)``. A NaN in the loss is recorded; ``diverged()``
    among the rules stops at it.

    The first Ctrl-C or SIGTERM ends the run after the present call, saves, and returns what there is: look at
    ``result.stopped_by``. A second Ctrl-C raises ``KeyboardInterrupt`` at once.

    Args:
      step: what ``make_step`` returns, or a step of your own, see ``nnlearn.train.custom_step``.
      state: from ``init_state``, or that of your step; or a saved one: its ``step`` goes on counting, and checks and
        records come where they would have come. The place in the stream is up to you; what rules have counted
        before is forgotten.
      batches: an iterable of batches, such as a list, a generator or a DataLoader of grain or PyTorch; or a function
        from the epoch, counted from 0, to one. Leaves are arrays of any library. It is read in a thread, up to
        ``prefetch * steps_per_dispatch`` batches ahead, never beyond ``steps``; and, unless ``prefetch`` is 0, one more
        where a period ends, if only that can tell whether an epoch does, too.
      steps: how many steps to make now; what can be read again is read as often as that needs.
      epochs: or how many passes over the batches; one if neither is given.
      evaluate: ``evaluate(params) -> {"name": scalar}``, compiled, called at every check; may ask for ``model_state``
        and ``opt_state`` by name. ``evaluation`` makes one from arrays. For a state that is no ``TrainState`` it is
        ``evaluate(state)``.
      host_metrics: ``host_metrics(state) -> {"name": number}``, called in Python at every check, for what JAX cannot
        trace, such as a metric of scikit-learn or of sampled text; rules, files and callbacks have its numbers beside
        those of ``evaluate``. It is called once before the first step, too, so that a mistake shows at once. The
        device waits for it, so prefer ``evaluate`` where that can say the same. Of arrays to keep, ``jax.device_get``
        a copy.
      check_every: steps between two checks; with None there is one after each epoch, if there is something to
        evaluate, to call or to save. The end of a run is always one, unless it was interrupted.
      stop: rules that stop the run at a check, such as ``patience("loss", 5)``, which restores the best state too.
      record_every: record every so many steps, in trace, history and rows.
      callbacks: functions ``callback(event)``, called at every check and at the end, or ``every`` so many steps. One
        that returns a state has the run go on with it from the next step on, such as
        ``event.state.with_params(params)`` or one whose ``opt_state`` is from ``set_hyperparams``; its structure,
        shapes, dtypes and ``step`` must be those of ``event.state``. As no call of steps goes beyond a period or a
        check, it takes effect exactly there, whatever ``steps_per_dispatch`` is; what the check has found, and its
        best state, are of the state before. One that returns any other true value ends the run. See ``Event``;
        ``tensorboard`` and ``wandb_offline`` make some.
      save: ``save(name, state, step)``, called with ``"best"`` at a check that is the best so far, where a rule keeps
        the best, and with ``"last"`` after every check and when the run ends, be it by an error in batches or
        callbacks. It must have written or copied the state when it returns: the next step takes its memory.
      history: a ``.csv`` or ``.jsonl`` file, written as the run goes on: ``step``, the scalars of ``info`` and, at
        checks, the metrics; one that has the name of a column before it, as ``loss`` has, is ``check/loss``. A state of
        step 0 begins a new file and moves an older one aside; a later state goes on in it, and takes out the rows of
        steps that are made again.
      progress: None for a bar if there is a terminal, True or False, or a ``rich.console.Console``.
      ragged: ``"error"`` refuses batches of other shapes than the first one's. ``"pad"`` fills smaller ones up, and
        every batch is a ``MaskedBatch(examples, where)``.
      steps_per_dispatch: batches that go to the device together; None for what suits their size.
      prefetch: how many such calls the thread prepares ahead; 0 for none and no thread. With 0, where batches do not
        know their number, a callback of a period is called without the metrics of a check at the end of an epoch.
      sharding: how a batch lies on the devices; None for the default device.
      donate: whether ``state`` may be overwritten, which saves the memory of one copy.

    Returns:
      ``FitResult(state, trace)``.

    Warns:
      UserWarning: the run has ended inside an accumulation window of ``MultiSteps``, whose gradients are not applied.

    Raises:
      TypeError: ``batches`` is no iterable, a leaf is no array, a function does not take the arguments above or returns
        what it should not, or a callback returns a state unlike ``event.state``.
      ValueError: an argument is impossible; ``host_metrics`` has the name of another metric; a batch is not like the
        first; there are no batches, or fewer than ``steps``. Whatever is raised while training, what was
        recorded is in ``history`` and the last state saved.

    >>> import nnlearn
    >>> import numpy as np
    >>> tx = nnlearn.sgd(0.25)
    >>> step = nnlearn.make_step(lambda params, batch, key: jnp.mean((params - batch) ** 2), tx)
    >>> batches = [np.array([1.0, 2.0]), np.array([3.0, 2.0])]
    >>> state, trace = fit(step, nnlearn.init_state(jnp.zeros(()), tx), batches, epochs=10)
    >>> int(state.step), state.params.round(1), trace.loss.shape
    (20, Array(2.2, dtype=float32), (20,))
    """
    check_step(step, factory=False)
    if evaluate is not None:
        check_takes(evaluate, "evaluate", "params", "model_state", "opt_state")
    if host_metrics is not None:
        check_takes(host_metrics, "host_metrics", "state")
    if save is not None:
        check_takes(save, "save", "name, state, step")
    if history is not None:
        check_history(history)
    rules = (stop,) if isinstance(stop, StopRule) else tuple(stop)
    calls = Calls(callbacks)
    given, state = state, carry_state(state)
    if jnp.shape(state.step):
        raise ValueError(
            f"fit makes one run, but state holds {jnp.shape(state.step)} of them: vmap what make_train returns"
        )
    host = HostMetrics(host_metrics)
    something = bool(evaluate or host or rules or calls or save)
    plan = _plan(int(state.step), batches, steps, epochs, check_every, calls.periods, something)
    if check_count("record_every", record_every) and prefetch != 0:
        check_count("prefetch", prefetch)
    size = plan.block_size if steps_per_dispatch is None else check_count("steps_per_dispatch", steps_per_dispatch)
    stacker = Stacker(size, ragged, sharding)
    epochs_left = passes(batches, epochs, steps)
    total = _total(plan, epochs)
    if not donate and state is given:  # a state of another type is a copy by now
        state = jax.tree.map(jnp.copy, state)
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        bar = stack.enter_context(show_progress(progress, plan.first, total))
        writers = [calls.write] if calls else []

        def begin(columns):
            if history is not None:
                writers.insert(0, stack.enter_context(History(history, columns, plan.first)).write)

        running = Running(step, state, evaluate, rules, calls, save, plan, host)
        running.recorder = Recorder(
            record_every, running.metrics, leaf_names(state), begin=begin, writers=writers, watch=bar.update
        )
        ahead = Prefetch(read_blocks(epochs_left, plan, stacker, lambda: ahead.stopped, prefetch > 0), prefetch)
        stack.enter_context(ahead)
        try:
            result = running.train(ahead, interrupt, check_every)
        except BaseException as error:
            running.rescue(error)
            raise
    if result.stopped_by not in ("interrupted", "terminated"):  # those are taken up again, window and all
        warn_of_open_window(running.state.stored if is_carried(running.state) else running.state.opt_state)
    return result


def _plan(first, batches, steps, epochs, check_every, periods, checks: bool) -> Plan:
    if steps is not None and epochs is not None:
        raise ValueError(f"give one of steps and epochs, got steps={steps!r} and epochs={epochs!r}")
    last = None if steps is None else first + check_count("steps", steps)
    if epochs is not None:
        check_count("epochs", epochs)
    if check_every is not None:
        periods = (check_count("check_every", check_every), *periods)
    return Plan(first, last, periods, check_every is None and checks, known_length(batches))


def _total(plan: Plan, epochs: int | None) -> int | None:
    if plan.last is not None:
        return plan.last - plan.first
    return None if plan.epoch_steps is None else plan.epoch_steps * (epochs or 1)


__all__ = ["FitResult", "fit"]
