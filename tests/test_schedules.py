"""Every schedule against optax, torch and plain formulas; traced, vmapped and differentiated in every number."""

import builtins
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nnlearn.schedules as nn

LAST = 2**31 - 1
COUNTS = np.array([*range(64), 1000, 2**24 + 1, LAST], np.int32)
HYPOTHESIS = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@dataclasses.dataclass(frozen=True)
class Case:
    """One schedule: its factory's name, all its numbers away from the defaults, and its other settings.

    ``build`` makes it from a module (ours or optax's) and the numbers where they are not plain arguments.
    """

    label: str
    name: str
    numbers: dict
    flags: dict = dataclasses.field(default_factory=dict)
    build: Callable | None = None

    def make(self, module, numbers=None):
        numbers = self.numbers if numbers is None else numbers
        if self.build is not None:
            return self.build(module, **numbers)
        return getattr(module, self.name)(**numbers, **self.flags)

    @property
    def in_optax(self):
        return hasattr(optax.schedules, self.name)


def _joined(module, start, middle, rate, first, second):
    pieces = [
        module.linear_schedule(start, middle, first),
        module.constant_schedule(middle),
        module.exponential_decay(middle, 5, rate),
    ]
    return module.join_schedules(pieces, [first, second])


def _sgdr(module, peak_a, peak_b, warmup, steps_a, steps_b, end):
    first = {"init_value": 0.1, "peak_value": peak_a, "warmup_steps": warmup, "decay_steps": steps_a}
    second = {"init_value": 0.2, "peak_value": peak_b, "warmup_steps": 2, "decay_steps": steps_b, "end_value": end}
    return module.sgdr_schedule([first, second])


WARMUP = {"init_value": 0.02, "peak_value": 0.7, "warmup_steps": 6}
WSD = {**WARMUP, "stable_steps": 20, "decay_steps": 17, "end_value": 0.05}
RESTARTS = {"init_value": 0.7, "first_cycle_steps": 9, "cycle_factor": 2.0, "end_value": 0.03}

CASES = [
    Case("constant", "constant_schedule", {"value": 0.3}),
    Case("linear", "linear_schedule", {"init_value": 0.0, "end_value": 0.7, "transition_steps": 31}),
    Case(
        "polynomial",
        "polynomial_schedule",
        {"init_value": 0.9, "end_value": 0.2, "power": 1.7, "transition_steps": 41, "transition_begin": 4},
    ),
    Case("exponential", "exponential_decay", {"init_value": 0.9, "transition_steps": 9, "decay_rate": 0.6}),
    Case(
        "staircase",
        "exponential_decay",
        {"init_value": 0.9, "transition_steps": 7, "decay_rate": 0.6, "transition_begin": 5, "end_value": 0.06},
        {"staircase": True},
    ),
    Case(
        "growing",
        "exponential_decay",
        {"init_value": 0.01, "transition_steps": 7, "decay_rate": 1.9, "transition_begin": 3, "end_value": 0.5},
    ),
    Case(
        "cosine",
        "cosine_decay_schedule",
        {"init_value": 0.9, "decay_steps": 43, "alpha": 0.1, "exponent": 1.3},
    ),
    Case(
        "piecewise_constant",
        "piecewise_constant_schedule",
        {"init_value": 0.9, "scale_a": 0.3, "scale_b": 1.7},
        build=lambda module, init_value, scale_a, scale_b: module.piecewise_constant_schedule(
            init_value, {30: scale_b, 7: scale_a}
        ),
    ),
    *[
        Case(
            f"piecewise_{kind}",
            "piecewise_interpolate_schedule",
            {"init_value": 0.9, "scale_a": 0.3, "scale_b": 1.7},
            build=lambda module, init_value, scale_a, scale_b, kind=kind: module.piecewise_interpolate_schedule(
                kind, init_value, {30: scale_b, 7: scale_a}
            ),
        )
        for kind in ("linear", "cosine")
    ],
    Case(
        "linear_onecycle",
        "linear_onecycle_schedule",
        {
            "transition_steps": 47,
            "peak_value": 0.9,
            "pct_start": 0.22,
            "pct_final": 0.71,
            "div_factor": 9.0,
            "final_div_factor": 50.0,
        },
    ),
    Case(
        "cosine_onecycle",
        "cosine_onecycle_schedule",
        {"transition_steps": 47, "peak_value": 0.9, "pct_start": 0.22, "div_factor": 9.0, "final_div_factor": 50.0},
    ),
    Case("warmup_constant", "warmup_constant_schedule", WARMUP),
    Case(
        "warmup_cosine",
        "warmup_cosine_decay_schedule",
        {**WARMUP, "decay_steps": 51, "end_value": 0.05, "exponent": 1.3},
    ),
    Case(
        "warmup_exponential",
        "warmup_exponential_decay_schedule",
        {**WARMUP, "transition_steps": 9, "decay_rate": 0.6, "transition_begin": 4, "end_value": 0.06},
    ),
    Case(
        "joined",
        "join_schedules",
        {"start": 0.1, "middle": 0.8, "rate": 0.7, "first": 11, "second": 23},
        build=_joined,
    ),
    Case(
        "sgdr",
        "sgdr_schedule",
        {"peak_a": 0.9, "peak_b": 0.5, "warmup": 3, "steps_a": 21, "steps_b": 27, "end": 0.04},
        build=_sgdr,
    ),
    Case(
        "annealing",
        "cosine_annealing_schedule",
        {"init_value": 0.7, "decay_steps": 13, "end_value": 0.03},
    ),
    Case("restarts_equal", "cosine_annealing_warm_restarts_schedule", {**RESTARTS, "cycle_factor": 1.0}),
    Case("restarts_doubling", "cosine_annealing_warm_restarts_schedule", RESTARTS),
    Case("restarts_slow", "cosine_annealing_warm_restarts_schedule", {**RESTARTS, "cycle_factor": 1.31}),
    *[Case(f"stable_{decay}", "warmup_stable_decay_schedule", WSD, {"decay": decay}) for decay in ("linear", "1-sqrt")],
    Case("stable_cosine", "warmup_stable_decay_schedule", WSD, {"decay": "cosine"}),
    Case("inverse_root", "inverse_square_root_schedule", WARMUP),
]
BY_LABEL = {case.label: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
every_optax_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.in_optax], ids=lambda case: case.label
)


