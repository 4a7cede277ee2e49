"""Pages of the reference: every public name of nnlearn once, under its shortest name, grouped by room."""

import functools
import importlib
import inspect
import re
import typing
from pathlib import Path

from sphinx.util.typing import stringify_annotation

import nnlearn

# Page -> title; a name is on the page of the room that defines it.
ROOMS = {
    "train": "Runs, steps and evaluation",
    "stream": "Streams of batches",
    "sweeps": "Sweeps",
    "optimizers": "Optimizers",
    "transforms": "Gradient transformations",
    "gradients": "Gradients",
    "schedules": "Schedules",
    "losses": "Losses",
    "models": "Models",
    "packing": "Packing",
    "sharding": "Many devices",
    "distributed": "Many processes",
    "checkpoints": "Checkpoints",
    "data": "Batches",
    "datasets": "Data sets",
    "tasks": "Tasks",
    "report": "Reports",
    "native": "Kernels in C",
    "protocol": "optax's protocol",
    "other": "Other names",
}
# Modules that nnlearn exports as modules: the public rooms.
PUBLIC_ROOMS = [name for name in dir(nnlearn) if getattr(getattr(nnlearn, name), "__name__", "") == f"nnlearn.{name}"]


def public_names(module):
    """The names that a user of a module sees."""
    return [
        name for name in dir(module) if not name.startswith("_") and not inspect.ismodule(getattr(module, name, None))
    ]


def public_objects():
    """Shortest dotted name -> object, of nnlearn and its public rooms; names of one object count once."""
    seen, found = {}, {}
    for room in ["nnlearn", *(f"nnlearn.{name}" for name in PUBLIC_ROOMS)]:
        module = importlib.import_module(room)
        for name in public_names(module):
            value = getattr(module, name)
            origin = getattr(value, "__module__", "") or ""
            foreign = not origin.startswith("nnlearn")
            if foreign and room != "nnlearn":
                continue  # an import of the room, such as a type
            if id(value) not in seen:
                seen[id(value)] = found[f"{room}.{name}"] = value
    return found


def room_of(value):
    parts = (getattr(value, "__module__", "") or "").split(".")
    if parts[0] != "nnlearn":
        return "protocol"
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "other"


def kind_of(value):
    if inspect.isclass(value):
        return "class"
    return "function" if callable(value) and not typing.get_origin(value) else "data"


def write_pages(folder):
    """Write one page per room and their index; return the documented names."""
    pages = {room: [] for room in ROOMS}
    for name, value in public_objects().items():
        pages[room_of(value)].append((name, value))
    folder.mkdir(parents=True, exist_ok=True)
    index = ["# Reference", "", "Every public name, by subject.", "", "```{toctree}", ":maxdepth: 1", ""]
    for room, entries in pages.items():
        if not entries:
            continue
        lines = [ROOMS[room], "=" * len(ROOMS[room]), "", ".. currentmodule:: nnlearn", ""]
        if room == "protocol":
            lines += ["These names are optax's own objects, documented there.", ""]
        for name, value in sorted(entries, key=lambda entry: entry[0].rsplit(".", 1)[1].lower()):
            kind = kind_of(value)
            if room == "protocol":
                lines += [f".. py:{kind}:: {name}", "   :no-index-entry:", ""]
                continue
            lines += [f".. auto{kind}:: {name}", *(["   :members:"] if kind == "class" else []), ""]
        _write_if_changed(folder / f"{room}.rst", "\n".join(lines))
        index.append(room)
    _write_if_changed(folder / "index.md", "\n".join([*index, "```", ""]))


def _write_if_changed(path: Path, text: str) -> None:
    """Leave the time of an unchanged page as it is, so that Sphinx does not read it again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def escape_marks(app, what, name, obj, options, lines):
    """Escape ``*shape`` and ``|x|`` of plain sentences, which are no markup, but not in examples and literal blocks."""
    in_example, literal = False, None
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith(">>>"))
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        is_plain = not in_example and literal is None
        if is_plain and (line.rstrip().endswith("::") or line.lstrip().startswith(".. math::")):
            literal = indent
        if is_plain:
            parts = re.split(r"(``.*?``|`[^`]*`|\*\*[^*]+\*\*)", line)
            parts[::2] = [re.sub(r"(?<!\\)([*|])", r"\\\1", part) for part in parts[::2]]
            lines[i] = "".join(parts)


# Types whose expansion is long: the names that the code uses for them.
ALIASES = ("ScalarOrSchedule", "MaskOrFn", "ArrayLike", "DTypeLike", "Schedule", "Scalar")


def short_types(app, what, name, obj, options, signature, returns):
    """Write the names of type aliases in place of their expansions, the longest first."""
    return _shortened(signature), _shortened(returns)


def short_fields(app, what, name, obj, options, lines):
    """The same for the types of attributes, which napoleon writes in full."""
    for i, line in enumerate(lines):
        if line.lstrip().startswith(":vartype"):
            lines[i] = _shortened(line).replace("jax.jaxlib._jax.Array", "jax.Array")


def _shortened(text):
    for expansion, alias in _expansions():
        text = text and re.sub(rf"(?<![\w.~]){re.escape(expansion)}(?![\w\[])", alias, text)
    return text


@functools.cache
def _expansions():
    import nnlearn.types as types

    known = {stringify_annotation(getattr(types, alias), "smart"): alias for alias in ALIASES}
    known |= {expansion.replace("~", ""): alias for expansion, alias in known.items()}
    return sorted(known.items(), key=lambda pair: -len(pair[0]))


def setup(app):
    app.connect("autodoc-process-signature", short_types)
    app.connect("autodoc-process-docstring", escape_marks, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", short_fields, priority=600)  # after it
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "api"))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
