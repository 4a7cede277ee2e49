"""The README's code runs, and every public name is documented."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import jax

import nnlearn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_blocks_run_as_printed():
    with jax.numpy_rank_promotion("allow"):  # JAX's default
        exec(compile("\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)), "README.md", "exec"), {})


def test_three_commands_each_make_an_environment():
    blocks = dict(re.findall(r"<!-- (\w+) -->\n```bash\n(.*?)```", README, re.DOTALL))
    assert len(blocks) == README.count("```bash") == 3
    assert all(block.startswith("python3 -m venv .venv && ") for block in blocks.values())
    assert blocks["compare"].strip().endswith("nnlearn compare") and "pytest" in blocks["test"]
    assert blocks["learn"].strip().endswith("nnlearn learn mnist")


def test_the_readme_is_short():
    assert README.count("\n") <= 150


def exports(module):
    """The names that a module exports by ``from x import y as y``, with the modules that define them."""
    tree = ast.parse(inspect.getsource(module))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]  # also under TYPE_CHECKING
    return {alias.name: node.module for node in imports for alias in node.names if alias.name == alias.asname}


def public_things():
    """Names and values of everything that ``nnlearn`` and its public rooms export or define."""
    rooms = [nnlearn, *(getattr(nnlearn, name) for name, origin in exports(nnlearn).items() if origin == "nnlearn")]
    for room in rooms:
        defined = [name for name, value in vars(room).items() if getattr(value, "__module__", "") == room.__name__]
        for name in [*exports(room), *defined]:
            value = getattr(room, name)
            if not name.startswith("_") and getattr(value, "__module__", "").startswith("nnlearn"):
                yield f"{room.__name__}.{name}", value


def public_functions():
    """Public functions by name, each once, under its shortest name."""
    found = {}
    for name, value in sorted(public_things(), key=lambda pair: len(pair[0])):
        if inspect.isfunction(value):
            found.setdefault(value, name)
    return {name: value for value, name in found.items()}


def test_every_public_name_is_documented():
    things = dict(public_things())
    assert len(things) > 300
    assert [name for name, value in things.items() if not inspect.getdoc(value)] == []


def test_exports_are_listed_in_all():
    """Each name in an ``__all__`` exists, and each name that a room exports is in the ``__all__`` of its file."""
    wrong = []
    for path in sorted((ROOT / "nnlearn").rglob("__init__.py")):
        room = importlib.import_module(".".join(path.relative_to(ROOT).parts[:-1]))
        for name, origin in exports(room).items():
            if not origin.startswith("nnlearn"):
                continue
            listed = getattr(importlib.import_module(origin), "__all__", None)
            if listed is not None and name not in listed:
                wrong.append(f"{origin}: {name} is not in __all__")
    for name, module in sorted(sys.modules.items()):
        if name.startswith("nnlearn"):
            listed = getattr(module, "__all__", ())
            wrong += [f"{name}: {each} in __all__ does not exist" for each in listed if not hasattr(module, each)]
    assert wrong == [], wrong


def test_public_functions_have_an_example_and_types():
    functions = public_functions()
    assert [name for name, value in functions.items() if ">>>" not in (value.__doc__ or "")] == []
    untyped = [
        f"{name}({parameter})"
        for name, value in functions.items()
        for parameter in inspect.signature(value).parameters
        if parameter not in value.__annotations__
    ]
    assert untyped == []
    assert [name for name, value in functions.items() if "return" not in value.__annotations__] == []


def section(doc, title):
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n|\n)+)", doc + "\n", re.MULTILINE)
    return found.group(1) if found else ""


def test_the_arguments_of_public_functions_are_described():
    """By name under Args, or by ``arguments as in another``; a single argument may be in the summary."""
    functions, missing = public_functions(), []
    names = {name.rsplit(".", 1)[1] for name in functions}
    for name, value in functions.items():
        doc, parameters = inspect.getdoc(value), list(inspect.signature(value).parameters)
        elsewhere = re.search(r"rguments (?:are )?(?:as in|those of|documented in) ``([\w.]+)``", doc)
        if len(parameters) < 2 or (elsewhere and elsewhere.group(1).rsplit(".", 1)[-1] in names):
            continue
        described = section(doc, "Args")
        missing += [f"{name}({each})" for each in parameters if not re.search(rf"\b{each}\b", described)]
    assert missing == [], missing


def test_the_results_of_public_functions_are_described():
    """Under Returns if the type says little and there are several arguments."""
    open_types = r"Array|tuple|dict|Any\b|Callable|ndarray"
    missing = []
    for name, value in public_functions().items():
        says_little = re.search(open_types, str(value.__annotations__.get("return")))
        if (
            says_little
            and len(inspect.signature(value).parameters) > 1
            and not section(inspect.getdoc(value), "Returns")
        ):
            missing.append(name)
    assert missing == [], missing


def test_the_errors_of_public_functions_are_described():
    """Under Raises if the function itself raises or checks its arguments."""
    raising = r"^\s+raise [A-Z]|\bcheck_(?!point)\w+\("
    missing = [
        name
        for name, value in public_functions().items()
        if re.search(raising, inspect.getsource(inspect.unwrap(value)).replace(value.__doc__ or "", ""), re.MULTILINE)
        and not section(inspect.getdoc(value), "Raises")
    ]
    assert missing == [], missing


def test_every_python_file_has_a_docstring():
    files = [*(ROOT / "nnlearn").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    assert [str(path) for path in files if not ast.get_docstring(ast.parse(path.read_text()))] == []
