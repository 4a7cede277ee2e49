"""The programs and faults of a group, from the modules of its package."""

import importlib
import pkgutil

from benchmarks.faults.case import Fault, Program

GROUPS = ("development", "held_out")


def load(group: str) -> tuple[dict[str, Program], list[Fault]]:
    """All healthy programs of a group by name, and its faults."""
    package = importlib.import_module(f"benchmarks.faults.{group}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    programs = [make() for module in modules for make in getattr(module, "PROGRAMS", ())]
    faults = [fault for module in modules for fault in getattr(module, "FAULTS", ())]
    return {program.name: program for program in programs}, faults
