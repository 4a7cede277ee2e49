"""Tests use several virtual devices, no implicit rank promotion, and a sample of the large tables."""

import os
import subprocess

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

# File, or file::test -> n: one in n cases of its parametrised tests is drawn. SLOW is the same for all slow tests.
SAMPLED = {
    "test_adapters.py": 2,
    "test_checkpoints.py": 3,
    "test_compare.py": 3,
    "test_compress.py": 2,
    "test_contract.py": 18,
    "test_convnet.py": 3,
    "test_ctc.py": 3,
    "test_data.py": 2,
    "test_diagnose.py": 9,
    "test_docs.py": 18,
    "test_durable.py": 2,
    "test_faults.py": 2,
    "test_faults.py::test_the_diagnosis_of_a_public_report": 68,
    "test_fit.py": 3,
    "test_full_disk.py": 2,
    "test_in_place.py": 3,
    "test_learning.py": 3,
    "test_linear_cross_entropy.py": 3,
    "test_losses.py": 9,
    "test_losses_contrastive.py": 3,
    "test_losses_edges.py": 3,
    "test_losses_likelihood.py": 3,
    "test_losses_overlap.py": 3,
    "test_losses_properties.py": 3,
    "test_losses_ranking.py": 3,
    "test_losses_sparsemax.py": 3,
    "test_meshes.py": 3,
    "test_models.py": 6,
    "test_native.py": 9,
    "test_nonfinite.py": 2,
    "test_optax_faults.py": 2,
    "test_packed_training.py": 18,
    "test_packing.py": 9,
    "test_packing_proof.py": 2,
    "test_per_example.py": 3,
    "test_run.py": 3,
    "test_schedules.py": 9,
    "test_sharding.py": 18,
    "test_silence.py": 2,
    "test_step.py": 3,
    "test_taps.py": 2,
    "test_tasks.py": 2,
    "test_training_aids.py": 3,
    "test_transformer.py": 3,
    "test_transforms.py": 9,
}
SLOW = 9


def rotation():
    """The offset of the share: ``NNLEARN_SAMPLE``, or the hash of the commit, so that commits draw different cases."""
    if os.environ.get("NNLEARN_SAMPLE"):
        return int(os.environ["NNLEARN_SAMPLE"])
    command = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout[:8], 16)
    except (OSError, subprocess.CalledProcessError, ValueError):  # not a checkout
        return 0


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="every slow test, and every case of the large tables")


def pytest_report_header(config):
    if not config.getoption("--whole"):
        return f"a share of the large tables and slow tests: NNLEARN_SAMPLE={rotation() % 36} (--whole runs all)"


def pytest_collection_modifyitems(config, items):
    """Keep a share of the slow tests and of each large table; the offset differs between the tests of a table.

    36 consecutive values of ``NNLEARN_SAMPLE`` draw every case. Tests marked ``always`` and tests named on the command
    line are never left out.
    """
    named = any("::" in argument for argument in config.args)
    if config.getoption("--whole") or named:
        return
    groups, kept, first = {}, set(), rotation()
    for item in items:
        if item.get_closest_marker("always") is not None:
            kept.add(item)
            continue
        slow = item.get_closest_marker("slow") is not None
        table = hasattr(item, "callspec") and item.path.name in SAMPLED
        group = "slow" if slow else (item.path, item.originalname) if table else item
        groups.setdefault(group, []).append(item)
    for number, (group, cases) in enumerate(groups.items()):
        file, test = cases[0].path.name, getattr(cases[0], "originalname", None)
        one_in = SLOW if group == "slow" else SAMPLED.get(f"{file}::{test}", SAMPLED.get(file, 1))
        kept.update(cases[(number + first) % min(one_in, len(cases)) :: one_in])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
