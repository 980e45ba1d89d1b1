"""Held-out questions can be answered from the picture, and not without it."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from data.images import layout, tiles
from data.questions import heldout_questions
from data.scene_text import ATTRIBUTES, questions
from data.scenes import HELD_OUT_START, draw, make_scene
from data.tokenizer import BEGIN_OF_TEXT


@pytest.fixture(scope="module")
def asked(config, image, dataset):
    return heldout_questions(config, image, dataset.tokenizer, 360)


def test_they_are_the_same_at_every_call(config, image, dataset, asked):
    assert heldout_questions(config, image, dataset.tokenizer, 360) == asked


def test_a_shorter_list_is_the_beginning_of_a_longer_one(config, image, dataset, asked):
    assert heldout_questions(config, image, dataset.tokenizer, 50) == asked[:50]


def test_each_is_about_another_held_out_scene(asked):
    assert len({question.scene for question in asked}) == len(asked)
    assert min(question.scene for question in asked) >= HELD_OUT_START


def test_every_attribute_is_asked_novel_and_seen(asked):
    counts = Counter((question.attribute, question.novel_combination) for question in asked)
    assert set(counts) == {(attribute, novel) for attribute in ATTRIBUTES for novel in (False, True)}
    assert min(counts.values()) >= 15


def test_prompts_are_the_picture_and_the_question(config, image, dataset, asked):
    special = dataset.tokenizer.special
    for question in asked:
        cut, canvas = tiles(question.image, image)
        prefix = [special[BEGIN_OF_TEXT], *(special[name] for name in layout(canvas, image))]
        assert list(question.prompt_tokens[: len(prefix)]) == prefix
        assert dataset.tokenizer.decode(question.prompt_tokens) == question.text
        assert list(question.prompt_tokens).count(special["<|patch|>"]) == len(cut) * image.tokens_per_tile


def test_answers_and_novelty_are_the_scenes_own(config, image, asked):
    for question in asked:
        scene = make_scene(config.seed, question.scene, image)
        assert question.image.tobytes() == draw(scene).tobytes()
        asks = [ask for ask in questions(scene) if question.text in ask.wordings]
        assert len({ask.answers for ask in asks}) == 1
        assert asks[0].answers == question.answers
        assert question.novel_combination == any(thing.novel for thing in asks[0].about)


def test_the_commonest_answer_is_right_as_often_as_chance_says(config, image, dataset):
    """The best guess that sees which attribute is asked for, but not the picture."""
    many = heldout_questions(config, image, dataset.tokenizer, 1800)
    groups = defaultdict(list)
    for question in many:
        groups[question.attribute, question.novel_combination].append(question)
    for key, group in groups.items():
        best = Counter(question.answers[0] for question in group).most_common(1)[0][1] / len(group)
        assert best < np.mean([question.chance for question in group]) + 0.11, key


def test_only_accepted_answers_are_accepted(asked):
    question = next(question for question in asked if question.attribute == "colour")
    assert all(question.accepts(f" {answer.upper()}.\nwhat shape is it?") for answer in question.answers)
    assert not question.accepts("")
    assert not question.accepts("orange")
    assert isinstance(question.image, Image.Image)
