"""Skeleton of a new stop rule: copy it to ``nnlearn/train/stopping.py`` and rename it. It runs without changes."""

import jax.numpy as jnp

from nnlearn.checks import check_number
from nnlearn.settings import comparable
from nnlearn.train.stopping import StopRule, pick
from nnlearn.types import Scalar


@comparable  # equal settings give equal rules
def skeleton_rule(metric: str, factor: Scalar = 2.0) -> StopRule:
    """Stop once a metric exceeds a multiple of its smallest value (<authors> <year>).

    Args:
      metric: a name that ``evaluate`` returns, ``train_loss``, or ``aux/<path>``, see ``StopRule``.
      factor: the ratio to the smallest value at which the run stops, >= 1.

    Returns:
      A ``StopRule``.

    Raises:
      ValueError: if ``factor`` is below 1.

    >>> rule = skeleton_rule("loss")
    >>> state, stops = rule.init(), []
    >>> for loss in (3.0, 1.0, 1.9, 2.1):
    ...     state, stop = rule.update(state, {"loss": loss}, 0)
    ...     stops.append(bool(stop))
    >>> stops
    [False, False, False, True]
    """
    check_number("factor", factor, low=1.0)

    def init():
        return jnp.array(jnp.inf, jnp.float32)

    def update(smallest, metrics, step):
        # The rule runs inside the compiled program: keep the state's dtype and shape, and do not branch in Python on a
        # value. A comparison with NaN is False, so decide what NaN means; ``diverged`` stops at it.
        value = pick(metrics, metric, "skeleton_rule")
        smallest = jnp.fmin(smallest, value)
        return smallest, value > factor * smallest

    # ``metrics`` names the metrics that the rule uses; ``keep=(metric, "min")`` would end the run with its best state.
    return StopRule(f"skeleton_rule({metric})", init, update, metrics=(metric,))


# Tests, in ``tests/test_run.py``: the check at which a run stops, alone, under ``vmap`` and when run in parts. Then
# export the name in ``nnlearn/train/__init__.py`` and ``nnlearn/__init__.py``.
