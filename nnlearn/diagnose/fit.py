"""Checks of the fit."""

from nnlearn.diagnose.checking import NamedCheck

CHECKS: tuple[NamedCheck, ...] = ()
