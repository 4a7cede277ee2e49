"""An acoustic model for CTC: strided convolutions that reduce the frame rate, then recurrent layers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count
from nnlearn.models.convolution import conv
from nnlearn.models.factory import model_factory
from nnlearn.models.inputs import check_features, to_floating
from nnlearn.models.layers import dense, layer_norm
from nnlearn.models.layers import dropout as dropout_layer
from nnlearn.models.named import activation_function
from nnlearn.models.recurrent import gru
from nnlearn.models.spectrogram import frame_count, log_mel_spectrogram, normalize_utterance
from nnlearn.types import DTypeLike, Model, Scalar


class Utterances(NamedTuple):
    """Utterances padded to a common length.

    Attributes:
      features: shape (batch, frames, features); or samples, shape (batch, samples), for a model with a front end.
      lengths: integers of shape (batch,), the number of valid frames or samples; padding comes after them.
    """

    features: jax.Array
    lengths: jax.Array


@model_factory
def speech_encoder(
    features: int,
    classes: int,
    *,
    hidden: int = 192,
    layers: int = 2,
    kernel_sizes: Sequence[int] = (9, 5),
    strides: Sequence[int] = (3, 1),
    activation: str | Callable[[jax.Array], jax.Array] = "gelu",
    dropout: Scalar = 0.1,
    front_end: Callable[[Utterances], Utterances] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Model[tuple[jax.Array, jax.Array]]:
    """A speech recogniser for ``ctc_loss``: convolutions over time, then bidirectional recurrent layers.

    ::

        x = dropout(activation(norm(conv(x))))       for each of kernel_sizes
        x = x + dropout(norm(bidirectional_gru(x)))  for each of layers; without x + in the first
        logits = dense(x)

    Args:
      features: number of features per frame, such as mel bands.
      classes: number of characters plus the blank.
      hidden: channels of the convolutions, and size of the recurrent state in each direction.
      layers: number of recurrent layers.
      kernel_sizes, strides: of each convolution. The number of frames is divided by all strides; CTC needs one frame
        per character, and one more between equal neighbours.
      activation: a function of one array or its name; see ``activation_function``.
      dropout: the fraction of the activations dropped in training, in [0, 1); may be traced.
      front_end: a function from samples to features inside the model, such as ``log_mel_front_end``; None if the inputs
        are features.
      dtype: the dtype of the parameters.

    Returns:
      A model from ``Utterances`` to ``(logits, paddings)`` as ``ctc_loss`` takes them: shapes (batch, frames', classes)
      and (batch, frames'), where 1 marks padding and ``frames'`` is ``frames`` divided by each stride in turn, rounded
      up. Neither the values nor the amount of padding have an effect. The params are ``{"convolutions": (layer, ...),
      "recurrent": (layer, ...), "output": layer}``.

    Raises:
      ValueError: if a size is below 1, the numbers of strides and kernel sizes differ, or a name is unknown; in
        ``apply``, if an array has the wrong shape.
      TypeError: in ``apply``, if the inputs are not ``Utterances``, or the lengths are not integers.

    Source: Graves, Fernandez, Gomez and Schmidhuber 2006, ICML; Amodei et al. 2016, Deep Speech 2, arXiv:1512.02595.

    >>> model = speech_encoder(40, 29, hidden=16)
    >>> run = lambda key: model.apply(model.init(key), Utterances(jnp.ones((2, 90, 40)), jnp.array([90, 60])))
    >>> logits, paddings = jax.eval_shape(run, jax.random.key(0))
    >>> logits.shape, paddings.shape
    ((2, 30, 29), (2, 30))
    """
    layers, hidden = check_count("layers", layers), check_count("hidden", hidden)
    kernel_sizes, strides = tuple(kernel_sizes), tuple(strides)
    if not kernel_sizes or len(kernel_sizes) != len(strides):
        raise ValueError(f"kernel_sizes {kernel_sizes} and strides {strides} must have one length of at least 1")
    function, drop = activation_function(activation), dropout_layer(dropout)
    convolutions = [
        _convolution(hidden if index else features, hidden, size, stride, dtype)
        for index, (size, stride) in enumerate(zip(kernel_sizes, strides, strict=True))
    ]
    recurrent = [gru(2 * hidden if i else hidden, hidden, bidirectional=True, dtype=dtype) for i in range(layers)]
    norm, wide_norm = layer_norm(hidden, dtype=dtype), layer_norm(2 * hidden, dtype=dtype)
    output = dense(2 * hidden, classes, dtype=dtype)
    name = f"speech_encoder({features}, {classes})"

    def init(key):
        convolution_key, recurrent_key, output_key = jax.random.split(key, 3)

        def with_norm(parts, norm, key):
            keys = jax.random.split(key, len(parts))
            return tuple({**part.init(k), "norm": norm.init(k)} for part, k in zip(parts, keys, strict=True))

        return {
            "convolutions": with_norm(convolutions, norm, convolution_key),
            "recurrent": with_norm(recurrent, wide_norm, recurrent_key),
            "output": output.init(output_key),
        }

    def apply(params, inputs, key=None):
        if not isinstance(inputs, Utterances):
            raise TypeError(f"{name} takes Utterances(features, lengths), got {type(inputs).__name__}")
        x, lengths = inputs if front_end is None else front_end(inputs)
        x, where = to_floating(x), _where(name, x, lengths)
        check_features(name, features, x)
        count = len(convolutions) + layers
        keys = iter([None] * count if key is None else jax.random.split(key, count))
        for layer, part, stride in zip(convolutions, params["convolutions"], strides, strict=True):
            x = layer.apply(part, jnp.where(where[..., None], x, 0))
            x = drop.apply({}, function(norm.apply(part["norm"], x)), next(keys))
            lengths = -(-jnp.asarray(lengths) // stride)
            where = _where(name, x, lengths)
        for index, (layer, part) in enumerate(zip(recurrent, params["recurrent"], strict=True)):
            y = drop.apply({}, wide_norm.apply(part["norm"], layer.apply(part, (x, where))), next(keys))
            x = x + y if index else y
        return output.apply(params["output"], x), (~where).astype(x.dtype)

    return Model(init, apply)


def log_mel_front_end(*, normalize: bool = True, **options: Any) -> Callable[[Utterances], Utterances]:
    """A front end from samples to log-mel features, ``front_end(utterances) -> utterances``.

    Args:
      normalize: whether to standardise each band of each utterance, see ``normalize_utterance``.
      **options: keyword arguments of ``log_mel_spectrogram``.

    Returns:
      A function from ``Utterances`` of samples, shape (batch, samples), to ``Utterances`` of features, shape (batch,
      frames, mels); lengths in samples become lengths in frames. It raises as ``log_mel_spectrogram`` does.

    >>> front_end = log_mel_front_end(window=200, hop=80)
    >>> features, lengths = front_end(Utterances(jnp.ones((2, 8000)), jnp.array([8000, 4000])))
    >>> features.shape, lengths.tolist()
    ((2, 98, 40), [98, 48])
    """
    sizes = {"window": 200, "hop": 80} | {name: options[name] for name in ("window", "hop") if name in options}

    def front_end(utterances: Utterances) -> Utterances:
        audio, samples = utterances
        audio = jnp.where(_where("log_mel_front_end", audio[..., None], samples), audio, 0)
        features, lengths = log_mel_spectrogram(audio, **options), frame_count(jnp.asarray(samples), **sizes)
        where = _where("log_mel_front_end", features, lengths)
        features = normalize_utterance(features, where) if normalize else jnp.where(where[..., None], features, 0)
        return Utterances(features, lengths)

    return front_end


def _convolution(inputs: int, outputs: int, size: int, stride: int, dtype: DTypeLike) -> Model:
    # Explicit padding, as that of "SAME" would depend on the padded length and shift the frames.
    padding = [((size - 1) // 2, size // 2)]
    return conv(inputs, outputs, size, stride=stride, padding=padding, dimensions=1, kernel_init="he", dtype=dtype)


def _where(name: str, x: jax.Array, lengths: jax.Array) -> jax.Array:
    """The mask of valid frames, shape (batch, frames)."""
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name} takes integer lengths, got {lengths.dtype.name} of shape {lengths.shape}")
    if jnp.ndim(x) != 3 or lengths.shape != x.shape[:1]:
        raise ValueError(f"{name} takes features (batch, time, features) and lengths (batch,), got {jnp.shape(x)} and "
                         f"{lengths.shape}")  # fmt: skip
    return jnp.arange(x.shape[1])[None, :] < lengths[:, None]
