"""Recorded telephone prompts with transcripts: real speech, small enough for one processor."""

import gzip
import re
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnlearn.data import Split, split
from nnlearn.datasets.packages import unpack_debian_package

SOUNDS_PACKAGE = (
    "asterisk-core-sounds-en-wav",
    "pool/main/a/asterisk-core-sounds/asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
    "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
)
TRANSCRIPTS_PACKAGE = (
    "asterisk-core-sounds-en",
    "pool/main/a/asterisk-core-sounds/asterisk-core-sounds-en_1.6.1-1_all.deb",
    "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
)
SAMPLE_RATE = 8000  # of all prompts, in hertz
SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"

NOTE = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>")  # "[sound of monkeys screaming]", "(10 seconds of silence)"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPOKEN = {**{str(digit): word for digit, word in enumerate(DIGITS)}, "*": "star", "#": "pound"}


class Speech(NamedTuple):
    """Recordings with their transcripts; names, clips and transcripts have one length.

    Attributes:
      names: the name of each clip.
      clips: float32 arrays of shape (samples,) in [-1, 1).
      transcripts: text of lowercase letters, spaces and apostrophes.
      sample_rate: samples per second.
      left_out: by reason, the number of clips that were left out.
      source, licence: the source and the licence of the recordings.
    """

    names: tuple[str, ...]
    clips: tuple[np.ndarray, ...]
    transcripts: tuple[str, ...]
    sample_rate: int
    left_out: Mapping[str, int]
    source: str
    licence: str

    def take(self, rows: np.ndarray) -> "Speech":
        """The clips of these rows."""
        return self._replace(
            names=tuple(self.names[row] for row in rows),
            clips=tuple(self.clips[row] for row in rows),
            transcripts=tuple(self.transcripts[row] for row in rows),
        )


def asterisk_prompts(max_seconds: float = 6.0) -> Speech:
    """The English prompts of the Asterisk telephone exchange, read by one speaker at 8 kHz.

    The data set is small: 568 clips of 25 minutes in total, one voice, no noise, and recurring phrases of telephony. It
    shows whether a recogniser learns at all; a model trained on it does not recognise other speakers.

    Clips are left out if they have no speech (silence, tones, monkeys), if their text does not determine the spoken
    words (numbers of several digits: "1234" can be read in many ways), or if they are longer than ``max_seconds``.

    Args:
      max_seconds: length of the longest clip to keep, > 0.

    Returns:
      ``Speech``, ordered by name.

    Raises:
      ValueError: if ``max_seconds`` is not above 0.
      OSError: if the packages cannot be fetched.

    >>> speech = asterisk_prompts()  # doctest: +SKIP
    >>> len(speech.clips), dict(speech.left_out), speech.transcripts[0]  # doctest: +SKIP
    (516, {'no speech': 17, 'number': 2, 'too long': 33}, 'activated')
    """
    if not max_seconds > 0:
        raise ValueError(f"max_seconds must be above 0, got {max_seconds!r}")
    sounds = unpack_debian_package(*SOUNDS_PACKAGE) / SOUNDS
    texts = _read_texts(unpack_debian_package(*TRANSCRIPTS_PACKAGE) / TRANSCRIPTS)
    names, clips, transcripts = [], [], []
    left_out = {"no speech": 0, "number": 0, "too long": 0}
    for path in sorted(sounds.rglob("*.wav")):
        name = path.relative_to(sounds).with_suffix("").as_posix()
        text, clip = texts[name], read_wave(path)
        if not spoken(text):
            left_out["no speech"] += 1
        elif re.search(r"\d\d", NOTE.sub(" ", text)):
            left_out["number"] += 1
        elif len(clip) > max_seconds * SAMPLE_RATE:
            left_out["too long"] += 1
        else:
            names.append(name)
            clips.append(clip)
            transcripts.append(spoken(text))
    return Speech(
        tuple(names),
        tuple(clips),
        tuple(transcripts),
        SAMPLE_RATE,
        left_out,
        source="Asterisk core sounds, English, read by Allison Smith, from Debian's asterisk-core-sounds-en-wav, and "
        "their transcripts, from asterisk-core-sounds-en",
        licence="CC BY-SA 3.0 (Digium and Allison Smith)",
    )


