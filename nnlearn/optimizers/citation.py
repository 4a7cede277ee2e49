"""BibTeX of the methods that an optimizer consists of."""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import nnlearn.transforms as transforms
from nnlearn.checks import near
from nnlearn.settings import Made

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")
# "Kingma & Ba 2015", "Shazeer & Stern 2018", "Duchi, Hazan & Singer 2011", "Zhuang et al. 2021"
NAMED = re.compile(r"([A-Z]\w+)(?:(?:, [A-Z]\w+)* (?:&|and) [A-Z]\w+| et al\.)? (\d{4})")
ELSEWHERE = re.compile(r"``(\w+_kernel|\w+_step|schedule_free|scale_by_\w+)``")
SELF = "nnlearn"


def citation(method: Any = None) -> str:
    """The BibTeX entries of the papers behind an optimizer or a transformation.

    The papers are those that its documentation names as the source of the method, including those of the optimizers
    inside it: ``chain(clip_by_block_rms(1.0), adamw(1e-3))`` cites two.

    Args:
      method: an optimizer or transformation made by nnlearn, a chain of them, one of nnlearn's functions such as
        ``nnlearn.adamw``, or its name; None for nnlearn itself.

    Returns:
      The entries, separated by empty lines.

    Raises:
      ValueError: if the name is unknown, nothing in it was made by nnlearn, or its documentation names no paper.

    >>> import nnlearn
    >>> print(citation(nnlearn.adamw(1e-3)))
    @inproceedings{loshchilov2019,
      author = {Loshchilov, Ilya and Hutter, Frank},
      title = {Decoupled Weight Decay Regularization},
      booktitle = {International Conference on Learning Representations},
      year = {2019},
      eprint = {1711.05101},
      archivePrefix = {arXiv},
    }
    """
    if method is None:
        return entries()[SELF]
    factories = [_by_name(method)] if isinstance(method, str) else list(dict.fromkeys(_factories(method)))
    if not factories:
        raise ValueError(f"nothing in {_short(method)} was made by nnlearn: give an optimizer of nnlearn, or its name")
    keys = list(dict.fromkeys(key for factory in factories for key in papers(factory)))
    if not keys:
        names = ", ".join(factory.__name__ for factory in factories)
        raise ValueError(f"the documentation of {names} names no paper; citation() is that of nnlearn")
    return "\n\n".join(entries()[key] for key in keys)


@functools.cache
def entries() -> dict[str, str]:
    """The entries of ``papers.bib`` by key."""
    text = (resources.files("nnlearn.optimizers") / "papers.bib").read_text(encoding="utf-8")
    return {match[1]: match[0] for match in re.finditer(r"^@\w+\{(\w+),\n.*?^\}", text, re.DOTALL | re.MULTILINE)}


def papers(factory: Callable[..., Any]) -> list[str]:
    """The keys of the papers that the summary of a function, or of the kernel that it refers to, names."""
    by_number = {
        match[1]: key for key, entry in entries().items() if (match := re.search(r"eprint = \{(.*?)\}", entry))
    }
    found: list[tuple[int, str]] = []
    text = _summary(factory)
    for match in ARXIV.finditer(text):
        if match[1] in by_number:
            found.append((match.start(), by_number[match[1]]))
    for match in NAMED.finditer(text):
        key = match[1].lower() + match[2]
        if key in entries():
            found.append((match.start(), key))
    return list(dict.fromkeys(key for _, key in sorted(found)))


def _summary(factory: Callable[..., Any]) -> str:
    """The first paragraph of the documentation, its sources, and those of the functions that it refers to."""
    module = vars(importlib.import_module(factory.__module__))
    doc = inspect.getdoc(factory) or ""
    parts = [doc.split("\n\n")[0], *re.findall(r"^Source: (?:.+\n?)+", doc, re.MULTILINE)]
    for name in ELSEWHERE.findall(parts[0]):
        other = module.get(name)
        if inspect.isfunction(other) and other.__name__ != factory.__name__:
            parts.append((inspect.getdoc(other) or "").split("\n\n")[0])
    return " ".join(" ".join(parts).split())


def _by_name(name: str) -> Callable[..., Any]:
    import nnlearn.optimizers as optimizers

    known = {
        each: value
        for room in (transforms, optimizers)
        for each, value in vars(room).items()
        if inspect.isfunction(value) and not each.startswith("_")
    }
    if name not in known:
        raise ValueError(f"there is no optimizer {name!r}{near(name, known)}")
    return known[name]


def _factories(method: Any) -> Iterator[Callable[..., Any]]:
    """The functions of nnlearn that made a transformation and those inside it, the outer ones first."""
    waiting, seen = [method], set()
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Made):
            yield node.call.factory
            waiting += [value for value in node.call.bound.arguments.values() if isinstance(value, tuple | dict | list)]
        elif isinstance(node, dict):
            waiting += node.values()
        elif isinstance(node, tuple | list):
            waiting += node
        elif inspect.isfunction(node):
            if node.__module__.startswith("nnlearn.") and "<locals>" not in node.__qualname__:
                yield node
            for cell in node.__closure__ or ():  # the parts of a chain of optax are in its functions
                try:
                    value = cell.cell_contents
                except ValueError:  # not filled yet
                    continue
                if isinstance(value, tuple | list | dict | Made) or inspect.isfunction(value):
                    waiting.append(value)


def _short(method: Any) -> str:
    text = repr(method)
    return text if len(text) < 80 else f"{text[:77]}..."


__all__ = ["citation"]
