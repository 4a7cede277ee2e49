"""Programs as expressions: what each element of a result is computed from.

Arrays are read as segments of elements that are all computed in the same way. Sums, maxima and other reductions over
whole segments are sets of terms, in any order. So two programs that do the same to the same leaves give equal results,
packed or not. An operation that is not understood makes results that are equal only to themselves: two programs may be
called different although they are equal, never equal although they differ.

Only sums in float32 or better may be regrouped. A sum in bfloat16 equals only the same sum of the same arrays, and so
does a total that is rounded to bfloat16: its last bit is 0.4 %.
"""

from nnlearn.programs.symbolic.interpreter import Interpreter as Interpreter
