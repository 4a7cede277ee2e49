"""What an import must not do."""

import subprocess
import sys


def test_an_import_starts_no_backend():
    """A started backend holds an accelerator's memory, and forbids forks and ``jax.distributed.initialize``."""
    code = "import nnlearn; from jax._src import xla_bridge; raise SystemExit(len(xla_bridge._backends))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
