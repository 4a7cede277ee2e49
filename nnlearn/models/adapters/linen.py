"""Modules of ``flax.linen``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnlearn.extras import import_extra
from nnlearn.models.adapters.mode import arguments_of, as_arguments, mode_flags
from nnlearn.models.factory import model_factory
from nnlearn.types import Model, StatefulModel


@model_factory
def from_linen(
    module: Any,
    *example_inputs: Any,
    train_argument: str | None = None,
    rngs: Sequence[str] = ("dropout",),
) -> Model | StatefulModel:
    """A ``flax.linen`` module as a model.

    ``params`` is the collection of that name, as ``module.init`` makes it. All other collections that ``init`` makes,
    such as ``batch_stats``, are the model's state, ``{"batch_stats": ...}``, and make it a ``StatefulModel``. The
    trained network is ``module.apply({"params": params, **model_state}, inputs)``.

    Args:
      module: the unbound module.
      *example_inputs: its inputs: arrays, or ``jax.ShapeDtypeStruct`` for zeros of that shape. If there are several,
        ``apply`` takes a tuple as its inputs.
      train_argument: the argument of ``__call__``, or the field of the module, that switches training mode. None looks
        for the usual names: ``train``, ``training`` or ``is_training``, and, with the opposite meaning,
        ``deterministic``, ``use_running_average`` or ``inference``.
      rngs: names of the module's random streams in training. A single one gets the key of ``apply`` itself; several get
        a part each.

    For ``diagnose``, ``predict`` of a ``StatefulModel`` takes the state by name: ``lambda params, x, model_state:
    model.apply(params, model_state, x)[0]``.

    Returns:
      A ``Model`` or a ``StatefulModel``. Collections are mutable only in training. Sown values are dropped, unless the
      module also sows them during initialisation.

    Raises:
      ImportError: if flax is not installed.
      TypeError: if ``module`` is no linen module.
      ValueError: if the module does not have ``train_argument``.

    >>> from flax import linen as nn
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train):
    ...         x = nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))
    ...         return nn.Dropout(0.5, deterministic=not train)(x)
    >>> model = from_linen(Net(), jnp.zeros((1, 3)))
    >>> params, model_state = model.init(jax.random.key(0))
    >>> outputs, model_state = model.apply(params, model_state, jnp.ones((4, 3)), jax.random.key(1))
    >>> sorted(params), jax.tree.map(jnp.shape, model_state)
    (['BatchNorm_0', 'Dense_0'], {'batch_stats': {'BatchNorm_0': {'mean': (2,), 'var': (2,)}}})
    """
    linen = import_extra("flax.linen", "from_linen", "flax")
    if not isinstance(module, linen.Module):
        raise TypeError(f"module must be an instance of flax.linen.Module, got {module!r}")
    names = (rngs,) if isinstance(rngs, str) else tuple(rngs)
    training, inference = _modes(module, train_argument)

    def init_all(key):
        net, flags = inference
        inputs = (jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x for x in example_inputs)
        variables = dict(net.init(key, *inputs, **flags))
        return variables.pop("params", {}), variables

    def run(params, model_state, inputs, key):
        net, flags = inference if key is None else training
        keys = None if key is None else dict(zip(names, _split_key(key, len(names)), strict=True))
        mutable = list(model_state) if key is not None else []
        variables = {"params": params, **model_state}
        outputs = net.apply(variables, *as_arguments(inputs), rngs=keys, mutable=mutable or False, **flags)
        return (outputs[0], {**model_state, **outputs[1]}) if mutable else (outputs, model_state)

    try:
        has_state = jax.eval_shape(init_all, jax.random.key(0))[1]
    except TypeError as error:
        if not example_inputs:
            error.add_note("give from_linen an example input, such as jax.ShapeDtypeStruct((1, 8), jnp.float32)")
        raise
    if has_state:
        return StatefulModel(
            init_all, lambda params, model_state, inputs, key=None: run(params, model_state, inputs, key)
        )
    return Model(lambda key: init_all(key)[0], lambda params, inputs, key=None: run(params, {}, inputs, key)[0])


def _modes(module, train_argument: str | None):
    """The module and its flags in training, and at inference."""
    arguments = arguments_of(module.__call__)
    fields = {field.name for field in dataclasses.fields(module)} - {"parent", "name"}
    flags = mode_flags({*arguments, *fields} if train_argument is not None else arguments, train_argument)
    if flags[0] and arguments.keys() >= flags[0].keys():
        return tuple((module, flag) for flag in flags)
    return tuple((module.clone(**flag), {}) for flag in mode_flags(fields, train_argument))


def _split_key(key: jax.Array, parts: int) -> Any:
    return [key] if parts == 1 else jax.random.split(key, parts)


__all__ = ["from_linen"]
