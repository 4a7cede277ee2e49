"""Every test runs with several virtual devices and without implicit rank promotion."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

# One in so many cases of the large tables, and of the tests marked slow.
SAMPLED = {
    "test_contract.py": 4,
    "test_losses.py": 2,
    "test_losses_contrastive.py": 2,
    "test_losses_likelihood.py": 2,
    "test_losses_overlap.py": 2,
    "test_packed_training.py": 4,
    "test_packing.py": 2,
    "test_schedules.py": 3,
    "test_transforms.py": 3,
}
SLOW = 4


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="every slow test, and every case of the large tables")


def pytest_collection_modifyitems(config, items):
    """Keep a share of what takes long: of each table another share in each test, so that every row is met somewhere."""
    named = any("::" in argument for argument in config.args)  # who asks for one test by name gets it
    if config.getoption("--whole") or named:
        return
    groups = {}
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        table = hasattr(item, "callspec") and item.path.name in SAMPLED
        group = "slow" if slow else (item.path, item.originalname) if table else item
        groups.setdefault(group, []).append(item)
    kept = set()
    for number, (group, cases) in enumerate(groups.items()):
        one_in = SLOW if group == "slow" else SAMPLED.get(cases[0].path.name, 1)
        kept.update(cases[number % min(one_in, len(cases)) :: one_in])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
