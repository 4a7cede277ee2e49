"""Checks of the dynamics: learning rate, schedule, clipping, optimizer state, precision, decay."""

import jax
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import RATES, Evidence
from nnlearn.diagnose.optimizer import FACTORS
from nnlearn.diagnose.report import Finding, found
from nnlearn.diagnose.subject import Unknown

GAIN = 0.1  # share of the reachable decrease of the loss that a variant must gain
POINTS = 0.05  # and of the accuracy or R squared


def reach(evidence: Evidence) -> float:
    """The largest decrease of the loss that the run or one of its variants reached."""
    ends = [evidence.last_loss, *(each.loss for each in evidence.variants.values())]
    ends = [each for each in ends if np.isfinite(each)]
    return max(evidence.first_loss - min(ends), 1e-9) if ends and np.isfinite(evidence.first_loss) else np.inf


def gain(evidence: Evidence, name: str) -> float:
    """What a variant gains over the whole run, as a share of the reachable decrease; 0 unless the score gains, too."""
    variant = evidence.variants.get(name)
    if variant is None or not np.isfinite(variant.loss):
        return 0.0
    if not np.isfinite(evidence.last_loss):
        return 1.0 if variant.loss < evidence.first_loss or not np.isfinite(evidence.first_loss) else 0.0
    more = min((evidence.last_loss - variant.loss) / reach(evidence), 1.0)
    if np.isfinite(variant.score) and np.isfinite(evidence.score) and variant.score < evidence.score + POINTS:
        return 0.0
    return more if more > GAIN else 0.0


@check("the loss does not diverge")
def divergence(evidence: Evidence) -> Seen:
    loss, first = evidence.run.loss, evidence.first_loss
    bad = np.flatnonzero(~np.isfinite(loss) | (np.abs(loss) > 100 * max(abs(first), 1e-6)))
    values = {"first loss": first, "last loss": evidence.last_loss, "steps beyond": len(bad)}
    if not len(bad) or (np.isfinite(evidence.last_loss) and abs(evidence.last_loss) < abs(first)):
        return Seen(values, "finite, and below 100 times the first loss at the end")
    step = int(bad[0])
    text = f"The loss was {first:.3g} at the start and {loss[step]:.3g} at step {step}."
    finding = found("learning_rate_too_high", text, values, strength=0.6, step=step)
    return Seen(values, "finite, and below 100 times the first loss at the end", [finding])


@check("other learning rates")
def rate(evidence: Evidence) -> Seen:
    gains = {name: gain(evidence, name) for name in (*RATES, "rate x0.1 at the end")}
    values = {name: evidence.variants[name].loss for name in RATES} | {"the run": evidence.last_loss}
    lower = {name: gains[name] for name in ("rate x0.33", "rate x0.1", "rate x0.01", "rate x0.1 at the end")}
    higher = {name: gains[name] for name in ("rate x3", "rate x10", "rate x100")}
    rule = f"no other rate gains {GAIN:.0%} of the loss in a fifth of the steps"
    findings = []
    for name, gained in (("learning_rate_too_high", lower), ("learning_rate_too_low", higher)):
        best = max(gained, key=lambda each: gained[each])
        other = max((lower if gained is higher else higher).values())
        if gained[best] <= 0 or gained[best] < other:
            continue
        variant = evidence.variants[best]
        text = (
            f"The run ended at a loss of {evidence.last_loss:.3g}{_score(evidence.score)}; with {best}, "
            f"{len(variant.losses)} steps reached {variant.loss:.3g}{_score(variant.score)}."
        )
        findings.append(found(name, text, values, strength=0.6 + 0.35 * gained[best]))
    return Seen(values, rule, findings)


def _score(score: float) -> str:
    return f" (score {score:.2f})" if np.isfinite(score) else ""


