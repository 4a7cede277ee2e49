"""The transformer against slow float64 references, and its invariance to later tokens, padding and implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnlearn.models.attention import rotary, scaled_dot_product
from nnlearn.models.generation import generate, sample_token
from nnlearn.models.transformer import LanguageModel, encoder, transformer

VOCABULARY, WIDTH, HEADS, KV_HEADS, LAYERS, LENGTH = 11, 12, 6, 2, 2, 7
SIZES = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "kv_heads": KV_HEADS, "max_length": 10}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
FORMS = {
    "plain": {},
    "gated, learned, head apart": {"activation": "swiglu", "positions": "learned", "tied": False},
}


def start(model):
    """Parameters large enough for every part to matter, as the initial residual kernels and embedding are small."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        is_scale = path[-1].key == "scale"
        return jnp.asarray(rng.normal(is_scale, 0.3, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


@functools.cache
def made(form="plain", kind="decoder", **options):
    settings = SIZES | FORMS[form] | options
    if kind == "encoder":
        settings.pop("tied", None)
        model = encoder(VOCABULARY, 3, **settings)
    else:
        model = transformer(VOCABULARY, **settings)
    return model, start(model)


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


# --- the reference ---------------------------------------------------------------------------------------------------


def slow_norm(x, scale):
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def slow_rotary(vector, position, base=10000.0):
    """With complex numbers made of feature i and feature i + half."""
    half = len(vector) // 2
    turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def slow_attention(params, x_td, turned, allowed):
    """One sequence, with a loop over queries and heads."""
    width = WIDTH // HEADS
    query, key, value = (x_td @ params[name]["kernel"] for name in ("query", "key", "value"))
    out = np.zeros_like(x_td)
    for head in range(HEADS):
        own = slice(head * width, (head + 1) * width)
        shared_head = head // (HEADS // KV_HEADS)
        shared = slice(shared_head * width, (shared_head + 1) * width)
        for t in range(len(x_td)):
            places = [s for s in range(len(x_td)) if allowed(t, s)]
            q = slow_rotary(query[t, own], t) if turned else query[t, own]
            keys = [slow_rotary(key[s, shared], s) if turned else key[s, shared] for s in places]
            scores = np.exp([q @ k / np.sqrt(width) for k in keys])
            out[t, own] = sum(w * value[s, shared] for w, s in zip(scores / scores.sum(), places, strict=True))
    return out @ params["output"]["kernel"]


def slow_hidden(params, tokens_t, allowed):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    h = params["embedding"]["kernel"][tokens_t]
    turned = "positions" not in params
    if not turned:
        h = h + params["positions"]["kernel"][: len(tokens_t)]
    for block in params["blocks"]:
        x = slow_norm(h, block["attention"]["norm"]["scale"])
        h = h + slow_attention(block["attention"], x, turned, allowed)
        mlp = block["mlp"]
        x = slow_norm(h, mlp["norm"]["scale"])
        up = x @ mlp["up"]["kernel"]
        if "gate" in mlp:
            gate = x @ mlp["gate"]["kernel"]
            up = gate / (1 + np.exp(-gate)) * up
        else:
            up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        h = h + up @ mlp["down"]["kernel"]
    return slow_norm(h, params["norm"]["scale"])


def slow_logits(params, tokens_t, allowed):
    kernel = params["head"]["kernel"] if "head" in params else params["embedding"]["kernel"].T
    return slow_hidden(params, tokens_t, allowed) @ np.asarray(kernel, np.float64)


@pytest.mark.parametrize("form", FORMS)
def test_decoder_matches_the_reference(form):
    model, params = made(form)
    logits = compiled(model)(params, TOKENS)
    expected = [slow_logits(params, row, lambda t, s: s <= t) for row in TOKENS]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    hidden = jax.jit(model.hidden)(params, TOKENS)
    by_hand = np.asarray(hidden) @ np.asarray(model.head(params))
    np.testing.assert_allclose(by_hand, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_encoder_matches_the_reference_with_padding(pool):
    model, params = made("plain", "encoder", pool=pool)
    lengths = (LENGTH, 4)
    where = np.arange(LENGTH)[None] < np.array(lengths)[:, None]
    logits = compiled(model)(params, TOKENS, where=where)
    for row, length, got in zip(TOKENS, lengths, logits, strict=True):
        hidden = slow_hidden(params, row[:length], lambda t, s: True)
        pooled = hidden.mean(0) if pool == "mean" else hidden[0]
        output = jax.tree.map(np.asarray, params["output"])
        np.testing.assert_allclose(got, pooled @ output["kernel"] + output["bias"], rtol=1e-4, atol=1e-4)


def test_double_precision_is_double():
    with jax.enable_x64(True):
        model = transformer(VOCABULARY, **SIZES, dtype=jnp.float64)
        params = start(model)
        logits = jax.jit(model.apply)(params, TOKENS)
        expected = [slow_logits(params, row, lambda t, s: s <= t) for row in TOKENS]
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-10)


# --- attention -------------------------------------------------------------------------------------------------------


def test_rotary_products_depend_on_the_distance_alone():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    @jax.jit
    def product(m, n, base):
        return jnp.sum(rotary(query, m[None], base) * rotary(key, n[None], base))

    def product(m, n, base, compiled=product):
        return float(compiled(jnp.array(m), jnp.array(n), base))

    for base in (10000.0, 50.0):
        assert product(3, 1, base) == pytest.approx(product(9, 7, base), abs=1e-5)
        assert product(3, 1, base) != pytest.approx(product(3, 2, base), abs=1e-2)
        assert product(4, 4, base) == pytest.approx(float(jnp.sum(query * key)), abs=1e-5)
    np.testing.assert_allclose(rotary(query, jnp.array([5]))[0, 0, 0], slow_rotary(query.ravel(), 5), atol=1e-5)


def test_the_rotary_base_may_be_traced_and_differentiated():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(base):
        return jnp.sum(rotary(query, jnp.array([3]), base) * rotary(key, jnp.array([1]), base))

    value, slope = jax.jit(jax.vmap(jax.value_and_grad(product)))(jnp.array([49.5, 50.0, 50.5]))
    np.testing.assert_allclose(slope[1], value[2] - value[0], rtol=0.02)


def test_attention_with_a_mask_and_a_fully_masked_row():
    query, key, value = np.random.default_rng(0).normal(size=(3, 1, 4, 2, 6)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)

    def total(value):
        mixed = scaled_dot_product(query, key, value, jnp.asarray(mask[None, None]))
        return jnp.sum(mixed), mixed

    (_, got), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(value)
    for t, head in np.ndindex(3, 2):
        scores = np.where(mask[t], np.exp(key[0, :, head] @ query[0, t, head] / np.sqrt(6)), 0)
        expected = scores / scores.sum() @ value[0, :, head]
        np.testing.assert_allclose(got[0, t, head], expected, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(got)) and np.all(np.isfinite(gradient))


# --- invariances -----------------------------------------------------------------------------------------------------


def test_no_token_affects_earlier_ones():
    model, params = made()
    apply = compiled(model)
    logits = apply(params, TOKENS)
    for t in (1, LENGTH // 2, LENGTH - 1):
        other = TOKENS.copy()
        other[:, t] = (other[:, t] + 1) % VOCABULARY
        changed = apply(params, other)
        np.testing.assert_array_equal(changed[:, :t], logits[:, :t])
        assert np.all(np.any(changed[:, t:] != logits[:, t:], axis=-1))


def test_padding_with_any_content_has_no_effect():
    model, params = made()

    def loss(params, tokens, where):
        picked = jnp.where(where[..., None], model.apply(params, tokens, where=where), 0)
        return jnp.sum(picked**2), picked

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    where = np.array([[True] * LENGTH, [False] * 3 + [True] * (LENGTH - 3)])  # on the left: not causally masked
    (_, clean), clean_gradient = value_and_grad(params, np.where(where, TOKENS, 0), where)
    for junk in (-1, VOCABULARY + 100):
        (_, logits), gradient = value_and_grad(params, np.where(where, TOKENS, junk), where)
        np.testing.assert_array_equal(logits, clean)
        jax.tree.map(np.testing.assert_array_equal, gradient, clean_gradient)
    # rotary positions depend only on distances, so the padded row equals the short sequence
    alone = compiled(model)(params, TOKENS[1:, 3:])
    np.testing.assert_allclose(clean[1, 3:], alone[0], rtol=1e-4, atol=1e-4)
    _, nothing = value_and_grad(params, TOKENS, np.zeros_like(where))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(nothing))


def test_a_token_outside_the_vocabulary_gives_nan():
    model, params = made()
    for token in (-1, VOCABULARY):
        tokens = TOKENS.copy()
        tokens[0, 3] = token
        logits = compiled(model)(params, tokens)
        assert np.all(np.isnan(logits[0, 3:])) and np.all(np.isfinite(logits[1]))


@functools.cache
def loss_and_gradient(**options):
    model, params = made(dropout=0.3, **options)
    if "scan" in options:
        params = stacked(made(dropout=0.3)[1])

    def loss(params):
        return jnp.mean(jnp.square(model.apply(params, TOKENS, jax.random.key(3))))

    return jax.jit(jax.value_and_grad(loss))(params)


def stacked(tree):
    return tree | {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *tree["blocks"])}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"remat": True}, {"scan": True, "remat": True}])
