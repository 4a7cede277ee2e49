"""CTC against an enumeration of all alignments, PyTorch, optax and finite differences; decoding; error rates."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnlearn.losses.ctc import ctc_loss
from nnlearn.losses.ctc_decoding import ctc_beam_search_decode, ctc_greedy_decode
from nnlearn.losses.error_rates import character_error_rate, edit_distance, word_error_rate
from nnlearn.native import is_native, native_status

few = hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)


def collapse(alignment, blank_id=0):
    """The labels of an alignment: repeats merged, blanks dropped."""
    merged = [one for one, _ in itertools.groupby(alignment)]
    return tuple(one for one in merged if one != blank_id)


def paddings(lengths, size):
    return (np.arange(size) >= np.asarray(lengths)[:, None]).astype(np.float32)


def pad_labels(sequences, size, fill=0):
    """Labels as an array padded with ``fill``, and their paddings."""
    rows = [list(one) + [fill] * (size - len(one)) for one in sequences]
    return np.array(rows, np.int32).reshape(len(rows), size), paddings([len(one) for one in sequences], size)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def labellings(logits_tk, blank_id=0):
    """Labels -> (probability, expected counts of each class at each frame times that), over all alignments."""
    probs, found = softmax(logits_tk), {}
    frames, classes = logits_tk.shape
    for alignment in itertools.product(range(classes), repeat=frames):
        probability = math.prod(probs[t, k] for t, k in enumerate(alignment))
        total, counts = found.setdefault(collapse(alignment, blank_id), [0.0, np.zeros_like(probs)])
        found[collapse(alignment, blank_id)][0] = total + probability
        counts[np.arange(frames), list(alignment)] += probability
    return found


def enumerated(logits_tk, labels, blank_id=0):
    """Loss and gradient of one example; impossible labels have loss inf and no gradient."""
    if tuple(labels) not in (found := labellings(logits_tk, blank_id)):
        return np.inf, np.zeros_like(logits_tk)
    probability, counts = found[tuple(labels)]
    return -np.log(probability), softmax(logits_tk) - counts / probability


def losses_and_gradient(loss, weights=None, **options):
    """The losses of a batch, and the gradient of their weighted sum."""

    def both(logits, *others):
        losses, pull_back = jax.vjp(lambda x: loss(x, *others, **options), logits)
        return losses, pull_back(jnp.ones_like(losses) if weights is None else jnp.asarray(weights, losses.dtype))[0]

    return jax.jit(both)


BOTH = losses_and_gradient(ctc_loss)


@pytest.fixture(scope="module", params=["kernel", "operations"])
def way(request):
    """The loss by the kernel in C, for float32 on one CPU, and by JAX's operations."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "kernel":
            if not is_native():
                pytest.skip(native_status())
            patch.setattr(jax, "device_count", lambda: 1)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


both_ways = pytest.mark.usefixtures("way")


# 4 frames of 3 classes: nothing, one label, repeats, the most that fit, and what does not fit.
SEQUENCES = [(), (1,), (2, 1), (1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 1, 2), (1, 1, 1), (2, 2, 1, 1)]


