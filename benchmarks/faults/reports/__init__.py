"""Programs after public reports, each of them broken and mended; the diagnosis must find the cause and then nothing.

The programs are written anew, in the ways people write them: plain JAX, flax, equinox and optax. Each one keeps the
address of its report. Thresholds of the diagnosis were also set on them.
"""

from benchmarks.faults.reports import (
    digits,
    embeddings,
    fields,
    images,
    latent,
    loops,
    points,
    regressions,
    sequences,
    tables,
    texts,
)
from benchmarks.faults.reports.case import Report

MODULES = (digits, embeddings, fields, images, latent, loops, points, regressions, sequences, tables, texts)


def reports() -> list[Report]:
    """All pairs, module by module."""
    return [report for module in MODULES for report in module.REPORTS]
