"""Checks of validation: is it prepared like training, and is it apart from it."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.examples import some
from nnlearn.diagnose.facts import Facts, facts_of
from nnlearn.diagnose.leaks import interpolated, moved_windows
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.probes import quality, row_keys, shared_rows, squared_distances, standard
from nnlearn.diagnose.report import Finding, found

GAIN = 0.05  # in accuracy or explained share, of validation inputs prepared in another way


@check("validation inputs are prepared like training inputs")
def preparation(evidence: Evidence) -> Seen:
    """Whether the network does better on validation inputs that are changed in a usual way."""
    facts = facts_of(evidence)
    subject = evidence.subject
    if subject.validation is None:
        raise Unknown("no validation data were given")
    reached, on_validation = facts.reached, facts.reached_on_validation
    values: dict[str, float | str] = {"on training": reached, "on validation": on_validation}
    if facts.tokens is not None:
        rule = "simple predictors from tokens do on validation what they do on unseen training examples"
        return Seen(values, rule, unlike(facts, values))
    rule = f"not over {GAIN:g} and 40 % of the gap better after a usual change of the inputs"
    if on_validation >= reached - 0.03:
        return Seen(values, rule)
    if not learned_something(facts):
        raise Unknown("the network does not fit the training examples either")
    if own := own_statistics(facts.data.inputs, evidence.validation.inputs):
        text = f"Each validation column has {own}, as each training column has: validation was scaled by its own "
        text += f"statistics. The network reaches {reached:.2f} on training and {on_validation:.2f} on validation."
        return Seen(values, rule, [found("preprocessing_mismatch", text, values, strength=0.9, where="validation")])
    inputs, targets = some(tuple(subject.validation))
    leaves, structure = jax.tree.flatten(inputs)
    pairs = list(zip(*map(jax.tree.leaves, (subject.inputs, subject.validation[0])), strict=True))
    best, way = on_validation, ""
    for at, (train, validation) in enumerate(pairs):
        if np.asarray(train).dtype.kind != "f" and len(pairs) > 1:
            continue
        train, validation = np.asarray(train, np.float64), np.asarray(validation, np.float64)
        for name, change in preparations(train, validation):
            changed = [*leaves]
            changed[at] = change(np.asarray(leaves[at], np.float64)).astype(np.float32)
            score = quality(facts.evaluate(jax.tree.unflatten(structure, changed)), targets, facts.data.kind)
            if score > best:
                best, way = score, name
    values |= {"best after a change": best, "change": way}
    share = (best + on_validation) / 2
    noise = 3 * np.sqrt(share * (1 - share) / len(targets)) if facts.is_classes else 0.1
    if best < on_validation + max(GAIN, noise, 0.4 * (reached - on_validation)):
        return Seen(values, rule, unlike(facts, values))
    text = (
        f"On validation the network reaches {on_validation:.2f} (training {reached:.2f}), and {best:.2f} on the same "
        f"inputs {way}: training and validation are prepared differently."
    )
    return Seen(values, rule, [found("preprocessing_mismatch", text, values, strength=0.95, where="validation inputs")])


def learned_something(facts: Facts) -> bool:
    """Whether the network comes near to what simple predictors reach on training examples."""
    try:
        return facts.reached > facts.attainable - 0.2
    except Unknown:
        return facts.reached > 0.5


def preparations(train: np.ndarray, validation: np.ndarray) -> Iterator[tuple[str, Callable]]:
    """Usual changes of validation inputs, each with a name."""

    def statistics(array, axes):
        return array.mean(axes), array.std(axes) + 1e-12

    kinds = [("overall", None), ("by column", (0,))]
    if train.ndim >= 3:
        kinds.append(("by channel", tuple(range(train.ndim - 1))))
    for name, axes in kinds:
        (m1, s1), (m2, s2) = statistics(train, axes), statistics(validation, axes)
        shift, ratio = np.abs(m1 - m2) / (s1 + 1e-12), s2 / s1
        if np.median(shift) > 0.25 or not 0.8 < np.median(ratio) < 1.25 or (axes is None and np.max(shift) > 0.2):
            yield (
                f"with mean and deviation of training, {name}",
                lambda x, m1=m1, s1=s1, m2=m2, s2=s2: (x - m2) / np.where(s2 > 1e-9, s2, 1) * s1 + m1,
            )
    low, high = train.min(), train.max()
    yield "inverted", lambda x: low + high - x
    yield "with the opposite sign", lambda x: -x
    for factor in (255.0, 1 / 255.0, 16.0, 1 / 16.0, 100.0, 0.01):
        if 0.5 < np.abs(validation).max() * factor / (np.abs(train).max() + 1e-12) < 2:
            yield f"times {factor:.3g}", lambda x, factor=factor: x * factor
    side = int(round(np.sqrt(train.shape[1]))) if train.ndim == 2 else 0
    if train.ndim == 2 and side >= 6 and side * side == train.shape[1]:
        grid = lambda x: x.reshape(len(x), side, side)  # noqa: E731
        yield "with rows and columns exchanged", lambda x: grid(x).swapaxes(1, 2).reshape(x.shape)
        yield "upside down", lambda x: grid(x)[:, ::-1].reshape(x.shape)
        yield "mirrored", lambda x: grid(x)[:, :, ::-1].reshape(x.shape)
    if train.ndim == 4:
        if train.shape[1] == train.shape[2]:
            yield "with rows and columns exchanged", lambda x: x.swapaxes(1, 2)
        yield "upside down", lambda x: x[:, ::-1]
        yield "mirrored", lambda x: x[:, :, ::-1]
        if train.shape[-1] in (3, 4):
            yield "with the channels reversed", lambda x: x[..., ::-1]
    if train.ndim == 2 and 2 <= train.shape[1] <= 200:
        yield "with the columns reversed", lambda x: x[:, ::-1]
    if train.ndim == 3:
        yield "with positions reversed", lambda x: x[:, ::-1]


def unlike(facts: Facts, values: dict[str, float | str]) -> list[Finding]:
    """A finding if simple predictors fail on validation as well, although they do well on unseen training examples."""
    try:
        usual, here = facts.attainable, facts.attainable_on_validation
    except Unknown:
        return []
    values |= {"simple predictors on unseen training examples": usual, "on validation": here}
    gap = facts.reached - facts.reached_on_validation
    if not (usual > 0.85 and here < usual - 0.25 and gap > 0.2):
        return []
    text = (
        f"Nearest neighbours or ridge regression reach {usual:.2f} on training examples that they have not seen, and "
        f"{max(here, 0):.2f} on validation: training inputs are of another kind, or hold what only training has."
    )
    return [found("preprocessing_mismatch", text, values, strength=0.85, where="validation inputs")]


def own_statistics(train: np.ndarray, validation: np.ndarray) -> str:
    """The statistics that all columns of numbers share in both parts, too exactly for chance; empty if none.

    >>> rows = np.random.default_rng(0).normal(2.0, 3.0, size=(300, 2))
    >>> scaled = lambda part: (part - part.mean(0)) / part.std(0)
    >>> own_statistics(scaled(rows[:200]), scaled(rows[200:]))
    'mean 0 and deviation 1'
    >>> own_statistics(scaled(rows[:200]), (rows[200:] - rows[:200].mean(0)) / rows[:200].std(0))
    ''
    """
    parts = [part.astype(np.float64) for part in (train, validation)]
    rare = np.all([np.mean(part == part.max(0), 0) < 0.05 for part in parts], 0)  # not those that repeat their largest
    varied = np.array([len(np.unique(column[:500])) > 20 for column in validation.T])
    parts = [part[:, rare & varied] for part in parts]
    if parts[0].shape[1] < 2:
        return ""
    if all(np.abs(part.mean(0)).max() < 1e-3 and np.abs(part.std(0) - 1).max() < 1e-2 for part in parts):
        return "mean 0 and deviation 1"
    ends = np.array([[part.min(0), part.max(0)] for part in parts])  # part, end, column
    if np.ptp(ends, axis=(0, 2)).max() < 1e-6:
        return f"the range {ends[0, 0, 0]:.3g} to {ends[0, 1, 0]:.3g}"
    return ""


@check("validation shares no examples with training")
def separation(evidence: Evidence) -> Seen:
    facts = facts_of(evidence)
    train, validation = facts.data.inputs, evidence.validation.inputs
    if train.shape[1] != validation.shape[1]:
        raise Unknown("training and validation inputs have different shapes")
    repeated = shared_rows(validation, train)
    natural = repeats_within(train)
    stored = evidence.subject.train.batches.examples is not None
    various = values_per_column(train) >= 12
    drawn = natural > 0 and facts.tokens is None and train.shape[1] > 2 and various
    if not (stored or (drawn and repeated > 0.2)):
        raise Unknown("the batches are generated")
    values = {"validation rows that are training rows": repeated, "training rows that repeat": natural}
    rule = "at most 5 %, and at most what repeats within training by chance + 20 %"
    few_values = not various and facts.tokens is None
    if train.shape[1] <= 2 and repeated == 1 and len(validation) == len(train):  # a curve is judged where it is fitted
        return Seen(values, rule)
    # A few equal points on two lines or grids, or draws from the same grid.
    chance = train.shape[1] <= 2 and (repeated * len(validation) < 5 or repeated <= natural + 0.2)
    suspicious = repeated > 0.05 and (repeated > natural + 0.2 or not few_values) and not chance
    if suspicious and not (facts.tokens is not None and repeated <= natural + 0.05):
        text = f"{repeated:.0%} of the validation examples are also training examples."
        strength = 0.95 if repeated > 0.2 else 0.8
        return Seen(values, rule, [found("leaky_validation", text, values, strength=strength, where="validation")])
    if facts.tokens is None and (made := interpolated(train, validation)) > 0.1:
        values["validation rows between two training rows"] = made
        text = f"{made:.0%} of the validation examples lie on a straight line between two training examples, as "
        text += "oversampling before the split makes them."
        return Seen(values, rule, [found("leaky_validation", text, values, strength=0.9, where="validation")])
    if facts.tokens is None and (moved := windows_moved(evidence)) > 0.2:
        values["validation windows with a piece of a training window"] = moved
        text = f"{moved:.0%} of the validation windows overlap training windows: the series was cut before the split."
        return Seen(values, rule, [found("leaky_validation", text, values, strength=0.9, where="validation")])
    near = near_copies(facts, train, validation)
    values["distance to training / that within training"] = near
    if near < 0.35 and not few_values and facts.tokens is None:
        text = (
            f"Validation examples are much nearer to training examples than these are to one another "
            f"({near:.2f} of the distance): they are copies with small changes."
        )
        return Seen(values, rule, [found("leaky_validation", text, values, strength=0.85, where="validation")])
    return Seen(values, rule)


def windows_moved(evidence: Evidence) -> float:
    """The share of validation windows that overlap training windows; 0 if the inputs are no windows of numbers."""
    subject = evidence.subject
    parts = [jax.tree.leaves(each) for each in (subject.inputs, subject.validation and subject.validation[0])]
    if any(len(each) != 1 for each in parts):
        return 0.0
    train, validation = (np.asarray(each[0]) for each in parts)
    return moved_windows(train, validation) if train.dtype.kind == "f" and train.ndim in (2, 3) else 0.0


def repeats_within(rows: np.ndarray) -> float:
    """The share of rows that occur more than once."""
    _, inverse, counts = np.unique(row_keys(rows), return_inverse=True, return_counts=True)
    return float(np.mean(counts[inverse.reshape(-1)] > 1))


def values_per_column(rows: np.ndarray) -> float:
    """The median number of different values in a column of up to 500 rows."""
    columns = rows[:500, :: max(1, rows.shape[1] // 50)]
    return float(np.median([len(np.unique(columns[:, c])) for c in range(columns.shape[1])]))


def near_copies(facts: Facts, train: np.ndarray, validation: np.ndarray) -> float:
    """The median distance of validation to training, relative to that of training examples to others."""
    count = min(len(train), 4000)
    rows = np.sort(np.random.default_rng(3).permutation(len(train))[:count])
    every, some_validation = standard(train[rows], validation[facts.validation_rows])
    if len(some_validation) < 20 or every.shape[1] == 0:
        return 1.0
    queries = every[:: max(1, count // 300)]
    within = np.sort(squared_distances(queries, every), 1)[:, 1]
    across = np.min(squared_distances(some_validation, every), 1)
    typical = np.median(within)
    return float(np.sqrt(np.median(across) / typical)) if typical > 1e-12 else 1.0


CHECKS: tuple[NamedCheck, ...] = (preparation, separation)
