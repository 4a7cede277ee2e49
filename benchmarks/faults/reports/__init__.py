"""Programs after public reports, each of them broken and mended; the diagnosis must find the cause and then nothing.

The programs are written anew, in the ways people write them: plain JAX, flax, equinox and optax. Each one keeps the
address of its report. Programs after tutorials are healthy, and have no broken form. Thresholds of the diagnosis were
also set on all of them.
"""

from benchmarks.faults import tutorials
from benchmarks.faults.reports import (
    axes,
    classifiers,
    clips,
    clouds,
    colours,
    course,
    curves,
    decoders,
    digits,
    distances,
    embeddings,
    fields,
    forecasts,
    gates,
    images,
    latent,
    lines,
    loops,
    missing,
    outputs,
    overlaps,
    padded,
    pictures,
    points,
    policies,
    pressures,
    pruned,
    quantities,
    rare,
    regressions,
    research,
    schedules,
    sequences,
    series,
    shapes,
    speech,
    tables,
    texts,
    training,
    transformers,
    windows,
)
from benchmarks.faults.reports.case import Report

MODULES = (digits, embeddings, fields, images, latent, loops, points, regressions, sequences, tables, texts)
MODULES += (curves, decoders, distances, lines, padded, pictures, policies, series, transformers)
MODULES += (course, forecasts, research, shapes, speech, training)
MODULES += (axes, classifiers, clips, missing, outputs, quantities, schedules, windows)
MODULES += (clouds, colours, gates, overlaps, pressures, pruned, rare)


def reports() -> list[Report]:
    """All programs, module by module."""
    return [report for module in (*MODULES, *tutorials.MODULES) for report in module.REPORTS]
