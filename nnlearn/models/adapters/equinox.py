"""Modules of ``equinox``."""

import inspect
from typing import Any

import jax

from nnlearn.extras import import_extra
from nnlearn.models.adapters.mode import arguments_of, as_arguments, make_with, mode_flags
from nnlearn.models.factory import model_factory
from nnlearn.types import Model, StatefulModel


@model_factory
def from_equinox(
    module: Any,
    *,
    per_example: bool = True,
    axis_name: str = "batch",
    filter_spec: Any = None,
    train_argument: str | None = None,
) -> Model | StatefulModel:
    """An ``equinox`` module as a model.

    ``params`` is the module with only its floating-point arrays, as from ``equinox.partition``. A module with other
    arrays, or an ``equinox.nn.State``, becomes a ``StatefulModel``, whose state is the pair ``(the module with only
    those arrays, the State)``. ``equinox.combine(params, module)`` inserts the trained parameters into a module.

    Args:
      module: a module, or the pair ``(module, state)`` of ``equinox.nn.make_with_state``, whose arrays every ``init``
        returns; or a function ``make(key)`` that returns either, such as a class or
        ``equinox.nn.make_with_state(Net)``.
      per_example: whether the module takes one example, as equinox's layers do, and is vmapped over the leading axis of
        the inputs, each with its own key; otherwise it takes the batch.
      axis_name: the name of that axis, for ``equinox.nn.BatchNorm``.
      filter_spec: what is trained, as ``equinox.partition`` takes it; None for ``equinox.is_inexact_array``.
      train_argument: an argument of ``__call__`` that switches training mode. None looks for the usual names, see
        ``from_linen``. In addition ``equinox.nn.inference_mode`` is set, and ``key`` is passed if there is an argument
        of that name.

    Returns:
      A ``Model`` or a ``StatefulModel``. ``apply`` passes a tuple of inputs as several arguments, followed by the
      State.

    Raises:
      ImportError: if equinox is not installed.
      TypeError: if ``module`` neither is nor makes an equinox module.
      ValueError: if the module does not have ``train_argument``, or takes a state that is not given.

    >>> import equinox as eqx
    >>> model = from_equinox(lambda key: eqx.nn.MLP(3, 2, 8, 1, key=key))
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jax.numpy.ones((4, 3))).shape, params.layers[0].weight.shape
    ((4, 2), (8, 3))
    """
    eqx = import_extra("equinox", "from_equinox", "equinox")
    filter_spec = eqx.is_inexact_array if filter_spec is None else filter_spec
    given = isinstance(module, eqx.Module | tuple)
    if not given and not callable(module):
        raise TypeError(f"module must be an equinox.Module or a function that makes one, got {module!r}")

    def parts(key):
        made = module if given else make_with(module, "key", key)
        net, state = made if isinstance(made, tuple) else (made, None)
        if not isinstance(net, eqx.Module):
            raise TypeError(f"module must be or make an equinox.Module, got {net!r}")
        params, rest = eqx.partition(net, filter_spec)
        others, static = eqx.partition(rest, eqx.is_array)
        return (params, (others, state)), static

    like, static = eqx.filter_eval_shape(parts, jax.random.key(0))
    arguments = arguments_of(type(like[0]).__call__)
    flags = mode_flags(arguments, train_argument)
    stateful = like[1][1] is not None
    if "state" in arguments and arguments["state"].default is inspect.Parameter.empty and not stateful:
        raise ValueError("the module takes a state, but there is none: make it with equinox.nn.make_with_state")

    def init(key):
        # With the known structure, as static fields such as functions may differ between two calls of make.
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(parts(key)[0]))

    def run(params, model_state, inputs, key):
        others, state = model_state
        net = eqx.nn.inference_mode(eqx.combine(params, others, static), value=key is None)

        def call(inputs, state, key):
            options = flags[0] if key is not None else flags[1]
            options = {**options, "key": key} if "key" in arguments else options
            result = net(*as_arguments(inputs), *([state] if stateful else []), **options)
            return result if stateful else (result, None)

        state = jax.tree.map(lambda leaf: leaf, state)  # a copy, as a State is invalid once it was updated
        if per_example:
            size = jax.tree.leaves(inputs)[0].shape[0]
            keys = None if key is None else jax.random.split(key, size)
            axes = (0, None, None if key is None else 0)
            outputs, state = jax.vmap(call, axes, (0, None), axis_name=axis_name)(inputs, state, keys)
        else:
            outputs, state = call(inputs, state, key)
        return outputs, model_state if key is None else (others, state)

    if jax.tree.leaves(like[1]):
        return StatefulModel(init, lambda params, model_state, inputs, key=None: run(params, model_state, inputs, key))
    return Model(lambda key: init(key)[0], lambda params, inputs, key=None: run(params, like[1], inputs, key)[0])


__all__ = ["from_equinox"]
