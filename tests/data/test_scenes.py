"""Scenes are drawn as they are described, and what is held out never appears in training."""

import dataclasses
import itertools
import random
import re
from collections import Counter

import numpy as np
import pytest

from data.config import ImageSpec
from data.scene_text import ATTRIBUTES, document, normalise, questions
from data.scenes import COLOURS, HELD_OUT_START, NOVEL, SHAPES, WORDS, Scene, draw, make_scene

TILE = 48
IMAGE = ImageSpec(TILE, tokens_per_tile=4, max_tiles=4)
TRAIN = [make_scene(0, i, IMAGE) for i in range(1500)]
HELD_OUT = [make_scene(0, HELD_OUT_START + i, IMAGE) for i in range(1500)]


def text_of(scene: Scene, seed: int = 0) -> str:
    return "".join(piece.text for piece in document(scene, random.Random(seed)))


def test_a_scene_depends_on_seed_and_index_alone():
    random.seed(5)
    assert make_scene(0, 7, IMAGE) == TRAIN[7]
    assert make_scene(1, 7, IMAGE) != TRAIN[7]
    np.testing.assert_array_equal(np.asarray(draw(TRAIN[7])), np.asarray(draw(make_scene(0, 7, IMAGE))))


def test_novel_combinations_have_every_colour_and_shape_once():
    assert sorted(colour for colour, _ in NOVEL) == sorted(COLOURS)
    assert sorted(shape for _, shape in NOVEL) == sorted(SHAPES)


def test_training_shows_and_names_no_novel_combination():
    for scene in TRAIN:
        assert not any(thing.novel for thing in scene.things)
        for colour, shape in NOVEL:
            assert f"{colour} {shape}" not in text_of(scene)
    seen = {(thing.colour, thing.shape) for scene in TRAIN for thing in scene.things}
    assert len(seen) == len(COLOURS) * len(SHAPES) - len(NOVEL)


def test_held_out_scenes_are_novel_or_seen_by_turns():
    for scene in HELD_OUT:
        assert any(thing.novel for thing in scene.things) == (scene.index % 2 == 0)


def test_things_stay_inside_and_apart():
    for scene in TRAIN + HELD_OUT:
        for thing in scene.things:
            (x, y), r = thing.centre, thing.side / 2
            assert -0.5 <= x - r < x + r <= scene.width + 0.5
            assert -0.5 <= y - r < y + r <= scene.height + 0.5
            assert (thing.row, thing.column) == (int(y * 2 > scene.height), int(x * 2 > scene.width))
        assert len({(thing.row, thing.column) for thing in scene.things}) == len(scene.things)
        if scene.word:
            assert all(thing.row != scene.word_row for thing in scene.things)


def test_a_few_scenes_are_two_tiles_and_none_if_images_are_not_cut():
    sizes = Counter((scene.width, scene.height) for scene in TRAIN)
    assert set(sizes) == {(TILE, TILE), (2 * TILE, TILE), (TILE, 2 * TILE)}
    assert 0.05 < 1 - sizes[TILE, TILE] / len(TRAIN) < 0.12
    uncut = dataclasses.replace(IMAGE, max_tiles=1)
    assert {(s.width, s.height) for s in (make_scene(0, i, uncut) for i in range(300))} == {(TILE, TILE)}


def test_pictures_show_the_colours_where_the_scene_says():
    for scene in TRAIN[:200] + HELD_OUT[:200]:
        pixels = np.asarray(draw(scene)).astype(int)
        assert pixels.shape == (scene.height, scene.width, 3)
        assert np.abs(pixels[:2, :2] - scene.background).max() <= 1 or scene.things
        for thing in scene.things:
            dx = 0.75 * thing.side / 2 if thing.shape == "ring" else 0.0
            x, y = round(thing.centre[0] + dx - 0.5), round(thing.centre[1] - 0.5)
            assert np.abs(pixels[y, x] - thing.rgb).max() <= 40, (scene.index, thing)


