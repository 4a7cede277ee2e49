"""The table that every optimizer is held to, and the runs that the tests share."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import nnlearn


@dataclasses.dataclass(frozen=True)
class Case:
    """One optimizer, its settings, and its judges: at least one of a library, a NumPy loop and PyTorch.

    Attributes:
      name: its name in nnlearn and in the library that judges it.
      varied: every numeric hyper-parameter, away from its default.
      flags: settings that Python branches on, tried beside the default.
      bowl, rosenbrock: (learning rate, steps) that get to the minimum.
      library: optax, optax.contrib, or None where only other judges have the method.
      numpy: one step in float64, ``numpy(step, param, gradient, memory, **varied) -> param``, with ``step`` from 1 and
        ``memory`` a dict that it may keep arrays in.
      torch: from (torch, parameters) to the torch optimizer that does the same.
      torch_settings: nnlearn's settings that torch's correspond to.
      torch_leaves: the leaves that the torch optimizer can take; None for all.
      fixed: settings that no array can stand for, as they decide shapes or dtypes; given in every run.
      adapt: from nnlearn or the library to a factory of a transformation of plain parameters, for wrappers.
      complex: whether the library takes complex parameters in a way that makes sense.
      float64: tolerance of the library in float64, larger where it rounds to float32 there too.
      signed: hyper-parameters that may be negative.
      rounded: hyper-parameters whose state is a float32 even in float64, so that finite differences see its steps.
      apart: hyper-parameters with a part of the update that the learning rate does not multiply.
      float32: the same in float32, larger where sums over all parameters decide the step.
      whole_leaf: whether an element's update depends on others of its leaf.
      exact: whether packed parameters give the same bits; sums over all parameters round in another order.
      rate: how the learning rate enters: a "factor" of the first update, somewhere "inside" it, or at the "start" only.
      idle: hyper-parameters that change nothing at a constant learning rate.
      constant: whether derivatives treat a part of the state as a constant, so that differences do not equal them.
    """

    name: str
    varied: dict[str, float]
    flags: tuple[dict[str, Any], ...] = ()
    bowl: tuple[float, int] = (0.1, 300)
    rosenbrock: tuple[float, int] = (0.1, 5000)
    library: Any = optax
    numpy: Callable | None = None
    torch: Callable | None = None
    torch_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    torch_leaves: tuple[str, ...] | None = None
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapt: Callable | None = None
    complex: bool = True
    float64: float = 1e-12
    float32: float = 1e-6
    signed: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    whole_leaf: bool = False
    exact: bool = True
    rate: str = "factor"
    idle: tuple[str, ...] = ()
    constant: bool = False

    def __post_init__(self):
        if not (hasattr(self.library, self.name) or self.numpy or self.torch):
            raise ValueError(
                f"{self.name} has no judge: name the library that has it, write a NumPy loop, or give PyTorch's"
            )

    def _factory(self, library):
        if self.adapt:
            return self.adapt(library)
        factory = getattr(library, self.name)
        return with_fixed(factory, tuple(self.fixed.items())) if self.fixed else factory

    @property
    def ours(self):
        return self._factory(nnlearn)

    @property
    def theirs(self):
        return self._factory(self.library)


@functools.cache
def with_fixed(factory, fixed):
    """A factory without the arguments that are fixed, so that nothing else can give them."""
    signature, fixed = inspect.signature(factory), dict(fixed)

    left = [parameter for name, parameter in signature.parameters.items() if name not in fixed]
    signature = signature.replace(parameters=left)

    def make(*args, **kwargs):
        return factory(**signature.bind(*args, **kwargs).arguments, **fixed)

    make.__signature__ = signature
    return make


def update_by_numpy(case, params, noise, numbers):
    """Final parameters of the same run as ``run``, by the case's NumPy loop."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    memories = {name: {} for name in params}
    for index in range(len(noise["w"])):
        for name, param in params.items():
            gradient = param - 0.5 + np.asarray(noise[name][index])
            params[name] = case.numpy(index + 1, param, gradient, memories[name], **numbers)
    return params


def numpy_ademamix(step, param, gradient, memory, *, learning_rate, b1, b2, b3, alpha, eps, eps_root, weight_decay):
    m1 = memory["m1"] = b1 * memory.get("m1", 0) + (1 - b1) * gradient
    m2 = memory["m2"] = b3 * memory.get("m2", 0) + (1 - b3) * gradient
    nu = memory["nu"] = b2 * memory.get("nu", 0) + (1 - b2) * gradient**2
    update = (m1 / (1 - b1**step) + alpha * m2) / (np.sqrt(nu / (1 - b2**step) + eps_root) + eps)
    return param - learning_rate * (update + weight_decay * param)


def numpy_muon(
    step, param, gradient, memory, *, learning_rate, ns_steps, beta, eps, weight_decay, adam_b1, adam_b2,
    adam_eps_root, adam_weight_decay, adam_learning_rate, consistent_rms,
):  # fmt: skip
    b1 = beta if param.ndim == 2 else adam_b1
    mu = memory["mu"] = b1 * memory.get("mu", 0) + (1 - b1) * gradient
    mean = b1 * mu / (1 - b1 ** (step + 1)) + (1 - b1) * gradient / (1 - b1**step)
    if param.ndim != 2:
        nu = memory["nu"] = adam_b2 * memory.get("nu", 0) + (1 - adam_b2) * gradient**2
        update = mean / (np.sqrt(nu / (1 - adam_b2**step) + adam_eps_root) + eps)
        return param - adam_learning_rate * (update + adam_weight_decay * param)
    left, values, right = np.linalg.svd(mean / (np.linalg.norm(mean) + eps), full_matrices=False)
    for _ in range(ns_steps):  # Newton-Schulz changes singular values alone
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    update = consistent_rms * max(param.shape) ** 0.5 * (left * values) @ right
    return param - learning_rate * (update + weight_decay * param)