def spoken(text: str) -> str:
    """Convert written text to spoken words: lowercase letters, spaces and apostrophes, without notes in brackets.

    >>> spoken("Press 1 to list.  At the tone, don't hang up [beep]. 3D; A.M.")
    "press one to list at the tone don't hang up three d a m"
    """
    text = NOTE.sub(" ", text).lower().replace("’", "'")
    text = "".join(f" {SPOKEN[character]} " if character in SPOKEN else character for character in text)
    return " ".join(re.sub(r"[^a-z']", " ", text).split())


def read_wave(path: Path) -> np.ndarray:
    """Read the samples of a mono 16-bit wave file at 8 kHz, float32 in [-1, 1).

    Raises:
      ValueError: if the file has another format.
    """
    with wave.open(str(path)) as opened:
        form = (opened.getnchannels(), opened.getsampwidth(), opened.getframerate())
        if form != (1, 2, SAMPLE_RATE):
            raise ValueError(f"{path} must be mono, with 2 bytes per sample at {SAMPLE_RATE} Hz, got {form}")
        samples = opened.readframes(opened.getnframes())
    return np.frombuffer(samples, "<i2").astype(np.float32) / 32768


def split_by_transcript(speech: Speech, fractions: tuple[float, float, float], *, seed: int = 0) -> Split:
    """Split into three parts without common transcripts, so that memorising one part does not help on another.

    Args:
      speech: the clips.
      fractions: fractions of the different transcripts for train, validation and test; see ``nnlearn.data.split``.
      seed: seed of the split.

    Returns:
      A ``Split`` of three ``Speech``.

    >>> speech = Speech(tuple("abc"), (np.zeros(1),) * 3, ("hello", "bye", "hello"), 8000, {}, "", "")
    >>> parts = split_by_transcript(speech, (0.5, 0.5, 0.0))
    >>> sorted(part.transcripts for part in parts)
    [(), ('bye',), ('hello', 'hello')]
    """
    different, which = np.unique(np.array(speech.transcripts), return_inverse=True)
    parts = split(np.arange(len(different)), fractions, seed=seed)
    return Split(*(speech.take(np.flatnonzero(np.isin(which, part))) for part in parts))


def _read_texts(path: Path) -> dict[str, str]:
    """Texts by file name, from lines ``name: text``; a semicolon begins a comment."""
    with gzip.open(path, "rt", encoding="utf-8") as opened:
        lines = [line for line in opened if ":" in line and not line.startswith(";")]
    return {name.strip(): text.strip() for name, text in (line.split(":", 1) for line in lines)}


def change_speed(clip: np.ndarray, speed: float) -> np.ndarray:
    """Play a clip faster, which shortens it and raises its pitch by the factor ``speed``.

    The clip is resampled through its Fourier transform.

    Args:
      clip: samples, shape (samples,).
      speed: the factor, > 0.

    Returns:
      Samples as float32 of shape (round(samples / speed),).

    Raises:
      ValueError: if ``speed`` is not above 0.

    Source: Ko et al. 2015, "Audio augmentation for speech recognition", Interspeech.

    >>> tone = np.sin(2 * np.pi * np.arange(80) / 8)
    >>> bool(np.abs(change_speed(tone, 2.0) - tone[::2]).max() < 1e-6)
    True
    """
    if not speed > 0:
        raise ValueError(f"speed must be above 0, got {speed!r}")
    samples = max(1, round(len(clip) / speed))
    spectrum = np.zeros(samples // 2 + 1, complex)
    original = np.fft.rfft(clip)[: len(spectrum)]
    spectrum[: len(original)] = original
    shorter = min(samples, len(clip))
    if shorter % 2 == 0 and samples != len(clip):  # the Nyquist bin is one of a conjugate pair in the longer clip
        spectrum[shorter // 2] *= 2 if samples < len(clip) else 0.5
    return (np.fft.irfft(spectrum, samples) * (samples / len(clip))).astype(np.float32)
