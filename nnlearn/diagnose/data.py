"""Checks of the data."""

from nnlearn.diagnose.checking import NamedCheck

CHECKS: tuple[NamedCheck, ...] = ()
