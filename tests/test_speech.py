"""Speech: features, recurrent layers, the encoder, the prompts, and a training run on tones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnlearn.datasets.speech import Speech, asterisk_prompts, change_speed, split_by_transcript, spoken
from nnlearn.models.recurrent import gru, rnn
from nnlearn.models.spectrogram import frame_count, log_mel_spectrogram, mel_filters, normalize_utterance, spec_augment
from nnlearn.models.speech_encoder import Utterances, log_mel_front_end, speech_encoder
from nnlearn.tasks.speech import decode, speech

RANDOM = np.random.default_rng(0)


def slow_log_mel(audio, sample_rate, window, hop, mels, fft_size, to_mel, to_hertz, unit_area, floor):
    """The definitions in float64, one window, bin and band at a time."""
    rows = []
    corners = [to_hertz(m) for m in np.linspace(to_mel(0.0), to_mel(sample_rate / 2), mels + 2)]
    for start in range(0, len(audio) - window + 1, hop):
        n = np.arange(window)
        windowed = np.float64(audio[start : start + window]) * np.sin(np.pi * n / window) ** 2
        row = []
        for left, centre, right in zip(corners, corners[1:], corners[2:], strict=False):
            energy = 0.0
            for k in range(fft_size // 2 + 1):
                height = np.interp(k * sample_rate / fft_size, [left, centre, right], [0, 1, 0], left=0, right=0)
                if height:
                    energy += height * abs(np.sum(windowed * np.exp(-2j * np.pi * k * n / fft_size))) ** 2
            row.append(np.log(floor + energy * (2 / (right - left) if unit_area else 1)))
        rows.append(row)
    return np.array(rows)


SCALES = {
    "htk": (lambda f: 1127.01048 * np.log1p(f / 700), lambda m: 700 * np.expm1(m / 1127.01048), False),
    "slaney": (
        lambda f: f / (200 / 3) if f < 1000 else 15 + np.log(f / 1000) / (np.log(6.4) / 27),
        lambda m: m * 200 / 3 if m < 15 else 1000 * np.exp((m - 15) * np.log(6.4) / 27),
        True,
    ),
}


@pytest.mark.parametrize("scale", SCALES)
def test_log_mel_features_match_their_definition(scale):
    audio = RANDOM.normal(size=(2, 700)).astype(np.float32)
    options = {"window": 200, "hop": 80, "mels": 20}
    got = log_mel_spectrogram(audio, sample_rate=8000, scale=scale, floor=1e-5, **options)
    assert got.shape == (2, frame_count(700, window=200, hop=80), 20)
    want = [slow_log_mel(one, 8000, fft_size=256, floor=1e-5, **options, **_named(scale)) for one in audio]
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-4, atol=1e-4)


def _named(scale):
    return dict(zip(("to_mel", "to_hertz", "unit_area"), SCALES[scale], strict=True))


@pytest.mark.slow
def test_features_of_a_padded_batch_equal_those_of_single_clips():
    clips = [RANDOM.normal(size=samples).astype(np.float32) for samples in (900, 500)]
    front_end = log_mel_front_end(mels=16)
    padded = np.full((2, 900), np.nan, np.float32)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip
    features, lengths = jax.jit(front_end)(Utterances(padded, np.array([900, 500])))
    for row, length, clip in zip(features, lengths, clips, strict=True):
        alone = normalize_utterance(log_mel_spectrogram(clip, mels=16))
        assert length == len(alone)
        np.testing.assert_allclose(row[:length], alone, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(np.mean(alone, 0), 0, atol=1e-4)
        np.testing.assert_allclose(np.std(alone, 0), 1, rtol=1e-3)
        assert not row[length:].any()


@pytest.mark.slow
def test_normalisation_gives_masked_frames_no_gradient():
    features = jnp.asarray(RANDOM.normal(size=(2, 6, 3)), jnp.float32).at[1, 4:].set(jnp.inf)
    where = jnp.asarray(np.arange(6) < np.array([[6], [4]]))
    gradient = jax.grad(lambda x: jnp.sum(normalize_utterance(x, where) ** 3))(features)
    assert bool(jnp.isfinite(gradient).all()) and not gradient[1, 4:].any() and gradient[1, :4].any()
    assert not normalize_utterance(features, jnp.zeros((2, 6), bool)).any()


def test_masks_have_the_requested_widths_and_counts():
    features, where = jnp.ones((64, 50, 20)), jnp.asarray(np.arange(50) < np.repeat([[50], [12]], 32, axis=0))

    @jax.jit
    def masked(time_width, mel_width, time_fraction):
        return spec_augment(
            jax.random.key(0), features, where, time_masks=1, mel_masks=1, time_width=time_width, mel_width=mel_width,
            time_fraction=time_fraction,
        )  # fmt: skip

    def runs(covered):  # every mask is one run
        assert np.all(np.abs(np.diff(np.pad(covered, [(0, 0), (1, 1)]).astype(int), axis=1)).sum(1) <= 2)
        return covered.sum(1)

    gone = np.asarray(masked(10, 0, 0.5)) == 0
    widths = runs(gone.all(2))
    assert set(widths[:32]) <= set(range(11)) and max(widths[:32]) > 6 and len(set(widths)) > 5
    assert max(widths[32:]) <= 6 and not gone[32:, 12:].any()  # half of 12 frames, and none in the padding
    assert np.array_equal(gone.all(2), gone.any(2))
    widths = runs((np.asarray(masked(0, 4, 1.0)) == 0).all(1))
    assert set(widths) == {0, 1, 2, 3, 4}
    assert np.array_equal(masked(0, 0, 1.0), features)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["rnn", "gru"])
def test_recurrent_layers_equal_those_of_torch(kind, bidirectional):
    torch = pytest.importorskip("torch")
    inputs, hidden, gates = 3, 4, 3 if kind == "gru" else 1
    make, make_other = {"rnn": (rnn, torch.nn.RNN), "gru": (gru, torch.nn.GRU)}[kind]
    model = make(inputs, hidden, bidirectional=bidirectional)
    other = make_other(inputs, hidden, batch_first=True, bidirectional=bidirectional)

    def converted(suffix):
        weight = {name.removesuffix(suffix): value.detach().numpy() for name, value in other.named_parameters()}
        of_input, of_state = weight["bias_ih_l0"], weight["bias_hh_l0"]
        params = {"kernel": weight["weight_ih_l0"].T, "recurrent": weight["weight_hh_l0"].T}
        if kind == "rnn":
            return params | {"bias": of_input + of_state}
        joined = np.concatenate([of_input[: 2 * hidden] + of_state[: 2 * hidden], of_input[2 * hidden :]])
        return params | {"bias": joined, "recurrent_bias": of_state[2 * hidden :]}

    params = converted("")
    if bidirectional:
        params = jax.tree.map(lambda *both: np.stack(both), params, converted("_reverse"))
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(model.init, jax.random.key(0)))
    assert shapes == jax.tree.map(jnp.shape, params) and shapes["recurrent"][-1] == gates * hidden
    x, lengths = RANDOM.normal(size=(2, 5, inputs)).astype(np.float32), [5, 3]
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.from_numpy(x), lengths, batch_first=True)
    want, last = other(packed)
    want = torch.nn.utils.rnn.pad_packed_sequence(want, batch_first=True)[0].detach().numpy()
    where = np.arange(5) < np.array(lengths)[:, None]
    got = np.asarray(model.apply(params, (np.where(where[..., None], x, np.nan), where)))
    np.testing.assert_allclose(got[where], want[where], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        got[:, -1, :hidden], last[0].detach().numpy(), rtol=1e-5, atol=1e-5
    )  # the final state is kept
    if bidirectional:
        assert not got[1, 3:, hidden:].any()


def test_masked_steps_keep_the_state_and_get_no_gradient():
    model = gru(3, 4)
    params = jax.jit(model.init)(jax.random.key(0))
    x = RANDOM.normal(size=(6, 3)).astype(np.float32)
    where = np.array([False, True, True, False, True, False])
    gaps = np.where(where[:, None], x, np.inf)

    def last(params, x, where):
        return jnp.sum(model.apply(params, (x, where))[-1])

    value, (of_params, of_x) = jax.jit(jax.value_and_grad(last, argnums=(0, 1)))(params, gaps, where)
    want, want_of = jax.jit(jax.value_and_grad(last))(params, x[where], np.ones(3, bool))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, leaf in zip(jax.tree.leaves(of_params), jax.tree.leaves(want_of), strict=True):
        np.testing.assert_allclose(got, leaf, rtol=1e-4, atol=1e-6)
    assert not of_x[~where].any() and of_x[where].any()


@pytest.mark.slow
def test_the_encoder_ignores_padding():
    front_end = log_mel_front_end(mels=12)
    options = {"hidden": 8, "layers": 1, "kernel_sizes": (4, 3), "strides": (3, 2)}
    model, with_front_end = speech_encoder(12, 5, **options), speech_encoder(12, 5, front_end=front_end, **options)
    params = jax.jit(model.init)(jax.random.key(0))
    audio, lengths = RANDOM.normal(size=(2, 2280)).astype(np.float32), np.array([2280, 1500])

    @jax.jit
    def in_both_ways(params, noise):
        features, frames = front_end(Utterances(audio, lengths))
        there = jnp.arange(27)[None, :] < frames[:, None]
        noisy = jnp.where(there[..., None], features, noise)
        of_second = jax.grad(lambda noisy: jnp.sum(model.apply(params, Utterances(noisy, frames))[0][1, :3]))(noisy)
        alone = model.apply(params, Utterances(features[1:, :17], frames[1:]))[0]
        return with_front_end.apply(params, Utterances(audio, lengths)), alone, of_second

    (logits, paddings), alone, gradient = in_both_ways(params, jnp.nan)
    # of 27 and 17 frames: 9 and 6, then 5 and 3
    assert logits.shape == (2, 5, 5) and paddings.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    np.testing.assert_allclose(logits[1, :3], alone[0], rtol=1e-3, atol=1e-4)
    assert np.all(np.isfinite(gradient)) and not gradient[1, 17:].any() and not gradient[0].any()
    assert gradient[1, :17].any(axis=1).all()


def test_texts_become_spoken_words():
    assert spoken("For 3 press #, or *; don't wait... [beep] (a tone sounds) <beep>") == (
        "for three press pound or star don't wait"
    )
    assert spoken("[sound of monkeys screaming]") == ""


def test_speed_changes_length_and_pitch():
    time = np.arange(4000) / 8000
    fast = change_speed(np.sin(2 * np.pi * 500 * time), 1.25)
    assert len(fast) == 3200 and fast.dtype == np.float32
    np.testing.assert_allclose(fast, np.sin(2 * np.pi * 625 * time[:3200]), atol=1e-3)


def tones(count=40):
    """A distinct tone for each letter, for a tenth of a second."""
    pitch = dict(zip("abcd", (400, 900, 1700, 3000), strict=True))
    time = np.arange(800) / 8000
    texts = ["".join(text) for text in itertools.product("abcd", repeat=3)][:count]
    clips = tuple(
        np.concatenate([0.5 * np.sin(2 * np.pi * pitch[letter] * time) for letter in text]).astype(np.float32)
        for text in texts
    )
    return Speech(tuple(texts), clips, tuple(texts), 8000, {}, "made for the test", "none needed")


def test_no_two_parts_share_a_transcript():
    made = tones(20)
    twice = Speech(made.names * 2, made.clips * 2, made.transcripts * 2, *made[3:])
    parts = split_by_transcript(twice, (0.6, 0.2, 0.2), seed=1)
    assert [len(part.clips) for part in parts] == [24, 8, 8]
    for first, second in itertools.combinations(parts, 2):
        assert not set(first.transcripts) & set(second.transcripts)
    for part in parts:
        assert all(
            np.array_equal(clip, made.clips[made.names.index(name)]) for name, clip, *_ in zip(*part[:3], strict=True)
        )


@pytest.mark.slow
def test_the_task_learns_tones_and_its_sweep_equals_single_runs():
    small = {"max_seconds": 0.7, "speeds": (1.0,), "mels": 12, "hidden": 16, "layers": 1, "batch_size": 4}
    task = speech(data=tones(), epochs=12, dropout=0.0, **small)
    inputs, targets = task.train
    assert len(inputs.lengths) == 16 and inputs.lengths.max() > 48  # 32 clips, two per example
    row = decode(targets.labels[0], targets.paddings[0])
    assert len(row) == 7 and row[3] == " " and {row[:3], row[4:]} < set(tones().transcripts)
    train = task.make_train(evaluate=None)
    hparams = {"learning_rate": jnp.array([0.003, 0.02]), "weight_decay": jnp.zeros(2)}
    keys = jax.random.split(jax.random.key(0), 2)
    over_rates = jax.vmap(train, in_axes=({"learning_rate": 0, "weight_decay": 0}, None))
    _, trace = jax.jit(jax.vmap(over_rates, in_axes=(None, 0)))(hparams, keys)
    assert trace.loss.shape == (2, 2, 48)
    assert float(trace.loss[:, 1, -4:].mean()) < 0.6 * float(trace.loss[:, 1, :4].mean())
    lone_state, lone_trace = jax.jit(train)(jax.tree.map(lambda leaf: leaf[1], hparams), keys[0])
    np.testing.assert_allclose(lone_trace.loss, trace.loss[0, 1], rtol=2e-3, atol=1e-4)
    metrics = task.evaluate(lone_state.params)
    assert set(metrics) == {"loss", "character_error_rate"} and 0 < metrics["character_error_rate"] <= 1.5
    assert task.baselines["nothing"] == 1 and 0.5 < task.baselines["most frequent character"] < 1
    assert task.show(lone_state.params).count("said:") == 3


def test_the_real_prompts():
    try:
        prompts = asterisk_prompts(5.0)
    except OSError as error:
        pytest.skip(str(error))
    assert len(prompts.clips) == len(prompts.transcripts) == len(prompts.names) == 501
    assert dict(prompts.left_out) == {"no speech": 17, "number": 2, "too long": 48}
    assert set("".join(prompts.transcripts)) <= set(" 'abcdefghijklmnopqrstuvwxyz")
    assert 13 < sum(map(len, prompts.clips)) / 8000 / 60 < 15
    assert all(
        clip.dtype == np.float32 and len(clip) <= 40000 and 0 < np.abs(clip).max() <= 1 for clip in prompts.clips
    )
    assert prompts.transcripts[prompts.names.index("vm-repeat")] == "press five to repeat the current message"


def test_errors_name_the_cure():
    with pytest.raises(ValueError, match="at least window=200 samples"):
        log_mel_spectrogram(jnp.zeros(100))
    with pytest.raises(ValueError, match="fft_size must be even and >= window=200, got 128"):
        log_mel_spectrogram(jnp.zeros(1000), fft_size=128)
    with pytest.raises(ValueError, match="mels=80 bands are too many for 65 bins"):
        mel_filters(80, 65, sample_rate=8000)
    with pytest.raises(ValueError, match="scale must be one of htk, slaney; got 'bark'"):
        mel_filters(8, 65, sample_rate=8000, scale="bark")
    with pytest.raises(TypeError, match="where must be boolean, got float32"):
        normalize_utterance(jnp.zeros((3, 2)), jnp.ones(3))
    with pytest.raises(ValueError, match="time_fraction must be in"):
        spec_augment(jax.random.key(0), jnp.zeros((3, 2)), time_fraction=1.5)
    with pytest.raises(ValueError, match=r"where must have shape \(4,\), got \(3,\)"):
        gru(2, 2).apply({}, (jnp.zeros((4, 2)), jnp.ones(3, bool)))
    with pytest.raises(ValueError, match="must have one length"):
        speech_encoder(4, 3, strides=(2,))
    with pytest.raises(TypeError, match="takes Utterances"):
        speech_encoder(4, 3).apply({}, jnp.zeros((1, 9, 4)))
    with pytest.raises(ValueError, match="max_seconds must be above 0, got 0"):
        asterisk_prompts(0)
    with pytest.raises(ValueError, match="no clip longer than max_seconds=0.2"):
        speech(data=tones(), max_seconds=0.2)
    with pytest.raises(ValueError, match="speed must be above 0, got 0"):
        change_speed(np.zeros(3), 0)
