"""What compressors and counting make of a text: the bits a character costs them, for networks to be compared with."""

import math
import zlib

import numpy as np

from nnlearn.checks import check_count

GZIP_WINDOW = 32768 - 262  # bytes that deflate can look back, less the room it keeps for a match


def gzip_bits(train: bytes, test: bytes) -> float:
    """Bits a character that ``gzip -9`` needs for a text after another, which it sees the last 32 KiB of.

    Deflate cannot look back further, so this is ``8 (len(gzip(train + test)) - len(gzip(train))) / len(test)``, but for
    a few bytes.

    Args:
      train: the text before.
      test: the text that is compressed, at one byte a character.

    >>> round(gzip_bits(b"tell me, " * 100, b"tell me, " * 100), 1)
    0.2
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=train[-GZIP_WINDOW:])
    return 8 * len(packer.compress(test) + packer.flush()) / len(test)


def ngram_bits(train: np.ndarray, test: np.ndarray, vocabulary: int, order: int = 5, skip: int = 0) -> float:
    """Bits a character that an n-gram model needs, with interpolated Kneser-Ney smoothing.

    With ``h`` the last ``order - 1`` characters, ``h'`` all of them but the oldest, ``c(hx)`` how often ``x`` followed
    ``h``, and ``T(h)`` how many different characters did::

        p(x | h) = max(c(hx) - d, 0) / c(h) + d T(h) / c(h) p(x | h')

    and ``p(x | h')`` where ``h`` never came. Below the highest order ``c`` counts not occurrences but the different
    characters that stood before, below the lowest every character is as likely, and ``d`` is ``n1 / (n1 + 2 n2)`` of
    the ``n1`` and ``n2`` sequences of that order that count 1 and 2, or a half where none counts 1.

    Args:
      train: character numbers in [0, vocabulary), shape (size,), to count.
      test: those to predict, one after another, each from the ones before it.
      vocabulary: how many characters there are.
      order: the longest sequence that is counted; the numbers need ``vocabulary ** order`` to be below 2 ** 63.
      skip: how many of the first of ``test`` are only looked back on.

    Returns:
      The mean of ``-log2 p`` over ``test[skip:]``.

    Raises:
      ValueError: the vocabulary is too large for the order.

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
        # The first length - 1 characters have too little before them, and keep the shorter sequence's probability.
        asked = _codes(test, vocabulary, length)
        probability[length - 1 :] = _interpolated(grams, counts, asked, vocabulary, probability[length - 1 :])
    return float(-np.mean(np.log2(probability[skip:])))


def _codes(numbers: np.ndarray, vocabulary: int, length: int) -> np.ndarray:
    """Every sequence of so many characters as one number, the oldest character in the highest place."""
    codes = np.zeros(max(len(numbers) - length + 1, 0), np.int64)
    for offset in range(length):
        codes = codes * vocabulary + numbers[offset : offset + len(codes)]
    return codes


def _counts(train: np.ndarray, vocabulary: int, order: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each length the different sequences, ascending, and their counts: occurrences for the longest, and how many
    characters stood before for the others."""
    grams, counts = np.unique(_codes(train, vocabulary, order), return_counts=True)
    tables = [(grams, counts)]
    for length in range(order - 1, 0, -1):
        grams, counts = np.unique(grams % vocabulary**length, return_counts=True)
        tables.append((grams, counts))
    return tables[::-1]


def _interpolated(
    grams: np.ndarray, counts: np.ndarray, asked: np.ndarray, vocabulary: int, shorter: np.ndarray
) -> np.ndarray:
    """The probability of each sequence's last character after the others, from that after one fewer of them."""
    ones, twos = np.sum(counts == 1), np.sum(counts == 2)
    discount = ones / (ones + 2 * twos) if ones else 0.5  # without one, what never came would be impossible
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
    """Bits a character where every one is as likely.

    >>> uniform_bits(64)
    6.0
    """
    return math.log2(vocabulary)
