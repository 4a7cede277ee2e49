"""Checks of the dynamics: learning rate, schedule, direction, precision, penalties, batch size."""

import contextlib
from typing import Any

import jax
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import Evidence, History
from nnlearn.diagnose.facts import UNLOGGED, facts_of
from nnlearn.diagnose.formulas import binary_formulas, class_formulas
from nnlearn.diagnose.gains import GAIN, HIGHER, LOWER, POINTS, gain, poor
from nnlearn.diagnose.metric import tolerance
from nnlearn.diagnose.optimizer import norm_on_host
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.report import found
from nnlearn.diagnose.subject import SHORT, params_of
from nnlearn.diagnose.variants import RATES

HALF = ("float16", "bfloat16")


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
    lower = {name: gains[name] for name in LOWER}
    higher = {name: gains[name] for name in HIGHER}
    rule = f"no other rate gains {GAIN:.0%} of the loss in an eighth of the steps"
    findings = []
    if not any(gains.values()) and (quick := faster(evidence)):
        higher[quick] = 0.1
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
        factor = RATES.get(best, 0.1)
        remedy = f"multiply the learning rate by {factor:g}"
        remedy = remedy if factor > 1 else f"divide the learning rate by {1 / factor:.3g}"
        short = name == "learning_rate_too_low" and factor <= 10 and evidence.subject.epochs < SHORT
        strength = 0.5 if short else 0.6 + 0.35 * gained[best]  # a very short run is more likely than a low rate
        findings.append(found(name, text, values, strength=strength, remedies=(remedy,)))
    return Seen(values, rule, findings)


def faster(evidence: Evidence) -> str:
    """A higher rate that beats, in an eighth of the steps, a run that simple predictors beat; or ""."""
    behind = False
    with contextlib.suppress(Unknown):
        behind = facts_of(evidence).shortfall > 0.05
    better = [
        name
        for name in HIGHER
        if evidence.variants[name].loss < 0.8 * evidence.last_loss
        and evidence.variants[name].score >= evidence.score - 0.01
    ]
    return better[0] if behind and evidence.last_loss > 0 and better else ""


def _score(score: float) -> str:
    return f" (score {score:.2f})" if np.isfinite(score) else ""


@check("the schedule lets the run learn")
def schedule(evidence: Evidence) -> Seen:
    pace = evidence.schedule
    mean, low = float(np.mean(pace)), float(np.mean(pace < 0.02))
    rising = bool(np.all(np.diff(pace) >= -1e-7) and pace[0] < 0.2 and pace[-1] > 1.02 * pace[int(0.9 * len(pace))])
    values = {"mean rate / largest": mean, "share of steps below 2 %": low, "still rising at the end": rising}
    rule = "the rate is above 2 % of its largest value in half of the steps, and warm-up ends"
    held = gain(evidence, "rate held")
    if rising or low > 0.5:
        held = max(held, *(gain(evidence, name) for name in HIGHER))
    stuck = rising and pace[0] < 0.02 and poor(evidence)  # also too slow for a short variant to show it
    if not stuck and (held <= 0 or not (low > 0.5 or rising or mean < 0.1)):
        return Seen(values, rule)
    end = int(np.argmax(pace < 0.02)) if low > 0.5 and pace[0] > 0.02 else None
    text = f"The rate is below 2 % of its largest value in {low:.0%} of the {len(pace)} steps."
    if rising:
        text = f"The rate still rises at the last of {len(pace)} steps: the warm-up never ends."
    return Seen(values, rule, [found("schedule_mistimed", text, values, strength=0.97, step=end)])


def worsens(evidence: Evidence) -> bool:
    """Whether training makes the run's own metric worse, also at lower rates, and nothing says that it learns."""
    metrics = evidence.metrics
    first, last = float(metrics[0]), float(metrics[-1])
    small = tolerance(first, last)
    with contextlib.suppress(Unknown):
        if not np.isfinite(evidence.last_loss) or (agrees(evidence) and not facts_of(evidence).ranks_only):
            return False
    lower = [evidence.variants[name].metric for name in ("rate x0.33", "rate x0.1")]
    if evidence.variants["rate x0.01"].metric > first + small:
        return False
    if not (
        last < first - 2 * small
        and np.nanmax(metrics) <= first + small
        and min(lower) < first - small
        and max(lower) <= first
    ):
        return False
    learns = evidence.score > evidence.first_score + 0.1
    return not learns or facts_of(evidence).ranks_only