def shared(make_program):
    """Cases that differ only in their numbers share one program."""
    programs = {}

    def program(case):
        key = (case.name, case.build, *sorted(case.numbers), *case.flags.items())
        if key not in programs:
            programs[key] = make_program(case)
        return programs[key]

    return program


@shared
def compiled(case):
    """The schedule as a program of (numbers, counts)."""
    return jax.jit(lambda numbers, counts: case.make(nn, numbers)(counts))


@shared
def differentiated(case):
    """Values and derivatives with respect to every number at all counts, as a program of (float numbers, counts)."""
    value_and_slopes = jax.value_and_grad(lambda numbers, count: case.make(nn, numbers)(count))
    return jax.jit(jax.vmap(value_and_slopes, in_axes=(None, 0)))


@shared
def vmapped(case):
    """The schedule at all COUNTS, as a program of stacked numbers."""
    return jax.jit(jax.vmap(lambda numbers: case.make(nn, numbers)(COUNTS)))


def as_floats(numbers):
    return {name: jnp.asarray(float(value)) for name, value in numbers.items()}


def by_optax(case, counts=COUNTS):
    """Optax's values in double precision."""
    with jax.enable_x64(True):
        schedule = case.make(optax)
        return np.asarray(jax.vmap(lambda count: jnp.asarray(schedule(count)))(counts.astype(np.int64)))


# ---- Values


def test_names_and_arguments_equal_those_of_optax():
    names = [name for name in dir(optax.schedules) if name[0] != "_" and name.endswith(("schedule", "decay"))]
    assert len(names) == 13
    for name in [*names, "join_schedules"]:
        theirs = inspect.signature(getattr(optax.schedules, name)).parameters.values()
        ours = inspect.signature(getattr(nn, name)).parameters.values()
        assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs], name
        assert name in {case.name for case in CASES}


@every_optax_case
def test_schedules_equal_optax(case):
    expected = by_optax(case)
    single = compiled(case)(case.numbers, COUNTS)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())
    with jax.enable_x64(True):
        double = case.make(nn)(COUNTS)
        assert double.dtype == jnp.float64
        np.testing.assert_allclose(double, expected, rtol=1e-12, atol=1e-15)


def slow_stable(init_value, peak_value, warmup_steps, stable_steps, decay_steps, end_value, decay, count):
    if count < warmup_steps:
        return init_value + (peak_value - init_value) * count / warmup_steps
    x = min(max(count - warmup_steps - stable_steps, 0) / decay_steps, 1)
    shape = {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "1-sqrt": 1 - math.sqrt(x)}[decay]
    return end_value + (peak_value - end_value) * shape


def slow_inverse_root(init_value, peak_value, warmup_steps, count):
    if count < warmup_steps:
        return init_value + (peak_value - init_value) * count / warmup_steps
    return peak_value * math.sqrt(warmup_steps / count)


def slow_annealing(init_value, decay_steps, end_value, count):
    return end_value + (init_value - end_value) * (1 + math.cos(math.pi * count / decay_steps)) / 2


def slow_restarts(init_value, first_cycle_steps, cycle_factor, end_value, count):
    start, length = 0, first_cycle_steps
    while count >= start + length:
        start, length = start + length, length * cycle_factor
    return slow_annealing(init_value, length, end_value, count - start)


SLOW = {
    "warmup_stable_decay_schedule": slow_stable,
    "inverse_square_root_schedule": slow_inverse_root,
    "cosine_annealing_schedule": slow_annealing,
    "cosine_annealing_warm_restarts_schedule": slow_restarts,
}


