"""Transformers: a language model that predicts the next token, and an encoder that classifies a sequence."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_dtype, known
from nnlearn.models.attention import Cache
from nnlearn.models.blocks import BlockSettings, transformer_blocks
from nnlearn.models.factory import model_factory
from nnlearn.models.layers import dense, rms_norm
from nnlearn.models.layers import dropout as dropout_layer
from nnlearn.models.named import Initializer
from nnlearn.models.parameters import EMBEDDING_INIT, draw_parameter, parameter
from nnlearn.sharding.axes import automatic, explicit_spec, matmul, take_rows
from nnlearn.tree import compute_dtype as wide_dtype
from nnlearn.tree import safe_divide
from nnlearn.types import DTypeLike, Key, Model, Params, Scalar


class LanguageModel(NamedTuple):
    """A network that predicts each next token, as pure functions; made by ``transformer``.

    Attributes:
      init: ``init(key) -> params``.
      apply: ``apply(params, tokens_bt, key=None, *, where=None) -> logits_btv``; a key means training.
      hidden: the network without its head: ``hidden(...) -> hidden_btd``, after the last norm.
      head: ``head(params) -> kernel_dv``, with ``logits = hidden @ head``; a loss that takes both need not store the
        logits.
      empty_cache: ``empty_cache(batch, length) -> cache`` for ``batch`` sequences of up to ``length`` tokens.
      decode: ``decode(params, tokens_bt, cache, position) -> (logits_btv, cache)``: processes the tokens that follow
        those in the cache; the first is at ``position``. A traced ``position`` beyond the cache is not detected.
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
    """A decoder-only transformer, as in GPT: each token attends to those up to itself and predicts the next.

    With ``h`` the embedded tokens, each layer adds ``attention(norm(h))`` and then ``mlp(norm(h))`` to ``h``; the
    logits are ``norm(h) @ head``. The norms are RMSNorm. There are no biases.

    Args:
      vocabulary: number of distinct tokens.
      layers, width, heads: number of blocks, features per token, and attention heads, which must divide ``width``.
      max_length: length of the longest sequence.
      kv_heads: number of key and value heads, which the query heads share; ``heads`` by default.
      hidden: features inside the perceptron; by default 4 times the width, or about 8/3 with ``"swiglu"``.
      activation: ``"swiglu"`` for ``silu(gate) * up``; or a function of one array or its name, such as ``"gelu"``.
      positions: ``"rotary"`` rotates queries and keys, see ``rotary``; ``"learned"`` adds one vector per position.
      rotary_base: see ``rotary``.
      dropout: the fraction dropped of the embedded tokens and of the output of each half of a block; may be traced.
      tied: whether the head shares the embedding's kernel.
      scan: whether to run the layers as one loop over parameters stacked on a first axis, which takes the time of one
        layer to compile.
      remat: whether the backward pass recomputes the activations inside each block instead of storing them.
      kernel_init: an initialiser or its name. The two outputs of each block are scaled by ``1 / sqrt(2 layers)``. The
        embedding, and an untied head, are normal with a standard deviation of 0.02.
      implementation: passed to ``jax.nn.dot_product_attention``; ``"cudnn"`` needs an NVIDIA device and 16-bit dtypes.
      dtype: of the parameters.
      compute_dtype: dtype of the activations, to which the parameters are cast; norms, softmax and logits are computed
        in float32 at least. By default the parameters' dtype.

    Returns:
      A ``LanguageModel`` from integer tokens (batch, length) to logits (batch, length, vocabulary). ``where``, booleans
      (batch, length), marks padding with False: no token attends to it, and its own logits are meaningless. A token
      outside the vocabulary gives NaN. Params are ``{"embedding", "blocks", "norm"}``, plus ``positions`` if learned
      and ``head`` if untied.

    Raises:
      ValueError: if the sizes do not fit together; in ``apply``, if the sequence is longer than ``max_length``, or
        tokens are not of shape (batch, length).
      TypeError: in ``apply``, if the tokens are not integers.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners"; tying, Press and Wolf 2017, arXiv:1608.05859; SwiGLU, Shazeer 2020, arXiv:2002.05202.

    >>> model = transformer(10, layers=2, width=8, heads=2, max_length=16)
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> tokens = jnp.array([[1, 2, 3], [4, 5, 6]])
    >>> jax.jit(model.apply)(params, tokens).shape, jax.eval_shape(model.hidden, params, tokens).shape
    ((2, 3, 10), (2, 3, 8))
    """
    trunk = _trunk(
        vocabulary,
        max_length,
        positions,
        compute_dtype,
        BlockSettings(
            layers,
            width,
            heads,
            kv_heads,
            hidden,
            causal=True,
            activation=activation,
            rotary_base=rotary_base,
            dropout=dropout,
            kernel_init=kernel_init,
            scan=scan,
            remat=remat,
            implementation=implementation,
            dtype=dtype,
        ),
    )
    name = "transformer"
    kv_shape = (heads if kv_heads is None else kv_heads, width // heads)

    def init(key):
        keys = jax.random.split(key, 3)
        params = trunk.init(keys[0], keys[1])
        if not tied:
            params["head"] = {"kernel": draw_parameter(EMBEDDING_INIT, keys[2], (width, vocabulary), dtype)}
        return params

    def hidden_of(params, tokens_bt, key=None, *, where=None):
        return trunk.apply(params, tokens_bt, key, where)[0]

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
        empty = jnp.zeros((layers, batch, length, *kv_shape), trunk.dtype)
        return Cache(empty, empty)

    def decode(params, tokens_bt, cache, position):
        slots, tokens = cache.key.shape[2], tokens_bt.shape[1]
        if known(position) and not 0 <= position <= slots - tokens:
            raise ValueError(f"position={position} and {tokens} tokens go beyond the cache of {slots}")

        def run(params, tokens_bt, cache, position):
            h, cache = trunk.apply(params, tokens_bt, cache=cache, position=position)
            return logits_of(params, h), cache

        batch = explicit_spec(tokens_bt)[0]
        spec = lambda array: (batch,) if array.ndim == 3 else (None, batch)  # noqa: E731
        return automatic(run, params, tokens_bt, cache, position, spec=spec)

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
    """A bidirectional transformer, as in BERT: each token attends to all others, and the sequence is classified.

    Args:
      vocabulary: number of distinct tokens.
      outputs: number of outputs per sequence: the classes, or 1 for a regression.
      layers, width, heads, max_length: see ``transformer``.
      pool: the features of a sequence: the ``"mean"`` over its tokens, or its ``"first"`` token.
      kv_heads, hidden, activation, positions, rotary_base, dropout, scan, remat: see ``transformer``.
      kernel_init, implementation, dtype, compute_dtype: see ``transformer``.

    Returns:
      A model from integer tokens (batch, length) to logits (batch, outputs): ``apply(params, tokens, key=None, *,
      where=None)``, where ``where``, booleans (batch, length), marks padding with False.

    Raises:
      ValueError: if the sizes do not fit together, or ``pool`` is unknown.

    Source: Devlin et al. 2019, "BERT", arXiv:1810.04805, with RMSNorm before each half of a block.

    >>> model = encoder(10, 3, layers=1, width=8, heads=2, max_length=4)
    >>> run = lambda key: model.apply(model.init(key), jnp.array([[1, 2, 3]]), where=jnp.array([[True, True, False]]))
    >>> jax.eval_shape(run, jax.random.key(0)).shape
    (1, 3)
    """
    if pool not in ("mean", "first"):
        raise ValueError(f"pool must be 'mean' or 'first', got {pool!r}")
    trunk = _trunk(
        vocabulary,
        max_length,
        positions,
        compute_dtype,
        BlockSettings(
            layers,
            width,
            heads,
            kv_heads,
            hidden,
            causal=False,
            activation=activation,
            rotary_base=rotary_base,
            dropout=dropout,
            kernel_init=kernel_init,
            scan=scan,
            remat=remat,
            implementation=implementation,
            dtype=dtype,
        ),
    )
    output = dense(width, outputs, dtype=dtype)

    def init(key):
        keys = jax.random.split(key, 3)
        return trunk.init(keys[0], keys[1]) | {"output": output.init(keys[2])}

    def apply(params, tokens_bt, key=None, *, where=None):
        h, _ = trunk.apply(params, tokens_bt, key, where)
        h = h.astype(wide_dtype(h.dtype))
        if pool == "first":
            pooled_bd = h[:, 0]
        else:
            counts_bt1 = jnp.ones(h.shape[:2] + (1,), h.dtype) if where is None else where[..., None].astype(h.dtype)
            pooled_bd = safe_divide(jnp.sum(h * counts_bt1, axis=1), jnp.sum(counts_bt1, axis=1))
        return output.apply(params["output"], pooled_bd)

    return Model(init, apply)


class _Trunk(NamedTuple):
    """The part that both transformers share: embedded tokens, blocks and a last norm.

    Attributes:
      init: ``init(embedding_key, blocks_key) -> params``.
      apply: ``apply(params, tokens_bt, key=None, where=None, cache=None, position=0) -> (hidden_btd, cache)``.
      dtype: of the activations, and of the parameters where they are used.
    """

    init: Callable[[Key, Key], dict[str, Params]]
    apply: Callable[..., tuple[jax.Array, Cache | None]]
    dtype: DTypeLike


def _trunk(
    vocabulary: int,
    max_length: int,
    positions: str,
    compute_dtype: DTypeLike | None,
    settings: BlockSettings,
) -> _Trunk:
    vocabulary, max_length = check_count("vocabulary", vocabulary), check_count("max_length", max_length)
    if positions not in ("rotary", "learned"):
        raise ValueError(f"positions must be 'rotary' or 'learned', got {positions!r}")
    learned, width, name = positions == "learned", settings.width, "transformer"
    dtype = check_dtype("dtype", settings.dtype)
    compute = check_dtype("compute_dtype", compute_dtype) or dtype
    drop = dropout_layer(settings.dropout)
    blocks = transformer_blocks(settings._replace(rotary_base=None) if learned else settings)
    norm = rms_norm(width, dtype=dtype)

    def init(embedding_key, blocks_key):
        keys = jax.random.split(embedding_key)
        params = {"embedding": {"kernel": draw_parameter(EMBEDDING_INIT, keys[0], (vocabulary, width), dtype)}}
        if learned:
            params["positions"] = {"kernel": draw_parameter(EMBEDDING_INIT, keys[1], (max_length, width), dtype)}
        return params | {"blocks": blocks.init(blocks_key), "norm": norm.init(blocks_key)}

    def embed(params, tokens_bt, positions_t, key, where):
        tokens_bt = tokens_bt.astype(jnp.int32)
        if where is not None:
            tokens_bt = jnp.where(where, tokens_bt, 0)
        kernel = parameter(name, params["embedding"], "kernel", (vocabulary, width))
        # A negative index would wrap around; this one is out of range and gives NaN.
        h = take_rows(kernel, jnp.where(tokens_bt < 0, vocabulary, tokens_bt)).astype(compute)
        if learned:
            table = parameter(name, params["positions"], "kernel", (max_length, width))
            h = h + take_rows(table, positions_t)[None].astype(compute)
        return drop.apply({}, h, key)

    def apply(params, tokens_bt, key=None, where=None, cache=None, position=0):
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        tokens_bt = jnp.asarray(tokens_bt)
        _check_tokens(tokens_bt, where, max_length)
        positions_t = position + jnp.arange(tokens_bt.shape[1])
        h = embed(params, tokens_bt, positions_t, embed_key, where)
        mask = None if where is None else where[:, None, None, :]
        cast_blocks = jax.tree.map(lambda leaf: leaf.astype(compute), params["blocks"])
        h, cache = blocks.apply(cast_blocks, h, positions_t, mask, blocks_key, cache)
        return norm.apply(params["norm"], h), cache

    return _Trunk(init, apply, compute)


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
