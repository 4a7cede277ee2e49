"""Whether an optimizer gives packed parameters the same updates as the leaves, read from its program.

A transformation that treats every element alike can run on packed parameters. One that takes a norm of each leaf, or
depends on shapes or paths, would see the buffers and be silently wrong. So before training packs the parameters, both
programs are traced: the update of the leaves; and packing, the update, unpacking. ``symbolic`` reads what each element
of the results is computed from, and the two must agree. Nothing is run.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr
from jax.tree_util import SequenceKey
from optax import with_extra_args_support

from nnlearn.packing import Layout, Packed, is_packed, make_layout, pack_like, per_buffer, unpack
from nnlearn.packing.parts import one_by_one
from nnlearn.programs.stand_in import unknown_loss
from nnlearn.programs.symbolic import Interpreter
from nnlearn.settings import Made
from nnlearn.tree import path_name
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, Params, PyTree

SETTLED = 3  # steps after which the structure and shapes of a state must be constant
FEW = 24  # number of leaves up to which every leaf is checked
KNOWN = {"optax", "nnlearn", "jax"}
LOW = " (perhaps by a sum in {}, below float32, which depends on its grouping: use nnlearn's norms, or by_leaf)"
PLAIN = {"builtins", "numpy", "jaxlib", "ml_dtypes", "inspect"}  # modules of plain data
NOT_FOLLOWED = {"builtins", "numpy"}  # their callables may hide functions
SCHEDULES = {"learning_rate", "weight_decay", "step_size_fn", "every_k_schedule", "_every_k_schedule"}
SCHEDULES |= {"schedule", "schedules", "schedule_fn"}


def packing_difference(tx: GradientTransformation, params: Params, labels: Any = None) -> str:
    """Describe where the updates of packed parameters differ from those of the leaves; empty if they are equal.

    Anything that cannot be proven equal counts as a difference. Updates are equal up to the rounding of sums in float32
    or better, because sums over buffers have another order. Nothing is assumed about the values of gradients,
    parameters, state and loss, and ``value_fn`` is an unknown function. As JAX requires of a function that it traces,
    the results of ``tx`` must depend on its arguments alone.

    Args:
      tx: an optimizer from nnlearn or optax.
      params: the parameters, as a tree of arrays or of ``jax.ShapeDtypeStruct``.
      labels: as for ``pack``.

    The code of optax and nnlearn distinguishes leaves by shape and dtype alone, so two of many equal leaves are
    checked. If other functions take part, such as a mask by path in ``optax.masked``, every leaf is checked, for some
    milliseconds each.

    >>> import nnlearn
    >>> params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    >>> packing_difference(nnlearn.adamw(1e-3), params)
    ''
    >>> import optax
    >>> packing_difference(optax.lamb(1e-3), params)
    "the update of 'a'"
    """
    tx = getattr(tx, "monitored", tx)  # measurements do not change updates, and see whole leaves in either form
    params = jax.tree.map(_shape_of, params)
    whole = make_layout(params, labels)
    sample, labels = params, whole.labels
    if len(whole.leaves) > FEW and not _foreign(tx):
        sample, labels = _thin(whole, params), None if labels is None else _thin(whole, labels)
    try:
        return _compare(with_extra_args_support(tx), make_layout(sample, labels), sample, whole)
    except Exception as error:  # a transformation that was not written for buffers may raise anything
        reason = str(error).partition("\n")[0][:200]  # the other lines advise on the traced program
        return f"it does not run on packed parameters ({type(error).__name__}: {reason})"


def _compare(tx: GradientTransformationExtraArgs, layout: Layout, sample: Params, whole: Layout) -> str:
    """Describe the difference for parameters like ``sample``, which are some of those in ``whole``.

    The proof is by induction over steps: both states are equal at the start, and each step maps equal states to equal
    ones.
    """
    value_fn = unknown_loss(sample)
    # stacks of equal leaves are read leaf by leaf: a batched operation is by definition the operation on each leaf
    with one_by_one():
        return _compare_traces(tx, layout, sample, whole, value_fn)


def _compare_traces(
    tx: GradientTransformationExtraArgs, layout: Layout, sample: Params, whole: Layout, value_fn: Callable
) -> str:
    # the leaves before the packed form, as in use: a transformation may store what init has seen
    plain = _trace_all(_AsLeaves(tx, value_fn), sample)
    # masks of nnlearn's transformations see every leaf here
    buffers = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in whole.buffers]
    every = jax.eval_shape(tx.init, Packed(buffers, whole))
    packed = _trace_all(_AsLeaves(tx, value_fn, layout), sample)
    if not plain or not packed or len(plain) != len(packed):
        return "its state changes its structure, shapes or dtypes from step to step"
    if _axes(every) != _axes(packed[0].form):
        return "its state depends on how many leaves there are"
    for what, one, other in zip(["state", *["update"] * (len(plain) - 1)], plain, packed, strict=True):
        if difference := _difference(one, other, what):
            return difference
    return ""


class _AsLeaves:
    """An optimizer as a transformation of leaves, which are packed first if there is a layout.

    Attributes:
      form: the structure and shapes of the last state, before it was unpacked.
    """

    def __init__(self, tx: GradientTransformationExtraArgs, value_fn: Callable, layout: Layout | None = None):
        self.tx, self.value_fn, self.layout = tx, value_fn, layout
        self.form: PyTree = None

    def init(self, params):
        return self._unpacked(self.tx.init(self._packed(params)))

    def update(self, gradients, state, params, value):
        gradients, params, state = self._packed(gradients), self._packed(params), self._repacked(state)
        extra = {"value": value, "grad": gradients, "value_fn": self.value_fn}
        updates, state = self.tx.update(gradients, state, params, **extra)
        if jax.tree.structure(updates) != jax.tree.structure(gradients):  # unpacked they might look right
            raise TypeError("its updates of packed parameters have another structure")
        return unpack(updates), self._unpacked(state)

    def _packed(self, tree: PyTree) -> PyTree:
        return tree if self.layout is None else pack_like(self.layout, tree)

    def _unpacked(self, state: PyTree) -> PyTree:
        self.form = jax.tree.map(_shape_of, state)
        return unpack(state)

    def _repacked(self, state: PyTree) -> PyTree:
        """Reverse ``_unpacked``."""
        nodes, treedef = jax.tree.flatten(self.form, is_leaf=is_packed)
        parts = zip(nodes, treedef.flatten_up_to(state), strict=True)
        return treedef.unflatten([pack_like(node.layout, part) if is_packed(node) else part for node, part in parts])


class _Trace(NamedTuple):
    """A traced function.

    Attributes:
      program: the output of ``jax.make_jaxpr``.
      shapes: the shapes of the function's output.
      leaves: from the position of an argument to the leaf whose elements it holds.
      form: the structure and shapes of the state that it returns, before it was unpacked.
    """

    program: ClosedJaxpr
    shapes: PyTree
    leaves: dict[int, int]
    form: PyTree


def _trace_all(view: _AsLeaves, sample: Params) -> list[_Trace]:
    """Trace ``init`` and updates until the form of the state is constant; empty if it never is."""
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(sample)]
    count, value = len(paths), jax.ShapeDtypeStruct((), jnp.float32)
    program, state = jax.make_jaxpr(view.init, return_shape=True)(sample)
    traces = [_Trace(program, state, {leaf: leaf for leaf in range(count)}, view.form)]
    for _ in range(SETTLED):
        before = view.form
        held = [leaf for node in jax.tree.leaves(before, is_leaf=is_packed) for leaf in _held(node, paths)]
        owners = [*range(count), *held, *range(count), None]
        program, shapes = jax.make_jaxpr(view.update, return_shape=True)(sample, state, sample, value)
        leaves = {at: leaf for at, leaf in enumerate(owners) if leaf is not None}
        traces.append(_Trace(program, shapes, leaves, view.form))
        if _form(before) == _form(view.form):
            return traces
        state = shapes[1]
    return []


def _held(node, paths: list[str]) -> list[int | None]:
    """For each array of an unpacked node of a state: the leaf whose elements it holds."""
    if not is_packed(node):
        return [None]
    owners: list[int | None] = list(range(len(paths)))
    if len(node.layout.paths) != len(paths):  # only some of the leaves
        index = {path: at if paths.count(path) == 1 else None for at, path in enumerate(paths)}
        owners = [index.get(path) for path in node.layout.paths]
    shown = [hasattr(node.buffers[index], "shape") for index, _ in node.layout.places]
    return [leaf for leaf, is_shown in zip(owners, shown, strict=True) if is_shown]


def _form(tree: PyTree) -> tuple:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def _axes(tree: PyTree) -> list[tuple]:
    return [(leaf.ndim, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def _shape_of(leaf) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding of a leaf; the shape of its buffer depends on all three."""
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=sharding)


