"""The README keeps its word: its code runs, and it names every public thing."""

import ast
import inspect
import re
from pathlib import Path

import jax
import pytest

import nnlearn

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_blocks_run_as_printed():
    with jax.numpy_rank_promotion("allow"):  # as a reader's Python does
        exec(compile("\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)), "README.md", "exec"), {})


def test_there_are_three_commands_and_each_makes_its_own_environment():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3 and all(block.startswith("python3 -m venv .venv && ") for block in blocks)
    assert blocks[0].strip().endswith("nnlearn compare") and "pytest" in blocks[1]
    assert blocks[2].strip().endswith("nnlearn learn mnist")


def public_names():
    modules = {name for name, value in vars(nnlearn).items() if inspect.ismodule(value)}
    return sorted(name for name in vars(nnlearn) if not name.startswith("_") and name not in modules)


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_is_in_the_readme_and_documented(name):
    assert f"`{name}`" in README or f"`{name}(" in README
    assert inspect.getdoc(getattr(nnlearn, name))


def functions_of(module):
    for name, value in vars(module).items():
        if callable(value) and getattr(value, "__module__", "").startswith("nnlearn") and not name.startswith("_"):
            yield f"{module.__name__}.{name}", value


def documented():
    from nnlearn import data, datasets, losses, models, optimizers, schedules, train, transforms

    for module in (data, datasets, losses, models, optimizers, schedules, train, transforms):
        yield from functions_of(module)


@pytest.mark.parametrize(("name", "value"), [pytest.param(*pair, id=pair[0]) for pair in documented()])
def test_public_functions_show_an_example(name, value):
    if inspect.isfunction(value):
        assert ">>>" in (value.__doc__ or ""), f"{name} has no example"
        assert value.__annotations__ or not inspect.signature(value).parameters, f"{name} has no types"


def test_no_python_file_is_without_a_docstring():
    for path in (Path(nnlearn.__file__).parent).rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
