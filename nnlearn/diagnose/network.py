"""Checks of the network."""

from nnlearn.diagnose.checking import NamedCheck

CHECKS: tuple[NamedCheck, ...] = ()
