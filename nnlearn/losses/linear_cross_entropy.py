"""Cross-entropy of a language model's last layer, without storing its logits."""

import functools
import math

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_nonnegative, check_number
from nnlearn.losses.arguments import as_boolean, as_floating, as_weights, check_reduction, is_off
from nnlearn.losses.linear_softmax import Arrays, AxisName, Gradients, Head, Plan, Terms, evaluate
from nnlearn.losses.softmax import as_labels, check_label_shape, split_labels
from nnlearn.sharding.axes import automatic_axes
from nnlearn.tree import as_hyperparam, compute_dtype, safe_divide, widest
from nnlearn.types import ArrayLike, Scalar

CHUNKS = 13  # the logits of one chunk are then 8% of all, which leaves memory for other arrays
FEWEST_TOKENS = 128  # in a chunk: with fewer, accumulating the weight's gradient costs as much as computing it
ROWS, COLUMNS = 16, 2048  # on a CPU, so that arrays read several times stay in the cache
LOGITS_SHARE = 0.5  # on an accelerator: a chunk's logits relative to the weight's gradient, in memory
NOTHING_WANTED = Head(False, False, False, False, False)


@automatic_axes(like="hidden")
def linear_cross_entropy(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    softcap: Scalar | None = None,
    class_weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: str = "mean",
    transposed: bool = False,
    chunk: int | None = None,
    axis_name: AxisName = None,
) -> jax.Array:
    """Fused linear layer and cross-entropy, for a language model's head, without storing all logits.

    Value and gradients, also with respect to the options, equal those of ``cross_entropy(logits, labels, ...)`` with
    ``logits = hidden @ weight + bias``, or with ``logits = softcap * tanh((hidden @ weight + bias) / softcap)``. Tokens
    are processed in chunks. The gradient of the mean or the sum is computed along with the value, in three matrix
    products; that of ``"none"`` takes a fourth. Forward mode (``jax.jvp``) raises. Products of bfloat16, and the
    gradient over the chunks, are accumulated in float32.

    Args:
      hidden: inputs of the last layer, floating-point, shape ``[..., width]``.
      weight: floating-point, shape ``[width, classes]``, or ``[classes, width]`` if ``transposed``.
      labels: integers in [0, classes), shape ``[...]``. A label outside this range makes the result NaN, unless
        ``where`` leaves it out: ``where=labels != -100``.
      bias: floating-point, shape ``[classes]``; None for none. A bias of -inf removes a class.
      label_smoothing: the share of each label that is spread evenly over the classes, in [0, 1].
      z_loss: coefficient, >= 0, of a penalty on the squared log-normaliser of the logits; 1e-4 is common.
      softcap: the bound of the logits, > 0; None for none.
      class_weights: real and >= 0, shape ``[classes]``, 1 by default.
      where: booleans of the labels' shape: which tokens count. The others have loss 0 and no gradient, even if they are
        NaN.
      reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one loss per token.
      transposed: whether ``weight`` is ``[classes, width]``, as an embedding table shared with the last layer is.
      chunk: number of tokens whose logits are computed at a time (a few more to fill blocks). Fewer take less memory
        and more time. None takes a 13th of all tokens, at least 128, so that temporaries have a tenth of the logits'
        size; on an accelerator at least half of ``width``.
      axis_name: the mapped axis, or axes, over which devices divide the classes: ``weight``, ``bias`` and
        ``class_weights`` are then this device's part, of equal length on all, and labels count through all parts.

    Returns:
      A scalar in nats, or shape ``[...]`` for ``"none"``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes do not match, an option is out of range, or ``reduction`` is unknown.
      TypeError: if hidden, weight or bias are not floating-point, the labels are not integers, or ``where`` is not
        boolean.

    Source: Hsu et al., *Liger Kernel: efficient Triton kernels for LLM training*, 2024, section 3.2 (gradients along
    with the value, chunk by chunk); Wijmans et al., *Cut your losses in large-vocabulary language models*, 2024;
    ``softcap``: Gemma Team, *Gemma 2*, 2024, section 2.

    >>> hidden, weight = jnp.eye(2), jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5]]))
    >>> linear_cross_entropy(hidden, weight, jnp.array([0, 1]))
    Array(0.4581, dtype=float32)
    """
    check_reduction(reduction)
    labels, classes_axis = as_labels(labels), 0 if transposed else 1
    head, dtype = _as_head(hidden, weight, bias, softcap, class_weights, classes_axis)
    shape = jnp.shape(hidden)
    check_label_shape(labels, shape[:-1], shape, "hidden")
    keep = None if where is None else as_boolean(where)
    if keep is not None:
        if keep.shape != labels.shape:
            raise ValueError(
                f"where must have shape {labels.shape}, one entry per token, got {keep.shape}; to take a class out, "
                "give it a bias of -inf"
            )
        keep = keep.reshape(-1)
    classes = head.weight.shape[classes_axis]
    blocks = _plan_blocks(labels.size, classes, shape[-1], chunk)
    plan = Plan(*blocks, classes_axis, head.weight.dtype, axis_name)
    flat, counts, coefficients = _coefficients(
        labels.reshape(-1), keep, label_smoothing, z_loss, head, classes, dtype, axis_name
    )
    arrays = _vary_alike((head, coefficients, flat, keep), axis_name)
    loss = _compiled_loss(plan, reduction == "none", *arrays)
    loss = loss if axis_name is None else jax.lax.psum(loss, axis_name)
    if reduction == "none":
        return loss.reshape(labels.shape)
    return loss if reduction == "sum" else safe_divide(loss, jnp.sum(counts))


