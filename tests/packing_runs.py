"""Run transformations with packed and with unpacked parameters, and compare all results."""

import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Literal
from packing_grammar import matrices, on_leaves

from nnlearn.packing import make_layout, pack_like, unpack
from nnlearn.programs.read import ALL_CALLS as CALLS

TREES = [
    {"a": (4,), "b": (2, 3), "c": ()},
    {"a": (2, 3), "b": (2, 3)},
    {"a": (3, 2), "b": [(3,), (1,)], "c": (2, 2)},
    [(2,), (2, 1), (1, 2)],
    ((), (), (1,)),
    {"w": {"a": (4,), "x": (2, 3)}, "b": (2, 3), "z": (0, 3)},
    {"a": (2, 3)},
    {"b": (4,)},
]


class Problem(NamedTuple):
    params: Any
    gradients: list
    labels: Any


def loss_of(params):
    """A loss with curvature within and between leaves."""
    flat = jnp.concatenate([leaf.ravel().astype(jnp.float64) for leaf in jax.tree.leaves(params)])
    own = jnp.sum(jnp.sin(flat + np.arange(flat.size)) * np.linspace(1.0, 2.0, flat.size))
    return own + jnp.tanh(jnp.sum(flat)) + flat[0] * jnp.sum(flat**2)


def random_problem(seed: int, steps: int = 3) -> Problem:
    """Parameters, gradients of several steps, and in some cases labels."""
    draw, numbers = random.Random(-1 - seed), np.random.default_rng(seed)
    shapes = draw.choice(TREES)
    is_shape = lambda node: isinstance(node, tuple) and all(isinstance(part, int) for part in node)  # noqa: E731
    dtypes = [jnp.float64, jnp.float64, jnp.float32] if draw.random() < 0.1 else [jnp.float64]
    kinds = jax.tree.map(lambda _: draw.choice(dtypes), shapes, is_leaf=is_shape)

    def leaf(shape, dtype):
        return jnp.asarray(numbers.normal(size=shape), dtype)

    params = jax.tree.map(leaf, shapes, kinds, is_leaf=is_shape)
    gradients = [jax.tree.map(leaf, shapes, kinds, is_leaf=is_shape) for _ in range(steps)]
    label = draw.random()
    labels = matrices(params) if label < 0.1 else None
    if 0.1 < label < 0.15:
        labels = on_leaves(lambda leaves: [str(at) for at in range(len(leaves))], params)
    return Problem(params, gradients, labels)


ELEMENTWISE = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "exp": np.exp,
    "log": np.log,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "square": np.square,
    "abs": np.abs,
    "sign": np.sign,
    "floor": np.floor,
    "atan2": np.arctan2,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.invert,
    "is_finite": np.isfinite,
    "pow": np.power,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": lambda which, *cases: np.choose(which.astype(int), cases),
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "copy": np.asarray,
    "copy_p": np.asarray,
}
REDUCTIONS = {
    "reduce_sum": np.sum,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_and": np.all,
    "reduce_or": np.any,
}


def broadcast(x, shape, dimensions):
    kept = [1] * len(shape)
    for axis, length in zip(dimensions, x.shape, strict=True):
        kept[axis] = length
    return np.broadcast_to(x.reshape(kept), shape)


def cut(x, params):
    steps = params["strides"] or [1] * x.ndim
    return x[tuple(map(slice, params["start_indices"], params["limit_indices"], steps))]


