"""What a diagnosis says: findings, checks and the report that holds them."""

import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnlearn.diagnose.names import FAULTS
from nnlearn.files import replacing

FORMAT = "nnlearn report 1"
WIDTH = 100
FAILED = "it failed: "  # the begin of the reason of a check that stopped with an error


@dataclasses.dataclass(frozen=True)
class Finding:
    """A probable cause of a run that does not learn as it could.

    Attributes:
      name: one of the names in ``nnlearn.diagnose.names``.
      severity: ``"high"`` if the run fails because of it, ``"medium"`` if it loses, ``"low"`` if it may.
      where: the layer, feature, class or part of the data; empty if it concerns the whole run.
      step: the step at which it was seen; None if it concerns no step.
      evidence: the numbers, by name.
      seen: what was seen, one sentence with the numbers.
      meaning: why it matters.
      remedies: what to change, the most likely remedy first.
      strength: how sure it is, from 0 to 1; findings are ranked by it.
    """

    name: str
    severity: str
    where: str
    step: int | None
    evidence: Mapping[str, Any]
    seen: str
    meaning: str
    remedies: tuple[str, ...]
    strength: float

    def __str__(self) -> str:
        place = f" in {self.where}" if self.where else ""
        place += "" if self.step is None else f" at step {self.step}"
        lines = [f"{self.name}{place} ({self.severity})", *_wrapped("seen", self.seen), *_wrapped("why", self.meaning)]
        for remedy in self.remedies:
            lines += _wrapped("change", remedy)
        return "\n".join(lines)


def found(
    name: str,
    seen: str,
    evidence: Mapping[str, Any] | None = None,
    *,
    strength: float = 0.8,
    severity: str = "high",
    where: str = "",
    step: int | None = None,
    remedies: Sequence[str] = (),
) -> Finding:
    """A finding with the meaning and the remedies of its name.

    Args:
      name: the name of the fault.
      seen: what was seen, one sentence with numbers.
      evidence: the numbers.
      strength, severity, where, step: as in ``Finding``.
      remedies: more exact remedies, before the general ones.

    >>> print(found("sign_error", "The loss rose from 2.3 to 9.1 along the gradient.", step=3))
    sign_error at step 3 (high)
      seen    The loss rose from 2.3 to 9.1 along the gradient.
      why     The steps go uphill: the loss, the update or the weight decay has the wrong sign.
      change  minimise: loss = -mean(log likelihood), params = params - rate * gradient
    """
    fault = FAULTS[name]
    plain = {key: _plain(value) for key, value in (evidence or {}).items()}
    strength = float(min(max(strength, 0.0), 1.0))
    exact = {each.partition(" by ")[0] for each in remedies if " by " in each}  # "by 10" replaces "by 3 to 10"
    general = [each for each in fault.remedies if each.partition(" by ")[0] not in exact]
    return Finding(name, severity, where, step, plain, seen, fault.meaning, (*remedies, *general), strength)


@dataclasses.dataclass(frozen=True)
class Check:
    """One check of a diagnosis.

    Attributes:
      name: the name of the check.
      status: ``"passed"``, ``"tripped"`` or ``"not run"``.
      values: the numbers that it looked at, by name.
      threshold: the rule, in words.
      reason: why it could not run, or a remark.
      findings: the findings that it suggests.
    """

    name: str
    status: str
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    threshold: str = ""
    reason: str = ""
    findings: tuple[Finding, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the check itself stopped with an error, in contrast to one that does not apply to the run."""
        return self.status == "not run" and self.reason.startswith(FAILED)

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {_short(value)}" for name, value in self.values.items())
        rest = "; ".join(part for part in (numbers, self.threshold, self.reason) if part)
        return f"{'failed' if self.failed else self.status:8} {self.name}" + (f": {rest}" if rest else "")


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a diagnosis.

    Attributes:
      findings: the probable causes, most likely first.
      checks: every check that ran, with its numbers, and those that could not run, with the reason.
      summary: facts about the run: steps, parameters, first and last loss.
    """

    findings: tuple[Finding, ...]
    checks: tuple[Check, ...]
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        return self.text()

    def text(self, *, all_checks: bool = False) -> str:
        """The report in words, as ``print`` shows it.

        Args:
          all_checks: whether to list every check with its numbers, or with the reason why it could not run.

        >>> checks = Check("gap", "passed", {"gap": 0.1}), Check("noise", "not run", reason="no predict was given")
        >>> print(Report((), checks).text())
        diagnosis: nothing found
        <BLANKLINE>
        1 check ran, 1 could not: report.text(all_checks=True) says why
        """
        facts = ", ".join(f"{name} {_short(value)}" for name, value in self.summary.items())
        ran = [check for check in self.checks if check.status != "not run"]
        failed = [check for check in self.checks if check.failed]
        skipped = len(self.checks) - len(ran) - len(failed)
        title = "nothing found" if self.healthy else f"{len(self.findings)} finding{'s' * (len(self.findings) > 1)}"
        lines = [f"diagnosis: {title}" + (f" ({facts})" if facts else "")]
        for number, finding in enumerate(self.findings, 1):
            lines += ["", f"{number}. {finding}"]
        counted = f"{len(ran)} check{'s' * (len(ran) != 1)} ran" + (f", {skipped} could not" if skipped else "")
        counted += f", {len(failed)} failed" if failed else ""
        why = ": report.text(all_checks=True) says why" if (skipped or failed) and not all_checks else ""
        lines += ["", counted + why]
        for check in self.checks if all_checks else failed:
            lines += textwrap.wrap(str(check), WIDTH, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as a JSON object; ``from_json`` reads it."""
        return json.dumps({"format": FORMAT, "healthy": self.healthy, **_plain(dataclasses.asdict(self))}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what ``to_json`` wrote.

        Raises:
          ValueError: if the text is no report.

        >>> report = Report((found("overfitting", "Seen."),), (Check("gap", "tripped", {"gap": 0.5}),))
        >>> Report.from_json(report.to_json()) == report
        True
        """
        try:
            tree = json.loads(text)
            if tree.get("format") != FORMAT:
                raise ValueError(f"its format is {tree.get('format')!r}, not {FORMAT!r}")
            checks = tuple(
                Check(**each | {"findings": tuple(map(_finding, each["findings"]))}) for each in tree["checks"]
            )
            return cls(tuple(map(_finding, tree["findings"])), checks, tree["summary"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no report: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the report to a JSON file. An interrupted write leaves no partial file."""
        with replacing(path) as file:
            file.write(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read a file that ``save`` wrote. Loading runs no code from the file.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if the file is no report.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"cannot read {str(path)!r}: {error}") from error


def _finding(fields: dict[str, Any]) -> Finding:
    return Finding(**{**fields, "remedies": tuple(fields["remedies"])})


def _plain(value: Any) -> Any:
    """The value in types of JSON; numbers that JSON lacks become words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_short(part) for part in value[:6]) + (", ..." if len(value) > 6 else "") + "]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {label:8}", subsequent_indent=" " * 10)


__all__ = ["Check", "Finding", "Report", "found"]
