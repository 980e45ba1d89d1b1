"""Held-out questions: a picture, a question about it, and every accepted answer."""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass

from PIL import Image

from data import scene_text
from data import scenes as drawn
from data.builtin import HELD_OUT_SCENES, scene_prefix
from data.config import DataConfig, ImageSpec
from data.scene_text import Ask
from data.tokenizer import Tokenizer

_ROUND = ("colour", "shape", "size", "position", "word", "colour", "shape", "count", "relation")
"""Attributes in the order in which they are asked about, over and over: twice as often about colour and shape."""


@dataclass(frozen=True)
class Question:
    """One question about one held-out picture."""

    image: Image.Image
    text: str
    prompt_tokens: tuple[int, ...]
    """Begin-of-text, the picture's tokens, and the question; the answer follows, to the end of the line."""
    attribute: str
    answers: tuple[str, ...]
    """Every accepted answer, normalised, the plainest first."""
    chance: float
    """Share of right answers that the best guess without a picture reaches."""
    novel_combination: bool
    """An object that the question is about has a (colour, shape) pair that training never shows."""
    scene: int
    """Index of the scene."""

    def accepts(self, answer: str) -> bool:
        """Whether a generated answer is right; what follows its first line is ignored."""
        return scene_text.normalise(answer.strip().split("\n")[0]) in self.answers


def heldout_questions(config: DataConfig, image: ImageSpec, tokenizer: Tokenizer, count: int) -> list[Question]:
    """This many questions, each about another held-out scene while there are enough, the same ones at every call.

    They take turns between novel and seen combinations. Chance is the rate of the commonest answer among all held-out
    questions of the same kind and novelty: a little above one over the number of answers, and well above it where the
    answers are uneven (the commonest shape of a scene is most often there once).
    """
    rng = random.Random(f"questions/{config.seed}")
    scenes: list[drawn.Scene] = []
    pools: dict[tuple[str, bool], list[tuple[int, Ask]]] = defaultdict(list)
    answers: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)
    for i in range(HELD_OUT_SCENES):
        scenes.append(drawn.make_scene(config.seed, drawn.HELD_OUT_START + i, image))
        for ask in scene_text.questions(scenes[i]):
            novel = any(thing.novel for thing in ask.about)
            pools[ask.attribute, novel].append((i, ask))
            answers[ask.kind, novel][ask.values[0]] += 1
    for pool in pools.values():
        rng.shuffle(pool)

    questions: list[Question] = []
    used: set[int] = set()
    for n in range(count):
        attribute, novel = _ROUND[n // 2 % len(_ROUND)], n % 2 == 0
        pool = pools[attribute, novel]
        while len(pool) > 1 and pool[-1][0] in used:
            pool.pop()
        i, ask = pool[-1]
        used.add(i)
        text = rng.choice(ask.wordings)
        common = answers[ask.kind, novel]
        questions.append(
            Question(
                image=drawn.draw(scenes[i]),
                text=text,
                prompt_tokens=(
                    *scene_prefix(scenes[i], image, tokenizer),
                    *tokenizer.encode(scene_text.prompt(text)),
                ),
                attribute=attribute,
                answers=tuple(scene_text.normalise(answer) for answer in ask.answers),
                chance=max(common.values()) / common.total(),
                novel_combination=novel,
                scene=scenes[i].index,
            )
        )
    return questions
