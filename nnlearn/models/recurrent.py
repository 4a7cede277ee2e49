"""Recurrent layers: the simple recurrent layer and the gated recurrent unit."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_dtype
from nnlearn.models.factory import model_factory
from nnlearn.models.inputs import along_last_axis, check_features, to_floating, where_or_all
from nnlearn.models.named import Initializer, activation_function, initializer
from nnlearn.models.parameters import draw_parameter, parameter
from nnlearn.sharding.axes import automatic_axes
from nnlearn.types import DTypeLike, Model


@model_factory
def rnn(
    inputs: int,
    hidden: int,
    *,
    bidirectional: bool = False,
    activation: str | Callable[[jax.Array], jax.Array] = "tanh",
    kernel_init: str | Initializer = "glorot",
    recurrent_init: str | Initializer = "orthogonal",
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """The simple (Elman) recurrent layer.

    Starting from ``h_0 = 0``::

        h_t = activation(x_t @ kernel + h_{t-1} @ recurrent + bias)

    Args:
      inputs: length of the last axis of the inputs.
      hidden: length of the state.
      bidirectional: whether to run a second layer from end to start and concatenate its states to the first one's.
      activation: a function of one array or its name; see ``activation_function``.
      kernel_init, recurrent_init: an initialiser or its name; see ``initializer``.
      dtype: the dtype of the parameters.

    Returns:
      A model from ``x`` or ``(x, where)`` to all states. ``x`` has shape (..., time, inputs) and the states (..., time,
      hidden), or (..., time, 2 * hidden) if bidirectional. ``where``, booleans of shape (..., time), marks padding with
      False. Padding steps keep the state unchanged, so the last state is that of the last valid step, and padding may
      be at either end. The params are ``{"kernel": (inputs, hidden), "recurrent": (hidden, hidden), "bias":
      (hidden,)}``, with a leading axis of 2 (forward, backward) if bidirectional.

    Raises:
      ValueError: if a size is below 1, or a name is unknown; in ``apply``, if an array has the wrong shape.
      TypeError: in ``apply``, if ``where`` is not boolean.

    Source: Elman 1990, "Finding Structure in Time", Cognitive Science 14.

    >>> model = rnn(3, 8)
    >>> model.apply(model.init(jax.random.key(0)), jnp.ones((2, 5, 3))).shape
    (2, 5, 8)
    """
    function = activation_function(activation)

    def cell(projected, h, params):
        return function(projected + h @ params["recurrent"])

    return _recurrent("rnn", inputs, hidden, 1, cell, {}, bidirectional, kernel_init, recurrent_init, dtype)


@model_factory
def gru(
    inputs: int,
    hidden: int,
    *,
    bidirectional: bool = False,
    kernel_init: str | Initializer = "glorot",
    recurrent_init: str | Initializer = "orthogonal",
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """The gated recurrent unit, with a reset gate ``r`` and an update gate ``z``.

    With kernels and biases in three parts, for ``r``, ``z`` and ``n``, starting from ``h_0 = 0``::

        r_t = sigmoid(x_t @ kernel_r + bias_r + h_{t-1} @ recurrent_r)
        z_t = sigmoid(x_t @ kernel_z + bias_z + h_{t-1} @ recurrent_z)
        n_t = tanh(x_t @ kernel_n + bias_n + r_t * (h_{t-1} @ recurrent_n + recurrent_bias))
        h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    This is PyTorch's form: ``r`` multiplies the product, while in the paper it multiplies the state before the product.
    So the three products can be computed as one.

    Args:
      inputs: length of the last axis of the inputs.
      hidden: length of the state.
      bidirectional: whether to run a second layer from end to start and concatenate its states to the first one's.
      kernel_init, recurrent_init: an initialiser or its name, drawn for each part; see ``initializer``.
      dtype: the dtype of the parameters.

    Returns:
      A model from ``x`` or ``(x, where)`` to all states; see ``rnn``. The params are ``{"kernel": (inputs, 3 * hidden),
      "recurrent": (hidden, 3 * hidden), "bias": (3 * hidden,), "recurrent_bias": (hidden,)}``, with a leading axis of 2
      (forward, backward) if bidirectional.

    Raises:
      ValueError: if a size is below 1, or a name is unknown; in ``apply``, if an array has the wrong shape.
      TypeError: in ``apply``, if ``where`` is not boolean.

    Source: Cho et al. 2014, arXiv:1406.1078.

    >>> model = gru(3, 8, bidirectional=True)
    >>> x, where = jnp.ones((2, 5, 3)), jnp.arange(5)[None] < jnp.array([[5], [3]])
    >>> states = model.apply(jax.jit(model.init)(jax.random.key(0)), (x, where))
    >>> states.shape, bool((states[1, 2, :8] == states[1, 4, :8]).all())
    ((2, 5, 16), True)
    """

    def cell(projected, h, params):
        recurrent_r, recurrent_z, recurrent_n = jnp.split(h @ params["recurrent"], 3, axis=-1)
        projected_r, projected_z, projected_n = jnp.split(projected, 3, axis=-1)
        r = jax.nn.sigmoid(projected_r + recurrent_r)
        z = jax.nn.sigmoid(projected_z + recurrent_z)
        n = jnp.tanh(projected_n + r * (recurrent_n + along_last_axis(params["recurrent_bias"], recurrent_n)))
        return n + z * (h - n)

    biases = {"recurrent_bias": (hidden,)}
    return _recurrent("gru", inputs, hidden, 3, cell, biases, bidirectional, kernel_init, recurrent_init, dtype)


def _recurrent(kind, inputs, hidden, gates, cell, biases, bidirectional, kernel_init, recurrent_init, dtype) -> Model:
    """A layer whose state follows ``h_t = cell(x_t @ kernel + bias, h_{t-1}, params)``."""
    inputs, hidden = check_count("inputs", inputs), check_count("hidden", hidden)
    make_kernel, make_recurrent = initializer(kernel_init), initializer(recurrent_init)
    layer, dtype = f"{kind}({inputs}, {hidden})", check_dtype("dtype", dtype)
    shapes = {"kernel": (inputs, gates * hidden), "recurrent": (hidden, gates * hidden), "bias": (gates * hidden,)}
    shapes |= biases
    if bidirectional:
        shapes = {name: (2, *shape) for name, shape in shapes.items()}

    def init_one(key):
        kernel_key, recurrent_key = jax.random.split(key)

        def parts(make, part_key, rows):
            drawn = [
                draw_parameter(make, gate_key, (rows, hidden), dtype) for gate_key in jax.random.split(part_key, gates)
            ]
            return jnp.concatenate(drawn, axis=1)

        kernels = {
            "kernel": parts(make_kernel, kernel_key, inputs),
            "recurrent": parts(make_recurrent, recurrent_key, hidden),
        }
        zeros = {"bias": (gates * hidden,), **biases}
        return kernels | {name: jnp.zeros(shape, dtype) for name, shape in zeros.items()}

    def init(key):
        if not bidirectional:
            return init_one(key)
        return jax.tree.map(lambda *both: jnp.stack(both), *map(init_one, jax.random.split(key)))

    @automatic_axes(like="x")
    def apply(params, x, key=None):
        x, where = x if isinstance(x, tuple) else (x, None)
        x = to_floating(x)
        check_features(layer, inputs, x)
        if x.ndim < 2:
            raise ValueError(f"{layer} expects inputs of shape (..., time, {inputs}), got {x.shape}")
        where = where_or_all(where, x.shape[:-1])
        params = {name: parameter(layer, params, name, shape) for name, shape in shapes.items()}
        lead, time = x.shape[:-2], x.shape[-2]
        x_tbi = jnp.moveaxis(jnp.where(where[..., None], x, 0).reshape(math.prod(lead), time, inputs), 1, 0)
        where_tb = where.reshape(math.prod(lead), time).T
        if bidirectional:  # both directions in one loop, along an extra axis
            both = jnp.stack([x_tbi, x_tbi[::-1]]), jnp.stack([where_tb, where_tb[::-1]])
            forward, backward = jax.vmap(run, in_axes=(0, 0, 0), out_axes=0)(params, *both)
            states_tbh = jnp.concatenate([forward, backward[::-1]], axis=-1)
        else:
            states_tbh = run(params, x_tbi, where_tb)
        return jnp.moveaxis(states_tbh, 0, 1).reshape(*lead, time, states_tbh.shape[-1])

    def run(params, x_tbi, where_tb):
        projected = x_tbi @ params["kernel"]  # for all steps at once, as one large matrix product
        projected = projected + along_last_axis(params["bias"], projected)

        def step(h, inputs_t):
            projected_t, where_t = inputs_t
            h = jnp.where(where_t[:, None], cell(projected_t, h, params), h)
            return h, h

        start = jnp.zeros((x_tbi.shape[1], hidden), projected.dtype)
        return jax.lax.scan(step, start, (projected, where_tb))[1]

    return Model(init, apply)
