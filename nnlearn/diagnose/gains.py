"""Whether a variant does better than the run, and whether the run fits at all."""

import numpy as np

from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.facts import facts_of
from nnlearn.diagnose.metric import tolerance
from nnlearn.diagnose.variants import Variant

LEAST = 0.02  # share of the loss that is no gain
GAIN = 0.1  # share of the reachable decrease of the loss that a variant must gain
SETTLED = 0.3  # the same for a rate that falls at the end, which lowers every noisy loss
MUCH = 0.3  # of the score
POINTS = 0.05  # and of the accuracy or R squared
HIGHER = ("rate x3", "rate x10", "rate x100")
LOWER = ("rate x0.33", "rate x0.1", "rate x0.01", "rate x0.1 at the end")


def reach(evidence: Evidence, start: float) -> float:
    """The largest decrease of the loss from ``start`` that the run or one of its variants reached."""
    ends = [evidence.last_loss, *(each.loss for each in evidence.variants.values())]
    ends = [each for each in ends if np.isfinite(each)]
    return max(start - min(ends), 1e-9) if ends and np.isfinite(start) else np.inf


def gain(evidence: Evidence, name: str) -> float:
    """What a variant gains over the whole run, as a share of the reachable decrease of the loss.

    It is 0 unless the scores gain, too, on training and on validation examples as far as they are known: a variant that
    only learns the examples by heart faster is no gain. If the run ended above its first loss, they need not get worse.
    """
    variant = evidence.variants.get(name)
    if variant is None or not np.isfinite(variant.loss):
        return 0.0
    if not np.isfinite(evidence.last_loss):
        return 1.0 if variant.loss < evidence.first_loss or not np.isfinite(evidence.first_loss) else 0.0
    if (gained := metric_gain(evidence, variant)) > 0:
        return gained
    pairs = ((variant.score, evidence.score), (variant.validation_score, evidence.validation_score))
    noise = 2 * float(np.hypot(uncertainty(evidence.run.loss), uncertainty(variant.losses)))
    if evidence.last_loss - variant.loss < max(noise, LEAST * abs(evidence.last_loss)):
        return 0.0
    worse = evidence.last_loss > evidence.first_loss + POINTS * abs(evidence.first_loss)
    if any(np.isfinite(new) and np.isfinite(old) and new < old + (not worse) * points(old) for new, old in pairs):
        return 0.0
    if loses(evidence, variant):
        return 0.0
    judged = any(np.isfinite(each) for pair in pairs for each in pair)
    if not judged and variant.metric < float(evidence.metrics[-1]) + tolerance(variant.metric):
        return 0.0  # nothing but the loss gains
    start = evidence.first_loss
    if name.endswith(("unit scale", "weights x0.1")):
        # It starts at another loss, and the run's says nothing of what can be learned.
        own = float(np.mean(variant.losses[:3]))
        if not own - variant.loss > GAIN * abs(own):  # it learns nothing either
            return 0.0
        start = max(min(start, own), evidence.last_loss)
    gained = min((evidence.last_loss - variant.loss) / reach(evidence, start), 1.0)
    if variant.score > evidence.score + MUCH:  # the first loss may be far above that of chance
        gained = max(gained, variant.score - max(evidence.score, 0.0))
    settled = name == "rate x0.1 at the end" and not variant.score > evidence.score
    return gained if gained > (SETTLED if settled else GAIN) else 0.0


def metric_gain(evidence: Evidence, variant: Variant) -> float:
    """What a variant gains by the run's own metric, as a share of its reachable growth, if its loss is as good.

    A loss that stays at a value of its own, such as the margin of a triplet loss, does not show it.
    """
    first, old, new = float(evidence.metrics[0]), float(evidence.metrics[-1]), variant.metric
    if not new > old + 10 * tolerance(new, old) or variant.loss > evidence.last_loss + LEAST * abs(evidence.last_loss):
        return 0.0
    return float(np.clip((new - old) / (new - min(first, old)), 0.0, 1.0))


def loses(evidence: Evidence, variant: Variant) -> bool:
    """Whether a variant is worse than the run by the run's own metric, so that its loss is no success."""
    new, old = variant.metric, float(evidence.metrics[-1])
    return bool(new < old - tolerance(new, old))


def uncertainty(losses: np.ndarray) -> float:
    """The standard error of the mean of the last tenth of the losses, from their median distance to the median."""
    tail = losses[-max(3, len(losses) // 10) :]
    return float(1.5 * np.median(np.abs(tail - np.median(tail))) / np.sqrt(len(tail)))


def points(score: float) -> float:
    """By how much another score must be better: half of what is missing, at most ``POINTS``."""
    return min(POINTS, 0.5 * (1 - score))


def poor(evidence: Evidence) -> bool:
    """Whether the run did not fit its training examples, as far as that is known.

    A score below 0.9 is not poor if neither simple predictors nor a variant of the run do better.
    """
    if not np.isfinite(evidence.score):
        return not evidence.last_loss < evidence.first_loss - 0.5 * abs(evidence.first_loss)
    if evidence.score >= 0.9:
        return False
    facts = facts_of(evidence)
    try:
        known = facts.data.kind == "sequence" or facts.are_dependent
        best = known and evidence.score >= facts.attainable - 0.02
    except Exception:  # targets that simple predictors do not know
        return True
    return not best or any(gain(evidence, name) > 0 for name in evidence.variants)


__all__ = ["GAIN", "HIGHER", "LEAST", "LOWER", "POINTS", "gain", "poor"]
