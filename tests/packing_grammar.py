"""Random transformations, elementwise and not, for comparing packed with unpacked parameters.

A transformation is a chain of links. A link is a small program on registers that hold trees and scalars. Its operations
are drawn from the tables below, and each function of one leaf is called in a way drawn from ``ROUTES``.
"""

import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnlearn


def norm(x):
    return jnp.sqrt(jnp.sum(x * x))


def bounded(x):
    return x / (1 + jnp.abs(x))


def callback(function, x, shape=None):
    """A NumPy function through ``pure_callback``."""
    result = jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype)
    return jax.pure_callback(
        lambda value: np.asarray(function(np.asarray(value)), result.dtype), result, x, vmap_method="sequential"
    )


def convolved(x):
    return jnp.convolve(x.ravel(), jnp.ones(3, x.dtype), mode="same").reshape(x.shape) if x.size else x


def segments(x):
    flat = x.ravel()
    return jax.ops.segment_sum(flat, jnp.arange(flat.size) % 2, 2)[jnp.arange(flat.size) % 2].reshape(x.shape)


def in_row(function):
    return lambda x: function(x.ravel()).reshape(x.shape) if x.size else x


def halved_until_short(x):
    return jax.lax.while_loop(lambda y: jnp.sum(y * y) > 1, lambda y: y / 2, x)


def summed_by_scan(x):
    return x - jax.lax.scan(lambda total, one: (total + one, None), jnp.zeros([], x.dtype), x.ravel())[0]


def outer(x):
    flat = x.ravel()
    return (jnp.outer(flat, flat) @ flat).reshape(x.shape)


def top(x):
    return jnp.where(x >= jax.lax.top_k(x.ravel(), min(2, x.size))[0][-1], x, 0) if x.size else x


