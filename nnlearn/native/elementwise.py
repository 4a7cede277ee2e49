"""Elementwise arithmetic on large arrays in one pass over memory, for any number of results.

XLA's compiler for CPUs compiles an optimizer's update to one loop for each of the new parameters and moments, and each
loop reads the gradient and the moments again. Here the same expressions become one loop in C that reads every array
once and writes every result over the array that it replaces.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import JaxprEqn, Literal, Var

from nnlearn.native.codes import BLOCK as GROUP
from nnlearn.native.codes import HEADER, DecodeKernel, EncodeKernel, kernel_of
from nnlearn.native.kernel import call_kernel

BLOCK = 1 << 15  # elements per unit of work: large enough to amortize its start, small enough to share evenly
TYPES = {"float32": "float", "float64": "double", "bfloat16": "uint16_t", "bool": "uint8_t"}
COMPUTED = {"float32": "float", "float64": "double", "bfloat16": "float", "bool": "int"}
STORED = TYPES | {"uint8": "uint8_t", "uint32": "uint32_t"}  # of 8-bit codes and the seeds of their rounding

PRELUDE = """
#include <math.h>
#include <string.h>

static inline float from_bfloat16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

static inline uint16_t to_bfloat16(float value) { /* round to nearest even; a NaN stays a NaN */
  uint32_t wide;
  memcpy(&wide, &value, 4);
  uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  return value != value ? (uint16_t)((wide >> 16) | 0x40) : (uint16_t)rounded;
}

#define rounded_bfloat16(value) from_bfloat16(to_bfloat16(value))
/* A comparison alone returns a subnormal operand, where XLA returns 0. A product with 1 flushes it; the compiler does
   not know that the factor is 1, so it cannot remove the product. */