@check("the schedule lets the run learn")
def schedule(evidence: Evidence) -> Seen:
    pace = evidence.schedule
    mean, low = float(np.mean(pace)), float(np.mean(pace < 0.02))
    rising = bool(np.all(np.diff(pace) >= -1e-7) and pace[0] < 0.2 and pace[-1] > 1.02 * pace[int(0.9 * len(pace))])
    values = {"mean rate / largest": mean, "share of steps below 2 %": low, "still rising at the end": rising}
    rule = "the rate is above 2 % of its largest value in half of the steps, and warm-up ends"
    held = max(gain(evidence, "rate held"), gain(evidence, "rate x10") if rising else 0.0)
    held = max(held, gain(evidence, "rate x100") if rising or low > 0.5 else 0.0)
    if held <= 0 or not (low > 0.5 or rising or mean < 0.1):
        return Seen(values, rule)
    end = int(np.argmax(pace < 0.02)) if low > 0.5 and pace[0] > 0.02 else None
    text = f"The rate is below 2 % of its largest value in {low:.0%} of the {len(pace)} steps."
    if rising:
        text = f"The rate still rises at the last of {len(pace)} steps: the warm-up never ends."
    return Seen(values, rule, [found("schedule_mistimed", text, values, strength=0.97, step=end)])


@check("clipping leaves most steps alone")
def clipping(evidence: Evidence) -> Seen:
    response = evidence.answer.response
    norms = evidence.run.grad_norm[np.isfinite(evidence.run.grad_norm)]
    if not len(norms) or response[-1] <= 0 or not np.all(np.isfinite(response)):
        raise Unknown("the optimizer does not answer to the gradient")
    slopes = np.diff(np.log(np.maximum(response, 1e-30))) / np.diff(np.log(FACTORS))
    linear = np.flatnonzero(slopes > 0.5)  # from the largest gradient to the smallest
    clipped = len(linear) > 0 and linear[0] > 0
    first = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(evidence.slopes.grads))))
    limit = first * float(FACTORS[linear[0]]) if clipped else np.inf
    share = float(np.mean(norms > limit))
    values = {"gradient norm": float(np.median(norms)), "threshold": limit, "share of steps clipped": share}
    rule = "clipped in less than 90 % of the steps, or a higher rate gains nothing"
    helps = max(gain(evidence, name) for name in ("rate x3", "rate x10", "rate x100"))
    adaptive = slopes[-1] < 0.5 or np.any(np.diff(slopes[: max(linear[0], 1)]) > 0.3) if clipped else True
    if not clipped or adaptive or share < 0.9 or limit > 0.3 * np.median(norms) or helps <= 0:
        return Seen(values, rule)
    text = f"The gradient has norm {np.median(norms):.3g}, the threshold is about {limit:.1g}: {share:.0%} of the steps are cut."
    return Seen(values, rule, [found("clipping_too_tight", text, values, strength=0.97)])


@check("weight decay is small")
def decay(evidence: Evidence) -> Seen:
    drift, steps = evidence.answer.drift, evidence.subject.steps
    total = drift * float(np.sum(evidence.schedule)) / max(evidence.schedule[0], 1e-3)
    values = {"decay per step": drift, "over the run": total}
    rule = "weights shrink by less than their size over the run, or the run without decay gains nothing"
    findings: list[Finding] = []
    if total > 0.05:
        text = f"Without a gradient the weights grow by {drift:.2g} of their size in each step."
        findings.append(found("sign_error", text, values, strength=0.9))
    gained = gain(evidence, "no decay")
    if total < -0.5 and gained > 0:
        other = evidence.variants["no decay"]
        text = (
            f"Decay takes {-drift:.2g} of the weights in each of {steps} steps; without it, {len(other.losses)} steps "
            f"reach a loss of {other.loss:.3g} where the run ended at {evidence.last_loss:.3g}."
        )
        findings.append(found("excessive_regularisation", text, values, strength=0.8 + 0.2 * gained))
    return Seen(values, rule, findings)