ELEMENTWISE = {
    "sin": jnp.sin,
    "tanh": jnp.tanh,
    "negative": jnp.negative,
    "square": lambda x: bounded(x * x),
    "root": lambda x: jnp.sqrt(jnp.abs(x) + 0.1),
    "abs": jnp.abs,
    "sign": jnp.sign,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "logistic": jax.nn.sigmoid,
    "clip": lambda x: jnp.clip(x, -0.7, 0.9),
    "where": lambda x: jnp.where(x > 0.1, x, 0.5),
    "nan_to_num": jnp.nan_to_num,
    "half": lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
    "reduce_precision": lambda x: jax.lax.reduce_precision(x, 8, 5),
    "power": lambda x: x**3 / (1 + x * x),
    "affine": lambda x: 0.3 - 2 * x,
    "erf": jax.scipy.special.erf,
    "floor": lambda x: jnp.floor(4 * x) / 4,
    "ravel": lambda x: jnp.sin(x.ravel()).reshape(x.shape),
    "axis and back": lambda x: (x[None] + 1)[0],
    "twice transposed": lambda x: (2 * x.T).T,
    "slope": lambda x: jax.grad(lambda y: jnp.sum(jnp.sin(y)))(x),
    "directional": lambda x: jax.jvp(jnp.sin, (x,), (jnp.ones_like(x),))[1],
    "mixed": lambda x: jax.lax.select(x > 0, x, jnp.full_like(x, 0.2)),
    "full": lambda x: x + jnp.full(x.shape, 0.25, x.dtype),
    "ones": lambda x: x * jnp.broadcast_to(jnp.asarray(0.5, x.dtype), x.shape),
}
ELEMENTWISE2 = {
    "add": jnp.add,
    "multiply": lambda x, y: bounded(x * y),
    "subtract": jnp.subtract,
    "divide": lambda x, y: x / (1 + jnp.abs(y)),
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "choose": lambda x, y: jnp.where(x > y, x, 0.5 * y),
    "atan2": jnp.arctan2,
    "hypot": lambda x, y: jnp.sqrt(x * x + y * y + 0.1),
    "mean of two": lambda x, y: 0.9 * x + 0.1 * y,
    "product rule": lambda x, y: jax.grad(lambda z: jnp.sum(jnp.sin(z) * y))(x),
}
WITH_SCALAR = {
    "scale": lambda x, s: bounded(s) * x,
    "shift": lambda x, s: x + bounded(s),
    "normalise": lambda x, s: x / (0.1 + jnp.abs(s)),
    "switch off": lambda x, s: jnp.where(s > 0, x, 0.1 * x),
    "cond": lambda x, s: jax.lax.cond(s > 0.2, lambda: jnp.sin(x), lambda: 2 * x),
    "cut": lambda x, s: jnp.clip(x, -jnp.abs(s), jnp.abs(s)),
    "switch": lambda x, s: jax.lax.switch((s > 0).astype(int) + (s > 1), [lambda: x, lambda: -x, lambda: 0.5 * x]),
}
BY_LEAF = {
    "mean": lambda x: x - jnp.mean(x),
    "norm": lambda x: x / (0.1 + norm(x)),
    "linalg.norm": lambda x: x / (0.1 + jnp.linalg.norm(x.ravel())),
    "max": lambda x: x / (0.1 + jnp.max(jnp.abs(x), initial=0)),
    "min": lambda x: x - jnp.min(x, initial=0),
    "sum by dot": lambda x: x - jnp.dot(x.ravel(), jnp.ones(x.size, x.dtype)),
    "vdot": lambda x: bounded(x * jnp.vdot(x, x)),
    "einsum": lambda x: x - jnp.einsum("i,i->", x.ravel(), x.ravel()),
    "outer": outer,
    "product": lambda x: x * jnp.prod(1 + 0.1 * x),
    "variance": lambda x: x / (0.1 + jnp.var(x)),
    "any": lambda x: jnp.where(jnp.any(x > 1.2), 0.3 * x, x),
    "all finite": lambda x: jnp.where(jnp.all(jnp.abs(x) < 1), x, 0.3 * x),
    "first": lambda x: x - x.ravel()[0] if x.size else x,
    "last": lambda x: x - x.ravel()[-1] if x.size else x,
    "gather": in_row(lambda x: x[jnp.arange(x.size) // 2]),
    "scatter": in_row(lambda x: x.at[0].add(1.0)),
    "dynamic": in_row(lambda x: x - jax.lax.dynamic_slice(x, (x.size // 2,), (1,))),
    "argmax": lambda x: x * (1 + jnp.argmax(x)) / x.size if x.size else x,
    "softmax": in_row(jax.nn.softmax),
    "logsumexp": lambda x: x - jax.nn.logsumexp(x) if x.size else x,
    "cumsum": in_row(jnp.cumsum),
    "cumprod": in_row(lambda x: jnp.cumprod(bounded(x))),
    "sort": in_row(jnp.sort),
    "argsort": in_row(lambda x: x[jnp.argsort(x)]),
    "top_k": top,
    "median": lambda x: x - jnp.median(x) if x.size else x,
    "reverse": in_row(lambda x: x[::-1]),
    "roll": in_row(lambda x: jnp.roll(x, 1)),
    "difference": in_row(lambda x: x - jnp.concatenate([x[1:], x[:1]])),
    "pad": in_row(lambda x: jnp.pad(x, 1)[2:]),
    "fft": in_row(lambda x: jnp.fft.fft(x).real / x.size),
    "convolution": convolved,
    "segments": segments,
    "window": in_row(lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2,), (1,), "SAME")),
    "associative scan": in_row(lambda x: jax.lax.associative_scan(jnp.maximum, x)),
    "custom reduce": lambda x: x - jax.lax.reduce(x, np.asarray(0, x.dtype), jax.lax.add, tuple(range(x.ndim))),
    "gram": lambda x: bounded(x @ x.T @ x) if x.ndim == 2 else x,
    "rows": lambda x: x - jnp.mean(x, axis=-1, keepdims=True) if x.ndim else x,
    "columns": lambda x: x - jnp.mean(x, axis=0, keepdims=True) if x.ndim else x,
    "while": halved_until_short,
    "scan": summed_by_scan,
    "loop": lambda x: jax.lax.fori_loop(0, 2, lambda _, y: y - jnp.mean(y), x),
    "cond on a sum": lambda x: jax.lax.cond(jnp.sum(x) > 0, lambda: x, lambda: -0.5 * x),
    "size": lambda x: x / (1 + x.size),
    "fan in": lambda x: x / np.sqrt(x.shape[0] if x.ndim else 1),
    "width": lambda x: x * (x.shape[-1] if x.ndim else 1),
    "ndim": lambda x: x if x.ndim > 1 else 0.5 * x,
    "counted": in_row(lambda x: jnp.where(jnp.arange(x.size) < 2, x, 0)),
    "weights": in_row(lambda x: x * np.linspace(1, 2, x.size, dtype=x.dtype)),
    "every other": in_row(lambda x: x * (jax.lax.iota(int, x.size) % 2)),
    "same noise": lambda x: x + jax.random.normal(jax.random.key(0), x.shape, x.dtype),
    "dropout": lambda x: jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, x.shape), x, 0),
    "callback": lambda x: callback(lambda value: value - value.mean() if value.size else value, x),
    "callback norm": lambda x: x * callback(np.linalg.norm, x, ()),
    "centred slope": lambda x: jax.grad(lambda y: jnp.sum(y) ** 2)(x),
    "curved slope": lambda x: jax.grad(lambda y: jnp.sqrt(jnp.sum(y * y) + 0.1))(x),
    "one norm of the sign": lambda x: jnp.sign(x) * jnp.sum(jnp.abs(x)),
    "quantile": lambda x: x - jnp.quantile(x, 0.3) if x.size else x,
    "matrix product": in_row(lambda x: jnp.ones((x.size, x.size), x.dtype) @ x),
    "spread sum": lambda x: x - jnp.broadcast_to(jnp.sum(x, keepdims=True), x.shape),
    "sum of a half": in_row(lambda x: x - jnp.sum(x[: x.size // 2])),
    "clip to the mean": lambda x: jnp.minimum(x, jnp.mean(x)),
    "rank": in_row(lambda x: jnp.sum(x[:, None] > x[None, :], axis=1).astype(x.dtype)),
    "unsigned zero": lambda x: jnp.where(x == jnp.max(x, initial=-jnp.inf), 0, x),
}


def renormalised(leaves):
    return [leaf * (1 + at) for at, leaf in enumerate(leaves)]


def noisy(leaves):
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return [leaf + jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)]


def running(leaves):
    total, results = jnp.zeros([]), []
    for leaf in leaves:
        total = total + jnp.sum(leaf)
        results.append(leaf + bounded(total).astype(leaf.dtype))
    return results


def through_one_vector(function):
    """Apply a function to the concatenation of all leaves, in the order of the leaves."""

    def on(leaves):
        flat = function(jnp.concatenate([leaf.ravel() for leaf in leaves]))
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1].tolist()
        parts = jnp.split(flat, ends)
        return [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]

    return on


ON_LEAVES = {
    "position": renormalised,
    "noise by leaf": noisy,
    "running sum": running,
    "next leaf's sum": lambda leaves: [x + jnp.sum(y) for x, y in zip(leaves, leaves[1:] + leaves[:1], strict=True)],
    "number of leaves": lambda leaves: [leaf / len(leaves) for leaf in leaves],
    "first leaf": lambda leaves: [leaf - jnp.mean(leaves[0]) for leaf in leaves],
    "one vector": through_one_vector(jnp.sin),
    "one vector's norm": through_one_vector(lambda x: x / (0.1 + norm(x))),
    "one vector's cumsum": through_one_vector(jnp.cumsum),
    "one vector sorted": through_one_vector(jnp.sort),
    "dtype": lambda leaves: [leaf if leaf.dtype == jnp.float64 else 2 * leaf for leaf in leaves],
}
GLOBAL = {
    "sum": lambda leaves: sum(map(jnp.sum, leaves)),
    "square": lambda leaves: sum(jnp.sum(x * x) for x in leaves),
    "norm": lambda leaves: jnp.sqrt(sum(jnp.sum(x * x) for x in leaves)),
    "optax norm": lambda leaves: optax.tree.norm(leaves),
    "nnlearn norm": lambda leaves: nnlearn.tree.global_norm(leaves),
    "vdot": lambda leaves: optax.tree.vdot(leaves, leaves),
    "max": lambda leaves: jnp.max(jnp.stack([jnp.max(x, initial=-jnp.inf) for x in leaves])),
    "min": lambda leaves: functools.reduce(jnp.minimum, [jnp.min(x, initial=jnp.inf) for x in leaves]),
    "finite": lambda leaves: jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])).astype(jnp.float64),
    "positive": lambda leaves: sum(jnp.sum(x > 0) for x in leaves).astype(jnp.float64),
    "any": lambda leaves: jnp.any(jnp.stack([jnp.any(x > 1) for x in leaves])).astype(jnp.float64),
    "size": lambda leaves: jnp.asarray(float(sum(x.size for x in leaves))),
    "scaled norm": lambda leaves: scaled_norm(leaves),
    "clipped": lambda leaves: sum(jnp.sum(jnp.minimum(jnp.abs(x), 1.0)) for x in leaves),
}


