"""Log-mel spectrograms of audio, their normalisation, and SpecAugment."""

import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_count, check_nonnegative, check_number
from nnlearn.models.inputs import along_last_axis, to_floating, where_or_all
from nnlearn.models.scaling import scale_to_one
from nnlearn.sharding.axes import automatic_axes
from nnlearn.tree import as_hyperparam, compute_dtype, safe_divide, safe_rsqrt
from nnlearn.types import Key, Scalar


def mel_filters(
    mels: int,
    bins: int,
    *,
    sample_rate: float,
    low: float = 0.0,
    high: float | None = None,
    scale: Literal["htk", "slaney"] = "htk",
) -> np.ndarray:
    """Triangular filters from the bins of a spectrum to mel bands.

    The corners are equally spaced in mel: ``2595 log10(1 + f / 700)`` (``"htk"``), or ``3 f / 200`` below 1 kHz and
    ``15 + 27 log(f / 1000) / log(6.4)`` above (``"slaney"``). Each triangle has height 1 (``"htk"``), or area 1 over
    hertz (``"slaney"``).

    Args:
      mels: number of bands.
      bins: number of bins of the spectrum, from 0 to half the sample rate.
      sample_rate: in hertz.
      low, high: the lowest and highest frequency, in hertz; by default up to half the sample rate.
      scale: the mel scale.

    Returns:
      A NumPy float64 array of shape (bins, mels).

    Raises:
      ValueError: if the frequencies are not 0 <= low < high <= sample_rate / 2, the scale is unknown, or a band lies
        between two bins and would always be empty.

    Source: Davis and Mermelstein 1980, IEEE Trans. ASSP 28; Young et al., *The HTK Book*; Slaney 1998, *Auditory
    Toolbox*.

    >>> mel_filters(2, 5, sample_rate=8000).round(2).tolist()
    [[0.0, 0.0], [0.68, 0.32], [0.0, 0.91], [0.0, 0.45], [0.0, 0.0]]
    """
    high = sample_rate / 2 if high is None else high
    if not 0 <= low < high <= sample_rate / 2:
        raise ValueError(
            f"low={low!r} and high={high!r} must be 0 <= low < high <= sample_rate / 2 = {sample_rate / 2}"
        )
    if scale not in ("htk", "slaney"):
        raise ValueError(f"scale must be one of htk, slaney; got {scale!r}")
    to_mel, to_hertz = (_htk_mel, _htk_hertz) if scale == "htk" else (_slaney_mel, _slaney_hertz)
    corners = to_hertz(np.linspace(to_mel(low), to_mel(high), check_count("mels", mels) + 2))
    frequencies = np.linspace(0.0, sample_rate / 2, check_count("bins", bins))[:, None]
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    filters = np.maximum(
        0.0, np.minimum((frequencies - left) / (centre - left), (right - frequencies) / (right - centre))
    )
    if not np.all(filters.sum(0) > 0):
        raise ValueError(
            f"mels={mels} bands are too many for {bins} bins, some lie between two; use fewer, or a longer window"
        )
    return filters if scale == "htk" else filters * (2 / (right - left))