@check("steps go downhill")
def direction(evidence: Evidence) -> Seen:
    cosines = evidence.slopes.descent
    early = cosines[:4]
    seen = early[np.isfinite(early) & (early != 0)]
    loss = evidence.run.loss
    values = {"cosine of update and -gradient": float(np.median(seen)) if len(seen) else np.nan}
    rule = "the update points along the negative gradient"
    if len(seen) and np.median(seen) < -0.2 and np.mean(seen < 0) > 0.8:
        text = (
            f"The updates point uphill: their cosine with the negative gradient is {np.median(seen):.2f} in the median."
        )
        return Seen(values, rule, [found("sign_error", text, values, strength=1.0, step=0)])
    values |= {"first loss": float(loss[0]), "last loss": evidence.last_loss, "score": evidence.score}
    first = evidence.first_score
    falls = not np.isfinite(evidence.last_loss) or evidence.last_loss < min(loss[0], 0) - abs(loss[0])
    if falls and np.isfinite(evidence.score) and evidence.score < first - 0.02 and np.nanmin(loss[-5:], initial=0) < 0:
        text = f"The loss falls to {evidence.last_loss:.3g}, but the score from {first:.2f} to {evidence.score:.2f}."
        return Seen(values, rule, [found("sign_error", text, values, strength=0.95)])
    return Seen(values, rule)


@check("the optimizer keeps its state")
def memory(evidence: Evidence) -> Seen:
    answer = evidence.answer
    kept, counts = answer.memory, answer.counts
    values = {
        "moments at the end": float(kept[-1]),
        "coasting": float(answer.coasting[0] / max(answer.pace[-1], 1e-30)),
    }
    rule = "moments and counts never fall back under a constant gradient"
    if len(kept) < 3 or np.max(kept) <= 0:
        return Seen(values, rule)
    drops = np.flatnonzero((kept[1:] < 0.5 * kept[:-1]) & (counts[1:] <= counts[:-1]))
    forgets = values["coasting"] < 1e-3
    values["resets"] = len(drops)
    if len(drops) < 2 and not (forgets and np.ptp(kept) <= 1e-6 * np.max(kept)):
        return Seen(values, rule)
    every = int(np.median(np.diff(drops))) if len(drops) > 1 else 1
    text = f"Under a constant gradient the moments fall back to their start every {every} step{'s' * (every > 1)}."
    return Seen(values, rule, [found("optimizer_state_reset", text, values, strength=0.95)])


@check("accumulated gradients are averaged and cleared")
def accumulation(evidence: Evidence) -> Seen:
    answer = evidence.answer
    pace = answer.pace
    still = pace <= 1e-6 * np.max(pace)
    values = {
        "steps without an update": float(np.mean(still)),
        "last update / first": float(pace[-1] / max(pace[0], 1e-30)),
    }
    rule = "updates under a constant gradient do not grow, and turn with it"
    moving = pace[~still]
    level = evidence.schedule[: len(pace)][~still]
    steady = moving / np.maximum(level / np.max(level), 1e-9) if evidence.run.rate is not None else moving
    findings = []
    if (
        len(steady) >= 20
        and steady[-1] > 1.6 * steady[len(steady) // 2]
        and steady[len(steady) // 2] > 1.6 * steady[len(steady) // 4]
    ):
        text = f"Under a constant gradient the update grows from {steady[0]:.2g} to {steady[-1]:.2g} without end."
        findings.append(found("gradient_accumulation", text, values, strength=0.95))
    elif (
        0.4 < np.mean(still) < 0.99
        and max(gain(evidence, name) for name in ("rate x0.33", "rate x0.1", "rate x0.01")) > 0
    ):
        every = round(1 / (1 - float(np.mean(still))))
        text = f"The optimizer moves every {every} steps, and a smaller step does better: the gradients are summed."
        findings.append(found("gradient_accumulation", text, values, strength=0.99))
    return Seen(values, rule, findings)


CHECKS: tuple[NamedCheck, ...] = (
    divergence,
    rate,
    schedule,
    clipping,
    decay,
    direction,
    memory,
    accumulation,
)