@pytest.mark.parametrize("case", [case for case in CASES if not case.in_optax], ids=lambda case: case.label)
def test_new_schedules_equal_their_formulas(case):
    counts = COUNTS[:-2]
    expected = [SLOW[case.name](**case.numbers, **case.flags, count=int(count)) for count in counts]
    single = compiled(case)(case.numbers, COUNTS)[:-2]
    np.testing.assert_allclose(single, expected, rtol=2e-6, atol=1e-7)
    with jax.enable_x64(True):
        np.testing.assert_allclose(case.make(nn)(counts), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("factor", [2, 3, 5, 10])
@pytest.mark.parametrize("first", [1, 3, 10, 1000])
def test_restarts_occur_at_the_exact_step(first, factor):
    starts, length = [0], first
    while starts[-1] + length < 2**22:
        starts.append(starts[-1] + length)
        length *= factor
    program = property_program("cosine_annealing_warm_restarts_schedule")
    starts = np.resize(np.array(starts, np.int32), 64)  # one shape for all, repeated to fill it
    np.testing.assert_array_equal(program((1.0, first, factor), starts), np.ones(64))
    before = np.asarray(program((1.0, first, factor), starts - 1))[starts > 10 * first]
    assert before.size > 0 and np.all(before < 0.1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda: nn.linear_schedule(0.06, 0.54, 20),
            lambda lr, o: lr.LinearLR(o, start_factor=0.1, end_factor=0.9, total_iters=20),
        ),
        (lambda: nn.exponential_decay(0.6, 1, 0.93), lambda lr, o: lr.ExponentialLR(o, gamma=0.93)),
        (lambda: nn.exponential_decay(0.6, 7, 0.3, staircase=True), lambda lr, o: lr.StepLR(o, 7, gamma=0.3)),
        (
            lambda: nn.piecewise_constant_schedule(0.6, {5: 0.3, 19: 0.3}),
            lambda lr, o: lr.MultiStepLR(o, [5, 19], gamma=0.3),
        ),
        (lambda: nn.polynomial_schedule(0.6, 0.0, 1.7, 30), lambda lr, o: lr.PolynomialLR(o, 30, power=1.7)),
        (lambda: nn.cosine_annealing_schedule(0.6, 17, 0.02), lambda lr, o: lr.CosineAnnealingLR(o, 17, eta_min=0.02)),
        (
            lambda: nn.cosine_annealing_warm_restarts_schedule(0.6, 11, end_value=0.02),
            lambda lr, o: lr.CosineAnnealingWarmRestarts(o, 11, eta_min=0.02),
        ),
        (
            lambda: nn.cosine_annealing_warm_restarts_schedule(0.6, 4, 3, 0.02),
            lambda lr, o: lr.CosineAnnealingWarmRestarts(o, 4, 3, eta_min=0.02),
        ),
        (
            lambda: nn.cosine_onecycle_schedule(49, 0.9, 14 / 49, 9.0, 50.0),
            lambda lr, o: lr.OneCycleLR(o, 0.9, total_steps=50, pct_start=0.3, div_factor=9.0, final_div_factor=50.0),
        ),
        (
            lambda: nn.linear_onecycle_schedule(49, 0.9, 14 / 49, 28 / 49, 9.0, 50.0),
            lambda lr, o: lr.OneCycleLR(
                o,
                0.9,
                total_steps=50,
                pct_start=0.3,
                anneal_strategy="linear",
                div_factor=9.0,
                final_div_factor=50.0,
                three_phase=True,
            ),
        ),
    ],
    ids=[
        "linear",
        "exponential",
        "step",
        "multistep",
        "polynomial",
        "annealing",
        "restarts",
        "growing",
        "one",
        "three",
    ],
)
def test_schedules_equal_torch(ours, theirs):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.6, momentum=0.9)
    scheduler = theirs(torch.optim.lr_scheduler, optimizer)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    with jax.enable_x64(True):
        np.testing.assert_allclose(ours()(jnp.arange(50)), expected, rtol=1e-12, atol=1e-15)


# ---- Every number may be traced


def varied(case):
    """Rows of numbers: those of the case, and for each number one row with it slightly smaller and one larger."""
    rows = [case.numbers]
    for name, value in case.numbers.items():
        for change in (1.05, 0.9):
            new = value + (2 if change > 1 else -1) if isinstance(value, int) else value * change + 0.001
            rows.append({**case.numbers, name: max(new, 1.0) if name == "cycle_factor" else new})
    return rows


@every_case
def test_jit_and_vmap_equal_plain_calls_and_trace_once(case):
    rows = varied(case)
    program = compiled(case)
    looped = np.stack([program(row, COUNTS) for row in rows])
    assert program._cache_size() == 1, "one trace must serve all numbers"
    tolerance = {"rtol": 3e-6, "atol": 3e-7}
    near = COUNTS < 2**24
    plain = case.make(nn)(COUNTS)
    np.testing.assert_allclose(looped[0], plain, **tolerance)
    assert len({row.tobytes() for row in looped}) > 1 + len(case.numbers) // 2, "the numbers must have an effect"
    stacked = {name: jnp.stack([jnp.asarray(row[name]) for row in rows]) for name in case.numbers}
    together = vmapped(case)(stacked)
    np.testing.assert_allclose(together[:, near], looped[:, near], **tolerance)
    assert np.all(np.isfinite(together))


