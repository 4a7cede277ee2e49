"""Healthy programs after public tutorials, in which the diagnosis must find nothing."""

from benchmarks.faults.tutorials import (
    classic,
    examples,
    graphs,
    mixtures,
    notes,
    pictures,
    quickstarts,
    sequences,
    signals,
    tables,
)

MODULES = (classic, examples, graphs, mixtures, notes, pictures, quickstarts, sequences, signals, tables)