def test_words_are_readable_dark_on_light():
    for scene in TRAIN:
        if scene.word:
            half = np.asarray(draw(scene).convert("L"))[scene.word_row * scene.height // 2 :][: scene.height // 2]
            assert half.min() < 110 < half.max()
            columns = np.flatnonzero((half < 150).any(axis=0))
            assert columns[0] >= 1
            assert columns[-1] <= scene.width - 2, f"{scene.word} is cut off"


def truth(scene: Scene, question: str) -> set[str]:
    """The true values for a question, worked out from its words and the scene, apart from the code that asks."""
    corners = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}
    if re.fullmatch(r"what does the text say\?|which word is written\?", question):
        return {scene.word}
    if match := re.fullmatch(r"how many (\w+) (?:are there|do you see)\?", question):
        shape = re.sub(r"e?s$", "", match[1]) if match[1] != "crosses" else "cross"
        shape = match[1][:-1] if match[1][:-1] in SHAPES else shape
        count = sum(shape == "object" or thing.shape == shape for thing in scene.things)
        return {str(count), ("one", "two", "three", "four")[count - 1]}
    if match := re.fullmatch(r"is the (\w+) (left or right of|above or below) the (\w+)\?", question):
        (a,) = (thing for thing in scene.things if thing.shape == match[1])
        (b,) = (thing for thing in scene.things if thing.shape == match[3])
        if match[2].startswith("left"):
            assert abs(a.centre[0] - b.centre[0]) > 2
            return {"left" if a.centre[0] < b.centre[0] else "right"}
        assert abs(a.centre[1] - b.centre[1]) > 2
        return {"above" if a.centre[1] < b.centre[1] else "below"}
    match = re.fullmatch(r"(.*?) (?:is |in )?the (.*?)(?: in)?\?", question)
    assert match, question
    words = match[2].split()
    named = [
        thing
        for thing in scene.things
        if words in ([thing.shape], [thing.colour, "object"], ["object"])
        or " ".join(words) == f"{corners[thing.row, thing.column]} object"
    ]
    assert len(named) == 1, f"{question} is ambiguous"
    thing = named[0]
    for start, values in {
        ("what colour", "which colour"): {thing.colour},
        ("what shape", "which shape"): {thing.shape},
        ("how big", "what size"): {"small", "little"} if thing.side < 0.37 * TILE else {"large", "big"},
        ("where", "which corner"): {
            corners[int(thing.centre[1] * 2 > scene.height), int(thing.centre[0] * 2 > scene.width)]
        },
    }.items():
        if match[1].startswith(start):
            return values
    raise AssertionError(question)


def value_of(answer: str) -> str:
    return re.sub(r"^(it is a|it says|it is|there is|there are|at the|in the|a) ", "", answer)


def test_every_answer_is_true():
    asked = Counter()
    for scene in TRAIN[:600] + HELD_OUT[:600]:
        for ask in questions(scene):
            for wording in ask.wordings:
                assert {value_of(answer) for answer in ask.answers} == truth(scene, wording), (scene.index, wording)
                asked[ask.attribute] += 1
    assert set(asked) == set(ATTRIBUTES)


def test_documents_ask_and_answer_truly_and_caption_every_object():
    for scene in TRAIN[:300]:
        lines = text_of(scene).splitlines()
        captions = [line for line in lines if "?" not in line]
        assert len(captions) == 1
        for thing in scene.things:
            corner = f"{('top', 'bottom')[thing.row]} {('left', 'right')[thing.column]}"
            sizes = {"small": "small|little", "large": "large|big"}[thing.size]
            assert re.search(rf"a ({sizes}) {thing.colour} {thing.shape} (at|in) the {corner}", captions[0])
        assert not scene.word or captions[0].count(scene.word) == 1
        assert 2 <= len(lines) - 1 <= 7
        for line in lines:
            if "?" in line:
                question, answer = re.findall(r"(.*\?) (.*)", line)[0]
                assert value_of(answer) in truth(scene, question)


def test_answers_come_in_several_ways():
    ways = Counter()
    for scene in TRAIN[:600]:
        for before, piece in itertools.pairwise(document(scene, random.Random(scene.index))):
            assert (before.weight < 1) == before.text.endswith("?")
            if before.text.endswith("?"):
                ways[piece.text.strip() == value_of(piece.text.strip())] += 1
    assert 0.2 < ways[False] / ways.total() < 0.6


def test_every_word_is_written_somewhere():
    assert {scene.word for scene in TRAIN} == {"", *WORDS}


@pytest.mark.parametrize(
    ("answer", "expected"), [(" It is  Red.", "it is red"), ("two!", "two"), ("top left ,", "top left"), ("", "")]
)
def test_answers_are_compared_without_case_spaces_and_full_stops(answer, expected):
    assert normalise(answer) == expected


@pytest.mark.parametrize("tile_size", [28, 64])
def test_other_tile_sizes_scale_the_drawing(tile_size):
    scene = make_scene(0, 3, dataclasses.replace(IMAGE, tile_size=tile_size))
    assert draw(scene).size == (scene.width, scene.height)
    assert all(0.25 * tile_size < thing.side < 0.5 * tile_size for thing in scene.things)
    assert (scene.height / tile_size, scene.width / tile_size) in ((1, 1), (1, 2), (2, 1))
