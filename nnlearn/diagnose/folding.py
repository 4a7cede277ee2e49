"""Standardised inputs or targets, folded into the weights of the first or last layer.

A run that is trained on standardised inputs has other parameters than its own evaluation expects. If the network starts
with a product ``x @ w + b``, then ``w / size`` and ``b - (shift / size) @ w`` give the same outputs for raw inputs.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.types import Params, PyTree

Fold = Callable[[Params], Params]
Network = Callable[[Params, PyTree], jax.Array]


def fold_inputs(raw: Network, params: Params, inputs: np.ndarray, shift: np.ndarray, size: np.ndarray) -> Fold | None:
    """The function of parameters for which ``raw(fold(params), x)`` is ``raw(params, (x - shift) / size)``.

    Args:
      raw: the network.
      params: any parameters, which say where matrices and biases are.
      inputs: some inputs, shape (n, ...).
      shift, size: of the inputs' last axis, or of every input.

    Returns:
      The function, checked on the inputs, or None if no pair of a matrix and a bias does it.

    >>> network = lambda params, x: jnp.tanh(x @ params["w"] + params["b"][None])
    >>> params = {"b": jnp.zeros(3), "w": jnp.ones((2, 3))}
    >>> fold = fold_inputs(network, params, np.eye(2, dtype=np.float32), np.ones(2), np.full(2, 4.0))
    >>> fold(params)
    {'b': Array([-0.5, -0.5, -0.5], dtype=float32), 'w': Array([[0.25, 0.25, 0.25], [0.25, 0.25, 0.25]], dtype=float32)}
    """
    units = [np.broadcast_to(each, inputs.shape[1:]).reshape(-1) for each in (shift, size)]
    scales = {len(each[0]): each for each in ([np.ravel(shift), np.ravel(size)], units)}
    wanted = lambda params: raw(params, jnp.asarray((inputs - shift) / size, inputs.dtype))  # noqa: E731
    candidates = (each for length, (by, to) in scales.items() for each in _first_layers(params, by, to, length))
    return _first_that_fits(candidates, lambda params: raw(params, inputs), wanted, params)


def fold_outputs(raw: Network, params: Params, inputs: PyTree, shift: np.ndarray, size: np.ndarray) -> Fold | None:
    """The function of parameters for which ``raw(fold(params), x)`` is ``raw(params, x) * size + shift``.

    Args:
      raw, params, inputs: as for ``fold_inputs``.
      shift, size: of the outputs, one number or one for each.

    Returns:
      The function, checked on the inputs, or None.
    """

    def wanted(params):
        outputs = raw(params, inputs)
        return outputs * jnp.reshape(size, outputs.shape[1:]) + jnp.reshape(shift, outputs.shape[1:])

    return _first_that_fits(
        _last_layers(params, np.ravel(shift), np.ravel(size)), lambda params: raw(params, inputs), wanted, params
    )


def _first_that_fits(
    candidates: Iterator[Fold],
    given: Callable[[Params], jax.Array],
    wanted: Callable[[Params], jax.Array],
    params: Params,
) -> Fold | None:
    """The first candidate whose outputs are the wanted ones, for parameters that are neither zero nor equal."""
    random = np.random.default_rng(0)
    general = jax.tree.map(lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape).astype(leaf.dtype), params)
    goal = np.asarray(wanted(general), np.float64)
    scale = np.abs(goal).max() + 1e-30
    for fold in candidates:
        if np.abs(np.asarray(given(fold(general)), np.float64) - goal).max() < 1e-3 * scale:
            return fold
    return None


def _first_layers(params: Params, shift: np.ndarray, size: np.ndarray, length: int) -> Iterator[Fold]:
    """Folds into every leaf with an axis of this length, and every vector that may be its bias."""
    leaves = jax.tree.leaves(params)
    for at, leaf in enumerate(leaves):
        for axis in [axis for axis in range(leaf.ndim) if leaf.ndim >= 2 and leaf.shape[axis] == length]:
            if not np.any(shift):
                yield _changed({at: lambda w, axis=axis: w / _along(size, axis, w.ndim)})
                continue
            for output in [output for output in range(leaf.ndim) if output != axis]:
                for bias, vector in enumerate(leaves):
                    if vector.ndim == 1 and vector.size == leaf.shape[output]:
                        yield _first_layer(at, axis, output, bias, shift, size)


def _first_layer(at: int, axis: int, output: int, bias: int, shift: np.ndarray, size: np.ndarray) -> Fold:
    def fold(params):
        leaves, treedef = jax.tree.flatten(params)
        weights = leaves[at] / _along(size, axis, leaves[at].ndim)
        others = tuple(each for each in range(weights.ndim) if each != output)
        moved = leaves[bias] - jnp.sum(weights * _along(shift, axis, weights.ndim), others)
        leaves[bias], leaves[at] = moved.astype(leaves[bias].dtype), weights.astype(leaves[at].dtype)
        return jax.tree.unflatten(treedef, leaves)

    return fold


def _last_layers(params: Params, shift: np.ndarray, size: np.ndarray) -> Iterator[Fold]:
    """Folds into every leaf with an axis of the outputs, and every bias of as many numbers."""
    leaves = jax.tree.leaves(params)
    for at, leaf in enumerate(leaves):
        axes = [axis for axis in range(leaf.ndim) if leaf.shape[axis] == size.size]
        for axis in axes or ([None] if size.size == 1 and leaf.ndim else []):
            for bias, vector in enumerate(leaves):
                if vector.size != size.size or bias == at:
                    continue
                scaled = lambda w, axis=axis: w * (size[0] if axis is None else _along(size, axis, w.ndim))  # noqa: E731
                yield _changed({at: scaled, bias: lambda b: b * size.reshape(b.shape) + shift.reshape(b.shape)})


def _changed(changes: dict[int, Callable[[jax.Array], jax.Array]]) -> Fold:
    """The function that changes the leaves at these places."""

    def fold(params):
        leaves, treedef = jax.tree.flatten(params)
        leaves = [changes[at](leaf).astype(leaf.dtype) if at in changes else leaf for at, leaf in enumerate(leaves)]
        return jax.tree.unflatten(treedef, leaves)

    return fold


def _along(values: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """Values along one axis of an array with ``ndim`` axes."""
    return values.reshape([-1 if each == axis else 1 for each in range(ndim)])


__all__ = ["fold_inputs", "fold_outputs"]
