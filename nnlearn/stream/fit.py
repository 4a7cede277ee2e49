"""The host-driven run, for data that do not fit into a compiled program: batches from any iterable."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nnlearn.calls import check_takes
from nnlearn.checkpoints import Checkpoints
from nnlearn.checks import check_count
from nnlearn.stream.blocks import Boundaries, known_length, passes, read_blocks
from nnlearn.stream.callbacks import Callback, Callbacks, Every, State
from nnlearn.stream.dispatch import Dispatcher
from nnlearn.stream.history import History, Row, check_history
from nnlearn.stream.host_metrics import HostMetrics
from nnlearn.stream.interrupt import REASONS, Interrupt
from nnlearn.stream.loop import FitResult, HostLoop
from nnlearn.stream.place import START
from nnlearn.stream.prefetch import Prefetch
from nnlearn.stream.progress import show_progress
from nnlearn.stream.record import Recorder, Writer
from nnlearn.stream.rollback import FaultFinder, RollBack
from nnlearn.stream.saving import RunSaver
from nnlearn.stream.stack import Stacker
from nnlearn.train.custom_step import carry_state, check_step
from nnlearn.train.state import TrainState
from nnlearn.train.stopping import StopRule
from nnlearn.train.trace import leaf_names
from nnlearn.train.window import warn_of_open_window
from nnlearn.types import Batch, Scalar


def fit(
    step: Callable[..., Any],
    state: State,
    batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    *,
    steps: int | None = None,
    epochs: int | None = None,
    evaluate: Callable[..., Mapping[str, Scalar]] | None = None,
    host_metrics: Callable[[State], Mapping[str, Scalar]] | None = None,
    check_every: int | None = None,
    stop: StopRule | Sequence[StopRule] = (),
    record_every: int = 1,
    callbacks: Callback[State] | Every[State] | Sequence[Callback[State] | Every[State]] = (),
    save: Callable[[str, State, int], Any] | None = None,
    history: str | Path | None = None,
    checkpoints: Checkpoints | str | Path | None = None,
    changed: Literal["error", "accept"] = "error",
    on_fault: RollBack | None = None,
    progress: Any = None,
    ragged: Literal["error", "pad"] = "error",
    steps_per_dispatch: int | None = None,
    prefetch: int = 2,
    sharding: jax.sharding.Sharding | None = None,
    donate: bool = False,
) -> FitResult[State]:
    """Train on a stream of batches, with evaluation, early stopping, callbacks, a progress bar and files.

    A thread stacks several batches and puts them on the device, and one call trains on all of them. The parameters
    equal those of ``jax.lax.scan(step, state, batches)`` bit for bit. A NaN in the loss is recorded; the rule
    ``diverged()`` stops at it.

    The first Ctrl-C or SIGTERM ends the run after the present call, saves, and returns the result so far: look at
    ``result.stopped_by``. A second Ctrl-C raises ``KeyboardInterrupt`` at once.

    Args:
      step: the result of ``make_step``, or a custom step, see ``nnlearn.train.custom_step``.
      state: from ``init_state``, or the state of a custom step; or a saved one. A saved state's ``step`` continues to
        count, and checks and records come at the same steps as in one long run. You choose the place in the stream;
        the counts of stopping rules start anew.
      batches: an iterable of batches, such as a list, a generator or a DataLoader of grain or PyTorch; or a function
        from the epoch, counted from 0, to one. Leaves are arrays of any library. It is read in a thread, up to
        ``prefetch * steps_per_dispatch`` batches ahead, never beyond ``steps``. Unless ``prefetch`` is 0, one more
        batch is read at the end of a period if only that can tell whether the epoch ends there too.
      steps: number of steps to make now; batches that can be read again are read as often as needed.
      epochs: alternatively, number of passes over the batches; one if neither is given.
      evaluate: ``evaluate(params) -> {"name": scalar}``, compiled, called at every check; may take ``model_state`` and
        ``opt_state`` by name. ``evaluation`` makes one from arrays. If the state is not a ``TrainState``, it is called
        as ``evaluate(state)``.
      host_metrics: ``host_metrics(state) -> {"name": scalar}``, called in Python at every check, for metrics that JAX
        cannot trace, such as those of scikit-learn or of sampled text. Rules, files and callbacks see its metrics
        beside those of ``evaluate``. It is also called once before the first step, so that a mistake shows at once.
        The device waits for it, so prefer ``evaluate`` if that can compute the same. To keep arrays, copy them:
        ``jax.device_get``.
      check_every: steps between two checks. None checks after each epoch, if there is something to evaluate, to call or
        to save. The end of a run is always a check, unless the run was interrupted.
      stop: rules that stop the run at a check, such as ``patience("loss", 5)``, which also restores the best state.
      record_every: record every ``record_every`` steps, in trace, history and rows.
      callbacks: functions ``callback(event)``, called at every check and at the end, or ``every`` given number of
        steps. If one returns a state, the run continues with it from the next step on, for example
        ``event.state.with_params(params)`` or a state whose ``opt_state`` is from ``set_hyperparams``. Its structure,
        shapes, dtypes and ``step`` must be those of ``event.state``. It takes effect exactly there, whatever
        ``steps_per_dispatch`` is, because no call makes steps beyond a period or a check. The metrics of that check,
        and its best state, are of the state before. Any other true value ends the run. See ``Event``; ``tensorboard``
        and ``wandb_offline`` make callbacks.
      save: ``save(name, state, step)``, called with ``"best"`` at a check that is the best so far, if a rule keeps the
        best, and with ``"last"`` after every check and at the end of the run, even if batches or callbacks raise an
        error. It must have written or copied the state when it returns: the next step overwrites its memory.
      history: a ``.csv`` or ``.jsonl`` file, written during the run: ``step``, the scalars of ``info`` and, at checks,
        the metrics. A metric with the name of an earlier column, such as ``loss``, is ``check/loss``. A state of step 0
        begins a new file and renames an existing one; a later state continues the file, after removing the rows of
        steps that are repeated.
      checkpoints: where the whole run is saved, and resumed from when ``fit`` is called again: ``Checkpoints``, or a
        folder for one with default settings. It is saved as ``every_steps`` and ``every_minutes`` say, otherwise after
        each check, and at the end. Saved are the state, sums and stopping rules, the best state, the records, and the
        place in the stream: iterators with ``get_state`` or ``state_dict`` continue by their own state, any others are
        read again and the batches that were used are skipped. ``state`` is then the state to begin with, and
        ``steps`` and ``epochs`` count from there. What callbacks have counted is not saved.
      changed: ``"error"`` refuses to resume a run that was saved with another step, other shapes or settings;
        ``"accept"`` resumes it.
      on_fault: ``RollBack()`` to return to the last good checkpoint when the loss or gradient is not finite, or is a
        spike. None leaves faults to the optimizer's guards and to rules.
      progress: None for a bar if there is a terminal, True or False, or a ``rich.console.Console``.
      ragged: ``"error"`` refuses batches of other shapes than the first one's. ``"pad"`` pads smaller ones, and every
        batch is a ``MaskedBatch(examples, where)``.
      steps_per_dispatch: number of batches that go to the device together; None chooses by their size.
      prefetch: number of such calls that the thread prepares ahead; 0 for none and no thread. With 0 and batches of
        unknown length, a callback with a period is called without the metrics of a check at the end of an epoch.
      sharding: the sharding of a batch; None for the default device. With several processes, each gives its own rows of
        every batch, see ``nnlearn.distributed.own_batches``; process 0 writes the history and shows the progress,
        callbacks are called in all, and ``check_every`` or ``epochs`` must be the same.
      donate: whether ``state`` may be overwritten, which saves the memory of one copy.

    Returns:
      ``FitResult(state, trace)``.

    Warns:
      UserWarning: if the run ended inside an accumulation window of ``MultiSteps``, whose gradients are not applied.

    Raises:
      TypeError: if ``batches`` is not an iterable, a leaf is not an array, a function takes other arguments than above
        or returns a wrong type, or a callback returns a state unlike ``event.state``.
      ValueError: if an argument is impossible, a name of ``host_metrics`` is taken by another metric, a batch differs
        from the first, or there are no batches, or fewer than ``steps``. After any error during training, the records
        so far are in ``history`` and the last state is saved.
      FaultError: if the run needs more roll-backs than ``on_fault`` permits.

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
    listeners, host = Callbacks(callbacks), HostMetrics(host_metrics)
    carried = carry_state(state)
    if jnp.shape(carried.step):
        raise ValueError(
            f"fit makes one run, but state holds {jnp.shape(carried.step)} of them: vmap what make_train returns"
        )
    needs_checks = bool(evaluate or host or rules or listeners or save)
    if changed not in ("error", "accept"):
        raise ValueError(f"changed must be 'error' or 'accept', got {changed!r}")
    if check_count("record_every", record_every) and prefetch != 0:
        check_count("prefetch", prefetch)
    if steps_per_dispatch is not None:
        check_count("steps_per_dispatch", steps_per_dispatch)
    begin, periods = int(carried.step), listeners.periods
    with contextlib.ExitStack() as stack:
        saver = None
        if isinstance(checkpoints, str | Path):
            checkpoints = stack.enter_context(Checkpoints(checkpoints))
        if on_fault is not None and checkpoints is None:
            raise ValueError("on_fault=RollBack(...) needs checkpoints to return to")
        finder = None if on_fault is None else FaultFinder(on_fault)
        if checkpoints is not None:
            settings = {"first": begin, "steps": steps, "epochs": epochs, "check_every": check_every}
            settings |= {"record_every": record_every, "ragged": ragged}
            settings |= {"on_fault": list(on_fault)} if on_fault is not None else {}
            saver = RunSaver(checkpoints, settings, changed)
            periods = (*periods, *([checkpoints.every_steps] if checkpoints.every_steps else []))
        place = START if saver is None else saver.place
        boundaries = _boundaries(begin, batches, steps, epochs, check_every, periods, needs_checks or saver is not None)
        if saver is not None and saver.step is not None:
            boundaries = boundaries._replace(first=saver.step)
        stacker = Stacker(steps_per_dispatch or boundaries.block_size, ragged, sharding)
        epochs_left = passes(batches, epochs, steps, place.epoch)
        if not donate and carried is state:  # carry_state has copied a state of another type
            carried = jax.tree.map(jnp.copy, carried)
        interrupt = stack.enter_context(Interrupt())
        is_first = jax.process_index() == 0  # it writes the files that all would write alike
        shown = progress if is_first else False
        bar = stack.enter_context(show_progress(shown, boundaries.first, _total(boundaries, epochs)))

        def open_writers(columns: list[str], saved: Iterator[Row] | None) -> tuple[History | None, list[Writer]]:
            if history is None or not is_first:
                return None, [listeners.write] if listeners else []
            file = stack.enter_context(History(history, columns, begin, saved))
            return file, [listeners.write] if listeners else []

        dispatcher = Dispatcher(step, carried, evaluate, rules, host)
        recorder = Recorder(
            record_every,
            dispatcher.metric_names,
            leaf_names(carried),
            open_writers=open_writers,
            watch=bar.update,
            finder=finder,
        )
        if saver is not None:
            saver.restore(dispatcher, recorder)
        loop = HostLoop(dispatcher, recorder, listeners, save, boundaries, check_every, saver, finder)
        tracked = saver is not None
        blocks = read_blocks(epochs_left, boundaries, stacker, lambda: ahead.stopped, prefetch > 0, place, tracked)
        ahead = Prefetch(blocks, prefetch)
        stack.enter_context(ahead)
        try:
            result = loop.run(ahead, interrupt)
        except BaseException as error:
            loop.rescue(error)
            raise
    if result.stopped_by not in REASONS.values():  # an interrupted run is resumed, with its window
        last = dispatcher.user_state
        warn_of_open_window(last.opt_state if isinstance(last, TrainState) else last)
    return result


def _boundaries(
    first: int,
    batches: Any,
    steps: int | None,
    epochs: int | None,
    check_every: int | None,
    periods: tuple[int, ...],
    needs_checks: bool,
) -> Boundaries:
    if steps is not None and epochs is not None:
        raise ValueError(f"give one of steps and epochs, got steps={steps!r} and epochs={epochs!r}")
    last = None if steps is None else first + check_count("steps", steps)
    if epochs is not None:
        check_count("epochs", epochs)
    if check_every is not None:
        periods = (check_count("check_every", check_every), *periods)
    return Boundaries(first, last, periods, check_every is None and needs_checks, known_length(batches))


def _total(boundaries: Boundaries, epochs: int | None) -> int | None:
    """Number of steps of the run, or None if unknown."""
    if boundaries.last is not None:
        return boundaries.last - boundaries.first
    return None if boundaries.epoch_steps is None else boundaries.epoch_steps * (epochs or 1)


__all__ = ["FitResult", "fit"]