def test_scan_and_remat_change_no_result(options):
    loss, gradient = loss_and_gradient()
    other_loss, other_gradient = loss_and_gradient(**options)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    gradient = stacked(gradient) if "scan" in options else gradient
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), other_gradient, gradient)


@pytest.mark.slow
def test_dropout_needs_a_key_and_its_rate_may_be_traced():
    model, params = made(dropout=0.5, layers=1)
    sure, _ = made(layers=1)
    np.testing.assert_allclose(compiled(model)(params, TOKENS), compiled(sure)(params, TOKENS), rtol=1e-5)
    one, again, other = (compiled(model)(params, TOKENS, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)

    def of_rate(rate):
        return transformer(VOCABULARY, **SIZES | {"layers": 1}, dropout=rate).apply(params, TOKENS, jax.random.key(1))

    both = jax.jit(jax.vmap(of_rate))(jnp.array([0.0, 0.5]))
    np.testing.assert_allclose(both[0], compiled(sure)(params, TOKENS), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both[1], one, rtol=1e-4, atol=1e-5)


def test_logits_are_float32_with_16_bit_computation():
    model, params = made()
    low, _ = made(compute_dtype=jnp.bfloat16)

    @jax.jit
    def run(params):
        def total(params):
            logits = low.apply(params, TOKENS)
            return jnp.sum(logits), logits

        (_, logits), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return logits, gradient, low.hidden(params, TOKENS)

    logits, gradient, hidden = run(params)
    assert logits.dtype == jnp.float32 and hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    exact = compiled(model)(params, TOKENS)
    assert 0 < np.max(np.abs(logits - exact)) < 0.1 * np.max(np.abs(exact))
    small = jax.eval_shape(transformer(VOCABULARY, **SIZES, dtype=jnp.bfloat16).init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(small)} == {jnp.dtype(jnp.bfloat16)}


def test_the_initial_loss_is_that_of_a_uniform_guess():
    layers = 6
    model = transformer(VOCABULARY, layers=layers, width=64, heads=2, max_length=10, scan=True)
    params = jax.jit(model.init)(jax.random.key(0))
    log_p = jax.nn.log_softmax(compiled(model)(params, TOKENS))
    assert float(-jnp.mean(log_p)) == pytest.approx(np.log(VOCABULARY), abs=0.1)
    mlp = jax.tree.map(np.asarray, params["blocks"]["mlp"])
    assert mlp["up"]["kernel"].std() == pytest.approx(64**-0.5, rel=0.05)
    assert mlp["down"]["kernel"].std() == pytest.approx((256 * 2 * layers) ** -0.5, rel=0.05)
    assert not np.allclose(mlp["up"]["kernel"][0], mlp["up"]["kernel"][1])  # each layer draws separately


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, scan", [("plain", False), ("plain", True), ("gated, learned, head apart", False)])
def test_decoding_with_the_cache_equals_the_whole_sequence(form, scan):
    model, params = made(form, scan=scan)
    whole = compiled(model)(params, TOKENS)
    cache = model.empty_cache(2, LENGTH + 2)
    decode = jax.jit(model.decode)
    logits, cache = decode(params, TOKENS[:, :3], cache, 0)
    np.testing.assert_allclose(logits, whole[:, :3], rtol=1e-4, atol=1e-4)
    for t in range(3, LENGTH):
        logits, cache = decode(params, TOKENS[:, t : t + 1], cache, t)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)


