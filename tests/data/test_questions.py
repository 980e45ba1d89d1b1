"""Held-out questions can be answered from the picture, clip or sound, and not without it."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from data.config import AudioSpec, ImageSpec, MediaSpec, VideoSpec
from data.images import layout, read_image, tiles
from data.media import Media
from data.questions import Question, heldout_questions
from data.scene_text import ATTRIBUTES, questions
from data.scenes import HELD_OUT_START, draw, make_scene
from data.tokenizer import BEGIN_OF_TEXT
from trainer.evaluate import prompt_of


@pytest.fixture(scope="module")
def asked(config, media, dataset):
    return heldout_questions("scenes", config, media, dataset.tokenizer, 360)


def test_they_are_the_same_at_every_call(config, media, dataset, asked):
    assert heldout_questions("scenes", config, media, dataset.tokenizer, 360) == asked


def test_a_shorter_list_is_the_beginning_of_a_longer_one(config, media, dataset, asked):
    assert heldout_questions("scenes", config, media, dataset.tokenizer, 50) == asked[:50]


def test_each_is_about_another_held_out_scene(asked):
    assert len({question.index for question in asked}) == len(asked)
    assert min(question.index for question in asked) >= HELD_OUT_START


def test_every_attribute_is_asked_novel_and_seen(asked):
    counts = Counter((question.attribute, question.novel_combination) for question in asked)
    assert set(counts) == {(attribute, novel) for attribute in ATTRIBUTES for novel in (False, True)}
    assert min(counts.values()) >= 15


def picture(question: Question) -> Image.Image:
    return read_image(question.file.data, "the question's")


def test_prompts_are_the_picture_and_the_question(image, dataset, asked):
    special = dataset.tokenizer.special
    for question in asked:
        cut, canvas = tiles(picture(question), image)
        prefix = [special[BEGIN_OF_TEXT], *(special[name] for name in layout(canvas, image))]
        assert list(question.prompt_tokens[: len(prefix)]) == prefix
        assert dataset.tokenizer.decode(question.prompt_tokens) == question.text
        assert list(question.prompt_tokens).count(special["<|patch|>"]) == len(cut) * image.tokens_per_tile


def test_answers_and_novelty_are_the_scenes_own(config, image, asked):
    for question in asked:
        scene = make_scene(config.seed, question.index, image)
        assert picture(question).tobytes() == draw(scene).tobytes()
        asks = [ask for ask in questions(scene) if question.text in ask.wordings]
        assert len({ask.answers for ask in asks}) == 1
        assert asks[0].answers == question.answers
        assert question.novel_combination == any(thing.novel for thing in asks[0].about)


def test_the_commonest_answer_is_right_as_often_as_chance_says(config, media, dataset):
    """The best guess that sees which attribute is asked for, but not the picture."""
    many = heldout_questions("scenes", config, media, dataset.tokenizer, 1800)
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


SPEC = MediaSpec(ImageSpec(32, tokens_per_tile=4, max_tiles=4), VideoSpec(1.0, 8), AudioSpec(48, 128, 16))


@pytest.fixture(scope="module", params=["clips", "tones"])
def heard(request, config, dataset):
    return heldout_questions(request.param, config, SPEC, dataset.tokenizer, 200)


def test_clips_and_sounds_are_asked_about_novel_and_seen_by_turns(config, dataset, heard):
    assert [question.novel_combination for question in heard] == [True, False] * 100
    assert all(question.index >= HELD_OUT_START for question in heard)
    assert len({question.index for question in heard}) == len(heard)
    assert heldout_questions(heard[0].source, config, SPEC, dataset.tokenizer, 30) == heard[:30]
    assert {q.attribute for q in heard} == {"clips": {"motion"}, "tones": {"digits", "digit"}}[heard[0].source]


def test_chance_of_clips_and_sounds_is_that_of_the_best_guess(heard):
    chance = {(q.attribute, q.novel_combination): q.chance for q in heard}
    for attribute, most in {"motion": 0.19, "digit": 0.13, "digits": 0.05}.items():
        for novel in (True, False):
            assert 0 < chance.get((attribute, novel), most) <= most, (attribute, novel)


def test_prompts_of_clips_and_sounds_have_room_for_their_files(dataset, heard):
    tokenizer = dataset.tokenizer
    media = Media(SPEC, tokenizer)
    for question in heard[:20]:
        prompt = prompt_of(question, media, tokenizer)
        ids = media.ids(question.file.kind, question.facts)
        assert prompt.tokens[1 : 1 + len(ids)].tolist() == ids.tolist()
        assert tokenizer.decode(prompt.tokens[1 + len(ids) :].tolist()) == question.text
        blocks = prompt.tiles if question.source == "clips" else prompt.audio_frames
        places = prompt.image_positions if question.source == "clips" else prompt.audio_positions
        name = "<|patch|>" if question.source == "clips" else "<|audio|>"
        assert blocks is not None
        assert places is not None
        assert len(blocks) == len(places) == {"clips": 3, "tones": 1}[question.source]
        assert places[places >= 0].tolist() == np.flatnonzero(prompt.tokens == tokenizer.special[name]).tolist()