def _thin(layout: Layout, tree: PyTree) -> PyTree:
    """Keep two leaves of each buffer and shape, and replace the others by None."""
    kept = {run[end] for buffer in layout.buffers for run in layout.runs(buffer) for end in (0, -1)}
    leaves = layout.treedef.flatten_up_to(tree)
    return layout.treedef.unflatten([leaf if at in kept else None for at, leaf in enumerate(leaves)])


def _foreign(tx: GradientTransformation) -> bool:
    """Whether functions from outside optax and nnlearn, which may depend on a leaf's path, take part in ``tx``.

    An object that is not understood counts as one.
    """
    seen, ahead = set(), [tx.init, tx.update]
    while ahead:
        item = ahead.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        root = (item if isinstance(item, type) else type(item)).__module__.split(".")[0]
        if isinstance(item, Made):
            ahead.append(item.function)
        elif isinstance(item, types.FunctionType):
            if item.__module__ == per_buffer.__module__:  # its rule sees every leaf
                continue
            if str(item.__globals__.get("__name__")).split(".")[0] not in KNOWN:  # __module__ may be copied
                return True
            cells = zip(item.__code__.co_freevars, item.__closure__ or (), strict=True)
            ahead += _but_schedules({name: cell.cell_contents for name, cell in cells if _filled(cell)})
            ahead += [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
        elif isinstance(item, types.MethodType):
            ahead += [item.__func__, item.__self__]
        elif isinstance(item, functools.partial):
            ahead += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, list | tuple | set | frozenset | dict):
            ahead += item.values() if isinstance(item, dict) else item
        elif root not in KNOWN | PLAIN:
            return True
        elif isinstance(item, type):
            continue
        elif callable(item) and root in NOT_FOLLOWED:
            return True
        elif callable(item) or root in {"optax", "nnlearn"}:
            ahead += _but_schedules(getattr(item, "__dict__", {}))
    return False


