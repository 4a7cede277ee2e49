"""The error of a checkpoint that cannot be used."""

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, or does not fit; the message has the path and the reason.

    Attributes:
      path: the file or folder.
      reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{str(path)!r}: {reason}")
        self.path, self.reason = Path(path), reason


__all__ = ["CheckpointError"]
