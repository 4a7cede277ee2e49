"""Statistics of a network's activations, read from the program of ``predict``: no network has to be changed.

Matrix products, convolutions and nonlinearities are recognised by their operations, in networks of nnlearn, flax and
equinox and in hand-written ones alike.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.programs.kinds import PRODUCTS, RECTIFIED, SMOOTH, SQUASHING, called_nonlinearity, recognise
from nnlearn.programs.marks import UNIT
from nnlearn.programs.places import Place, trace_program
from nnlearn.programs.walk import At, Visit, Visitor, Walk, leaf_marks
from nnlearn.tree import compute_dtype
from nnlearn.types import Params, PyTree

ALIKE = 1e-5  # relative difference of units that count as equal
NEARLY_OFF = 0.02  # the largest distance from zero of a smooth unit that counts as off
ONE_SIDED = {"sigmoid", "hard_sigmoid"}  # from 0 to 1; the other squashing functions go from -1 to 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activation:
    """Statistics of the output of one operation of a network, over a batch.

    Inside a loop each statistic has one value per iteration, such as a time step or a layer: shape (iterations,), and
    with loops in loops more axes. Elsewhere statistics are scalars.

    Attributes:
      kind: ``"matmul"``, ``"conv"``, ``"softmax"``, ``"log_softmax"``, or the name of a nonlinearity such as
        ``"relu"``, ``"tanh"``, ``"sigmoid"``, ``"gelu"``.
      layer: the path of the weights in this product, or in the last product before this nonlinearity; may be empty.
      where: the line that computes it.
      shape: the shape of the output, without loops.
      loops: the numbers of iterations of the loops around it.
      units: the number of its units, such as the outputs of a dense layer or the channels of a convolution.
      of: the kinds of the operations that it follows directly, such as ``("matmul",)``.
      is_output: whether the network's output follows from it without another operation of these kinds.
      at: its position in the program.
      mean, std, largest: mean, standard deviation and largest absolute value of the finite elements.
      zero: the share of elements that are exactly zero.
      nonfinite: the share of elements that are infinite or NaN.
      dead: the share of units that are off for every input of the batch: zero after a relu, within 0.02 below zero
        after a smooth relative of it, saturated after a squashing function. NaN for other kinds.
      saturated: the share of elements beyond 0.97 of the range of a squashing function (a sigmoid outside of 0.03 to
        0.97), or of softmax rows with a probability above 0.99. NaN for other kinds.
      alike: the share of units whose outputs equal those of the next unit for every input, as after a constant
        initialisation: training never separates them. NaN for other kinds than products.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    layer: str = dataclasses.field(metadata={"static": True})
    where: Place = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    loops: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    units: int = dataclasses.field(metadata={"static": True})
    of: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    is_output: bool = dataclasses.field(metadata={"static": True})
    at: At = dataclasses.field(metadata={"static": True})
    mean: jax.Array
    std: jax.Array
    largest: jax.Array
    zero: jax.Array
    nonfinite: jax.Array
    dead: jax.Array
    saturated: jax.Array
    alike: jax.Array


def activations(predict: Callable[..., PyTree], params: Params, *inputs: Any) -> list[Activation]:
    """The statistics of all activations of a network on a batch, in the order of its program.

    It can be jitted, vmapped and recorded by a training step. It computes the forward pass once; the statistics read
    each activation a few times.

    Args:
      predict: ``predict(params, *inputs)``, such as ``model.apply``; its output may be any pytree.
      params: the parameters.
      *inputs: its other arguments. The first axis of each array counts examples.

    Returns:
      One ``Activation`` for each matrix product, convolution, nonlinearity and softmax. Operations inside of
      ``while`` loops and of kernels are left out.

    >>> def predict(params, x):
    ...     hidden = jax.nn.relu(x @ params["first"])
    ...     return hidden @ params["second"]
    >>> params = {"first": jnp.array([[1.0, -1.0]]), "second": jnp.ones((2, 3))}
    >>> for found in activations(predict, params, jnp.array([[1.0], [2.0]])):
    ...     print(found.kind, found.layer, found.shape, float(found.mean), float(found.dead))
    matmul first (2, 2) 0.0 nan
    relu first (2, 2) 0.75 0.5
    matmul second (2, 3) 1.5 nan
    """
    program, _ = trace_program(predict, params, *inputs)
    marks = [*leaf_marks(params, weights=True), *leaf_marks(inputs, weights=False)]

    @jax.jit
    def measure(leaves):
        taps = Taps()
        _, after = Walk(taps).run(program, leaves, marks)
        last = {source.at for mark in after for source in mark.sources}
        return [dataclasses.replace(tap, is_output=at in last) for at, tap in taps.found.items()]

    return measure([jnp.asarray(leaf) for leaf in jax.tree.leaves((params, inputs))])


class Taps(Visitor):
    """A visitor that recognises operations of interest and collects their statistics.

    Attributes:
      found: the activations so far, by position.
    """

    def __init__(self):
        self.found: dict[At, Activation] = {}

    def is_whole(self, equation) -> bool:
        return called_nonlinearity(equation) is not None

    def inside(self) -> "Taps":
        return Taps()

    def arrays(self) -> Any:
        return self.found

    def absorb(self, child: Visitor, arrays: Any, length: int | None) -> None:
        loops = () if length is None else (length,)
        for at, tap in arrays.items():
            self.found[at] = dataclasses.replace(tap, loops=(*loops, *tap.loops))

    def visit(self, visit: Visit) -> None:
        seen = recognise(visit)
        for source in seen.replaced:
            self.found.pop(source.at, None)
        if seen.kind and visit.results[0] is not None:
            value, axes = visit.results[0], unit_axes(visit.after[0].axes)
            self.found[visit.at] = Activation(
                kind=seen.kind,
                layer=visit.after[0].layer[1],
                where=visit.place,
                shape=value.shape,
                loops=(),
                units=math.prod(value.shape[axis] for axis in axes),
                of=seen.of,
                is_output=False,
                at=visit.at,
                **statistics(seen.kind, value, axes, seen.axes),
            )


