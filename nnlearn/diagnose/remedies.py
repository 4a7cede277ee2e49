"""Changes of a run that can be tried automatically. Each makes another run of the same parts, from one number."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax import GradientTransformation, chain, with_extra_args_support

from nnlearn.calls import hand
from nnlearn.data import MaskedBatch, example_count
from nnlearn.diagnose.folding import Fold, fold_inputs, fold_outputs
from nnlearn.diagnose.parts import Unknown, map_parts
from nnlearn.diagnose.subject import Subject, params_of
from nnlearn.diagnose.variants import rescaled, with_decay
from nnlearn.optimizers import adamw
from nnlearn.schedules import warmup_cosine_decay_schedule
from nnlearn.settings import Made
from nnlearn.train.evaluation import evaluation
from nnlearn.train.run import Train, made_tx
from nnlearn.train.sampler import shuffled
from nnlearn.train.stopping import keep_best
from nnlearn.transforms import clip_by_global_norm, scale
from nnlearn.tree import is_function
from nnlearn.types import PyTree

RATES = ("learning_rate", "lr", "rate", "step_size")


class Changed(NamedTuple):
    """A changed run: what replaces ``train``, ``hparams`` and ``predict``."""

    train: Train
    hparams: PyTree
    predict: Callable[..., Any] | None


class Remedy(NamedTuple):
    """A change that can be tried.

    Attributes:
      name: what is changed.
      line: the change of the code in words, with ``{value}``.
      values: the numbers to try; they are tried side by side in one vmapped program unless ``apart``.
      make: ``make(subject, value) -> Changed``.
      apart: whether each number needs its own program, because it changes shapes or ``make`` looks at arrays.
    """

    name: str
    line: str
    values: tuple[float, ...]
    make: Callable[[Subject, Any], Changed]
    apart: bool = False


def with_tx(subject: Subject, change: Callable[[Any], GradientTransformation]) -> Changed:
    """The run with its optimizer changed."""
    subject.need_loss()
    make = subject.train.make_tx
    train = dataclasses.replace(subject.train, make_tx=lambda hparams: change(made_tx(make, hparams)))
    return Changed(train, subject.hparams, subject.predict)


def rate_name(hparams: PyTree) -> str | None:
    """The name of the learning rate among the hyper-parameters, if there is exactly one.

    >>> rate_name({"learning_rate": 0.1, "depth": 2}), rate_name({"x": 1.0})
    ('learning_rate', None)
    """
    names = [name for name in RATES if isinstance(hparams, Mapping) and name in hparams]
    return names[0] if len(names) == 1 and np.ndim(hparams[names[0]]) == 0 else None


def rate(subject: Subject, factor: Any) -> Changed:
    name = rate_name(subject.hparams)
    if name is None:
        return with_tx(subject, lambda tx: chain(tx, scale(factor)))
    hparams = type(subject.hparams)(subject.hparams | {name: subject.hparams[name] * factor})
    return Changed(subject.train, hparams, subject.predict)


def clipping(subject: Subject, norm: Any) -> Changed:
    return with_tx(subject, lambda tx: chain(clip_by_global_norm(norm), tx))


def opposite(subject: Subject, _: Any) -> Changed:
    return with_tx(subject, lambda tx: chain(tx, scale(-1.0)))


def new_optimizer(subject: Subject, peak: Any) -> Changed:
    steps = subject.steps
    schedule = warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 20), max(2, steps))
    return with_tx(subject, lambda _: chain(clip_by_global_norm(1.0), adamw(schedule, weight_decay=0.0)))


def no_decay(subject: Subject, _: Any) -> Changed:
    return with_tx(subject, lambda tx: with_decay(with_extra_args_support(tx), 0.0))


def initial_scale(subject: Subject, gain: Any) -> Changed:
    """Matrices drawn with variance ``gain / inputs``; vectors start as they are."""
    init = subject.train.init

    def scaled(key, hparams):
        params = hand(init, key, hparams=hparams) if is_function(init) else init
        return rescaled(params, key, gain)

    return Changed(dataclasses.replace(subject.train, init=scaled), subject.hparams, subject.predict)


def zero_biases(subject: Subject, gain: Any) -> Changed:
    """As ``initial_scale``, and vectors of negative mean start at 0, so that rectified units are on."""
    changed = initial_scale(subject, gain)
    init = changed.train.init

    def centred(key, hparams):
        params = init(key, hparams=hparams)
        return jax.tree.map(lambda leaf: jnp.where(jnp.mean(leaf) < 0, 0, leaf) if leaf.ndim == 1 else leaf, params)

    return changed._replace(train=dataclasses.replace(changed.train, init=centred))


def float32_parameters(subject: Subject, _: Any) -> Changed:
    init = subject.train.init

    def wide(key, hparams):
        params = hand(init, key, hparams=hparams) if is_function(init) else init
        return jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params
        )

    return Changed(dataclasses.replace(subject.train, init=wide), subject.hparams, subject.predict)


def more_steps(subject: Subject, factor: Any) -> Changed:
    train = dataclasses.replace(subject.train, steps=int(subject.steps * factor))
    return Changed(train, subject.hparams, subject.predict)


def shuffling(subject: Subject, _: Any) -> Changed:
    return _with_batches(subject, None)


def larger_batches(subject: Subject, factor: Any) -> Changed:
    return _with_batches(subject, int(factor))


def _with_batches(subject: Subject, factor: int | None) -> Changed:
    batches = subject.train.batches
    if batches.examples is None:
        raise Unknown("the batches are generated")
    first = subject.plan.batches([0])
    masked, examples = isinstance(first, MaskedBatch), batches.examples()
    size = jax.tree.leaves(first)[0].shape[1] * (factor or 1)
    sampler = shuffled(examples, min(size, example_count(examples)), remainder="mask" if masked else "drop")
    return Changed(dataclasses.replace(subject.train, batches=sampler), subject.hparams, subject.predict)


def early_stopping(subject: Subject, _: Any) -> Changed:
    if subject.train.evaluate is None or subject.metric is None:
        raise Unknown("the run has no evaluate, or no metric was given")
    stop = subject.train.stop
    rules = stop if isinstance(stop, tuple | list) else (stop,)
    train = dataclasses.replace(subject.train, stop=(*rules, keep_best(subject.metric, mode=subject.mode)))
    return Changed(train, subject.hparams, subject.predict)


def unit_inputs(subject: Subject, _: Any) -> Changed:
    """Standardised inputs in the loss, in ``predict`` and in the evaluation.

    Where the shift does not fit into the first layer, as in a convolution with padding, inputs are only scaled.
    """
    leaves = jax.tree.leaves(subject.inputs)
    if len(leaves) != 1 or np.asarray(leaves[0]).dtype.kind != "f":
        raise Unknown("the inputs are not one array of floating numbers")
    values = np.asarray(leaves[0], np.float64)
    axes = 0 if values.ndim == 2 else tuple(range(values.ndim - 1))  # per channel
    mean, spread = values.mean(axes), values.std(axes)
    floor = 0.1 * np.median(spread[spread > 0]) if np.any(spread > 0) else 1.0
    shift, size = mean.astype(np.float32), np.maximum(spread, floor).astype(np.float32)

    def moved(shift, size):
        def unit(inputs):
            return jax.tree.map(lambda leaf: ((leaf - shift) / size).astype(jnp.result_type(leaf)), inputs)

        fold = _fold(subject, lambda network, params, few: fold_inputs(network, params, few, shift, size))
        return fold, _transformed(subject, inputs=unit, fold=fold)

    fold, changed = moved(shift, size)
    if fold is None:
        largest = np.full_like(size, np.sqrt(np.mean(values**2)))
        fold, scaled = moved(np.zeros_like(shift), largest)
        changed = changed if fold is None else scaled
    return changed


def unit_targets(subject: Subject, _: Any) -> Changed:
    """Standardised targets in the loss and the evaluation; ``predict`` undoes it."""
    targets = np.asarray(subject.targets, np.float64)
    mean, spread = targets.mean(0).astype(np.float32), np.maximum(targets.std(0), 1e-12).astype(np.float32)

    def undone(values):
        shape = np.shape(values)[1:] if np.ndim(values) > np.ndim(targets) else spread.shape
        return values * jnp.reshape(spread, shape) + jnp.reshape(mean, shape)

    fold = _fold(subject, lambda network, params, few: fold_outputs(network, params, few, mean, spread))
    return _transformed(subject, targets=lambda values: (values - mean) / spread, outputs=undone, fold=fold)


def _fold(subject: Subject, make: Callable[..., Fold | None]) -> Fold | None:
    """A fold for the run's own evaluation, if there is one and ``predict`` shows that it is right."""
    if subject.predict is None or subject.train.evaluate is None:
        return None
    state = subject.start().state
    few = jax.tree.map(lambda leaf: np.asarray(leaf)[:16], subject.inputs)
    few = few if len(jax.tree.leaves(few)) > 1 else jax.tree.leaves(few)[0]
    as_given = jax.tree.structure(subject.inputs)

    def network(params, inputs):
        inputs = inputs if as_given.num_leaves > 1 else jax.tree.unflatten(as_given, [inputs])
        return subject.outputs(params, inputs, None, state.model_state)

    try:
        return make(network, params_of(state), few)
    except Exception:  # an odd network: its evaluation stays as it is
        return None