def scaled_norm(leaves):
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in leaves]))
    safe = jnp.where(largest > 0, largest, 1)
    return safe * jnp.sqrt(sum(jnp.sum((x / safe) ** 2) for x in leaves))


NOT_GLOBAL = {
    "sum of norms": lambda leaves: sum(map(norm, leaves)),
    "mean of means": lambda leaves: sum(map(jnp.mean, leaves)) / len(leaves),
    "largest norm": lambda leaves: jnp.max(jnp.stack([norm(x) for x in leaves])),
    "product of sums": lambda leaves: functools.reduce(jnp.multiply, [bounded(jnp.sum(x)) for x in leaves]),
    "first": lambda leaves: jnp.sum(leaves[0]),
    "all but the first": lambda leaves: sum((jnp.sum(x) for x in leaves[1:]), jnp.zeros([])),
    "number of leaves": lambda leaves: jnp.asarray(float(len(leaves))),
    "largest leaf": lambda leaves: jnp.asarray(float(max(x.size for x in leaves))),
    "sorted norms": lambda leaves: jnp.sort(jnp.stack([norm(x) for x in leaves]))[0],
    "last of the cumsum": lambda leaves: jnp.cumsum(jnp.stack([jnp.sum(x * x) for x in leaves]))[-1],
    "sum of maxima": lambda leaves: sum(jnp.max(x, initial=0) for x in leaves),
    "max of sums": lambda leaves: functools.reduce(jnp.maximum, [jnp.sum(x) for x in leaves]),
    "leaves with a positive sum": lambda leaves: sum((jnp.sum(x) > 0).astype(jnp.float64) for x in leaves),
    "loop over leaves": lambda leaves: jax.lax.fori_loop(
        0, len(leaves), lambda at, total: total + at * jnp.sum(leaves[0]), jnp.zeros([])
    ),
}
SCALAR = {
    "sin": jnp.sin,
    "root": lambda s: jnp.sqrt(jnp.abs(s) + 0.1),
    "bounded": bounded,
    "inverse": lambda s: 1 / (1 + jnp.abs(s)),
    "cond": lambda s: jax.lax.cond(s > 0, lambda: s, lambda: -0.5 * s),
    "half": lambda s: s.astype(jnp.float32).astype(jnp.float64),
    "loop": lambda s: jax.lax.fori_loop(0, 3, lambda _, t: jnp.sin(t) + 0.1, s),
    "while": lambda s: jax.lax.while_loop(lambda t: jnp.abs(t) > 1, lambda t: t / 2, s),
    "callback": lambda s: callback(np.sin, s),
    "min": lambda s: jnp.minimum(1, s),
}
SCALAR2 = {
    "add": jnp.add,
    "multiply": lambda s, t: bounded(s) * t,
    "less": lambda s, t: (s < t).astype(jnp.float64),
    "divide": lambda s, t: s / (1 + jnp.abs(t)),
}
LOSS = {
    "gradient": lambda loss, x, y: jax.grad(loss)(x),
    "sharpness": lambda loss, x, y: jax.grad(loss)(jax.tree.map(lambda a, b: a + 0.05 * b, x, y)),
    "product": lambda loss, x, y: jax.jvp(jax.grad(loss), (x,), (y,))[1],
    "pulled back": lambda loss, x, y: jax.vjp(loss, x)[1](jnp.asarray(0.5, jnp.result_type(loss(x))))[0],
    "by jit": lambda loss, x, y: jax.jit(jax.grad(loss))(x),
    "remat": lambda loss, x, y: jax.grad(jax.checkpoint(loss))(x),
    "gradient of the slope": lambda loss, x, y: jax.grad(
        lambda z: jnp.sum(jnp.stack([jnp.sum(a) for a in jax.tree.leaves(jax.grad(loss)(z))]))
    )(x),
}
LOSS_VALUE = {
    "value": lambda loss, x, y: loss(x),
    "ahead": lambda loss, x, y: loss(jax.tree.map(lambda a, b: a + 0.1 * b, x, y)),
    "slope": lambda loss, x, y: jax.jvp(loss, (x,), (y,))[1],
}


