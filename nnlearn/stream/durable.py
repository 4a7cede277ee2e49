"""A whole run in stretches of steps, driven by the host: saved on the way, and resumed bit for bit."""

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checkpoints import CheckpointError, Checkpoints
from nnlearn.stream.history import History, Row, check_history
from nnlearn.stream.identity import identity_of, refuse_another
from nnlearn.stream.interrupt import Interrupt
from nnlearn.stream.loop import FitResult
from nnlearn.stream.progress import NoProgress, show_progress
from nnlearn.stream.rollback import FaultFinder, RollBack, last_scheduled, with_skipped
from nnlearn.train.run import Run, Train
from nnlearn.train.trace import Trace, join
from nnlearn.types import Key, PyTree

STRETCHES = 100  # of a run that no checkpoint divides: as often the progress bar moves
SIGNAL_SECONDS = 3.0  # how long a signal waits for the end of a stretch
POLL_SECONDS = 0.002


def run(
    train: Train,
    hparams: PyTree,
    key: Key | int,
    *,
    checkpoints: Checkpoints | str | Path | None = None,
    history: str | Path | None = None,
    progress: Any = None,
    watch: Callable[[Trace], Any] | None = None,
    changed: Literal["error", "accept"] = "error",
    on_fault: RollBack | None = None,
) -> FitResult:
    """Run what ``make_train`` returns, save it on the way, and resume it where it was saved when called again.

    Its state and trace are those of ``train(hparams, key)``, to the bit, whether it was interrupted or not, on the
    same machine, number of devices and version of JAX. It may be killed at any moment; steps since the last
    checkpoint are repeated. At the first Ctrl-C or SIGTERM it saves within ``SIGNAL_SECONDS`` and the time that
    writing takes, and returns: ``result.stopped_by`` is ``"interrupted"`` or ``"terminated"``.

    Args:
      train: from ``make_train``.
      hparams, key: as for ``train(hparams, key)``.
      checkpoints: where the run is saved: ``Checkpoints``, whose ``every_steps`` and ``every_minutes`` say when, or a
        folder for one with default settings. None to save nothing. A run is saved at checks, so ``every_steps`` is
        rounded to a multiple of the run's ``check_every``; without both it is saved about 100 times. It is saved at
        its end, too: called again, it returns at once.
      history: a ``.csv`` or ``.jsonl`` file with a row for each record, written during the run.
      progress: None for a bar if there is a terminal, True or False, or a ``rich.console.Console``.
      watch: ``watch(trace)`` is called with the trace of each stretch of steps, in NumPy, once it is complete.
      changed: ``"error"`` refuses to resume a run that was saved with other hyper-parameters, key, data, code or
        settings, and says what differs; ``"accept"`` resumes it.
      on_fault: ``RollBack()`` to return to the last good checkpoint when the loss or gradient is not finite, or is a
        spike. None leaves faults to the optimizer's guards and to rules.

    Returns:
      ``FitResult(state, trace)``.

    Raises:
      CheckpointError: if the folder holds another run, or no run.
      ValueError: if the folder is in use, or an argument is impossible.
      OSError: if a checkpoint cannot be written, see ``Checkpoints``. The checkpoints before it are safe.
      FaultError: if the run needs more roll-backs than ``on_fault`` permits.

    >>> import tempfile, nnlearn
    >>> batches = nnlearn.generated(lambda key, step: jax.random.normal(key, (4,)))
    >>> train = nnlearn.make_train(
    ...     lambda p, b, k: jnp.mean((p - b) ** 2), nnlearn.sgd, batches, jnp.ones(()), steps=20, check_every=5
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     state, trace = run(train, 0.1, 0, checkpoints=folder, progress=False)
    >>> state.step, bool(state.params == train(0.1, 0)[0].params)
    (Array(20, dtype=int32), True)
    """
    if not isinstance(train, Train):
        raise TypeError(
            f"train must be what make_train returns, got {type(train).__name__}; fit runs steps on a stream"
        )
    if changed not in ("error", "accept"):
        raise ValueError(f"changed must be 'error' or 'accept', got {changed!r}")
    if history is not None:
        check_history(history)
    with contextlib.ExitStack() as stack:
        if isinstance(checkpoints, str | Path):
            checkpoints = stack.enter_context(Checkpoints(checkpoints))
        identity = identity_of(train, hparams, key) if checkpoints is not None else {}
        if on_fault is not None:
            if checkpoints is None:
                raise ValueError("on_fault=RollBack(...) needs checkpoints to return to")
            identity["settings"]["on_fault"] = list(on_fault.checked())
        begun = _begin(train, hparams, key, checkpoints, identity, changed)
        driver = _Driver(train, hparams, key, checkpoints, identity, begun, watch, on_fault)
        interrupt = stack.enter_context(Interrupt())
        driver.bar = stack.enter_context(show_progress(progress, begun.at, train.steps))
        if history is not None:
            driver.writer = stack.enter_context(_Rows(history, begun.trace))
        return driver.drive(interrupt)


