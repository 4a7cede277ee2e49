"""Overlap losses against plain formulas and optax, with masks, and their error messages."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loss_checks import check_masks_and_dtypes, check_number, check_reference, total

from nnlearn.losses.overlap import (
    binary_dice_loss,
    dice_loss,
    iou_loss,
    multiclass_generalized_dice_loss,
    tversky_loss,
)

RNG = np.random.default_rng(0)
LOGITS = 2 * RNG.normal(size=(4, 5, 3))
CLASSES = RNG.integers(0, 3, (4, 5))
TARGETS = np.eye(3)[CLASSES]
BINARY = (CLASSES == 0).astype(float)
WEIGHTS = np.array([0.5, 1.0, 2.0])


def plain(
    predictions, targets, *, class_weights=None, smooth=1.0, alpha=0.5, beta=0.5, apply_softmax=True,
    reduction="mean", ignore_background=False, axis=None, gamma=1.0,
):  # fmt: skip
    """The loss as published."""
    if apply_softmax and predictions.shape[-1] == 1:
        predictions = 1 / (1 + np.exp(-predictions))
    elif apply_softmax:
        predictions = np.exp(predictions) / np.exp(predictions).sum(-1, keepdims=True)
    axes = tuple(range(1, predictions.ndim - 1)) if axis is None else axis
    common = (predictions * targets).sum(axes)
    fraction = (common + smooth) / (
        common + alpha * (predictions.sum(axes) - common) + beta * (targets.sum(axes) - common) + smooth
    )
    loss = (1 - fraction) ** (1 / gamma) * (1 if class_weights is None else class_weights)
    loss = loss[..., int(ignore_background) :]
    return loss if reduction == "none" else getattr(np, reduction)(loss, -1)


def plain_generalized(predictions, targets, *, smooth=1.0, ignore_background=False):
    weights = 1 / targets.sum(tuple(range(targets.ndim - 1))) ** 2
    weights = weights / weights.mean()
    return plain(
        predictions,
        targets,
        smooth=smooth,
        class_weights=weights,
        reduction="none",
        ignore_background=ignore_background,
    ).mean()


def plain_binary(predictions, targets, **options):
    return plain(predictions[..., None], targets[..., None], **options)


CASES = {
    "dice": (dice_loss, plain, (LOGITS, TARGETS), {}),
    "dice-options": (
        dice_loss,
        plain,
        (LOGITS, TARGETS),
        {"class_weights": WEIGHTS, "smooth": 0.1, "alpha": 0.3, "beta": 0.9, "reduction": "sum", "axis": (0, 1)},
    ),
    "dice-none": (dice_loss, plain, (LOGITS, TARGETS), {"reduction": "none", "ignore_background": True}),
    "dice-binary": (dice_loss, plain, (LOGITS[..., :1], TARGETS[..., :1]), {"smooth": 0.0}),
    "generalized": (multiclass_generalized_dice_loss, plain_generalized, (LOGITS, TARGETS), {"smooth": 0.5}),
    "binary": (binary_dice_loss, plain_binary, (LOGITS[..., 0], BINARY), {}),
    "tversky": (
        tversky_loss,
        functools.partial(plain, alpha=0.3, beta=0.7),
        (LOGITS, TARGETS),
        {"gamma": 4 / 3, "ignore_background": True},
    ),
    "iou": (iou_loss, functools.partial(plain, alpha=1, beta=1), (LOGITS, TARGETS), {"smooth": 0.0}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_equal_those_of_a_plain_reference(case):
    check_reference(*case, differentiate=(0,))


@pytest.mark.parametrize("name", ["dice", "generalized", "binary", "tversky"])
def test_masks_and_dtypes(name):
    function, reference, arrays, options = CASES[name]
    arrays = (arrays[0], arrays[1].astype(int))  # of another dtype, so that only the predictions are differentiated
    check_masks_and_dtypes(example_masks(function), reference, arrays, options)


def example_masks(function):
    """The function with a mask over images in place of pixels."""

    def masked(predictions, targets, where=None, **options):
        pixels = None if where is None else jnp.broadcast_to(where[:, None], predictions.shape[:2])
        return function(predictions, targets, where=pixels, **options)

    return masked


# Against optax -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [dice_loss, multiclass_generalized_dice_loss, binary_dice_loss])
def test_signatures_start_like_those_of_optax(ours):
    theirs = getattr(optax.losses, ours.__name__)
    ours, theirs = (list(inspect.signature(function).parameters.values()) for function in (ours, theirs))
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]


def test_values_and_gradients_equal_those_of_optax():
    options = CASES["dice-options"][3] | {"axis": 1, "ignore_background": True, "class_weights": jnp.asarray(WEIGHTS)}
    cases = [
        (dice_loss, LOGITS, TARGETS, {}),
        (dice_loss, LOGITS, TARGETS, options),
        (dice_loss, LOGITS[..., :1], BINARY, {}),
        (multiclass_generalized_dice_loss, LOGITS, TARGETS, {"ignore_background": True}),
        (binary_dice_loss, LOGITS[..., 1], BINARY, {"smooth": 0.2}),
        (binary_dice_loss, LOGITS[..., :1], BINARY[..., None], {}),
    ]

    def both(inputs):
        return [
            [
                jax.grad(functools.partial(total, function), has_aux=True)(x, jnp.asarray(targets), **options)
                for function in (ours, getattr(optax.losses, ours.__name__))
            ]
            for x, (ours, _, targets, options) in zip(inputs, cases, strict=True)
        ]

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        for ours, theirs in jax.jit(both)([case[1] for case in cases]):
            for mine, yours in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(mine, yours, rtol=1e-6, atol=1e-9)  # optax adds 1e-7 to squared counts


def test_probabilities_where_optax_cannot_take_them():
    """Under jit, the check of their sum in optax fails on a tracer, and a single probability does not sum to 1."""
    probabilities = 1 / (1 + np.exp(-LOGITS[..., 0]))
    expected = plain_binary(LOGITS[..., 0], BINARY)
    np.testing.assert_allclose(binary_dice_loss(probabilities, BINARY, apply_sigmoid=False), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="sum to 1"):
        optax.losses.binary_dice_loss(probabilities, BINARY, apply_sigmoid=False)
    softmax = np.asarray(jax.nn.softmax(LOGITS, -1))
    run = jax.jit(functools.partial(dice_loss, apply_softmax=False))
    np.testing.assert_allclose(run(softmax, TARGETS), plain(LOGITS, TARGETS), rtol=1e-5)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(functools.partial(optax.losses.dice_loss, apply_softmax=False))(softmax, TARGETS)


def test_a_class_without_pixels_does_not_dominate_as_in_optax():
    """optax gives such a class the weight ``1 / 1e-7``, which outweighs all wrong pixels."""
    targets = np.eye(3)[CLASSES % 2]
    wrong = np.float32(20 * targets[..., [1, 0, 2]] - 20 * np.array([0, 0, 1]))
    with jax.numpy_rank_promotion("allow"):
        assert optax.losses.multiclass_generalized_dice_loss(wrong, targets) < 1e-5
    assert jax.jit(multiclass_generalized_dice_loss)(wrong, targets) > 0.3


def test_an_empty_image_without_smoothing_is_right_where_optax_gives_nan():
    logits, targets = jnp.full((1, 4), -200.0), jnp.zeros((1, 4))
    value, grad = jax.jit(jax.value_and_grad(lambda x: binary_dice_loss(x, targets, smooth=0.0)[0]))(logits)
    assert value == 0 and not grad.any()
    assert np.isnan(optax.losses.binary_dice_loss(logits, targets, smooth=0.0)).all()


# Edges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_extreme_logits(smooth):
    signs = np.float32(2 * TARGETS - 1)

    def everything(logits):
        losses = (
            dice_loss(logits, TARGETS, smooth=smooth).sum(),
            binary_dice_loss(logits[..., 0], BINARY, smooth=smooth).sum(),
            tversky_loss(logits, TARGETS, smooth=smooth, gamma=2.0).sum(),
            iou_loss(logits, TARGETS, smooth=smooth).sum(),
            multiclass_generalized_dice_loss(logits, TARGETS, smooth=smooth),
        )
        return sum(losses), jnp.stack(losses)

    run = jax.jit(jax.grad(everything, has_aux=True))
    for size in (1e4, -1e4, 1e30):
        grad, values = run(size * signs)
        assert np.isfinite(values).all() and np.isfinite(grad).all()
        assert not values.any() if size > 0 else (values > 0.1).all()


def test_small_losses_are_accurate():
    """In float32, one minus a fraction near 1 has no correct digits."""
    logits = np.float32([[14, 15, -16]])
    found = jax.jit(functools.partial(binary_dice_loss, smooth=0.0))(logits, np.float32([[1, 1, 0]]))
    q = 1 / (1 + np.exp(np.float64([14, 15, 16])))
    np.testing.assert_allclose(found, 0.5 * q.sum() / (2 - q[:2].sum() + 0.5 * q.sum()), rtol=1e-5)


def test_masks_remove_pixels_or_classes():
    pixels = np.array([True, False, True, True, False])
    where = np.broadcast_to(pixels, (4, 5))
    spoiled = np.where(where[..., None], LOGITS, np.nan)
    run = jax.jit(lambda x, where: (dice_loss(x, TARGETS, where=where), iou_loss(x, TARGETS, where=where)))
    for found, options in zip(run(spoiled, where), ({}, {"alpha": 1, "beta": 1}), strict=True):
        np.testing.assert_allclose(found, plain(LOGITS[:, pixels], TARGETS[:, pixels], **options), rtol=1e-5)
    two = np.broadcast_to([True, True, False], (4, 5, 3))
    found = jax.jit(functools.partial(dice_loss, reduction="none", where=two))(LOGITS, TARGETS)
    expected = plain(np.where(two, LOGITS, -1e9), np.where(two, TARGETS, 0), reduction="none")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


NUMBERS = {
    "smooth": (lambda v: dice_loss(LOGITS, TARGETS, smooth=v), [0.0, 1.0, 5.0]),
    "alpha": (lambda v: dice_loss(LOGITS, TARGETS, alpha=v), [0.0, 0.5, 1.0]),
    "beta": (lambda v: tversky_loss(LOGITS, TARGETS, beta=v), [0.0, 0.5, 1.0]),
    "gamma": (lambda v: tversky_loss(LOGITS, TARGETS, gamma=v), [0.5, 1.3, 3.0]),
    "generalized": (lambda v: multiclass_generalized_dice_loss(LOGITS, TARGETS, smooth=v), [0.0, 1.0, 5.0]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_may_be_traced(name):
    check_number(*NUMBERS[name])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dice_loss(LOGITS, CLASSES), r"predictions \(4, 5, 3\) and targets \(4, 5, 1\) must have one shape"),
        (lambda: dice_loss(LOGITS, TARGETS, smooth=-1.0), "smooth must be in"),
        (lambda: dice_loss(LOGITS, TARGETS, alpha=-1.0), "alpha must be in"),
        (lambda: tversky_loss(LOGITS, TARGETS, gamma=0.0), "gamma must be in"),
        (lambda: dice_loss(LOGITS, TARGETS, reduction="avg"), 'reduction must be "mean", "sum" or "none", got'),
        (lambda: dice_loss(LOGITS, TARGETS, class_weights=np.ones(2)), r"class_weights must have shape \(3,\)"),
        (lambda: dice_loss(LOGITS, TARGETS, class_weights=-WEIGHTS), "class_weights must be >= 0"),
        (lambda: dice_loss(LOGITS, TARGETS, axis=2), "axis 2 names the last axis"),
        (lambda: dice_loss(LOGITS, TARGETS, axis=3), "axis 3 is out of bounds"),
        (
            lambda: dice_loss(LOGITS, TARGETS, apply_softmax=False),
            r"predictions must be probabilities in \[0, 1\], got",
        ),
        (lambda: dice_loss(LOGITS, TARGETS, where=np.ones(5, bool)), "where must have shape"),
        (lambda: multiclass_generalized_dice_loss(LOGITS[0, 0], TARGETS[0, 0]), "predictions must have shape"),
        (lambda: iou_loss(np.float32(1), 1), "predictions must have a class axis"),
    ],
)
def test_wrong_values_and_shapes_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="predictions must be of floating dtype"):
        dice_loss(CLASSES, TARGETS)
    with pytest.raises(TypeError, match="where must be boolean"):
        dice_loss(LOGITS, TARGETS, where=CLASSES)
