"""Figures of runs, sweeps and comparisons, drawn with matplotlib from plain arrays; needs the extra ``plot``."""
