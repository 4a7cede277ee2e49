"""Matrix products, convolutions, nonlinearities and softmaxes, recognised in the programs of networks."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn

from nnlearn.programs.read import ALL_CALLS, called_program
from nnlearn.programs.walk import At, Visit

PRODUCTS = {"dot_general": "matmul", "conv_general_dilated": "conv"}
SQUASHING = {"tanh": 0.97, "sigmoid": 0.97, "erf": 0.97, "hard_tanh": 1.0, "hard_sigmoid": 1.0, "soft_sign": 0.97}
"""Functions with two flat ends, and the distance from zero at which they count as saturated."""
RECTIFIED = {"relu", "relu6"}
SMOOTH = {"gelu", "silu", "elu", "selu", "celu", "mish", "hard_silu", "squareplus", "softplus"}
NORMALIZED = {"softmax", "log_softmax"}
NAMES = {name: name for name in (*SQUASHING, *RECTIFIED, *SMOOTH, *NORMALIZED, "leaky_relu")}
NAMES |= {"swish": "silu", "hard_swish": "hard_silu", "log_sigmoid": "softplus", "_softmax": "softmax"}
PRIMITIVES = {"tanh": "tanh", "logistic": "sigmoid", "erf": "erf", "erfc": "erf"}
GATED = {"tanh": "gelu", "erf": "gelu", "sigmoid": "silu"}


class Source(NamedTuple):
    """An operation of interest: its kind and its position in the program."""

    kind: str
    at: At


class Seen(NamedTuple):
    """What an operation was recognised as.

    Attributes:
      kind: the kind, empty if it is none of interest.
      of: the kinds of the operations that lead directly to it.
      axes: the axes over which a softmax normalizes.
      replaced: earlier operations that are parts of this one, and count no more.
    """

    kind: str = ""
    of: tuple[str, ...] = ()
    axes: tuple[int, ...] = ()
    replaced: tuple[Source, ...] = ()


def recognise(visit: Visit) -> Seen:
    """The kind of an operation; its result's mark then names it as the source of what follows."""
    if not visit.after:
        return Seen()
    mark, equation, before = visit.after[0], visit.equation, visit.before
    kind, axes, replaced = _kind(equation, before)
    result: Any = equation.outvars[0].aval
    if not kind or not jnp.issubdtype(result.dtype, jnp.floating):
        return Seen()
    if kind not in PRODUCTS.values() and not mark.reached:  # in data or random numbers
        return Seen()
    if kind in PRODUCTS.values():
        weight = next((each.leaf for each in before if each.is_weight), "")
        mark = mark._replace(layer=(visit.at, weight)) if weight else mark
    led = mark.sources - set(replaced)
    visit.after[0] = mark._replace(sources=frozenset({Source(kind, visit.at)}))
    return Seen(kind, tuple(sorted({source.kind for source in led})), axes, replaced)


def _kind(equation: JaxprEqn, before: Any) -> tuple[str, tuple[int, ...], tuple[Source, ...]]:
    primitive = equation.primitive.name
    called = called_nonlinearity(equation)
    if called is not None:
        return called, softmax_axes(equation) if called in NORMALIZED else (), ()
    if primitive in PRODUCTS:
        return PRODUCTS[primitive], (), ()
    if primitive in PRIMITIVES:
        return PRIMITIVES[primitive], (), ()
    if primitive == "div" and before[0].is_exp and before[1].sum_of and before[1].sum_of[0] == before[0].name:
        return "softmax", before[1].sum_of[1], ()
    if _is_relu(primitive, before):
        return "relu", (), ()
    if primitive == "mul":
        for one, other in (before, before[::-1]):
            gates = tuple(source for source in one.sources - other.sources if source.kind in GATED)
            if len(gates) == 1 and one.trail & other.trail:
                return GATED[gates[0].kind], (), gates
    return "", (), ()


def _is_relu(primitive: str, before: Any) -> bool:
    """``max(x, 0)``, ``where(x > 0, x, 0)`` or ``x * (x > 0)``."""
    if primitive == "max":
        # the maximum of a variance and 0 is no relu
        return [mark.constant for mark in before].count(0.0) == 1 and not any(mark.is_total for mark in before)
    if primitive == "select_n" and len(before) == 3:
        asked, values = before[0].compares, before[1:]
        kept = [mark for mark in values if mark.constant is None]
        return len(kept) == 1 and 0.0 in (mark.constant for mark in values) and asked == (kept[0].name, 0.0)
    return primitive == "mul" and any(mark.compares == (other.name, 0.0) for mark, other in (before, before[::-1]))


def called_nonlinearity(equation: JaxprEqn) -> str | None:
    """The kind of nonlinearity that a call of a jitted function computes, judged by its name; None if it is none.

    >>> import jax
    >>> called_nonlinearity(jax.make_jaxpr(jax.nn.silu)(1.0).jaxpr.eqns[0])
    'silu'
    """
    if equation.primitive.name not in ALL_CALLS:
        return None
    kind = NAMES.get(str(equation.params.get("name", "")))
    if kind is None or len(equation.outvars) != 1:
        return None
    result: Any = equation.outvars[0].aval
    operands: list[Any] = [var.aval for var in equation.invars]
    arrays = [aval for aval in operands if getattr(aval, "shape", ()) != () or not result.shape]
    fits = len(arrays) == 1 and arrays[0].shape == result.shape and jnp.issubdtype(result.dtype, jnp.floating)
    return kind if fits else None


def softmax_axes(equation: JaxprEqn) -> tuple[int, ...]:
    """The axes over which a called softmax sums; empty if it sums over none.

    >>> import jax
    >>> call = jax.make_jaxpr(lambda x: jax.nn.log_softmax(x, axis=0))(jnp.ones((2, 3))).jaxpr.eqns[0]
    >>> softmax_axes(call)
    (0,)
    """

    def search(program: ClosedJaxpr | None) -> tuple[int, ...]:
        for inner in program.jaxpr.eqns if program else ():
            if inner.primitive.name == "reduce_sum":
                return tuple(inner.params["axes"])
            if found := search(called_program(inner)):
                return found
        return ()

    return search(called_program(equation))


__all__ = [
    "PRODUCTS",
    "RECTIFIED",
    "SMOOTH",
    "SQUASHING",
    "Seen",
    "Source",
    "called_nonlinearity",
    "recognise",
    "softmax_axes",
]
