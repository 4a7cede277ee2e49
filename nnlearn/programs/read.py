"""What every reader of jaxprs shares: calls of other programs, operands, and the evaluation of an equation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

T = TypeVar("T")

JIT = frozenset({"jit", "pjit"})  # the primitive of a compiled call; the name depends on JAX's version
CALLS = dict.fromkeys(JIT, "jaxpr") | {"closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
CALLS |= {"remat2": "jaxpr", "checkpoint": "jaxpr"}
"""Primitives that call a program, each with the parameter that holds it."""
CUSTOM_DERIVATIVES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
"""Calls that define their own derivative: a program that inlines them loses it."""
CUSTOM_BATCHING = {"custom_vmap_call": "call"}
"""Calls that define their own ``vmap``: likewise."""
ALL_CALLS = CALLS | CUSTOM_DERIVATIVES

ELEMENTWISE_NAMES = """
abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp complex conj convert_element_type copy copy_p cos
cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic
lt max min mul ne neg nextafter not or population_count pow real reduce_precision rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor
"""
ELEMENTWISE = frozenset(ELEMENTWISE_NAMES.split())
LARGE = 1 << 16  # elements of an array above which an extra copy or pass costs more than reading the program


def closed(program: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    """A program with its constants; an open one has none."""
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())


def called_program(
    equation: JaxprEqn, *, custom_derivatives: bool = True, custom_batching: bool = False
) -> ClosedJaxpr | None:
    """The program that an equation calls; None if the equation is an operation.

    Args:
      equation: an equation of a jaxpr.
      custom_derivatives: include calls that define their own derivative.
      custom_batching: include calls that define their own ``vmap``.

    >>> import jax
    >>> call = jax.make_jaxpr(jax.jit(lambda x: x + 1))(1).jaxpr.eqns[0]
    >>> [each.primitive.name for each in called_program(call).jaxpr.eqns]
    ['add']
    """
    calls = (ALL_CALLS if custom_derivatives else CALLS) | (CUSTOM_BATCHING if custom_batching else {})
    parameter = calls.get(equation.primitive.name)
    program = None if parameter is None else equation.params.get(parameter)
    return None if program is None else closed(program)


def bind(equation: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """Evaluate one equation.

    Returns:
      Its results, in a sequence of one for an operation with a single result.
    """
    with equation.ctx.manager:
        results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
    return results if equation.primitive.multiple_results else [results]


def interpret(
    program: ClosedJaxpr,
    arguments: Sequence[T],
    apply: Callable[[JaxprEqn, list[T]], Sequence[T]] = bind,
    constant: Callable[[Any, Any], T] = lambda value, aval: value,
) -> list[T]:
    """The results of a program under another meaning of its values.

    Args:
      program: a closed program.
      arguments: what stands for its arguments.
      apply: from an equation and its operands to its results.
      constant: from a constant and its shaped type to what stands for it.

    >>> import jax
    >>> program = jax.make_jaxpr(lambda x: 2.0 * x + 1.0)(1.0)
    >>> name = lambda equation, operands: [f"{equation.primitive}({', '.join(operands)})"]
    >>> interpret(program, ["x"], name, lambda value, aval: str(value))
    ['add(mul(2.0, x), 1.0)']
    """
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.invars, arguments, strict=True))
    for var, value in zip(jaxpr.constvars, program.consts, strict=True):
        known[var] = constant(value, var.aval)

    def read(atom):
        return constant(atom.val, atom.aval) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        results = apply(equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def variables(atoms: Iterable[Any]) -> list[Var]:
    """Operands that are variables, without literal constants."""
    return [atom for atom in atoms if isinstance(atom, Var)]


def makers(jaxpr: Jaxpr) -> dict[Var, JaxprEqn]:
    """For each variable that a program computes: its equation."""
    return {var: equation for equation in jaxpr.eqns for var in equation.outvars}


def is_large(aval: Any) -> bool:
    """Whether an array of this type has at least ``LARGE`` floating-point elements."""
    return aval.size >= LARGE and jnp.issubdtype(aval.dtype, jnp.floating)


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a ``scan`` are constants, and how many are carried, from its parameters."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    fixed, carried, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(fixed), len(carried)


__all__ = [
    "ALL_CALLS",
    "CALLS",
    "ELEMENTWISE",
    "JIT",
    "bind",
    "called_program",
    "closed",
    "interpret",
    "is_large",
    "makers",
    "scan_sizes",
    "variables",
]