@pytest.mark.parametrize("blank_id", [0, 2])
def test_the_loss_equals_the_sum_over_all_alignments(blank_id):
    sequences = [tuple((one + blank_id) % 3 for one in labels) for labels in SEQUENCES]
    frame_counts = [4, 4, 4, 4, 4, 4, 4, 4, 4]
    logits = 2 * np.random.default_rng(0).normal(size=(len(sequences), 4, 3))
    weights = np.random.default_rng(1).normal(size=len(sequences))
    labels, label_paddings = pad_labels(sequences, 5)
    expected = [enumerated(x, one, blank_id) for x, one in zip(logits, sequences, strict=True)]
    with jax.enable_x64(True):
        both = losses_and_gradient(ctc_loss, weights, blank_id=blank_id)
        losses, gradient = both(jnp.asarray(logits), paddings(frame_counts, 4), labels, label_paddings)
        assert losses.dtype == gradient.dtype == np.float64
    np.testing.assert_allclose(losses, [loss for loss, _ in expected], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(gradient, [w * g for w, (_, g) in zip(weights, expected, strict=True)], atol=1e-12)
    assert np.isinf(losses).sum() == 2 and np.abs(gradient).max() > 0.1


def test_padding_at_any_position_with_any_content_is_skipped():
    rng = np.random.default_rng(0)
    frames, kept = np.array([1, 0, 0, 1, 1, 0, 1], bool), np.array([0, 1, 1, 0, 1], bool)
    logits, labels = rng.normal(size=(1, 7, 4)), np.array([[-7, 2, 2, 99, 1]])
    logits = np.where(frames[None, :, None], logits, rng.choice([np.nan, np.inf, -np.inf], logits.shape))
    with jax.enable_x64(True):
        losses, gradient = map(np.asarray, BOTH(logits, ~frames[None], labels, 1 - kept[None]))
        short = losses_and_gradient(ctc_loss)(logits[:, frames], np.zeros((1, 4)), labels[:, kept], np.zeros((1, 3)))
    expected = enumerated(logits[0, frames], (2, 2, 1))
    np.testing.assert_allclose(losses, short[0], rtol=1e-12)
    np.testing.assert_allclose(losses, [expected[0]], rtol=1e-12)
    np.testing.assert_allclose(gradient[0, frames], expected[1], atol=1e-12)
    assert (gradient[0, ~frames] == 0).all()


SHAPES = [(4, 14, 4, 7), (2, 24, 150, 6)]  # examples, frames, classes (few and many), labels


@st.composite
def problems(draw):
    batch, frames, classes, size = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    logits = (draw(st.sampled_from([0.1, 1.0, 5.0])) * rng.normal(size=(batch, frames, classes))).astype(np.float32)
    frame_counts = draw(st.lists(st.integers(1, frames), min_size=batch, max_size=batch))
    label_counts = draw(st.lists(st.integers(0, size), min_size=batch, max_size=batch))
    labels = rng.integers(1, min(classes, draw(st.sampled_from([3, 200]))), (batch, size)).astype(np.int32)
    return logits, frame_counts, labels, label_counts


def needed_frames(labels, count):
    return count + sum(labels[i] == labels[i + 1] for i in range(count - 1))


@both_ways
@few
@hypothesis.given(problems())
def test_agrees_with_torch(problem):
    torch = pytest.importorskip("torch")
    logits, frame_counts, labels, label_counts = problem
    losses, gradient = BOTH(
        logits, paddings(frame_counts, logits.shape[1]), labels, paddings(label_counts, labels.shape[1])
    )
    tensor = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.ctc_loss(
        tensor.log_softmax(-1).transpose(0, 1),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(frame_counts),
        torch.tensor(label_counts),
        reduction="none",
    )
    possible = np.array([needed_frames(labels[b], n) <= frame_counts[b] for b, n in enumerate(label_counts)])
    np.testing.assert_allclose(losses, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.isfinite(losses), possible)
    assert (np.asarray(losses) >= 0).all() and (np.asarray(gradient)[~possible] == 0).all()
    if possible.any():
        expected[torch.tensor(possible)].sum().backward()
        np.testing.assert_allclose(gradient[possible], tensor.grad.numpy()[possible], atol=1e-5)


@both_ways
def test_agrees_with_optax(blank_id=3):
    rng = np.random.default_rng(0)
    logits, weights = rng.normal(size=(4, 12, 6)).astype(np.float32), np.array([1.0, -2.0, 0.5, 3.0])
    labels = rng.choice([one for one in range(6) if one != blank_id], (4, 4))
    others = paddings([12, 9, 5, 7], 12), labels, paddings([4, 2, 0, 3], 4)
    others[0][0, 4:6] = 1  # also skipped in the middle
    losses, gradient = losses_and_gradient(ctc_loss, weights, blank_id=blank_id)(logits, *others)
    expected, expected_gradient = losses_and_gradient(optax.ctc_loss, weights, blank_id=blank_id)(logits, *others)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-5)  # rounding in optax


def random_problem(batch=2, frames=6, classes=4, size=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, classes, (batch, size))
    return rng.normal(size=(batch, frames, classes)), np.zeros((batch, frames)), labels, np.zeros((batch, size))


