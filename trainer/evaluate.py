"""Held-out scores: the objective in the loop, and at the end questions whose answers are generated."""

import base64
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from data.config import DataConfig, ImageSpec
from data.images import tiles
from data.pipeline import Batch, Dataset
from data.questions import Question, heldout_questions
from data.tokenizer import PATCH, Tokenizer
from trainer.decode import Decoder, Prompt
from trainer.step import Params

ANSWER_TOKENS = 12
"""Longest answer that is generated."""
QUESTIONS_AT_ONCE = 64
SAMPLES = 24
"""Questions whose picture and answer are kept for the report."""


class HeldOut:
    """The objective on held-out batches, the same ones each time."""

    def __init__(self, dataset: Dataset, eval_step: Any, put: Callable[[Batch], dict[str, jax.Array]]):
        """`put` moves a batch to where `eval_step` takes it."""
        self._dataset, self._eval_step, self._put = dataset, eval_step, put
        self._batches: dict[int, Batch] = {}

    def score(self, params: Params, router_bias: Params, batches: int) -> dict[str, float]:
        """Loss over the first so many held-out batches, all in all and by source; bits per byte of text."""
        loss_N, weight_N, text_bytes = 0.0, 0.0, 0
        names = self._dataset.source_names
        for n in range(batches):
            batch = self._batches.setdefault(n, self._dataset.batch(n))
            sums = jax.device_get(self._eval_step(params, router_bias, self._put(batch)))
            loss_N = loss_N + sums["source_loss"].astype(np.float64)
            weight_N = weight_N + sums["source_weight"].astype(np.float64)
            text_bytes += self._dataset.target_bytes(batch) if "text" in names else 0
        loss_N, weight_N = np.asarray(loss_N), np.asarray(weight_N)
        scores = {"loss": float(loss_N.sum() / weight_N.sum())}
        for name, loss, weight in zip(names, loss_N, weight_N, strict=True):
            if weight:
                scores[f"loss/{name}"] = float(loss / weight)
        if text_bytes:
            scores["text_bits_per_byte"] = float(loss_N[names.index("text")] / math.log(2) / text_bytes)
        return scores


def ask(decoder: Decoder, tokenizer: Tokenizer, prompts: Sequence[Prompt], most: int = ANSWER_TOKENS) -> list[str]:
    """The likeliest continuation of each prompt, up to the end of its first line."""
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for tokens_B in decoder.stream(prompts, most):
        for i, token in enumerate(tokens_B.tolist()):
            if not done[i]:
                answers[i].append(token)
                done[i] = token in tokenizer.special.values() or "\n" in tokenizer.decode([token])
        if all(done):
            break
    return [tokenizer.decode(tokens).split("\n")[0].strip() for tokens in answers]


def question_scores(
    decoder: Decoder, tokenizer: Tokenizer, data: DataConfig, image: ImageSpec, count: int
) -> dict[str, Any]:
    """Asks `count` held-out questions three times: with their image, with another question's, and with a blank one.

    Returns `questions` (right answers by attribute, combination and condition) and `samples` for the report.
    """
    questions = heldout_questions(data, image, tokenizer, count)
    prompts = [_prompt(question, tokenizer, image) for question in questions]
    tallies: dict[tuple[str, str, str], dict[str, Any]] = {}
    samples = []
    for condition in ("real", "shuffled", "blank"):
        asked = _without_image(prompts, condition)
        answers: list[str] = []
        for start in range(0, len(asked), QUESTIONS_AT_ONCE):
            answers += ask(decoder, tokenizer, asked[start : start + QUESTIONS_AT_ONCE])
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            combination = "novel" if question.novel_combination else "seen"
            key = (question.attribute, combination, condition)
            start_tally = {
                "attribute": key[0],
                "combination": key[1],
                "condition": key[2],
                "count": 0,
                "correct": 0,
                "chance": 0.0,
            }
            tally = tallies.setdefault(key, start_tally)
            tally["count"] += 1
            tally["correct"] += question.accepts(answer)
            tally["chance"] += question.chance
            if condition == "real" and i < SAMPLES:
                samples.append(_sample(question, answer, combination))
    for tally in tallies.values():
        tally["chance"] /= tally["count"]
    return {"questions": list(tallies.values()), "samples": samples}


def _prompt(question: Question, tokenizer: Tokenizer, image: ImageSpec) -> Prompt:
    tokens = np.asarray(question.prompt_tokens, np.int32)
    tiles_M, _ = tiles(question.image, image)
    places = np.flatnonzero(tokens == tokenizer.special[PATCH]).reshape(len(tiles_M), image.tokens_per_tile)
    return Prompt(tokens, tiles_M, places)


def _without_image(prompts: Sequence[Prompt], condition: str) -> list[Prompt]:
    """The same questions with their own images ("real"), each other's ("shuffled") or grey ones ("blank")."""
    if condition == "real":
        return list(prompts)
    if condition == "blank":
        return [Prompt(p.tokens, np.full_like(p.tiles, 127), p.image_positions) for p in prompts]
    # Images are exchanged among questions of the same layout, since the tokens have room for just so many tiles.
    swapped = list(prompts)
    for count in {len(p.tiles) for p in prompts if p.tiles is not None}:
        alike = [i for i, p in enumerate(prompts) if p.tiles is not None and len(p.tiles) == count]
        order = np.random.default_rng(0).permutation(len(alike))
        for position, source in zip(order, np.roll(order, 1), strict=True):
            mine, other = prompts[alike[position]], prompts[alike[source]]
            swapped[alike[position]] = Prompt(mine.tokens, other.tiles, mine.image_positions)
    return swapped


def _sample(question: Question, answer: str, combination: str) -> dict[str, Any]:
    png = io.BytesIO()
    question.image.save(png, "PNG")
    return {
        "image": base64.b64encode(png.getvalue()).decode(),
        "question": question.text,
        "answers": list(question.answers),
        "predicted": answer,
        "correct": question.accepts(answer),
        "attribute": question.attribute,
        "combination": combination,
    }