def _transformed(subject: Subject, inputs=None, targets=None, outputs=None, fold: Fold | None = None) -> Changed:
    """The run with inputs, targets or outputs passed through functions, and parameters of its evaluation folded."""
    subject.need_loss()
    same = lambda value: value  # noqa: E731
    change_inputs, change_targets, change_outputs = inputs or same, targets or same, outputs or same

    def changed(batch: Any) -> Any:
        return map_parts(batch, change_inputs, change_targets)

    loss_fn, predict = subject.train.loss_fn, subject.predict

    @functools.wraps(loss_fn)
    def new_loss(params, batch, *rest, **named):
        return loss_fn(params, changed(batch), *rest, **named)

    new_predict: Callable[..., Any] | None = None
    if predict is not None:

        @functools.wraps(predict)
        def changed_predict(params, values, *rest, **named):
            return change_outputs(predict(params, change_inputs(values), *rest, **named))

        new_predict = changed_predict

    evaluate = subject.train.evaluate
    if evaluate is not None and fold is not None:
        own = evaluate

        @functools.wraps(own)
        def folded(params, *rest, **named):
            return own(fold(params), *rest, **named)

        evaluate = folded
    elif isinstance(evaluate, Made) and evaluate.call.factory is evaluation.__wrapped__:
        settings: dict[str, Any] = dict(evaluate.call.bound.arguments)
        evaluate = evaluation(**{**settings, "examples": changed(settings["examples"])})
    train = dataclasses.replace(subject.train, loss_fn=new_loss, evaluate=evaluate)
    return Changed(train, subject.hparams, new_predict)