@pytest.mark.slow
def test_first_and_second_derivatives_by_finite_differences():
    logits, *others = random_problem()
    direction = np.random.default_rng(1).normal(size=logits.shape)
    with jax.enable_x64(True):

        def loss(x):
            return ctc_loss(x, *others, reduction="sum")

        both = jax.jit(jax.value_and_grad(loss))
        second = jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), direction)))(jnp.asarray(logits))
        _, gradient = both(jnp.asarray(logits))
        ends = [both(jnp.asarray(logits + step * direction)) for step in (1e-5, -1e-5)]
        slope, bend = ((after - before) / 2e-5 for after, before in zip(*ends, strict=True))
    np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=1e-7)
    np.testing.assert_allclose(second, bend, atol=1e-8)
    assert np.abs(second).max() > 1e-2


@pytest.mark.slow
def test_the_kernel_equals_the_jax_operations(monkeypatch):
    if not is_native():
        pytest.skip(native_status())
    logits, frame_paddings, labels, label_paddings = random_problem(5, 40, 37, 9)
    logits, frame_paddings = logits.astype(np.float32), paddings([40, 33, 0, 8, 25], 40)
    frame_paddings[1, 3:9] = 1
    logits[1, 4] = np.nan  # in a padding frame
    others = frame_paddings, labels, paddings([9, 8, 2, 9, 0], 9)
    direction = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)

    def everything(logits):
        def loss(x, power):
            return jnp.sum(jnp.arange(5.0) * ctc_loss(x, *others, blank_id=36, zero_infinity=True)) ** power

        _, slopes = jax.jvp(lambda x: jax.grad(loss)(x, 2.0), (logits,), (direction,))
        mapped = jax.vmap(jax.grad(loss), in_axes=(None, 0))(logits, jnp.array([1.0, 2.0]))
        several = jax.vmap(lambda x: jax.value_and_grad(loss)(x, 1.0))(jnp.stack([logits, 2 * logits]))
        return jax.value_and_grad(loss)(logits, 1.0), slopes, mapped, several, ctc_loss(logits, *others, 36)

    clean = np.where(np.isnan(logits), 0, logits)  # second derivatives need numbers in padding
    operations = jax.jit(everything)(clean)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        program = jax.jit(lambda logits: everything(logits)).lower(clean).compile()
        assert "nnlearn_ctc_gradient" in program.as_text() and "nnlearn_ctc_loss" in program.as_text()
        kernel = program(clean)
        spoiled = jax.jit(lambda x: ctc_loss(x, *others, 36))(logits)
    for one, other in zip(jax.tree.leaves(kernel), jax.tree.leaves(operations), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(np.nan_to_num(other, posinf=0)).max())
    np.testing.assert_allclose(spoiled, operations[-1], rtol=1e-6)
    assert np.isinf(operations[-1]).sum() == 2  # labels without frames, and more than frames


def test_the_accelerator_version_gives_the_same_result(monkeypatch):
    logits, *others = random_problem(3, 21, 5, 6)
    expected = BOTH(logits.astype(np.float32), *others)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    results = losses_and_gradient(ctc_loss)(logits.astype(np.float32), *others)
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@both_ways
def test_the_gradient_of_many_frames_is_accurate():
    logits, *others = random_problem(2, 300, 200, 40)
    losses, gradient = BOTH(3 * logits.astype(np.float32), *others)
    with jax.enable_x64(True):
        exact, exact_gradient = losses_and_gradient(ctc_loss)(3 * logits, *others)
    np.testing.assert_allclose(losses, exact, rtol=1e-6)
    np.testing.assert_allclose(gradient, exact_gradient, atol=5e-4)  # scores of size 1000 and 24 bits
    np.testing.assert_allclose(gradient.sum(2), 0, atol=2e-6)


def log_space_reference(logits_tk, labels):
    """Loss and gradient of one example in float64: forward and backward over blank, label, blank, ..., blank."""
    log_probs = logits_tk - np.logaddexp.reduce(logits_tk, 1, keepdims=True)
    states = [0] + [one for label in labels for one in (label, 0)]

    def scores(log_probs, states):
        before, rows = np.array([0.0] + [-np.inf] * (len(states) - 1)), []
        for row in log_probs:
            after = before.copy()
            after[1:] = np.logaddexp(after[1:], before[:-1])
            for s in range(2, len(states)):
                if states[s] != states[s - 2]:
                    after[s] = np.logaddexp(after[s], before[s - 2])
            before = after + row[states]
            rows.append(before)
        return np.array(rows)

    with np.errstate(invalid="ignore"):
        forward = scores(log_probs, states)
        backward = scores(log_probs[::-1], states[::-1])[::-1, ::-1]
        total = np.logaddexp.reduce(forward[-1, -2:])
        shares = np.exp(forward + backward - log_probs[:, states] - total)
    counts = np.zeros_like(log_probs)
    np.add.at(counts, (slice(None), states), shares)
    return -total, np.exp(log_probs) - counts


