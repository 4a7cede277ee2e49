"""Whether an optimizer gives packed parameters the updates that it gives the leaves, read off its program.

A transformation that treats every number alike may run on packed parameters as it is. One that takes a norm of each
leaf, looks at shapes or goes by paths would see the buffers, and be silently wrong. So before training packs, both
programs are traced: the update of the leaves, and packing, the update, unpacking. ``symbolic`` reads what each number
of the results is made of, and the two have to agree. Nothing is run.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from optax import with_extra_args_support

from nnlearn.packing import Layout, Packed, is_packed, make_layout, pack_like, per_buffer, unpack
from nnlearn.packing.parts import one_by_one
from nnlearn.programs.stand_in import unknown_loss
from nnlearn.programs.symbolic import Interpreter
from nnlearn.settings import Made
from nnlearn.tree import path_name
from nnlearn.types import GradientTransformation, Params, PyTree

SETTLED = 3  # steps after which a state must have the form that it keeps
FEW = 24  # leaves that are all looked at, always
KNOWN = {"optax", "nnlearn", "jax"}
LOW = " (perhaps by a sum in {}, below float32, which depends on its grouping: take nnlearn's norms, or by_leaf)"
PLAIN = {"builtins", "numpy", "jaxlib", "ml_dtypes", "inspect"}  # where data comes from
NOT_FOLLOWED = {"builtins", "numpy"}  # whose callables may hold functions that nobody sees
SCHEDULES = {"learning_rate", "weight_decay", "step_size_fn", "every_k_schedule", "_every_k_schedule"}
SCHEDULES |= {"schedule", "schedules", "schedule_fn"}


def packing_difference(tx: GradientTransformation, params: Params, labels: Any = None) -> str:
    """Where the updates of packed parameters would differ from those of the leaves; empty if nowhere.

    What cannot be proven to be the same is a difference. The same means: but for the rounding of sums in float32 or
    better, which go over the buffers in another order. Nothing is assumed about the values of gradients, parameters,
    state and loss, and ``value_fn`` is an unknown function. ``tx`` must be what JAX demands of a function that it
    traces: its results depend on its arguments alone.

    Args:
      tx: an optimizer, nnlearn's or optax's.
      params: the parameters, as a tree of arrays or of ``jax.ShapeDtypeStruct``.
      labels: as for ``pack``.

    Code of optax and nnlearn tells leaves apart by shape and dtype alone, so of many equal leaves two are looked at.
    Where functions of others take part, such as a mask by path in ``optax.masked``, every leaf is looked at, for
    some milliseconds each.

    >>> import nnlearn
    >>> params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    >>> packing_difference(nnlearn.adamw(1e-3), params)
    ''
    >>> import optax
    >>> packing_difference(optax.lamb(1e-3), params)
    "the update of 'a'"
    """
    params = jax.tree.map(_shape_of, params)
    whole = make_layout(params, labels)
    sample, labels = params, whole.labels
    if len(whole.leaves) > FEW and not _foreign(tx):
        sample, labels = _thin(whole, params), None if labels is None else _thin(whole, labels)
    try:
        return _compare(with_extra_args_support(tx), make_layout(sample, labels), sample, whole)
    except Exception as error:  # anything may go wrong in a transformation that was not written for this
        reason = str(error).partition("\n")[0][:200]  # the rest is advice on another program
        return f"it does not run on packed parameters ({type(error).__name__}: {reason})"


def _compare(tx: GradientTransformation, layout: Layout, sample: Params, whole: Layout) -> str:
    """The difference for parameters like ``sample``, which are some of those in ``whole``.

    By induction over steps: both states are the same at the start, and of equal states every step makes equal ones.
    """
    value_fn = unknown_loss(sample)
    # stacks of equal leaves are read leaf by leaf: a batched operation is the operation on each by definition
    with one_by_one():
        return _compare_traces(tx, layout, sample, whole, value_fn)


def _compare_traces(tx, layout: Layout, sample: Params, whole: Layout, value_fn: Callable) -> str:
    # the leaves before what is packed, as in use: a transformation may keep what init has seen
    plain = _trace_all(_AsLeaves(tx, value_fn), sample)
    # masks of nnlearn's own transformations are asked about every leaf here
    buffers = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in whole.buffers]
    every = jax.eval_shape(tx.init, Packed(buffers, whole))
    packed = _trace_all(_AsLeaves(tx, value_fn, layout), sample)
    if not plain or not packed or len(plain) != len(packed):
        return "its state changes its structure, shapes or dtypes from step to step"
    if _axes(every) != _axes(packed[0].form):
        return "its state depends on how many leaves there are"
    for what, *traces in zip(["state", *["update"] * (len(plain) - 1)], plain, packed, strict=True):
        if difference := _difference(*traces, what):
            return difference
    return ""


class _AsLeaves:
    """An optimizer as a transformation of leaves, which are packed first if there is a layout.

    Attributes:
      form: the shapes of the state that was made last, with what is packed in it.
    """

    def __init__(self, tx: GradientTransformation, value_fn: Callable, layout: Layout | None = None):
        self.tx, self.value_fn, self.layout, self.form = tx, value_fn, layout, None

    def init(self, params):
        return self._shown(self.tx.init(self._laid(params)))

    def update(self, gradients, state, params, value):
        gradients, params, state = self._laid(gradients), self._laid(params), self._stored(state)
        extra = {"value": value, "grad": gradients, "value_fn": self.value_fn}
        updates, state = self.tx.update(gradients, state, params, **extra)
        if jax.tree.structure(updates) != jax.tree.structure(gradients):  # unpacked it might look right
            raise TypeError("its updates of packed parameters are not packed alike")
        return unpack(updates), self._shown(state)

    def _laid(self, tree):
        return tree if self.layout is None else pack_like(self.layout, tree)

    def _shown(self, state):
        self.form = jax.tree.map(_shape_of, state)
        return unpack(state)

    def _stored(self, state):
        """The state as it was before it was unpacked."""
        nodes, treedef = jax.tree.flatten(self.form, is_leaf=is_packed)
        parts = zip(nodes, treedef.flatten_up_to(state), strict=True)
        return treedef.unflatten([pack_like(node.layout, part) if is_packed(node) else part for node, part in parts])


class _Trace(NamedTuple):
    """A traced function.

    Attributes:
      program: as jax.make_jaxpr returns it.
      shapes: of what the function returns.
      leaves: of which leaf an argument holds the numbers, by its position.
      form: of the state that it returns.
    """

    program: ClosedJaxpr
    shapes: PyTree
    leaves: dict[int, int]
    form: PyTree


def _trace_all(view: _AsLeaves, sample: Params) -> list[_Trace]:
    """``init`` and as many updates as it takes until the state keeps its form; nothing if it does not."""
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(sample)]
    count, value = len(paths), jax.ShapeDtypeStruct((), jnp.float32)
    traces = [_Trace(*jax.make_jaxpr(view.init, return_shape=True)(sample), dict(enumerate(range(count))), view.form)]
    state = traces[0].shapes
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
    """For each array that a node of a state is unpacked to, of which leaf it has the numbers."""
    if not is_packed(node):
        return [None]
    owners: list[int | None] = list(range(len(paths)))
    if len(node.layout.paths) != len(paths):  # a part of the leaves
        index = {path: at if paths.count(path) == 1 else None for at, path in enumerate(paths)}
        owners = [index.get(path) for path in node.layout.paths]
    shown = [hasattr(node.buffers[number], "shape") for number, _ in node.layout.places]
    return [leaf for leaf, is_shown in zip(owners, shown, strict=True) if is_shown]


def _form(tree: PyTree) -> tuple:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def _axes(tree: PyTree) -> list[tuple]:
    return [(leaf.ndim, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def _shape_of(leaf) -> jax.ShapeDtypeStruct:
    """What stands for a leaf in the check: where it lies decides on the shape of its buffer."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=sharding)


