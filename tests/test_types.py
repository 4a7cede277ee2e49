"""The types that users see: their code has neither errors nor unknown types under a strict checker."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def complaints(path: Path) -> list[str]:
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(path)]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    return [f"{item['range']['start']['line'] + 1}: {item['message']}" for item in found["generalDiagnostics"]]


def test_user_code_has_no_unknown_types():
    pytest.importorskip("pyright", reason="the type checker is in the test extra")
    code = Path(__file__).parent / "user_code.py"
    assert "# pyright: strict" in code.read_text()
    assert complaints(code) == []


def test_the_check_can_fail(tmp_path):
    pytest.importorskip("pyright", reason="the type checker is in the test extra")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("# pyright: strict\nimport nnlearn\n\nrate: int = nnlearn.adamw('0.1')\n")
    assert len(complaints(wrong)) == 2


@pytest.mark.slow
def test_user_code_runs():
    import user_code

    state, trace = user_code.whole_run()
    assert int(state.step) > 0 and trace.loss.shape == (16,)
    assert int(user_code.by_hand().step) == 9
