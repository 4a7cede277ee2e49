"""Healthy programs after public tutorials, in which the diagnosis must find nothing."""

from benchmarks.faults.tutorials import classic, graphs, pictures, sequences, signals, tables

MODULES = (classic, graphs, pictures, sequences, signals, tables)