LOWER = Remedy("learning rate", "learning rate x {value:g}", (0.3, 0.1, 0.03, 0.01, 0.003, 0.001), rate)
HIGHER = Remedy("learning rate", "learning rate x {value:g}", (3.0, 10.0, 30.0, 100.0, 1000.0), rate)
CLIP = Remedy("clipping", "nnlearn.chain(nnlearn.clip_by_global_norm({value:g}), tx)", (0.01, 0.1, 1.0, 5.0), clipping)
OPTIMIZER = Remedy(
    "optimizer and schedule",
    "AdamW with warm-up and cosine decay from {value:g}, clipped to norm 1, without weight decay",
    (3e-4, 1e-3, 3e-3, 1e-2),
    new_optimizer,
)
START = Remedy("initial scale", "weights with variance {value:g} / inputs", (0.5, 1.0, 2.0), initial_scale)
BIASES = Remedy(
    "initial scale and biases", "weights with variance {value:g} / inputs, biases 0", (1.0, 2.0), zero_biases
)
INPUTS = Remedy("inputs", "standardised inputs: nnlearn.data.standardize", (1.0,), unit_inputs, apart=True)
TARGETS = Remedy("targets", "standardised targets, undone in predict", (1.0,), unit_targets, apart=True)
DECAY = Remedy("weight decay", "weight_decay=0", (0.0,), no_decay)
SIGN = Remedy("sign", "the opposite sign of the update or of the loss", (-1.0,), opposite)
SHUFFLE = Remedy("order", "nnlearn.shuffled(examples, batch_size, shuffle=True)", (1.0,), shuffling)
BATCH = Remedy("batch size", "batch size x {value:g}", (4.0, 16.0), larger_batches, apart=True)
STOP = Remedy("early stopping", "stop=nnlearn.keep_best(metric)", (1.0,), early_stopping)
STEPS = Remedy("steps", "steps x {value:g}", (4.0,), more_steps, apart=True)
WIDE = Remedy("precision", "parameters in float32", (32.0,), float32_parameters)

REMEDIES: dict[str, tuple[Remedy, ...]] = {
    "learning_rate_too_high": (LOWER, OPTIMIZER),
    "learning_rate_too_low": (HIGHER, OPTIMIZER),
    "schedule_mistimed": (OPTIMIZER,),
    "vanishing_gradients": (START, OPTIMIZER),
    "exploding_gradients": (CLIP, START, OPTIMIZER),
    "dead_units": (BIASES, OPTIMIZER),
    "saturated_activations": (START, INPUTS, OPTIMIZER),
    "bad_initialisation": (START, BIASES, OPTIMIZER),
    "symmetric_initialisation": (START, OPTIMIZER),
    "unnormalised_inputs": (INPUTS, OPTIMIZER),
    "unnormalised_targets": (TARGETS, OPTIMIZER),
    "sign_error": (SIGN, OPTIMIZER),
    "unshuffled_data": (SHUFFLE,),
    "frozen_parameters": (OPTIMIZER,),
    "excessive_regularisation": (DECAY, OPTIMIZER),
    "clipping_too_tight": (OPTIMIZER, HIGHER),
    "optimizer_state_reset": (OPTIMIZER,),
    "gradient_accumulation": (OPTIMIZER, LOWER),
    "batch_too_small": (BATCH, LOWER),
    "numerical_precision": (WIDE, LOWER, OPTIMIZER),
    "underfitting": (HIGHER, OPTIMIZER, STEPS),
    "overfitting": (STOP,),
    "label_noise": (STOP,),
}
"""By the name of a finding, what can be tried. The others need a change of the program or of the data."""

__all__ = ["REMEDIES", "Changed", "Remedy", "rate_name"]
