"""The pages of the manual: their code runs, they are reachable, and the reference has every public name."""

import inspect
import re
import sys
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).parts[0] not in {"_build", "api"})
FINDINGS = [page for page in PAGES if page.parent.name == "findings" and page.stem != "index"]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text() and page.stem != "faq" and page not in FINDINGS]


def run_code(page, folder, monkeypatch):
    """Run the blocks of a page in one namespace, as a reader would paste them; returns the namespace."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(page.parent)
    source = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
    with jax.numpy_rank_promotion("allow"):
        exec(compile(source, str(page), "exec"), names := {"__name__": "page"})
    return names


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(DOCS).with_suffix("").as_posix())
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    run_code(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", FINDINGS, ids=lambda page: page.stem)
def test_the_broken_example_has_its_finding(page, tmp_path, monkeypatch):
    report = run_code(page, tmp_path, monkeypatch)["report"]
    assert page.stem in [finding.name for finding in report.findings[:3]]


def test_links_between_pages_and_from_the_readme_lead_somewhere():
    wrong = []
    for page in [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *PAGES]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            found = (page.parent / target).resolve()
            if not target.startswith("http") and "api/" not in target and not found.exists():
                wrong.append(f"{page.name}: {target}")
    assert wrong == []


def test_the_questions_show_the_errors_that_their_code_raises(tmp_path, monkeypatch, capsys):
    page = DOCS / "guides" / "faq.md"
    run_code(page, tmp_path, monkeypatch)
    printed = " ".join(capsys.readouterr().out.split())
    shown = [" ".join(text.split()) for text in re.findall(r"```text\n(.*?)```", page.read_text(), re.DOTALL)]
    assert len(shown) > 10
    assert [text for text in shown if text not in printed] == []


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in PAGES:
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            entries = [line.strip() for line in tree.splitlines() if line.strip() and not line.startswith(":")]
            listed |= {(page.parent / entry.split("<")[-1].rstrip(">")).resolve() for entry in entries}
    missing = [page.name for page in PAGES if page != DOCS / "index.md" and page.with_suffix("") not in listed]
    assert missing == []


def test_every_public_name_is_in_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS / "_ext"), *sys.path])
    import api

    import nnlearn

    api.write_pages(tmp_path)
    entries = re.findall(
        r"^\.\. (?:auto|py:)\w+:: (\S+)$", "\n".join(p.read_text() for p in tmp_path.glob("*.rst")), re.MULTILINE
    )
    assert len(entries) == len(set(entries)) > 300
    documented = {id(api.public_objects()[entry]) for entry in entries}
    for name in api.public_names(nnlearn):
        assert id(getattr(nnlearn, name)) in documented, name


def test_examples_and_formulas_in_the_reference_are_as_written(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS / "_ext"), *sys.path])
    import api

    prose = ["Scales ``a * b`` by *c.", "", "Then::", "", "  rate = a * b**c", "  d = |a|", "", "And |x|:", ""]
    example = [">>> def f(*args, **options):", "...     return args[0] ** 2 | 1", "{'*': 1}", "", "shape (*n, m)"]
    lines = prose + example
    api.escape_marks(None, "function", "f", None, None, lines)
    changed = {0: "Scales ``a * b`` by \\*c.", 7: "And \\|x\\|:", len(lines) - 1: "shape (\\*n, m)"}
    assert lines == [changed.get(at, line) for at, line in enumerate(prose + example)]
    for name, value in api.public_objects().items():
        lines = (inspect.getdoc(value) or "").splitlines()
        api.escape_marks(None, "function", name, value, None, lines)
        assert not [line for line in lines if line.lstrip().startswith((">>>", "...")) and "\\*" in line], name


def test_the_page_of_findings_has_every_finding():
    from nnlearn.diagnose.names import FAULTS

    page = (DOCS / "diagnosis.md").read_text()
    assert (
        re.findall(r"^\| \[`(\w+)`\]", page, re.MULTILINE)
        == list(FAULTS)
        == re.findall(r"^(\w+)$", (DOCS / "findings" / "index.md").read_text().split("{toctree}")[1], re.MULTILINE)
    )
    assert [name for name, fault in FAULTS.items() if fault.meaning not in page or fault.remedies[0] not in page] == []
