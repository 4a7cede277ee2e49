"""Embedding tables, and a factorisation machine over several of them."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_count, check_dtype
from nnlearn.models.factory import model_factory
from nnlearn.models.inputs import check_features
from nnlearn.models.named import Initializer, initializer
from nnlearn.models.parameters import EMBEDDING_INIT, draw_parameter, parameter
from nnlearn.sharding.axes import take_rows
from nnlearn.tree import widest
from nnlearn.types import DTypeLike, Model


@model_factory
def embedding(
    count: int,
    features: int,
    *,
    embedding_init: str | Initializer = EMBEDDING_INIT,
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """An embedding table, ``y = embedding[x]``.

    The gradient is zero except in the rows looked up.

    Args:
      count: number of rows; indices are in [0, count). Any other index gives NaN.
      features: length of a vector.
      embedding_init: an initialiser or its name, see ``initializer``; by default normal with standard deviation 0.02.
      dtype: the dtype of the parameters.

    Returns:
      A model from integers (...) to (..., features) with params ``{"embedding": (count, features)}``.

    Raises:
      ValueError: if a size is below 1; in ``apply``, if the params have the wrong shape.
      TypeError: in ``apply``, if the indices are not integers.

    >>> model = embedding(3, 2, embedding_init="ones")
    >>> print(model.apply(model.init(jax.random.key(0)), jnp.array([2])))
    [[1. 1.]]
    """
    shape = check_count("count", count), check_count("features", features)
    make, dtype = initializer(embedding_init), check_dtype("dtype", dtype)
    layer = f"embedding{shape}"

    def apply(params, indices, key=None):
        indices = _integers(layer, indices)
        table = parameter(layer, params, "embedding", shape)
        # -1 would be the last row, as in NumPy.
        return take_rows(table, jnp.where(indices < 0, count, indices), mode="fill", fill_value=jnp.nan)

    return Model(lambda key: {"embedding": draw_parameter(make, key, shape, dtype)}, apply)


@model_factory
def factorization_machine(counts: Sequence[int], features: int, *, dtype: DTypeLike = jnp.float32) -> Model:
    """A factorisation machine: a logit from categorical fields, with a weight per value and low-rank pair interactions.

    With ``w_f`` the weight and ``v_f`` the vector of the value in field ``f``::

        y = bias + sum_f w_f + sum_{f<g} v_f . v_g,
        sum_{f<g} v_f . v_g = (|sum_f v_f|^2 - sum_f |v_f|^2) / 2

    Args:
      counts: number of values of each field.
      features: length of the vectors, the rank of the interactions.
      dtype: the dtype of the parameters.

    Returns:
      A model from integers (..., fields), each in [0, counts[field]), to logits (...). Params ``{"bias": (), "weights":
      {"embedding": (sum(counts), 1)}, "vectors": {"embedding": (sum(counts), features)}}``: the tables of all fields,
      concatenated. A value out of range makes its logit NaN.

    Raises:
      ValueError: if there are no fields, a size is below 1; in ``apply``, if a shape does not match.
      TypeError: in ``apply``, if the values are not integers.

    Source: Rendle 2010, "Factorization Machines", ICDM.

    >>> model = factorization_machine((10, 20, 5), 4)
    >>> model.apply(model.init(jax.random.key(0)), jnp.array([[9, 0, 4], [1, 2, 3]])).shape
    (2,)
    """
    counts = tuple(check_count(f"counts[{field}]", count) for field, count in enumerate(counts))
    if not counts:
        raise ValueError("counts must name at least one field, got none")
    starts = (0, *itertools.accumulate(counts[:-1]))
    weights = embedding(sum(counts), 1, embedding_init="zeros", dtype=dtype)
    vectors = embedding(sum(counts), features, embedding_init=jax.nn.initializers.normal(0.05), dtype=dtype)
    name = f"factorization_machine({counts}, {features})"

    def init(key):
        return {
            "bias": jnp.zeros((), dtype),
            "weights": weights.init(key),
            "vectors": vectors.init(key),
        }

    def apply(params, values, key=None):
        values = _integers(name, values)
        check_features(name, len(counts), values)
        spread = (1,) * (values.ndim - 1) + (-1,)
        valid = (values >= 0) & (values < np.reshape(counts, spread))
        rows = jnp.where(valid, values + np.reshape(starts, spread), -1)
        vectors_fd = vectors.apply(params["vectors"], rows)
        total_d = jnp.sum(vectors_fd, axis=-2)
        pairs = (jnp.sum(jnp.square(total_d), axis=-1) - jnp.sum(jnp.square(vectors_fd), axis=(-2, -1))) / 2
        return params["bias"] + jnp.sum(weights.apply(params["weights"], rows), axis=(-2, -1)) + pairs

    return Model(init, apply)


def _integers(layer: str, indices) -> jax.Array:
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"{layer} looks up integers, got {indices.dtype.name} of shape {indices.shape}")
    return indices.astype(widest(indices.dtype, jnp.int32))  # small integers may not hold a count
