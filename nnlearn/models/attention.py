"""Attention with rotary positions, over whole sequences or a few tokens at a time with what came before in a cache."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_number
from nnlearn.models.layers import dense
from nnlearn.models.named import Initializer, initializer
from nnlearn.models.parameters import scaled_initializer
from nnlearn.sharding.axes import automatic_axes
from nnlearn.tree import as_hyperparam, compute_dtype
from nnlearn.types import DTypeLike, Key, Params, Scalar


class Cache(NamedTuple):
    """The keys and values of the tokens so far, each of shape (batch, length, key and value heads, head width)."""

    key: jax.Array
    value: jax.Array


class Attention(NamedTuple):
    """Attention as two pure functions.

    ``init(key) -> params``; ``apply(params, inputs_btd, positions_t, mask, cache=None) -> (outputs_btd, cache)``.
    ``mask`` is a boolean (batch or 1, 1, queries, keys), or None for every key; a cache is written at the positions
    before it is read.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., tuple[jax.Array, Cache | None]]


def rotary(x: jax.Array, positions: jax.Array, base: Scalar = 10000.0) -> jax.Array:
    """Turn pairs of features by angles that grow with the position, so that products tell how far apart two are.

    Feature ``i`` of the first half and feature ``i`` of the second are a point of the plane, turned about the origin by
    ``position * base ** (-2 i / width)``::

        a, b -> a cos - b sin, b cos + a sin

    The product of a query turned to position ``m`` and a key turned to ``n`` depends on ``m - n`` alone.

    Args:
      x: queries or keys, shape (batch, length, heads, width) with an even width.
      positions: of the tokens, shape (length,).
      base: the slowest pair turns once in about ``2 pi base`` tokens; > 0.

    Returns:
      An array like ``x``; the angles are computed in float32 at least.

    Raises:
      ValueError: if the width is odd, the shapes do not match, or ``base`` is not positive.

    Source: Su et al. 2021, "RoFormer", arXiv:2104.09864; halves instead of neighbours as in GPT-NeoX.

    >>> print(rotary(jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), jnp.array([1])).ravel())
    [0.54030 0.84147]
    """
    check_number("base", base, low=0.0, low_open=True)
    if x.ndim != 4 or x.shape[-1] % 2 or jnp.shape(positions) != x.shape[1:2]:
        raise ValueError(
            f"x must be (batch, length, heads, even width) and positions (length,), got {x.shape} and "
            f"{jnp.shape(positions)}"
        )
    half, wide = x.shape[-1] // 2, compute_dtype(x.dtype)
    frequency_h = jnp.asarray(as_hyperparam(base, wide), wide) ** (-jnp.arange(half, dtype=wide) / half)
    angle = (jnp.asarray(positions, wide)[:, None] * frequency_h[None]).reshape(1, -1, 1, half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def scaled_dot_product(
    query_btnh: jax.Array,
    key_bskh: jax.Array,
    value_bskh: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> jax.Array:
    """Each query's mean of the values, weighed by how well it fits their keys: ``softmax(q k' / sqrt(h)) v``.

    This is ``jax.nn.dot_product_attention``, but for float64, whose softmax that one takes in float32.

    Args:
      query_btnh: shape (batch, queries, heads, width).
      key_bskh, value_bskh: shape (batch, keys, key heads, width); ``heads`` must be a multiple of ``key heads``, whose
        each is shared by as many neighbouring heads.
      mask: booleans that broadcast to (batch, heads, queries, keys), True where a key may be read. A query that may
        read none gets the mean of all values.
      causal: query ``t`` reads the keys up to ``t`` alone.
      implementation: of ``jax.nn.dot_product_attention``.

    Returns:
      An array like ``query_btnh``.

    Source: Vaswani et al. 2017, arXiv:1706.03762; shared keys: Ainslie et al. 2023, arXiv:2305.13245.

    >>> ones = jnp.ones((1, 3, 2, 4))
    >>> scaled_dot_product(ones, ones, ones, causal=True).shape
    (1, 3, 2, 4)
    """
    if query_btnh.dtype != jnp.float64:
        return jax.nn.dot_product_attention(
            query_btnh, key_bskh, value_bskh, mask=mask, is_causal=causal, implementation=implementation
        )
    (batch, queries, heads, width), keys, key_heads = query_btnh.shape, key_bskh.shape[1], key_bskh.shape[2]
    grouped = query_btnh.reshape(batch, queries, key_heads, heads // key_heads, width)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key_bskh) / width**0.5
    kept = jnp.ones((1, 1, queries, keys), bool) if mask is None else mask
    if causal:
        kept = kept & jnp.tril(jnp.ones((1, 1, queries, keys), bool))
    kept = jnp.broadcast_to(kept, (batch, heads, queries, keys)).reshape(scores.shape)
    weights = jax.nn.softmax(jnp.where(kept, scores, -1e300), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value_bskh).reshape(query_btnh.shape)


def attention(
    width: int,
    heads: int,
    kv_heads: int | None = None,
    *,
    causal: bool,
    rotary_base: Scalar | None = None,
    kernel_init: str | Initializer = "lecun",
    output_scale: Scalar = 1.0,
    implementation: Literal["xla", "cudnn"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Attention:
    """Self-attention with several heads: queries, keys and values of every token, and a mix of what the heads read.

    Args:
      width: features of a token, a multiple of ``heads``.
      heads: each reads ``width / heads`` features.
      kv_heads: how many different keys and values there are; must divide ``heads``, as many by default.
      causal: each token reads itself and those before it.
      rotary_base: turn queries and keys by their positions, see ``rotary``; None leaves them.
      kernel_init: an initialiser or its name.
      output_scale: a factor on the output's kernel at the beginning.
      implementation: of ``jax.nn.dot_product_attention``.
      dtype: of the parameters.

    Raises:
      ValueError: if the sizes do not divide each other.

    >>> layer = attention(8, heads=2, causal=True)
    >>> outputs, _ = layer.apply(layer.init(jax.random.key(0)), jnp.ones((1, 3, 8)), jnp.arange(3), None)
    >>> outputs.shape
    (1, 3, 8)
    """
    width, heads = check_count("width", width), check_count("heads", heads)
    kv_heads = heads if kv_heads is None else check_count("kv_heads", kv_heads)
    if width % heads or heads % kv_heads:
        raise ValueError(f"heads must divide width, and kv_heads heads; got {width=}, {heads=}, {kv_heads=}")
    head_width = width // heads
    if rotary_base is not None:
        check_number("rotary_base", rotary_base, low=0.0, low_open=True)
        if head_width % 2:
            raise ValueError(f"rotary positions turn pairs of features: width / heads must be even, got {head_width}")
    make = initializer(kernel_init)
    parts = {
        "query": dense(width, width, bias=False, kernel_init=make, dtype=dtype),
        "key": dense(width, kv_heads * head_width, bias=False, kernel_init=make, dtype=dtype),
        "value": dense(width, kv_heads * head_width, bias=False, kernel_init=make, dtype=dtype),
        "output": dense(width, width, bias=False, kernel_init=scaled_initializer(make, output_scale), dtype=dtype),
    }

    def init(key):
        return {name: part.init(k) for (name, part), k in zip(parts.items(), jax.random.split(key, 4), strict=True)}

    @automatic_axes(like="inputs_btd", when="params")
    def apply(params, inputs_btd, positions_t, mask=None, cache=None):
        def heads_of(name):
            return parts[name].apply(params[name], inputs_btd).reshape(*inputs_btd.shape[:2], -1, head_width)

        query, key, value = heads_of("query"), heads_of("key"), heads_of("value")
        if rotary_base is not None:
            query, key = rotary(query, positions_t, rotary_base), rotary(key, positions_t, rotary_base)
        if cache is not None:
            at = (0, positions_t[0], 0, 0)
            cache = Cache(
                jax.lax.dynamic_update_slice(cache.key, key.astype(cache.key.dtype), at),
                jax.lax.dynamic_update_slice(cache.value, value.astype(cache.value.dtype), at),
            )
            key, value = cache.key.astype(query.dtype), cache.value.astype(query.dtype)
            slots = jnp.arange(key.shape[1])
            so_far = slots[None] <= positions_t[:, None]  # what lies further on has not been written
            mask = so_far.reshape(1, 1, *so_far.shape)
        mixed = scaled_dot_product(
            query, key, value, mask, causal=causal and cache is None, implementation=implementation
        )
        return parts["output"].apply(params["output"], mixed.reshape(inputs_btd.shape)), cache

    return Attention(init, apply)
