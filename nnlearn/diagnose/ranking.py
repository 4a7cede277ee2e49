"""Which finding is the cause: findings that another one explains come after it."""

from collections.abc import Iterable

from nnlearn.diagnose.report import Finding

# Cause -> symptoms that it explains: a symptom is weakened, and comes after its cause.
EXPLAINS: dict[str, tuple[str, ...]] = {
    "sign_error": ("*",),
    "symmetric_initialisation": ("*",),
    "frozen_parameters": ("underfitting", "learning_rate_too_low", "vanishing_gradients", "dead_units"),
    "blocked_gradient": ("frozen_parameters", "underfitting", "learning_rate_too_low", "vanishing_gradients"),
    "numerical_precision": ("learning_rate_too_high", "exploding_gradients", "learning_rate_too_low"),
    "unnormalised_inputs": (
        "learning_rate_too_high",
        "learning_rate_too_low",
        "exploding_gradients",
        "vanishing_gradients",
        "saturated_activations",
        "dead_units",
        "bad_initialisation",
        "underfitting",
        "clipping_too_tight",
    ),
    "unnormalised_targets": (
        "learning_rate_too_high",
        "learning_rate_too_low",
        "exploding_gradients",
        "dead_units",
        "underfitting",
        "clipping_too_tight",
    ),
    "bad_initialisation": (
        "learning_rate_too_high",
        "learning_rate_too_low",
        "exploding_gradients",
        "vanishing_gradients",
        "saturated_activations",
        "dead_units",
        "underfitting",
    ),
    "exploding_gradients": ("learning_rate_too_high",),
    "vanishing_gradients": ("learning_rate_too_low", "saturated_activations", "underfitting"),
    "saturated_activations": ("vanishing_gradients", "learning_rate_too_low", "underfitting"),
    "learning_rate_too_high": ("dead_units", "exploding_gradients", "underfitting", "saturated_activations"),
    "learning_rate_too_low": ("underfitting",),
    "schedule_mistimed": ("learning_rate_too_low", "learning_rate_too_high", "underfitting"),
    "clipping_too_tight": ("learning_rate_too_low", "underfitting"),
    "gradient_accumulation": ("learning_rate_too_high", "learning_rate_too_low", "exploding_gradients"),
    "optimizer_state_reset": ("learning_rate_too_low", "learning_rate_too_high", "underfitting"),
    "excessive_regularisation": ("underfitting", "learning_rate_too_low", "vanishing_gradients", "dead_units"),
    "wrong_axis_or_reduction": (
        "loss_output_mismatch",
        "misaligned_labels",
        "underfitting",
        "learning_rate_too_low",
        "learning_rate_too_high",
    ),
    "loss_output_mismatch": ("underfitting", "learning_rate_too_low", "learning_rate_too_high", "vanishing_gradients"),
    "dead_units": ("unnormalised_targets", "learning_rate_too_low"),
    "label_encoding": (
        "misaligned_labels",
        "label_noise",
        "preprocessing_mismatch",
        "underfitting",
        "overfitting",
        "numerical_precision",
    ),
    "misaligned_labels": (
        "preprocessing_mismatch",
        "label_noise",
        "underfitting",
        "overfitting",
        "learning_rate_too_low",
    ),
    "label_noise": ("overfitting", "underfitting"),
    "class_imbalance": ("underfitting", "learning_rate_too_low"),
    "unshuffled_data": ("learning_rate_too_high", "underfitting", "batch_too_small"),
    "augmentation_breaks_labels": ("label_noise", "underfitting", "misaligned_labels"),
    "preprocessing_mismatch": ("overfitting", "label_encoding"),
    "target_leak": ("overfitting",),
    "mask_ignored": ("underfitting", "overfitting"),
    "batch_too_small": ("learning_rate_too_high", "underfitting"),
    "evaluation_in_training_mode": ("underfitting", "overfitting"),
}
WEAKENED = 0.6  # the strength of an explained finding, relative to its own
LEAST = 0.35  # findings below this strength are left out


def rank(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """One finding per name, the most likely cause first.

    A finding that another, at least about as strong, explains is weakened. What remains below ``LEAST`` is left out.

    >>> from nnlearn.diagnose.report import found
    >>> both = [found("learning_rate_too_high", "seen"), found("unnormalised_inputs", "seen")]
    >>> [each.name for each in rank(both)]
    ['unnormalised_inputs', 'learning_rate_too_high']
    """
    strongest: dict[str, Finding] = {}
    for each in findings:
        if each.name not in strongest or each.strength > strongest[each.name].strength:
            strongest[each.name] = each

    def score(each: Finding) -> float:
        value = each.strength
        for other in strongest.values():
            mutual = explains(each.name, other.name) and other.strength <= each.strength
            strong = other.strength >= each.strength * WEAKENED
            if other is not each and explains(other.name, each.name) and strong and not mutual:
                value = min(value, WEAKENED * each.strength, other.strength - 1e-3)
        return value

    scores = {name: score(each) for name, each in strongest.items()}
    kept = [each for each in strongest.values() if scores[each.name] >= LEAST]
    return tuple(sorted(kept, key=lambda each: -scores[each.name]))


def explains(cause: str, symptom: str) -> bool:
    """Whether one finding explains another."""
    symptoms = EXPLAINS.get(cause, ())
    return symptom in symptoms or "*" in symptoms


__all__ = ["EXPLAINS", "explains", "rank"]