def numpy_lookahead(step, param, gradient, memory, *, learning_rate, sync_period, slow_step_size, momentum):
    slow = memory.setdefault("slow", param)
    memory["trace"] = gradient + momentum * memory.get("trace", 0)
    param = param - learning_rate * memory["trace"]
    if step % sync_period == 0:
        param = memory["slow"] = slow + slow_step_size * (param - slow)
    return param


@functools.cache
def lookahead_around_sgd(library):
    """Lookahead as a transformation of the fast parameters alone: the slow ones are in its state."""

    @nnlearn.settings.comparable
    def plain(
        learning_rate: optax.ScalarOrSchedule = 0.1,
        sync_period: float = 5,
        slow_step_size: float = 0.5,
        momentum: float = 0.9,
        *,
        reset_state: bool = False,
        master_dtype=None,
    ):
        master = {} if library is optax else {"master_dtype": master_dtype}
        sgd = library.sgd(learning_rate, momentum, **master)
        tx = library.lookahead(sgd, sync_period, slow_step_size, reset_state)

        def init(params):
            slow = jax.tree.map(slow_start, params)
            return tx.init(optax.LookaheadParams.init_synced(params)), {"slow": slow}

        def update(updates, state, params=None, **extra_args):  # sgd needs no extra argument
            inner, slow = state[0], state[1]["slow"]
            change, inner = tx.update(updates, inner, optax.LookaheadParams(fast=params, slow=slow))
            return change.fast, (inner, {"slow": optax.apply_updates(slow, change.slow)})

        return optax.GradientTransformation(init, update)

    return plain


def slow_start(leaf):
    """A slow parameter, float32 at least: a copy, or zeros for a shape."""
    dtype = nnlearn.tree.compute_dtype(jnp.result_type(leaf))
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
    return jnp.zeros(leaf.shape, dtype) if is_shape else jnp.array(leaf, dtype, copy=True)


def adam_by_numpy(step, gradient, memory, b1, b2, eps):
    """Adam's direction, and its debiased first moment."""
    mu = memory["mu"] = b1 * memory.get("mu", 0) + (1 - b1) * gradient
    nu = memory["nu"] = b2 * memory.get("nu", 0) + (1 - b2) * gradient**2
    return mu / (1 - b1**step) / (np.sqrt(nu / (1 - b2**step)) + eps), mu / (1 - b1**step)


def numpy_soap(
    step, param, gradient, memory, *, learning_rate, b1, b2, shampoo_beta, eps, weight_decay, precondition_every,
    kl=False,
):  # fmt: skip
    if param.ndim < 2:
        update, _ = adam_by_numpy(step, gradient, memory, b1, b2, eps)
        return param - learning_rate * (update + weight_decay * param)
    sizes = param.shape
    bases = memory.setdefault("bases", [np.eye(size) for size in sizes])
    grams = memory.setdefault("grams", [kl * np.eye(size) for size in sizes])
    mu = memory["mu"] = b1 * memory.get("mu", 0) + (1 - b1) * gradient
    turned = bases[0].T @ gradient @ bases[1]
    nu = memory["nu"] = b2 * memory.get("nu", 0) + (1 - b2) * turned**2
    direction = (bases[0].T @ mu @ bases[1]) / (1 - b1**step) / (np.sqrt(nu / (1 - b2**step)) + eps)
    update = bases[0] @ direction @ bases[1].T
    products = [gradient @ gradient.T, gradient.T @ gradient]
    if kl:
        values = [np.diag(basis.T @ gram @ basis) for basis, gram in zip(bases, grams, strict=True)]
        inverses = [
            basis @ np.diag(1 / (value + eps)) @ basis.T / len(value)
            for basis, value in zip(bases, values, strict=True)
        ]
        products = [gradient @ inverses[1] @ gradient.T, gradient.T @ inverses[0] @ gradient]
    for side in (0, 1):
        grams[side] = shampoo_beta * grams[side] + (1 - shampoo_beta) * products[side]
        if (step - 1) % precondition_every == 0:
            bases[side] = np.linalg.qr(grams[side] @ bases[side])[0]
    return param - learning_rate * (update + weight_decay * param)


def numpy_normuon(
    step, param, gradient, memory, *, learning_rate, ns_steps, beta, neuron_b2, eps, weight_decay, adam_b1, adam_b2,
    adam_eps_root, adam_weight_decay, adam_learning_rate,
):  # fmt: skip
    numbers = {"ns_steps": ns_steps, "beta": beta, "eps": eps, "adam_b1": adam_b1, "adam_b2": adam_b2}
    numbers |= {"adam_eps_root": adam_eps_root, "adam_weight_decay": adam_weight_decay}
    rates = {"learning_rate": 1.0, "adam_learning_rate": adam_learning_rate, "consistent_rms": 1.0}
    moved = numpy_muon(step, param, gradient, memory, **numbers, **rates, weight_decay=0.0)
    if param.ndim != 2:
        return moved
    update = (param - moved) / max(param.shape) ** 0.5
    memory["rows"] = neuron_b2 * memory.get("rows", 0) + (1 - neuron_b2) * np.mean(update**2, 0)
    update = update / (np.sqrt(memory["rows"] / (1 - neuron_b2**step)) + eps)
    update *= 0.2 * param.size**0.5 / np.linalg.norm(update)
    return param - learning_rate * (update + weight_decay * param)


def numpy_adamuon(
    step, param, gradient, memory, *, learning_rate, beta, b2, eps, weight_decay, adam_b1, adam_b2,
    adam_weight_decay, adam_learning_rate,
):  # fmt: skip
    if param.ndim != 2:
        mu = memory["mu"] = adam_b1 * memory.get("mu", 0) + (1 - adam_b1) * gradient
        nu = memory["nu"] = adam_b2 * memory.get("nu", 0) + (1 - adam_b2) * gradient**2
        mean = adam_b1 * mu / (1 - adam_b1 ** (step + 1)) + (1 - adam_b1) * gradient / (1 - adam_b1**step)
        return param - adam_learning_rate * (
            mean / (np.sqrt(nu / (1 - adam_b2**step)) + eps) + adam_weight_decay * param
        )
    mu = memory["mu"] = beta * memory.get("mu", 0) + (1 - beta) * gradient
    sign = np.sign(beta * mu + (1 - beta) * gradient)
    left, values, right = np.linalg.svd(sign / (np.linalg.norm(sign) + eps), full_matrices=False)
    for _ in range(4):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    update = (left * values) @ right
    nu = memory["nu"] = b2 * memory.get("nu", 0) + (1 - b2) * update**2
    update = update / (np.sqrt(nu) + eps)
    update *= 0.2 * param.size**0.5 / np.linalg.norm(update)
    return param - learning_rate * (update + weight_decay * param)


