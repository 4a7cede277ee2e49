"""Initialisers and activation functions by name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

Initializer = Callable[..., jax.Array]
"""``initializer(key, shape, dtype) -> array``, the protocol of ``jax.nn.initializers``."""

INITIALIZERS: Mapping[str, Initializer] = {
    "he": jax.nn.initializers.he_normal(),
    "he_normal": jax.nn.initializers.he_normal(),
    "he_uniform": jax.nn.initializers.he_uniform(),
    "kaiming": jax.nn.initializers.he_normal(),
    "kaiming_normal": jax.nn.initializers.he_normal(),
    "kaiming_uniform": jax.nn.initializers.he_uniform(),
    "glorot": jax.nn.initializers.glorot_normal(),
    "glorot_normal": jax.nn.initializers.glorot_normal(),
    "glorot_uniform": jax.nn.initializers.glorot_uniform(),
    "xavier": jax.nn.initializers.glorot_normal(),
    "xavier_normal": jax.nn.initializers.glorot_normal(),
    "xavier_uniform": jax.nn.initializers.glorot_uniform(),
    "lecun": jax.nn.initializers.lecun_normal(),
    "lecun_normal": jax.nn.initializers.lecun_normal(),
    "lecun_uniform": jax.nn.initializers.lecun_uniform(),
    "orthogonal": jax.nn.initializers.orthogonal(),
    "zeros": jax.nn.initializers.zeros,
    "ones": jax.nn.initializers.ones,
}

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "softplus": jax.nn.softplus,
    "tanh": jax.nn.tanh,
    "sigmoid": jax.nn.sigmoid,
    "identity": jax.nn.identity,
}


def _look_up(kind: str, table: Mapping[str, Callable], name_or_fn: Any) -> Callable:
    if isinstance(name_or_fn, str):
        if name_or_fn not in table:
            raise ValueError(f"{kind} must be one of {', '.join(table)}, or a function; got {name_or_fn!r}")
        return table[name_or_fn]
    if not callable(name_or_fn):
        raise TypeError(f"{kind} must be a name or a function, got {name_or_fn!r} ({type(name_or_fn).__name__})")
    return name_or_fn


def initializer(name_or_fn: str | Initializer) -> Initializer:
    """Look up an initialiser of ``jax.nn.initializers`` by name; a function is returned unchanged.

    For a kernel of shape (inputs, outputs) the standard deviation is ``sqrt(2 / inputs)`` for ``he`` (``kaiming``),
    ``sqrt(2 / (inputs + outputs))`` for ``glorot`` (``xavier``) and ``sqrt(1 / inputs)`` for ``lecun``; each is a
    normal distribution truncated at two standard deviations, or uniform with the suffix ``_uniform``. ``orthogonal``
    has orthonormal rows or columns, whichever are fewer.

    Args:
      name_or_fn: a name, or a function of (key, shape, dtype).

    Raises:
      ValueError: if the name is unknown.

    Source: He et al. 2015, arXiv:1502.01852; Glorot and Bengio 2010, AISTATS; LeCun et al. 1998, "Efficient BackProp";
    Saxe et al. 2013, arXiv:1312.6120.

    >>> initializer("he")(jax.random.key(0), (3, 2), "float32").shape
    (3, 2)
    """
    return _look_up("initializer", INITIALIZERS, name_or_fn)


def activation_function(name_or_fn: str | Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Look up an activation function of ``jax.nn`` by name; a function is returned unchanged.

    ``gelu`` is the tanh approximation, JAX's default. For the exact form pass ``functools.partial(jax.nn.gelu,
    approximate=False)``.

    Args:
      name_or_fn: a name, or a function of one array.

    Raises:
      ValueError: if the name is unknown.

    >>> print(activation_function("relu")(jax.numpy.array([-1.0, 2.0])))
    [0. 2.]
    """
    return _look_up("activation", ACTIVATIONS, name_or_fn)
