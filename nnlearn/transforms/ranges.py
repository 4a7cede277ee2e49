"""The range of each hyper-parameter, by its standard name, for every method that has it."""

import math
from typing import Any

from nnlearn.checks import check_number

DECAY: dict[str, Any] = {"low": 0.0, "high": 1.0, "high_open": True}
FINITE: dict[str, Any] = {"low": 0.0, "high": math.inf, "high_open": True}
POSITIVE: dict[str, Any] = {"low": 0.0, "low_open": True}
ANY: dict[str, Any] = {"low": -math.inf, "high": math.inf}
RANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("b1", "b2", "b3", "beta", "shampoo_beta", "neuron_b2", "decay", "rho"), DECAY),
    **dict.fromkeys(("eps", "eps_root", "epsilon"), FINITE),
    **dict.fromkeys(("learning_rate", "weight_decay", "weight_decay_rate", "eta", "gamma"), FINITE),
    **dict.fromkeys(("initial_accumulator_value", "initial_scale", "consistent_rms", "slow_step_size"), FINITE),
    **dict.fromkeys(("min_norm", "trust_coefficient", "clipping", "min_scale", "decay_rate", "alpha"), FINITE),
    **dict.fromkeys(
        ("estim_lr_coef", "weight_lr_power", "init_estim_sq_dist", "s_init", "reps_rel", "global_scale", "ridge"),
        FINITE,
    ),
    **dict.fromkeys(("preconditioner_lr", "lookahead"), FINITE),
    **dict.fromkeys(("eta_minus", "eta_plus", "min_step_size", "max_step_size"), FINITE),
    **dict.fromkeys(
        ("clipping_threshold", "estim_lr0", "max_learning_rate", "clip_threshold", "preconditioner_init_scale"),
        POSITIVE,
    ),
    **dict.fromkeys(("momentum", "nu1", "nu2"), {"low": 0.0, "high": 1.0}),
    **dict.fromkeys(("threshold", "ns_steps"), {"low": 0.0}),
    **dict.fromkeys(("sync_period",), {"low": 1.0}),
    **dict.fromkeys(("smooth_beta", "decay_offset", "step_offset", "f_min", "lower_bound"), ANY),
}


def check_hyperparams(*, schedules: tuple[str, ...] = (), **values: Any) -> None:
    """Check hyper-parameters against the ranges of their names; None passes, and so does a traced value.

    Args:
      schedules: names that may be schedules, which are not checked.
      **values: the hyper-parameters. A prefix ``adam_`` says whose they are, as in ``adam_b1``.

    Raises:
      TypeError: if one is no number.
      ValueError: if one is out of its range; the message has the name, the value and the range.

    >>> check_hyperparams(b1=0.9, eps=-1.0)
    Traceback (most recent call last):
    ValueError: eps must be in [0.0, inf), got -1.0
    """
    for name, value in values.items():
        if value is None or (name in schedules and callable(value)):
            continue
        check_number(name, value, **RANGES[name.removeprefix("adam_")])


__all__ = ["RANGES", "check_hyperparams"]
