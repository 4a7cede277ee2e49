"""Speech recognition on 14 minutes of telephone prompts, small enough for one processor."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax import chain

from nnlearn.data import Examples
from nnlearn.datasets.speech import Speech, asterisk_prompts, change_speed, split_by_transcript
from nnlearn.losses.arguments import weighted_mean
from nnlearn.losses.ctc import ctc_loss
from nnlearn.losses.ctc_decoding import ctc_greedy_decode
from nnlearn.losses.error_rates import edit_distance
from nnlearn.models.spectrogram import frame_count, spec_augment
from nnlearn.models.speech_encoder import Utterances, log_mel_front_end, speech_encoder
from nnlearn.optimizers import adamw
from nnlearn.schedules import warmup_cosine_decay_schedule
from nnlearn.settings import comparable
from nnlearn.tasks.task import Task
from nnlearn.transforms import clip_by_global_norm
from nnlearn.types import GradientTransformation

ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"  # class 0 is the blank, class 1 the first of these
WINDOW, HOP = 0.025, 0.010  # seconds
CHUNK = 64  # clips in one computation of features


class Transcripts(NamedTuple):
    """The transcripts of a part.

    Attributes:
      labels: classes of the characters, shape (examples, characters).
      paddings: 1 for padding and 0 for a character, shape (examples, characters).
      share: 1 over the mean length of the part's transcripts, for each example. A mean of edits over examples, times
        ``share``, is an error rate per character of the part.
    """

    labels: np.ndarray
    paddings: np.ndarray
    share: np.ndarray


def speech(
    *,
    seed: int = 0,
    data: Speech | None = None,
    max_seconds: float = 5.0,
    speeds: Sequence[float] = (0.9, 1.0, 1.1, 0.95, 1.0, 1.05),
    mels: int = 40,
    hidden: int = 128,
    layers: int = 2,
    dropout: float = 0.2,
    batch_size: int = 12,
    epochs: int = 8,
) -> Task:
    """Transcribe telephone prompts of one speaker, 14 minutes, by connectionist temporal classification.

    The validation and test parts, 10 % each, have no transcript of the training part, though many of its words. The
    training part holds every clip at several speeds. Most clips are short and a batch has one length, so each training
    example concatenates as many clips as fit, in random order; the other parts have one clip per example.

    Baselines: an empty transcript, and the most frequent character repeated to the right length.

    Args:
      seed: seed of the split and of the order of clips.
      data: clips and transcripts; None for ``asterisk_prompts(max_seconds)``.
      max_seconds: length of an example in seconds.
      speeds: playback speeds of the training clips; an epoch has each clip at each speed.
      mels: number of bands of the log-mel features.
      hidden, layers, dropout: arguments of ``speech_encoder``.
      batch_size: number of examples in a batch.
      epochs: passes over the training part.

    Raises:
      OSError: if the data cannot be fetched.
      ValueError: if a clip of ``data`` is longer than ``max_seconds``.
    """
    data = asterisk_prompts(max_seconds) if data is None else data
    samples = round(max_seconds * data.sample_rate)
    if max(map(len, data.clips)) > samples:
        raise ValueError(f"data must hold no clip longer than max_seconds={max_seconds}; leave it out or raise that")
    parts = split_by_transcript(data, (0.8, 0.1, 0.1), seed=seed)
    window, hop = round(WINDOW * data.sample_rate), round(HOP * data.sample_rate)
    front_end = jax.jit(log_mel_front_end(sample_rate=data.sample_rate, mels=mels, window=window, hop=hop))
    count_frames = functools.partial(frame_count, window=window, hop=hop)
    features = functools.partial(_features, front_end=front_end, samples=samples, count_frames=count_frames)
    train = _in_rows([features(_at_speed(parts.train, speed)) for speed in speeds], parts.train, seed)
    validation, test = (_alone(features(part), part) for part in parts[1:])
    model = speech_encoder(mels, len(ALPHABET) + 1, hidden=hidden, layers=layers, dropout=dropout)
    loss_fn, metrics_fn = _objective(model)
    steps = epochs * -(-len(train.inputs.lengths) // batch_size)
    return Task(
        name="speech",
        train=train,
        validation=validation,
        test=test,
        model=model,
        loss_fn=loss_fn,
        metrics_fn=metrics_fn,
        metric="character_error_rate",
        mode="min",
        target=0.4,
        baselines={"nothing": 1.0, "most frequent character": _most_frequent_character(parts.train, parts.test)},
        make_tx=functools.partial(_warmed_adamw, steps=steps),
        hparams={"learning_rate": 3e-3, "weight_decay": 0.01},
        batch_size=batch_size,
        epochs=epochs,
        source=data.source,
        licence=data.licence,
        show=functools.partial(_show, model=model, test=test, transcripts=parts.test.transcripts),
    )


@comparable
def _objective(model):
    """The loss per character, and metrics with the character error rate."""

    def forward(params, batch, x, key=None):
        logits, paddings = model.apply(params, Utterances(x, batch.examples.inputs.lengths), key)
        targets = batch.examples.targets
        return logits, paddings, ctc_loss(logits, paddings, targets.labels, targets.paddings) * targets.share

    def loss_fn(params, batch, key):
        mask_key, model_key = jax.random.split(key)
        x, lengths = batch.examples.inputs
        where = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
        x = spec_augment(mask_key, x.astype(jnp.float32), where, time_masks=6, time_width=15, mel_width=6)
        return weighted_mean(forward(params, batch, x, model_key)[2], None, batch.where)

    def metrics_fn(params, batch):
        logits, paddings, costs = forward(params, batch, batch.examples.inputs.features.astype(jnp.float32))
        found, targets = ctc_greedy_decode(logits, paddings), batch.examples.targets
        edits = edit_distance(found.labels, found.label_paddings, targets.labels, targets.paddings)
        return {
            "loss": weighted_mean(costs, None, batch.where),
            "character_error_rate": weighted_mean(edits * targets.share, None, batch.where),
        }

    return loss_fn, metrics_fn


def _show(params, model_state=None, *, model, test: Examples, transcripts: Sequence[str]) -> str:
    """The transcripts and the model's output for a short, a medium and a long clip of the test part."""
    order = np.argsort([len(text) for text in transcripts], kind="stable")
    rows = order[[len(order) // 4, len(order) // 2, 3 * len(order) // 4]]
    inputs = test.inputs._replace(features=test.inputs.features.astype(np.float32))
    found = ctc_greedy_decode(*model.apply(params, jax.tree.map(lambda leaf: leaf[rows], inputs)))
    heard = map(decode, np.asarray(found.labels), np.asarray(found.label_paddings))
    pairs = zip(rows, heard, strict=True)
    return "\n".join(f"said:  {transcripts[row]}\nheard: {text}" for row, text in pairs)


def encode(text: str) -> list[int]:
    """The classes of a text's characters.

    >>> encode("a b")
    [3, 1, 4]
    """
    return [ALPHABET.index(character) + 1 for character in text]


def decode(labels: np.ndarray, paddings: np.ndarray) -> str:
    """The text of classes whose padding is 0.

    >>> decode(np.array([3, 1, 4, 0]), np.array([0, 0, 0, 1]))
    'a b'
    """
    return "".join(ALPHABET[label - 1] for label, padding in zip(labels, paddings, strict=True) if not padding)


def _at_speed(part: Speech, speed: float) -> Speech:
    return part._replace(clips=tuple(change_speed(clip, speed) for clip in part.clips))


def _features(part: Speech, *, front_end: Callable, samples: int, count_frames: Callable) -> Utterances:
    """The log-mel features of all clips, padded to one length and stored in half precision, which suffices."""
    lengths = np.array([len(clip) for clip in part.clips], np.int32)
    features = []
    for first in range(0, len(lengths), CHUNK):
        audio = np.zeros((CHUNK, samples), np.float32)
        for row, clip in zip(audio, part.clips[first : first + CHUNK], strict=False):
            row[: len(clip)] = clip[:samples]
        sizes = np.zeros(CHUNK, np.int32)
        sizes[: len(lengths[first : first + CHUNK])] = lengths[first : first + CHUNK]
        features.append(np.asarray(front_end(_utterances(audio, sizes)).features, np.float16))
    return _utterances(np.concatenate(features)[: len(lengths)], np.asarray(count_frames(lengths)))


def _utterances(features: Any, lengths: Any) -> Utterances:
    """``Utterances`` on the host."""
    return Utterances(features, lengths)


def _alone(features: Utterances, part: Speech) -> Examples:
    """Examples of one clip each."""
    return Examples(features, _transcripts([encode(text) for text in part.transcripts]))


def _in_rows(versions: Sequence[Utterances], part: Speech, seed: int) -> Examples:
    """Examples of as many clips as fit, with a space between their transcripts.

    Each clip goes into the first example with room. Clips that are too long, as slow ones can be, are left out.
    """
    random = np.random.default_rng(seed)
    features, lengths, labels = [], [], []
    for version in versions:
        for row in _first_fit(np.asarray(version.lengths), version.features.shape[1], random):
            joined = np.concatenate([version.features[clip, : version.lengths[clip]] for clip in row])
            lengths.append(len(joined))
            features.append(np.pad(joined, [(0, version.features.shape[1] - len(joined)), (0, 0)]))
            labels.append(encode(" ".join(part.transcripts[clip] for clip in row)))
    return Examples(_utterances(np.stack(features), np.array(lengths, np.int32)), _transcripts(labels))


def _first_fit(lengths: np.ndarray, room: int, random: np.random.Generator) -> list[list[int]]:
    """Pack items in random order into rows of a total length of at most ``room``; returns the items of each row.

    >>> _first_fit(np.array([3, 2, 2, 9]), 5, np.random.default_rng(0))
    [[2, 0], [1]]
    """
    rows, free = [], []
    for item in random.permutation(np.flatnonzero(lengths <= room)):
        row = next((row for row, left in enumerate(free) if left >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(room)
        rows[row].append(int(item))
        free[row] -= lengths[item]
    return rows


def _transcripts(texts: list[list[int]]) -> Transcripts:
    lengths = np.array([len(text) for text in texts])
    paddings = (np.arange(lengths.max())[None, :] >= lengths[:, None]).astype(np.float32)
    labels = np.zeros(paddings.shape, np.int32)
    labels[paddings == 0] = np.concatenate(texts)
    return Transcripts(labels, paddings, np.full(len(texts), 1 / lengths.mean(), np.float32))


def _most_frequent_character(train: Speech, test: Speech) -> float:
    """The error rate of repeating the most frequent character: every other character is a substitution."""
    guess = max(ALPHABET, key="".join(train.transcripts).count)
    text = "".join(test.transcripts)
    return 1 - text.count(guess) / len(text)


def _warmed_adamw(hparams: Mapping[str, Any], *, steps: int) -> GradientTransformation:
    warmup = max(1, steps // 20)
    schedule = warmup_cosine_decay_schedule(0.0, hparams["learning_rate"], warmup, max(steps, warmup + 1))
    return chain(clip_by_global_norm(1.0), adamw(schedule, b2=0.98, weight_decay=hparams["weight_decay"]))