def by_custom_jvp(function):
    wrapped = jax.custom_jvp(function)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return wrapped


def by_custom_vjp(function):
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda *xs: jax.vjp(function, *xs), lambda pull, cotangent: pull(cotangent))
    return wrapped


def in_a_branch(function):
    return lambda x, *rest: jax.lax.cond(jnp.asarray(1.0) > 0, lambda: function(x, *rest), lambda: x)


def in_a_scan(function):
    def on(x, *rest):
        return jax.lax.scan(lambda y, _: (function(y, *rest).astype(x.dtype), None), x, None, length=2)[0]

    return on


def in_a_loop(function):
    return lambda x, *rest: jax.lax.fori_loop(0, 1, lambda _, y: function(y, *rest).astype(x.dtype), x)


def by_row(function):
    return lambda x, *rest: jax.vmap(lambda y: function(y, *rest))(x[None])[0]


def by_map(function):
    return lambda x, *rest: jax.lax.map(lambda y: function(y, *rest), x[None])[0]


ROUTES = {
    "": lambda function: function,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "custom_jvp": by_custom_jvp,
    "custom_vjp": by_custom_vjp,
    "cond": in_a_branch,
    "scan": in_a_scan,
    "fori": in_a_loop,
    "vmap": by_row,
    "map": by_map,
    "partial": lambda function: functools.partial(lambda *xs, f: f(*xs), f=function),
    "transposed": lambda function: lambda x, *rest: function(x.T, *(y.T if y.ndim else y for y in rest)).T,
}


