"""The stack inside every transformer: blocks of attention and a perceptron, each with a norm and a skip connection."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count
from nnlearn.models.attention import Cache, attention
from nnlearn.models.layers import dense, rms_norm
from nnlearn.models.layers import dropout as dropout_layer
from nnlearn.models.named import Initializer, activation_function, initializer
from nnlearn.models.parameters import scaled_initializer
from nnlearn.sharding.axes import automatic_axes
from nnlearn.types import DTypeLike, Key, Params, Scalar


class BlockSettings(NamedTuple):
    """Settings of a stack of blocks; ``transformer`` describes each."""

    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    hidden: int | None = None
    causal: bool = True
    activation: str | Callable[[jax.Array], jax.Array] = "gelu"
    rotary_base: Scalar | None = 10000.0
    dropout: Scalar = 0.0
    kernel_init: str | Initializer = "lecun"
    scan: bool = False
    remat: bool = False
    implementation: Literal["xla", "cudnn"] | None = None
    dtype: DTypeLike = jnp.float32


class Blocks(NamedTuple):
    """A stack of blocks as two pure functions.

    ``init(key) -> params``; ``apply(params, hidden_btd, positions_t, mask, key=None, cache=None) -> (hidden_btd,
    cache)``. The cache stacks those of all layers; see ``LanguageModel.empty_cache``.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., tuple[jax.Array, Cache | None]]


def default_hidden(width: int, activation: str | Callable[[jax.Array], jax.Array]) -> int:
    """Features inside the perceptron: 4 times the width, or about 8/3 with a gate, which needs a third kernel.

    Source: Vaswani et al. 2017; Shazeer 2020, arXiv:2002.05202.

    >>> default_hidden(128, "gelu"), default_hidden(128, "swiglu")
    (512, 344)
    """
    return -(-8 * width // 24) * 8 if activation == "swiglu" else 4 * width


def transformer_blocks(settings: BlockSettings) -> Blocks:
    """Layers of ``h + dropout(attention(norm(h)))`` and then ``h + dropout(mlp(norm(h)))``.

    The initial kernels of the two outputs that are added to ``h`` are scaled by ``1 / sqrt(2 layers)``, so that the
    variance of ``h`` does not grow with the depth.

    Source: the order, Xiong et al. 2020, arXiv:2002.04745; the kernels, Radford et al. 2019, "Language Models are
    Unsupervised Multitask Learners", section 2.3.

    >>> blocks = transformer_blocks(BlockSettings(layers=3, width=8, heads=2, scan=True))
    >>> blocks.init(jax.random.key(0))["mlp"]["up"]["kernel"].shape
    (3, 8, 32)
    """
    activation, scan, dtype = settings.activation, settings.scan, settings.dtype
    layers, width = check_count("layers", settings.layers), check_count("width", settings.width)
    hidden = settings.hidden
    hidden = default_hidden(width, activation) if hidden is None else check_count("hidden", hidden)
    make, smaller = initializer(settings.kernel_init), (2 * layers) ** -0.5
    attend = attention(
        width,
        settings.heads,
        settings.kv_heads,
        causal=settings.causal,
        rotary_base=settings.rotary_base,
        kernel_init=make,
        output_scale=smaller,
        implementation=settings.implementation,
        dtype=dtype,
    )
    gated = activation == "swiglu"
    function = jax.nn.silu if gated else activation_function(activation)
    norm, drop = rms_norm(width, dtype=dtype), dropout_layer(settings.dropout)
    widen = dense(width, hidden, bias=False, kernel_init=make, dtype=dtype)
    narrow = dense(hidden, width, bias=False, kernel_init=scaled_initializer(make, smaller), dtype=dtype)
    mlp = {"gate": widen, "up": widen, "down": narrow} if gated else {"up": widen, "down": narrow}

    def init_block(key):
        keys = jax.random.split(key, 1 + len(mlp))
        return {
            "attention": attend.init(keys[0]) | {"norm": norm.init(key)},
            "mlp": {name: part.init(k) for (name, part), k in zip(mlp.items(), keys[1:], strict=True)}
            | {"norm": norm.init(key)},
        }

    def block(params, h, positions_t, mask, key, cache):
        keys = (None, None) if key is None else jax.random.split(key)
        part = params["attention"]
        mixed, cache = attend.apply(part, norm.apply(part["norm"], h), positions_t, mask, cache)
        h = h + drop.apply({}, mixed, keys[0])
        part = params["mlp"]
        x = norm.apply(part["norm"], h)
        up = widen.apply(part["up"], x)
        up = function(widen.apply(part["gate"], x)) * up if gated else function(up)
        return h + drop.apply({}, narrow.apply(part["down"], up), keys[1]), cache

    block = jax.checkpoint(block, prevent_cse=not scan) if settings.remat else block

    def init(key):
        # A loop, because one block's random numbers take as long to compile as the rest of the block.
        stacked = jax.lax.map(init_block, jax.random.split(key, layers))
        return stacked if scan else tuple(_layer(stacked, at) for at in range(layers))

    @automatic_axes(like="h", when="params")
    def apply(params, h, positions_t, mask=None, key=None, cache=None):
        keys = None if key is None else jax.random.split(key, layers)
        if scan:

            def scan_step(h, xs):
                part, layer_key, layer_cache = xs
                return block(part, h, positions_t, mask, layer_key, layer_cache)

            return jax.lax.scan(scan_step, h, (params, keys, cache))
        if len(params) != layers:
            raise ValueError(f"the transformer has {layers} layers, got the params of {len(params)}")
        caches = []
        for index, part in enumerate(params):
            layer_key, layer_cache = _layer((keys, cache), index)
            h, layer_cache = block(part, h, positions_t, mask, layer_key, layer_cache)
            caches.append(layer_cache)
        return h, None if cache is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)

    return Blocks(init, apply)


def _layer(stacked: Any, index: int) -> Any:
    """One layer of a tree of stacked arrays."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)
