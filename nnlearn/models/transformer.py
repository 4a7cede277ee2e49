"""The transformer that predicts the next token, and the one that classifies a sequence."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_dtype, known
from nnlearn.models.attention import Cache
from nnlearn.models.blocks import transformer_blocks
from nnlearn.models.factory import model_factory, parameter
from nnlearn.models.layers import _drawn, dense, rms_norm
from nnlearn.models.layers import dropout as dropout_layer
from nnlearn.models.named import Initializer
from nnlearn.sharding.axes import automatic, explicit_spec, matmul, take_rows
from nnlearn.tree import compute_dtype as wide_dtype
from nnlearn.tree import safe_divide
from nnlearn.types import DTypeLike, Key, Model, Params, Scalar

EMBEDDING_STD = 0.02
normal_embedding = jax.nn.initializers.normal(EMBEDDING_STD)


class LanguageModel(NamedTuple):
    """A network that predicts each next token, as pure functions; made by ``transformer``.

    Attributes:
      init: ``init(key) -> params``.
      apply: ``apply(params, tokens_bt, key=None, *, where=None) -> logits_btv``; a key means training.
      hidden: the same without the head: ``hidden(...) -> hidden_btd``, after the last norm.
      head: ``head(params) -> kernel_dv``, so that ``logits = hidden @ head`` and a loss can do without the logits.
      empty_cache: ``empty_cache(batch, length) -> cache`` for that many sequences of up to that many tokens.
      decode: ``decode(params, tokens_bt, cache, position) -> (logits_btv, cache)``: the next tokens, the first of which
        is at ``position``, after those in the cache. Where that is traced, nobody sees a cache that is too short.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., jax.Array]
    hidden: Callable[..., jax.Array]
    head: Callable[[Params], jax.Array]
    empty_cache: Callable[[int, int], Cache]
    decode: Callable[..., tuple[jax.Array, Cache]]


