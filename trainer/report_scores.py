"""What `evaluation.json` says about the held-out questions, per attribute; shared by the console and the report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """Right answers out of the questions asked."""

    correct: int
    count: int

    @property
    def share(self) -> float:
        """Accuracy, 0 to 1."""
        return self.correct / self.count

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson score interval of the accuracy, 95 % (E. B. Wilson, 1927): what so few questions can tell."""
        n, p = self.count, self.share
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class AttributeScores:
    """One attribute (colour, shape, ...) under every condition; None where nothing was asked."""

    attribute: str
    seen: Score | None
    """The real file; the combination of attributes was trained on."""
    novel: Score | None
    """The real file; the combination of attributes was held out."""
    shuffled: Score | None
    """Another question's file."""
    blank: Score | None
    """A blank or silent file."""
    chance: float
    """Accuracy of guessing the answers about the real files, 0 to 1."""


CONDITIONS = (("seen", "real, seen"), ("novel", "real, novel"), ("shuffled", "shuffled"), ("blank", "blank"))
"""Fields of `AttributeScores` and how they are shown."""


def question_scores(evaluation: Mapping[str, Any]) -> list[AttributeScores]:
    """Scores in the order in which the attributes appear, and last "all" of them if there are several."""
    rows: Sequence[Mapping[str, Any]] = [row for row in evaluation.get("questions", ()) if row["count"]]
    attributes = list(dict.fromkeys(row["attribute"] for row in rows))
    scores = [_attribute(name, [row for row in rows if row["attribute"] == name]) for name in attributes]
    return [*scores, _attribute("all", rows)] if len(scores) > 1 else scores


def _attribute(name: str, rows: Iterable[Mapping[str, Any]]) -> AttributeScores:
    rows = list(rows)

    def score(condition: str, combination: str | None = None) -> Score | None:
        wanted = [r for r in rows if r["condition"] == condition and combination in (None, r["combination"])]
        return Score(sum(r["correct"] for r in wanted), sum(r["count"] for r in wanted)) if wanted else None

    asked = [r for r in rows if r["condition"] == "real"] or rows
    return AttributeScores(
        attribute=name,
        seen=score("real", "seen"),
        novel=score("real", "novel"),
        shuffled=score("shuffled"),
        blank=score("blank"),
        chance=sum(r["chance"] * r["count"] for r in asked) / sum(r["count"] for r in asked),
    )