def _thin(layout: Layout, tree: PyTree) -> PyTree:
    """The tree with two leaves of each buffer and shape, and None in place of the others."""
    kept = {run[end] for buffer in layout.buffers for run in layout.runs(buffer) for end in (0, -1)}
    leaves = layout.treedef.flatten_up_to(tree)
    return layout.treedef.unflatten([leaf if at in kept else None for at, leaf in enumerate(leaves)])


def _foreign(tx: GradientTransformation) -> bool:
    """Whether functions that are neither optax's nor nnlearn's, and so may go by a leaf's name, take part in ``tx``.

    What is not understood counts as one.
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
            if item.__module__ == per_buffer.__module__:  # its rule is asked about every leaf
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
    """What has these names, without what optax and nnlearn call with the step alone: it cannot tell leaves apart."""
    return [value for name, value in named.items() if name not in SCHEDULES]


def _filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _difference(plain: _Trace, packed: _Trace, what: str) -> str:
    """The first result of two traced functions that is not made in the same way of the same arguments."""
    interpreter, trees = Interpreter(), [plain.shapes, packed.shapes]
    if jax.tree.structure(trees[0]) != jax.tree.structure(trees[1]):
        return "its state has another structure"
    results = [interpreter.run(trace.program, packed.leaves) for trace in (plain, packed)]
    paths = jax.tree.leaves_with_path(trees[0])
    for (path, shape), other, one, two in zip(paths, jax.tree.leaves(trees[1]), *results, strict=True):
        if (shape.shape, shape.dtype) != (other.shape, other.dtype) or (shape.size and one != two):
            updates_first = what == "update"  # an update returns (updates, state)
            part = "update" if updates_first and path[0].idx == 0 else "state"
            place = f"the {part} of {path_name(path[1:] if updates_first else path)!r}"
            return place + (LOW.format(" and ".join(sorted(interpreter.low))) if interpreter.low else "")
    return ""


__all__ = ["packing_difference"]
