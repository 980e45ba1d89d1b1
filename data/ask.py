"""Questions about clips and sounds, and how a document puts them."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data.scene_text import QUESTION_WEIGHT, Piece


class Ask(NamedTuple):
    """A question, before a wording is chosen."""

    attribute: str
    kind: str
    """Questions of one kind have the same answers, and these are equally distributed whatever the wording."""
    wordings: tuple[str, ...]
    """Every way to ask the question."""
    answers: tuple[str, ...]
    """Every accepted answer, the plainest first."""
    novel: bool
    """What it is about is a combination that training never shows."""


def lines(asks: Sequence[Ask], rng: random.Random) -> Iterator[Piece]:
    """Questions and their answers, one line each."""
    for ask in asks:
        yield Piece(rng.choice(ask.wordings), QUESTION_WEIGHT)
        yield Piece(f" {ask.answers[0] if rng.random() < 0.6 else rng.choice(ask.answers)}\n")
