"""Checks of the fit: too little, too much, or hindered by regularisation or augmentation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.data import favours_rare
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.examples import some
from nnlearn.diagnose.facts import Facts, facts_of
from nnlearn.diagnose.pairs import same_shape_as_inputs
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.probes import log_softmax, quality
from nnlearn.diagnose.report import found
from nnlearn.diagnose.subject import SHORT, params_of


@check("training examples are fitted")
def fitted(evidence: Evidence) -> Seen:
    """Whether the network does on training examples what simple predictors do on unseen ones."""
    facts = facts_of(evidence)
    if same_shape_as_inputs(facts):
        raise Unknown("the targets have the shape of the inputs, so ridge regression has no bottleneck")
    if favours_rare(facts):
        raise Unknown("the network favours rare classes, so its accuracy does not show the fit")
    reached, attainable = facts.fairly_reached, facts.attainable
    values = {"reached": reached, "simple predictors": attainable}
    rule = "not over 5 % below simple predictors, or 8 % from 90 % on"
    epochs = evidence.subject.epochs
    if reached >= attainable - (0.08 if reached >= 0.9 and epochs >= SHORT else 0.05):
        return Seen(values, rule)
    text = (
        f"The network reaches {reached:.2f} on its training examples; nearest neighbours or ridge regression reach "
        f"{attainable:.2f} on examples that they have not seen."
    )
    remedies = []
    params = params_of(evidence.run.last)
    matrices = [leaf for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) >= 2]
    if len(matrices) <= 1:
        remedies.append("add a hidden layer: the network is linear")
    if epochs < 3:
        text += f" It saw each example {epochs:.2g} times."
        remedies.append("train for more epochs")
    strength = 0.9 if epochs < SHORT else 0.55 + 0.25 * bool(len(matrices) <= 1)
    return Seen(values, rule, [found("underfitting", text, values, strength=strength, remedies=remedies)])


@check("reconstructions differ from example to example")
def reconstruction(evidence: Evidence) -> Seen:
    """Whether a network that reconstructs its inputs knows more of them than their mean."""
    facts = facts_of(evidence)
    outputs, targets = facts.outputs.train, facts.outputs.train_targets
    if not same_shape_as_inputs(facts) or not hasattr(targets, "shape") or outputs.shape != np.shape(targets):
        raise Unknown("the network does not reconstruct its inputs")
    wanted, made = (np.asarray(each, np.float64).reshape(len(outputs), -1) for each in (targets, outputs))
    total = np.sum((wanted - wanted.mean(0)) ** 2)
    largest = float(np.linalg.svd(wanted - wanted.mean(0), compute_uv=False)[0] ** 2 / max(total, 1e-30))
    spread = float(np.sum((made - made.mean(0)) ** 2) / max(total, 1e-30))
    values = {
        "explained": facts.reached,
        "by one direction": largest,
        "variance of the outputs / of the inputs": spread,
    }
    rule = "the outputs have 10 % of the inputs' variance, or explain half of what one direction does"
    if not spread < 0.1 or not facts.reached < 0.5 * largest:
        return Seen(values, rule)
    text = (
        f"The reconstructions of different examples are nearly the same: they have {spread:.1%} of the inputs' "
        f"variance and explain {max(facts.reached, 0):.0%} of it; a single direction explains {largest:.0%}."
    )
    if not evidence.program.of_kind("random"):
        return Seen(values, rule, [found("underfitting", text, values, strength=0.7, where="code")])
    remedy = "weigh the prior (KL) term less, or sum the error of an example over its outputs instead of averaging it"
    finding = found("excessive_regularisation", text, values, strength=0.85, where="code", remedies=[remedy])
    return Seen(values, rule, [finding])


@check("held-out examples are nearly as good")
def generalises(evidence: Evidence) -> Seen:
    """The gap between training and validation, and whether validation gets worse."""
    facts = facts_of(evidence)
    on_train, on_validation = facts.reached, facts.reached_on_validation
    if facts.is_classes and facts.ranks_only:
        on_train, on_validation = facts.fairly_reached, facts.fairly_reached_on_validation
    gap = on_train - on_validation
    values: dict[str, Any] = {"on training": on_train, "on validation": on_validation}
    rule = "gap at most 15 % (values: 35 %), or 8 % with a validation loss above 1.3 times its minimum; or no harm"
    validation_curve = evidence.history.validation_loss
    worse, known = 1.0, bool(np.all(np.isfinite(validation_curve)))
    if known and validation_curve.min() > 0:
        worse = float(validation_curve[-1] / validation_curve.min())
        values["last validation loss / smallest"] = worse
    elif known:  # a likelihood, which has no zero
        fall = validation_curve[0] - validation_curve.min()
        worse = 1 + float((validation_curve[-1] - validation_curve.min()) / max(fall, 1e-9))
        values["1 + rise of the validation loss / its fall"] = worse
    large, some_gap = (0.35, 0.2) if facts.data.kind == "values" else (0.15, 0.08)
    good = 0.7 if large == 0.15 else 0.6
    memorised = gap > large or (gap > some_gap and worse > 1.3)
    if on_train < good or not memorised:
        return Seen(values, rule)
    if known and worse < 1.1 and gap < 2 * large and facts.behind_on_validation < 0.02:  # nothing better is known
        return Seen(values, rule)
    text = f"The network reaches {on_train:.2f} on training examples, and {on_validation:.2f} on validation"
    step = None
    if worse > 1.1:
        step = int(evidence.run.at[int(np.argmin(validation_curve))])
        text += f"; the validation loss was smallest about step {step} and is {worse:.2f} times that at the end"
    strength = 0.6 + 0.15 * (worse > 1.3) + 0.1 * (gap > 2 * large)
    return Seen(values, rule, [found("overfitting", text + ".", values, strength=strength, step=step)])


@check("noise in training does not drown the signal")
def training_noise(evidence: Evidence) -> Seen:
    """The spread of the outputs over keys (dropout, noise) beside that over examples."""
    facts, subject = facts_of(evidence), evidence.subject
    if subject.key_mode == "never":
        raise Unknown("predict takes no key")
    inputs, _ = some((subject.inputs, subject.targets))
    one, other = (facts.evaluate(inputs, jax.random.key(seed)).astype(np.float64) for seed in (1, 2))
    noise = float(np.mean((one - other) ** 2) / 2)
    signal = float(np.mean(np.var(facts.outputs.train.astype(np.float64), axis=0)))
    ratio = noise / (signal + 1e-12)
    values = {"variance over keys / over examples": ratio}
    rule = "at most 2, or the network fits"
    if not np.isfinite(ratio) or ratio < 2 or not facts.short_of(0.03):
        return Seen(values, rule)
    text = (
        f"In training the outputs vary {ratio:.1f} times as much from key to key as between examples, and the network "
        f"reaches {facts.reached:.2f} on training examples (simple predictors {facts.attainable:.2f})."
    )
    return Seen(values, rule, [found("excessive_regularisation", text, values, strength=0.88, where="dropout")])


@check("augmented examples keep their labels")
def augmentation(evidence: Evidence) -> Seen:
    """Whether the loss of examples as the run augments them is far above that of the examples themselves.

    An augmentation inside of ``loss_fn`` shows as a loss that depends on the key although ``predict`` takes none, or
    more than ``predict`` explains.
    """
    facts, subject = facts_of(evidence), evidence.subject
    if not facts.is_classes:
        return augmented_values(evidence)
    inputs, targets = some((subject.inputs, subject.targets), 256)
    keys = jax.random.split(jax.random.key(11), 8)
    losses = np.array([facts.loss(inputs, targets, key) for key in keys])
    spread = float(losses.std())
    clean, accuracy = plain_loss(facts, inputs, targets, keys if subject.key_mode != "never" else None)
    values = {"loss in training": losses.mean(), "deviation over keys": spread, "loss of the examples": clean}
    values["accuracy"] = accuracy
    rule = "at most 0.25 above the loss of the examples as they are, and not worse than simple predictors"
    gap = float(losses.mean() - clean)
    if not np.isfinite(gap) or spread < 1e-4 * abs(losses.mean()):
        return Seen(values, rule)
    behind = facts.shortfall
    values["below simple predictors"] = behind
    if gap > max(0.25, 0.8 * clean) and (behind > 0.01 or facts.reached < 0.9):
        text = (
            f"The loss of training examples as the run changes them is {losses.mean():.2f}, and {clean:.2f} as they "
            "are: the network knows the examples, but not the changed ones."
        )
        strength = 0.8 if behind > 0.01 else 0.55
    elif ((gap > 0.3 * clean and behind > 0.03) or behind > 0.1) and facts.reached > 0.5 and changes_inputs(evidence):
        text = (
            f"The loss changes examples at random, and with them the network is {behind:.2f} worse than nearest "
            "neighbours or ridge regression on the examples as they are."
        )
        strength = 0.7
    else:
        return Seen(values, rule)
    return Seen(values, rule, [found("augmentation_breaks_labels", text, values, strength=strength, where="loss_fn")])


def augmented_values(evidence: Evidence) -> Seen:
    """The same for numbers: a run that changes its inputs and explains far less than simple predictors do."""
    facts = facts_of(evidence)
    if facts.data.kind != "values" or not changes_inputs(evidence):
        raise Unknown("the targets are neither classes, nor numbers for inputs that change at random")
    reached, attainable = facts.reached, facts.attainable
    values = {"reached": reached, "simple predictors on the examples as they are": attainable}
    rule = "not over 0.15 below simple predictors"
    if not 0.1 < reached < attainable - 0.15:  # below 0.1, the outputs are no predictions of the targets
        return Seen(values, rule)
    if evidence.subject.key_mode != "never":  # predict has the noise, too, in training mode: dropout
        text = f"With the noise of training the network explains {reached:.0%} of the targets, simple predictors "
        text += f"explain {attainable:.0%}: dropout, also on the inputs, hides what matters."
        finding = found("excessive_regularisation", text, values, strength=0.75, where="dropout")
        return Seen(values, rule, [finding])
    text = (
        f"The loss changes the inputs at random, and the network explains {reached:.0%} of the targets; simple "
        f"predictors explain {attainable:.0%} for the inputs as they are."
    )
    return Seen(values, rule, [found("augmentation_breaks_labels", text, values, strength=0.75, where="loss_fn")])


def changes_inputs(evidence: Evidence) -> bool:
    """Whether the loss draws random numbers before the first product with weights: for inputs, not for dropout."""
    facts = [*evidence.program.of_kind("random"), *evidence.program.of_kind("product")]
    first = min(facts, key=lambda fact: fact.at, default=None)
    return first is not None and first.kind == "random"


def plain_loss(facts: Facts, inputs: Any, targets: Any, keys: Any) -> tuple[float, float]:
    """The cross-entropy of ``predict``'s outputs, in training mode if it takes a key, and their accuracy."""
    labels = np.asarray(targets)
    labels = np.argmax(labels, -1) if labels.ndim == 2 and labels.shape[1] > 1 else labels.reshape(-1).astype(int)
    losses, accuracies = [], []
    for key in [None] if keys is None else keys[:4]:
        outputs = facts.evaluate(inputs, key).astype(np.float64)
        if outputs.ndim != 2 or outputs.shape[1] < 2 or labels.max() >= outputs.shape[1] or labels.min() < 0:
            raise Unknown("the outputs are not logits of the classes")
        losses.append(-np.mean(log_softmax(outputs, 1)[np.arange(len(labels)), labels]))
        accuracies.append(quality(outputs, labels, "classes"))
    return float(np.mean(losses)), float(np.mean(accuracies))


