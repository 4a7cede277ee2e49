"""Programs after public reports, each of them broken and mended; the diagnosis must find the cause and then nothing.

The programs are written anew, in the ways people write them: plain JAX, flax, equinox and optax. Each one keeps the
address of its report. Programs after tutorials are healthy, and have no broken form. Thresholds of the diagnosis were
also set on all of them.
"""

from benchmarks.faults.reports import (
    curves,
    decoders,
    digits,
    distances,
    embeddings,
    fields,
    images,
    latent,
    lines,
    loops,
    padded,
    pictures,
    points,
    policies,
    regressions,
    sequences,
    series,
    tables,
    texts,
    transformers,
)
from benchmarks.faults.reports.case import Report
from benchmarks.faults.tutorials import graphs as tutorial_graphs
from benchmarks.faults.tutorials import pictures as tutorial_pictures
from benchmarks.faults.tutorials import sequences as tutorial_sequences
from benchmarks.faults.tutorials import tables as tutorial_tables

MODULES = (digits, embeddings, fields, images, latent, loops, points, regressions, sequences, tables, texts)
MODULES += (curves, decoders, distances, lines, padded, pictures, policies, series, transformers)
TUTORIALS = (tutorial_graphs, tutorial_pictures, tutorial_sequences, tutorial_tables)


def reports() -> list[Report]:
    """All programs, module by module."""
    return [report for module in (*MODULES, *TUTORIALS) for report in module.REPORTS]
