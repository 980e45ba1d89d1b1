"""Log-probabilities of documents, token by token: a JSON-lines file of text and image documents in, one out.

Each line of the input is an object with one of `text`, `tokens`, `parts` or `messages`, and maybe an `id`; see
docs/CHECKPOINTS.md. Letters: B rows, S sequence, M tiles, P patch tokens per tile, D width.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from data.tokenizer import IMAGE_TOKENS, PATCH
from model.vocab_loss import token_losses
from sharding.errors import UserError
from trainer.decode import Prompt, bucket, rows_of
from trainer.models import LoadedModel
from trainer.prompts import conversation, document

WINDOW = 256
"""Documents that are sorted by length and scored together; they are written in the order of the input."""
BATCH_TOKENS = 8192
"""Token slots of a batch; a longer document is a batch by itself."""
FORMS = ("text", "tokens", "parts", "messages")


@dataclass(frozen=True)
class Summary:
    """What was scored."""

    documents: int
    tokens: int
    """Those with a log-probability."""
    logprob: float
    """Sum of the log-probabilities, natural."""


def score_file(model: LoadedModel, source: Path, target: Path) -> Summary:
    """Scores every document of `source` into `target`; an interrupted start goes on from what it had.

    A line of the output has the document's `id` (its line number, from 1, if it has none), its `tokens`, and for each the
    natural log-probability given those before it in `logprobs`: null for the first, and for image tokens, which are
    never predicted. `logprob` is their sum, `count` their number.

    Raises:
        UserError: a line that is no document, named by its number, before anything is scored; `target` exists.
    """
    if target.exists():
        raise UserError(f"--output {target}: exists already. Give another file, or remove it.")
    count = check_input(model, source)
    partial = target.with_name(f".{target.name}.partial")
    header = json.dumps({"input": _digest(source), "model": model.origin})
    done = _resume(partial, header)
    scorer = _Scorer(model)
    with _opened(partial) as out, source.open(encoding="utf-8-sig") as lines:
        if not done:
            out.write(header + "\n")
        records = itertools.islice(_records(source, lines), done, None)
        windows = iter(lambda: list(itertools.islice(records, WINDOW)), [])
        console = Console(stderr=True)
        shown = track(
            windows,
            f"scoring {count - done:,} documents",
            total=-(-(count - done) // WINDOW),
            console=console,
            disable=not console.is_terminal,
        )
        for window in shown:
            prompts = [_prompt(model, record, source.parent) for _, record in window]
            for (number, record), prompt, logprobs in zip(window, prompts, scorer(prompts), strict=True):
                if not all(value is None or math.isfinite(value) for value in logprobs):
                    raise UserError(
                        f"{source}, line {number}: {model.origin} gave a log-probability that is not finite, so its "
                        "weights hold NaN, or it overflows in its dtype. Documents scored before this one are kept."
                    )
                out.write(json.dumps(_result(record.get("id", number), prompt, logprobs)) + "\n")
            out.flush()
    return _finish(partial, target)


def check_input(model: LoadedModel, source: Path) -> int:
    """Documents in the file; raises `UserError` for the first line that is none. Images are looked for, not decoded."""
    count = 0
    try:
        with source.open(encoding="utf-8-sig") as lines:
            for number, record in _records(source, lines):
                try:
                    _check(record, model, source.parent)
                except UserError as error:
                    raise UserError(f"{source}, line {number}: {error}") from None
                count += 1
    except OSError as error:
        raise UserError(f"--input {source}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--input {source}: found bytes that are no UTF-8 ({error}).") from error
    if not count:
        raise UserError(f"--input {source}: found no document. Expected one JSON object a line.")
    return count


def _records(source: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UserError(f"{source}, line {number}: found no JSON ({error}).") from None


def _check(record: Any, model: LoadedModel, folder: Path) -> None:
    forms = [name for name in FORMS if name in record] if isinstance(record, dict) else []
    unknown = sorted(record.keys() - {*FORMS, "id"}) if isinstance(record, dict) else []
    if len(forms) != 1 or unknown:
        found = f"the fields {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(f"found {found}, expected an object with one of {', '.join(FORMS)}, and maybe an id.")
    if forms == ["tokens"]:
        ids, size = record["tokens"], model.run.model.vocab_size
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < size for i in ids):
            raise UserError(f"tokens: expected a list of whole numbers from 0 to {size - 1}, at least one.")
        if model.tokenizer and model.tokenizer.special.get(PATCH) in ids:
            raise UserError(f"tokens: found {PATCH}, which stands for a piece of an image. Give images in `parts`.")
        return
    model.need_tokenizer()
    if forms == ["text"]:
        if not isinstance(record["text"], str):
            raise UserError(f"text: found {type(record['text']).__name__}, expected a string.")
    elif forms == ["parts"]:
        _parts(record["parts"], model, folder, "parts")
    else:
        _messages(record["messages"], model, folder)


def _parts(value: Any, model: LoadedModel, folder: Path, name: str) -> list[str | Path]:
    """Texts, and paths of images."""
    if not isinstance(value, list):
        raise UserError(f"{name}: found {type(value).__name__}, expected a list of parts.")
    parts: list[str | Path] = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        field = {"text": "text", "image": "path"}.get(str(kind))
        if field is None or not isinstance(part.get(field), str):
            raise UserError(
                f"{name}[{i}]: found {json.dumps(part)[:80]}, expected "
                '{"type": "text", "text": ...} or {"type": "image", "path": ...}.'
            )
        if kind == "text":
            parts.append(part["text"])
            continue
        if model.run.image_spec is None:
            raise UserError(f"{name}[{i}]: found an image, but the model has no vision encoder.")
        path = folder / part["path"]
        if not path.is_file():
            raise UserError(f"{name}[{i}]: there is no image file {path}.")
        parts.append(path)
    return parts


def _messages(value: Any, model: LoadedModel, folder: Path) -> list[tuple[str, list[str | Path]]]:
    """(role, content) of each message."""
    if not isinstance(value, list) or not value:
        raise UserError("messages: expected a list of messages, at least one.")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f'messages[{i}]: expected {{"role": ..., "content": ...}}.')
        content = message.get("content")
        parts = [content] if isinstance(content, str) else _parts(content, model, folder, f"messages[{i}].content")
        messages.append((message["role"], parts))
    return messages


def _prompt(model: LoadedModel, record: dict[str, Any], folder: Path) -> Prompt:
    if "tokens" in record:
        return Prompt(np.asarray(record["tokens"], np.int32))
    if "messages" in record:
        return conversation(model, _messages(record["messages"], model, folder), ask=False)
    return document(model, [record["text"]] if "text" in record else _parts(record["parts"], model, folder, "parts"))


def _result(name: Any, prompt: Prompt, logprobs: list[float | None]) -> dict[str, Any]:
    counted = [value for value in logprobs if value is not None]
    return {
        "id": name,
        "tokens": prompt.tokens.tolist(),
        "logprobs": logprobs,
        "logprob": sum(counted),
        "count": len(counted),
    }


class _Scorer:
    """Scores windows of documents: alike lengths together, one document a row, few shapes."""

    def __init__(self, model: LoadedModel):
        self._model = model
        special = model.tokenizer.special if model.tokenizer else {}
        self._never_predicted = np.array([special[name] for name in IMAGE_TOKENS if name in special], np.int64)

        @jax.jit
        def logprobs(params: Any, router_bias: Any, batch: dict[str, jax.Array]) -> jax.Array:
            transformer = model.skeleton.model(params, router_bias)
            hidden_BSD = transformer(batch).hidden_BSD
            targets_BS = jnp.roll(batch["tokens"], -1, axis=1)
            block = model.run.objective.block_tokens
            hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
            return -token_losses(hidden_TD, transformer.head(), targets_BS.reshape(-1), block).reshape(targets_BS.shape)

        self._logprobs = logprobs

    def __call__(self, prompts: Sequence[Prompt]) -> list[list[float | None]]:
        """For each document, the log-probability of each token; None where there is none."""
        results: list[list[float | None]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
        while order:
            rows = max(1, BATCH_TOKENS // bucket(len(prompts[order[-1]].tokens)))
            order, chosen = order[:-rows], order[-rows:]
            # Filled up with rows of one token, so that the last batch is compiled for no shape of its own.
            filler = [Prompt(np.zeros(1, np.int32))] * (rows - len(chosen))
            batch = rows_of([*(prompts[i] for i in chosen), *filler])
            values_BS = np.asarray(self._logprobs(self._model.params, self._model.router_bias, batch))
            for i, values_S in zip(chosen, values_BS, strict=False):
                results[i] = self._listed(prompts[i].tokens, values_S)
        return results

    def _listed(self, tokens: np.ndarray, values_S: np.ndarray) -> list[float | None]:
        silent = np.isin(tokens, self._never_predicted)
        following = zip(values_S[: len(tokens) - 1].tolist(), silent[1:].tolist(), strict=True)
        return [None, *(None if image else value for value, image in following)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(partial: Path) -> Any:
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        return partial.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {partial.parent} cannot be written ({error.strerror}).") from error


def _resume(partial: Path, header: str) -> int:
    """Results that an interrupted start with the same input and model left; what is left of another is removed."""
    if not partial.exists():
        return 0
    kept, lines = 0, partial.read_bytes().split(b"\n")[:-1]  # what follows the last line feed was cut short
    if not lines or lines[0].decode() != header:
        partial.unlink()
        return 0
    kept = sum(len(line) + 1 for line in lines)
    os.truncate(partial, kept)
    return len(lines) - 1


def _finish(partial: Path, target: Path) -> Summary:
    """Moves the results, without the header, into place."""
    moved = target.with_name(f".{target.name}.finished")
    documents, tokens, logprob = 0, 0, 0.0
    with partial.open(encoding="utf-8") as lines, moved.open("w", encoding="utf-8") as out:
        next(lines)
        for line in lines:
            out.write(line)
            result = json.loads(line)
            documents, tokens, logprob = documents + 1, tokens + result["count"], logprob + result["logprob"]
    moved.replace(target)
    partial.unlink()
    return Summary(documents, tokens, logprob)