@every_case
def test_one_count_at_a_time_equals_many(case):
    schedule = case.make(nn)
    counts = [0, 6, 30, LAST]
    many = schedule(np.array(counts, np.int32))
    assert many.shape == (4,)
    for count, expected in zip(counts, many, strict=True):
        for form in (count, np.uint32(count)):
            value = schedule(form)
            assert value.shape == () and value.dtype == jnp.float32
            np.testing.assert_allclose(value, expected, rtol=3e-6, atol=3e-7)
    np.testing.assert_array_equal(schedule(jnp.array([-5, -LAST])), np.full(2, schedule(0)))


@every_case
def test_gradient_equals_finite_differences(case):
    with jax.enable_x64(True):
        numbers = as_floats(case.numbers)
        for name, value in case.numbers.items():
            if isinstance(value, int) and name != "cycle_factor":
                numbers[name] = numbers[name] + 0.37  # not at whole steps, where derivatives are discontinuous
        counts = jnp.arange(64)
        program = differentiated(case)
        _, derivatives = program(numbers, counts)
        for name, value in numbers.items():
            if name == "cycle_factor" and value == 1:
                continue  # its lower end
            step = 1e-6 * max(1.0, abs(float(value)))
            above, below = ({**numbers, name: value + sign * step} for sign in (1, -1))
            slope = (program(above, counts)[0] - program(below, counts)[0]) / (2 * step)
            np.testing.assert_allclose(derivatives[name], slope, rtol=1e-6, atol=1e-8, err_msg=name)


@every_case
def test_no_argument_gives_nan_when_it_is_zero(case):
    """0/0, 0**0, 0 * inf and their derivatives, at every count, except for div factors, which are divisors."""
    counts = np.append(COUNTS, [-3]).astype(np.int32)
    rows = [case.numbers]
    for name in case.numbers:
        if "div_factor" not in name:
            rows += [{**case.numbers, name: 0.0}]
    if "decay_steps" in case.numbers and "warmup_steps" in case.numbers:
        rows += [{**case.numbers, "decay_steps": case.numbers["warmup_steps"]}]
    if "init_value" in case.numbers:
        rows += [{**case.numbers, "init_value": 0.0, name: 0.0} for name in case.numbers if "div_factor" not in name]
    for row in rows:
        values, derivatives = differentiated(case)(as_floats(row), counts)
        assert np.all(np.isfinite(values)), row
        for name, derivative in derivatives.items():
            assert np.all(np.isfinite(derivative)), (name, row)


OPTAX_CANNOT_TRACE = {
    "linear": {"transition_steps"},
    "polynomial": {"transition_steps", "transition_begin"},
    "exponential": {"transition_steps", "decay_rate"},
    "staircase": {"transition_steps", "transition_begin", "decay_rate"},
    "growing": {"transition_steps", "transition_begin", "decay_rate"},
    "cosine": {"decay_steps"},
    "piecewise_constant": {"scale_a", "scale_b"},
    "piecewise_linear": {"scale_a", "scale_b"},
    "piecewise_cosine": {"scale_a", "scale_b"},
    "linear_onecycle": {"transition_steps", "pct_start", "pct_final", "div_factor", "final_div_factor"},
    "cosine_onecycle": {"transition_steps", "pct_start", "div_factor", "final_div_factor"},
    "warmup_constant": {"warmup_steps"},
    "warmup_cosine": {"peak_value", "warmup_steps", "decay_steps"},
    "warmup_exponential": {"warmup_steps", "transition_steps", "decay_rate", "transition_begin"},
    "joined": {"first", "rate"},
    "sgdr": {"peak_a", "peak_b", "warmup", "steps_a", "steps_b"},
}


@every_optax_case
def test_traces_where_optax_cannot(case):
    refused = set()
    for name, value in case.numbers.items():

        def value_at_9(number, module, name=name):
            return case.make(module, {**case.numbers, name: number})(9)

        try:
            jax.eval_shape(lambda number: value_at_9(number, optax), value)  # noqa: B023
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError):
            refused.add(name)
        assert jax.eval_shape(lambda number: value_at_9(number, nn), value).shape == ()  # noqa: B023
    assert refused == OPTAX_CANNOT_TRACE.get(case.label, set())


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100, 999, 4000])
def test_a_traced_length_divides_a_cycle_at_the_same_steps_as_a_concrete_one(steps):
    counts = np.linspace(0, steps + 1, 64).astype(np.int32)
    for name in ("linear_onecycle_schedule", "cosine_onecycle_schedule"):
        traced = property_program(name)((steps, 0.9), counts)
        np.testing.assert_allclose(getattr(nn, name)(steps, 0.9)(counts), traced, rtol=2e-6)


def test_boundaries_may_be_traced_as_pairs():
    def values(first, second, scale):
        pairs = [(first, scale), (second, 3.0)]
        constant = nn.piecewise_constant_schedule(0.5, pairs)(COUNTS)
        return constant, nn.piecewise_interpolate_schedule("cosine", 0.5, pairs)(COUNTS)

    expected_constant = nn.piecewise_constant_schedule(0.5, {40: 3.0, 10: 0.2})(COUNTS)
    expected_wave = nn.piecewise_interpolate_schedule("cosine", 0.5, {40: 3.0, 10: 0.2})(COUNTS)
    constant, wave = jax.jit(values)(10, 40, 0.2)
    np.testing.assert_allclose(constant, expected_constant, rtol=1e-6)
    np.testing.assert_allclose(wave, expected_wave, rtol=1e-6)


