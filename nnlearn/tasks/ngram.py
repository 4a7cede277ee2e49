"""Bits per character of compressors and n-gram models, as baselines for language models."""

import math
import zlib

import numpy as np

from nnlearn.checks import check_count

GZIP_WINDOW = 32768 - 262  # bytes of context for deflate: its window minus the longest match and margin


def gzip_bits(train: bytes, test: bytes) -> float:
    """Bits per character of ``gzip -9`` for a text that follows another; gzip sees the last 32 KiB of the latter.

    Deflate cannot look back further, so this is ``8 (len(gzip(train + test)) - len(gzip(train))) / len(test)`` up to a
    few bytes.

    Args:
      train: the preceding text.
      test: the text to compress, with one byte per character.

    >>> round(gzip_bits(b"tell me, " * 100, b"tell me, " * 100), 1)
    0.2
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=train[-GZIP_WINDOW:])
    return 8 * len(packer.compress(test) + packer.flush()) / len(test)


def ngram_bits(train: np.ndarray, test: np.ndarray, vocabulary: int, order: int = 5, skip: int = 0) -> float:
    """Bits per character of an n-gram model with interpolated Kneser-Ney smoothing.

    Let ``h`` be the last ``order - 1`` characters, ``h'`` the same without the oldest, ``c(hx)`` the number of times
    that ``x`` follows ``h``, and ``T(h)`` the number of different characters that follow ``h``. Then::

        p(x | h) = max(c(hx) - d, 0) / c(h) + d T(h) / c(h) p(x | h')

    and ``p(x | h) = p(x | h')`` if ``h`` does not occur. Below the highest order, ``c`` counts the different preceding
    characters instead of occurrences; below the lowest order, all characters are equally likely. The discount ``d`` is
    ``n1 / (n1 + 2 n2)``, with ``n1`` and ``n2`` the numbers of sequences of that order with counts 1 and 2, or 0.5 if
    no sequence has count 1.

    Args:
      train: indices of characters in [0, vocabulary), shape (size,), to count.
      test: indices of characters to predict, each from its predecessors.
      vocabulary: number of different characters.
      order: length of the longest sequences; ``vocabulary ** order`` must be below 2 ** 63.
      skip: number of characters at the start of ``test`` that serve as context only.

    Returns:
      The mean of ``-log2 p`` over ``test[skip:]``.

    Raises:
      ValueError: if the vocabulary is too large for the order.

    Source: Kneser and Ney 1995, "Improved backing-off for m-gram language modeling", ICASSP; the discount is Ney,
    Essen and Kneser's of 1994; interpolated as by Chen and Goodman 1999, Computer Speech and Language 13.

    >>> text = np.array([0, 1, 2] * 50)
    >>> ngram_bits(text, text, 3, order=2) < 0.1
    True
    """
    order = check_count("order", order)
    if vocabulary**order >= 2**63:
        raise ValueError(
            f"order={order} of vocabulary={vocabulary} has {vocabulary}**{order} sequences, more than 2**63"
        )
    train, test = np.asarray(train, np.int64), np.asarray(test, np.int64)
    probability = np.full(len(test), 1 / vocabulary)
    for length, (grams, counts) in zip(range(1, order + 1), _counts(train, vocabulary, order), strict=True):
        # The first length - 1 characters have too few predecessors and keep the shorter sequence's probability.
        asked = _codes(test, vocabulary, length)
        probability[length - 1 :] = _interpolated(grams, counts, asked, vocabulary, probability[length - 1 :])
    return float(-np.mean(np.log2(probability[skip:])))


def _codes(indices: np.ndarray, vocabulary: int, length: int) -> np.ndarray:
    """Encode every sequence of ``length`` characters as an integer, with the oldest character as its highest digit."""
    codes = np.zeros(max(len(indices) - length + 1, 0), np.int64)
    for offset in range(length):
        codes = codes * vocabulary + indices[offset : offset + len(codes)]
    return codes


def _counts(train: np.ndarray, vocabulary: int, order: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each length the different sequences, ascending, and their counts: occurrences for the longest length, and
    different preceding characters for the others."""
    grams, counts = np.unique(_codes(train, vocabulary, order), return_counts=True)
    tables = [(grams, counts)]
    for length in range(order - 1, 0, -1):
        grams, counts = np.unique(grams % vocabulary**length, return_counts=True)
        tables.append((grams, counts))
    return tables[::-1]


def _interpolated(
    grams: np.ndarray, counts: np.ndarray, asked: np.ndarray, vocabulary: int, shorter: np.ndarray
) -> np.ndarray:
    """The probability of each sequence's last character, from its probability in the next shorter context."""
    ones, twos = np.sum(counts == 1), np.sum(counts == 2)
    discount = ones / (ones + 2 * twos) if ones else 0.5  # a discount of 0 would give unseen characters probability 0
    contexts, begins = np.unique(grams // vocabulary, return_index=True)
    totals = np.add.reduceat(counts, begins)
    types = np.diff(np.append(begins, len(grams)))

    def look_up(keys, values, wanted):
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0)

    count, context = look_up(grams, counts, asked), asked // vocabulary
    total, distinct = look_up(contexts, totals, context), look_up(contexts, types, context)
    seen = (np.maximum(count - discount, 0) + discount * distinct * shorter) / np.maximum(total, 1)
    return np.where(total > 0, seen, shorter)


def uniform_bits(vocabulary: int) -> float:
    """Bits per character if all characters are equally likely.

    >>> uniform_bits(64)
    6.0
    """
    return math.log2(vocabulary)