def test_greedy_generation_follows_the_whole_model():
    model, params = made("gated, learned, head apart")
    prompt, length = TOKENS[:, :4], 6
    got = generate(model, params, prompt, length, 0, temperature=0.0)
    written = np.concatenate([prompt, np.zeros((2, length), int)], axis=1)  # later tokens are not read
    for t in range(4, 4 + length):
        written[:, t] = np.argmax(compiled(model)(params, written)[:, t - 1], axis=-1)
    np.testing.assert_array_equal(got, written[:, 4:])
    assert len(set(written[:, 4:].ravel().tolist())) > 2


def test_sampling_follows_the_softmax():
    logits, draws = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), 4000

    @jax.jit
    def shares(temperature, top_k, top_p):
        def one(key):
            return sample_token(key, logits, temperature, top_k=top_k, top_p=top_p)

        tokens = jax.vmap(one)(jax.random.split(jax.random.key(0), draws))
        return jnp.mean(jax.nn.one_hot(tokens, 4), axis=0)

    np.testing.assert_allclose(shares(1.0, 4, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 2, 1.0), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 4, 0.9), np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(shares(0.5, 4, 1.0), squared / squared.sum(), atol=0.03)
    np.testing.assert_array_equal(shares(0.0, 4, 1.0), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares(1.0, 4, 1e-6), [1, 0, 0, 0])
    tied = jax.vmap(lambda key: sample_token(key, jnp.zeros(4), top_k=2))(jax.random.split(jax.random.key(0), 100))
    assert set(tied.tolist()) == {0, 1}


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 5}, "heads must divide width"),
        ({"kv_heads": 4}, "kv_heads heads"),
        ({"heads": 12, "kv_heads": 12}, "must be even"),
        ({"positions": "sinusoidal"}, "positions must be"),
        ({"activation": "sine"}, "activation must be"),
        ({"layers": 0}, "layers must be"),
        ({"rotary_base": -1.0}, "rotary_base must be"),
    ],
)
def test_errors_name_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        transformer(VOCABULARY, **SIZES | options)