@both_ways
@pytest.mark.parametrize("size", [0.0, 30.0, 3000.0])
def test_probabilities_below_the_range_of_floats_are_accurate(size):
    rng = np.random.default_rng(0)
    labels = [(1, 1, 2, 2) * 8, (1, 2, 3, 3, 3, 1) * 4, (1,) * 28]  # the last has only one alignment
    logits = (size * rng.normal(size=(3, 55, 4))).astype(np.float32)
    padded, label_paddings = pad_labels(labels, 32)
    losses, gradient = BOTH(logits, np.zeros((3, 55)), padded, label_paddings)
    for b, one in enumerate(labels):
        loss, expected = log_space_reference(np.float64(logits[b]), one)
        np.testing.assert_allclose(losses[b], loss, rtol=1e-6)
        np.testing.assert_allclose(gradient[b], expected, atol=2e-5 if size < 100 else 1e-3)


@both_ways
def test_impossible_labels_have_infinite_or_zero_loss_and_no_gradient():
    logits, *_ = random_problem(4, 3, 4)
    labels, label_paddings = pad_labels([(1, 1, 2), (1, 2), (1,), ()], 3)
    frame_paddings = paddings([3, 1, 0, 0], 3)
    for zero_infinity in (False, True):
        both = losses_and_gradient(ctc_loss, zero_infinity=zero_infinity)
        losses, gradient = both(logits.astype(np.float32), frame_paddings, labels, label_paddings)
        np.testing.assert_array_equal(losses, [0 if zero_infinity else np.inf] * 3 + [0])
        np.testing.assert_array_equal(gradient, 0)


@both_ways
def test_missing_classes():
    logits = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    logits[:, 1, 4] = -np.inf  # not the class of any label
    logits[1, :, 2] = -np.inf  # its label cannot be emitted
    logits[2, 2] = -np.inf  # nothing can
    labels, label_paddings = pad_labels([(2, 1), (2,), (1,)], 2)
    losses, gradient = BOTH(logits, np.zeros((3, 4)), labels, label_paddings)
    expected = enumerated(np.float64(logits[0]), (2, 1))
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[0], expected[1], atol=1e-6)
    assert np.isposinf(losses[1:]).all()
    assert np.isfinite(gradient).all() and (gradient[1:] == 0).all() and gradient[0, 1, 4] == 0


@both_ways
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4, 1e30])
def test_the_loss_is_never_negative_or_nan(size):
    best = np.array([[0, 1, 1, 0, 2], [1, 0, 1, 2, 2], [0, 0, 0, 0, 0]])
    labels, label_paddings = pad_labels([(1, 2), (1, 1, 2), ()], 3)
    for shift in (0.0, size):
        logits = np.float32(size * np.eye(4)[best] - shift)
        losses, gradient = BOTH(logits, np.zeros((3, 5)), labels, label_paddings)
        assert (losses >= 0).all() and np.isfinite(losses).all() and np.isfinite(gradient).all()
        assert size == 1 or (losses < 1e-6).all()


@both_ways
def test_labels_out_of_range_give_nan():
    logits, frame_paddings, *_ = random_problem(4, 6, 4)
    for dtype in (np.int32, np.int8):
        labels = np.array([[1, 2], [1, -1], [4, 1], [0, 1]], dtype)
        losses, gradient = BOTH(logits.astype(np.float32), frame_paddings, labels, np.zeros((4, 2)))
        np.testing.assert_array_equal(np.isnan(losses), [False, True, True, True])
        np.testing.assert_array_equal(np.isnan(gradient).any((1, 2)), [False, True, True, True])