def _as_head(hidden, weight, bias, softcap, class_weights, classes_axis) -> tuple[Arrays, jnp.dtype]:
    """Check the arrays and cast them to the dtype of the products or of the sums; returns the latter too."""
    hidden, weight = as_floating("hidden", hidden), as_floating("weight", weight)
    bias = None if bias is None else as_floating("bias", bias)
    if hidden.ndim == 0 or weight.ndim != 2 or weight.shape[1 - classes_axis] != hidden.shape[-1]:
        order = ("width, classes", "classes, width")[1 - classes_axis]
        cure = "pass transposed=True" if classes_axis == 1 else "leave out transposed=True"
        other = weight.ndim == 2 and hidden.ndim and weight.shape[classes_axis] == hidden.shape[-1]
        raise ValueError(
            f"weight must have shape ({order}) for hidden of shape (..., width), got {weight.shape} and {hidden.shape}"
            + (f"; {cure}, if its axes are the other way round" if other else "")
        )
    classes = weight.shape[classes_axis]
    if classes == 0:
        raise ValueError(f"weight must have one class at least, got shape {weight.shape}")
    if class_weights is not None:
        class_weights = as_weights("class_weights", class_weights)
    for name, array in (("bias", bias), ("class_weights", class_weights)):
        if array is not None and array.shape != (classes,):
            raise ValueError(
                f"{name} must have shape ({classes},) for weight of shape {weight.shape}, got {array.shape}"
            )
    if softcap is not None:
        check_number("softcap", softcap, low=0.0, high=math.inf, low_open=True, high_open=True)
    operand = widest(hidden.dtype, weight.dtype)
    dtype = compute_dtype(operand, operand if bias is None else bias.dtype)
    summed = (None if array is None else jnp.asarray(array).astype(dtype) for array in (bias, softcap, class_weights))
    return Head(hidden.reshape(-1, hidden.shape[-1]).astype(operand), weight.astype(operand), *summed), dtype


def _coefficients(labels, keep, label_smoothing, z_loss, head, classes, dtype, axis_name) -> tuple:
    """Valid labels, the weight of each token in a mean, and the coefficients of the terms of its loss."""
    check_number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    check_nonnegative("z_loss", z_loss)
    label_smoothing, z_loss = as_hyperparam(label_smoothing, dtype), as_hyperparam(z_loss, dtype)
    first = 0
    if axis_name is not None:
        first, classes = classes * jax.lax.axis_index(axis_name), classes * jax.lax.axis_size(axis_name)
    labels, weight = split_labels(labels, classes, dtype, keep)
    if head.class_weights is not None:
        mine = (labels >= first) & (labels < first + len(head.class_weights))
        label_weight = jnp.where(mine, head.class_weights[jnp.where(mine, labels - first, 0)], 0)
        weight = weight * (label_weight if axis_name is None else jax.lax.psum(label_weight, axis_name))
    own, spread = weight, None
    if not is_off(label_smoothing):
        kept = jnp.ones_like(weight) if keep is None else keep.astype(dtype)
        own, spread = (1 - label_smoothing) * weight, label_smoothing / classes * kept
    return labels, weight, Terms(own, spread, None if is_off(z_loss) else z_loss * weight)