# ---- Precision


def test_step_counts_beyond_float32_are_exact():
    begin = 2**30 + 1
    schedule = nn.linear_schedule(0.0, 1.0, 8, begin)
    np.testing.assert_array_equal(schedule(begin + np.arange(10)), np.clip(np.arange(10) / 8, 0, 1))
    stairs = nn.exponential_decay(1.0, 2**26 + 1, 0.5, staircase=True)
    np.testing.assert_array_equal(stairs(np.array([2**26, 2**26 + 1])), [1.0, 0.5])
    equal_cycles = nn.cosine_annealing_warm_restarts_schedule(1.0, 10)
    np.testing.assert_array_equal(equal_cycles(np.array([2**30 - 2**30 % 10, 10**9])), [1.0, 1.0])
    np.testing.assert_allclose(nn.cosine_annealing_schedule(1.0, 10)(10**9 + 5), 0.5, rtol=1e-6)


def test_step_counts_may_exceed_int32():
    np.testing.assert_allclose(nn.linear_schedule(1.0, 0.0, 10**10)(5 * 10**9), 0.5, rtol=1e-6)
    np.testing.assert_allclose(nn.cosine_decay_schedule(1.0, 10**10)(jnp.int32(10**9)), 0.97552826, rtol=1e-6)
    assert float(nn.warmup_cosine_decay_schedule(0.0, 1.0, 10, 10**10)(10)) == 1.0


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32, jnp.bfloat16, jnp.float16])
def test_narrow_counts_are_widened(dtype):
    schedule = nn.linear_schedule(0.0, 1.0, 1000, 3)
    value = schedule(jnp.array([0, 3, 103], dtype))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, [0.0, 0.0, 0.1], rtol=1e-6)


def test_narrow_values_are_widened_and_wide_ones_are_not_narrowed():
    narrow = nn.linear_schedule(jnp.bfloat16(1.0), jnp.bfloat16(0.0), 1000)(1)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, 0.999, rtol=1e-6)
    with jax.enable_x64(True):
        assert nn.linear_schedule(jnp.float32(1.0), 0.0, 1000)(jnp.int64(3)).dtype == jnp.float32
        assert nn.linear_schedule(1.0, 0.0, 1000)(jnp.int32(3)).dtype == jnp.float64
        np.testing.assert_allclose(nn.linear_schedule(1.0, 0.0, 1000)(jnp.int32(3)), 0.997, rtol=1e-15)


def test_ends_are_exact():
    for start, end in [(0.1, 0.3), (1e-7, 0.7), (0.7, 1e-9), (3e8, 0.1)]:
        for schedule in (
            nn.linear_schedule(start, end, 7),
            nn.polynomial_schedule(start, end, 2.5, 7),
            nn.piecewise_interpolate_schedule("cosine", start, {7: 1.0}),
            nn.warmup_cosine_decay_schedule(0.0, start, 0, 7, end),
            nn.warmup_stable_decay_schedule(0.0, start, 0, 0, 7, end, "1-sqrt"),
        ):
            last = start if "interpolate" in repr(schedule) else end
            np.testing.assert_array_equal(schedule(np.array([0, 7, 9])), np.float32([start, last, last]))


# ---- Cases where optax returns a constant, or nearly so


@pytest.mark.parametrize("steps", [0, -3])
def test_a_transition_without_steps_is_constant(steps):
    for make in (
        lambda module, n: module.polynomial_schedule(0.5, 0.1, 2, n),
        lambda module, n: module.linear_schedule(0.5, 0.1, n),
        lambda module, n: module.exponential_decay(0.5, n, 0.9, end_value=0.6),
        lambda module, n: module.warmup_constant_schedule(0.5, 0.1, n if steps == 0 else 0),
    ):
        expected = np.full(3, make(optax, steps)(4), np.float32)
        np.testing.assert_array_equal(make(nn, steps)(np.array([0, 4, 9])), expected)
        traced = jax.jit(lambda n, make=make: make(nn, n)(np.array([0, 4, 9])))(steps)
        np.testing.assert_array_equal(traced, expected)
    stuck = nn.exponential_decay(0.5, 3, 0.0, end_value=0.6)(np.array([0, 4, 9]))
    np.testing.assert_array_equal(stuck, np.full(3, optax.exponential_decay(0.5, 3, 0.0, end_value=0.6)(4), np.float32))