class Registers:
    """The operands for the next operation: trees and scalars, preferably the newest."""

    def __init__(self, trees: int, scalars: int):
        self.trees, self.scalars = trees, scalars

    def tree(self, draw: random.Random) -> int:
        return self.trees - 1 if draw.random() < 0.6 else draw.randrange(self.trees)

    def scalar(self, draw: random.Random) -> int:
        return self.scalars - 1 if draw.random() < 0.6 else draw.randrange(self.scalars)


class Operation(NamedTuple):
    """One operation: ``function(loss, trees, scalars)`` adds a tree or a scalar."""

    name: str
    makes: str
    function: Callable


def leafwise(function, *trees):
    return jax.tree.map(lambda leaf, *rest: function(leaf, *rest).astype(leaf.dtype), *trees)


def on_leaves(function, tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(function(leaves))


def as_scalar(value):
    return jnp.asarray(value).astype(jnp.float64)


def pick(draw: random.Random, table: dict) -> tuple[str, Any]:
    name = draw.choice(list(table))
    return name, table[name]


def random_operation(draw: random.Random, registers: Registers, honest: bool) -> Operation:
    """The next operation; an honest one is elementwise."""
    kinds = {"elementwise": 5, "elementwise2": 4, "with scalar": 4, "global": 3, "scalar": 1.5, "scalar2": 1, "loss": 1}
    kinds |= {"loss value": 0.5}
    if not honest:
        kinds |= {"by leaf": 4, "on leaves": 1, "not global": 1.5}
    kind = draw.choices(list(kinds), list(kinds.values()))[0]
    x, y, s, t = registers.tree(draw), draw.randrange(registers.trees), registers.scalar(draw), 0
    t = draw.randrange(registers.scalars)
    route, wrap = pick(draw, ROUTES) if draw.random() < 0.35 else ("", ROUTES[""])
    if honest and route in ("scan", "fori", "map"):  # these operations depend on whole leaves
        route, wrap = "", ROUTES[""]
    if kind in ("elementwise", "by leaf"):
        name, function = pick(draw, ELEMENTWISE if kind == "elementwise" else BY_LEAF)
        function = wrap(function)
        return Operation(f"{kind} {name} {route}", "tree", lambda loss, T, S: leafwise(function, T[x]))
    if kind == "elementwise2":
        name, function = pick(draw, ELEMENTWISE2)
        function = wrap(function)
        return Operation(f"{kind} {name} {route}", "tree", lambda loss, T, S: leafwise(function, T[x], T[y]))
    if kind == "with scalar":
        name, function = pick(draw, WITH_SCALAR)
        route, function = ("", function) if route in ("transposed",) else (route, wrap(function))
        return Operation(
            f"{kind} {name} {route}", "tree", lambda loss, T, S: leafwise(lambda leaf: function(leaf, S[s]), T[x])
        )
    if kind == "on leaves":
        name, function = pick(draw, ON_LEAVES)
        return Operation(f"{kind} {name}", "tree", lambda loss, T, S: like(on_leaves(function, T[x]), T[x]))
    if kind in ("global", "not global"):
        name, function = pick(draw, GLOBAL if kind == "global" else NOT_GLOBAL)
        return Operation(f"{kind} {name}", "scalar", lambda loss, T, S: as_scalar(function(jax.tree.leaves(T[x]))))
    if kind == "scalar":
        name, function = pick(draw, SCALAR)
        return Operation(f"{kind} {name}", "scalar", lambda loss, T, S: as_scalar(function(S[s])))
    if kind == "scalar2":
        name, function = pick(draw, SCALAR2)
        return Operation(f"{kind} {name}", "scalar", lambda loss, T, S: as_scalar(function(S[s], S[t])))
    if kind == "loss":
        name, function = pick(draw, LOSS)
        return Operation(f"{kind} {name}", "tree", lambda loss, T, S: like(function(loss, T[1], T[x]), T[x]))
    name, function = pick(draw, LOSS_VALUE)
    return Operation(f"{kind} {name}", "scalar", lambda loss, T, S: as_scalar(function(loss, T[1], T[x])))


def like(tree, other):
    return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), tree, other)