@model_factory
def transformer(
    vocabulary: int,
    *,
    layers: int,
    width: int,
    heads: int,
    max_length: int,
    kv_heads: int | None = None,
    hidden: int | None = None,
    activation: str | Callable[[jax.Array], jax.Array] = "gelu",
    positions: Literal["rotary", "learned"] = "rotary",
    rotary_base: Scalar = 10000.0,
    dropout: Scalar = 0.0,
    tied: bool = True,
    scan: bool = False,
    remat: bool = False,
    kernel_init: str | Initializer = "lecun",
    implementation: Literal["xla", "cudnn"] | None = None,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
) -> LanguageModel:
    """The GPT kind of transformer: each token reads those before it, and predicts the next.

    With ``h`` the embedded tokens, each layer adds ``attention(norm(h))`` and then ``mlp(norm(h))`` to ``h``; the
    logits are ``norm(h) @ head``. Norms are RMSNorm, and nothing has a bias.

    Args:
      vocabulary: how many different tokens there are.
      layers, width, heads: blocks, features of a token, and attention heads, which must divide the width.
      max_length: the longest sequence.
      kv_heads: how many different keys and values the heads share; as many as heads by default.
      hidden: features inside the perceptron; 4 times the width by default, about 8/3 with ``"swiglu"``.
      activation: ``"swiglu"`` for ``silu(gate) * up``; or a function of one array or its name, such as ``"gelu"``.
      positions: ``"rotary"`` turns queries and keys by ``rotary_base``; ``"learned"`` adds a parameter per position.
      rotary_base: see ``rotary``.
      dropout: the fraction dropped of the embedded tokens and of what each half of a block adds; may be traced.
      tied: the embedding is the head as well.
      scan: the layers are one loop over parameters stacked on a first axis: compiles in the time of one layer.
      remat: a derivative works the insides of the blocks out again instead of keeping them.
      kernel_init: an initialiser or its name. Those of each block's two outputs are made ``1 / sqrt(2 layers)`` as
        large; the embedding is normal with a standard deviation of 0.02, and so is a head of its own.
      implementation: of ``jax.nn.dot_product_attention``; ``"cudnn"`` on NVIDIA's devices, at 16 bits.
      dtype: of the parameters.
      compute_dtype: what parameters and activations are cast to; norms, softmax and logits are float32 at least. By
        default the parameters' dtype.

    Returns:
      A ``LanguageModel`` of integer tokens (batch, length) to logits (batch, length, vocabulary). ``where``, booleans
      (batch, length), leaves padding out: no token reads it, whatever it holds, and its own logits mean nothing. A
      token outside of the vocabulary makes NaN. Params are ``{"embedding", "blocks", "norm"}``, with ``positions`` and
      ``head`` where they are learned or apart.

    Raises:
      ValueError: a size does not fit; in ``apply``, the tokens are too many, or no array (batch, length).
      TypeError: in ``apply``, the tokens are not integers.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners"; tying, Press and Wolf 2017, arXiv:1608.05859; SwiGLU, Shazeer 2020, arXiv:2002.05202.

    >>> model = transformer(10, layers=2, width=8, heads=2, max_length=16)
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> tokens = jnp.array([[1, 2, 3], [4, 5, 6]])
    >>> jax.jit(model.apply)(params, tokens).shape, jax.eval_shape(model.hidden, params, tokens).shape
    ((2, 3, 10), (2, 3, 8))
    """
    embed = _embedding(vocabulary, width, max_length, positions, dropout, dtype, compute_dtype)
    blocks = transformer_blocks(
        layers,
        width,
        heads,
        kv_heads,
        hidden,
        causal=True,
        activation=activation,
        rotary_base=rotary_base if positions == "rotary" else None,
        dropout=dropout,
        kernel_init=kernel_init,
        scan=scan,
        remat=remat,
        implementation=implementation,
        dtype=dtype,
    )
    norm, name = rms_norm(width, dtype=dtype), "transformer"
    kv_shape = (heads if kv_heads is None else kv_heads, width // heads)

    def init(key):
        keys = jax.random.split(key, 3)
        params = embed.init(keys[0]) | {"blocks": blocks.init(keys[1]), "norm": norm.init(key)}
        head = {} if tied else {"head": {"kernel": _drawn(normal_embedding, keys[2], (width, vocabulary), dtype)}}
        return params | head

    def run(params, tokens_bt, key=None, where=None, cache=None, position=0):
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        h, positions_t = embed.apply(params, tokens_bt, embed_key, where, position)
        mask = None if where is None else where[:, None, None, :]
        h, cache = blocks.apply(embed.cast(params["blocks"]), h, positions_t, mask, blocks_key, cache)
        return norm.apply(params["norm"], h), cache

    def hidden_of(params, tokens_bt, key=None, *, where=None):
        return run(params, tokens_bt, key, where)[0]

    def head(params):
        if tied:
            return parameter(name, params["embedding"], "kernel", (vocabulary, width)).T
        return parameter(name, params["head"], "kernel", (width, vocabulary))

    def logits_of(params, h):
        kernel = head(params).astype(h.dtype)
        return matmul(h, kernel, preferred_element_type=wide_dtype(h.dtype))

    def apply(params, tokens_bt, key=None, *, where=None):
        return logits_of(params, hidden_of(params, tokens_bt, key, where=where))

    def empty_cache(batch, length):
        if length > max_length:
            raise ValueError(f"length must be at most max_length={max_length}, got {length}")
        empty = jnp.zeros((layers, batch, length, *kv_shape), embed.dtype)
        return Cache(empty, empty)

    def decode(params, tokens_bt, cache, position):
        slots, tokens = cache.key.shape[2], tokens_bt.shape[1]
        if known(position) and not 0 <= position <= slots - tokens:
            raise ValueError(f"position={position} and {tokens} tokens go beyond the cache of {slots}")

        def work_out(params, tokens_bt, cache, position):
            h, cache = run(params, tokens_bt, cache=cache, position=position)
            return logits_of(params, h), cache

        batch = explicit_spec(tokens_bt)[0]
        spec = lambda array: (batch,) if array.ndim == 3 else (None, batch)  # noqa: E731
        return automatic(work_out, params, tokens_bt, cache, position, spec=spec)

    return LanguageModel(init, apply, hidden_of, head, empty_cache, decode)


@model_factory
def encoder(
    vocabulary: int,
    outputs: int,
    *,
    layers: int,
    width: int,
    heads: int,
    max_length: int,
    pool: Literal["mean", "first"] = "mean",
    kv_heads: int | None = None,
    hidden: int | None = None,
    activation: str | Callable[[jax.Array], jax.Array] = "gelu",
    positions: Literal["rotary", "learned"] = "rotary",
    rotary_base: Scalar = 10000.0,
    dropout: Scalar = 0.0,
    scan: bool = False,
    remat: bool = False,
    kernel_init: str | Initializer = "lecun",
    implementation: Literal["xla", "cudnn"] | None = None,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
) -> Model:
    """The BERT kind of transformer: each token reads all others, and the sequence is put in classes.

    Args:
      vocabulary: how many different tokens there are.
      outputs: how many numbers describe a sequence: classes, or 1 for a regression.
      pool: what stands for a sequence: the ``"mean"`` of its tokens, or its ``"first"`` token.
      layers, width, heads, max_length: and all others as for ``transformer``.

    Returns:
      A model of integer tokens (batch, length) to logits (batch, outputs): ``apply(params, tokens, key=None, *,
      where=None)``, where ``where``, booleans (batch, length), leaves padding out.

    Raises:
      ValueError: a size does not fit, or ``pool`` is unknown.

    Source: Devlin et al. 2019, "BERT", arXiv:1810.04805, with RMSNorm before each half of a block.

    >>> model = encoder(10, 3, layers=1, width=8, heads=2, max_length=4)
    >>> run = lambda key: model.apply(model.init(key), jnp.array([[1, 2, 3]]), where=jnp.array([[True, True, False]]))
    >>> jax.eval_shape(run, jax.random.key(0)).shape
    (1, 3)
    """
    if pool not in ("mean", "first"):
        raise ValueError(f"pool must be 'mean' or 'first', got {pool!r}")
    embed = _embedding(vocabulary, width, max_length, positions, dropout, dtype, compute_dtype)
    blocks = transformer_blocks(
        layers,
        width,
        heads,
        kv_heads,
        hidden,
        causal=False,
        activation=activation,
        rotary_base=rotary_base if positions == "rotary" else None,
        dropout=dropout,
        kernel_init=kernel_init,
        scan=scan,
        remat=remat,
        implementation=implementation,
        dtype=dtype,
    )
    norm, output = rms_norm(width, dtype=dtype), dense(width, outputs, dtype=dtype)

    def init(key):
        keys = jax.random.split(key, 3)
        parts = {"blocks": blocks.init(keys[1]), "norm": norm.init(key), "output": output.init(keys[2])}
        return embed.init(keys[0]) | parts

    def apply(params, tokens_bt, key=None, *, where=None):
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        h, positions_t = embed.apply(params, tokens_bt, embed_key, where, 0)
        mask = None if where is None else where[:, None, None, :]
        h, _ = blocks.apply(embed.cast(params["blocks"]), h, positions_t, mask, blocks_key)
        h = norm.apply(params["norm"], h).astype(wide_dtype(h.dtype))
        if pool == "first":
            pooled_bd = h[:, 0]
        else:
            counts_bt1 = jnp.ones(h.shape[:2] + (1,), h.dtype) if where is None else where[..., None].astype(h.dtype)
            pooled_bd = safe_divide(jnp.sum(h * counts_bt1, axis=1), jnp.sum(counts_bt1, axis=1))
        return output.apply(params["output"], pooled_bd)

    return Model(init, apply)


class _Embedding(NamedTuple):
    init: Callable[[Key], Params]
    apply: Callable[..., tuple[jax.Array, jax.Array]]
    cast: Callable[[Params], Params]
    dtype: Any


def _embedding(vocabulary, width, max_length, positions, dropout, dtype, compute_dtype) -> _Embedding:
    """Tokens to features, and what both transformers check and cast alike."""
    vocabulary, max_length = check_count("vocabulary", vocabulary), check_count("max_length", max_length)
    if positions not in ("rotary", "learned"):
        raise ValueError(f"positions must be 'rotary' or 'learned', got {positions!r}")
    dtype = check_dtype("dtype", dtype)
    compute = check_dtype("compute_dtype", compute_dtype) or dtype
    drop, learned = dropout_layer(dropout), positions == "learned"

    def init(key):
        keys = jax.random.split(key)
        params = {"embedding": {"kernel": _drawn(normal_embedding, keys[0], (vocabulary, width), dtype)}}
        if learned:
            params["positions"] = {"kernel": _drawn(normal_embedding, keys[1], (max_length, width), dtype)}
        return params

    def apply(params, tokens_bt, key, where, position):
        tokens_bt = jnp.asarray(tokens_bt)
        _check_tokens(tokens_bt, where, max_length)
        tokens_bt = tokens_bt.astype(jnp.int32)
        if where is not None:
            tokens_bt = jnp.where(where, tokens_bt, 0)
        kernel = parameter("transformer", params["embedding"], "kernel", (vocabulary, width))
        h = take_rows(kernel, jnp.where(tokens_bt < 0, vocabulary, tokens_bt)).astype(compute)
        positions_t = position + jnp.arange(tokens_bt.shape[1])
        if learned:
            table = parameter("transformer", params["positions"], "kernel", (max_length, width))
            h = h + take_rows(table, positions_t)[None].astype(compute)
        return drop.apply({}, h, key), positions_t

    return _Embedding(init, apply, lambda tree: jax.tree.map(lambda leaf: leaf.astype(compute), tree), compute)


def _check_tokens(tokens_bt: jax.Array, where: jax.Array | None, max_length: int) -> None:
    if not jnp.issubdtype(tokens_bt.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {tokens_bt.dtype.name}")
    if tokens_bt.ndim != 2:
        raise ValueError(f"tokens must be (batch, length), got {tokens_bt.shape}; for one sequence give tokens[None]")
    if tokens_bt.shape[1] > max_length:
        raise ValueError(f"tokens of length {tokens_bt.shape[1]} are more than max_length={max_length}")
    if where is not None and (jnp.shape(where) != tokens_bt.shape or jnp.result_type(where) != jnp.bool_):
        raise ValueError(
            f"where must be booleans of the tokens' shape {tokens_bt.shape}, got {jnp.result_type(where).name} of "
            f"{jnp.shape(where)}"
        )