@pytest.mark.parametrize(
    "make",
    [
        lambda module: module.polynomial_schedule(0.5, 0.1, 0, 8),
        lambda module: module.polynomial_schedule(0.5, 0.1, 3, 8),
        lambda module: module.linear_schedule(0.5, 0.1, 8, -4),
        lambda module: module.exponential_decay(0.5, 8, 0.5, -4),
        lambda module: module.exponential_decay(0.5, 8, 1.0, end_value=0.4),
        lambda module: module.exponential_decay(0.5, 8, 0.5, end_value=0.6),
        lambda module: module.cosine_decay_schedule(0.5, 8, exponent=0.0),
        lambda module: module.warmup_cosine_decay_schedule(0.1, 0.5, 0, 8),
        lambda module: module.warmup_cosine_decay_schedule(0.1, 0.0, 3, 8, end_value=0.2),
        lambda module: module.warmup_exponential_decay_schedule(0.1, 0.5, 0, 8, 0.5, staircase=True),
        lambda module: module.piecewise_constant_schedule(0.5),
        lambda module: module.piecewise_interpolate_schedule("linear", 0.5),
        lambda module: module.piecewise_interpolate_schedule("linear", 0.5, {0: 2.0, 4: 0.0, 8: 1.0}),
        lambda module: module.linear_onecycle_schedule(100, 0.5, 0.29, 0.57),
        lambda module: module.join_schedules([module.constant_schedule(0.5)], []),
        lambda module: module.join_schedules([module.constant_schedule(v) for v in (0.5, 0.4, 0.3)], [4, 4]),
    ],
)
def test_edges_equal_optax(make):
    schedule = make(optax)
    expected = jax.vmap(lambda count: jnp.asarray(schedule(count)))(COUNTS)
    np.testing.assert_allclose(make(nn)(COUNTS), expected, rtol=1e-5, atol=1e-6)


def test_unbounded_growth_gives_no_nan():
    schedule = nn.exponential_decay(0.0, 1, 2.0)
    np.testing.assert_array_equal(schedule(COUNTS), np.zeros(len(COUNTS)))
    slope = jax.grad(lambda rate, count: nn.exponential_decay(0.1, 1, rate, end_value=5.0)(count))
    assert [float(slope(2.0, count)) for count in (200, LAST)] == [0.0, 0.0]


# ---- Bad values


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.constant_schedule(math.nan), r"value must be .* got nan"),
        (lambda: nn.constant_schedule(jnp.ones(3)), r"value must be a scalar.*jax\.vmap"),
        (lambda: nn.polynomial_schedule(1.0, 0.0, -1.0, 5), r"power must be .* got -1\.0; .*infinite"),
        (lambda: nn.polynomial_schedule(1.0, 0.0, 1.0, math.inf), r"transition_steps must be .* got inf"),
        (lambda: nn.linear_schedule(math.inf, 0.0, 5), r"init_value must be .* got inf"),
        (lambda: nn.exponential_decay(1.0, 5, -0.5), r"decay_rate must be .* got -0\.5; .*negative rate"),
        (lambda: nn.exponential_decay(1.0, 5, 0.5, end_value=math.nan), r"end_value must be .* got nan"),
        (lambda: nn.cosine_decay_schedule(1.0, 0), r"decay_steps must be in \(0, inf\), got 0\.0"),
        (lambda: nn.cosine_decay_schedule(1.0, 5, exponent=-2), r"exponent must be .* got -2\.0"),
        (lambda: nn.cosine_annealing_schedule(1.0, -3), r"decay_steps must be .* got -3\.0"),
        (lambda: nn.piecewise_constant_schedule(1.0, {5: -0.1}), r"boundaries_and_scales\[5\] must be .* got -0\.1"),
        (lambda: nn.piecewise_constant_schedule(1.0, {-5: 0.1}), r"boundaries_and_scales steps\[0\] .* got -5"),
        (
            lambda: nn.piecewise_interpolate_schedule("linear", 1.0, [(9, 1.0), (5, 2.0)]),
            r"boundaries_and_scales steps\[1\] must be .* got 5\.0; give boundaries in increasing order",
        ),
        (lambda: nn.piecewise_interpolate_schedule("cubic", 1.0), r"interpolate_type must be .* got 'cubic'"),
        (lambda: nn.linear_onecycle_schedule(0, 1.0), r"transition_steps must be .* got 0\.0"),
        (lambda: nn.linear_onecycle_schedule(9, 1.0, 0.5, 0.4), r"pct_final must be in \[0\.5, 1\].* after pct_start"),
        (lambda: nn.cosine_onecycle_schedule(9, 1.0, pct_start=1.5), r"pct_start must be .* got 1\.5"),
        (lambda: nn.cosine_onecycle_schedule(9, 1.0, div_factor=0), r"div_factor must be .* got 0\.0"),
        (lambda: nn.warmup_constant_schedule(0.0, 1.0, -1), r"warmup_steps must be .* got -1\.0"),
        (
            lambda: nn.warmup_cosine_decay_schedule(0.0, 1.0, 10, 10),
            r"decay_steps must be in \(10\.0, inf\), got 10\.0; .*warmup_steps",
        ),
        (lambda: nn.warmup_exponential_decay_schedule(0.0, 1.0, -2, 5, 0.5), r"warmup_steps must be .* got -2\.0"),
        (lambda: nn.warmup_stable_decay_schedule(0.0, 1.0, 1, -1, 1), r"stable_steps must be .* got -1\.0"),
        (lambda: nn.warmup_stable_decay_schedule(0.0, 1.0, 1, 1, 1, decay="exp"), r"decay must be .* got 'exp'"),
        (lambda: nn.inverse_square_root_schedule(0.0, 1.0, -1), r"warmup_steps must be .* got -1\.0"),
        (lambda: nn.cosine_annealing_warm_restarts_schedule(1.0, 0), r"first_cycle_steps must be .* got 0\.0"),
        (lambda: nn.cosine_annealing_warm_restarts_schedule(1.0, 5, 0.5), r"cycle_factor must be .* got 0\.5"),
        (lambda: nn.join_schedules([], []), r"schedules at least one"),
        (lambda: nn.join_schedules([nn.constant_schedule(1.0)], [3]), r"got 1 boundaries for 1 schedules"),
        (
            lambda: nn.join_schedules([nn.constant_schedule(1.0)] * 3, [5, 3]),
            r"boundaries\[1\] must be in \[5\.0, inf\).* got 3\.0",
        ),
        (lambda: nn.sgdr_schedule([]), r"at least one cycle"),
        (lambda: nn.preview(nn.constant_schedule(1.0), -1), r"steps must be an integer >= 0.* got -1"),
    ],
)
def test_errors_name_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_errors_name_wrong_types():
    with pytest.raises(TypeError, match=r"value must be a number.*'fast'"):
        nn.constant_schedule("fast")
    with pytest.raises(TypeError, match=r"schedules\[1\] must be a function, got 0\.1"):
        nn.join_schedules([nn.constant_schedule(1.0), 0.1], [3])