class _Begun(NamedTuple):
    """Where a run is: the steps made, the run, its trace so far or None, and the stretches that were undone."""

    at: int
    state: Run
    trace: Trace | None
    rollbacks: tuple[tuple[int, int], ...] = ()


def _begin(
    train: Train, hparams: PyTree, key: Key | int, checkpoints: Checkpoints | None, identity: dict, changed: str
) -> _Begun:
    newest = None if checkpoints is None else checkpoints.latest()
    if checkpoints is None or newest is None:
        return _Begun(0, _programs(train)[0](hparams, key), None)
    path, metadata = checkpoints.path(newest), checkpoints.metadata(newest)
    if "run" not in metadata:
        raise CheckpointError(path, "it was not saved by nnlearn.run: give another folder")
    refuse_another(path, metadata["run"], identity, changed)
    shapes = jax.eval_shape(train.start, hparams, key)
    trace = jax.eval_shape(lambda hparams, run: train.advance(hparams, run, 0, newest)[1], hparams, shapes)
    if "on_fault" in metadata["run"]["settings"]:
        trace = dataclasses.replace(trace, info=with_skipped(trace.info))
    found = checkpoints.load({"run": shapes, "trace": trace}, newest)
    rollbacks = tuple((first, last) for first, last in metadata["rollbacks"])
    trace = dataclasses.replace(jax.device_get(found["trace"]), rollbacks=rollbacks)
    return _Begun(newest, found["run"], trace, rollbacks)


_PROGRAMS: weakref.WeakKeyDictionary[Train, tuple[Callable[..., Any], Callable[..., Any]]] = weakref.WeakKeyDictionary()


