"""What is said about a drawn scene: captions, questions, and every way in which an answer may be put.

A scene document reads: begin-of-text, the picture, then question and answer lines and a caption, in one of two orders.
Most put the questions first, so that an answer can only come from the picture and not from the caption.
"""

import random
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from data.scenes import Scene, Thing

ATTRIBUTES = ("colour", "shape", "size", "position", "relation", "count", "word")

_CORNERS = (("top left", "top right"), ("bottom left", "bottom right"))
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_NUMBERS = ("none", "one", "two", "three", "four")

_ASK = {
    "colour": ("what colour is {}?", "which colour is {}?"),
    "shape": ("what shape is {}?", "which shape is {}?"),
    "size": ("how big is {}?", "what size is {}?"),
    "position": ("where is {}?", "which corner is {} in?"),
    "count": ("how many {} are there?", "how many {} do you see?"),
    "word": ("what does the text say?", "which word is written?"),
}
_SAY = {  # the first way is the commonest
    "colour": ("{}", "it is {}"),
    "shape": ("{}", "a {}", "it is a {}"),
    "size": ("{}", "it is {}"),
    "position": ("{}", "at the {}", "in the {}"),
    "relation": ("{}", "it is {}"),
    "count": ("{}", "there are {}"),
    "word": ("{}", "it says {}"),
}


class Ask(NamedTuple):
    """A question about a scene, before a wording is chosen."""

    attribute: str
    kind: str
    """Questions of one kind have the same answers, and these are equally distributed whatever the wording."""
    forms: tuple[str, ...]
    """Ways to ask, with a gap for the subject."""
    subject: str
    values: tuple[str, ...]
    """True values, the plainest first."""
    facts: frozenset[tuple[int, str]]
    """(object, attribute) pairs that the question and its answer give away together."""
    about: tuple[Thing, ...]

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every way to ask the question."""
        return tuple(form.format(self.subject) for form in self.forms)

    @property
    def answers(self) -> tuple[str, ...]:
        """Every accepted answer, the plainest first."""
        ways = _SAY[self.attribute]
        if self.attribute == "count":
            ways = (ways[0], f"there {'is' if self.values[0] == '1' else 'are'} {{}}")
        return tuple(way.format(value) for way in ways for value in self.values)


QUESTION_WEIGHT = 0.1
"""Of the words of a question as targets. Nobody can foresee what is asked, and there are more of these words than of others:
at full weight a model learns late what the pictures show."""


class Piece(NamedTuple):
    """A stretch of a document's text. Pieces are tokenised one by one."""

    text: str
    weight: float = 1.0
    """Of its tokens as targets."""


def normalise(answer: str) -> str:
    """An answer as it is compared: lower case, single spaces, no full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(".!, ")


def questions(scene: Scene) -> list[Ask]:
    """Every question that has exactly one true answer in this scene, in a fixed order."""
    return [
        *_attribute_questions(scene),
        *_relation_questions(scene),
        *_count_questions(scene),
        *_word_questions(scene),
    ]


def prompt(question: str) -> str:
    """The text of a question up to where its answer begins. The answer follows after a space and ends the line."""
    return question


def document(scene: Scene, rng: random.Random) -> list[Piece]:
    """The text that follows the picture in a scene's document: 4 to 7 questions (or all there are), and a caption."""
    caption_first = rng.random() < 0.25
    pieces = list(_caption(scene, rng)) if caption_first else []
    for ask in _choose(questions(scene), rng.randint(4, 7), rng):
        pieces.append(Piece(prompt(rng.choice(ask.wordings)), QUESTION_WEIGHT))
        plainest, *others = ask.answers
        answer = plainest if rng.random() < 0.6 else rng.choice(others)
        pieces.append(Piece(f" {answer}\n"))
    if not caption_first:
        pieces += _caption(scene, rng)
    return pieces


def _choose(asks: list[Ask], count: int, rng: random.Random) -> list[Ask]:
    """Different attributes first, then more of them; never two that give away the same facts."""
    rng.shuffle(asks)
    chosen: list[Ask] = []
    facts: set[frozenset[tuple[int, str]]] = set()
    used: Counter[str] = Counter()
    while asks and len(chosen) < count:
        ask = asks.pop(min(range(len(asks)), key=lambda i: used[asks[i].attribute]))
        if ask.facts not in facts:
            used[ask.attribute] += 1
            facts.add(ask.facts)
            chosen.append(ask)
    rng.shuffle(chosen)
    return chosen


