"""The house keeps its shape: imports only point down, and never in a circle."""

import ast
import graphlib
from pathlib import Path

import nnlearn

ROOT = Path(nnlearn.__file__).parent
LEVELS = (
    ("types", "calls", "extras", "files", "serialization"),
    ("tree", "checks", "settings", "sharding", "figures", "native"),
    ("sums", "packing", "schedules", "losses", "data"),
    ("programs", "transforms", "models", "datasets", "checkpoints"),
    ("gradients", "optimizers"),
    ("train",),
    ("stream", "sweeps", "compare"),
    ("tasks",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
SIDEWAYS: set[tuple[str, str]] = set()  # pairs of rooms of one level, of which the first may import the second


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


def room_of(module: str) -> str:
    room = module.split(".")[1]
    assert room in LEVEL, f"{module} has no place in the house: add {room!r} to LEVELS"
    return room


def wrong_edges(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that do not point to a lower level: upward, sideways without a name in SIDEWAYS, or the root."""
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
    assert used >= SIDEWAYS  # a name that no import needs is deleted


def test_no_import_goes_in_a_circle():
    list(graphlib.TopologicalSorter(import_graph()).static_order())


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
