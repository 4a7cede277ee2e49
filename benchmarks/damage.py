"""Ways to damage a checkpoint, for the benchmark of damaged files and for the tests."""

from pathlib import Path

import numpy as np

KINDS = ("bit", "byte", "truncated", "page", "missing", "swapped", "other manifest", "length", "header", "longer")


def damage(kind: str, files: list[Path], others: list[Path], random: np.random.Generator) -> bool:
    """Damage one of ``files`` in place; ``others`` are those of another step. False if nothing has changed."""
    path = files[random.integers(len(files))]
    content = bytearray(path.read_bytes())
    before = bytes(content)
    at = int(random.integers(max(len(content), 1)))
    if kind == "missing":
        path.unlink()
        return True
    if not content:
        return False
    if kind == "bit":
        content[at] ^= 1 << int(random.integers(8))
    elif kind == "byte":
        content[at] ^= int(random.integers(1, 256))
    elif kind == "truncated":
        del content[at:]
    elif kind == "page":
        begin = at // 4096 * 4096
        content[begin : begin + 4096] = bytes(len(content[begin : begin + 4096]))
    elif kind == "swapped":
        content = bytearray(others[random.integers(len(others))].read_bytes())
    elif kind == "other manifest":
        names = [at for at, file in enumerate(files) if file.suffix not in (".safetensors", ".msgpack")]
        if not names or len(files) != len(others):
            return False
        path = files[names[random.integers(len(names))]]
        before, content = path.read_bytes(), bytearray(others[files.index(path)].read_bytes())
    elif kind == "length":
        content[:8] = int(random.integers(1 << 62)).to_bytes(8, "little")
    elif kind == "header":
        text = bytes(content)
        swaps = ((b'"layer_1"', b'"layer_0"'), (b'"layer_2"', b'"../a/b/"'), (b"data_offsets", b"data_offsetz"))
        for old, new in swaps:
            if old in text and random.integers(2):
                text = text.replace(old, new)
        content = bytearray(text)
    elif kind == "longer":
        content += bytes(int(random.integers(1, 200)))
    path.write_bytes(content)
    return bytes(content) != before
