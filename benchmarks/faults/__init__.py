"""Training programs, healthy and faulty, on which the diagnosis is measured.

- ``case``: a program as parts that can be replaced, a fault as a change of them, and the case that a diagnosis gets.
- ``development``, ``held_out``: programs and faults, one file for each kind of data. Thresholds of the diagnosis are
  set on the first group. The second one is run to report figures; nothing may be tuned on it.
- ``reports``: programs after public reports, each broken and mended, with a ``run`` of its own. Thresholds of the
  diagnosis were also set on them.
- ``verify``: trains all programs and writes what each fault costs. A fault that costs nothing is left out of ``run``.
- ``run``: diagnoses all programs, counts, and compares with the rules in ``rules``.

A new program is a function that returns a ``Program``, listed in the ``PROGRAMS`` of its file; a new fault is a line in
its ``FAULTS``. A new pair of ``reports`` is a function of ``mended``, decorated with the address of the report and with
the findings that are right.
"""
