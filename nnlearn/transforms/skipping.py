"""Steps that an optimizer skips: read from its state, and skipped whole, whatever stands outside of the guard."""

import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import (
    ApplyIfFiniteState,
    ConditionallyMaskState,
    ConditionallyTransformState,
    MultiStepsState,
    with_extra_args_support,
)

from nnlearn.transforms.hyperparams import is_injected
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, OptState, PyTree

CONDITIONAL = (ConditionallyTransformState, ConditionallyMaskState)
LIMIT = "max_consecutive_errors"  # the variable of apply_if_finite, nnlearn's and optax's, that its state does not hold


def was_skipped(tx: GradientTransformation, before: OptState, after: OptState) -> jax.Array | None:
    """Whether an update was skipped: a boolean scalar, or None if nothing in ``tx`` skips updates.

    An update is skipped if any guard in the optimizer skips it, wherever the guard is: in a chain, a mask, one part of
    a partition, or another guard. Guards are

    - ``apply_if_finite``, nnlearn's and optax's, until ``max_consecutive_errors`` lets an update through;
    - ``dynamic_loss_scale``;
    - ``MultiSteps`` where ``should_skip_update_fn`` says so. A mini-step that only accumulates is not skipped;
    - a transformation of your own whose state is a NamedTuple with an integer ``skipped``, which it increases when it
      skips, and ``inner_state``, what it guards.

    Args:
      tx: the optimizer.
      before: its state before the update.
      after: its state after the update.

    Returns:
      A boolean scalar, or None if no guard is in ``tx``.

    >>> import nnlearn
    >>> tx = nnlearn.apply_if_finite(nnlearn.sgd(0.1), 5)
    >>> state = tx.init(jnp.zeros(1))
    >>> [bool(was_skipped(tx, state, tx.update(jnp.array([g]), state)[1])) for g in (1.0, jnp.inf)]
    [False, True]
    """
    return _any(_verdicts(before, after, _limit(tx, before)))


def skip_whole(tx: GradientTransformation) -> GradientTransformationExtraArgs:
    """``tx``, but an update that one of its guards skips is zero, and leaves the state outside that guard as it was.

    A guard holds what is inside of it. In ``chain(apply_if_finite(adam(...)), average_params())`` the average is
    outside, and would count the step. The guards' own counts and scales change in any case. ``make_step`` does this to
    every optimizer; one without guards is not changed.

    >>> import nnlearn
    >>> tx = skip_whole(nnlearn.chain(nnlearn.apply_if_finite(nnlearn.sgd(0.1), 5), nnlearn.average_params(0.5)))
    >>> update, (guard, average) = tx.update(jnp.array([jnp.nan]), tx.init(jnp.ones(1)), jnp.ones(1))
    >>> int(guard.total_notfinite), int(average.count)
    (1, 0)
    """
    tx = with_extra_args_support(tx)

    def update(updates, state, params=None, **extra_args):
        change, after = tx.update(updates, state, params, **extra_args)
        if not _guards(state) or (_is_guard(state) and not _guards(_inner(state))):
            return change, after  # nothing to skip, or one guard that holds everything
        verdicts = _verdicts(state, after, _limit(tx, state))
        skipped: Any = _any(verdicts)  # there is a guard
        change = jax.tree.map(lambda leaf: jnp.where(skipped, jnp.zeros_like(leaf), leaf), change)
        return change, _held(state, after, verdicts, [])

    return GradientTransformationExtraArgs(tx.init, update)


def hold(skipped: jax.Array | None, before: PyTree, after: PyTree) -> PyTree:
    """``before`` where a step was skipped, else ``after``, whose dtypes it has.

    >>> hold(jnp.array(True), {"mean": jnp.ones(())}, {"mean": jnp.array(jnp.nan)})
    {'mean': Array(1., dtype=float32)}
    """
    if skipped is None:
        return after

    def choose(old, new):
        if old is new:
            return new
        old, new = jnp.asarray(old), jnp.asarray(new)
        return jnp.where(skipped, old if old.dtype == new.dtype else old.astype(new.dtype), new)

    return jax.tree.map(choose, before, after)


class _Verdict(NamedTuple):
    """Whether a guard skipped the update, and the verdicts of the guards inside of it."""

    skipped: jax.Array
    inner: list["_Verdict"]


def _any(verdicts: Sequence[_Verdict]) -> jax.Array | None:
    flags = [flag for each in verdicts for flag in (each.skipped, _any(each.inner)) if flag is not None]
    return functools.reduce(jnp.logical_or, flags) if flags else None


def _is_guard(node: Any) -> bool:
    counts = isinstance(node, tuple) and {"skipped", "inner_state"} <= set(getattr(node, "_fields", ()))
    return counts or isinstance(node, ApplyIfFiniteState | MultiStepsState)


