"""Held-out scores: the objective in the loop, and at the end questions whose answers are generated."""

import base64
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.audio import SILENCE
from data.config import DataConfig, MediaSpec
from data.media import Media
from data.pipeline import Batch, Dataset
from data.questions import Question, heldout_questions
from data.tokenizer import AUDIO, PATCH, Tokenizer
from trainer.decode import Decoder, Prompt
from trainer.pictures import png, spectrogram, strip
from trainer.step import Params

ANSWER_TOKENS = 12
"""Longest answer that is generated."""
QUESTIONS_AT_ONCE = 64
KEPT_BYTES = 2 * 2**30
"""Of held-out batches, that a process keeps; the others are made again each time. Pictures are large."""
SAMPLES = 24
"""Questions whose file and answer are kept for the report."""


class HeldOut:
    """The objective on held-out batches, the same ones each time."""

    def __init__(
        self, dataset: Dataset, eval_step: Any, share: Sequence[int], put: Callable[[Batch], dict[str, jax.Array]]
    ):
        """`share`: the rows of a batch that this process makes; `put` moves them to where `eval_step` takes the batch."""
        self._dataset, self._eval_step, self._share, self._put = dataset, eval_step, share, put
        self._shares: dict[int, Batch] = {}
        self._room = KEPT_BYTES

    def score(self, params: Params, router_bias: Params, batches: int) -> dict[str, float]:
        """Loss over the first so many held-out batches, all in all and by source; bits per byte of text."""
        loss_N, weight_N, text_bytes = 0.0, 0.0, 0
        names = self._dataset.source_names
        for n in range(batches):
            share = self._batch(n)
            sums = jax.device_get(self._eval_step(params, router_bias, self._put(share)))
            loss_N = loss_N + sums["source_loss"].astype(np.float64)
            weight_N = weight_N + sums["source_weight"].astype(np.float64)
            if "text" in names:
                # Summed on the devices, which have each row once, whatever processes share it.
                text_bytes += int(jnp.sum(self._put({"bytes": self._dataset.target_bytes(share)})["bytes"]))
        loss_N, weight_N = np.asarray(loss_N), np.asarray(weight_N)
        scores = {"loss": float(loss_N.sum() / weight_N.sum())}
        for name, loss, weight in zip(names, loss_N, weight_N, strict=True):
            if weight:
                scores[f"loss/{name}"] = float(loss / weight)
        if text_bytes:
            scores["text_bits_per_byte"] = float(loss_N[names.index("text")] / math.log(2) / text_bytes)
        return scores

    def _batch(self, n: int) -> Batch:
        """This process's rows of a held-out batch."""
        if n in self._shares:
            return self._shares[n]
        share = self._dataset.batch(n, self._share)
        size = sum(array.nbytes for array in share.values())
        if size <= self._room:
            self._room -= size
            self._shares[n] = share
        return share


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
    decoder: Decoder, tokenizer: Tokenizer, data: DataConfig, spec: MediaSpec, sources: Sequence[str], count: int
) -> dict[str, Any]:
    """Asks `count` held-out questions about each of these sources three times: with their file, with another question's,
    and with a blank or silent one.

    Returns `questions` (right answers by attribute, combination and condition) and `samples` for the report.
    """
    tallies: dict[tuple[str, str, str], dict[str, Any]] = {}
    samples = []
    for source in sources:
        questions = heldout_questions(source, data, spec, tokenizer, count)
        prompts = [prompt_of(question, Media(spec, tokenizer), tokenizer) for question in questions]
        for condition in ("real", "shuffled", "blank"):
            asked = _without_file(prompts, condition)
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
                if condition == "real" and i < SAMPLES // len(sources):
                    samples.append(_sample(question, prompts[i], answer, combination))
    for tally in tallies.values():
        tally["chance"] /= tally["count"]
    return {"questions": list(tallies.values()), "samples": samples}


def prompt_of(question: Question, media: Media, tokenizer: Tokenizer) -> Prompt:
    """A question with its file."""
    tokens = np.asarray(question.prompt_tokens, np.int32)
    kind, data = question.file.kind, question.file.data
    name = f"{question.source}/{question.index}"
    if kind == "audio":
        windows = media.windows(data, question.facts, name)
        assert media.spec.audio
        places = np.full(len(windows) * media.spec.audio.tokens_per_window, -1)
        of_sound = np.flatnonzero(tokens == tokenizer.special[AUDIO])
        places[: len(of_sound)] = of_sound
        return Prompt(tokens, audio_frames=windows, audio_positions=places.reshape(len(windows), -1))
    tiles_M = media.tiles(kind, data, question.facts, name)
    places = np.flatnonzero(tokens == tokenizer.special[PATCH]).reshape(len(tiles_M), -1)
    return Prompt(tokens, tiles_M, places)


def _without_file(prompts: Sequence[Prompt], condition: str) -> list[Prompt]:
    """The same questions with their own files ("real"), each other's ("shuffled"), or grey and silent ones ("blank")."""
    if condition == "real":
        return list(prompts)
    if condition == "blank":
        return [_with(p, _filled(p.tiles, 127), _filled(p.audio_frames, SILENCE)) for p in prompts]
    # Files are exchanged among questions of as many tiles and windows, since the tokens have room for just so many. A
    # sound that is longer than its new place is cut off.
    swapped, sizes = list(prompts), [(_count(p.tiles), _count(p.audio_frames)) for p in prompts]
    for size in set(sizes):
        alike = [i for i, of_prompt in enumerate(sizes) if of_prompt == size]
        order = np.random.default_rng(0).permutation(len(alike))
        for position, source in zip(order, np.roll(order, 1), strict=True):
            mine, other = prompts[alike[position]], prompts[alike[source]]
            swapped[alike[position]] = _with(mine, other.tiles, other.audio_frames)
    return swapped


def _with(prompt: Prompt, tiles: np.ndarray | None, audio_frames: np.ndarray | None) -> Prompt:
    return dataclasses.replace(prompt, tiles=tiles, audio_frames=audio_frames)


def _filled(blocks: np.ndarray | None, value: float) -> np.ndarray | None:
    return None if blocks is None else np.full_like(blocks, value)


def _count(blocks: np.ndarray | None) -> int:
    return 0 if blocks is None else len(blocks)


def _sample(question: Question, prompt: Prompt, answer: str, combination: str) -> dict[str, Any]:
    if prompt.audio_frames is not None:
        picture = png(spectrogram(np.concatenate(list(prompt.audio_frames))))
    elif question.file.kind == "video" and prompt.tiles is not None:
        picture = png(strip(prompt.tiles))
    else:
        picture = base64.b64encode(question.file.data).decode()
    return {
        "image": picture,
        "question": question.text,
        "answers": list(question.answers),
        "predicted": answer,
        "correct": question.accepts(answer),
        "attribute": question.attribute,
        "combination": combination,
    }
