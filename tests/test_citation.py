"""BibTeX of methods: every optimizer has a paper, and the entries agree with the documentation."""

import inspect
import re
from pathlib import Path

import optax
import pytest

import nnlearn
from nnlearn.optimizers.citation import ARXIV, NAMED, citation, entries, papers

WITHOUT = {"matrix_rules", "ema_nesterov_eval_params", "hutchinson_estimator_diag_hessian"}  # no optimizers
FACTORIES = {
    name: value
    for name, value in vars(nnlearn.optimizers).items()
    if inspect.isfunction(value) and not name.startswith(("scale_by_", "_")) and name not in WITHOUT
}


def test_every_optimizer_names_a_paper_that_has_an_entry():
    assert len(FACTORIES) > 45
    assert [name for name, value in FACTORIES.items() if not papers(value)] == []
    missing = []
    for name, value in FACTORIES.items():
        summary = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
        numbers = {match[1] for match in ARXIV.finditer(summary)}
        cited = citation(value)
        missing += [f"{name}: {number}" for number in numbers if f"eprint = {{{number}}}" not in cited]
        keys = {match[1].lower() + match[2] for match in NAMED.finditer(summary)}
        missing += [f"{name}: {key}" for key in keys if f"{{{key}," not in cited]
    assert missing == []


def test_the_entries_are_well_formed_and_used():
    text = Path(inspect.getfile(citation)).with_name("papers.bib").read_text()
    assert len(entries()) == text.count("\n@") > 50
    for key, entry in entries().items():
        assert entry.count("{") == entry.count("}") and entry.endswith("\n}")
        if key != "nnlearn":
            author, year = re.search(r"author = \{(\w+),", entry), re.search(r"year = \{(\d{4})\}", entry)
            assert author and year and author[1].lower() + year[1] == key
    transforms = [value for value in vars(nnlearn.transforms).values() if inspect.isfunction(value)]
    used = {key for value in [*FACTORIES.values(), *transforms] for key in papers(value)}
    assert set(entries()) - used <= {"nnlearn"}, set(entries()) - used


def test_what_is_inside_is_cited_too():
    inner = nnlearn.monitor_layers(nnlearn.lookahead(nnlearn.lion(1e-3), 5, 0.5))
    for tx in (
        optax.chain(nnlearn.centralize(), inner),
        nnlearn.partition({"a": inner, "b": nnlearn.centralize()}, {}),
    ):
        found = citation(tx)
        assert all(f"{{{key}," in found for key in ("yong2020", "zhang2019", "chen2023")), found
        assert found.count("@") == 3
    assert citation("lion") == citation(nnlearn.lion) == citation(nnlearn.lion(0.1))
    assert version_of(citation()) == nnlearn.__version__
    assert version_of((Path(__file__).parent.parent / "docs" / "citing.md").read_text()) == nnlearn.__version__


def version_of(text):
    return re.search(r"version = \{(.*?)\}", text)[1]


def test_errors():
    with pytest.raises(ValueError, match="there is no optimizer 'adamm'; did you mean 'adamw?'"):
        citation("adamm")
    with pytest.raises(ValueError, match="was made by nnlearn"):
        citation(optax.adam(0.1))
    with pytest.raises(ValueError, match="documentation of scale names no paper"):
        citation(nnlearn.scale(0.1))