def _but_schedules(named: Mapping[str, Any]) -> list:
    """Drop schedules: optax and nnlearn call them with the step alone, so they cannot depend on a leaf."""
    return [value for name, value in named.items() if name not in SCHEDULES]


def _filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _difference(plain: _Trace, packed: _Trace, what: str) -> str:
    """Describe the first result that two traced functions do not compute in the same way from the same arguments."""
    interpreter, trees = Interpreter(), [plain.shapes, packed.shapes]
    if jax.tree.structure(trees[0]) != jax.tree.structure(trees[1]):
        return "its state has another structure"
    results = [interpreter.run(trace.program, packed.leaves) for trace in (plain, packed)]
    paths = jax.tree.leaves_with_path(trees[0])
    for (path, shape), other, one, two in zip(paths, jax.tree.leaves(trees[1]), *results, strict=True):
        if (shape.shape, shape.dtype) != (other.shape, other.dtype) or (shape.size and one != two):
            is_update = what == "update"  # an update returns (updates, state)
            part = "update" if is_update and path[0] == SequenceKey(0) else "state"
            place = f"the {part} of {path_name(path[1:] if is_update else path)!r}"
            return place + (LOW.format(" and ".join(sorted(interpreter.low))) if interpreter.low else "")
    return ""


__all__ = ["packing_difference"]
