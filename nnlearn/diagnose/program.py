"""Checks of the program."""

from nnlearn.diagnose.checking import NamedCheck

CHECKS: tuple[NamedCheck, ...] = ()
