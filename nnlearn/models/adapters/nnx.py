"""Modules of ``flax.nnx``."""

from typing import Any

import jax
import jax.numpy as jnp

from nnlearn.extras import import_extra
from nnlearn.models.adapters.mode import arguments_of, as_arguments, make_with, mode_flags
from nnlearn.models.factory import model_factory
from nnlearn.types import Model, StatefulModel


@model_factory
def from_nnx(module: Any, *, wrt: Any = None, train_argument: str | None = None) -> Model | StatefulModel:
    """A ``flax.nnx`` module as a model.

    ``params`` are the values of its ``nnx.Param`` as nested dicts, ``{"linear": {"kernel": ...}}``. All other variables
    except random state, such as ``nnx.BatchStat``, are the model's state, also nested dicts, and make it a
    ``StatefulModel``. Random numbers depend only on the key of ``apply``: the module's random state is reset at every
    call, so that the model is a pure function. ``nnx.update(module, params, model_state)`` inserts the trained values
    into a module.

    Args:
      module: a class of modules, or a function that makes one, ``make(rngs) -> module``, called with ``nnx.Rngs(key)``;
        or a module, whose current values every ``init`` returns.
      wrt: the variables that are trained, an nnx filter; None for ``nnx.Param``.
      train_argument: an argument of ``__call__`` that switches training mode. None looks for the usual names, see
        ``from_linen``. In addition ``train()`` or ``eval()`` of the module is called. An argument ``rngs`` gets
        ``nnx.Rngs(key)`` in training, and None at inference.

    Returns:
      A ``Model`` or a ``StatefulModel``. ``apply`` passes a tuple of inputs as several arguments.

    Raises:
      ImportError: if flax is not installed.
      TypeError: if ``module`` neither is nor makes an nnx module.
      ValueError: if the module does not have ``train_argument``; in ``apply``, if the params are those of another
        model.

    >>> from flax import nnx
    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.linear = nnx.Linear(3, 2, rngs=rngs)
    ...         self.dropout = nnx.Dropout(0.5, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.dropout(self.linear(x))
    >>> model = from_nnx(Net)
    >>> params = model.init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params)
    {'linear': {'bias': (2,), 'kernel': (3, 2)}}
    >>> model.apply(params, jnp.ones((4, 3)), jax.random.key(1)).shape
    (4, 2)
    """
    nnx = import_extra("flax.nnx", "from_nnx", "flax")
    wrt = nnx.Param if wrt is None else wrt
    given = isinstance(module, nnx.Module)
    if not given and not callable(module):
        raise TypeError(f"module must be a flax.nnx.Module or a function that makes one, got {module!r}")

    def make(key):
        net = nnx.clone(module) if given else make_with(module, "rngs", nnx.Rngs(key))
        if not isinstance(net, nnx.Module):
            raise TypeError(f"module must make a flax.nnx.Module, it made {net!r}")
        return net

    def initial_values(key):
        _, params, _, rest = nnx.split(make(key), wrt, nnx.RngState, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    present = initial_values(None) if given else None  # read now, as the module may be modified later
    net = nnx.eval_shape(lambda: make(jax.random.key(0)))
    net.train()
    training, params_like, rngs_like, rest_like = nnx.split(net, wrt, nnx.RngState, ...)
    net.eval()
    inference = nnx.split(net, wrt, nnx.RngState, ...)[0]
    arguments = arguments_of(net.__call__)
    flags = mode_flags(arguments, train_argument)

    def run(params, model_state, inputs, key):
        graph, options = (inference, flags[1]) if key is None else (training, flags[0])
        if "rngs" in arguments:
            options = {**options, "rngs": None if key is None else nnx.Rngs(key)}
        states = (_fill(nnx, params_like, params), _reseed(nnx, rngs_like, key), _fill(nnx, rest_like, model_state))
        net = nnx.merge(graph, *states)
        outputs = net(*as_arguments(inputs), **options)
        if key is None:
            return outputs, model_state
        rest = dict(nnx.to_flat_state(nnx.split(net, wrt, nnx.RngState, ...)[3]))
        kept = [(path, rest[path]) for path, _ in nnx.to_flat_state(rest_like)]  # without values sown during the call
        return outputs, nnx.to_pure_dict(nnx.from_flat_state(kept))

    def init(key):
        return initial_values(key) if present is None else present

    if jax.tree.leaves(rest_like):
        return StatefulModel(init, lambda params, model_state, inputs, key=None: run(params, model_state, inputs, key))
    return Model(lambda key: init(key)[0], lambda params, inputs, key=None: run(params, {}, inputs, key)[0])


def _fill(nnx, like: Any, values: Any) -> Any:
    """The variables of ``like`` with the values of nested dicts."""

    def at(path, variable):
        value = values
        for name in path:
            try:
                value = value[name]
            except (KeyError, TypeError, IndexError):
                where = "/".join(map(str, path))
                raise ValueError(
                    f"the module has {where!r}, the given values do not; make them with init(key)"
                ) from None
        return variable.replace(value) if isinstance(variable, nnx.Variable) else value

    return nnx.map_state(at, like)


def _reseed(nnx, like: Any, key: jax.Array | None) -> Any:
    """Reset random streams, each with its own key, as layers with equal keys would drop the same elements."""
    base = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(base.dtype, jax.dtypes.prng_key):
        base = jax.random.wrap_key_data(base)
    streams = [path for path, variable in nnx.to_flat_state(like) if isinstance(variable, nnx.RngKey)]

    def at(path, variable):
        if isinstance(variable, nnx.RngKey):
            own, shape = jax.random.fold_in(base, streams.index(path)), variable.get_value().shape
            return variable.replace(jax.random.split(own, shape) if shape else own)
        return variable.replace(jnp.zeros(variable.get_value().shape, variable.get_value().dtype))

    return nnx.map_state(at, like)


__all__ = ["from_nnx"]
