"""Checks of the dynamics: learning rate, schedule, clipping, optimizer state, precision, decay."""

import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.report import found


@check("the loss does not diverge")
def divergence(evidence: Evidence) -> Seen:
    loss, first = evidence.run.loss, evidence.first_loss
    bad = np.flatnonzero(~np.isfinite(loss) | (np.abs(loss) > 100 * max(abs(first), 1e-6)))
    values = {"first loss": first, "last loss": evidence.last_loss, "steps beyond": len(bad)}
    if not len(bad) or (np.isfinite(evidence.last_loss) and abs(evidence.last_loss) < abs(first)):
        return Seen(values, "finite, and below 100 times the first loss at the end")
    step = int(bad[0])
    text = f"The loss was {first:.3g} at the start and {loss[step]:.3g} at step {step}."
    return Seen(
        values,
        "finite, and below 100 times the first loss at the end",
        [found("learning_rate_too_high", text, values, strength=0.6, step=step)],
    )


CHECKS: tuple[NamedCheck, ...] = (divergence,)
