"""Precision between the links of a chain: wide arithmetic inside, and a master copy of low-precision parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax import chain, with_extra_args_support

from nnlearn.checks import check_dtype
from nnlearn.transforms.wrapping import require_params
from nnlearn.tree import compute_dtype, matching, widest
from nnlearn.types import (
    DTypeLike,
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Params,
    Updates,
)


class MasterParamsState(NamedTuple):
    """State of an optimizer with a master copy.

    Attributes:
      master: the parameters in the precision that training happens in.
      inner_state: the state of the optimizer that moves them.
    """

    master: Params
    inner_state: OptState


def _widen(tree: Updates) -> Updates:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(compute_dtype(jnp.result_type(leaf))), tree)


def _computed_wide(inner: GradientTransformationExtraArgs) -> GradientTransformationExtraArgs:
    """Gradients widened on the way in, updates rounded on the way out to the wider of gradient and parameter."""

    def update(updates, state, params=None, **extra_args):
        params = None if params is None else matching(params, updates)
        change, state = inner.update(_widen(updates), state, params, **extra_args)
        like = (updates,) if params is None else (updates, params)

        def narrow(wide, *given):
            return wide.astype(widest(*(jnp.result_type(array) for array in given)))

        return jax.tree.map(narrow, change, *like), state

    return GradientTransformationExtraArgs(inner.init, update)


def _with_master(inner: GradientTransformationExtraArgs, dtype) -> GradientTransformationExtraArgs:
    """``inner`` moves a copy of the parameters in ``dtype``; the update takes the parameters to the copy, rounded."""

    def to_master(param):
        complex_param = jnp.issubdtype(jnp.result_type(param), jnp.complexfloating)
        return jnp.array(param, widest(dtype, jnp.complex64) if complex_param else dtype)  # never an alias

    def init(params):
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            raise TypeError("master_dtype needs the parameters' values: call init with arrays, or under jax.eval_shape")
        master = jax.tree.map(to_master, params)
        return MasterParamsState(master, inner.init(master))

    def update(updates, state, params=None, **extra_args):
        require_params(params, "an optimizer with master_dtype")
        params = jax.tree.map(jnp.asarray, matching(params, state.master))
        # What is not the master's image was changed from outside, and is the truth now.
        current = jax.tree.map(
            lambda master, param: jnp.where(master.astype(param.dtype) == param, master, param.astype(master.dtype)),
            state.master,
            params,
        )
        change, inner_state = inner.update(_widen(updates), state.inner_state, current, **extra_args)
        master = jax.tree.map(lambda old, delta: (old + delta).astype(old.dtype), current, change)
        # params + (master - params) is master again: the difference of close numbers is exact
        change = jax.tree.map(lambda new, param: new - param.astype(new.dtype), master, params)
        return change, MasterParamsState(master, inner_state)

    return GradientTransformationExtraArgs(init, update)


def assemble(
    *transforms: GradientTransformation, master_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    """An optimizer from a chain of transformations, with the precision that training needs.

    Between the links updates are float32 or better; what comes out has the wider dtype of gradient and parameter. So
    bfloat16 and float16 lose nothing inside, and the optimizer still fits wherever optax expects updates shaped like
    gradients.

    Args:
      *transforms: what ``optax.chain`` takes.
      master_dtype: keep the parameters in this dtype in the state, and let ``params`` be their rounded image. Without
        it a bfloat16 weight of 1.0 does not feel a step below 0.004; float32 is the usual choice. Let nothing follow
        in a chain: what scales or drops the update afterwards parts the parameters from their copy. A weight that
        something else has changed between updates, beyond its rounding, is taken up from there.

    Raises:
      TypeError: ``master_dtype`` is no floating dtype.

    >>> import nnlearn
    >>> tx = assemble(nnlearn.trace(0.9), nnlearn.scale(-1e-3), master_dtype=jnp.float32)
    >>> params = jnp.ones(1, jnp.bfloat16)
    >>> state = tx.init(params)
    >>> for _ in range(20):
    ...     updates, state = tx.update(jnp.ones(1, jnp.bfloat16), state, params)
    ...     params = nnlearn.apply_updates(params, updates)
    >>> params, state.master.round(3)
    (Array([0.878906], dtype=bfloat16), Array([0.879], dtype=float32))
    """
    master_dtype = check_dtype("master_dtype", master_dtype)
    inner = chain(*transforms) if len(transforms) != 1 else with_extra_args_support(transforms[0])
    return _computed_wide(inner) if master_dtype is None else _with_master(inner, master_dtype)


__all__ = ["MasterParamsState", "assemble"]
