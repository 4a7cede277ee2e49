"""Rules that look at a finished run, to compare the diagnosis with.

``loss_fell`` is the simplest rule: the loss must end below 0.9 of its start. ``autotrainer`` follows Zhang et al. 2021,
"AutoTrainer: An Automatic DNN Training Problem Detection and Repair System" (ICSE), with the default thresholds of the
authors' program: it was made for classification, so for regression the share of explained variance takes the place of
the accuracy.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.faults.case import Case

SATISFIED = 0.7  # Theta: an accuracy below it is "not converged"
RATIO_LOW, NORM_LOW = 1e-3, 1e-4  # beta 1 and 2: first over last kernel's gradient norm, and the first one itself
RATIO_HIGH = 70.0  # beta 3
ZEROS = 0.7  # gamma: share of gradient entries that are exactly zero
SWING, SWINGS = 0.03, 0.2  # zeta and eta: size and share of the accuracy's up and downs
GAIN = 0.01  # delta: the largest gain of accuracy between two checks of a run that converges too slowly
LATE = 0.3  # the share of the run after which the accuracy is judged


def first_batch(case: Case) -> Any:
    """The first batch of a run."""
    batches, key = case.train.batches, jax.random.key(0)
    _, rows = batches.rows(key, batches.start(key, 1), 0, 1, 1)
    return batches.batch(jax.tree.map(lambda array: array[0], rows))


def record(case: Case, scale: float | None):
    """A function of a key that makes the run and returns what the rules need."""
    batch = first_batch(case)

    def gradients(params, key):
        def loss(params):
            value = case.train.loss_fn(params, batch, key)
            return value[0] if isinstance(value, tuple) else value

        grads = [g for g in jax.tree.leaves(jax.grad(loss)(params)) if g.ndim > 1]
        norms = jnp.stack([jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32)))) for g in grads])
        return {
            "first": norms[0],
            "last": norms[-1],
            "zeros": sum(jnp.sum(g == 0) for g in grads) / sum(g.size for g in grads),
            "finite": jnp.all(jnp.isfinite(norms)),
        }

    def run(key):
        state, trace = case.train(case.hparams, key)
        start = case.train.start(case.hparams, key).state
        metric = trace.metrics[case.metric]
        return {
            "loss": trace.loss,
            "accuracy": metric if scale is None else 1 - metric / scale,
            "start": gradients(start.params, key),
            "end": gradients(state.params, key),
            "weights_finite": jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(state.params)])),
        }

    return jax.jit(run)


def loss_fell(found: dict) -> list[str]:
    loss = np.asarray(found["loss"], np.float64)
    fell = np.isfinite(loss).all() and loss[-10:].mean() < 0.9 * loss[:3].mean()
    return [] if fell else ["not_learning"]


def autotrainer(found: dict) -> list[str]:
    """The problems that AutoTrainer's rules see, in the words of the list of findings."""
    accuracy = np.asarray(found["accuracy"], np.float64)
    moments = (found["start"], found["end"])
    finite = all(bool(m["finite"]) for m in moments) and bool(found["weights_finite"])
    if not (finite and np.isfinite(found["loss"]).all()):
        return ["exploding_gradients"]
    late = accuracy[int(LATE * len(accuracy)) :]
    slow = len(accuracy) > 1 and np.diff(accuracy).max() < GAIN
    if late.max() < SATISFIED or slow:
        ratios = [float(m["first"]) / max(float(m["last"]), 1e-30) for m in moments]
        if any(float(m["zeros"]) >= ZEROS for m in moments):
            return ["dead_units"]
        if any(ratio > RATIO_HIGH for ratio in ratios):
            return ["exploding_gradients"]
        if any(ratio < RATIO_LOW and float(m["first"]) < NORM_LOW for ratio, m in zip(ratios, moments, strict=True)):
            return ["vanishing_gradients"]
        return ["learning_rate_too_low"] if slow else []
    return ["learning_rate_too_high"] if _swings(accuracy) else []


def _swings(accuracy: np.ndarray) -> bool:
    before, here, after = accuracy[:-2], accuracy[1:-1], accuracy[2:]
    tops, valleys = here[(here >= before) & (here >= after)], here[(here <= before) & (here <= after)]
    pairs = min(len(tops), len(valleys))
    return int(np.sum(tops[:pairs] - valleys[:pairs] >= SWING)) >= SWINGS * len(accuracy)
