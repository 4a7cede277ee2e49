"""A learning rate from short real runs at many rates."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import chain, scale_by_schedule, with_extra_args_support

from nnlearn.checks import as_key, check_count, check_number
from nnlearn.programs.loops import stretch_length
from nnlearn.schedules import cosine_decay_schedule
from nnlearn.train.run import Train, made_tx
from nnlearn.train.step import recorded_learning_rate
from nnlearn.tree import safe_divide
from nnlearn.types import GradientTransformation, Key, PyTree

NAMES = ("rate", "learning_rate", "lr")
SHARES = (1 / 44, 3 / 44, 1 / 2)  # of the steps, for the runs of each round
RATES = 12  # of the first round, two for each decade of the default range
AROUND = (0.375, 0.75, 1.5)  # factors on the rate that the last round expects: mostly below it, where no run diverges
LAST = 5  # the loss of a run is the mean over its last fifth
HORIZON = -0.32  # the best rate falls as this power of the number of steps, Bjorck et al. 2024, arXiv:2409.19913
STEEPEST = -0.8  # the strongest such fall that is believed
CLIFF = 8.0  # a loss that rises this many times as far on one side as on the other says no more about the minimum
CLOSE = 0.05  # share of the best loss within which a rate is in the interval


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """What short runs show about learning rates.

    Attributes:
      rate: the advice, for all steps of the run.
      interval: the lowest and the highest rate whose loss was within 5 % of the best in the longest runs, changed for
        all steps by the same factor as the rate.
      rates: all rates that were tried, ascending.
      losses: the loss at the end of each run, infinite if it diverged.
      steps: the steps of each run; only runs of equal length compare.
      diverges_at: the lowest rate above ``rate`` whose run ended above its first loss or not finite; infinite if none.
      spent: the steps of all runs together.
    """

    rate: float
    interval: tuple[float, float]
    rates: np.ndarray
    losses: np.ndarray
    steps: np.ndarray
    diverges_at: float
    spent: int

    def __str__(self) -> str:
        low, high = self.interval
        good = f"good from {low:.3g} to {high:.3g}" if low < high else "no other rate was as good"
        limit = f"diverges from {self.diverges_at:.3g}" if np.isfinite(self.diverges_at) else "no rate diverged"
        return f"rate {self.rate:.3g} ({good}; {limit}); cost: {self.spent} steps"


def find_learning_rate(
    train: Train[Any],
    low: float = 1e-5,
    high: float = 10.0,
    *,
    hparams: PyTree = None,
    name: str | None = None,
    key: Key | int = 0,
    metric: str | None = None,
    anneal: bool = True,
    rates: int = RATES,
) -> LearningRates:
    """A learning rate for a run, from short real runs at many rates, each round as one vmapped program.

    The first round tries rates over the whole range, in runs of 1/44 of the steps. The second tries the best, and its
    neighbors, in runs of 3/44. The third tries three rates around the one that the first two lead to, in runs of half
    of the steps. All together take as many steps as two runs. All runs have the same initial parameters and batches,
    so they differ by their rate alone. Each follows the whole schedule of the run, in fewer steps. In each round the
    best rate is the minimum of a parabola through the best three. Longer runs need lower rates, so the rate is
    extrapolated from round to round, and to all steps, with a power of the steps half way between the one that was
    seen and ``-0.32``, which was measured on language models.

    Args:
      train: what ``make_train`` returns.
      low, high: the range of rates.
      hparams: the hyper-parameters of the run, a dict, in which the rate is replaced; None if the rate itself is the
        only hyper-parameter.
      name: the rate's key in ``hparams``; by default the one of ``rate``, ``learning_rate`` and ``lr`` that is there.
      key: a random key or seed.
      metric: the name of a metric of ``evaluate`` to minimize at the end of each run. By default the mean training loss
        of the last fifth of the steps.
      anneal: for an optimizer that records no learning rate, such as optax's: whether to multiply the updates by half a
        cosine, because its schedule is not known.
      rates: the number of rates of the first round, at least 4.

    Returns:
      ``LearningRates``.

    Source: the bias of short runs: Wu et al. 2018, arXiv:1803.02021; its size: Bjorck et al. 2024, arXiv:2409.19913.

    Raises:
      ValueError: if the range is empty, ``hparams`` has no such name, all runs diverge, or ``rates`` is below 4.
      KeyError: if ``evaluate`` has no such metric.

    >>> import nnlearn
    >>> batches = nnlearn.generated(lambda key, step: jax.random.normal(key, (8, 2)))
    >>> loss = lambda params, batch, key: jnp.mean((batch @ params - batch @ jnp.array([1.0, -2.0])) ** 2)
    >>> train = nnlearn.make_train(loss, nnlearn.sgd, batches, jnp.zeros(2), steps=220)
    >>> found = find_learning_rate(train, 1e-4, 10.0)
    >>> 0.05 < found.rate < 1.0 < found.diverges_at, found.spent
    (True, 432)
    """
    check_number("low", low, low=0.0, low_open=True)
    check_number("high", high, low=float(low), low_open=True)
    check_count("rates", rates, at_least=4)
    with_rate = _placer(hparams, name)
    steps = [max(int(train.steps * share), 2) for share in SHARES]

    def scores(count: int, tried: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        run = _score(_shortened(train, count, anneal), metric)
        found = jax.jit(jax.vmap(lambda rate: run(with_rate(rate), as_key(key))))(jnp.asarray(tried, float))
        first, last = (np.asarray(each, np.float64) for each in found)
        return first, np.where(np.isfinite(last), last, np.inf)

    grid = np.geomspace(low, high, rates)
    rounds = [(grid, *scores(steps[0], grid))]
    if not np.isfinite(rounds[0][2]).any():
        raise ValueError(f"every run diverged at rates from {low:g} to {high:g}: give a lower range, or check the loss")
    best, ratio = grid[np.argmin(rounds[0][2])], grid[1] / grid[0]
    near = best * ratio ** np.array([-1.0, 0.0, 1.0])
    rounds.append((near, *scores(steps[1], near)))
    early, middle = (_vertex(tried, ended) for tried, _, ended in rounds)
    last = middle * _longer(middle / early, steps[1] / steps[0], steps[2] / steps[1]) * np.array(AROUND)
    rounds.append((last, *scores(steps[2], last)))
    late = _vertex(last, rounds[2][2])
    factor = _longer(late / early, steps[2] / steps[0], train.steps / steps[2])
    rate = late * factor
    tried, begun, ended = (np.concatenate(each) for each in zip(*rounds, strict=True))
    failed = ~np.isfinite(ended) | (ended > begun if metric is None else False)
    close = last[rounds[2][2] <= rounds[2][2].min() + CLOSE * abs(rounds[2][2].min())]
    order = np.argsort(tried)
    counts = np.repeat(steps, [rates, len(near), len(last)])
    return LearningRates(
        rate=rate,
        interval=(float(min(close.min() * factor, rate)), float(max(close.max() * factor, rate))),
        rates=tried[order],
        losses=ended[order],
        steps=counts[order],
        diverges_at=float(np.min(tried, where=failed & (tried > rate), initial=np.inf)),
        spent=int(counts.sum()),
    )


def _longer(seen: float, longer: float, still_longer: float) -> float:
    """By which factor the best rate changes in a longer run, if it changed by ``seen`` in a ``longer`` one before."""
    power = (np.log(seen) / np.log(longer) + HORIZON) / 2 if longer > 1 else HORIZON
    return still_longer ** float(np.clip(power, STEEPEST, 0))


def _placer(hparams: PyTree, name: str | None) -> Callable[[jax.Array], PyTree]:
    """From a rate to the hyper-parameters of the run."""
    if hparams is None:
        return lambda rate: rate
    found = rate_name(hparams, name)
    return lambda rate: {**hparams, found: rate}


def rate_name(hparams: Mapping[str, Any], name: str | None = None) -> str:
    """The name of the learning rate in ``hparams``.

    Raises:
      ValueError: if it is not there, or not known.

    >>> rate_name({"lr": 0.1, "decay": 0.0})
    'lr'
    """
    names = [each for each in NAMES if each in hparams] if name is None else [name]
    if len(names) != 1 or names[0] not in hparams:
        raise ValueError(f"hparams has no entry for the rate: give name=, one of {sorted(hparams)}")
    return names[0]


def _shortened(train: Train[Any], steps: int, anneal: bool) -> Train[Any]:
    """The same run with fewer steps, and one check at the end."""
    changes: dict[str, Any] = {
        "steps": steps,
        "check_every": steps,
        "record_every": 1,
        "stop": (),
        "stretch": stretch_length(steps, steps, 1, train.batches.epoch_steps),
    }
    if train.step is None:

        def make_tx(hparams):
            tx = made_tx(train.make_tx, hparams)
            factors = _compressed(tx, train.steps, steps)
            if factors is not None:
                return chain(tx, scale_by_schedule(lambda count: factors[jnp.minimum(count, steps - 1)]))
            return chain(tx, scale_by_schedule(cosine_decay_schedule(1.0, steps))) if anneal else tx

        changes["make_tx"] = make_tx
    return dataclasses.replace(train, **changes)


def _compressed(tx: GradientTransformation, total: int, steps: int) -> jax.Array | None:
    """Factors on the updates of a short run that give it the learning rates of the whole run, shape (steps,).

    None if the optimizer records no learning rate.
    """
    update, params = with_extra_args_support(tx).update, jnp.zeros(())
    state = tx.init(params)
    if recorded_learning_rate(state) is None:
        return None

    def step(state, _):
        _, state = update(jnp.zeros(()), state, params, value=jnp.zeros(()), grad=params, value_fn=lambda p: p)
        return state, jnp.max(jnp.asarray(recorded_learning_rate(state)))

    _, rates = jax.lax.scan(step, state, length=total)
    wanted = rates[jnp.arange(steps) * total // steps]
    return safe_divide(wanted, rates[:steps])


def _score(train: Train[Any], metric: str | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The loss at the start of a run and what is minimized at its end."""

    def run(hparams, key):
        _, trace = train(hparams, key)
        if metric is not None:
            return trace.loss[0], trace.metrics[metric][-1]
        return trace.loss[0], jnp.mean(trace.loss[-max(train.steps // LAST, 1) :])

    return run


def _vertex(rates: np.ndarray, losses: np.ndarray) -> float:
    """The minimum of a parabola through the best rate and its neighbours, over the logarithm of the rate."""
    at = int(np.argmin(losses))
    if not 0 < at < len(rates) - 1 or not np.isfinite(losses[at - 1 : at + 2]).all():
        return float(rates[at])
    left, right = losses[at - 1] - losses[at], losses[at + 1] - losses[at]
    left, right = min(left, CLIFF * right), min(right, CLIFF * left)
    shift = 0.5 * (left - right) / (left + right) if left + right > 0 else 0.0
    return float(rates[at] * (rates[at + 1] / rates[at]) ** shift)


__all__ = ["LearningRates", "find_learning_rate"]