def _plan_blocks(tokens: int, classes: int, width: int, chunk: int | None) -> tuple[int, int, int]:
    """Tokens, rows and columns of a plan.

    For each chunk an accelerator reads and writes the whole gradient of the weight, [width, classes]. So a chunk's
    logits, [chunk, classes], may take memory in proportion to it.
    """
    on_cpu = jax.default_backend() == "cpu"
    rows, columns = (ROWS, COLUMNS) if on_cpu else (tokens, classes)
    longest = max(FEWEST_TOKENS, tokens // CHUNKS, 0 if on_cpu else int(LOGITS_SHARE * width))
    if chunk is not None:
        longest = check_count("chunk", chunk)
    length = _equal_part(tokens, longest)
    if chunk is None:  # chunks that divide the tokens need no padded copy of hidden
        length = next((fit for fit in range(longest, longest // 2, -1) if tokens % fit == 0 == fit % ROWS), length)
    rows = max(1, min(rows, length))
    return _round_up(max(1, length), rows), rows, min(classes, _round_up(_equal_part(classes, columns), 16))


def _equal_part(length: int, longest: int) -> int:
    """The length of the fewest equal parts of at most ``longest``; the last part may be shorter."""
    return -(-length // max(1, -(-length // longest)))


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


@functools.partial(jax.jit, static_argnums=(0, 1))  # shard_map does not support a rule with symbolic zeros directly
def _compiled_loss(plan: Plan, per_token: bool, *arrays) -> jax.Array:
    return (_token_losses if per_token else _summed_loss)(plan, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_loss(plan: Plan, head: Arrays, coefficients: Terms, labels: jax.Array, keep: jax.Array | None) -> jax.Array:
    """The sum of the losses of all tokens; its derivative is computed along with it, in one pass.

    Under an ``axis_name`` this is the device's share of the sum. The inputs must vary over that axis, see
    ``_vary_alike``, so that JAX sums the gradients of replicated arrays over the devices.
    """
    return jnp.sum(_token_losses(plan, head, coefficients, labels, keep))


def _summed_loss_forward(plan, head, coefficients, labels, keep):
    head, coefficients, labels, keep, wanted = _split_wanted(head, coefficients, labels, keep)
    terms, grads = evaluate(plan, wanted, head, coefficients, labels, keep)
    terms = terms.map(lambda term: _device_share(plan, term))
    return jnp.sum(terms.dot(coefficients)), (terms, grads)


def _summed_loss_backward(plan, saved, cotangent):
    terms, grads = saved
    return (
        _cast_gradients(plan, _scale_gradients(grads, cotangent)),
        terms.map(lambda term: cotangent * term),
        None,
        None,
    )


_summed_loss.defvjp(_summed_loss_forward, _summed_loss_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(
    plan: Plan, head: Arrays, coefficients: Terms, labels: jax.Array, keep: jax.Array | None
) -> jax.Array:
    """The loss of each token, as ``_summed_loss``.

    The derivative depends on the cotangent of each loss, so it computes the logits a second time.
    """
    terms, _ = evaluate(plan, NOTHING_WANTED, head, coefficients, labels, keep)
    return _device_share(plan, terms.dot(coefficients))


def _token_losses_forward(plan, head, coefficients, labels, keep):
    head, coefficients, labels, keep, wanted = _split_wanted(head, coefficients, labels, keep)
    terms, _ = evaluate(plan, NOTHING_WANTED, head, coefficients, labels, keep)
    shares = terms.map(lambda term: _device_share(plan, term))
    # Residuals must be arrays or tree structure: an empty tuple for True, None for False.
    flags = tuple(() if flag else None for flag in wanted)
    return shares.dot(coefficients), (head, coefficients, labels, keep, shares, flags)


def _token_losses_backward(plan, saved, cotangent):
    head, coefficients, labels, keep, shares, flags = saved
    wanted = Head[bool](*(flag is not None for flag in flags))
    cotangents = coefficients.map(lambda coefficient: cotangent * coefficient)
    _, grads = evaluate(plan, wanted, head, cotangents, labels, keep)
    return _cast_gradients(plan, grads), shares.map(lambda share: cotangent * share), None, None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward, symbolic_zeros=True)


def _vary_alike(tree, axis_name: AxisName):
    """Mark all arrays as varying over every mapped axis over which one of them, or the classes, vary.

    Inside ``jax.shard_map`` the gradient of a replicated array must be summed over the devices. The derivative of this
    function does so, and the derivatives in this file need not.
    """
    leaves, structure = jax.tree.flatten(tree)
    known = [*leaves, *([] if axis_name is None else [jax.lax.axis_index(axis_name)])]
    axes = frozenset().union(*(_varying(leaf) for leaf in known))
    leaves = [jax.lax.pcast(leaf, tuple(sorted(axes - _varying(leaf))), to="varying") for leaf in leaves]
    return structure.unflatten(leaves)


def _varying(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _split_wanted(head, coefficients, labels, keep):
    """The values of the arguments of a rule with symbolic zeros, and which gradients of the head are wanted."""
    wanted = Head[bool](*(leaf is not None and leaf.perturbed for leaf in head))
    return *jax.tree.map(lambda leaf: leaf.value, (head, coefficients, labels, keep)), wanted


def _device_share(plan: Plan, total: jax.Array) -> jax.Array:
    """Split a replicated value into shares that add up to it: all of it on the first device."""
    return total if plan.axis_name is None else jnp.where(jax.lax.axis_index(plan.axis_name) == 0, total, 0)


def _scale_gradients(grads: Gradients, factor: jax.Array) -> Gradients:
    return Gradients(*(None if grad is None else factor * grad for grad in grads))


def _cast_gradients(plan: Plan, grads: Gradients) -> Gradients:
    hidden, weight = (None if grad is None else grad.astype(plan.dtype) for grad in grads[:2])
    return grads._replace(hidden=hidden, weight=weight)
