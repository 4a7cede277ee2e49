"""Skip steps whose loss or gradient norm is far above the last ones, measured with a median that spikes do not move."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from optax import with_extra_args_support

from nnlearn.checks import check_count, check_number
from nnlearn.settings import comparable
from nnlearn.transforms.averages import increment
from nnlearn.transforms.loss_scale import refuse_loss_scale_inside
from nnlearn.transforms.wrapping import run_or_hold
from nnlearn.tree import all_finite, global_norm
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, OptState, Scalar

TO_SIGMA = 1.4826  # the standard deviation of a normal distribution, in median absolute deviations
FLOOR = 1e-3  # the least standard deviation, as a part of the median: equal losses are no evidence of a spike


class Window(NamedTuple):
    """The last finite values of a quantity.

    Attributes:
      values: shape (window,), float32; the newest last, and infinite where no value has come yet.
      count: how many values have come, int32, at most ``window``.
    """

    values: jax.Array
    count: jax.Array

    def add(self, value: jax.Array) -> "Window":
        """The window with another value, unless that is not finite."""
        finite = jnp.isfinite(value)
        moved = jnp.append(self.values[1:], value.astype(jnp.float32))
        count = jnp.minimum(self.count + 1, len(self.values))
        return Window(jnp.where(finite, moved, self.values), jnp.where(finite, count, self.count))

    def limit(self, sigmas: Scalar) -> jax.Array:
        """The value above which another is a spike; infinite until half of the window is filled."""
        size = len(self.values)
        known = jnp.arange(size) >= size - self.count
        centre = _median(self.values, self.count)
        spread = jnp.where(known, jnp.abs(jnp.where(known, self.values, 0) - centre), jnp.inf)
        sigma = jnp.maximum(TO_SIGMA * _median(spread, self.count), FLOOR * jnp.abs(centre))
        return jnp.where(self.count >= size // 2, centre + sigmas * sigma, jnp.inf)


def _median(values: jax.Array, count: jax.Array) -> jax.Array:
    """The median of the ``count`` finite values; 0 if there is none."""
    ordered = jnp.sort(values)
    low, high = ordered[jnp.maximum(count - 1, 0) // 2], ordered[jnp.minimum(count // 2, len(values) - 1)]
    return jnp.where(count > 0, low / 2 + high / 2, 0)


def empty_window(size: int) -> Window:
    """A window without values.

    >>> float(empty_window(4).add(jnp.array(1.0)).add(jnp.array(1.0)).limit(6.0))
    1.0060...
    """
    return Window(jnp.full(size, jnp.inf, jnp.float32), jnp.zeros([], jnp.int32))


class SkipSpikesState(NamedTuple):
    """The state of ``skip_spikes``.

    Attributes:
      skipped: the number of skipped steps, int32.
      window: the last values, those of skipped steps included.
      inner_state: the state of the guarded optimizer.
    """

    skipped: jax.Array
    window: Window
    inner_state: OptState


@comparable
def skip_spikes(
    inner: GradientTransformation,
    *,
    sigmas: Scalar = 6.0,
    window: int = 128,
    of: Literal["loss", "grad_norm"] = "loss",
) -> GradientTransformationExtraArgs:
    r"""Run ``inner`` unless the step is a spike or not finite; otherwise the update is zero and the state stays.

    A step is a spike if its value is above :math:`m + k \max(1.4826\, d, 0.001\, |m|)`, where :math:`m` is the median
    of the last finite values, :math:`d` the median of their distances from :math:`m`, and :math:`k` is ``sigmas``. For
    normally distributed values this is :math:`k` standard deviations, and spikes hardly move it.
    Values of skipped steps enter the window, so training continues after a lasting change: once half of the window is
    as high, it is no spike. Steps with a loss or gradient that is not finite are skipped as well.

    Args:
      inner: the optimizer to guard, usually the whole one. It is not run on a skipped step, except under ``vmap``.
      sigmas: how many robust standard deviations above the median a spike is, > 0.
      window: the number of last values; until half as many have come, no step is a spike.
      of: ``"loss"``, the argument ``value`` of ``update``, which ``make_step`` gives; or ``"grad_norm"``, the norm of
        the updates that this transformation receives.

    Returns:
      A guard with the state ``SkipSpikesState(skipped, window, inner_state)``. In a step of ``make_step`` everything
      else stays too, such as running statistics; see ``was_skipped``. ``skip_budget`` stops a run that skips too much.

    Raises:
      ValueError: if an argument is out of its range, ``update`` receives no ``value``, or ``inner`` holds a
        ``dynamic_loss_scale``.

    Source: the rule of OLMo's optimizers, with 6 standard deviations over 128 steps (OLMo et al. 2024, "2 OLMo 2
    Furious", arXiv:2501.00656), here with median and MAD.

    >>> import nnlearn
    >>> tx = skip_spikes(nnlearn.sgd(0.1), window=4)
    >>> state = tx.init(jnp.zeros(1))
    >>> for loss in (2.0, 2.1, 1.9, 50.0):
    ...     update, state = tx.update(jnp.ones(1), state, value=loss)
    >>> update, state.skipped
    (Array([0.], dtype=float32), Array(1, dtype=int32))
    """
    check_number("sigmas", sigmas, low=0, low_open=True)
    check_count("window", window, at_least=2)
    if of not in ("loss", "grad_norm"):
        raise ValueError(f"of must be 'loss' or 'grad_norm', got {of!r}")
    inner = with_extra_args_support(inner)

    def init(params):
        inner_state = inner.init(params)
        refuse_loss_scale_inside(inner_state, "skip_spikes")
        return SkipSpikesState(jnp.zeros([], jnp.int32), empty_window(window), inner_state)

    def update(updates, state, params=None, *, value: Any = None, **extra_args):
        if of == "loss" and value is None:
            raise ValueError(
                "skip_spikes(of='loss') needs the loss: make_step gives it; elsewhere, tx.update(..., value=loss)"
            )
        seen = jax.lax.stop_gradient(jnp.asarray(value if of == "loss" else global_norm(updates), jnp.float32))
        finite = jnp.isfinite(seen) & all_finite(updates)
        if value is not None:
            finite, extra_args = finite & jnp.all(jnp.isfinite(value)), extra_args | {"value": value}
        go = finite & (seen <= state.window.limit(sigmas))
        change, inner_state = run_or_hold(go, inner, updates, state.inner_state, params, extra_args)
        skipped = jnp.where(go, state.skipped, increment(state.skipped))
        return change, SkipSpikesState(skipped, state.window.add(seen), inner_state)

    return GradientTransformationExtraArgs(init, update)


__all__ = ["SkipSpikesState", "Window", "empty_window", "skip_spikes"]
