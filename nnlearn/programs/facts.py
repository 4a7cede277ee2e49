"""Facts about a loss or a network that its program shows without being run, each with its source line.

Which parameters have a derivative, which inputs are used, where a softmax is taken and over which axes, what is summed
or averaged, where random numbers are drawn, and which logarithms and roots have no guard.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from nnlearn.programs.kinds import NORMALIZED, PRODUCTS, called_nonlinearity, recognise
from nnlearn.programs.marks import BATCH, CUTS, Mark
from nnlearn.programs.places import Place, trace_program
from nnlearn.programs.read import ELEMENTWISE
from nnlearn.programs.walk import At, Visit, Visitor, Walk, leaf_marks
from nnlearn.tree import path_name
from nnlearn.types import Params

REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"}
RANDOM = {"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"}
DOMAINS = {"log": 0, "log1p": 0, "sqrt": 0, "rsqrt": 0, "div": 1, "acos": 0, "atanh": 0}
"""Operations that are infinite or NaN for some operands, and which of their operands decides."""
HALF = {"float16", "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Fact:
    """One operation of a program that may matter.

    Attributes:
      kind: ``"product"``, a matrix product or convolution; ``"nonlinearity"``; ``"softmax"``; ``"reduction"``;
        ``"bias"``, a parameter added to a product; ``"cut"``, an operation without a derivative; ``"random"``;
        ``"norm"``, a division of examples by one number that is a sum over all of them; ``"domain"``, an operation that
        is not finite for some operands; ``"half"``, a cast to 16 bits; ``"pairs"``, an elementwise operation that
        combines each example with every other.
      operation: what it is: a kind of ``Activation``, ``"logsumexp"``, ``"mean"``, or the name of a primitive such as
        ``"reduce_sum"`` or ``"stop_gradient"``.
      where: the line that computes it.
      at: its position in the program.
      layer: the path of the weights in the last product up to here; for a bias its own path.
      shape: the shape of its operand.
      dtype: the dtype of its result.
      axes: the axes that it reduces or normalizes.
      labels: for each of these axes ``"batch"``, ``"unit"``, or ``""`` if it is neither or unknown.
      of: the kinds of the operations that lead directly to it, as in ``Activation``.
      leaves: for a cut, the parameters that reach the result only through it or other cuts.
      inputs: the arrays of the arguments that it depends on.
      guarded: for a domain, whether a positive number was added to its operand or is its lower bound.
      to_output: whether the result of the function depends on it.
    """

    kind: str
    operation: str
    where: Place
    at: At
    layer: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    guarded: bool = False
    to_output: bool = True


class Inspection(NamedTuple):
    """What the program of a function shows.

    Attributes:
      facts: in the order of the program.
      params: for each parameter ``"smooth"`` if the result has a derivative with respect to it, ``"cut"`` if every path
        to the result is cut, and ``"unused"``.
      inputs: for each array of the arguments whether the result depends on it; ``0/inputs`` is in the first argument.
      result: the shapes of the result.
    """

    facts: tuple[Fact, ...]
    params: dict[str, str]
    inputs: dict[str, bool]
    result: Any

    def of_kind(self, *kinds: str) -> list[Fact]:
        """The facts of some kinds that the result depends on."""
        return [fact for fact in self.facts if fact.kind in kinds and fact.to_output]


def inspect_function(function: Callable[..., Any], params: Params, *arguments: Any) -> Inspection:
    """Read the program of a loss or a network.

    It traces the function and computes nothing. Functions with a derivative of their own are taken to have it with
    respect to all of their arguments.

    Args:
      function: ``function(params, *arguments)``, such as ``predict`` or a loss.
      params: the parameters; arrays or their shapes.
      *arguments: the other arguments. The first axis of each array counts examples.

    Returns:
      An ``Inspection``.

    >>> import jax.numpy as jnp
    >>> def loss(params, x):
    ...     hard = jnp.round(x @ params["first"])
    ...     return jnp.mean(jax.nn.softmax(hard * params["second"], axis=0))
    >>> found = inspect_function(loss, {"first": jnp.ones(3), "second": 1.0}, jnp.ones((5, 3)))
    >>> found.params
    {'first': 'cut', 'second': 'smooth'}
    >>> [(fact.operation, fact.labels) for fact in found.of_kind("softmax")]
    [('softmax', ('batch',))]
    >>> [(fact.operation, fact.leaves) for fact in found.of_kind("cut")]
    [('round', ('first',))]
    """
    program, result = trace_program(function, params, *arguments)
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(arguments)]
    seen = Facts(paths, names)
    marks = [*leaf_marks(params, weights=True), *leaf_marks(arguments, weights=False)]
    _, after = Walk(seen, concrete=False).run(program, [None] * len(marks), marks)
    reached = smooth = fed = bits = 0
    for mark in after:
        reached, smooth, fed, bits = reached | mark.reached, smooth | mark.smooth, fed | mark.fed, bits | mark.facts
    state = {
        path: "smooth" if smooth >> n & 1 else "cut" if reached >> n & 1 else "unused" for n, path in enumerate(paths)
    }
    facts = []
    for at, fact in seen.found.items():
        leaves = tuple(path for path in fact.leaves if state[path] == "cut")
        if fact.kind != "cut" or leaves:
            kept = bool(bits >> seen.bits[at] & 1)
            facts.append(dataclasses.replace(fact, leaves=leaves, to_output=kept))
    return Inspection(tuple(facts), state, {name: bool(fed >> n & 1) for n, name in enumerate(names)}, result)


def _state(smooth: int, reached: int) -> str:
    return "smooth" if smooth else "cut" if reached else "unused"


class Facts(Visitor):
    """A visitor that notes facts.

    Attributes:
      paths, names: of the parameters, and of the arrays of the arguments.
      found: the facts by position.
      bits: the bit of each fact in the marks of what follows from it.
    """

    def __init__(self, paths: list[str], names: list[str], bits: dict[At, int] | None = None):
        self.paths, self.names = paths, names
        self.found: dict[At, Fact] = {}
        self.bits = {} if bits is None else bits

    def is_whole(self, equation) -> bool:
        return called_nonlinearity(equation) is not None

    def inside(self) -> "Facts":
        return Facts(self.paths, self.names, self.bits)

    def arrays(self) -> Any:
        return self.found

    def absorb(self, child: Visitor, arrays: Any, length: int | None) -> None:
        self.found |= arrays

    def visit(self, visit: Visit) -> None:
        if not visit.after:
            return
        primitive, params, before = visit.equation.primitive.name, visit.equation.params, visit.before
        seen = recognise(visit)
        for source in seen.replaced:
            self.found.pop(source.at, None)
        if seen.kind:
            kind = (
                "softmax"
                if seen.kind in NORMALIZED
                else "product"
                if seen.kind in ("matmul", "conv")
                else "nonlinearity"
            )
            self._note(visit, kind, seen.kind, axes=seen.axes, of=seen.of)
        elif primitive in CUTS or (primitive == "convert_element_type" and visit.after[0].smooth < before[0].smooth):
            self._note(visit, "cut", primitive)
        elif primitive in REDUCTIONS:
            self._note(visit, "reduction", primitive, axes=tuple(params["axes"]))
        elif primitive == "log" and before[0].sum_of and before[0].is_exp:
            _, axes, labels = before[0].sum_of
            self._note(visit, "softmax", "logsumexp", axes=axes, labels=labels)
        elif primitive == "div" and _by_one_total(before):
            self._note(visit, "norm", primitive)
        elif primitive in DOMAINS and before[DOMAINS[primitive]].reached:
            self._note(visit, "domain", primitive, guarded=before[DOMAINS[primitive]].guarded)
        elif primitive in RANDOM:
            self._note(visit, "random", primitive)
        elif primitive == "convert_element_type" and str(params["new_dtype"]) in HALF:
            self._note(visit, "half", primitive)
        elif primitive == "add" and any(mark.is_weight for mark in before):
            self._bias(visit)
        elif primitive in ELEMENTWISE and _pairs(before, visit.after[0]):
            self._note(visit, "pairs", primitive)
        if primitive in ("div", "mul"):
            self._mean(before)

    def _note(self, visit: Visit, kind: str, operation: str, **more: Any) -> None:
        mark, first = visit.after[0], visit.before[0] if visit.before else Mark(None)
        operand: Any = visit.equation.invars[0].aval if visit.equation.invars else visit.equation.outvars[0].aval
        axes, smooth = more.get("axes", ()), 0
        if kind == "cut":
            for each in visit.before:
                smooth |= each.smooth
        self.found[visit.at] = Fact(
            kind,
            operation,
            visit.place,
            visit.at,
            more.pop("layer", mark.layer[1]),
            tuple(getattr(operand, "shape", ())),
            str(getattr(visit.equation.outvars[0].aval, "dtype", "")),
            labels=more.pop("labels", None) or tuple(first.axes[axis] for axis in axes),
            of=more.pop("of", tuple(sorted({source.kind for source in mark.sources}))),
            leaves=tuple(path for n, path in enumerate(self.paths) if smooth >> n & 1),
            inputs=tuple(name for n, name in enumerate(self.names) if mark.fed >> n & 1),
            **more,
        )
        bit = self.bits.setdefault(visit.at, len(self.bits))
        visit.after[:] = [each._replace(facts=each.facts | 1 << bit) for each in visit.after]

    def _bias(self, visit: Visit) -> None:
        """A parameter that is added to the result of a product."""
        for weight, other in (visit.before, visit.before[::-1]):
            if weight.is_weight and other.fed and {source.kind for source in other.sources} & set(PRODUCTS.values()):
                self._note(visit, "bias", "add", layer=weight.leaf)

    def _mean(self, before: Any) -> None:
        """A sum that is divided by a number, or by another sum, is a mean."""
        for total, by in (before, before[::-1]):
            at = next((at for at in reversed(self.found) if self._is_sum(at, total)), None)
            if at is not None and (by.is_total or not (by.fed or by.reached)):
                self.found[at] = dataclasses.replace(self.found[at], operation="mean")

    def _is_sum(self, at: At, mark: Mark) -> bool:
        return (
            mark.sum_of is not None
            and bool(mark.facts >> self.bits[at] & 1)
            and self.found[at].operation == "reduce_sum"
        )


def _by_one_total(before: Any) -> bool:
    """Whether examples are divided by one number that is a sum over all of them, both with a derivative."""
    array, total = before
    examples = BATCH in array.axes and len(array.axes) > 1 and bool(array.smooth)
    return examples and total.is_total and not any(total.axes) and bool(total.smooth and total.fed)


def _pairs(before: Any, after: Mark) -> bool:
    """Whether two operands count examples along different axes."""
    places = [[at for at, label in enumerate(mark.axes) if label == BATCH] for mark in before if BATCH in mark.axes]
    return len(places) > 1 and any(not set(one) & set(places[0]) for one in places[1:]) and len(after.axes) > 1


__all__ = ["Fact", "Facts", "Inspection", "inspect_function"]