static volatile float unknown_one = 1;
#define larger(a, b) (one * ((a) > (b) || (a) != (a) ? (a) : (b)))
#define smaller(a, b) (one * ((a) < (b) || (a) != (a) ? (a) : (b)))
#define sign_of(a) ((a) > 0 ? 1 : (a) < 0 ? -1 : (a))
#ifdef __clang__
#define SAME_PLACES _Pragma("clang loop vectorize(assume_safety)")
#else
#define SAME_PLACES _Pragma("GCC ivdep")
#endif
"""

# C expressions of the operands; ``f`` is the suffix of a float function.
OPERATIONS = {
    "add": "{0} + {1}",
    "add_any": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "fabs{f}({0})",
    "sqrt": "sqrt{f}({0})",
    "rsqrt": "1 / sqrt{f}({0})",
    "square": "{0} * {0}",
    "max": "larger({0}, {1})",
    "min": "smaller({0}, {1})",
    "sign": "sign_of({0})",
    "copy": "{0}",
    "copy_p": "{0}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "is_finite": "{0} - {0} == 0",
}
LOGICAL = {"and": "{0} & {1}", "or": "{0} | {1}", "not": "!{0}", "eq": "{0} == {1}", "ne": "{0} != {1}", "copy": "{0}"}
POWERS = {1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}", 4: "({0} * {0}) * ({0} * {0})"}


@dataclasses.dataclass(frozen=True, eq=False)
class ElementwiseKernel:
    """A ``Kernel`` of one loop: equations of a program on arrays of one shape, and scalars.

    Arrays in 8-bit codes are decoded and encoded within the loop.

    Kernels that compute the same are equal, so a program that updates many arrays in the same way compiles one.

    Attributes:
      source: the loop in C.
      equations: the same in JAX, in the order of evaluation.
      inputs: the variables that the equations read and do not compute, arrays first.
      outputs: the variables of the results.
      in_place: pairs of the index of an input and the index of the result that may take its memory.
    """

    source: str
    equations: tuple
    inputs: tuple[Var, ...]
    outputs: tuple[Var, ...]
    in_place: tuple[tuple[int, int], ...]

    handler = "one_pass"
    flags = ()

    def _key(self):
        return self.source, self.in_place, tuple(map(form, self.inputs)), tuple(map(form, self.outputs))

    def __eq__(self, other):
        return isinstance(other, ElementwiseKernel) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def __call__(self, *values: jax.Array) -> list[jax.Array]:
        return call_kernel(self, *values)

    def results(self, *inputs) -> list[ShapedArray]:
        return [ShapedArray(*form(var)) for var in self.outputs]

    def vmapped(self, axes, *values):
        results = jax.vmap(self.reference, in_axes=axes)(*values)
        return results, [0] * len(results)

    def reference(self, *values: jax.Array) -> list[jax.Array]:
        """Compute the results by JAX's operations."""
        known = dict(zip(self.inputs, values, strict=True))
        for equation in self.equations:
            operands = [each.val if isinstance(each, Literal) else known[each] for each in equation.invars]
            results = equation.primitive.bind(*operands, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
            known |= dict(zip(equation.outvars, results, strict=True))
        return [known[var] for var in self.outputs]


def can_compute(equation) -> bool:
    """Whether a kernel can compute an equation on arrays of one shape, or scalars."""
    return _in_c(equation, ["a"] * len(equation.invars)) is not None


def make_kernel(
    equations: Sequence[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Var], in_place: dict[int, int]
) -> ElementwiseKernel:
    """Make a kernel of equations that ``can_compute`` accepts, and of codes; see ``ElementwiseKernel``."""
    source = _source(equations, inputs, outputs)
    return ElementwiseKernel(source, tuple(equations), tuple(inputs), tuple(outputs), tuple(sorted(in_place.items())))


def form(atom: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and dtype of a variable or literal."""
    return atom.aval.shape, atom.aval.dtype


def _dtype(atom) -> str:
    return np.dtype(atom.aval.dtype).name


def _number(value, dtype: str) -> str:
    if dtype == "bool":
        return str(int(value))
    value = float(np.asarray(value, dtype))  # a constant has the precision of the other operand
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    return f"({value.hex()}{'' if dtype == 'float64' else 'f'})"


def _in_c(equation, operands: Sequence[str]) -> str | None:
    """Return the C expression of an equation; None if it is not supported."""
    name, params = equation.primitive.name, equation.params
    made, *read = [_dtype(each) for each in (equation.outvars[0], *equation.invars)]
    if not {made, *read} <= TYPES.keys() or len(equation.outvars) != 1:
        return None
    if name == "convert_element_type":
        return _converted(operands[0], read[0], made)
    if name == "select_n":
        picked = f"({operands[0]} ? {operands[2]} : {operands[1]})" if len(operands) == 3 else None
        return picked if read[0] == "bool" else None
    if name == "integer_pow":
        form = POWERS.get(params["y"]) if made != "bfloat16" or params["y"] <= 2 else None
    else:
        form = (LOGICAL if set(read) == {"bool"} else OPERATIONS).get(name)
    if form is None:
        return None
    text = form.format(*operands, f="" if made == "float64" else "f")
    return f"rounded_bfloat16({text})" if made == "bfloat16" and name not in ("copy", "copy_p") else text


def _converted(operand: str, read: str, made: str) -> str:
    if made == "bool":
        return f"{operand} != 0"
    if made == "bfloat16" and read != "bool":
        return f"rounded_bfloat16((float){operand})"
    return f"({COMPUTED[made]}){operand}"


def is_scalar(atom: Any) -> bool:
    """Whether a variable or literal has no axes."""
    return atom.aval.ndim == 0


def _source(equations: Sequence, inputs: Sequence[Var], outputs: Sequence[Var]) -> str:
    """Return the C source of the loop and its handler."""
    names = {var: f"{'s' if is_scalar(var) else 'x'}{at}" for at, var in enumerate(inputs)}
    decoding = [each for each in equations if isinstance(kernel_of(each), DecodeKernel)]
    encoding = [each for each in equations if isinstance(kernel_of(each), EncodeKernel)]
    coded = {var for each in decoding for var in each.invars} | {var for each in encoding for var in each.outvars}
    fields, loads, heads, body = [], [], [], []
    for at, var in enumerate(inputs):
        kind, dtype = STORED[_dtype(var)], _dtype(var)
        if is_scalar(var):
            read, computed = f"*({kind}*)argument(frame, {at})", COMPUTED.get(dtype, kind)
            fields.append(f"{computed} s{at};")
            loads.append(f".s{at} = {f'from_bfloat16({read})' if dtype == 'bfloat16' else read}")
            heads.append(f"const {computed} s{at} = work->s{at};")
        else:
            fields.append(f"const {kind}* a{at};")
            loads.append(f".a{at} = argument(frame, {at})")
            heads.append(f"const {kind}* a{at} = work->a{at};")
            value = f"from_bfloat16(a{at}[i])" if dtype == "bfloat16" else f"a{at}[i]"
            if var not in coded:
                body.append(f"const {COMPUTED[dtype]} x{at} = {value};")
    for at, var in enumerate(outputs):
        fields.append(f"{STORED[_dtype(var)]}* o{at};")
        loads.append(f".o{at} = result(frame, {at})")
        heads.append(f"{STORED[_dtype(var)]}* o{at} = work->o{at};")
    decoded = {each.outvars[0]: f"d{at}[i - start]" for at, each in enumerate(decoding)}
    names |= decoded
    heads += _arithmetic(equations, names, body)
    for at, var in enumerate(outputs):
        if var not in coded:
            dtype, name = _dtype(var), names[var]
            body.append(f"o{at}[i] = {f'to_bfloat16({name})' if dtype == 'bfloat16' else name};")
    loop = f"SAME_PLACES\n  for (int64_t i = first; i < last; i++) {{\n    {' '.join(body)}\n  }}"
    if coded:
        loop = _in_groups(body, names, inputs, outputs, decoding, encoding)
    return f"""{HEADER.read_text() if coded else ""}{PRELUDE}
typedef struct {{
  int64_t elements;
  {" ".join(fields)}
}} Work;

static void run(void* data, int64_t block) {{
  const Work* work = data;
  /* Start at the end: the end of the gradient was accessed last and is still in the cache. */
  const int64_t first = ((work->elements - 1) / {BLOCK} - block) * {BLOCK};
  const int64_t last = first + {BLOCK} < work->elements ? first + {BLOCK} : work->elements;
  const float one = unknown_one;
  {" ".join(heads)}
  {loop}
}}

XLA_FFI_Error* one_pass(XLA_FFI_CallFrame* frame) {{
  if (answered(frame)) return NULL;
  Work work = {{.elements = length(frame->rets.rets[0]), {", ".join(loads)}}};
  run_blocks(frame, (work.elements + {BLOCK} - 1) / {BLOCK}, run, &work);
  return NULL;
}}
"""


def _arithmetic(equations: Sequence, names: dict[Var, str], body: list[str]) -> list[str]:
    """Append the arithmetic of one element to ``body`` and name its results; return what precedes the loop."""
    reciprocals = {}

    def text(atom):
        return _number(atom.val, _dtype(atom)) if isinstance(atom, Literal) else names[atom]

    for index, equation in enumerate(equations):
        if kernel_of(equation) is not None:
            continue
        made = equation.outvars[0]
        if equation.primitive.name == "broadcast_in_dim":
            names[made] = text(equation.invars[0])
            continue
        operands = [text(each) for each in equation.invars]
        value = _in_c(equation, operands)
        if equation.primitive.name == "div" and operands[1][0] in "s(" and _dtype(made) != "bfloat16":
            # As in XLA: one division for the whole loop, and a product for each element.
            value = f"{operands[0]} * {reciprocals.setdefault(operands[1], f'r{len(reciprocals)}')}"
        names[made] = f"v{index}"
        body.append(f"const {COMPUTED[_dtype(made)]} v{index} = {value};")
    return [f"const typeof({one}) {inverse} = 1 / {one};" for one, inverse in reciprocals.items()]


def _in_groups(body, names, inputs, outputs, decoding, encoding) -> str:
    """The loop over groups of numbers that share a scale: decode, compute, encode."""
    before, after = [], []
    for at, equation in enumerate(decoding):
        codes, scales = (inputs.index(var) for var in equation.invars)
        before.append(
            f"float d{at}[{GROUP}]; decode_group(d{at}, a{codes} + start, a{scales}[start / {GROUP}], count);"
        )
    for at, equation in enumerate(encoding):
        codes, scales = (outputs.index(var) for var in equation.outvars)
        before.append(f"float e{at}[{GROUP}]; int32_t largest{at} = 0, signs{at} = 0;")
        value, seed = (names[var] for var in equation.invars)
        # Here, and not in a loop before the encoding, the maximum is free: the square roots take longer.
        body.append(f"e{at}[i - start] = {value}; INSPECT({value}, largest{at}, signs{at})")
        made = f"encode_inspected(o{codes} + start, e{at}, {seed}, start, count, largest{at}, signs{at})"
        after.append(f"o{scales}[start / {GROUP}] = {made};")
    return f"""for (int64_t start = first; start < last; start += {GROUP}) {{
    const int64_t count = start + {GROUP} < last ? {GROUP} : last - start;
    {" ".join(before)}
    SAME_PLACES
    for (int64_t i = start; i < start + count; i++) {{
      {" ".join(body)}
    }}
    {" ".join(after)}
  }}"""


__all__ = ["ElementwiseKernel", "can_compute", "form", "is_scalar", "make_kernel"]
