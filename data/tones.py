"""Sounds to read back: two to four digits, each a tone of its own pitch, as a pure function of (seed, index).

Training sounds have the indices 0, 1, ...; held-out sounds start at `scenes.HELD_OUT_START`. Ten ordered pairs of
digits, each digit once the first and once the second, follow each other in held-out sounds only: in those with an even
index, which always hold at least one.
"""

import io
import itertools
import random
from dataclasses import dataclass

import numpy as np
import soundfile

from data.ask import Ask, lines
from data.scene_text import Piece
from data.scenes import HELD_OUT_START

PITCHES = tuple(300.0 * 1.25**digit for digit in range(10))
"""Hz of each digit: 300 to 2,235, a major third apart."""
NOVEL = frozenset((digit, (digit + 3) % 10) for digit in range(10))
"""The ordered pairs of neighbouring digits that no training sound has."""
RATE = 8000
"""Samples a second."""
PLACES = ("first", "second", "third", "fourth")

_NUMBERS = ("none", "one", "two", "three", "four")
_FADE = 0.01


@dataclass(frozen=True)
class Tone:
    """One digit of a sound."""

    digit: int
    start: float
    """Seconds from the beginning."""
    seconds: float
    hertz: float
    level: float
    """Amplitude; full scale is 1."""
    phase: float
    """Radians."""


@dataclass(frozen=True)
class Tones:
    """What a sound holds."""

    index: int
    tones: tuple[Tone, ...]
    seconds: float
    noise: float
    """Standard deviation of the noise."""
    noise_seed: int

    @property
    def digits(self) -> tuple[int, ...]:
        return tuple(tone.digit for tone in self.tones)

    def novel(self, place: int | None = None) -> bool:
        """Whether it has a pair that training lacks; of a place, whether its digit is in one."""
        pairs = enumerate(itertools.pairwise(self.digits))
        return any(pair in NOVEL and place in (None, i, i + 1) for i, pair in pairs)


def make_tones(seed: int, index: int) -> Tones:
    """The sound of this index, at most 1.28 s long."""
    rng = random.Random(f"tones/{seed}/{index}")
    novel = index >= HELD_OUT_START and index % 2 == 0
    count = rng.choice((2, 3, 4))
    digits = [rng.randrange(10)]
    while len(digits) < count:
        digits.append(rng.choice([d for d in range(10) if (digits[-1], d) not in NOVEL]))
    if novel:
        at = rng.randrange(count - 1)
        digits[at + 1] = (digits[at] + 3) % 10
    level, time, tones = rng.uniform(0.1, 0.7), rng.uniform(0.0, 0.04), []
    for digit in digits:
        seconds = rng.uniform(0.18, 0.23)
        hertz = PITCHES[digit] * rng.uniform(0.985, 1.015)
        tones.append(Tone(digit, time, seconds, hertz, level * rng.uniform(0.7, 1.3), rng.uniform(0, 2 * np.pi)))
        time += seconds + rng.uniform(0.04, 0.07)
    return Tones(index, tuple(tones), time, level * rng.uniform(0.01, 0.06), rng.getrandbits(32))


def sound(tones: Tones) -> np.ndarray:
    """float64 [samples]."""
    samples = np.random.default_rng(tones.noise_seed).normal(0, tones.noise, round(tones.seconds * RATE))
    for tone in tones.tones:
        first, count = round(tone.start * RATE), round(tone.seconds * RATE)
        time = np.arange(count) / RATE
        fade = np.clip(np.minimum(time, time[::-1]) / _FADE, 0, 1)
        samples[first : first + count] += fade * tone.level * np.sin(2 * np.pi * tone.hertz * time + tone.phase)
    return np.clip(samples, -1, 1)


def encode(tones: Tones) -> bytes:
    """The sound as a FLAC file."""
    file = io.BytesIO()
    soundfile.write(file, sound(tones), RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def questions(tones: Tones) -> list[Ask]:
    """Every question about a sound, in a fixed order; of a novel one none about digits beside the novel pair."""
    novel, said = tones.novel(), " ".join(map(str, tones.digits))
    asks = [Ask("digits", "digits", ("what digits do you hear?", "which digits are played?"), (said,), novel)]
    for i, digit in enumerate(tones.digits):
        if tones.novel(i) or not novel:
            forms = (f"what is the {PLACES[i]} digit?", f"which digit is the {PLACES[i]}?")
            asks.append(Ask("digit", "digit", forms, (str(digit), f"it is {digit}"), novel))
    return asks


def document(tones: Tones, rng: random.Random) -> list[Piece]:
    """The text that follows the sound: a question about a digit or two, about all of them, or a caption."""
    every, *single = questions(tones)
    asked = rng.sample(single, rng.randint(1, 2))
    said = " ".join(map(str, tones.digits))
    captions = (f"The tones say {said}.\n", f"You hear {_NUMBERS[len(tones.digits)]} digits: {said}.\n")
    if rng.random() < 0.2:
        return [*lines(asked, rng), Piece(rng.choice(captions))]
    return [*lines([*asked, every] if rng.random() < 0.7 else [every, *asked], rng)]