@overload
def frame_count(samples: int, *, window: int, hop: int) -> int: ...
@overload
def frame_count(samples: jax.Array, *, window: int, hop: int) -> jax.Array: ...
def frame_count(samples: int | jax.Array, *, window: int, hop: int) -> int | jax.Array:
    """The number of whole windows in a number of samples; for the lengths of padded clips.

    >>> frame_count(1000, window=200, hop=80), frame_count(jnp.array([199, 200, 280]), window=200, hop=80)
    (11, Array([0, 1, 2], dtype=int32))
    """
    if isinstance(samples, int):
        return max(0, (samples - window) // hop + 1)
    return jnp.maximum(0, (jnp.asarray(samples) - window) // hop + 1)


@automatic_axes(like="audio")
def log_mel_spectrogram(
    audio: jax.Array,
    *,
    sample_rate: float = 8000,
    window: int = 200,
    hop: int = 80,
    mels: int = 40,
    fft_size: int | None = None,
    low: float = 0.0,
    high: float | None = None,
    scale: Literal["htk", "slaney"] = "htk",
    floor: Scalar = 1e-6,
) -> jax.Array:
    """The logarithm of the power in each mel band of each window.

    With a Hann window ``w_n = 0.5 - 0.5 cos(2 pi n / window)`` and the filters ``F`` of ``mel_filters``::

        y[t, m] = log(floor + sum_k F[k, m] |sum_n w_n audio[t * hop + n] exp(-2 pi i k n / fft_size)|^2)

    Args:
      audio: samples, shape (..., samples). There is no padding: only whole windows are used, see ``frame_count``.
      sample_rate: in hertz.
      window, hop: samples per window and between windows; by default 25 and 10 ms at 8 kHz.
      mels: number of bands.
      fft_size: length of the Fourier transform, even and >= window; by default the next power of two.
      low, high, scale: see ``mel_filters``.
      floor: added to the power before the logarithm, > 0.

    Returns:
      Shape (..., frames, mels), float32 at least.

    Raises:
      ValueError: if the audio is shorter than a window, or an argument is out of range.

    Source: Davis and Mermelstein 1980, IEEE Trans. ASSP 28.

    >>> tone = jnp.sin(2 * jnp.pi * 1000 * jnp.arange(8000) / 8000)
    >>> frames = log_mel_spectrogram(tone)
    >>> frames.shape, int(frames[0].argmax())  # the band around 1 kHz
    ((98, 40), 18)
    """
    window, hop = check_count("window", window), check_count("hop", hop)
    check_number("floor", floor, low=0.0, low_open=True)
    fft_size = 1 << (window - 1).bit_length() if fft_size is None else check_count("fft_size", fft_size)
    if fft_size < window or fft_size % 2:  # an odd size has no bin at half the sample rate, where the filters end
        raise ValueError(f"fft_size must be even and >= window={window}, got {fft_size}")
    audio = to_floating(audio)
    audio = audio.astype(compute_dtype(audio.dtype))
    frames = frame_count(audio.shape[-1], window=window, hop=hop) if audio.ndim else 0
    if not frames:
        raise ValueError(f"audio must hold at least window={window} samples in its last axis, got shape {audio.shape}")
    filters = mel_filters(mels, fft_size // 2 + 1, sample_rate=sample_rate, low=low, high=high, scale=scale)
    hann = jnp.asarray(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window), audio.dtype)
    framed = audio[..., np.arange(frames)[:, None] * hop + np.arange(window)]
    spectrum = jnp.fft.rfft(framed * along_last_axis(hann, framed), fft_size)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    # Full precision, as the logarithm amplifies errors in a quiet band next to a loud one.
    energy = jnp.matmul(power, jnp.asarray(filters, audio.dtype), precision=jax.lax.Precision.HIGHEST)
    return jnp.log(energy + as_hyperparam(floor, energy.dtype))


def normalize_utterance(features: jax.Array, where: jax.Array | None = None, eps: Scalar = 1e-5) -> jax.Array:
    """Shift each band of each utterance to mean 0 and scale it to variance 1 over time.

    Args:
      features: shape (..., frames, mels).
      where: booleans of shape (..., frames), False for padding, which becomes 0, even if it is NaN.
      eps: added to the variance, >= 0.

    Returns:
      An array like ``features``.

    Raises:
      ValueError: if ``where`` has the wrong shape, or ``eps`` is negative.
      TypeError: if ``where`` is not boolean.

    >>> normalize_utterance(jnp.array([[1.0], [3.0], [jnp.nan]]), jnp.array([True, True, False]), eps=0.0).tolist()
    [[-1.0], [1.0], [0.0]]
    """
    check_nonnegative("eps", eps)
    x = to_floating(features)
    wide = x.astype(compute_dtype(x.dtype))
    mask = where_or_all(where, x.shape[:-1])[..., None]
    wide, inverse = scale_to_one(jnp.where(mask, wide, 0), eps, (-2,))
    count = jnp.sum(mask, axis=-2, keepdims=True).astype(wide.dtype)
    centred = jnp.where(mask, wide - safe_divide(jnp.sum(wide, -2, keepdims=True), count), 0)
    variance = safe_divide(jnp.sum(jnp.square(centred), -2, keepdims=True), count)
    return (centred * safe_rsqrt(variance + as_hyperparam(eps, wide.dtype) * inverse * inverse)).astype(x.dtype)


def spec_augment(
    key: Key,
    features: jax.Array,
    where: jax.Array | None = None,
    *,
    time_masks: int = 2,
    time_width: Scalar = 20,
    time_fraction: Scalar = 1.0,
    mel_masks: int = 2,
    mel_width: Scalar = 8,
) -> jax.Array:
    """SpecAugment: set random intervals of time and of bands to 0, independently for each utterance.

    A mask over time is ``t0 <= t < t0 + w`` with the width ``w`` uniform in ``{0, ..., time_width}`` but at most
    ``time_fraction`` of the valid frames, and ``t0`` uniform where the mask fits; likewise over bands. 0 is the mean of
    normalised features.

    Args:
      key: the random key.
      features: shape (..., frames, mels).
      where: booleans of shape (..., frames), False for padding, which must come last.
      time_masks, mel_masks: number of masks; 0 for none.
      time_width, mel_width: the largest width of a mask, in frames and in bands, >= 0; may be traced.
      time_fraction: the largest fraction of an utterance that one mask over time covers, in [0, 1]; may be traced.

    Returns:
      An array like ``features``.

    Raises:
      ValueError: if an argument is out of range, or ``where`` has the wrong shape.

    Source: Park et al. 2019, SpecAugment, arXiv:1904.08779, without the time warp.

    >>> masked = jax.jit(spec_augment)(jax.random.key(0), jnp.ones((4, 100, 40)))
    >>> masked.shape, bool((masked == 0).any()), float(masked.max())
    ((4, 100, 40), True, 1.0)
    """
    check_nonnegative("time_width", time_width)
    check_nonnegative("mel_width", mel_width)
    check_number("time_fraction", time_fraction, low=0.0, high=1.0)
    x = to_floating(features)
    frames = jnp.sum(where_or_all(where, x.shape[:-1]), axis=-1)
    widest = jnp.minimum(as_hyperparam(time_width, jnp.float32), as_hyperparam(time_fraction, jnp.float32) * frames)
    bands = jnp.full(frames.shape, x.shape[-1])
    # One draw, as several small ones are slower to compile and run; of fractions, so that bounds may be traced.
    fractions = jax.random.uniform(key, (2, time_masks + mel_masks, *frames.shape))
    time_fractions, mel_fractions = fractions[:, :time_masks], fractions[:, time_masks:]
    kept_time = _kept(time_fractions, x.shape[-2], frames, widest)
    kept_mel = _kept(mel_fractions, x.shape[-1], bands, jnp.broadcast_to(jnp.asarray(mel_width), bands.shape))
    return jnp.where(kept_time[..., :, None] & kept_mel[..., None, :], x, 0)


def _kept(fractions: jax.Array, length: int, count: jax.Array, widest: jax.Array) -> jax.Array:
    """The positions that no mask covers, booleans of shape (*count.shape, length)."""
    for_width, for_start = fractions
    count, widest = jnp.broadcast_to(count, for_width.shape), jnp.broadcast_to(widest, for_width.shape)
    largest = jnp.floor(widest * (1 + 1e-6))  # 0.1 * 30 is a little less than 3
    width = jnp.minimum(jnp.floor(for_width * (largest + 1)).astype(jnp.int32), count)
    start = jnp.floor(for_start * (count - width + 1)).astype(jnp.int32)
    place = along_last_axis(jnp.arange(length), jnp.zeros((*for_width.shape, 1)))
    covered = (place >= start[..., None]) & (place < (start + width)[..., None])
    return ~jnp.any(covered, axis=0)


def _htk_mel(hertz):
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def _htk_hertz(mel):
    return 700 * (10 ** (mel / 2595) - 1)


def _slaney_mel(hertz):
    hertz = np.asarray(hertz, np.float64)
    return np.where(hertz < 1000, 3 * hertz / 200, 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / math.log(6.4))


def _slaney_hertz(mel):
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((np.maximum(mel, 15) - 15) * math.log(6.4) / 27))