@both_ways
@pytest.mark.parametrize(("frames", "size"), [(0, 0), (0, 2), (3, 0)])
def test_empty_axes(frames, size):
    logits = np.random.default_rng(0).normal(size=(2, frames, 3)).astype(np.float32)
    losses, gradient = BOTH(logits, np.zeros((2, frames)), np.ones((2, size), int), np.zeros((2, size)))
    expected = [enumerated(np.float64(x), (1,) * size) for x in logits]
    np.testing.assert_allclose(losses, [loss for loss, _ in expected], rtol=1e-6)
    np.testing.assert_allclose(gradient, [one for _, one in expected], atol=1e-6)
    mapped = jax.vmap(lambda x: BOTH(x, np.zeros((2, frames)), np.ones((2, size), int), np.zeros((2, size))))
    np.testing.assert_allclose(mapped(jnp.stack([logits] * 3))[1], jnp.stack([gradient] * 3), atol=1e-6)


@both_ways
def test_scores_beyond_float32_precision_give_bounded_gradients():
    logits = 1e8 * np.random.default_rng(0).normal(size=(3, 55, 4)).astype(np.float32)
    labels, label_paddings = pad_labels([(1, 1, 2, 2) * 8, (1, 2, 3, 3, 3, 1) * 4, (1,) * 28], 32)
    losses, gradient = BOTH(logits, np.zeros((3, 55)), labels, label_paddings)
    assert (losses > 1e9).all() and np.isfinite(losses).all()
    assert np.isfinite(gradient).all() and np.abs(gradient).max() <= 40


@both_ways
def test_where_and_reductions():
    logits, *others = random_problem(3)
    logits, where = logits.astype(np.float32), np.array([True, False, True])
    losses, gradient = BOTH(logits, *others)
    spoiled = np.where(where[:, None, None], logits, np.nan)
    masked = losses_and_gradient(ctc_loss, where=where)(spoiled, *others)
    np.testing.assert_allclose(masked[0], np.where(where, losses, 0), rtol=1e-6)
    np.testing.assert_allclose(masked[1], np.where(where[:, None, None], gradient, 0), atol=1e-6)

    @jax.jit
    def reduced(where):
        return [ctc_loss(spoiled, *others, where=where, reduction=reduction) for reduction in ("sum", "mean")]

    kept = np.asarray(losses)[where]
    np.testing.assert_allclose(reduced(where), [kept.sum(), kept.mean()], rtol=1e-6)
    np.testing.assert_array_equal(reduced(np.zeros(3, bool)), 0)


@pytest.mark.slow
@both_ways
def test_vmap_equals_a_loop_and_scan_works():
    logits, *others = random_problem(4)
    logits = logits.astype(np.float32)
    losses, gradient = BOTH(logits, *others)
    split = [jnp.asarray(one).reshape(2, 2, *one.shape[1:]) for one in (logits, *others)]
    mapped = jax.vmap(lambda *one: BOTH(*one))(*split)
    np.testing.assert_allclose(mapped[0].reshape(4), losses, rtol=1e-6)
    np.testing.assert_allclose(mapped[1].reshape(logits.shape), gradient, atol=1e-6)
    _, scanned = jax.lax.scan(lambda carry, one: (carry, BOTH(*one)), 0, tuple(split))
    np.testing.assert_allclose(scanned[1].reshape(logits.shape), gradient, atol=1e-6)


@pytest.mark.parametrize(("dtype", "classes"), [("bfloat16", 150), ("float16", 4)])
def test_low_precision_is_computed_in_float32(dtype, classes):
    logits, *others = random_problem(2, 8, classes)
    narrow = jnp.asarray(logits).astype(dtype)
    losses, gradient = BOTH(narrow, *others)
    exact, exact_gradient = BOTH(narrow.astype(jnp.float32), *others)
    assert losses.dtype == jnp.float32 and gradient.dtype == dtype
    np.testing.assert_allclose(losses, exact, rtol=1e-6)
    np.testing.assert_allclose(gradient.astype(jnp.float32), exact_gradient, rtol=1e-2, atol=1e-6)


