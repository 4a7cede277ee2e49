"""Speech to characters, on a quarter of an hour of telephone prompts: small enough for one processor."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

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

ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"  # class 0 is the blank, class 1 the first of these
WINDOW, HOP = 0.025, 0.010  # seconds
CHUNK = 64  # clips whose features are made at once


class Transcripts(NamedTuple):
    """What is said: classes of shape (examples, characters), 1 where there is none, and one number for each example.

    ``share`` is 1 over the mean length of the part's transcripts: a mean of errors over examples, times it, is an error
    per character of the part.
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
    """Characters of spoken telephone prompts, by connectionist temporal classification; one speaker, 14 minutes.

    No transcript of the validation or the test part, 10 % each, occurs in training, though many of their words do.
    The training part holds every clip at several speeds. As most clips are short, and a batch has one length, the
    clips of the training part are put one after another, as many as fit, in random order; the other parts' stand alone.

    Baselines: saying nothing, and the commonest character as often as there are characters.

    Args:
      seed: of the split, and of the order of clips.
      data: clips and transcripts; None for ``asterisk_prompts(max_seconds)``.
      max_seconds: the length of an example.
      speeds: that each clip of the training part is played at; an epoch hears each.
      mels: bands of the log-mel features.
      hidden, layers, dropout: of the ``speech_encoder``.
      batch_size: examples in a batch.
      epochs: passes over the training part.
    """
    data = asterisk_prompts(max_seconds) if data is None else data
    samples = round(max_seconds * data.sample_rate)
    if max(map(len, data.clips)) > samples:
        raise ValueError(f"data must hold no clip longer than max_seconds={max_seconds}; leave it out or raise that")
    parts = split_by_transcript(data, (0.8, 0.1, 0.1), seed=seed)
    sizes = {"window": round(WINDOW * data.sample_rate), "hop": round(HOP * data.sample_rate)}
    front_end = jax.jit(log_mel_front_end(sample_rate=data.sample_rate, mels=mels, **sizes))
    features = functools.partial(_features, front_end=front_end, samples=samples, sizes=sizes)
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
        goal="min",
        target=0.4,
        baselines={"nothing": 1.0, "commonest character": _commonest_character(parts.train, parts.test)},
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
    """The loss to learn by, per character, and the error rate to look at."""

    def answer(params, batch, x, key=None):
        logits, paddings = model.apply(params, Utterances(x, batch.examples.inputs.lengths), key)
        targets = batch.examples.targets
        return logits, paddings, ctc_loss(logits, paddings, targets.labels, targets.paddings) * targets.share

    def loss_fn(params, batch, key):
        mask_key, model_key = jax.random.split(key)
        x, lengths = batch.examples.inputs
        where = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
        x = spec_augment(mask_key, x.astype(jnp.float32), where, time_masks=6, time_width=15, mel_width=6)
        return weighted_mean(answer(params, batch, x, model_key)[2], None, batch.where)

    def metrics_fn(params, batch):
        logits, paddings, costs = answer(params, batch, batch.examples.inputs.features.astype(jnp.float32))
        found, targets = ctc_greedy_decode(logits, paddings), batch.examples.targets
        edits = edit_distance(found.labels, found.label_paddings, targets.labels, targets.paddings)
        return {
            "loss": weighted_mean(costs, None, batch.where),
            "character_error_rate": weighted_mean(edits * targets.share, None, batch.where),
        }

    return loss_fn, metrics_fn


def _show(params, model_state=None, *, model, test: Examples, transcripts: Sequence[str]) -> str:
    """Three clips of the test part, a short, a middling and a long one: what is said, and what the model hears."""
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
    """The text of classes, without those whose padding is 1.

    >>> decode(np.array([3, 1, 4, 0]), np.array([0, 0, 0, 1]))
    'a b'
    """
    return "".join(ALPHABET[label - 1] for label, padding in zip(labels, paddings, strict=True) if not padding)


def _at_speed(part: Speech, speed: float) -> Speech:
    return part._replace(clips=tuple(change_speed(clip, speed) for clip in part.clips))


def _features(part: Speech, *, front_end, samples: int, sizes: dict[str, int]) -> Utterances:
    """The log-mel features of all clips, padded to one length; half precision is more than they need."""
    lengths = np.array([len(clip) for clip in part.clips], np.int32)
    features = []
    for first in range(0, len(lengths), CHUNK):
        audio = np.zeros((CHUNK, samples), np.float32)
        for row, clip in zip(audio, part.clips[first : first + CHUNK], strict=False):
            row[: len(clip)] = clip[:samples]
        there = np.zeros(CHUNK, np.int32)
        there[: len(lengths[first : first + CHUNK])] = lengths[first : first + CHUNK]
        features.append(np.asarray(front_end(Utterances(audio, there)).features, np.float16))
    return Utterances(np.concatenate(features)[: len(lengths)], np.asarray(frame_count(lengths, **sizes)))


def _alone(features: Utterances, part: Speech) -> Examples:
    """Every clip an example."""
    return Examples(features, _transcripts([encode(text) for text in part.transcripts]))


def _in_rows(versions: Sequence[Utterances], part: Speech, seed: int) -> Examples:
    """Clips one after another, as many as fit into an example, a space between their transcripts.

    Each goes into the first row that has room; one that is too long, as slow ones may be, goes nowhere.
    """
    random = np.random.default_rng(seed)
    features, lengths, labels = [], [], []
    for version in versions:
        for row in _first_fit(version.lengths, version.features.shape[1], random):
            joined = np.concatenate([version.features[clip, : version.lengths[clip]] for clip in row])
            lengths.append(len(joined))
            features.append(np.pad(joined, [(0, version.features.shape[1] - len(joined)), (0, 0)]))
            labels.append(encode(" ".join(part.transcripts[clip] for clip in row)))
    return Examples(Utterances(np.stack(features), np.array(lengths, np.int32)), _transcripts(labels))


def _first_fit(lengths: np.ndarray, room: int, random: np.random.Generator) -> list[list[int]]:
    """Rows of things that are together no longer than ``room``, in random order.

    >>> _first_fit(np.array([3, 2, 2, 9]), 5, np.random.default_rng(0))
    [[2, 0], [1]]
    """
    rows, free = [], []
    for thing in random.permutation(np.flatnonzero(lengths <= room)):
        row = next((row for row, left in enumerate(free) if left >= lengths[thing]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(room)
        rows[row].append(int(thing))
        free[row] -= lengths[thing]
    return rows


def _transcripts(texts: list[list[int]]) -> Transcripts:
    lengths = np.array([len(text) for text in texts])
    paddings = (np.arange(lengths.max())[None, :] >= lengths[:, None]).astype(np.float32)
    labels = np.zeros(paddings.shape, np.int32)
    labels[paddings == 0] = np.concatenate(texts)
    return Transcripts(labels, paddings, np.full(len(texts), 1 / lengths.mean(), np.float32))


def _commonest_character(train: Speech, test: Speech) -> float:
    """The error rate of one character repeated, as often as there are characters: all the others are replaced."""
    guess = max(ALPHABET, key="".join(train.transcripts).count)
    text = "".join(test.transcripts)
    return 1 - text.count(guess) / len(text)


def _warmed_adamw(hparams, *, steps: int):
    warmup = max(1, steps // 20)
    schedule = warmup_cosine_decay_schedule(0.0, hparams["learning_rate"], warmup, max(steps, warmup + 1))
    return chain(clip_by_global_norm(1.0), adamw(schedule, b2=0.98, weight_decay=hparams["weight_decay"]))
