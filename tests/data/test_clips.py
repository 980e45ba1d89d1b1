"""Clips show what is said about them, only their motion says which way, and what is held out never appears in training."""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from data.clips import (
    DIRECTIONS,
    FRAMES,
    FRAMES_PER_SECOND,
    NOVEL,
    TRAVEL,
    Clip,
    document,
    draw,
    encode,
    make_clip,
    questions,
)
from data.scenes import COLOURS, HELD_OUT_START, SHAPES
from data.scenes import NOVEL as NOVEL_THINGS
from data.video import probe_video, read_frames

SIDE = 48
TRAIN = [make_clip(0, i, SIDE) for i in range(1500)]
HELD_OUT = [make_clip(0, HELD_OUT_START + i, SIDE) for i in range(1500)]
TIMES = [round(1000 * i / FRAMES_PER_SECOND) for i in range(FRAMES)]


def text_of(clip: Clip, seed: int = 0) -> str:
    return "".join(piece.text for piece in document(clip, random.Random(seed)))


def test_a_clip_depends_on_seed_and_index_alone():
    random.seed(5)
    assert make_clip(0, 7, SIDE) == TRAIN[7]
    assert make_clip(1, 7, SIDE) != TRAIN[7]
    assert encode(TRAIN[7]) == encode(make_clip(0, 7, SIDE))


def test_the_file_holds_every_frame_to_the_pixel():
    for clip in TRAIN[:10]:
        data = encode(clip)
        facts = probe_video(data, "clip")
        assert (facts.duration_ms, facts.height, facts.width, facts.frames) == (2500, SIDE, SIDE, FRAMES)
        for i, frame in enumerate(read_frames(data, TIMES, "clip")):
            np.testing.assert_array_equal(np.asarray(frame), np.asarray(draw(clip, i)))


def test_novel_combinations_have_every_direction_once():
    assert sorted(direction for _, direction in NOVEL) == sorted(DIRECTIONS)


def test_training_shows_no_novel_combination_of_clips_nor_of_scenes():
    seen = {(clip.shape, clip.direction) for clip in TRAIN}
    assert not seen & NOVEL
    assert len(seen) == len(SHAPES) * len(DIRECTIONS) - len(NOVEL)
    for clip in TRAIN + HELD_OUT:
        assert (clip.colour, clip.shape) not in NOVEL_THINGS


def test_held_out_clips_are_novel_or_seen_by_turns():
    for clip in HELD_OUT:
        assert ((clip.shape, clip.direction) in NOVEL) == clip.novel == (clip.index % 2 == 0)


def middle(frame: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of what is not background."""
    background = np.median(frame.reshape(-1, 3), axis=0)
    rows, columns = np.nonzero(np.abs(frame.astype(float) - background).max(axis=2) > 40)
    return np.array([columns.mean(), rows.mean()])


def direction_of(frames: list[np.ndarray]) -> str:
    """Told from pixels alone."""
    moved = middle(frames[-1]) - middle(frames[0])
    ways = [0 if abs(along) < 3 else int(np.sign(along)) for along in moved]
    return next(name for name, way in DIRECTIONS.items() if way == tuple(ways))


def place_of(at: np.ndarray) -> str:
    return f"{('top', 'bottom')[int(at[1] > SIDE / 2)]} {('left', 'right')[int(at[0] > SIDE / 2)]}"


def test_shapes_move_as_the_answers_say():
    for clip in TRAIN[:150] + HELD_OUT[:150]:
        frames = [np.asarray(frame) for frame in read_frames(encode(clip), TIMES[::FRAMES_PER_SECOND], "clip")]
        moved = direction_of(frames)
        asked = [ask for ask in questions(clip) if ask.attribute == "motion"]
        assert len(asked) == 2
        for ask in asked:
            assert set(ask.answers) == {moved, f"it moves {moved}"}
            assert ask.novel == ((clip.shape, moved) in NOVEL)
        places = [ask for ask in questions(clip) if ask.attribute == "place"]
        assert [ask.answers[0] for ask in places] == [place_of(middle(frames[0])), place_of(middle(frames[-1]))]
        x, y = (int(at) for at in clip.centre(0))
        if clip.shape != "ring":
            assert np.abs(frames[0][y, x].astype(int) - COLOURS[clip.colour]).max() < 60


def test_documents_ask_and_answer_truly():
    for clip in TRAIN[:200]:
        lines = text_of(clip, clip.index).splitlines()
        captions = [line for line in lines if "?" not in line]
        assert len(lines) == 5
        assert [line.split(" something ", 1)[1] for line in captions] == [
            f"that moves {clip.direction}, a {clip.colour} {clip.shape}."
        ]
        for line in lines:
            question, _, answer = line.partition("? ")
            if answer:
                ask = next(ask for ask in questions(clip) if f"{question}?" in ask.wordings)
                assert answer in ask.answers


@pytest.mark.parametrize(("frame", "expected"), [(0, 1 / 3), (FRAMES // 2, 5 / 12), (FRAMES - 1, 1 / 3)])
def test_a_single_frame_does_not_say_which_way(frame, expected):
    """The best guess from where the shape is in one frame; three times chance, 1/2, is above it."""
    places: dict[tuple[int, ...], Counter[str]] = defaultdict(Counter)
    for i in range(20_000):
        clip = make_clip(0, i, SIDE)
        places[tuple(round(at / SIDE * 4) for at in clip.centre(frame))][clip.direction] += 1
    best = sum(max(ways.values()) for ways in places.values()) / 20_000
    assert best == pytest.approx(expected, abs=0.03)


def test_another_size_scales_the_drawing():
    clip = make_clip(0, 3, 28)
    assert draw(clip, 0).size == (28, 28)
    assert 0.33 * 28 < clip.size < 0.39 * 28
    assert abs(np.subtract(clip.centre(FRAMES - 1), clip.centre(0))).max() == pytest.approx(TRAVEL * 28)