def test_errors_name_the_argument():
    logits, *others = random_problem()
    for blank_id, error in {4: ValueError, -1: ValueError, 1.0: TypeError}.items():
        with pytest.raises(error, match="blank_id"):
            ctc_loss(logits, *others, blank_id)
    with pytest.raises(TypeError, match="static|Python int"):
        jax.jit(ctc_loss)(logits, *others, 0)
    with pytest.raises(ValueError, match="reduction"):
        ctc_loss(logits, *others, reduction="average")
    with pytest.raises(ValueError, match="logits must have shape"):
        ctc_loss(logits[0], *others)
    with pytest.raises(ValueError, match="logit_paddings"):
        ctc_loss(logits, others[0][:, :-1], *others[1:])
    with pytest.raises(ValueError, match="label_paddings"):
        ctc_loss(logits, *others[:2], others[2][:, :-1])
    with pytest.raises(ValueError, match="labels must have shape"):
        ctc_loss(logits, others[0], others[1][0], others[2][0])
    with pytest.raises(TypeError, match="labels must be of integer"):
        ctc_loss(logits, others[0], others[1] / 2, others[2])
    with pytest.raises(ValueError, match="where"):
        ctc_loss(logits, *others, where=np.ones(3, bool))
    with pytest.raises(ValueError, match="top_paths"):
        ctc_beam_search_decode(logits, others[0], 2, top_paths=3)
    with pytest.raises(ValueError, match="beam_width"):
        ctc_beam_search_decode(logits, others[0], 0)


def as_tuples(labels, label_paddings):
    return [tuple(int(x) for x in row[padding == 0]) for row, padding in zip(labels, label_paddings, strict=True)]


@pytest.mark.parametrize("blank_id", [0, 2])
def test_greedy_decoding_collapses_the_best_alignment(blank_id):
    logits = np.random.default_rng(0).normal(size=(6, 9, 3)).astype(np.float32)
    frame_paddings = paddings([9, 9, 5, 1, 0, 9], 9)
    frame_paddings[5, [2, 3, 6]] = 1
    logits[frame_paddings == 1] = np.nan
    decoded = jax.jit(ctc_greedy_decode, static_argnums=2)(logits, frame_paddings, blank_id)
    rows = [x[padding == 0] for x, padding in zip(logits, frame_paddings, strict=True)]
    assert as_tuples(decoded.labels, decoded.label_paddings) == [collapse(x.argmax(1), blank_id) for x in rows]
    expected = [np.log(softmax(x).max(1)).sum() if len(x) else 0 for x in rows]
    np.testing.assert_allclose(decoded.scores, expected, rtol=1e-5)


@pytest.mark.parametrize(("frames", "classes", "blank_id"), [(5, 3, 0), (4, 4, 1)])
def test_a_beam_of_all_prefixes_finds_the_most_likely_labels(frames, classes, blank_id):
    logits = np.random.default_rng(0).normal(size=(6, frames, classes)).astype(np.float32)
    paths = 5
    decode = jax.jit(lambda *both: ctc_beam_search_decode(*both, 130, blank_id, top_paths=paths))
    decoded = decode(logits, np.zeros((6, frames)))
    assert decoded.labels.shape == (6, paths, frames) and decoded.scores.shape == (6, paths)
    differs = 0
    for b, x in enumerate(logits):
        found = {labels: pair[0] for labels, pair in labellings(np.float64(x), blank_id).items()}
        best = sorted(found, key=found.get, reverse=True)[:paths]
        assert as_tuples(decoded.labels[b], decoded.label_paddings[b]) == best
        np.testing.assert_allclose(np.exp(decoded.scores[b]), [found[one] for one in best], rtol=1e-5)
        differs += best[0] != collapse(x.argmax(1), blank_id)
    assert differs  # from the result of greedy decoding
    repeated = np.repeat(logits[:, None], paths, 1).reshape(-1, frames, classes)
    flat = [np.asarray(one).reshape(-1, frames) for one in decoded[:2]]
    losses = jax.jit(ctc_loss, static_argnums=4)(repeated, np.zeros(repeated.shape[:2]), *flat, blank_id)
    np.testing.assert_allclose(losses, -decoded.scores.reshape(-1), rtol=1e-5, atol=1e-6)


