"""Rules for leaves that are matrices: a pull towards orthogonality, and steps by width."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_nonnegative
from nnlearn.settings import comparable
from nnlearn.transforms.plumbing import from_leaf_kernel
from nnlearn.transforms.wrapping import by_leaf, from_map
from nnlearn.tree import path_name
from nnlearn.types import GradientTransformationExtraArgs, PyTree, Scalar


def orthogonal_pull_kernel(update, param, *, strength):
    r"""Add the gradient of :math:`\frac{\lambda}{4} \|W^\top W - I\|_F^2` (Brock et al. 2017, arXiv:1609.07093).

    .. math:: u \leftarrow u + \lambda W (W^\top W - I)

    of the smaller Gram matrix, :math:`W W^\top` of a wide one. A leaf of more than two axes is a matrix of its last
    axis and all others. Returns the update.
    """
    if param.ndim < 2:
        return update
    w = param.reshape(-1, param.shape[-1])
    w = w if w.shape[0] >= w.shape[1] else w.T
    pull = w @ (jnp.conj(w).T @ w - jnp.eye(w.shape[1], dtype=w.dtype))
    pull = pull if param.size // param.shape[-1] >= param.shape[-1] else pull.T
    return update + strength * pull.reshape(param.shape)


@comparable
def add_orthogonal_pull(strength: Scalar) -> GradientTransformationExtraArgs:
    r"""Pull matrices towards orthogonal ones, see ``orthogonal_pull_kernel``; other leaves pass.

    Before an adaptive optimizer it is a regulariser, after it, and before the learning rate, it is decoupled as weight
    decay is. Put ``masked`` around it to choose leaves.

    Args:
      strength: :math:`\lambda >= 0`.

    Raises:
      ValueError: if ``strength`` is negative; in ``update``, if there are no parameters.

    >>> tx, w = add_orthogonal_pull(0.5), 2 * jnp.eye(2)
    >>> tx.update(jnp.zeros((2, 2)), tx.init(w), w)[0]
    Array([[3., 0.],
           [0., 3.]], dtype=float32)
    """
    check_nonnegative("strength", strength)
    return from_leaf_kernel(
        orthogonal_pull_kernel, {"strength": strength}, needs_params="add_orthogonal_pull", whole_leaf=True
    )


def inputs_of(shape: tuple[int, ...]) -> int:
    """The number of inputs of a matrix, of a stack of matrices with three axes, or of a convolution kernel."""
    return shape[1] if len(shape) == 3 else math.prod(shape[:-1])


@comparable
def scale_by_width(base: PyTree) -> GradientTransformationExtraArgs:
    r"""Scale Adam's update of each matrix by :math:`n_0 / n`, the inputs in a small model over those in this one.

    With it the best learning rate of the small model is that of wider ones, if matrices start with the variance
    :math:`1/n` and the output layer with :math:`1/n^2` or zero (muP: Yang et al. 2022, arXiv:2203.03466, table 8). Put
    it after an optimizer whose steps do not depend on the size of gradients, before weight decay. Vectors, and matrices
    whose inputs do not grow, such as embeddings, pass.

    Args:
      base: the parameters of the small model, or their shapes, as ``jax.eval_shape`` gives them.

    Raises:
      ValueError: in ``update``, if ``base`` has another structure or a leaf with another number of axes.

    >>> tx = scale_by_width({"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)})
    >>> wide = {"w": jnp.ones((256, 10)), "b": jnp.ones(10)}
    >>> updates, _ = tx.update(wide, tx.init(wide))
    >>> updates["w"][0, 0], updates["b"][0]
    (Array(0.25, dtype=float32), Array(1., dtype=float32))
    """
    shapes = {path_name(path): tuple(np.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(base)}

    def on_leaf(path, update):
        name = path_name(path)
        if name not in shapes or len(shapes[name]) != jnp.ndim(update):
            raise ValueError(f"base has no leaf {name!r} of {jnp.ndim(update)} axes: {shapes.get(name)}")
        if jnp.ndim(update) < 2:
            return update
        return update * jnp.asarray(inputs_of(shapes[name]) / inputs_of(jnp.shape(update)), update.dtype)

    return by_leaf(from_map(lambda updates, params: jax.tree.map_with_path(on_leaf, updates)))


__all__ = ["add_orthogonal_pull", "inputs_of", "orthogonal_pull_kernel", "scale_by_width"]