# ---- Equal settings


@every_case
def test_equal_settings_are_equal(case):
    first, second = case.make(nn), case.make(nn)
    assert first == second and hash(first) == hash(second)
    assert repr(first).startswith(case.name + "(")
    for name, value in case.numbers.items():
        other = case.make(nn, {**case.numbers, name: value + 1 if isinstance(value, int) else value * 1.01 + 0.001})
        assert other != first, name


# ---- Properties


@functools.cache
def property_program(name):
    return jax.jit(lambda arguments, counts: getattr(nn, name)(*arguments)(counts))


rates = st.just(0.0) | st.floats(2.0**-60, 10, width=32)  # not so small that XLA flushes parts of it to zero
lengths = st.integers(1, 100)
counts_anywhere = st.lists(st.integers(-LAST, LAST), min_size=4, max_size=4)


@HYPOTHESIS
@given(rates, rates, lengths, lengths, counts_anywhere, st.floats(0, 5, width=32))
def test_values_stay_between_the_ends(start, end, warmup, length, anywhere, power):
    counts = np.array(anywhere + list(range(60)), np.int32)
    low, high = min(start, end), max(start, end)
    slack = 1e-6 * high
    calls = {
        "linear_schedule": (start, end, length, warmup),
        "polynomial_schedule": (start, end, power, length, warmup),
        "warmup_constant_schedule": (start, end, warmup),
        "warmup_cosine_decay_schedule": (start, end, warmup, warmup + length, start, power),
        "warmup_stable_decay_schedule": (start, end, warmup, length, warmup, start),
        "cosine_annealing_schedule": (start, length, end),
        "cosine_annealing_warm_restarts_schedule": (start, length, 1 + power, end),
    }
    for name, arguments in calls.items():
        values = np.asarray(property_program(name)(arguments, counts))
        floor = min(low, 0) if end == 0 else low  # with a peak of 0 the warm-up to it is followed by 0
        assert np.all(values >= floor - slack) and np.all(values <= high + slack), name
    values = np.asarray(property_program("inverse_square_root_schedule")((start, end, warmup), counts))
    assert np.all(values >= 0) and np.all(values <= high + slack)
    values = np.asarray(property_program("exponential_decay")((start, length, min(power, 1), warmup), counts))
    assert np.all(values >= 0) and np.all(values <= start + slack)


@HYPOTHESIS
@given(rates, rates, st.integers(0, 20), lengths, st.floats(0, 5, width=32))
def test_decays_never_increase(one, other, warmup, length, power):
    peak, end = max(one, other), min(one, other)
    counts = np.append(np.arange(80), LAST).astype(np.int32)
    decaying = counts >= warmup
    calls = {
        "linear_schedule": (peak, end, length, warmup),
        "polynomial_schedule": (peak, end, power, length, warmup),
        "exponential_decay": (peak, length, min(power, 1), warmup),
        "warmup_cosine_decay_schedule": (0.0, peak, warmup, warmup + length, end, power),
        "warmup_exponential_decay_schedule": (0.0, peak, warmup, length, min(power, 1)),
        "warmup_stable_decay_schedule": (0.0, peak, warmup, length, warmup, end),
        "inverse_square_root_schedule": (0.0, peak, warmup),
    }
    for name, arguments in calls.items():
        values = np.asarray(property_program(name)(arguments, counts))[decaying]
        assert np.all(np.diff(values) <= 1e-6 * peak), name


@functools.cache
def joined_program():
    def values(boundaries, counts):
        pieces = [lambda count, base=base: base + count for base in (1e3, 2e3, 3e3)]
        return nn.join_schedules(pieces, boundaries)(counts)

    return jax.jit(values)