STATES = {
    "zeros": lambda params: jax.tree.map(jnp.zeros_like, params),
    "start": lambda params: jax.tree.map(jnp.array, params),
    "ones": lambda params: jax.tree.map(jnp.ones_like, params),
}
LEAF_STATES = {
    "sizes": lambda params: jax.tree.map(lambda leaf: jnp.full_like(leaf, leaf.size), params),
    "norms": lambda params: jax.tree.map(lambda leaf: jnp.full_like(leaf, norm(leaf)), params),
    "axes": lambda params: jax.tree.map(lambda leaf: jnp.full_like(leaf, leaf.ndim), params),
    "order": lambda params: on_leaves(lambda leaves: [jnp.full_like(x, at) for at, x in enumerate(leaves)], params),
}
SCALAR_STATES = {
    "zero": lambda params: jnp.zeros([], jnp.float64),
    "norm": lambda params: as_scalar(GLOBAL["norm"](jax.tree.leaves(params))),
}
LEAF_SCALAR_STATES = {
    "leaves": lambda params: jnp.asarray(float(len(jax.tree.leaves(params)))),
    "first": lambda params: as_scalar(jnp.sum(jax.tree.leaves(params)[0])),
}


def random_link(draw: random.Random, honest: bool) -> tuple[str, optax.GradientTransformationExtraArgs]:
    """A transformation by a random program, with its description."""
    trap = not honest and draw.random() < 0.3
    tree_states = [
        pick(draw, LEAF_STATES if trap and draw.random() < 0.5 else STATES) for _ in range(draw.choice([0, 0, 1, 2]))
    ]
    tables = [
        LEAF_SCALAR_STATES if trap and draw.random() < 0.5 else SCALAR_STATES for _ in range(draw.choice([0, 0, 1]))
    ]
    scalar_states = [pick(draw, table) for table in tables]
    registers = Registers(2 + len(tree_states), 2 + len(scalar_states))
    operations = []
    for _ in range(draw.randint(1, 6)):
        operation = random_operation(draw, registers, honest)
        operations.append(operation)
        if operation.makes == "tree":
            registers.trees += 1
        else:
            registers.scalars += 1
    result = registers.tree(draw)
    kept = [draw.randrange(registers.trees) for _ in tree_states]
    kept_scalars = [draw.randrange(registers.scalars) for _ in scalar_states]

    def init(params):
        made = [make(params) for _, make in tree_states], [make(params) for _, make in scalar_states]
        return (*made, jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, *, value, grad, value_fn, **extra):
        trees, scalars = [updates, params, *state[0]], [as_scalar(value), as_scalar(state[2]), *state[1]]
        for operation in operations:
            made = operation.function(value_fn, trees, scalars)
            (trees if operation.makes == "tree" else scalars).append(made)
        new = [
            leafwise(lambda a, b: 0.5 * a + 0.5 * bounded(b), old, trees[at])
            for old, at in zip(state[0], kept, strict=True)
        ]
        held = [bounded(scalars[at]) for at in kept_scalars]
        return like(leafwise(bounded, trees[result]), updates), (new, held, state[2] + 1)

    names = [f"state {name}" for name, _ in (*tree_states, *scalar_states)]
    text = "; ".join([*names, *(operation.name.strip() for operation in operations)])
    return f"[{text}]", optax.GradientTransformationExtraArgs(init, update)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def by_name(params):
    return jax.tree.map_with_path(lambda path, _: "a" in jax.tree_util.keystr(path), params)