def numpy_qhadam(step, param, gradient, memory, *, learning_rate, b1, b2, nu1, nu2, eps, weight_decay):
    mu = memory["mu"] = b1 * memory.get("mu", 0) + (1 - b1) * gradient
    nu = memory["nu"] = b2 * memory.get("nu", 0) + (1 - b2) * gradient**2
    above = (1 - nu1) * gradient + nu1 * mu / (1 - b1**step)
    below = (1 - nu2) * gradient**2 + nu2 * nu / (1 - b2**step)
    return param - learning_rate * (above / (np.sqrt(below) + eps) + weight_decay * param)


def numpy_adam_mini(step, param, gradient, memory, *, learning_rate, b1, b2, eps, weight_decay):
    mu = memory["mu"] = b1 * memory.get("mu", 0) + (1 - b1) * gradient
    square = np.mean(gradient**2, 0, keepdims=True) if param.ndim == 2 else gradient**2
    nu = memory["nu"] = b2 * memory.get("nu", 0) + (1 - b2) * square
    update = mu / (1 - b1**step) / (np.sqrt(nu / (1 - b2**step)) + eps)
    return param - learning_rate * (update + weight_decay * param)


def numpy_dion(
    step, param, gradient, memory, *, learning_rate, beta, eps, weight_decay, adam_b1, adam_b2, adam_weight_decay,
    adam_learning_rate,
):  # fmt: skip
    if param.ndim != 2:
        update, _ = adam_by_numpy(step, gradient, memory, adam_b1, adam_b2, eps)
        return param - adam_learning_rate * (update + adam_weight_decay * param)
    rows, columns = param.shape
    drawn = jax.random.normal(jax.random.key(0), (columns, -(-min(param.shape) // 2)), jnp.float32)
    basis = memory.setdefault("basis", np.asarray(drawn, np.float64))
    total = memory.get("mu", 0) + gradient
    left, _ = np.linalg.qr(total @ basis)
    right = total.T @ left
    memory["mu"] = total - (1 - beta) * left @ right.T
    memory["basis"] = right / (np.linalg.norm(right, axis=0, keepdims=True) + eps)
    update = (columns / rows) ** 0.5 * left @ memory["basis"].T
    return param - learning_rate * (update + weight_decay * param)


def numpy_shampoo(
    step, param, gradient, memory, *, learning_rate, b1, b2, shampoo_beta, eps, ridge, weight_decay, precondition_every
):
    update, mean = adam_by_numpy(step, gradient, memory, b1, b2, eps)
    if param.ndim == 2:
        grams, roots = memory.setdefault("grams", [0, 0]), memory.setdefault("roots", [0, 0])
        for side, product in enumerate((gradient @ gradient.T, gradient.T @ gradient)):
            grams[side] = shampoo_beta * grams[side] + (1 - shampoo_beta) * product
            if (step - 1) % precondition_every == 0:
                values, vectors = np.linalg.eigh(grams[side] / (1 - shampoo_beta**step))
                roots[side] = vectors @ np.diag(np.maximum(values, ridge * values.max()) ** -0.25) @ vectors.T
        turned = roots[0] @ mean @ roots[1]
        update = turned * np.linalg.norm(update) / np.linalg.norm(turned)
    return param - learning_rate * (update + weight_decay * param)


def numpy_galore(step, param, gradient, memory, *, learning_rate, update_proj_gap, scale, weight_decay):
    if param.ndim != 2:
        update, _ = adam_by_numpy(step, gradient, memory, 0.9, 0.999, 1e-8)
    else:
        if (step - 1) % update_proj_gap == 0:
            memory["projector"] = np.linalg.svd(gradient, full_matrices=False)[0][:, :2]
        update, _ = adam_by_numpy(step, memory["projector"].T @ gradient, memory, 0.9, 0.999, 1e-8)
        update = scale * memory["projector"] @ update
    return param - learning_rate * (update + weight_decay * param)


def numpy_apollo(
    step, param, gradient, memory, *, learning_rate, update_proj_gap, scale, b1, b2, eps, weight_decay, growth
):
    if param.ndim != 2:
        update, _ = adam_by_numpy(step, gradient, memory, b1, b2, eps)
        return param - learning_rate * (update + weight_decay * param)
    key = jax.random.fold_in(jax.random.key(0), np.uint32((step - 1) // update_proj_gap))
    low = gradient @ np.asarray(jax.random.normal(key, (3, 2), jnp.float32), np.float64) / np.sqrt(2)
    adam, _ = adam_by_numpy(step, low, memory, b1, b2, eps)
    update = scale * gradient * (np.linalg.norm(adam, axis=1) / np.linalg.norm(low, axis=1))[:, None]
    size = np.linalg.norm(update)
    if "size" in memory and size > growth * memory["size"]:
        update *= growth * memory["size"] / size
    memory["size"] = np.linalg.norm(update)
    return param - learning_rate * (update + weight_decay * param)


def numpy_kron(
    step, param, gradient, memory, *, learning_rate, b1, weight_decay, preconditioner_update_probability,
    preconditioner_lr, preconditioner_init_scale,
):  # fmt: skip
    mu = memory["mu"] = b1 * memory.get("mu", 0) + (1 - b1) * gradient
    mean = np.reshape(mu / (1 - b1**step), (-1, param.shape[-1] if param.ndim else 1))
    is_matrix = param.ndim == 2
    if "factors" not in memory:
        sizes = mean.shape if is_matrix else mean.shape[1:]
        memory["factors"] = [preconditioner_init_scale ** (1 / len(sizes)) * np.eye(size) for size in sizes]
    factors = memory["factors"]
    memory["waited"] = memory.get("waited", 0) + 1
    if memory["waited"] * preconditioner_update_probability >= 1:
        memory["waited"] = 0
        key = jax.random.fold_in(jax.random.key(0), np.uint32(step - 1))
        noise = np.asarray(jax.random.normal(key, mean.shape, jnp.float32), np.float64)
        damped = mean + float(np.finfo(np.float32).eps) ** 0.5 * np.mean(np.abs(mean)) * noise
        left, right = factors[0] if is_matrix else np.eye(1), factors[-1]
        a, b = left @ damped @ right.T, np.linalg.solve(left.T, noise) @ np.linalg.inv(right)
        for side in range(len(factors)):
            samples = [a, b] if is_matrix and side == 0 else [a.T, b.T]
            first, second = (each @ each.T for each in samples)
            if is_matrix and param.shape[side] <= 3:  # triangular; vectors and longer sides are diagonal
                total = first + second
                found = total @ total[np.argmax(np.sum(total**2, 1))]
                change = np.triu(first - second) / (np.linalg.norm(total @ found) / np.linalg.norm(found))
            else:
                change = np.diag(np.diag(first - second)) / np.max(np.diag(first + second))
            factors[side] = factors[side] - preconditioner_lr * change @ factors[side]
        if is_matrix:
            sizes = [np.max(np.abs(factor)) for factor in factors]
            factors[:] = [factors[0] * (sizes[1] / sizes[0]) ** 0.5, factors[1] * (sizes[0] / sizes[1]) ** 0.5]
    update = factors[0].T @ factors[0] @ mean if is_matrix else mean
    update = update @ factors[-1].T @ factors[-1]
    update = np.reshape(update / max(1, np.sqrt(np.mean(update**2)) / 1.1), param.shape)
    return param - learning_rate * (update + weight_decay * param)


def numpy_ema_nesterov(step, param, gradient, memory, *, learning_rate, lookahead, decay, momentum):
    trend = memory.get("trend", 0)
    theta = memory.setdefault("theta", param)
    memory["momentum"] = gradient + momentum * memory.get("momentum", 0)
    new = param - learning_rate * memory["momentum"]
    memory["trend"] = decay * trend + (1 - decay) * (new - theta)
    memory["theta"] = new
    return new + lookahead * memory["trend"]


@functools.cache
def ahead_of_sgd(library):
    """EMA-Nesterov around gradient descent with momentum."""

    @nnlearn.settings.comparable
    def plain(
        learning_rate: optax.ScalarOrSchedule = 0.1,
        lookahead: optax.ScalarOrSchedule = 0.5,
        decay: float = 0.9,
        momentum: float = 0.5,
        *,
        master_dtype=None,
    ):
        tx = library.ema_nesterov(library.sgd(learning_rate, momentum), lookahead, decay)
        return nnlearn.transforms.assemble(tx, master_dtype=master_dtype)

    return plain


def bowl_value(params):
    """The loss of which ``run`` takes the gradient, without its noise."""
    wide = [leaf.astype(nnlearn.tree.compute_dtype(leaf.dtype)) for leaf in jax.tree.leaves(params)]
    return 0.5 * sum(jnp.sum(jnp.abs(leaf - jnp.asarray(0.5, leaf.dtype)) ** 2) for leaf in wide)


@functools.cache
def in_our_words(factory, fixed=(), value_of="value", **renamed):
    """A factory with other argument names, the rate first, whose ``update`` takes a bowl's loss for ``value``.

    With ``value_of="obj_fn"`` it takes the loss as a function.
    """
    names = {theirs: ours for ours, theirs in renamed.items()}
    given = inspect.signature(factory).parameters.values()
    left = [each.replace(name=names.get(each.name, each.name)) for each in given if each.name not in dict(fixed)]
    left.sort(key=lambda each: (each.kind, each.name != "learning_rate"))

    def make(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        arguments = {renamed.get(name, name): value for name, value in arguments.items()}
        tx = optax.with_extra_args_support(factory(**arguments, **dict(fixed)))

        def update(updates, state, params=None, *, value=None, **extra_args):
            value = bowl_value(params) if value is None else value
            given = {"value": value} if value_of == "value" else {value_of: bowl_value}
            return tx.update(updates, state, params, **given, **extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    signature = make.__signature__ = inspect.Signature(left)
    return nnlearn.settings.comparable(make)


def with_value(name, **renamed):
    """The adapter of an optimizer that takes the loss."""
    return lambda library: in_our_words(getattr(library if library is nnlearn else theirs_of(name), name), **renamed)


def theirs_of(name):
    """The part of optax that has a name."""
    return optax if hasattr(optax, name) else optax.contrib


@functools.cache
def sm3_of_vectors(library):
    """SM3, of which optax's takes no scalars: they are vectors of one element to it."""
    if library is nnlearn:
        return nnlearn.sm3

    def longer(tree):
        return jax.tree.map(lambda leaf: leaf[None] if leaf.ndim == 0 else leaf, tree)

    def plain(learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9):
        tx = library.sm3(learning_rate, momentum)

        def update(updates, state, params=None):
            change, state = tx.update(longer(updates), state)
            return jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), change, updates), state

        return optax.GradientTransformation(lambda params: tx.init(longer(params)), update)

    return plain


@functools.cache
def mechanized_sgd(library):
    """Mechanic around gradient descent."""
    contrib = optax.contrib if library is not nnlearn else nnlearn

    @nnlearn.settings.comparable
    def plain(
        learning_rate: optax.ScalarOrSchedule = 1.0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        s_init: float = 1e-6,
        *,
        master_dtype=None,
    ):
        sgd = optax.sgd(learning_rate) if library is not nnlearn else nnlearn.sgd(learning_rate)
        tx = contrib.mechanize(sgd, weight_decay, eps, s_init)
        return tx if library is not nnlearn else nnlearn.transforms.assemble(tx, master_dtype=master_dtype)

    return plain


@functools.cache
def sam_of_sgd(library):
    """SAM whose steps climb and descend in turn."""
    contrib, base = (nnlearn, nnlearn) if library is nnlearn else (optax.contrib, optax)

    @nnlearn.settings.comparable
    def plain(
        learning_rate: optax.ScalarOrSchedule = 0.1,
        rho: float = 0.01,
        momentum: float = 0.9,
        *,
        sync_period: int = 2,
        reset_state: bool = True,
        master_dtype=None,
    ):
        nnlearn.checks.check_nonnegative("rho", rho)
        climb = base.chain(contrib.normalize(), base.sgd(rho))
        tx = contrib.sam(base.sgd(learning_rate, momentum), climb, sync_period, reset_state)
        return tx if library is not nnlearn else nnlearn.transforms.assemble(tx, master_dtype=master_dtype)

    return plain


MOMENTS = {"learning_rate": 0.03, "b1": 0.8, "b2": 0.95, "eps": 1e-4}
NESTEROV = ({"nesterov": True},)

CASES = [
    Case(
        "sgd",
        {"learning_rate": 0.03, "momentum": 0.8},
        NESTEROV,
        torch=lambda torch, params: torch.optim.SGD(params, lr=0.03, momentum=0.8, nesterov=True),
        torch_settings={"learning_rate": 0.03, "momentum": 0.8, "nesterov": True},
        rosenbrock=(0.001, 5000),
    ),
    Case(
        "rmsprop",
        {"learning_rate": 0.003, "decay": 0.8, "eps": 1e-4, "initial_scale": 0.5, "momentum": 0.7},
        ({"eps_in_sqrt": False}, {"centered": True}, {"bias_correction": True}, {"nesterov": True, "centered": True}),
        torch=lambda torch, params: torch.optim.RMSprop(
            params, lr=0.003, alpha=0.8, eps=1e-4, momentum=0.7, centered=True
        ),
        torch_settings={
            "learning_rate": 0.003,
            "decay": 0.8,
            "eps": 1e-4,
            "momentum": 0.7,
            "centered": True,
            "eps_in_sqrt": False,
        },
        rosenbrock=(0.01, 5000),
    ),
    Case(
        "adagrad",
        {"learning_rate": 0.3, "initial_accumulator_value": 0.4, "eps": 1e-3},
        bowl=(0.5, 600),
        torch=lambda torch, params: torch.optim.Adagrad(params, lr=0.3, initial_accumulator_value=0.4, eps=0.0),
        torch_settings={"learning_rate": 0.3, "initial_accumulator_value": 0.4, "eps": 0.0},
        rosenbrock=(1.0, 5000),
    ),
    Case(
        "adadelta",
        {"learning_rate": 0.3, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.01},
        bowl=(5.0, 1000),
        complex=False,
        rosenbrock=(1.0, 5000),
    ),
    Case(
        "adam",
        MOMENTS | {"eps_root": 1e-3},
        NESTEROV,
        torch=lambda torch, params: torch.optim.Adam(params, lr=0.03, betas=(0.8, 0.95), eps=1e-4),
        torch_settings=MOMENTS,
    ),
    Case(
        "amsgrad",
        MOMENTS | {"eps_root": 1e-3},
        ({"bias_correction_mu": False}, {"bias_correction_nu": False}),
        rosenbrock=(1.0, 5000),
    ),
    Case("adamax", MOMENTS, rosenbrock=(0.3, 5000)),
    Case("adamaxw", MOMENTS | {"weight_decay": 0.02}, rosenbrock=(0.3, 5000)),
    Case(
        "nadam",
        MOMENTS | {"eps_root": 1e-3},
        # torch's momentum schedule reaches b1 at once when it decays fast
        torch=lambda torch, params: torch.optim.NAdam(params, lr=0.03, betas=(0.8, 0.95), eps=1e-4, momentum_decay=1e6),
        torch_settings=MOMENTS,
    ),
    Case("nadamw", MOMENTS | {"eps_root": 1e-3, "weight_decay": 0.02}),
    Case(
        "adamw",
        MOMENTS | {"eps_root": 1e-3, "weight_decay": 0.02},
        NESTEROV,
        torch=lambda torch, params: torch.optim.AdamW(params, lr=0.03, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.02),
        torch_settings=MOMENTS | {"weight_decay": 0.02},
    ),
    Case("adabelief", MOMENTS | {"eps_root": 1e-3}, NESTEROV),
    Case("radam", MOMENTS | {"eps_root": 1e-3, "threshold": 6.0}, NESTEROV, rosenbrock=(0.003, 20000)),
    Case("yogi", MOMENTS, rosenbrock=(0.3, 5000)),
    Case(
        "lion",
        {"learning_rate": 0.03, "b1": 0.8, "b2": 0.95, "weight_decay": 0.02},
        bowl=(0.01, 1000),
        rosenbrock=(0.003, 5000),
    ),
    Case(
        "lamb",
        MOMENTS | {"eps_root": 1e-3, "weight_decay": 0.02},
        bowl=(0.02, 600),
        rosenbrock=(0.01, 5000),
        whole_leaf=True,
    ),
    Case(
        "lars",
        {"learning_rate": 0.3, "weight_decay": 0.02, "trust_coefficient": 0.05, "eps": 1e-2, "momentum": 0.7},
        NESTEROV,
        bowl=(1.0, 4000),
        rosenbrock=(1.0, 5000),
        whole_leaf=True,
    ),
    Case("sign_sgd", {"learning_rate": 0.03}, bowl=(0.01, 1000), rosenbrock=(0.003, 5000)),
    Case(
        "ademamix",
        MOMENTS | {"b3": 0.99, "alpha": 2.0, "eps_root": 1e-3, "weight_decay": 0.02},
        ({"b3": lambda step: 1 - 0.5 / (1 + step), "alpha": lambda step: 0.1 * step},),
        library=optax.contrib,
        numpy=numpy_ademamix,
    ),
    Case(
        "adafactor",
        {
            "learning_rate": 0.03,
            "decay_rate": 0.6,
            "decay_offset": -3,
            "clipping_threshold": 0.8,
            "momentum": 0.7,
            "weight_decay_rate": 0.001,
            "eps": 1e-6,
        },
        (
            {"multiply_by_parameter_scale": False},
            {"factored": False, "clipping_threshold": None},
            {"momentum": None, "weight_decay_rate": None},
        ),
        bowl=(0.3, 300),
        fixed={"min_dim_size_to_factor": 2, "dtype_momentum": jnp.float32},
        torch=lambda torch, params: torch.optim.Adafactor(
            params, lr=0.03, beta2_decay=-0.6, eps=(1e-20, 1e-3), d=1.2, weight_decay=0.02
        ),
        torch_settings={
            "learning_rate": 0.03,
            "decay_rate": 0.6,
            "clipping_threshold": 1.2,
            "weight_decay_rate": 0.03 * 0.02,
        },
        complex=False,  # its momentum in float32 drops the imaginary part
        float64=1e-6,  # its decay is a float32
        signed=("decay_offset",),
        rounded=("momentum",),
        apart=("weight_decay_rate",),
        whole_leaf=True,
    ),
    Case(
        "lookahead",
        {"learning_rate": 0.03, "sync_period": 4, "slow_step_size": 0.7, "momentum": 0.8},
        ({"reset_state": True},),
        numpy=numpy_lookahead,
        adapt=lookahead_around_sgd,
        rosenbrock=(0.001, 5000),
    ),
    Case(
        "muon",
        {
            "learning_rate": 0.03,
            "ns_steps": 4,
            "beta": 0.8,
            "eps": 1e-4,
            "weight_decay": 0.02,
            "adam_b1": 0.7,
            "adam_b2": 0.95,
            "adam_eps_root": 1e-3,
            "adam_weight_decay": 0.01,
            "adam_learning_rate": 0.02,
            "consistent_rms": 0.3,
        },
        (
            {"consistent_rms": None, "nesterov": False},
            {"adaptive": True},
            {"preconditioning": "spectral"},
            {"preconditioning": "aol"},
            {"preconditioning": "schatten", "ns_coeffs": "dion", "ns_steps": 5},
        ),
        library=optax.contrib,
        numpy=numpy_muon,
        torch=lambda torch, params: torch.optim.Muon(
            params, lr=0.03, weight_decay=0.02, momentum=0.8, nesterov=False, adjust_lr_fn="match_rms_adamw"
        ),
        torch_settings={
            "learning_rate": 0.03,
            "beta": 0.8,
            "weight_decay": 0.02,
            "eps": 1e-30,
            "nesterov": False,
            "consistent_rms": 0.2,
        },
        torch_leaves=("w",),
        apart=("adam_learning_rate",),
        whole_leaf=True,
    ),
    Case("signum", {"learning_rate": 0.03, "beta": 0.8}, bowl=(0.01, 1000), rosenbrock=(0.003, 5000)),
    Case("fromage", {"learning_rate": 0.03, "min_norm": 0.5}, bowl=(0.1, 600), whole_leaf=True, rate="inside"),
    Case(
        "adan",
        {"learning_rate": 0.03, "b1": 0.9, "b2": 0.8, "b3": 0.95, "eps": 1e-4, "eps_root": 1e-3, "weight_decay": 0.02},
        bowl=(1.0, 300),
    ),
    Case(
        "adopt",
        {"learning_rate": 0.03, "b1": 0.8, "b2": 0.95, "eps": 0.5},
        ({"nesterov": True}, {"use_clipping": False}),
        library=optax.contrib,
        complex=False,
        rosenbrock=(0.5, 5000),
    ),
    Case(
        "acprop",
        MOMENTS | {"eps": 1e-2, "eps_root": 1e-3, "weight_decay": 0.02},
        rosenbrock=(0.01, 5000),
        library=optax.contrib,
    ),
    Case(
        "simplified_ademamix",
        {
            "learning_rate": 0.03,
            "b1": 0.8,
            "b2": 0.9,
            "alpha": 2.0,
            "eps": 1e-4,
            "eps_root": 1e-3,
            "weight_decay": 0.02,
        },
        ({"alpha": lambda step: 0.1 * step},),
        library=optax.contrib,
        complex=False,
        bowl=(0.002, 5000),
    ),
    Case(
        "madgrad",
        {"learning_rate": 0.03, "momentum": 0.8, "weight_decay": 0.02, "eps": 1e-3},
        library=optax.contrib,
        complex=False,
        float64=1e-6,  # its square root of the step is a float32
        rate="inside",
    ),
    Case(
        "novograd",
        MOMENTS | {"eps_root": 1e-3, "weight_decay": 0.02},
        bowl=(0.03, 600),
        whole_leaf=True,
    ),
    Case(
        "sm3",
        {"learning_rate": 0.3, "momentum": 0.8},
        adapt=sm3_of_vectors,
        complex=False,
        bowl=(0.5, 600),
        rosenbrock=(1.0, 5000),
    ),
    Case(
        "rprop",
        {"learning_rate": 0.03, "eta_minus": 0.4, "eta_plus": 1.3, "min_step_size": 0.015, "max_step_size": 0.04},
        library=None,
        torch=lambda torch, params: torch.optim.Rprop(params, lr=0.03, etas=(0.4, 1.3), step_sizes=(0.015, 0.04)),
        torch_settings={
            "learning_rate": 0.03,
            "eta_minus": 0.4,
            "eta_plus": 1.3,
            "min_step_size": 0.015,
            "max_step_size": 0.04,
        },
        rate="start",
    ),
    Case("optimistic_gradient_descent", {"learning_rate": 0.03, "alpha": 0.8, "beta": 0.7}, rosenbrock=(0.001, 20000)),
    Case("optimistic_adam_v2", MOMENTS | {"eps_root": 1e-3, "alpha": 0.8, "beta": 0.7}, ({"nesterov": False},)),
    Case(
        "polyak_sgd",
        {"learning_rate": 0.8, "max_learning_rate": 0.75, "f_min": -0.4, "eps": 1e-2},
        ({"variant": "sps+"},),
        adapt=with_value("polyak_sgd", learning_rate="scaling"),
        signed=("f_min",),
        rate="inside",
        bowl=(0.5, 300),
        rosenbrock=(0.003, 5000),
        exact=False,
    ),
    Case(
        "momo",
        {"learning_rate": 0.3, "beta": 0.8, "lower_bound": -0.4, "weight_decay": 0.02},
        ({"adapt_lower_bound": True},),
        library=optax.contrib,
        adapt=with_value("momo"),
        complex=False,
        signed=("lower_bound",),
        rate="inside",
        exact=False,
    ),
    Case(
        "momo_adam",
        MOMENTS | {"learning_rate": 0.5, "lower_bound": -0.4, "weight_decay": 0.02},
        ({"adapt_lower_bound": True},),
        library=optax.contrib,
        adapt=with_value("momo_adam"),
        complex=False,
        signed=("lower_bound",),
        rate="inside",
        exact=False,
    ),
    Case(
        "dog",
        {"learning_rate": 0.7, "eps": 1e-2, "weight_decay": 0.02},
        ({"init_step": ("distance", 0.1)}, {"init_step": ("learning_rate", 0.02)}),
        library=optax.contrib,
        bowl=(3.0, 300),
        rosenbrock=(3.0, 5000),
        exact=False,
    ),
    Case(
        "dowg",
        {"learning_rate": 0.7, "init_estim_sq_dist": 0.01, "eps": 1e-2, "weight_decay": 0.02},
        library=optax.contrib,
        bowl=(1.0, 300),
        rosenbrock=(1.0, 20000),
        exact=False,
    ),
    Case(
        "prodigy",
        {"learning_rate": 0.7, "eps": 1e-2, "estim_lr0": 1e-2, "estim_lr_coef": 0.8, "weight_decay": 0.02},
        ({"safeguard_warmup": True}, {"beta3": 0.9}),
        library=optax.contrib,
        fixed={"betas": (0.8, 0.95)},
        float32=1e-5,
        complex=False,
        bowl=(1.0, 300),
        rosenbrock=(1.0, 5000),
        exact=False,
    ),
    Case(
        "dadapt_adamw",
        {"learning_rate": 0.7, "eps": 1e-2, "estim_lr0": 1e-2, "weight_decay": 0.02},
        library=optax.contrib,
        fixed={"betas": (0.8, 0.95)},
        float32=1e-5,
        complex=False,
        bowl=(1.0, 300),
        rosenbrock=(1.0, 5000),
        exact=False,
    ),
    Case(
        "cocob",
        {"learning_rate": 0.7, "alpha": 30.0, "eps": 0.5, "weight_decay": 0.02},
        library=optax.contrib,
        complex=False,
        rate="inside",
        bowl=(1.5, 300),
        rosenbrock=(1.5, 20000),
    ),
    Case(
        "schedule_free_sgd",
        {"learning_rate": 0.03, "b1": 0.8, "weight_lr_power": 1.0, "weight_decay": 0.02},
        library=optax.contrib,
        idle=("weight_lr_power",),
        bowl=(0.5, 300),
        rosenbrock=(0.003, 20000),
    ),
    Case(
        "schedule_free_adamw",
        MOMENTS | {"weight_lr_power": 1.0, "weight_decay": 0.02},
        ({"warmup_steps": 20},),
        library=optax.contrib,
        float64=1e-6,  # its warmup is a float32
        float32=5e-6,
        complex=False,
        idle=("weight_lr_power",),
        bowl=(0.5, 300),
        rosenbrock=(0.3, 5000),
        exact=False,
    ),
    Case(
        "mechanize",
        {"learning_rate": 0.7, "weight_decay": 0.02, "eps": 1e-3, "s_init": 1e-2},
        library=optax.contrib,
        adapt=mechanized_sgd,
        complex=False,
        rate="inside",
        bowl=(10.0, 10000),
        rosenbrock=(10.0, 20000),
        exact=False,
    ),
    Case(
        "normuon",
        {
            "learning_rate": 0.03,
            "ns_steps": 4,
            "beta": 0.8,
            "neuron_b2": 0.9,
            "eps": 1e-4,
            "weight_decay": 0.02,
            "adam_b1": 0.7,
            "adam_b2": 0.95,
            "adam_eps_root": 1e-3,
            "adam_weight_decay": 0.01,
            "adam_learning_rate": 0.02,
        },
        fixed={"ns_coeffs": "standard"},
        library=None,
        numpy=numpy_normuon,
        apart=("adam_learning_rate",),
        whole_leaf=True,
    ),
    Case(
        "soap",
        {**MOMENTS, "b2": 0.9, "shampoo_beta": 0.9, "weight_decay": 0.02, "precondition_every": 2},
        fixed={"max_precondition_size": 100},
        library=None,
        numpy=numpy_soap,
        whole_leaf=True,
        float32=2e-5,
        constant=True,
    ),
    Case(
        "shampoo",
        {**MOMENTS, "shampoo_beta": 0.9, "ridge": 1e-2, "weight_decay": 0.02, "precondition_every": 2},
        fixed={"max_precondition_size": 100},
        library=None,
        numpy=numpy_shampoo,
        whole_leaf=True,
        float32=2e-4,
        constant=True,
    ),
    Case(
        "adamuon",
        {
            "learning_rate": 0.03,
            "beta": 0.8,
            "b2": 0.9,
            "eps": 1e-4,
            "weight_decay": 0.02,
            "adam_b1": 0.7,
            "adam_b2": 0.95,
            "adam_weight_decay": 0.01,
            "adam_learning_rate": 0.02,
        },
        fixed={"ns_steps": 4},
        library=None,
        numpy=numpy_adamuon,
        apart=("adam_learning_rate",),
        whole_leaf=True,
    ),
    Case(
        "adam_mini",
        {**MOMENTS, "weight_decay": 0.02},
        library=None,
        numpy=numpy_adam_mini,
        whole_leaf=True,
    ),
    Case("qhadam", MOMENTS | {"nu1": 0.6, "nu2": 0.8, "weight_decay": 0.02}, library=None, numpy=numpy_qhadam),
    Case(
        "dion",
        {
            "learning_rate": 0.03,
            "beta": 0.8,
            "eps": 1e-4,
            "weight_decay": 0.02,
            "adam_b1": 0.7,
            "adam_b2": 0.95,
            "adam_weight_decay": 0.01,
            "adam_learning_rate": 0.02,
        },
        fixed={"rank_fraction": 0.5},
        library=None,
        numpy=numpy_dion,
        apart=("adam_learning_rate",),
        whole_leaf=True,
        constant=True,
    ),
    Case(
        "galore",
        {"learning_rate": 0.03, "update_proj_gap": 3, "scale": 0.8, "weight_decay": 0.02},
        ({"base_optimizer": optax.scale_by_rms()},),
        fixed={"rank": 2},
        library=optax.contrib,
        numpy=numpy_galore,
        complex=False,
        signed=("scale",),
        whole_leaf=True,
        float32=2e-5,
        float64=1e-3,  # its projectors are float32
        constant=True,
    ),
    Case(
        "apollo",
        MOMENTS | {"update_proj_gap": 3, "scale": 0.8, "weight_decay": 0.02, "growth": 1.2},
        ({"per_channel": False},),
        fixed={"rank": 2},
        library=None,
        numpy=numpy_apollo,
        whole_leaf=True,
        float32=2e-5,
    ),
    Case(
        "kron",
        {
            "learning_rate": 0.03,
            "b1": 0.8,
            "weight_decay": 0.02,
            "preconditioner_update_probability": 0.6,
            "preconditioner_lr": 0.2,
            "preconditioner_init_scale": 0.7,
        },
        fixed={"max_size_triangular": 3},
        library=None,
        numpy=numpy_kron,
        float64=1e-8,  # its noise is float32, and rounds otherwise outside of a compiled program
        whole_leaf=True,
        float32=2e-5,
        constant=True,
    ),
    Case(
        "ema_nesterov",
        {"learning_rate": 0.03, "lookahead": 0.7, "decay": 0.8, "momentum": 0.6},
        library=None,
        numpy=numpy_ema_nesterov,
        adapt=ahead_of_sgd,
        rosenbrock=(0.001, 20000),
    ),
    Case(
        "sophia",
        {**MOMENTS, "eps": 0.04, "weight_decay": 0.02, "gamma": 0.5, "clip_threshold": 0.8, "update_interval": 3},
        ({"clip_threshold": None},),
        library=optax.contrib,
        adapt=lambda library: in_our_words(library.sophia, (("print_win_rate_every_n_steps", 0),), value_of="obj_fn"),
        complex=False,
        bowl=(0.02, 2000),
        rosenbrock=(0.01, 5000),
    ),
    Case(
        "sam",
        {"learning_rate": 0.03, "rho": 0.1, "momentum": 0.8, "sync_period": 4},
        ({"sync_period": 2, "reset_state": False},),
        library=optax.contrib,
        adapt=sam_of_sgd,
        rate="inside",
        bowl=(0.01, 300),
        rosenbrock=(0.0003, 20000),
        exact=False,
    ),
]

EVERYDAY = ("sgd", "adam", "adamw", "lion", "rmsprop")  # their long runs are compared in every gate

IN_A_LIBRARY = [case for case in CASES if hasattr(case.library, case.name)]
IN_OPTAX = [case for case in IN_A_LIBRARY if case.library is optax and not (case.adapt and case.name != "lookahead")]
BY_NAME = {case.name: case for case in CASES}
STEPS = 200


def make_params(dtype=jnp.float32):
    """A small tree: matrix, vector, scalar."""
    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(4, 3)), "b": random.normal(size=3), "s": np.array(0.7)}
    if jnp.issubdtype(dtype, jnp.complexfloating):
        params = {name: value + 1j * random.normal(size=np.shape(value)) for name, value in params.items()}
    return {name: jnp.asarray(value, dtype) for name, value in params.items()}


def make_noise(steps, dtype=jnp.float32):
    """Gradient noise for every step, stacked; it keeps moments away from trivial values."""
    random = np.random.default_rng(1)

    def like(param):
        noise = random.normal(size=(steps, *param.shape))
        if jnp.issubdtype(dtype, jnp.complexfloating):
            noise = noise + 1j * random.normal(size=noise.shape)
        return jnp.asarray(0.3 * noise, dtype)

    return jax.tree.map(like, make_params(dtype))


def gradient(params, noise):
    """Of a bowl with a minimum at 0.5, plus noise."""
    return jax.tree.map(lambda p, n: (p - jnp.asarray(0.5, p.dtype)).astype(n.dtype) + n, params, noise)


def run(tx, params, noise):
    """As many steps as there is noise, in one scan: final parameters and state."""

    def step(carry, noise):
        params, state = carry
        updates, state = tx.update(gradient(params, noise), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), noise)[0]


def named_states(state):
    """The arrays of a state by name: counts, moments and traces, wherever they stand."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        names = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)]
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if names:
            found[tuple([names[-1], *keys])] = leaf
    return found


def relative_error(ours, theirs):
    """Largest difference of two arrays, in units of the largest number of the second."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if np.iscomplexobj(theirs) and not np.iscomplexobj(ours):
        assert np.all(theirs.imag == 0)  # optax keeps a mean of squares as a complex number
        theirs = theirs.real
    scale = max(np.max(np.abs(theirs), initial=0.0), 1e-30)
    return float(np.max(np.abs(ours.astype(complex) - theirs.astype(complex)), initial=0.0) / scale)