def _caption(scene: Scene, rng: random.Random) -> Iterator[Piece]:
    yield Piece(rng.choice(("This picture shows", "Here is", "There is", "In the picture:")))
    things = rng.sample(scene.things, len(scene.things))
    phrases = []
    for thing in things:
        size = rng.choice(_SIZE_WORDS[thing.size])
        corner = _CORNERS[thing.row][thing.column]
        phrases.append(f" a {size} {thing.colour} {thing.shape} {rng.choice(('at the', 'in the'))} {corner}")
    if scene.word:
        phrases.append(rng.choice((f" the word {scene.word}", f" the text {scene.word}")))
    for i, phrase in enumerate(phrases):
        if i:
            yield Piece("," if i < len(phrases) - 1 else " and")
        yield Piece(phrase)
    yield Piece(".\n")


def _names(scene: Scene, i: int, hidden: str) -> list[tuple[str, str]]:
    """Unambiguous ways to name object i without giving away the hidden attribute: (name, attribute that it tells)."""
    thing, others = scene.things[i], [t for t in scene.things if t is not scene.things[i]]
    names = []
    if not others:
        names.append(("the object", ""))
    if hidden != "shape" and all(t.shape != thing.shape for t in others):
        names.append((f"the {thing.shape}", "shape"))
    if hidden != "colour" and all(t.colour != thing.colour for t in others):
        names.append((f"the {thing.colour} object", "colour"))
    if hidden != "position":
        names.append((f"the {_CORNERS[thing.row][thing.column]} object", "position"))
    return names


def _attribute_questions(scene: Scene) -> Iterator[Ask]:
    for i, thing in enumerate(scene.things):
        truth = {
            "colour": (thing.colour,),
            "shape": (thing.shape,),
            "size": _SIZE_WORDS[thing.size],
            "position": (_CORNERS[thing.row][thing.column],),
        }
        for attribute, values in truth.items():
            for name, told in _names(scene, i, attribute):
                facts = frozenset(((i, attribute), (i, told)))
                yield Ask(attribute, attribute, _ASK[attribute], name, values, facts, (thing,))


def _relation_questions(scene: Scene) -> Iterator[Ask]:
    """Left or right, above or below, for ordered pairs of objects of which each is the only one of its shape."""
    shapes = Counter(thing.shape for thing in scene.things)
    single = [(i, thing) for i, thing in enumerate(scene.things) if shapes[thing.shape] == 1]
    for i, a in single:
        for j, b in single:
            pair = frozenset((i, j))
            if a.column != b.column:
                form = f"is the {a.shape} left or right of the {b.shape}?"
                facts = frozenset((k, "column") for k in pair)
                yield Ask("relation", "left or right", (form,), "", (("left", "right")[a.column],), facts, (a, b))
            if a.row != b.row:
                form = f"is the {a.shape} above or below the {b.shape}?"
                facts = frozenset((k, "row") for k in pair)
                yield Ask("relation", "above or below", (form,), "", (("above", "below")[a.row],), facts, (a, b))


def _count_questions(scene: Scene) -> Iterator[Ask]:
    def values(count: int) -> tuple[str, str]:
        return str(count), _NUMBERS[count]

    facts = frozenset({(-1, "count")})
    yield Ask("count", "count of all", _ASK["count"], "objects", values(len(scene.things)), facts, scene.things)
    shape, count = Counter(thing.shape for thing in scene.things).most_common(1)[0]
    if len(scene.things) > 1:  # of the commonest shape alone: of most others there is one
        plural = f"{shape}es" if shape == "cross" else f"{shape}s"
        about = tuple(thing for thing in scene.things if thing.shape == shape)
        facts = frozenset({(-1, shape)})
        yield Ask("count", "count of a shape", _ASK["count"], plural, values(count), facts, about)


def _word_questions(scene: Scene) -> Iterator[Ask]:
    if scene.word:
        facts = frozenset({(-1, "word")})
        yield Ask("word", "word", _ASK["word"], "", (scene.word,), facts, scene.things)
