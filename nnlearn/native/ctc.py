"""The CTC loss and its gradient as a C kernel, see ``ctc.c``."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.core import ShapedArray

from nnlearn.native.kernel import call_kernel

SOURCE = Path(__file__).with_name("ctc.c")


@dataclasses.dataclass(frozen=True)
class CtcKernel:
    """A ``Kernel`` of the losses of examples, and with ``gradient`` of their derivative with respect to the logits.

    Attributes:
      reference: the same by JAX's operations.
      gradient: whether to return the derivative too.
    """

    reference: Callable[..., list[jax.Array]]
    gradient: bool

    in_place = ()
    flags = ("-ffp-contract=fast",)  # halves the instructions of a polynomial

    @property
    def source(self) -> str:
        return SOURCE.read_text()

    @property
    def handler(self) -> str:
        return "ctc_gradient" if self.gradient else "ctc_loss"

    def __call__(
        self,
        logits_btk: jax.Array,
        is_frame_bt: jax.Array,
        labels_bn: jax.Array,
        lengths_b: jax.Array,
        blank_id: jax.Array,
    ) -> list[jax.Array]:
        return call_kernel(self, logits_btk, is_frame_bt, labels_bn, lengths_b, blank_id)

    def results(self, logits_btk, *others):
        losses_b = ShapedArray(logits_btk.shape[:1], logits_btk.dtype)
        return [losses_b, ShapedArray(logits_btk.shape, logits_btk.dtype)] if self.gradient else [losses_b]

    def vmapped(self, axes, *values):
        """Concatenate the examples of all members, which share one blank."""
        if axes[-1] is not None:
            results = jax.vmap(self.reference, in_axes=axes)(*values)
            return results, [0] * len(results)
        size = next(value.shape[axis] for value, axis in zip(values, axes, strict=True) if axis is not None)

        def flatten(value, axis):
            moved = (
                jnp.broadcast_to(value[None], (size, *value.shape)) if axis is None else jnp.moveaxis(value, axis, 0)
            )
            return moved.reshape(size * moved.shape[1], *moved.shape[2:])

        flat = [flatten(*pair) for pair in zip(values[:-1], axes[:-1], strict=True)]
        results = call_kernel(self, *flat, values[-1])
        return [one.reshape(size, len(one) // size, *one.shape[1:]) for one in results], [0] * len(results)


__all__ = ["CtcKernel"]