def narrow_beam(logits_tk, width):
    """Prefix beam search with a dictionary, in float64."""
    log_probs, beam = np.log(softmax(np.float64(logits_tk))), {(): (0.0, -np.inf)}
    for row in log_probs:
        after = {}

        def add(prefix, blank, label, after=after):
            old = after.get(prefix, (-np.inf, -np.inf))
            after[prefix] = np.logaddexp(old[0], blank), np.logaddexp(old[1], label)

        for prefix, (blank, label) in beam.items():
            total = np.logaddexp(blank, label)
            add(prefix, total + row[0], label + row[prefix[-1]] if prefix else -np.inf)
            for k in range(1, len(row)):
                add((*prefix, k), -np.inf, row[k] + (blank if prefix and prefix[-1] == k else total))
        beam = dict(sorted(after.items(), key=lambda one: np.logaddexp(*one[1]), reverse=True)[:width])
    return [(prefix, np.logaddexp(*pair)) for prefix, pair in beam.items()]


def test_a_narrow_beam_equals_a_search_with_a_dictionary():
    logits = np.random.default_rng(1).normal(size=(4, 20, 5)).astype(np.float32)
    frame_paddings = paddings([20, 20, 13, 0], 20)
    frame_paddings[1, 4:9] = 1
    logits[frame_paddings == 1] = np.nan
    decoded = jax.jit(lambda *both: ctc_beam_search_decode(*both, 4, top_paths=4))(logits, frame_paddings)
    for b, (x, padding) in enumerate(zip(logits, frame_paddings, strict=True)):
        expected = narrow_beam(x[padding == 0], 4)
        count = len(expected)
        assert as_tuples(decoded.labels[b], decoded.label_paddings[b])[:count] == [prefix for prefix, _ in expected]
        np.testing.assert_allclose(decoded.scores[b][:count], [score for _, score in expected], rtol=1e-5, atol=1e-6)
        assert np.isneginf(decoded.scores[b][count:]).all()


EDITS = jax.jit(edit_distance)


def slow_edits(first, second):
    if not first or not second:
        return len(first) + len(second)
    return min(
        slow_edits(first[1:], second) + 1,
        slow_edits(first, second[1:]) + 1,
        slow_edits(first[1:], second[1:]) + (first[0] != second[0]),
    )


@few
@hypothesis.given(st.lists(st.tuples(*[st.text("abc", max_size=5)] * 2), min_size=3, max_size=3))
def test_edit_distance(pairs):
    def numbers(texts, fill):
        return pad_labels([[ord(one) for one in text] for text in texts], 5, fill)

    firsts, seconds = zip(*pairs, strict=True)
    distances = EDITS(*numbers(firsts, 0), *numbers(seconds, 7))
    expected = [slow_edits(*pair) for pair in pairs]
    np.testing.assert_array_equal(distances, expected)
    if length := sum(map(len, seconds)):
        assert character_error_rate(firsts, seconds) == sum(expected) / length
        assert word_error_rate([" ".join(one) for one in firsts], [" ".join(one) for one in seconds]) == (
            sum(expected) / length
        )


def test_edit_distance_under_vmap_and_of_empty_sequences():
    rng = np.random.default_rng(0)
    labels = [
        rng.integers(0, 3, (2, 3, 4)),
        rng.random((2, 3, 4)) < 0.3,
        rng.integers(0, 3, (2, 3, 6)),
        np.zeros((2, 3, 6)),
    ]
    mapped = jax.jit(jax.vmap(edit_distance))(*labels)
    np.testing.assert_array_equal(mapped, [EDITS(*(one[i] for one in labels)) for i in range(2)])
    empty = np.zeros((2, 0), int)
    np.testing.assert_array_equal(EDITS(empty, empty, labels[2][0, :2], labels[3][0, :2]), [6, 6])
    np.testing.assert_array_equal(EDITS(labels[2][0, :2], labels[3][0, :2], empty, empty), [6, 6])


def test_error_rates_of_empty_texts_and_their_errors():
    assert character_error_rate([""], [""]) == word_error_rate([], []) == 0
    assert character_error_rate(["a"], [""]) == word_error_rate(["a b"], [" "]) == math.inf
    assert word_error_rate(["a  b\nc"], ["a b d"]) == pytest.approx(1 / 3)
    with pytest.raises(TypeError, match="predictions"):
        character_error_rate("abc", ["abc"])
    with pytest.raises(ValueError, match="one prediction"):
        word_error_rate(["a"], ["a", "b"])
    with pytest.raises(TypeError, match="predictions"):
        edit_distance(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 2), int), np.zeros((1, 2)))
