"""The architecture: imports only point down, without cycles."""

import ast
import graphlib
import re
from pathlib import Path

import nnlearn

ROOT = Path(nnlearn.__file__).parent
LEVELS = (
    ("types", "borrowed", "calls", "extras", "files", "serialization"),
    ("tree", "checks", "settings", "sharding", "figures", "native", "linalg"),
    ("sums", "packing", "schedules", "losses", "data", "distributed", "machine"),
    ("programs", "transforms", "models", "datasets", "checkpoints"),
    ("gradients", "optimizers"),
    ("train",),
    ("stream", "sweeps", "compare"),
    ("tasks",),
    ("diagnose",),
    ("report",),
    ("commands",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
SIDEWAYS: set[tuple[str, str]] = {("sharding", "tree"), ("distributed", "data")}  # (a, b) of one level: a may import b


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, known: set[str]) -> set[str]:
    """The nnlearn modules that a source imports, at its top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & known) or {node.module}
    return found & known


def import_graph() -> dict[str, set[str]]:
    files = {module_name(path): path for path in ROOT.rglob("*.py")}
    return {name: imports_of(path.read_text(), set(files)) for name, path in files.items()}


def room_of(module: str) -> str:
    room = module.split(".")[1]
    assert room in LEVEL, f"{module} has no level: add {room!r} to LEVELS"
    return room


def wrong_edges(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports that do not point to a lower level: upward, of the same level and not in SIDEWAYS, or of the root."""
    wrong = []
    for module in set(graph) - {"nnlearn"}:
        for imported in graph[module]:
            if imported == "nnlearn":
                wrong.append((module, imported))
                continue
            room, other = room_of(module), room_of(imported)
            if room != other and LEVEL[room] <= LEVEL[other] and (room, other) not in SIDEWAYS:
                wrong.append((module, imported))
    return wrong


def test_every_import_points_down():
    graph = import_graph()
    assert wrong_edges(graph) == []
    used = {(room_of(a), room_of(b)) for a in graph if a != "nnlearn" for b in graph[a]}
    assert used >= SIDEWAYS  # delete pairs that no import needs


def test_imports_have_no_cycle():
    list(graphlib.TopologicalSorter(import_graph()).static_order())


def test_the_table_in_the_contributing_guide_agrees():
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT.parent / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    table = {
        name.removesuffix(".py"): int(level) for level, names in rows for name in re.findall(r"`([\w.]+)/?`", names)
    }
    assert table == LEVEL


def test_the_check_can_fail():
    graph = {
        "nnlearn.tree": {"nnlearn.optimizers.adam"},
        "nnlearn.optimizers.adam": {"nnlearn.types", "nnlearn.gradients.batch"},
        "nnlearn.gradients.batch": {"nnlearn"},
        "nnlearn.types": set(),
    }
    assert sorted(wrong_edges(graph)) == [
        ("nnlearn.gradients.batch", "nnlearn"),
        ("nnlearn.optimizers.adam", "nnlearn.gradients.batch"),
        ("nnlearn.tree", "nnlearn.optimizers.adam"),
    ]
    assert imports_of("def f():\n    from nnlearn import cli", {"nnlearn", "nnlearn.cli"}) == {"nnlearn.cli"}


def test_heavy_libraries_are_imported_lazily():
    import subprocess
    import sys

    heavy = (
        "matplotlib",
        "sklearn",
        "equinox",
        "flax",
        "torch",
        "rich",
        "tyro",
        "plotly",
        "pandas",
        "scipy.stats",
        "tensorboardX",
    )
    code = f"import sys, nnlearn; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
