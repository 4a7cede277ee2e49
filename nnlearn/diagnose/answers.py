"""Checks of the optimizer by its answers to given gradients: clipping, decay, moments, accumulation."""

import jax
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.dynamics import stuck
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.gains import HIGHER, gain, poor
from nnlearn.diagnose.optimizer import FACTORS, forgets
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.report import Finding, found
from nnlearn.diagnose.subject import params_of

USUAL_CLIP = 0.1  # a norm to which gradients are usually clipped, at least


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
    helps = max(gain(evidence, name) for name in HIGHER)
    along = float(np.median(evidence.answer.along[:4]))
    # An adaptive optimizer also answers alike to all gradients, but not along them, down to its eps.
    adaptive = limit < (1e-6 if along > 0.99 else 1e-4) * np.median(norms)
    adaptive = adaptive or (along < 0.99 and not evidence.clips)
    if not clipped or adaptive or share < 0.9 or limit > 0.3 * np.median(norms):
        return Seen(values, rule)
    faster = [evidence.variants[name] for name in HIGHER]
    faster = [each for each in faster if each.loss < 0.8 * evidence.last_loss and each.score > evidence.score]
    if not (helps > 0 or stuck(evidence) or (limit < USUAL_CLIP and faster and poor(evidence))):
        return Seen(values, rule)
    middle = np.median(norms)
    text = f"The gradient has norm {middle:.3g}, the threshold is about {limit:.1g}: {share:.0%} of the steps are cut."
    strength = 0.97 if limit < USUAL_CLIP else 0.6  # else a higher rate does the same
    return Seen(values, rule, [found("clipping_too_tight", text, values, strength=strength)])


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
    name = max(("no decay", "no decay at the end"), key=lambda each: gain(evidence, each))
    gained = gain(evidence, name)
    if total < -0.5 and gained > 0:
        other = evidence.variants[name]
        more = "more " * name.endswith("end")
        text = (
            f"Decay takes {-drift:.2g} of the weights in each of {steps} steps; without it, {len(other.losses)} {more}"
            f"steps reach a loss of {other.loss:.3g} where the run ended at {evidence.last_loss:.3g}."
        )
        findings.append(found("excessive_regularisation", text, values, strength=0.8 + 0.2 * gained))
    return Seen(values, rule, findings)


@check("the optimizer keeps its state")
def memory(evidence: Evidence) -> Seen:
    answer = evidence.answer
    kept, counts = answer.memory, answer.counts
    values = {
        "moments at the end": float(kept[-1]),
        "coasting": float(answer.coasting[0] / max(answer.pace[-1], 1e-30)),
    }
    rule = "moments and counts never fall back under a constant gradient"
    if len(kept) < 3 or np.any(np.isnan(kept)):
        return Seen(values, rule)
    if np.max(answer.pace) > 0 and np.mean(answer.pace <= 1e-6 * np.max(answer.pace)) > 0.2:
        raise Unknown("the optimizer accumulates gradients, and clears them by design")
    drops = np.flatnonzero((kept[1:] < 0.5 * kept[:-1]) & (counts[1:] <= counts[:-1]))
    lost = answer.left < 1e-3 or (values["coasting"] < 1e-3 and np.max(kept) == 0 < np.max(answer.pace))
    values["resets"] = len(drops)
    if len(drops) < 2 and not (lost and np.ptp(kept) <= 1e-6 * np.max(kept)):
        return Seen(values, rule)
    every = int(np.median(np.diff(drops))) if len(drops) > 1 else 1
    text = f"Under a constant gradient the moments fall back to their start every {every} step{'s' * (every > 1)}."
    if np.max(kept) == 0:
        text = "The optimizer has moments in its state, but they stay 0 under a constant gradient."
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
    every = thrown_away(evidence)
    values["steps whose gradient is thrown away"] = every
    if every:
        text = f"The optimizer moves every {every} steps, and a gradient before the last of them has no effect."
        findings.append(found("gradient_accumulation", text, values, strength=0.9))
    lasts = answer.coasting[-1] > 0.5 * pace[-1]  # what was gathered moves the parameters without any gradient
    if (
        len(steady) >= 20
        and lasts
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


def thrown_away(evidence: Evidence) -> int:
    """The steps from update to update if the optimizer moves rarely and forgets a gradient in between; else 0."""
    pace = evidence.answer.pace
    moves = np.flatnonzero(pace > 1e-6 * np.max(pace))
    every = int(moves[1] - moves[0]) if len(moves) > 2 else 1
    if every < 3 or np.any(np.diff(moves) != every):
        return 0
    params, grads = params_of(evidence.run.first), evidence.slopes.grads
    return every if forgets(evidence.subject, params, grads, every) else 0


CHECKS: tuple[NamedCheck, ...] = (clipping, decay, memory, accumulation)
