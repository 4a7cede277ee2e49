"""The page as a file: its frame, style, script and numbers in one HTML document."""

import dataclasses
import html
import json
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from nnlearn.figures.page.build import page_data
from nnlearn.figures.page.record import RunRecord
from nnlearn.files import replacing

# The browser itself refuses every request.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclasses.dataclass(frozen=True)
class Page:
    """The content of a page besides the curves.

    Attributes:
      title: the heading.
      findings: findings of a diagnosis, as dicts with the fields of ``nnlearn.diagnose.Finding``; None if there was no
        diagnosis.
      facts: machine, versions, command.
      samples: texts by title, such as a sample of predictions.
      metric, mode, logarithmic: as in ``page_data``.
    """

    title: str = "Report"
    findings: Sequence[Mapping[str, Any]] | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metric: str | None = None
    mode: str | None = None
    logarithmic: Collection[str] = ()


def write_page(path: str | Path, runs: Sequence[RunRecord], page: Page | None = None) -> Path:
    """Write one HTML file with everything inside, and return its path. An interrupted write leaves no partial file.

    Args:
      path: the file.
      runs: what to draw, at least one run.
      page: the rest of the content.

    Raises:
      ValueError: if there is no run.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    page = page or Page()
    numbers = page_data(runs, metric=page.metric, mode=page.mode, logarithmic=page.logarithmic)
    with replacing(path) as file:
        file.write(document(page.title, _body(page, numbers), numbers, part("page.js") + part("sweep.js")))
    return Path(path)


def document(title: str, body: str, numbers: Mapping[str, Any], script: str) -> str:
    """A whole HTML document: style, body, numbers, and a script after the parts that all pages share."""
    inline = json.dumps(numbers, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{part('page.css')}</style></head>\n"
        f'<body>\n{body}\n<script type="application/json" id="data">{inline}</script>\n'
        f"<script>\n{part('draw.js')}{script}</script>\n</body></html>\n"
    )


def part(name: str) -> str:
    """A file of this package, as text."""
    return (resources.files("nnlearn.figures.page") / name).read_text(encoding="utf-8")


def header(title: str, line: str) -> str:
    """The heading with the button that switches the theme."""
    return (
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(line)}</p>"
        '<button id="theme" type="button">Dark theme</button></header>'
    )


def _body(page: Page, numbers: Mapping[str, Any]) -> str:
    groups, runs = len(numbers["groups"]), len(numbers["runs"])
    line = f"{_counted(runs, 'run')}" + (f" of {_counted(groups, 'setting')}" if 1 < groups < runs else "")
    if numbers["left_out"]:
        line += f"; {numbers['left_out']} more, with worse {numbers['metric']}, are left out"
    parts = [header(page.title, line), "<main>", "<noscript><p>The curves need JavaScript.</p></noscript>"]
    if page.findings is not None:
        parts.append(_findings(page.findings))
    parts.append('<section id="runs" aria-label="Runs"></section><section id="curves" aria-label="Curves"></section>')
    parts.append('<section id="sweep" aria-label="Sweep"></section><section id="layers" aria-label="Layers"></section>')
    for title, text in page.samples.items():
        parts.append(f"<section><h2>{html.escape(title)}</h2><pre>{html.escape(text)}</pre></section>")
    parts.append(_facts("The same in all runs" if groups > 1 else "Configuration", numbers["same"]))
    parts.append(_facts("How it was made", page.facts))
    return "\n".join([*parts, "</main>"])


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _findings(findings: Sequence[Mapping[str, Any]]) -> str:
    if not findings:
        return '<section id="findings"><h2>Findings</h2><p>The diagnosis found nothing wrong.</p></section>'
    items = []
    for found in findings:
        place = f" in {found['where']}" if found.get("where") else ""
        place += f" at step {found['step']:,}" if found.get("step") is not None else ""
        change = "".join(f"<li>{html.escape(remedy)}</li>" for remedy in found.get("remedies", ()))
        name = html.escape(str(found["name"]).replace("_", " "))
        items.append(
            f'<article class="finding {html.escape(found["severity"])}"><h3>{name}{html.escape(place)} '
            f'<span class="severity">{html.escape(found["severity"])}</span></h3><p>{html.escape(found["seen"])} '
            f"{html.escape(found['meaning'])}</p><p>Change:</p><ul>{change}</ul></article>"
        )
    return f'<section id="findings"><h2>{_counted(len(items), "finding")}</h2>{"".join(items)}</section>'


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    rows = "".join(
        f"<div><dt>{html.escape(str(name))}</dt><dd>{html.escape(_words(value))}</dd></div>"
        for name, value in facts.items()
    )
    return f"<section><h2>{html.escape(title)}</h2><dl>{rows}</dl></section>"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


__all__ = ["Page", "document", "header", "part", "write_page"]