@HYPOTHESIS
@given(st.integers(0, 300), st.integers(0, 300))
def test_join_picks_the_piece_and_counts_from_its_start(first, gap):
    second = first + gap
    around = [0, first - 1, first, first + 1, second - 1, second, second + 1]
    counts = np.maximum(np.array(around, np.int32), 0)

    def slow(count):
        if count >= second:
            return 3000 + count - second
        if count >= first:
            return 2000 + count - first
        return 1000 + count

    np.testing.assert_array_equal(joined_program()((first, second), counts), [slow(count) for count in counts])


@HYPOTHESIS
@given(st.sampled_from(CASES[::4]), st.integers(0, 59))
@pytest.mark.slow
def test_preview_equals_the_loop(case, count):
    np.testing.assert_allclose(previews(case.label)[count], case.make(nn)(count), rtol=3e-6, atol=1e-7)


@functools.cache
def previews(label):
    values = nn.preview(BY_LABEL[label].make(nn), 60)
    assert values.shape == (60,) and values.dtype == jnp.float32
    return np.asarray(values)


# ---- Together with optax


def test_preview_accepts_any_schedule():
    np.testing.assert_array_equal(nn.preview(lambda step: 0.5, 3), np.full(3, 0.5, np.float32))
    theirs, ours = optax.cosine_decay_schedule(1.0, 10), nn.cosine_decay_schedule(1.0, 10)
    np.testing.assert_allclose(nn.preview(theirs, 60), nn.preview(ours, 60), atol=1e-6)
    assert nn.preview(ours, 0).shape == (0,)


def test_joins_with_optax_in_both_directions():
    ours, theirs = (
        [module.linear_schedule(0.0, 1.0, 5), other.exponential_decay(1.0, 4, 0.5)]
        for module, other in ((nn, optax), (optax, nn))
    )
    expected = nn.preview(optax.join_schedules([ours[1], theirs[0]], [5]), 20)
    np.testing.assert_allclose(nn.preview(nn.join_schedules([ours[1], theirs[0]], [5]), 20), expected, rtol=1e-6)
    np.testing.assert_allclose(
        nn.preview(nn.join_schedules(ours, [5]), 20), nn.preview(optax.join_schedules(theirs, [5]), 20), rtol=1e-6
    )


def test_a_joined_schedule_evaluates_each_piece_within_its_range():
    def root_of_what_is_left(peak):
        return lambda count: peak * jnp.sqrt(4.0 - count)

    def value(peak, join):
        return join([root_of_what_is_left(peak), lambda count: peak * jnp.sqrt(count - 0.0)], [4])(jnp.int32(9))

    assert np.isnan(jax.grad(value)(2.0, optax.join_schedules))
    np.testing.assert_allclose(jax.grad(value)(2.0, nn.join_schedules), math.sqrt(5), rtol=1e-6)


@pytest.mark.parametrize("inject", [False, True])
def test_schedules_work_in_optimizers_of_optax(inject):
    schedule = nn.warmup_cosine_decay_schedule(0.0, 0.5, 3, 12)
    sgd = optax.inject_hyperparams(optax.sgd) if inject else optax.sgd
    tx = sgd(learning_rate=schedule)
    params = {"w": jnp.ones(2)}

    @jax.jit
    def step(opt_state):
        return tx.update({"w": jnp.ones(2)}, opt_state, params)

    opt_state, seen = tx.init(params), []
    for _ in range(15):
        updates, opt_state = step(opt_state)
        seen.append(-float(updates["w"][0]))
    np.testing.assert_allclose(seen, nn.preview(schedule, 15), rtol=1e-6, atol=1e-9)
    assert step._cache_size() == 1


def test_a_learning_rate_can_be_learned_through_a_schedule():
    def loss_after(peak):
        tx = optax.sgd(nn.warmup_cosine_decay_schedule(0.0, peak, 2, 10))

        def step(carry, _):
            weight, opt_state = carry
            update, opt_state = tx.update(jax.grad(jnp.square)(weight), opt_state)
            return (weight + update, opt_state), None

        weight = jnp.float32(1.0)
        (weight, _), _ = jax.lax.scan(step, (weight, tx.init(weight)), None, 10)
        return jnp.square(weight)

    slopes = jax.jit(jax.vmap(jax.grad(loss_after)))(jnp.array([0.01, 0.05]))
    losses = [float(loss_after(peak)) for peak in (0.009, 0.011, 0.049, 0.051)]
    np.testing.assert_allclose(slopes, [(losses[1] - losses[0]) / 0.002, (losses[3] - losses[2]) / 0.002], rtol=1e-3)


# ---- Figures


def test_plot_shows_the_values():
    pytest.importorskip("matplotlib")
    schedule = nn.linear_schedule(1.0, 0.0, 5)
    axes = nn.plot(schedule, 8, label="line")
    assert nn.plot(nn.constant_schedule(0.5), 8, axes) is axes
    first, second = axes.get_lines()
    np.testing.assert_array_equal(first.get_ydata(), nn.preview(schedule, 8))
    np.testing.assert_array_equal(second.get_ydata(), np.full(8, 0.5))
    assert first.get_label() == "line"
    from matplotlib import pyplot

    pyplot.close(axes.figure)


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r'pip install "nnlearn\[plot\]"'):
        nn.plot(nn.constant_schedule(1.0), 3)