@check("what is learned shows in the run's metric")
def shown(evidence: Evidence) -> Seen:
    """A loss of almost nothing on examples that are new to the network, beside a metric that hardly moves."""
    subject, loss = evidence.subject, evidence.run.loss
    if subject.predict is not None:
        raise Unknown("predict shows what is learned")
    metrics = evidence.metrics
    if subject.mode != "max" or not np.isfinite(metrics).all() or metrics.min() < 0 or metrics.max() > 1:
        raise Unknown("the run has no metric between 0 and 1 of which more is better")
    new = min(len(loss), subject.train.batches.epoch_steps or len(loss))
    left = float(np.mean(loss[int(0.9 * new) : new]) / loss[0]) if loss[0] > 0 else np.nan
    values = {"loss of new examples / first": left, "first metric": float(metrics[0]), "best": float(metrics.max())}
    rule = "a metric above 0.6, or one that rose by 0.25, or a loss of new examples above 20 % of the first"
    if not left < 0.2 or metrics.max() > min(0.6, float(metrics[0]) + 0.25):
        return Seen(values, rule)
    text = (
        f"The loss of examples that are new to the network falls to {left:.1%} of the first loss, but "
        f"{subject.metric} only from {metrics[0]:.2g} to {metrics.max():.2g} at best: training sees the answer."
    )
    return Seen(values, rule, [found("target_leak", text, values, strength=0.8, where="inputs")])


CHECKS: tuple[NamedCheck, ...] = (fitted, reconstruction, generalises, training_noise, augmentation, shown)