def agrees(evidence: Evidence) -> bool:
    """Whether outputs rise with their targets, number by number, more than at the start; or are all alike."""
    outputs, targets = evidence.history.train, evidence.history.train_targets
    if outputs is None or targets is None:
        return False
    if np.ptp(outputs[-1], axis=0).max() <= 1e-3 * np.abs(outputs[-1]).max():  # nothing is left of the network
        return True
    if np.shape(outputs)[1:] != np.shape(targets):
        return False
    wanted = np.asarray(targets, np.float64).ravel()
    first, last = (np.asarray(outputs[at], np.float64).ravel() for at in (0, -1))
    if min(np.std(wanted), np.std(first), np.std(last)) == 0 or not np.isfinite(last).all():
        return False
    return bool(np.corrcoef(last, wanted)[0, 1] > max(0.1, np.corrcoef(first, wanted)[0, 1]))


@check("steps go downhill")
def direction(evidence: Evidence) -> Seen:
    cosines = evidence.slopes.descent
    early = cosines[:4]
    seen = early[np.isfinite(early) & (early != 0)]
    loss = evidence.run.loss
    values = {"cosine of update and -gradient": float(np.median(seen)) if len(seen) else np.nan}
    rule = "the update points along the negative gradient"
    if len(seen) >= min(3, len(early)) and np.median(seen) < -0.2 and np.mean(seen < 0) > 0.8:
        text = (
            f"The updates point uphill: their cosine with the negative gradient is {np.median(seen):.2f} in the median."
        )
        return Seen(values, rule, [found("sign_error", text, values, strength=1.0, step=0)])
    values |= {"first loss": float(loss[0]), "last loss": evidence.last_loss, "score": evidence.score}
    with contextlib.suppress(Exception):  # the checks of the outputs say so
        if facts_of(evidence).unbounded_entropy or facts_of(evidence).wrong_entropy:
            return Seen(values, rule)
    if loss[0] < 0 and evidence.data.labels is not None and evidence.program.of_kind("softmax"):
        text = f"The cross-entropy is {loss[0]:.3g} at the start; it cannot be negative."
        guess = float(np.log(len(np.unique(evidence.data.labels))))
        if loss[0] > -0.5 * guess:
            text += f" With the wrong sign it would be about {-guess:.2g}: it takes probabilities without logarithms."
            finding = found(
                "loss_output_mismatch", text, values, strength=0.9, step=0, where="loss", remedies=[UNLOGGED]
            )
            return Seen(values, rule, [finding])
        return Seen(values, rule, [found("sign_error", text, values, strength=0.97, step=0)])
    goes_on = evidence.last_loss < 1.5 * loss[len(loss) // 2]
    if (
        goes_on
        and evidence.last_loss < -10 * abs(loss[0])
        and np.argmin(np.nan_to_num(loss, nan=np.inf)) > 0.9 * len(loss)
    ):
        text = f"The loss falls from {loss[0]:.3g} to {evidence.last_loss:.3g} and goes on: it has no minimum."
        return Seen(values, rule, [found("sign_error", text, values, strength=0.93)])
    if worsens(evidence):
        first, last = (abs(float(evidence.metrics[at])) for at in (0, -1))
        name = evidence.subject.metric
        text = f"The more the run trains, the worse is {name}: {first:.3g} at the start, {last:.3g} at the end."
        return Seen(values | {"metric": last}, rule, [found("sign_error", text, values, strength=0.9)])
    first = evidence.first_score
    falls = not np.isfinite(evidence.last_loss) or evidence.last_loss < min(loss[0], 0) - abs(loss[0])
    if falls and np.isfinite(evidence.score) and evidence.score < first - 0.02 and np.nanmin(loss[-5:], initial=0) < 0:
        text = f"The loss falls to {evidence.last_loss:.3g}, but the score from {first:.2f} to {evidence.score:.2f}."
        return Seen(values, rule, [found("sign_error", text, values, strength=0.95)])
    return Seen(values, rule)


@check("numbers are precise enough")
def precision(evidence: Evidence) -> Seen:
    """Values that stop being finite although nothing had grown before, and parameters of 16 bits."""
    run, params = evidence.run, jax.tree.leaves(params_of(evidence.run.last))
    bad = ~np.isfinite(run.loss) | (~np.isfinite(run.grad_norm) & evidence.subject.has_loss)
    if run.skipped is not None and np.isfinite(evidence.last_loss) and not poor(evidence):
        bad &= ~run.skipped.astype(bool)  # as a scaled loss in float16 does now and then
    half = [leaf.dtype.name for leaf in params if leaf.dtype.name in HALF]
    unguarded = [fact for fact in evidence.program.of_kind("domain") if not fact.guarded and fact.operation != "div"]
    casts = evidence.program.of_kind("half")
    values: dict[str, Any] = {
        "steps not finite": int(bad.sum()),
        "16-bit parameters": len(half),
        "casts to 16 bits": len(casts),
    }
    values["unguarded"] = [f"{fact.operation} at {fact.where}" for fact in unguarded[:3]]
    rule = f"loss and gradient stay finite unless they grew before; 32 bits gain at most {GAIN:.0%}"
    if np.any(bad):
        step = int(np.argmax(bad))
        norms, losses = run.grad_norm[:step], np.abs(run.loss[:step])
        early = max(1, step // 2)
        calm = step == 0 or bool(
            norms[-1] <= 30 * np.median(norms[:early]) and losses[-1] <= 3 * np.max(losses[: min(early, 3)])
        )
        where = values["unguarded"][0] if unguarded else "operations in 16 bits" if casts else ""
        before = f"{run.loss[step - 1]:.3g} with a gradient norm of {norms[-1]:.3g}" if step else "the first"
        text = f"Loss or gradient is not finite from step {step} on; the loss before it was {before}."
        strength = 0.95 if calm else 0.7 if casts or half else 0.0
        if step == 0 and not (casts or half) and np.isfinite(evidence.variants["weights of unit scale"].losses[0]):
            strength = 0.5  # the values are too large, not the numbers too narrow
        size = norm_on_host(params_of(evidence.run.first))
        if step and not (casts or half or unguarded) and norms[0] > 1e3 * size > 0:
            strength = min(strength, 0.5)  # they were huge from the start
        if strength:
            finding = found("numerical_precision", text, values, strength=strength, step=step, where=where)
            return Seen(values, rule, [finding])
    if half and evidence.in_float32 is not None:
        wide, at = evidence.in_float32, len(evidence.in_float32.losses)
        narrow = float(np.mean(run.loss[:at][-max(3, at // 8) :]))
        score = evidence.score_at(at)
        values |= {
            "loss in 16 bits": narrow,
            "loss in 32 bits": wide.loss,
            "score": score,
            "score in 32 bits": wide.score,
        }
        better = not np.isfinite(narrow) or narrow - wide.loss > GAIN * (evidence.first_loss - wide.loss)
        if better and not wide.score < score + POINTS:
            text = (
                f"{len(half)} of {len(params)} parameters are {half[0]}. After {at} steps the loss is {narrow:.3g}"
                f"{_score(score)}; with parameters in float32 it is {wide.loss:.3g}{_score(wide.score)}."
            )
            return Seen(values, rule, [found("numerical_precision", text, values, strength=0.9, where=half[0])])
    return Seen(values, rule)


@check("no penalty rules the loss")
def penalty(evidence: Evidence) -> Seen:
    """Whether the gradient of the matrices points along the matrices themselves, as that of a penalty does."""
    grads, last = evidence.slopes.grads, params_of(evidence.run.last)
    triples = zip(*map(jax.tree.leaves, (grads, params_of(evidence.run.first), last)), strict=True)
    matrices = [[np.asarray(leaf, np.float64) for leaf in leaves] for leaves in triples if leaves[0].ndim >= 2]
    if not matrices:
        raise Unknown("there are no matrices")
    pull = sum(np.sum(slope * weight) for slope, weight, _ in matrices)
    sizes = [np.sqrt(sum(np.sum(each[at] ** 2) for each in matrices)) for at in range(3)]
    cosine = float(pull / max(sizes[0] * sizes[1], 1e-30))
    shrunk = float(sizes[2] / max(sizes[1], 1e-30))
    values = {"cosine of gradient and weights": cosine, "last size of the weights / first": shrunk}
    rule = "cosine below 0.5, weights that keep half of their size, or a first loss that the outputs explain"
    if not (cosine > 0.5 and shrunk < 0.5 and poor(evidence)) or _is_plain(evidence.history):
        return Seen(values, rule)
    text = f"At the start the gradient points along the weights (cosine {cosine:.2f}), and they shrink to {shrunk:.2f}."
    return Seen(values, rule, [found("excessive_regularisation", text, values, strength=0.9)])


def _is_plain(history: History) -> bool:
    """Whether the first loss is a cross-entropy or the squared error of the outputs, without a penalty."""
    if history.train is None:
        return False
    outputs, targets = np.asarray(history.train[0], np.float64), np.asarray(history.train_targets)
    if outputs.ndim == 2 and outputs.shape[1] > 1 and targets.shape == outputs.shape[:1] and targets.dtype.kind in "iu":
        if targets.min() < 0 or targets.max() >= outputs.shape[1]:
            return False
        plain = class_formulas(outputs, targets, False)["right"]
    elif outputs.size == targets.size and len(outputs) == len(targets):
        outputs = outputs.reshape(targets.shape)
        plain = np.mean((outputs - targets) ** 2)
        if np.isin(targets, (0, 1)).all():
            sigmoid = binary_formulas(outputs, targets, False)["right"]
            plain = sigmoid if np.isclose(history.train_loss[0], sigmoid, rtol=0.02) else plain
    else:
        return False
    return bool(np.isclose(history.train_loss[0], [plain, plain / 2], rtol=0.02).any())


@check("batches are large enough")
def batch_size(evidence: Evidence) -> Seen:
    plan = evidence.subject.plan
    batch = jax.eval_shape(lambda: plan.batch(plan.at(0)))
    size = min((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim), default=0)
    lower = max(gain(evidence, name) for name in LOWER)
    cosines = evidence.slopes.cosines
    values = {"batch size": size, "gain of a lower rate": lower, "cosine of neighbours": float(np.nanmedian(cosines))}
    rule = "more than 4 examples in a batch, or gradients that agree and a run that fits"
    if not (0 < size <= 4 and (lower > 0 or (poor(evidence) and values["cosine of neighbours"] < 0.3))):
        return Seen(values, rule)
    text = f"Each batch has {size} example{'s' * (size > 1)}; gradients of neighbouring batches have a cosine of "
    text += f"{values['cosine of neighbours']:.2f}."
    return Seen(values, rule, [found("batch_too_small", text, values, strength=0.92)])


def moved(evidence: Evidence) -> tuple[float, float]:
    """The distance of the last parameters from the first, and the size of the first."""
    pairs = zip(*(jax.tree.leaves(params_of(state)) for state in (evidence.run.first, evidence.run.last)), strict=True)
    distance = float(np.sqrt(sum(np.sum(np.square(np.asarray(new, np.float64) - old)) for old, new in pairs)))
    return distance, float(np.sqrt(np.sum(evidence.slopes.param_norms[0] ** 2)))


def stuck(evidence: Evidence) -> bool:
    """Whether the parameters hardly move although there is a gradient, and the loss stays."""
    distance, size = moved(evidence)
    first, last = evidence.same_losses
    steepness = float(np.median(np.sqrt(np.sum(evidence.slopes.mean_norms**2, axis=1))))
    still = 0 < distance < 0.03 * size and first > 0 and last > 0.9 * first
    return still and steepness > 1e-6 and poor(evidence)


@check("parameters move")
def movement(evidence: Evidence) -> Seen:
    distance, size = moved(evidence)
    values = {"moved": distance, "size at the start": size}
    rule = "parameters move by more than 3 % of their size, or the loss falls"
    if not stuck(evidence):
        return Seen(values, rule)
    first, last = evidence.same_losses
    text = f"The whole run moves the parameters by {distance / size:.2g} of their size; the loss falls from "
    text += f"{first:.3g} to {last:.3g}."
    return Seen(values, rule, [found("learning_rate_too_low", text, values, strength=0.8)])


@check("the loss falls")
def progress(evidence: Evidence) -> Seen:
    first, last = evidence.same_losses
    values = {"first loss": first, "last loss": last}
    rule = "the loss of the same examples falls below 0.97 of the first"
    if not (np.isfinite(last) and first > 0 and last > 0.97 * first):
        return Seen(values, rule)
    text = f"The loss was {first:.3g} at the start and is {last:.3g} at the end: nothing was learned."
    return Seen(values, rule, [found("underfitting", text, values, strength=0.45)])


CHECKS: tuple[NamedCheck, ...] = (
    precision,
    penalty,
    batch_size,
    movement,
    progress,
    divergence,
    rate,
    schedule,
    direction,
)