@jax.tree_util.register_static
class Age(int):
    """A number in the static structure of a state."""


def ageing() -> optax.GradientTransformation:
    """A transformation that normalises each leaf from the fourth step on, with a count outside of the program."""

    def update(updates, state, params=None):
        updates = jax.tree.map(BY_LEAF["norm"], updates) if state["age"] > 1 else updates
        return updates, {"age": Age(state["age"] + 1)}

    return optax.GradientTransformation(lambda params: {"age": Age(0)}, update)


def history(leaf_by_leaf: bool) -> optax.GradientTransformation:
    """The mean of the last two updates, or of the norms of their leaves, from a stack in the state."""

    def update(updates, state, params=None):
        state = jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), state, updates)
        if leaf_by_leaf:
            return jax.tree.map(lambda u, s: u / (0.1 + norm(s)), updates, state), state
        return jax.tree.map(lambda s: jnp.mean(s, axis=0), state), state

    return optax.GradientTransformation(lambda p: jax.tree.map(lambda x: jnp.zeros((2, *x.shape), x.dtype), p), update)


def remembering() -> optax.GradientTransformation:
    """A transformation that stores the number of leaves at initialisation in Python."""
    seen = []

    def init(params):
        seen[:] = [len(jax.tree.leaves(params))]
        return optax.EmptyState()

    return optax.GradientTransformation(
        init, lambda updates, state, params=None: (jax.tree.map(lambda u: u / seen[0], updates), state)
    )


