"""Multi-head self-attention with rotary positions, on whole sequences or incrementally with a cache."""

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
    ``mask`` is boolean, of shape (batch or 1, 1, queries, keys), or None for all keys. A cache is updated at
    ``positions_t`` before it is read.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., tuple[jax.Array, Cache | None]]


def rotary(x: jax.Array, positions: jax.Array, base: Scalar = 10000.0) -> jax.Array:
    """Rotary position embedding: rotate pairs of features by angles proportional to the position.

    Feature ``i`` of the first half and feature ``i`` of the second half are rotated as a point of the plane by the
    angle ``position * base ** (-2 i / width)``::

        a, b -> a cos - b sin, b cos + a sin

    The inner product of a query at position ``m`` and a key at position ``n`` then depends on positions only through
    ``m - n``.

    Args:
      x: queries or keys, shape (batch, length, heads, width) with an even width.
      positions: positions of the tokens, shape (length,).
      base: > 0; the slowest pair completes one rotation in about ``2 pi base`` tokens.

    Returns:
      An array like ``x``. Angles are computed in float32 at least.

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
    """Scaled dot-product attention, ``softmax(q k' / sqrt(h)) v``.

    This calls ``jax.nn.dot_product_attention``, except for float64, for which that function computes the softmax in
    float32.

    Args:
      query_btnh: shape (batch, queries, heads, width).
      key_bskh, value_bskh: shape (batch, keys, key heads, width); ``heads`` must be a multiple of ``key heads``. Each
        key head serves a group of consecutive query heads.
      mask: booleans that broadcast to (batch, heads, queries, keys), True where a query attends to a key. A query that
        attends to no key gets the mean of all values.
      causal: whether query ``t`` attends only to keys up to ``t``.
      implementation: passed to ``jax.nn.dot_product_attention``.

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
    """Multi-head self-attention, with projections to queries, keys and values and of the output.

    Args:
      width: features of a token, a multiple of ``heads``.
      heads: number of query heads, of ``width / heads`` features each.
      kv_heads: number of key and value heads, which must divide ``heads``; by default equal to it.
      causal: whether each token attends only to itself and earlier tokens.
      rotary_base: the base of rotary positions, see ``rotary``; None for no positions.
      kernel_init: an initialiser or its name.
      output_scale: factor on the initial kernel of the output.
      implementation: passed to ``jax.nn.dot_product_attention``.
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
            raise ValueError(f"rotary positions rotate pairs of features: width / heads must be even, got {head_width}")
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
            so_far = slots[None] <= positions_t[:, None]  # later slots are not written yet
            mask = so_far.reshape(1, 1, *so_far.shape)
        mixed = scaled_dot_product(
            query, key, value, mask, causal=causal and cache is None, implementation=implementation
        )
        return parts["output"].apply(params["output"], mixed.reshape(inputs_btd.shape)), cache

    return Attention(init, apply)
