"""Checks of the fit: underfitting, overfitting, and classes that are never predicted."""

import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.report import found
from nnlearn.diagnose.subject import Unknown
from nnlearn.programs.kinds import RECTIFIED, SMOOTH, SQUASHING


@check("training and validation agree")
def overfitting(evidence: Evidence) -> Seen:
    history = evidence.history
    if history.validation is None:
        raise Unknown("no validation data or no predict were given")
    train, validation = history.train_scores, history.validation_scores
    loss = history.validation_loss
    gap = float(train[-1] - validation[-1])
    rise = float(loss[-1] / np.nanmin(loss)) if np.isfinite(loss[-1]) and np.nanmin(loss) > 0 else np.nan
    values = {"train": float(train[-1]), "validation": float(validation[-1]), "gap": gap, "loss / best loss": rise}
    values["best validation"] = float(np.nanmax(validation))
    rule = "the scores differ by less than 0.1, or the validation loss stays within 1.3 times its best"
    if not (gap > 0.1 and rise > 1.3):
        return Seen(values, rule)
    best = int(evidence.run.at[int(np.nanargmin(loss))])
    text = (
        f"The score is {train[-1]:.2f} on training and {validation[-1]:.2f} on validation examples, and the validation "
        f"loss is {rise:.1f} times that of step {best}."
    )
    return Seen(values, rule, [found("overfitting", text, values, strength=0.75, step=best)])


@check("every class is predicted")
def imbalance(evidence: Evidence) -> Seen:
    history, data = evidence.history, evidence.data
    if data.labels is None or history.train is None:
        raise Unknown("the targets are no classes, or no predict was given")
    _, counts = np.unique(data.labels, return_counts=True)
    share = float(counts.max() / counts.sum())
    said = predicted_classes(history.train[-1])
    if said is None:
        raise Unknown("the outputs are no scores of classes")
    one = float(np.mean(said == np.bincount(said.astype(int)).argmax())) if len(said) else 0.0
    values = {"largest class": share, "most predicted": one, "score": evidence.score}
    rule = "no class is more than 80 % of the examples while the others are not predicted"
    labels = np.asarray(history.train_targets).reshape(len(said), -1)
    labels = labels[:, 0] if labels.shape[1] == 1 else labels.argmax(1)
    major = np.bincount(labels.astype(int) - int(labels.min())).argmax() + int(labels.min())
    rare = labels != major
    recall = float(np.mean(said[rare] == labels[rare])) if np.any(rare) else np.nan
    values["recall of the others"] = recall
    if share < 0.8 or not recall < 0.3:
        return Seen(values, rule)
    text = f"{share:.0%} of the examples are of one class; of the others {recall:.0%} are recognised."
    return Seen(values, rule, [found("class_imbalance", text, values, strength=0.85)])


def predicted_classes(outputs: np.ndarray) -> np.ndarray | None:
    """The class of each example that outputs of shape (n, classes), (n, 1) or (n,) predict; None for others."""
    outputs = np.asarray(outputs, np.float64)
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return outputs.argmax(1)
    if outputs.size == len(outputs):
        flat = outputs.reshape(-1)
        limit = 0.5 if np.all((flat >= 0) & (flat <= 1)) else 0.0
        return (flat > limit).astype(int)
    return None


@check("the network can fit the training examples")
def underfitting(evidence: Evidence) -> Seen:
    score, last, first = evidence.score, evidence.last_loss, evidence.first_loss
    kinds = RECTIFIED | SMOOTH | set(SQUASHING)
    nonlinear = len([each for each in evidence.activations if each.kind in kinds and not each.is_output])
    losses = evidence.run.loss
    tenth = max(len(losses) // 10, 1)
    slope = float(np.mean(losses[-2 * tenth : -tenth]) - np.mean(losses[-tenth:]))
    values = {
        "score": score,
        "loss at the end / start": last / first if first else np.nan,
        "nonlinear layers": nonlinear,
    }
    values["still falling"] = slope / max(abs(first - last), 1e-9)
    rule = "training examples are fitted to 0.7, by a network with a hidden layer"
    if not score < 0.7:
        return Seen(values, rule)
    strength = 0.6 if nonlinear else 0.85
    text = f"After {len(losses)} steps the score on training examples is {score:.2f}."
    if not nonlinear:
        text += " The network has no nonlinear layer."
    elif values["still falling"] > 0.05:
        text += f" The loss still falls: by {values['still falling']:.0%} of its decrease in the last tenth."
    return Seen(values, rule, [found("underfitting", text, values, strength=strength)])


CHECKS: tuple[NamedCheck, ...] = (overfitting, imbalance, underfitting)
