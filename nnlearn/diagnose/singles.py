"""Checks of single examples: whether each of them has a gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.gains import poor
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.plan import quick
from nnlearn.diagnose.report import found
from nnlearn.diagnose.subject import params_of
from nnlearn.tree import global_norm

EXAMPLES = 32
LARGEST = 4_000_000  # numbers of the gradients of all examples
TIMES = (0, -2, -1)  # snapshots
MANY = 0.5  # share of examples without a gradient


@check("every example has a gradient")
def gradients(evidence: Evidence) -> Seen:
    """Losses of examples that are not 0 and do not change with the parameters, as after a clip or a minimum."""
    losses, norms, agrees = singles(evidence)
    blocked = norms <= 1e-9 * np.maximum(norms.max(1, keepdims=True), 1e-30)
    blocked &= losses > 1e-3 * np.abs(losses).max(1, keepdims=True)  # those without a loss need none
    at = int(np.argmax(blocked.mean(1)))
    share, step = float(np.mean(blocked[at])), int(evidence.run.at[TIMES[at]])
    values = {
        "share without a gradient": share,
        "their loss": float(np.mean(losses[at][blocked[at]])) if share else 0.0,
    }
    rule = f"below {MANY:.0%} of the examples at any time, or a loss of 0, or the run fits"
    if not agrees or share < MANY or not poor(evidence):
        return Seen(values, rule)
    text = (
        f"At step {step} {share:.0%} of the examples have no gradient, although their loss is "
        f"{values['their loss']:.3g}: a clip, a minimum or a comparison in the loss cuts it."
    )
    remedy = "clip the gradient, not the error; for outliers take optax.huber_loss"
    finding = found("blocked_gradient", text, values, strength=0.8, where="loss", step=step, remedies=[remedy])
    return Seen(values, rule, [finding])


def singles(evidence: Evidence) -> tuple[np.ndarray, np.ndarray, bool]:
    """Loss and gradient norm of single examples at the start, near the end and at the end, shape (times, examples).

    The third result is whether the mean of their gradients is that of the batch, at the start.

    Raises:
      Unknown: if the batches have no axis of examples, or the network is large.
    """
    subject = evidence.subject
    subject.need_loss()
    batch, states = subject.plan.batch(subject.plan.at(0)), evidence.run.states
    states = jax.tree.map(lambda leaf: leaf[np.array(TIMES)], states)
    leaves = jax.tree.leaves(batch)
    size = leaves[0].shape[0] if leaves and leaves[0].ndim else 0
    if size < 4 or any(not leaf.ndim or leaf.shape[0] != size for leaf in leaves):
        raise Unknown("the batches have no axis of at least four examples")
    count = min(size, EXAMPLES)
    if count * sum(leaf[0].size for leaf in jax.tree.leaves(params_of(states))) > LARGEST:
        raise Unknown("the network is large")
    key = subject.as_key(subject.keys[0])

    @functools.partial(jax.jit, compiler_options=quick())
    def both(states: Any, batch: Any):
        return jax.lax.map(lambda state: at_one(params_of(state), batch, state.model_state), states)

    def at_one(params: Any, batch: Any, model_state: Any):
        slope = jax.value_and_grad(subject.loss)
        some = jax.tree.map(lambda leaf: leaf[:count], batch)
        ones = jax.tree.map(lambda leaf: leaf[:, None], some)
        losses, grads = jax.vmap(lambda one: slope(params, one, key, model_state))(ones)
        _, whole = slope(params, some, key, model_state)
        apart = global_norm(jax.tree.map(lambda each, mean: jnp.mean(each, 0) - mean, grads, whole))
        return losses, jax.vmap(global_norm)(grads), apart, global_norm(whole)

    losses, norms, apart, whole = (np.asarray(each, np.float64) for each in both(states, batch))
    agrees = bool(np.isfinite(norms).all() and apart[0] <= 0.05 * whole[0] + 1e-9)
    return losses, norms, agrees


CHECKS: tuple[NamedCheck, ...] = (gradients,)