def test_errors_name_wrong_tokens():
    model, params = made()
    with pytest.raises(TypeError, match="tokens must be integers"):
        model.apply(params, TOKENS.astype(np.float32))
    with pytest.raises(ValueError, match=r"tokens\[None\]"):
        model.apply(params, TOKENS[0])
    with pytest.raises(ValueError, match="max_length=10"):
        model.apply(params, np.zeros((1, 11), int))
    with pytest.raises(ValueError, match="where must be booleans"):
        model.apply(params, TOKENS, where=np.ones((2, 1), bool))
    with pytest.raises(ValueError, match="max_length=10"):
        generate(model, params, TOKENS, 4, 0)
    with pytest.raises(ValueError, match="prompt must be"):
        generate(model, params, TOKENS[0], 2, 0)
    with pytest.raises(ValueError, match="top_p must be"):
        sample_token(jax.random.key(0), jnp.zeros(3), top_p=0.0)
    with pytest.raises(ValueError, match="pool must be"):
        encoder(VOCABULARY, 2, **SIZES, pool="last")


def test_equal_settings_make_equal_models():
    first, second = (transformer(VOCABULARY, **SIZES) for _ in range(2))
    assert isinstance(first, LanguageModel) and first == second and hash(first) == hash(second)
    assert first != transformer(VOCABULARY, **SIZES, tied=False)