def _programs(train: Train) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``train.start`` and ``train.advance``, compiled once for each ``train``; they do not keep it alive."""
    if train not in _PROGRAMS:
        alive = weakref.ref(train)

        def start(hparams, key):
            return cast(Train, alive()).start(hparams, key)

        def advance(hparams, run, first, count):
            return cast(Train, alive()).advance(hparams, run, first, count)

        _PROGRAMS[train] = jax.jit(start), jax.jit(advance, static_argnums=3)
    return _PROGRAMS[train]


class _Driver:
    """A run under way."""

    def __init__(self, train: Train, hparams, key, checkpoints, identity, begun: _Begun, watch, on_fault):
        self.watch, self.rollbacks = watch, begun.rollbacks
        self.train, self.hparams, self.key = train, hparams, key
        self.checkpoints, self.identity = checkpoints, identity
        self.at, self.state, self.parts = begun.at, begun.state, [] if begun.trace is None else [begun.trace]
        self.saved_at = begun.at if self.parts else -1
        self.finder = None if on_fault is None else FaultFinder(on_fault)
        if self.finder is not None and begun.trace is not None:
            self.finder.restart(with_skipped(begun.trace.info))
            checkpoints.pin(last_scheduled(checkpoints))
        self.stretch, self.timed = _stretch(train, checkpoints), False
        self.advance = _programs(train)[1]
        self.bar: NoProgress = NoProgress()
        self.writer: _Rows | None = None

    def drive(self, interrupt: Interrupt) -> FitResult:
        """Stretch after stretch until the end, or until a signal."""
        try:
            while self.at < self.train.steps and interrupt.reason is None:
                count, began = min(self.stretch, self.train.steps - self.at), time.monotonic()
                state, part = self.advance(self.hparams, self.state, np.int32(self.at), count)
                if not _wait(part, interrupt):
                    break  # what this stretch has made is given up, to be in time
                part = jax.device_get(part)
                if self.finds_fault(part):
                    self.roll_back(self.at + count, part)
                else:
                    self.at, self.state = self.at + count, state
                    self.take(part)
                if self.checkpoints is not None and self.checkpoints.is_due(self.at):
                    self.save(scheduled=True)
                self.shorten(count, time.monotonic() - began)
        except BaseException as error:
            try:
                self.save_last()
            except Exception as another:
                error.add_note(f"the last state could not be saved either: {another}")
            raise
        self.save_last()
        return self.result(interrupt.reason if self.at < self.train.steps else None)

    def shorten(self, count: int, seconds: float) -> None:
        """Make stretches shorter if one takes longer than the minutes between two checkpoints."""
        every = None if self.checkpoints is None else self.checkpoints.every_minutes
        if every is not None and self.timed and count == self.stretch and seconds > 60 * every:
            rounds = int(count * 60 * every / seconds / self.train.check_every)
            self.stretch, self.timed = max(1, rounds) * self.train.check_every, False
        else:
            self.timed = True  # the first stretch of a length is not: it includes the time to compile

    def finds_fault(self, part: Trace) -> bool:
        """Whether a stretch has failed, by a policy that returns to a checkpoint."""
        if self.finder is None:
            return False
        made = np.asarray(part.made)
        self.finder.add(np.asarray(part.step)[made], jax.tree.map(lambda leaf: leaf[made], with_skipped(part.info)))
        return self.finder.fault is not None

    def roll_back(self, end: int, part: Trace) -> None:
        """Return to the last good checkpoint, as if the steps from there to ``end`` had been skipped."""
        finder, (first, run) = cast(FaultFinder, self.finder), self.last_good()
        finder.require_another(self.rollbacks, first)
        self.rollbacks = (*self.rollbacks, (first + 1, end))
        state = run.state._replace(step=jnp.asarray(end, jnp.int32))
        self.at, self.state = end, run._replace(state=state, order=_order_at(self.train, run, first, end))
        trace = join([*self.parts, dataclasses.replace(part, info=with_skipped(part.info))])
        info = trace.info._replace(skipped=np.asarray(trace.info.skipped) | (np.asarray(trace.step) > first))
        best = None if run.verdict.best is None else np.asarray(run.verdict.best.step)
        facts: dict[str, Any] = {"stop_step": np.array(end, np.int32), "reason": np.asarray(run.verdict.reason)}
        self.parts = [dataclasses.replace(trace, info=info, best_step=best, rollbacks=self.rollbacks, **facts)]
        finder.restart(info)
        if self.writer is not None:
            self.writer.restart(self.parts[0])
        if self.watch is not None:
            self.watch(dataclasses.replace(part, info=part.info._replace(skipped=np.ones(part.step.shape, bool))))

    def last_good(self) -> tuple[int, Run]:
        """The last checkpoint that was due, or the beginning."""
        checkpoints = cast(Checkpoints, self.checkpoints)
        step = last_scheduled(checkpoints)
        if step is None:
            return 0, _programs(self.train)[0](self.hparams, self.key)
        return step, checkpoints.load({"run": self.state}, step, unexpected="ignore")["run"]

    def take(self, part: Trace) -> None:
        """A stretch's trace: kept, written, shown."""
        if self.finder is not None:
            part = dataclasses.replace(part, info=with_skipped(part.info))
        self.parts.append(dataclasses.replace(part, rollbacks=self.rollbacks))
        if self.writer is not None:
            self.writer.write(part)
        if self.watch is not None:
            self.watch(part)
        if part.loss.size:
            rate = part.info.learning_rate
            self.bar.update(self.at, float(part.loss[-1]), None if rate is None else float(np.mean(rate[-1])))

    def save_last(self) -> None:
        """Save unless the disk has this step already, and wait for it."""
        if self.checkpoints is None or not self.parts:
            return
        if self.saved_at == self.at:
            self.checkpoints.wait()
        if self.at not in self.checkpoints.steps():
            self.save()
        self.checkpoints.wait()

    def save(self, scheduled: bool = False) -> None:
        self.parts = [join(self.parts)]
        metrics = {name: float(values[-1]) for name, values in self.parts[0].metrics.items()}
        if self.rollbacks and self.rollbacks[-1][1] == self.at:
            metrics = {}  # they are of the state that was undone
        if scheduled and self.finder is not None:
            self.checkpoints.pin(self.at)
        facts = {"run": self.identity, "scheduled": scheduled, "rollbacks": list(map(list, self.rollbacks))}
        self.checkpoints.save(self.at, {"run": self.state, "trace": self.parts[0]}, metrics=metrics, metadata=facts)
        self.saved_at = self.at

    def result(self, reason: str | None) -> FitResult:
        if not self.parts:
            return FitResult(self.train.finish(self.state), _ended(self.empty_trace(), reason))
        trace = jax.tree.map(jnp.asarray, join(self.parts))
        return FitResult(self.train.finish(self.state), _ended(trace, reason))

    def empty_trace(self) -> Trace:
        """Of a run that was stopped before its first stretch had ended."""
        count = min(self.stretch, self.train.steps)
        shapes = jax.eval_shape(
            lambda hparams, run: self.train.advance(hparams, run, 0, count)[1], self.hparams, self.state
        )

        def nothing(leaf):
            return jnp.zeros((0, *leaf.shape[1:]) if leaf.shape else (), leaf.dtype)

        return jax.tree.map(nothing, shapes)