def run_equation(equation, values: list) -> list:
    """The results of one operation by NumPy, or by JAX if NumPy does not have it."""
    name, params = equation.primitive.name, equation.params
    out = equation.outvars[0].aval if equation.outvars else None
    if CALLS.get(name) in params:
        return evaluate(params[CALLS[name]], values)
    if name == "cond":
        index = min(max(int(values[0]), 0), len(params["branches"]) - 1)
        return evaluate(params["branches"][index], values[1:])
    if name == "while" and "body_nconsts" in params:
        return loop(params, values)
    if name == "split":
        return np.split(values[0], np.cumsum(params["sizes"])[:-1].tolist(), params["axis"])
    if name in ELEMENTWISE:
        return [np.asarray(ELEMENTWISE[name](*values), out.dtype)]
    if name == "div" and jnp.issubdtype(out.dtype, jnp.floating):
        return [values[0] / values[1]]
    if name == "integer_pow":
        return [np.asarray(values[0] ** (params["y"] if params["y"] > 0 else float(params["y"])), out.dtype)]
    if name == "convert_element_type" and not jnp.issubdtype(out.dtype, jnp.integer):
        return [values[0].astype(out.dtype)]
    if name in REDUCTIONS and values[0].size:
        return [np.asarray(REDUCTIONS[name](values[0], axis=tuple(params["axes"])), out.dtype)]
    if name in ("reshape", "squeeze"):
        return [values[0].reshape(out.shape)]
    if name == "transpose":
        return [values[0].transpose(params["permutation"])]
    if name == "broadcast_in_dim":
        return [broadcast(values[0], out.shape, params["broadcast_dimensions"])]
    if name == "concatenate":
        return [np.concatenate(values, params["dimension"])]
    if name == "slice":
        return [cut(values[0], params)]
    with equation.ctx.manager:
        results = equation.primitive.bind(*map(jnp.asarray, values), **equation.primitive.get_bind_params(params))
    return [numpy_like(result) for result in (results if equation.primitive.multiple_results else [results])]


def numpy_like(value):
    extended = jnp.issubdtype(getattr(value, "dtype", None), jax.dtypes.extended)
    return value if extended else np.asarray(value)


def loop(params, values):
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    for_test, for_body, carry = values[:first], values[first:second], values[second:]
    for _ in range(1000):
        if not evaluate(params["cond_jaxpr"], [*for_test, *carry])[0]:
            return carry
        carry = evaluate(params["body_jaxpr"], [*for_body, *carry])
    raise RuntimeError("a loop does not end")


def evaluate(program, arguments: list) -> list:
    """Evaluate a traced program, tens of times faster than JAX's own operations one by one."""
    jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(numpy_like, consts), *arguments], strict=True))

    def read(atom):
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        results = run_equation(equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def traced(function):
    """A function that is traced once for each structure of its arguments, and then evaluated."""
    programs = {}

    def call(*arguments):
        flat, treedef = jax.tree.flatten(arguments)
        form = treedef, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in flat)
        if form not in programs:
            programs[form] = jax.make_jaxpr(function, return_shape=True)(*arguments)
        program, shapes = programs[form]
        return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(program, list(map(numpy_like, flat))))

    return call


def trajectory(tx, problem: Problem, packed: bool) -> list:
    """All updates and states of a run, as leaves."""
    layout = make_layout(problem.params, problem.labels)
    lay = functools.partial(pack_like, layout) if packed else lambda tree: tree
    tx = optax.with_extra_args_support(tx)

    def value_fn(params):
        return loss_of(unpack(params))

    @traced
    def start(params):
        params = lay(params)
        state = tx.init(params)
        return unpack(state), state, params

    @traced
    def step(gradient, state, params):
        value, gradient = value_fn(params), lay(gradient)
        updates, state = tx.update(gradient, state, params, value=value, grad=gradient, value_fn=value_fn)
        params = jax.tree.map(lambda p, u: p + 0.3 * u.astype(p.dtype), params, updates)
        return unpack((updates, state)), state, params

    shown, state, params = start(problem.params)
    seen = [shown]
    for gradient in problem.gradients:
        shown, state, params = step(gradient, state, params)
        seen.append(shown)
    return seen


def differs(make: Callable, problem: Problem, rtol: float = 1e-6) -> bool:
    """Whether a transformation gives packed parameters different updates; ``make`` returns a new instance.

    Raises:
      Exception: if it does not run on the leaves.
    """
    with np.errstate(all="ignore"):
        plain = trajectory(make(), problem, packed=False)
        try:
            packed = trajectory(make(), problem, packed=True)
        except Exception:  # any error counts, as the leaves had none
            return True
    if any(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(problem.params)):
        rtol = 1e-3
    if jax.tree.structure(plain) != jax.tree.structure(packed):
        return True
    pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(packed), strict=True)
    return any(not same(np.asarray(one), np.asarray(other), rtol) for one, other in pairs)


def same(one, other, rtol: float) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return bool(np.allclose(one, other, rtol=rtol, atol=rtol, equal_nan=True))
