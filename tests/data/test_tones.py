"""Sounds hold the digits that are said about them, and what is held out never appears in training."""

import itertools
import random

import numpy as np

from data.audio import read_audio
from data.scenes import HELD_OUT_START
from data.tones import NOVEL, PITCHES, PLACES, Tones, document, encode, make_tones, questions

TRAIN = [make_tones(0, i) for i in range(1500)]
HELD_OUT = [make_tones(0, HELD_OUT_START + i) for i in range(1500)]


def heard(data: bytes) -> tuple[int, ...]:
    """The digits of a file: its loud stretches, and the pitch at which each one's spectrum is largest."""
    samples = read_audio(data, "tones")
    width = 160
    energy = np.sqrt((samples[: len(samples) // width * width].reshape(-1, width) ** 2).mean(axis=1))
    loud = np.concatenate([[False], energy > 0.3 * energy.max(), [False]])
    edges = np.flatnonzero(loud[1:] != loud[:-1]).reshape(-1, 2)
    digits = []
    for start, stop in edges * width:
        spectrum = np.abs(np.fft.rfft(samples[start:stop] * np.hanning(stop - start), 2**15))
        hertz = spectrum.argmax() * 16_000 / 2**15
        digits.append(int(np.argmin([abs(np.log(hertz / pitch)) for pitch in PITCHES])))
    return tuple(digits)


def text_of(tones: Tones, seed: int = 0) -> str:
    return "".join(piece.text for piece in document(tones, random.Random(seed)))


def pairs(digits: tuple[int, ...]) -> set[tuple[int, int]]:
    return set(itertools.pairwise(digits))


def test_a_sound_depends_on_seed_and_index_alone():
    random.seed(5)
    assert make_tones(0, 7) == TRAIN[7]
    assert make_tones(1, 7) != TRAIN[7]
    assert encode(TRAIN[7]) == encode(make_tones(0, 7))


def test_a_novel_pair_begins_and_ends_with_every_digit_once():
    assert sorted(a for a, _ in NOVEL) == sorted(b for _, b in NOVEL) == list(range(10))


def test_training_holds_every_pair_but_the_novel_ones():
    seen = set().union(*(pairs(tones.digits) for tones in TRAIN))
    assert not seen & NOVEL
    assert len(seen) == 100 - len(NOVEL)


def test_held_out_sounds_are_novel_or_seen_by_turns():
    for tones in HELD_OUT:
        assert bool(pairs(tones.digits) & NOVEL) == tones.novel() == (tones.index % 2 == 0)


def test_files_sound_as_the_answers_say():
    for tones in TRAIN[:150] + HELD_OUT[:150]:
        digits = heard(encode(tones))
        assert digits == tones.digits
        for ask in questions(tones):
            if ask.attribute == "digits":
                assert ask.answers == (" ".join(map(str, digits)),)
                assert ask.novel == bool(pairs(digits) & NOVEL)
                continue
            place = next(i for i, name in enumerate(PLACES) if name in ask.wordings[0])
            assert ask.answers == (str(digits[place]), f"it is {digits[place]}")
            beside = pairs(digits[max(place - 1, 0) : place + 2])
            assert ask.novel == bool(pairs(digits) & NOVEL)
            assert not ask.novel or beside & NOVEL


def test_documents_ask_and_answer_truly():
    for tones in TRAIN[:300]:
        said = " ".join(map(str, tones.digits))
        lines = text_of(tones, tones.index).splitlines()
        assert 2 <= len(lines) <= 3
        assert sum(said in line for line in lines if "first" not in line) >= 1
        for line in lines:
            question, _, answer = line.partition("? ")
            if answer:
                ask = next(ask for ask in questions(tones) if f"{question}?" in ask.wordings)
                assert answer in ask.answers


def test_sounds_fit_a_window_of_128_frames():
    assert max(tones.seconds for tones in TRAIN + HELD_OUT) < 1.28
    assert {len(tones.digits) for tones in TRAIN} == {2, 3, 4}