def counting() -> optax.GradientTransformation:
    """A transformation that gets the next number from the host, once for each array."""
    count = iter(range(1, 1_000_000))

    def ask(leaf):
        form = jax.ShapeDtypeStruct((), leaf.dtype)
        return leaf / jax.experimental.io_callback(lambda: np.asarray(next(count), leaf.dtype), form, ordered=True)

    return optax.stateless(lambda updates, params: jax.tree.map(ask, updates))


def leaf_counts() -> optax.GradientTransformation:
    """A counter for each leaf, as an array without axes."""

    def update(updates, state, params=None):
        state = jax.tree.map(lambda count, u: count + (jnp.sum(u) > 0), state, updates)
        return jax.tree.map(lambda u, count: u / (1 + count), updates, state), state

    return optax.GradientTransformation(lambda p: jax.tree.map(lambda _: jnp.zeros([], jnp.int64), p), update)


def of_a_dict() -> optax.GradientTransformation:
    """A transformation that depends on the type of the tree."""
    return optax.stateless(lambda u, p: jax.tree.map(lambda x: x if isinstance(u, dict | tuple | list) else 2 * x, u))


KNOWN = {
    "nnlearn.adamw": lambda: nnlearn.adamw(0.1),
    "nnlearn.lamb": lambda: nnlearn.lamb(0.1),
    "nnlearn.clip": lambda: nnlearn.clip_by_global_norm(0.5),
    "nnlearn.centralize": nnlearn.centralize,
    "nnlearn.lion": lambda: nnlearn.lion(0.1),
    "optax.adam": lambda: optax.adam(0.1),
    "optax.adabelief": lambda: optax.adabelief(0.1),
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(0.5),
    "optax.normalize_by_update_norm": optax.normalize_by_update_norm,
    "optax.zero_nans": optax.zero_nans,
    "history": lambda: history(False),
    "identity": optax.identity,
}
KNOWN_BY_LEAF = {
    "optax.lamb": lambda: optax.lamb(0.1),
    "optax.adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "optax.novograd": lambda: optax.novograd(0.1),
    "optax.block_rms": lambda: optax.clip_by_block_rms(0.3),
    "optax.agc": lambda: optax.adaptive_grad_clip(0.1),
    "optax.masked": lambda: optax.masked(optax.scale(0.5), matrices),
    "optax.masked by name": lambda: optax.masked(optax.scale(0.5), by_name),
    "optax.centralize": optax.centralize,
    "ageing": ageing,
    "history of norms": lambda: history(True),
    "remembering": remembering,
    "counting": counting,
    "leaf counts": leaf_counts,
    "of a dict": of_a_dict,
}


def random_transformation(seed: int) -> tuple[str, optax.GradientTransformationExtraArgs, bool]:
    """A transformation, its description, and whether it is elementwise by construction.

    Equal seeds give equal transformations without shared state.
    """
    draw = random.Random(seed)
    honest = draw.random() < 0.5
    names, links = [], []
    for _ in range(draw.choice([1, 1, 1, 2])):
        if draw.random() < 0.75:
            name, link = random_link(draw, honest)
        else:
            name, make = pick(draw, KNOWN if honest or draw.random() < 0.6 else KNOWN_BY_LEAF)
            link = make()
        wrapper = draw.random()
        if wrapper < 0.06:
            name, link = f"by_leaf({name})", nnlearn.by_leaf(link)
        elif wrapper < 0.09:
            name, link = f"nnlearn.apply_if_finite({name})", nnlearn.apply_if_finite(link, 3)
        elif wrapper < 0.11:
            name, link = f"optax.apply_if_finite({name})", optax.apply_if_finite(link, 3)
        elif wrapper < 0.13:
            name, link = f"MultiSteps({name})", optax.MultiSteps(link, 2).gradient_transformation()
        elif wrapper < 0.15:
            name, link = f"per_buffer({name})", optax.masked(link, nnlearn.per_buffer(matrices))
        elif wrapper < 0.17:
            name, link = f"later({name})", optax.conditionally_transform(link, lambda step: step > 0)
        names.append(name)
        links.append(link)
    return " -> ".join(names), optax.chain(*links), honest