def _stretch(train: Train, checkpoints: Checkpoints | None) -> int:
    """Steps between two looks of the host: whole rounds from check to check."""
    every = None if checkpoints is None else checkpoints.every_steps
    steps = train.steps / STRETCHES if every is None else every
    return max(1, round(steps / train.check_every)) * train.check_every


def _order_at(train: Train, run: Run, first: int, last: int) -> PyTree:
    """The sampler's state after ``last`` steps, from that after ``first``, by the loop's stretches without steps."""
    rows = jax.jit(train.batches.rows, static_argnums=(3, 4))
    order = run.order
    for at in range(first, last, train.check_every) if jax.tree.leaves(order) else ():
        end = min(at + train.check_every, last)
        for begin in range(at, end, train.stretch):
            count = min(train.stretch, end - begin)
            order, _ = rows(run.data_key, order, np.int32(begin), count, train.stretch)
    return order


def _wait(tree: PyTree, interrupt: Interrupt) -> bool:
    """Wait for a computation; False if a signal came and it did not end in time."""
    since = None
    for leaf in jax.tree.leaves(tree):
        while not leaf.is_ready():
            time.sleep(POLL_SECONDS)  # the handlers of signals run here
            if interrupt.reason is not None:
                since = since or time.monotonic()
                if time.monotonic() - since > SIGNAL_SECONDS:
                    return False
    return True


def _ended(trace: Trace, reason: str | None) -> Trace:
    """The trace of a run that a signal has ended."""
    if reason is None or int(trace.reason):
        return trace
    rules = (*trace.rules, reason)
    return dataclasses.replace(trace, rules=rules, reason=jnp.asarray(len(rules), trace.reason.dtype))


class _Rows:
    """The history of a run: opened with the columns of its first trace, or with the trace of a checkpoint."""

    def __init__(self, path: str | Path, saved: Trace | None):
        self.path = path
        self._history: History | None = None
        if saved is not None:
            self._history = History(path, list(saved.columns()), saved=_rows(saved))

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._history is not None:
            self._history.__exit__(*error)

    def restart(self, trace: Trace) -> None:
        """Write the whole trace again."""
        if self._history is None:
            self._history = History(self.path, list(trace.columns()))
        self._history.rewrite(_rows(trace))

    def write(self, part: Trace) -> None:
        if self._history is None:
            self._history = History(self.path, list(part.columns()))
        self._history.write(list(_rows(part)))


def _rows(trace: Trace) -> Iterator[Row]:
    """The rows of a trace, without the metrics where there was no check."""
    table, checks = trace.columns(), set(np.asarray(trace.check_step).tolist())
    checked = {name for name in table if name in trace.metrics or name.startswith("check/")}
    for at, step in enumerate(table["step"].tolist()):
        names = table if step in checks else [name for name in table if name not in checked]
        yield {name: table[name][at].item() for name in names}


__all__ = ["run"]
