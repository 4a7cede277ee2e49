"""Sampling from a language model, token by token, with a cache of keys and values."""

import functools

import jax
import jax.numpy as jnp

from nnlearn.checks import as_key, check_count, check_nonnegative, check_number
from nnlearn.models.transformer import LanguageModel
from nnlearn.sharding.axes import automatic_axes
from nnlearn.tree import compute_dtype
from nnlearn.types import Key, Params, Scalar

MIN_TEMPERATURE = 1e-6  # below this, top_p keeps only the largest logit


def sample_token(
    key: Key,
    logits: jax.Array,
    temperature: Scalar = 1.0,
    *,
    top_k: Scalar | None = None,
    top_p: Scalar | None = None,
) -> jax.Array:
    """Sample a token from ``softmax(logits / temperature)``, optionally truncated to the most likely tokens.

    Computed as ``argmax(logits + temperature * g)`` with Gumbel noise ``g``. So a temperature of 0 gives the most
    likely token, and ``temperature``, ``top_k`` and ``top_p`` may be traced.

    Args:
      key: a random key.
      logits: shape (..., vocabulary).
      temperature: >= 0.
      top_k: keep only this many of the most likely tokens, >= 1.
      top_p: keep only the most likely tokens whose total probability reaches this value, in (0, 1].

    Returns:
      Tokens of shape (...), int32.

    Raises:
      ValueError: if an argument is out of range.

    Source: Gumbel 1954, *Statistical Theory of Extreme Values*; ``top_k``, Fan et al. 2018, arXiv:1805.04833;
    ``top_p``, Holtzman et al. 2019, arXiv:1904.09751.

    >>> sample_token(jax.random.key(0), jnp.array([0.0, 3.0, 1.0]), 0.0)
    Array(1, dtype=int32)
    """
    check_nonnegative("temperature", temperature)
    _check_cuts(top_k, top_p)
    logits = jnp.asarray(logits).astype(compute_dtype(jnp.asarray(logits).dtype))
    if top_k is not None or top_p is not None:
        logits = jnp.where(_truncation_mask(logits, temperature, top_k, top_p), logits, -jnp.inf)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)


def _check_cuts(top_k: Scalar | None, top_p: Scalar | None) -> None:
    if top_k is not None:
        check_number("top_k", top_k, low=1)
    if top_p is not None:
        check_number("top_p", top_p, low=0.0, high=1.0, low_open=True)


def _truncation_mask(logits: jax.Array, temperature: Scalar, top_k: Scalar | None, top_p: Scalar | None) -> jax.Array:
    order = jnp.argsort(-logits, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    keep = jnp.ones(logits.shape, bool)
    if top_k is not None:
        keep = keep & (rank < top_k)
    if top_p is not None:
        cut = jnp.where(keep, logits, -jnp.inf)
        largest = jnp.max(cut, axis=-1, keepdims=True)
        probability = jax.nn.softmax((cut - largest) / jnp.maximum(temperature, MIN_TEMPERATURE), axis=-1)
        ordered = jnp.take_along_axis(probability, order, axis=-1)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        keep = keep & jnp.take_along_axis(before < top_p, rank, axis=-1)
    return keep


@automatic_axes(like="prompt")
def generate(
    model: LanguageModel,
    params: Params,
    prompt: jax.Array,
    length: int,
    key: Key | int,
    *,
    temperature: Scalar = 1.0,
    top_k: Scalar | None = None,
    top_p: Scalar | None = None,
) -> jax.Array:
    """Continue a prompt, in one compiled program with a cache, so that each step processes one token.

    Args:
      model: made by ``transformer``.
      params: its parameters.
      prompt: integer tokens, shape (batch, prompt length), one at least.
      length: number of tokens to add; together with the prompt at most the model's ``max_length``.
      key: a random key, or a seed.
      temperature, top_k, top_p: see ``sample_token``; a new value does not trigger recompilation.

    Returns:
      The tokens added, int32 of shape (batch, length).

    Raises:
      ValueError: if the sequence would be longer than the model's ``max_length``, or an argument is out of range.

    >>> from nnlearn.models.transformer import transformer
    >>> model = transformer(10, layers=1, width=8, heads=2, max_length=16)
    >>> generate(model, jax.jit(model.init)(jax.random.key(0)), jnp.array([[1, 2, 3]]), 5, 0).shape
    (1, 5)
    """
    prompt, length = jnp.asarray(prompt), check_count("length", length)
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must be (batch, length) with at least one token, got shape {prompt.shape}")
    check_nonnegative("temperature", temperature)
    _check_cuts(top_k, top_p)
    return _compiled_generate(model, length, params, prompt, as_key(key), temperature, top_k, top_p)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled_generate(model, length, params, prompt, key, temperature, top_k, top_p):
    draw = functools.partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p)
    batch, start = prompt.shape
    cache = model.empty_cache(batch, start + length)
    logits_btv, cache = model.decode(params, prompt, cache, 0)
    first_b = draw(jax.random.fold_in(key, 0), logits_btv[:, -1])

    def decode_one(carry, index):
        token_b, cache = carry
        logits_btv, cache = model.decode(params, token_b[:, None], cache, start + index - 1)
        token_b = draw(jax.random.fold_in(key, index), logits_btv[:, 0])
        return (token_b, cache), token_b

    _, rest_tb = jax.lax.scan(decode_one, (first_b, cache), jnp.arange(1, length))
    return jnp.concatenate([first_b[None], rest_tb]).T
