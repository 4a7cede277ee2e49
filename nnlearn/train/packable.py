"""Whether an optimizer gives packed parameters the updates that it gives the leaves, read off its program.

A transformation that treats every number alike may run on packed parameters as it is. One that takes a norm of each
leaf, looks at shapes or goes by paths would see the buffers, and be silently wrong. So before training packs, both
programs are traced: the update of the leaves, and packing, the update, unpacking. ``symbolic`` reads what each number
of the results is made of, and the two have to agree. Nothing is run.
"""

import functools
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import with_extra_args_support

from nnlearn.packing import Layout, Packed, is_packed, make_layout, pack_like, per_buffer, unpack
from nnlearn.settings import Made
from nnlearn.train.symbolic import Interpreter
from nnlearn.tree import path_name
from nnlearn.types import GradientTransformation, Params, PyTree

FEW = 24  # leaves that are all looked at, always
KNOWN = {"optax", "nnlearn", "jax"}
PLAIN = {"builtins", "numpy", "jaxlib", "ml_dtypes", "inspect"}  # where data comes from
NOT_FOLLOWED = {"builtins", "numpy"}  # whose callables may hold functions that nobody sees
SCHEDULES = {"learning_rate", "weight_decay", "step_size_fn", "every_k_schedule", "_every_k_schedule"}
SCHEDULES |= {"schedule", "schedules", "schedule_fn"}


def packing_difference(tx: GradientTransformation, params: Params, labels: Any = None) -> str:
    """Where the updates of packed parameters would differ from those of the leaves; empty if nowhere.

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
    layout = make_layout(sample, labels)
    tx = with_extra_args_support(tx)

    def packed_init(tree):
        return unpack(tx.init(pack_like(layout, tree)))

    def plain(*arguments):
        return _update(tx, *arguments)

    def packed(gradients, state, tree, value):
        packs = [pack_like(layout, part) for part in (gradients, tree)]
        results = _update(tx, packs[0], _pack_state(layout, packed_state, state), packs[1], value)
        if jax.tree.structure(results[0]) != jax.tree.structure(packs[0]):  # unpacked it might look right
            raise TypeError("its updates of packed parameters are not packed alike")
        return unpack(results)

    try:
        # masks of nnlearn's own transformations are asked about every leaf here
        jax.eval_shape(tx.init, Packed([jax.ShapeDtypeStruct(part.shape, part.dtype) for part in whole.buffers], whole))
        packed_state = jax.eval_shape(lambda tree: tx.init(pack_like(layout, tree)), sample)
        state = jax.eval_shape(tx.init, sample)
        arguments = (sample, state, sample, jax.ShapeDtypeStruct((), jnp.float32))
        inits = [_trace(function, sample) for function in (tx.init, packed_init)]
        updates = [_trace(function, *arguments) for function in (plain, packed)]
        return _difference(*inits, "state") or _difference(*updates, "update")
    except Exception as error:  # anything may go wrong in a transformation that was not written for this
        reason = str(error).partition("\n")[0][:200]  # the rest is advice on another program
        return f"it does not run on packed parameters ({type(error).__name__}: {reason})"


def _shape_of(leaf) -> jax.ShapeDtypeStruct:
    """What stands for a leaf in the check: where it lies decides on the shape of its buffer."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=sharding)


def _trace(function, *arguments):
    return jax.make_jaxpr(function, return_shape=True)(*arguments)


def _update(tx, gradients, state, params, value):
    def value_fn(params):
        return sum(jnp.sum(jnp.real(leaf).astype(jnp.float32)) for leaf in jax.tree.leaves(params))

    return tx.update(gradients, state, params, value=value, grad=gradients, value_fn=value_fn)


def _pack_state(layout: Layout, packed_state: PyTree, state: PyTree) -> PyTree:
    """The state of an optimizer of leaves in the form that it has for packed parameters."""
    nodes, treedef = jax.tree.flatten(packed_state, is_leaf=is_packed)
    parts = treedef.flatten_up_to(state)
    packed = [pack_like(layout, part) if is_packed(node) else part for node, part in zip(nodes, parts, strict=True)]
    return treedef.unflatten(packed)


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


def _difference(plain, packed, what: str) -> str:
    """The first result of two traced functions that is not made in the same way of the same arguments."""
    interpreter, trees = Interpreter(), [shapes for _, shapes in (plain, packed)]
    if jax.tree.structure(trees[0]) != jax.tree.structure(trees[1]):
        return "its state has another structure"
    results = [interpreter.run(program) for program, _ in (plain, packed)]
    paths = jax.tree.leaves_with_path(trees[0])
    for (path, shape), other, one, two in zip(paths, jax.tree.leaves(trees[1]), *results, strict=True):
        if (shape.shape, shape.dtype) != (other.shape, other.dtype) or (shape.size and one != two):
            updates_first = what == "update"  # an update returns (updates, state)
            part = "update" if updates_first and path[0].idx == 0 else "state"
            return f"the {part} of {path_name(path[1:] if updates_first else path)!r}"
    return ""


__all__ = ["packing_difference"]
