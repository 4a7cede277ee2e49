"""Every test runs with several virtual devices and without implicit rank promotion."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

SAMPLED = {"test_contract.py": 3, "test_packed_training.py": 3, "test_schedules.py": 2}


def pytest_addoption(parser):
    parser.addoption(
        "--whole",
        action="store_true",
        help="every case of the large tables; without it one in two or three, another share of the table in each test",
    )


def pytest_collection_modifyitems(config, items):
    """Keep a share of the cases of large tables, so that every test and every row is still met in some combination."""
    named = any("::" in argument for argument in config.args)  # who asks for one test by name gets it
    if config.getoption("--whole") or named:
        return
    functions = {}
    for item in items:
        functions.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    kept = set()
    for number, ((path, _), cases) in enumerate(functions.items()):
        one_in = SAMPLED.get(path.name, 1) if hasattr(cases[0], "callspec") else 1
        kept.update(cases[number % min(one_in, len(cases)) :: one_in])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
