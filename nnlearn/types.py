"""Types that every layer passes around: aliases and protocols, no logic.

The transformation types are optax's own classes, imported: an nnlearn optimizer *is* an optax optimizer.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import jax
from jax.typing import ArrayLike, DTypeLike
from optax import (
    EmptyState,
    GradientTransformation,
    GradientTransformationExtraArgs,
    MaskedNode,
    OptState,
    ScalarOrSchedule,
    Schedule,
)

PyTree = Any
"""Any nesting of dicts, lists, tuples and registered classes with arrays at its leaves."""
Params = PyTree
"""A pytree of arrays that training changes."""
Grads = PyTree
"""A pytree like ``Params``: the derivative of the loss with respect to each parameter."""
Updates = PyTree
"""A pytree like ``Params``: the output of a transformation; ``params + updates`` are the next parameters."""
Batch = PyTree
"""A pytree of arrays that share their leading axis, the examples."""
Key = jax.Array
"""A random key, from ``jax.random.key``."""
Scalar = ArrayLike
"""A Python number, an array of shape ``()`` or a tracer of one."""
LossFn = Callable[..., Any]
"""``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``; ``loss`` is a real scalar, a mean over examples.

It may have more arguments, ``model_state`` and ``hparams``, so its type does not name them."""
MaskOrFn = PyTree | Callable[[Params], PyTree] | None
"""A pytree of booleans shaped like the parameters (or a prefix of them), or a function from parameters to one."""


if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Outputs = TypeVar("Outputs", default=jax.Array)  # so that ``Model`` alone is one of arrays
else:
    from typing import TypeVar

    Outputs = TypeVar("Outputs")


class Model(NamedTuple, Generic[Outputs]):
    """A network as two pure functions.

    ``init(key) -> params`` creates the parameters; ``apply(params, inputs, key=None) -> outputs`` runs the network.
    ``key`` is for dropout; without one the network runs in evaluation mode.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., Outputs]


class StatefulModel(NamedTuple):
    """A network with state besides its parameters, such as the running statistics of BatchNorm.

    ``init(key) -> (params, model_state)`` creates both; ``apply(params, model_state, inputs, key=None) -> (outputs,
    model_state)`` runs the network. With a key it runs in training mode: dropout is active, and normalisation uses the
    statistics of the batch and updates the state. Without one it runs in evaluation mode and returns the state
    unchanged.
    """

    init: Callable[[Key], tuple[Params, PyTree]]
    apply: Callable[..., tuple[jax.Array, PyTree]]


__all__ = [
    "ArrayLike",
    "Batch",
    "DTypeLike",
    "EmptyState",
    "GradientTransformation",
    "GradientTransformationExtraArgs",
    "Grads",
    "Key",
    "LossFn",
    "MaskOrFn",
    "MaskedNode",
    "Model",
    "OptState",
    "Params",
    "PyTree",
    "Scalar",
    "ScalarOrSchedule",
    "Schedule",
    "StatefulModel",
    "Updates",
]