def unit_axes(axes: tuple[str, ...]) -> tuple[int, ...]:
    """The axes of an array that count units: those with the label, or else the last of several.

    >>> unit_axes(("batch", "", "unit")), unit_axes(("", "")), unit_axes(("batch",))
    ((2,), (1,), ())
    """
    found = tuple(at for at, label in enumerate(axes) if label == UNIT)
    return found or ((len(axes) - 1,) if len(axes) > 1 else ())


def statistics(
    kind: str, value: jax.Array, units: tuple[int, ...], normalized: tuple[int, ...] = ()
) -> dict[str, jax.Array]:
    """The statistics of an ``Activation``.

    Args:
      kind: the kind of the operation.
      value: its output.
      units: the axes that count units.
      normalized: the axes over which a softmax sums to one.

    >>> round(float(statistics("tanh", jnp.array([[0.99, 0.0]]), (1,))["saturated"]), 2)
    0.5
    """
    value = value.astype(compute_dtype(value.dtype))
    others = tuple(axis for axis in range(value.ndim) if axis not in units)
    rows = jnp.transpose(value, (*others, *units))
    width = math.prod(value.shape[axis] for axis in units)
    rows = rows.reshape(value.size // max(width, 1), width)
    per_unit, shift = _over_examples(kind, rows)
    total = _reduce(_over_units, per_unit, rows.dtype)
    count, missing = jnp.maximum(total.finite, 1), jnp.full((), jnp.nan, value.dtype)
    mean = total.first / count
    off, saturated = _off(kind, rows)
    share = total.saturated / value.size
    if kind == "softmax" and normalized:
        share = jnp.mean(jnp.max(value, axis=normalized) > 0.99, dtype=value.dtype)
    alike = jnp.mean(per_unit.apart <= ALIKE * total.largest, dtype=value.dtype)
    return {
        "mean": mean + shift,
        "std": jnp.sqrt(jnp.maximum(total.second / count - mean**2, 0)),
        "largest": total.largest,
        "zero": total.zero / value.size,
        "nonfinite": 1 - total.finite / value.size,
        "dead": missing if off is None or not units else total.off / width,
        "saturated": missing if saturated is None and kind != "softmax" else share,
        "alike": alike if kind in PRODUCTS.values() and width > 1 else missing,
    }


class _Sums(NamedTuple):
    """Sums over elements, or over the elements of each unit."""

    first: jax.Array  # moments around a shift
    second: jax.Array
    finite: jax.Array
    zero: jax.Array
    saturated: jax.Array
    largest: jax.Array
    apart: jax.Array  # the largest distance to the next unit
    off: jax.Array  # the least, which is 0 if a unit is ever on


def _reduce(merge: Callable[..., _Sums], operands: _Sums, dtype: Any) -> _Sums:
    """All sums in one pass over the first axis, which compiles ten times as fast as one pass each."""
    starts = [jnp.full((), 1 if merge is _of_a_unit and name == "off" else 0, dtype) for name in _Sums._fields]
    found = jax.lax.reduce(tuple(operands), tuple(starts), lambda a, b: tuple(merge(_Sums(*a), _Sums(*b))), (0,))
    return _Sums(*found)


def _of_a_unit(one: _Sums, other: _Sums) -> _Sums:
    return _over_units(one, other)._replace(off=jnp.minimum(one.off, other.off))


def _over_units(one: _Sums, other: _Sums) -> _Sums:
    added = _Sums(*(a + b for a, b in zip(one, other, strict=True)))
    largest, apart = jnp.maximum(one.largest, other.largest), jnp.maximum(one.apart, other.apart)
    return added._replace(largest=largest, apart=apart)


def _over_examples(kind: str, rows: jax.Array) -> tuple[_Sums, jax.Array]:
    """The sums of each unit, of rows (examples, units), and the number that was subtracted before."""
    finite = jnp.isfinite(rows)
    inside = jnp.where(finite, rows, 0)
    shift = inside[0, 0] if rows.size else jnp.zeros((), rows.dtype)
    centred = jnp.where(finite, inside - shift, 0)
    off, saturated = _off(kind, rows)
    nothing = jnp.zeros_like(rows)
    apart = jnp.abs(rows - jnp.roll(rows, 1, axis=1)) if kind in PRODUCTS.values() else nothing
    flags = [nothing if flag is None else flag.astype(rows.dtype) for flag in (saturated, off)]
    operands = _Sums(
        first=centred,
        second=jnp.square(centred),
        finite=finite.astype(rows.dtype),
        zero=(rows == 0).astype(rows.dtype),
        saturated=flags[0],
        largest=jnp.abs(inside),
        apart=apart,
        off=flags[1],
    )
    return _reduce(_of_a_unit, operands, rows.dtype), shift


def _off(kind: str, value: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    """Which elements are off and which are saturated; None where the kind has no such state."""
    if kind in RECTIFIED:
        return value <= 0, None
    if kind in SMOOTH:
        return (value <= 0) & (value > -NEARLY_OFF), None
    if kind in SQUASHING:
        limit = SQUASHING[kind]
        beyond = jnp.abs(value) >= limit if kind not in ONE_SIDED else (value >= limit) | (value <= 1 - limit)
        return beyond, beyond
    return None, None


__all__ = ["Activation", "activations", "statistics", "unit_axes"]
