"""Held-out questions: a picture, clip or sound, a question about it, and every accepted answer."""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass

from data import builtin, clips, scene_text, tones
from data import scenes as drawn
from data.ask import Ask
from data.config import DataConfig, MediaSpec
from data.documents import Part
from data.media import Media
from data.records import facts_of
from data.tokenizer import BEGIN_OF_TEXT, Tokenizer

_ROUNDS = {
    # twice as often about colour and shape
    "scenes": ("colour", "shape", "size", "position", "word", "colour", "shape", "count", "relation"),
    "clips": ("motion",),
    "tones": ("digits", "digit"),
}
"""Attributes in the order in which they are asked about, over and over."""
SOURCES = tuple(_ROUNDS)
"""Built-in sources that there are questions about."""


@dataclass(frozen=True)
class Question:
    """One question about one held-out picture, clip or sound."""

    file: Part
    facts: tuple[int, ...]
    """Of the file, as in an index."""
    text: str
    prompt_tokens: tuple[int, ...]
    """Begin-of-text, the file's tokens, and the question; the answer follows, to the end of the line."""
    attribute: str
    answers: tuple[str, ...]
    """Every accepted answer, normalised, the plainest first."""
    chance: float
    """Share of right answers that the best guess without the file reaches."""
    novel_combination: bool
    """What the question is about is a combination (colour and shape, shape and direction, neighbouring digits) that
    training never shows."""
    source: str
    index: int
    """Number of the document in its source."""

    def accepts(self, answer: str) -> bool:
        """Whether a generated answer is right; what follows its first line is ignored."""
        return scene_text.normalise(answer.strip().split("\n")[0]) in self.answers


def heldout_questions(
    source: str, config: DataConfig, spec: MediaSpec, tokenizer: Tokenizer, count: int
) -> list[Question]:
    """This many questions, each about another held-out document of the source while there are enough, the same ones at
    every call.

    They take turns between novel and seen combinations. Chance is the rate of the commonest answer among all held-out
    questions of the same kind and novelty: a little above one over the number of answers, and well above it where the
    answers are uneven (the commonest shape of a scene is most often there once).
    """
    rng = random.Random(f"questions/{config.seed}" if source == "scenes" else f"questions/{source}/{config.seed}")
    media, parameters = Media(spec, tokenizer), builtin.parameters_of(source, config, spec.image)
    things: list[builtin.Made] = []
    pools: dict[tuple[str, bool], list[tuple[int, Ask]]] = defaultdict(list)
    answers: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)
    for i in range(builtin.HELD_OUT):
        things.append(builtin.made(source, drawn.HELD_OUT_START + i, parameters))
        for ask in _questions(things[i]):
            pools[ask.attribute, ask.novel].append((i, ask))
            answers[ask.kind, ask.novel][ask.answers[0]] += 1
    for pool in pools.values():
        rng.shuffle(pool)

    questions: list[Question] = []
    used: set[int] = set()
    for n in range(count):
        attribute, novel = _ROUNDS[source][n // 2 % len(_ROUNDS[source])], n % 2 == 0
        pool = pools[attribute, novel]
        while len(pool) > 1 and pool[-1][0] in used:
            pool.pop()
        i, ask = pool[-1]
        used.add(i)
        text = rng.choice(ask.wordings)
        common = answers[ask.kind, novel]
        file = builtin.file_of(things[i])
        facts = facts_of(file, source)
        questions.append(
            Question(
                file=file,
                facts=facts,
                text=text,
                prompt_tokens=(
                    tokenizer.special[BEGIN_OF_TEXT],
                    *media.ids(file.kind, facts).tolist(),
                    *tokenizer.encode(scene_text.prompt(text)),
                ),
                attribute=attribute,
                answers=tuple(scene_text.normalise(answer) for answer in ask.answers),
                chance=max(common.values()) / common.total(),
                novel_combination=novel,
                source=source,
                index=things[i].index,
            )
        )
    return questions


def _questions(thing: builtin.Made) -> list[Ask]:
    """Every question about it, in a fixed order."""
    if isinstance(thing, clips.Clip):
        return clips.questions(thing)
    if isinstance(thing, tones.Tones):
        return tones.questions(thing)
    return [
        Ask(ask.attribute, ask.kind, ask.wordings, ask.answers, any(about.novel for about in ask.about))
        for ask in scene_text.questions(thing)
    ]