def _inner(guard: Any) -> OptState:
    return guard.inner_opt_state if isinstance(guard, MultiStepsState) else guard.inner_state


def _guards(state: OptState, *others: type) -> list:
    """The outermost guards of a state, and the nodes of other types."""

    def is_found(node):
        return _is_guard(node) or isinstance(node, others)

    return [node for node in jax.tree.leaves(state, is_leaf=is_found) if is_found(node)]


def _verdicts(before: OptState, after: OptState, limit: jax.Array | None, runs: bool = True) -> list[_Verdict]:
    """The verdicts of the outermost guards, from what they count: the flags of one that did not run are old.

    ``runs``: False where nothing tells whether a ``MultiSteps`` that stands still has run at all.
    """
    found = []
    for old, new in zip(_guards(before, *CONDITIONAL), _guards(after, *CONDITIONAL), strict=True):
        if isinstance(old, CONDITIONAL):
            found += _verdicts(old.inner_state, new.inner_state, limit, runs=False)
            continue
        inner = _verdicts(_inner(old), _inner(new), limit, runs)
        if isinstance(old, MultiStepsState):
            emitted = new.gradient_step != old.gradient_step
            skipped = (new.mini_step == old.mini_step) & ~emitted & runs
            inner = [_where_run(emitted, verdict) for verdict in inner]
        elif isinstance(old, ApplyIfFiniteState):
            skipped = new.total_notfinite != old.total_notfinite
            skipped = skipped if limit is None else skipped & (new.notfinite_count <= limit)
        else:
            skipped = new.skipped != old.skipped
        found.append(_Verdict(jnp.any(skipped), inner))
    return found


def _where_run(ran: jax.Array, verdict: _Verdict) -> _Verdict:
    """A verdict inside of ``MultiSteps``, where a ``MultiSteps`` that has not run stands still, too."""
    return _Verdict(jnp.any(ran) & verdict.skipped, [_where_run(ran, each) for each in verdict.inner])


def _held(before: OptState, after: OptState, verdicts: list[_Verdict], outside: list[_Verdict]) -> OptState:
    """The state after an update that guards may have skipped.

    Args:
      before, after: a part of the state, as it was and as it came back.
      verdicts: of the guards in it.
      outside: of all guards but these, and those that hold this part themselves.
    """
    if not verdicts:
        return hold(_any(outside), before, after)
    numbers = iter(range(len(verdicts)))

    def node(old, new):
        if not _is_guard(old):
            return hold(_any([*verdicts, *outside]), old, new)
        at = next(numbers)
        others = [*verdicts[:at], *verdicts[at + 1 :], *outside]
        inner = _held(_inner(old), _inner(new), verdicts[at].inner, others)
        if isinstance(old, MultiStepsState):  # what is inside of it does not keep its window open
            return hold(_any(others), old, new)._replace(skip_state=new.skip_state, inner_opt_state=inner)
        return new._replace(inner_state=inner)

    return jax.tree.map(node, before, after, is_leaf=_is_guard)


def _limit(tx: GradientTransformation, state: OptState) -> jax.Array | None:
    """After how many updates in a row ``apply_if_finite`` lets one through; of several, the largest number.

    It stands in a variable of a function alone, or among injected hyper-parameters. None if it is in neither.
    """
    injected = [node for node in jax.tree.leaves(state, is_leaf=is_injected) if is_injected(node)]
    limits = [node.hyperparams[LIMIT] for node in injected if LIMIT in node.hyperparams]
    limits += closure_variables(tx.update, LIMIT)
    return functools.reduce(jnp.maximum, limits) if limits else None


def closure_variables(thing: Any, name: str, seen: set[int] | None = None) -> Iterator[Any]:
    """The values of a variable of that name in the functions that a function calls, as far as closures show them.

    >>> import nnlearn
    >>> tx = nnlearn.chain(nnlearn.clip(1.0), nnlearn.MultiSteps(nnlearn.sgd(0.1), 4))
    >>> list(closure_variables(tx.update, "every_k_schedule"))
    [4]
    """
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    held: list = []
    if isinstance(thing, tuple | list):
        held = list(thing)
    elif isinstance(thing, dict):
        held = list(thing.values())
    elif isinstance(thing, functools.partial):
        held = [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, types.MethodType):  # such as those of optax.MultiSteps
        held = [thing.__func__, *getattr(thing.__self__, "__dict__", {}).values()]
    elif isinstance(thing, types.FunctionType):
        for variable, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            try:
                held.append(cell.cell_contents)
            except ValueError:  # not assigned yet
                continue
            if variable == name:
                yield held[-1]
    elif callable(thing) and hasattr(thing, "__wrapped__"):  # compiled, or comparable
        held = [getattr(thing, "__wrapped__")]  # noqa: B009
    for each in held:
        yield from closure_variables(each, name, seen)


__all__ = ["closure_variables", "hold", "skip_whole", "was_skipped"]
