"""The house keeps its shape: imports only point down, and never in a circle."""

import ast
import graphlib
from pathlib import Path

import nnlearn

ROOT = Path(nnlearn.__file__).parent
LEVELS = {
    0: ["types"],
    1: [
        "checks",
        "extras",
        "files",
        "native",
        "settings",
        "sums",
        "sharding_axes",
        "tree",
        "packing",
        "schedules",
        "losses",
        "models",
        "data",
        "datasets",
    ],
    2: ["transforms", "train"],
    3: ["optimizers", "compare", "sweeps", "tasks"],
    4: ["cli"],
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, known: set[str]) -> set[str]:
    """The nnlearn modules that a source imports, lazily or not."""
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


def level_of(module: str) -> int:
    part = module.split(".")[1]
    assert part in LEVEL, f"{module} has no place in the house: add {part!r} to LEVELS"
    return LEVEL[part]


def upward_edges(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    inside = {name for name in graph if name != "nnlearn"}
    return [(a, b) for a in inside for b in graph[a] if b == "nnlearn" or level_of(a) < level_of(b)]


def test_no_import_points_up():
    assert upward_edges(import_graph()) == []


def test_no_import_goes_in_a_circle():
    list(graphlib.TopologicalSorter(import_graph()).static_order())


def test_the_check_can_fail():
    graph = {
        "nnlearn.tree": {"nnlearn.optimizers.adam"},
        "nnlearn.optimizers.adam": {"nnlearn.types"},
        "nnlearn.types": set(),
    }
    assert upward_edges(graph) == [("nnlearn.tree", "nnlearn.optimizers.adam")]
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
