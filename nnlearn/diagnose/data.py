"""Checks of the data."""

from nnlearn.diagnose.checking import NamedCheck

CHECKS: tuple[NamedCheck, ...] = ()
BEFORE: tuple[NamedCheck, ...] = ()
"""Those that look at the data alone, for ``preflight``."""
