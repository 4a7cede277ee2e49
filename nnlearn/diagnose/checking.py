"""How a check is written, and how it is run without ever stopping a diagnosis."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.report import FAILED, Check, Finding, _plain


class Seen(NamedTuple):
    """What a check function returns.

    Attributes:
      values: the numbers that it looked at.
      threshold: the rule, in words.
      findings: what it suggests; empty if it passed.
    """

    values: Mapping[str, Any]
    threshold: str
    findings: Iterable[Finding] = ()


class NamedCheck(NamedTuple):
    """A check function with its name."""

    name: str
    function: Callable[[Any], Seen]

    def __call__(self, evidence: Any) -> Check:
        """Run the check; if it cannot run, the result says why."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values, threshold, findings = self.function(evidence)
            findings = tuple(findings)
            return Check(self.name, "tripped" if findings else "passed", _plain(values), threshold, "", findings)
        except Unknown as reason:
            return Check(self.name, "not run", reason=str(reason))
        except Exception as error:  # an odd program must not end the diagnosis
            text = str(error).strip().split("\n")[0][:200]
            return Check(self.name, "not run", reason=f"{FAILED}{type(error).__name__}: {text}")


def check(name: str) -> Callable[[Callable[[Any], Seen]], NamedCheck]:
    """Decorate a function from ``Evidence`` to ``Seen``: it becomes a check with this name.

    >>> @check("the loss is finite")
    ... def finite(evidence):
    ...     return Seen({"loss": evidence}, "finite")
    >>> print(finite(1.0))
    passed   the loss is finite: loss 1; finite
    """
    return lambda function: NamedCheck(name, function)


__all__ = ["NamedCheck", "Seen", "check"]
