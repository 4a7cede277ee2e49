"""Checks of the network: frozen, symmetric and dead parts, saturation, initial scale, gradients from layer to layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.data import learned_well
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.examples import exchanged, some
from nnlearn.diagnose.facts import facts_of
from nnlearn.diagnose.gains import LOWER, gain, poor
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.plan import quick
from nnlearn.diagnose.report import Finding, found
from nnlearn.diagnose.subject import SHORT, params_of
from nnlearn.programs.kinds import RECTIFIED, SMOOTH, SQUASHING

DEAD = 0.9  # share of units
ALWAYS = 0.95  # share of units that are off or saturated at every snapshot
WIDE = 10.0  # of the inputs, whose spread should be about 1
SAME = 1e-4  # of the largest weight
FAR_ABOVE = 8.0  # times the loss of chance
HUGE = 10.0  # times the first loss with weights of unit scale


@check("every parameter is trained")
def frozen(evidence: Evidence) -> Seen:
    slopes = evidence.slopes
    moved, sloped = np.sum(slopes.change_norms, 0), np.max(np.nan_to_num(slopes.mean_norms), 0)
    still = [name for name, move, slope in zip(slopes.names, moved, sloped, strict=True) if move == 0 and slope > 0]
    values = {"parameters": len(slopes.names), "never changed": still}
    rule = "every parameter with a gradient changes, unless it was loaded and not drawn, or it does no harm"
    if still and np.any(moved):  # weights that were trained elsewhere are kept on purpose
        loaded = loaded_leaves(evidence)
        still = [name for name in still if name not in loaded]
    if not still or learned_well(facts_of(evidence)):
        return Seen(values, rule)
    if not np.any(moved):
        text = "No parameter ever changes, although there is a gradient: all updates are zero."
        return Seen(values, rule, [found("frozen_parameters", text, values, strength=0.95)])
    text = f"{len(still)} of {len(slopes.names)} parameters have a gradient but never change: {', '.join(still[:4])}."
    return Seen(values, rule, [found("frozen_parameters", text, values, strength=0.95, where=still[0])])


def loaded_leaves(evidence: Evidence) -> set[str]:
    """Matrices whose first values do not depend on the key, and the leaves beside them, if other matrices are drawn."""
    one, other = (params_of(start.state) for start in (evidence.subject.start(), evidence.subject.start(12345)))
    pairs = zip(evidence.slopes.names, *(map(np.asarray, jax.tree.leaves(each)) for each in (one, other)), strict=True)
    triples = [(name, first, np.array_equal(first, second)) for name, first, second in pairs if first.size > 1]
    if all(equal for _, leaf, equal in triples if leaf.ndim >= 2):  # the run was given its first parameters
        return set()
    same = {name: leaf for name, leaf, equal in triples if equal}
    matrices = {name for name, leaf in same.items() if leaf.ndim >= 2 and np.ptp(leaf) > 0}
    return matrices | {name for name in same if any(_room(name) == _room(each) for each in matrices)}


def _room(name: str) -> str:
    """The part of a network that a leaf belongs to."""
    return name.rpartition("/")[0]


def _spread(rows: np.ndarray) -> float:
    """The largest difference between two rows."""
    return float(np.ptp(rows, axis=0).max())


@check("units differ")
def symmetry(evidence: Evidence) -> Seen:
    slopes = evidence.slopes
    first, last = (jax.tree.leaves(params_of(state)) for state in (evidence.run.first, evidence.run.last))
    alike, zero = [], []
    for at, name in enumerate(slopes.names):
        start, end = np.asarray(first[at], np.float64), np.asarray(last[at], np.float64)
        if start.ndim < 2 or start.shape[-1] < 2 or not np.all(np.isfinite(end)):
            continue
        moved, sloped = np.sum(slopes.change_norms[:, at]), np.max(np.nan_to_num(slopes.mean_norms[:, at]))
        if _spread(start.reshape(-1, start.shape[-1]).T) == 0:
            if _spread(end.reshape(-1, end.shape[-1]).T) <= SAME * np.abs(end).max() and (moved > 0 or sloped == 0):
                alike.append(name)
            if not np.any(start) and moved == 0 and sloped == 0:
                zero.append(name)
        elif len(start) > 1 and _spread(start) == 0 and moved > 0 and _spread(end) <= SAME * np.abs(end).max():
            alike.append(name)  # rows, such as the centres of a mixture
    values = {"matrices with equal units": alike, "held at zero": zero}
    rule = "no matrix starts and ends with equal columns"
    if not alike or not poor(evidence):
        return Seen(values, rule)
    kind = "are zero and get no gradient" if zero else "start equal and stay equal"
    text = f"All units of {', '.join(alike[:3])} {kind}, from the first to the last step."
    return Seen(values, rule, [found("symmetric_initialisation", text, values, strength=0.97, where=alike[0])])


@check("units are alive")
def dead(evidence: Evidence) -> Seen:
    kinds = RECTIFIED | SMOOTH
    layers = [each for each in evidence.activations if each.kind in kinds and not each.is_output]
    if not layers:
        raise Unknown("the network has no rectified units")
    shares = {each.layer or str(each.where): np.asarray(each.dead).reshape(3, -1).min(1) for each in layers}
    values = {name: float(share[-1]) for name, share in shares.items()}
    rule = f"fewer than {DEAD:.0%} of a layer's units are 0 for all examples"
    name, share = max(shares.items(), key=lambda pair: pair[1][-1])
    if share[-1] < DEAD or not (_always(share, evidence) or poor(evidence)):
        return Seen(values, rule)
    step = int(evidence.run.at[[0, len(evidence.run.at) // 2, -1][int(np.argmax(share >= DEAD))]])
    text = f"{share[-1]:.0%} of the units after {name} are 0 for every example; at the start {share[0]:.0%}."
    strength = 0.9 if share[0] >= DEAD else 0.75
    return Seen(values, rule, [found("dead_units", text, values, strength=strength, where=name, step=step)])


def _always(share: np.ndarray, evidence: Evidence) -> bool:
    """Whether nearly no unit of a layer can learn, in a network that is not nearly perfect all the same."""
    return min(share) > ALWAYS and not evidence.score > 0.95


@check("units are not saturated")
def saturated(evidence: Evidence) -> Seen:
    layers = [each for each in evidence.activations if each.kind in SQUASHING and not each.is_output]
    if not layers:
        raise Unknown("the network has no squashing units")
    shares = {each.layer or str(each.where): np.asarray(each.saturated).reshape(3, -1).mean(1) for each in layers}
    values = {name: [float(each) for each in share] for name, share in shares.items()}
    rule = "fewer than 60 % of a layer's activations are in the flat parts, at the start or at the end"
    name, share = max(shares.items(), key=lambda pair: max(pair[1][0], pair[1][-1]))
    if max(share[0], share[-1]) < 0.6 or not (_always(share, evidence) or poor(evidence)):
        return Seen(values, rule)
    text = f"{share[0]:.0%} of the activations after {name} are saturated at the start, {share[-1]:.0%} at the end."
    strength = 0.85 if share[0] > 0.6 else 0.75
    findings = [found("saturated_activations", text, values, strength=strength, where=name)]
    spread = float(np.std(evidence.data.inputs))
    if share[0] > ALWAYS - 0.1 and name == next(iter(shares)) and spread > WIDE:
        values = {**values, "spread of the inputs": spread}
        text = (
            f"The inputs have a spread of {spread:.3g}, so {share[0]:.0%} of the units of {name} are saturated by them."
        )
        findings.append(found("unnormalised_inputs", text, values, strength=0.93, where="inputs"))
    return Seen(values, rule, findings)


@check("inputs and weights have a good scale")
def scale(evidence: Evidence) -> Seen:
    gains = {
        name: gain(evidence, name)
        for name in ("inputs of unit scale", "weights of unit scale", "both of unit scale", "weights x0.1")
    }
    data = evidence.data.inputs
    values: dict = {f"gain with {name}": each for name, each in gains.items()}
    values |= {"largest input": float(np.abs(data).max()), "largest spread": float(data.std(0).max())}
    values["first loss"] = evidence.first_loss
    rule = "inputs or weights of unit scale gain nothing in an eighth of the steps"
    findings: list[Finding] = []
    inputs, weights = gains["inputs of unit scale"], gains["weights of unit scale"]
    better = "weights of unit scale"
    lower = max(gain(evidence, name) for name in LOWER)
    if gains["weights x0.1"] > max(weights, lower):
        better, weights = "weights x0.1", gains["weights x0.1"]
    spreads = data.std(0)[data.std(0) > 0]
    far = len(spreads) > 0 and (spreads.max() > 8 or spreads.max() < 0.05 or np.abs(data.mean(0)).max() > 10)
    numbers = facts_of(evidence).tokens is None  # those of tokens have no scale
    if inputs > 0 and far:
        text = (
            f"Inputs reach {np.abs(data).max():.3g}, with standard deviations from {spreads.min():.2g} to "
            f"{spreads.max():.2g}. {_compared(evidence, 'inputs of unit scale')}"
        )
        findings.append(found("unnormalised_inputs", text, values, strength=0.85 + 0.1 * inputs))
    elif far and numbers and (plain := steep_by_inputs(evidence)):
        text = (
            f"Inputs reach {np.abs(data).max():.3g}. The first loss is {evidence.first_loss:.3g}; with inputs of unit "
        )
        text += f"scale it is {plain:.3g}."
        findings.append(found("unnormalised_inputs", text, values, strength=0.85))
    start = float(evidence.variants["weights of unit scale"].losses[0])
    huge = evidence.first_loss > HUGE * max(start, 0) > 0 and not far and poor(evidence)
    if huge and weights == 0:
        weights = 0.3
    if weights == 0 and not (far and numbers) and (chance := above_chance(evidence, start)):
        values["loss of chance"] = chance
        huge, weights = True, 0.1
    brief = evidence.subject.epochs <= SHORT  # one that any faster start would help
    if weights > 0 and (huge or (weights > 0.3 * lower and not brief)):  # otherwise the rate is what is wrong
        text = f"The first loss is {evidence.first_loss:.3g}. {_compared(evidence, better)}"
        strength = 0.75 + 0.15 * weights if huge or weights > 0.5 * lower else 0.55  # else a lower rate does more
        findings.append(found("bad_initialisation", text, values, strength=strength))
    return Seen(values, rule, findings)


def steep_by_inputs(evidence: Evidence) -> float:
    """The first loss with inputs of unit scale if it is far below that of a run that does not fit; else 0."""
    scaled = evidence.variants.get("inputs of unit scale")
    plain = float(scaled.losses[0]) if scaled is not None else 0.0
    return plain if evidence.first_loss > FAR_ABOVE * plain > 0 and poor(evidence) else 0.0


def above_chance(evidence: Evidence, start: float) -> float:
    """The loss of chance if the first loss is far above it, and weights of unit scale are not; else 0.

    Args:
      evidence: of the run.
      start: the first loss with weights of unit scale.
    """
    classes = evidence.data.labels
    if classes is None or not evidence.program.of_kind("softmax") or evidence.score >= 0.9:
        return 0.0
    chance = float(np.log(max(len(np.unique(classes)), 2)))
    return chance if evidence.first_loss > FAR_ABOVE * chance and 0 < start < 3 * chance else 0.0


def _tiny(leaf: np.ndarray) -> bool:
    """Whether a matrix starts near zero, as last layers often do, so that its gradient is large beside it."""
    inputs = max(np.prod(leaf.shape[:-1]), np.prod(leaf.shape[1:]))  # whichever axis counts them
    return bool(np.sqrt(np.mean(np.square(leaf, dtype=np.float64)) * inputs) < 0.1)


def _compared(evidence: Evidence, name: str) -> str:
    other = evidence.variants[name]
    return (
        f"With {name}, {len(other.losses)} steps reach a loss of {other.loss:.3g}; the run ended at "
        f"{evidence.last_loss:.3g}."
    )


@check("gradients reach every layer")
def fading(evidence: Evidence) -> Seen:
    slopes = evidence.slopes
    first = jax.tree.leaves(params_of(evidence.run.first))
    matrices = [at for at, leaf in enumerate(first) if np.ndim(leaf) >= 2 and np.any(leaf)]
    usual = [at for at in matrices if not _tiny(np.asarray(first[at]))]
    matrices = usual if len(usual) >= max(3, len(matrices) // 2) else matrices
    if len(matrices) < 3:
        raise Unknown("the network has fewer than three matrices that do not start at zero")
    ratios = []
    for time in (0, len(slopes.leaf_norms) // 2):
        relative = np.median(slopes.leaf_norms[time], axis=0) / np.maximum(slopes.param_norms[time], 1e-12)
        ratios.append(float(relative[matrices].min() / max(relative[matrices].max(), 1e-30)))
    sizes = np.median(slopes.leaf_norms[0], axis=0) / np.maximum(slopes.param_norms[0], 1e-12)
    sizes = {slopes.names[at]: float(sizes[at]) for at in matrices}
    smallest, largest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    values = {"smallest": sizes[smallest], "largest": sizes[largest], "ratio": ratios[0], "ratio later": ratios[1]}
    rule = "gradients relative to their weights differ by less than 1,000 between layers, at the start or halfway"
    if not 0 < max(ratios) < 1e-3 or not poor(evidence):
        return Seen(values, rule)
    text = (
        f"At the start the gradient of {smallest} is {sizes[smallest]:.2g} of its weights, that of {largest} "
        f"{sizes[largest]:.2g}."
    )
    return Seen(values, rule, [found("vanishing_gradients", text, values, strength=0.85, where=smallest, step=0)])


@check("gradients do not explode")
def exploding(evidence: Evidence) -> Seen:
    norms, first = evidence.run.grad_norm, evidence.slopes
    relative = np.median(first.leaf_norms[0], axis=0) / np.maximum(first.param_norms[0], 1e-12)
    top, middle = float(np.nanmax(norms)), float(np.nanmedian(norms))
    values = {"first": float(norms[0]), "median": middle, "largest": top, "relative to weights": float(relative.max())}
    rule = "no gradient is 1,000 times the weights, or 1,000 times the usual one and 30 times the first"
    finite = np.isfinite(norms)
    start = float(norms[0]) if finite[0] else 0.0  # gradients that fade have a small median
    spikes = bool(top > max(1e3 * max(middle, 1e-12), 30 * start)) or not np.all(finite)
    size = float(np.sqrt(np.sum(first.param_norms[0] ** 2)))
    huge = size > 0 and float(norms[0]) > 1e3 * size  # parameters that start at zero have no scale
    scaled = evidence.variants["weights of unit scale"].losses[0]
    unguarded = [fact for fact in evidence.program.of_kind("domain") if not fact.guarded and fact.operation != "div"]
    trap = bool(np.isfinite(evidence.run.loss[0])) and len(unguarded) > 0
    huge = huge or (not finite[0] and bool(np.isfinite(scaled)) and not trap)
    if not (huge or spikes) or not poor(evidence):
        return Seen(values, rule)
    step = int(np.nanargmax(np.where(finite, norms, -1)))
    text = f"The gradient norm is {norms[0]:.2g} at the start, {middle:.2g} in the median and {top:.2g} at step {step}."
    if not huge and norms[0] < 30 * middle and not evidence.loops:  # calm until the steps overshot
        return Seen(values, rule, [found("learning_rate_too_high", text, values, strength=0.65, step=step)])
    strength = 0.85 if huge or (evidence.loops and top > 1e6 * start > 0) else 0.6
    return Seen(values, rule, [found("exploding_gradients", text, values, strength=strength, step=step)])


@check("early time steps reach the output")
def through_time(evidence: Evidence) -> Seen:
    """How much first outputs change with the first quarter of the time steps, and with the last one."""
    subject, state = evidence.subject, evidence.run.first
    subject.need_predict()
    inputs = some(subject.inputs, 64)
    leaves = jax.tree.leaves(inputs)
    if not evidence.loops or any(leaf.ndim < 2 or leaf.shape[:2] != leaves[0].shape[:2] for leaf in leaves):
        raise Unknown("the network does not run through time")
    length = leaves[0].shape[1]
    if length == 1 and leaves[0].ndim == 3 and not evidence.score >= 0.95:
        text = f"The network runs through time, but its inputs have one time step: shape {leaves[0].shape[1:]}."
        remedy = "put the history into the axis of time: windows of several steps, shape (examples, time, features)"
        finding = found("underfitting", text, {"time steps": 1}, strength=0.7, where="inputs", remedies=[remedy])
        return Seen({"time steps": 1}, "more than one time step, or a score of 0.95", [finding])
    if length < 8:
        raise Unknown("there are fewer than 8 time steps")

    @functools.partial(jax.jit, compiler_options=quick())
    def outputs(params, inputs, model_state):
        result = subject.outputs(params, inputs, None, model_state)
        return result[:, -1] if result.ndim > 2 and result.shape[1] == length else result

    held = (params_of(state), inputs, state.model_state)
    plain = np.asarray(outputs(*held), np.float64)
    early, late = (
        float(np.abs(np.asarray(outputs(held[0], exchanged(inputs, *span), held[2])) - plain).mean())
        for span in ((0, length // 4), (length - length // 4, length))
    )
    values = {"change with early inputs": early, "change with late inputs": late, "time steps": length}
    rule = "the first quarter of the time steps changes the outputs by 0.1 % of what the last quarter does"
    if not (late > 0 and early < 1e-3 * late and poor(evidence)):
        return Seen(values, rule)
    text = (
        f"At the start, other inputs in the first quarter of {length} time steps change the outputs by {early:.2g}, "
        f"in the last quarter by {late:.2g}: the signal and its gradient fade on their way through time."
    )
    return Seen(values, rule, [found("vanishing_gradients", text, values, strength=0.85, where="time", step=0)])


@check("gradients run through time")
def cut_in_time(evidence: Evidence) -> Seen:
    """How many time steps of the inputs get a gradient of the loss, though earlier ones change it."""
    subject, state = evidence.subject, evidence.run.last
    inputs, targets = some((subject.inputs, subject.targets), 64)
    leaves = jax.tree.leaves(inputs)
    if len(leaves) != 1 or leaves[0].ndim < 3 or leaves[0].shape[1] < 8 or leaves[0].dtype.kind != "f":
        raise Unknown("the inputs are not sequences of vectors")
    if not evidence.loops:
        raise Unknown("the network does not run through time")
    sequences, structure = leaves[0], jax.tree.structure(inputs)

    @functools.partial(jax.jit, compiler_options=quick())
    def slope(params, sequences, model_state):
        def loss(sequences):
            batch = subject.batch_of(jax.tree.unflatten(structure, [sequences]), targets)
            return subject.loss(params, batch, jax.random.key(0), model_state)

        value, grad = jax.value_and_grad(loss)(sequences)
        return value, jnp.moveaxis(grad, 1, 0).reshape(sequences.shape[1], -1).any(1)

    params, length = params_of(state), sequences.shape[1]
    plain, reached = slope(params, sequences, state.model_state)
    early = length - max(2, length // 4)
    changed = abs(float(slope(params, exchanged(sequences, 0, early), state.model_state)[0] - plain))
    values = {"time steps": length, "with a gradient": int(np.sum(reached)), "change with earlier inputs": changed}
    rule = "if earlier inputs change the loss by 1 %, more than two time steps have a gradient"
    if not (1 <= np.sum(reached) <= 2 and changed > 0.01 * abs(float(plain))):
        return Seen(values, rule)
    text = (
        f"The loss has a gradient for {values['with a gradient']} of {length} time steps, though the earlier inputs "
        f"change it by {changed:.2g}: the state is cut off between the steps."
    )
    return Seen(values, rule, [found("blocked_gradient", text, values, strength=0.8, where="time")])


@check("few examples are fitted by more than a linear network")
def linear(evidence: Evidence) -> Seen:
    kinds = RECTIFIED | SMOOTH | set(SQUASHING)
    hidden = len([each for each in evidence.activations if each.kind in kinds and not each.is_output])
    values = {"nonlinear layers": hidden, "examples": len(evidence.data.inputs), "score": evidence.score}
    rule = "a hidden layer, or a score of 0.8 (with 20 examples or more, simple predictors decide)"
    if hidden or len(evidence.data.inputs) >= 20 or not evidence.score < 0.8:
        return Seen(values, rule)
    text = (
        f"The network has no nonlinear layer, and its score on {values['examples']} examples is {evidence.score:.2f}."
    )
    return Seen(values, rule, [found("underfitting", text, values, strength=0.8)])


CHECKS: tuple[NamedCheck, ...] = (
    linear,
    frozen,
    symmetry,
    dead,
    saturated,
    scale,
    fading,
    through_time,
    cut_in_time,
    exploding,
)
