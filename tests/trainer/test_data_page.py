"""The page of a batch: everything that is in it, and nothing that a document could make of the page."""

import base64
import contextlib
import html
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.mixture import continued
from data.pipeline import build_dataset
from data.prepare import Options, prepare
from data.tokenizer import AUDIO, PATCH, Tokenizer
from launch.cli import main
from model.config import ModelConfig
from sharding.errors import UserError
from tests.data import mixed
from trainer import data_page
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, RunConfig
from trainer.data_page import write_data_page
from trainer.pictures import spectrogram
from trainer.rundir import RunDirectory
from trainer.step import TrainState

TEXTS = ["<script>alert(1)</script>", "plain & simple", "ünïcödé", "a" * 40]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("page")
    records: list[dict[str, Any]] = [{"id": f"<b>{i}", "text": text} for i, text in enumerate(TEXTS)]
    records.append({"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]})
    records.append({"parts": [{"type": "text", "text": "half", "weight": 0.5}]})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepare([folder / "a.jsonl"], folder / "out", Options(tokenizer="bytes", held_out=0), 0, lambda told: None)
    data = DataConfig(
        mixture={"mine": 1.0}, paths={"mine": str(folder / "out")}, tokenizer=str(folder / "out"), sequence_length=64,
        batch_size=3, workers=0, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    return RunConfig(name="a <i>run", model=ModelConfig(vocab_size=300), data=data)


def test_every_document_of_the_batch_is_on_the_page_with_its_weights(run: RunConfig, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    dataset = build_dataset(run.data, run.media, "train")
    line = write_data_page(run.name, dataset, 1, False, page)
    text = page.read_text(encoding="utf-8")
    batch, placed = dataset.batch(0), dataset.placed(0)
    segments = sum(map(len, placed))
    assert segments == sum(batch["segment_ids"].max(axis=1)) > 3
    assert len(re.findall('class="segment"', text)) == segments
    assert f"{segments} segments" in line
    for one in (one for row in placed for one in row):
        assert f"{one.source} · {one.where}" in text
    assert "<script" not in text and "<b>0" not in text and "<i>run" not in text
    shown = "".join(re.findall('class="tokens">(.*?)</div>', text))
    if "because" in shown:
        assert '<span class="off">user' in shown and '<span class="">because' in shown
    if "half" in shown:
        assert '<span class="more">half' in shown
    assert {"because" in shown, "half" in shown} & {True}


def test_where_each_segment_stands_is_what_the_batch_has(run: RunConfig) -> None:
    dataset = build_dataset(run.data, run.media, "train")
    for n in range(4):
        batch = dataset.batch(n)
        for b, row in enumerate(dataset.placed(n)):
            for i, one in enumerate(row, start=1):
                assert np.flatnonzero(batch["segment_ids"][b] == i).tolist() == list(
                    range(one.start, one.start + one.length)
                )


def test_a_file_that_cannot_be_written_is_named(run: RunConfig, tmp_path: Path) -> None:
    dataset = build_dataset(run.data, run.media, "train")
    with pytest.raises(UserError, match=r"--out .*nowhere/page\.html: cannot be written"):
        write_data_page(run.name, dataset, 1, False, tmp_path / "nowhere" / "page.html")


PIECE = re.compile(
    r'<span class="(?P<kind>.*?)">(?P<text>.*?)</span>|<b>(?P<name>.*?)</b>|<img .*?base64,(?P<png>.*?)">', re.S
)


def pieces(tokens: str) -> list[Any]:
    """What the page shows of a segment: (class, text) of each run of text, names of special tokens, pixels of pictures."""
    found: list[Any] = []
    for match in PIECE.finditer(tokens):
        if match["png"]:
            found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(match["png"])))))
        else:
            found.append(match["name"] or (match["kind"], html.unescape(match["text"])))
    return found


def slow_pieces(document: dict[str, Any], tokenizer: Tokenizer) -> list[Any]:
    """The same, token by token from what the document should become."""
    names = {number: name for name, number in tokenizer.special.items()}
    pictures = {places[0]: tile for tile, places in document["tiles"]}
    pictures |= {places[0]: (window, "sound") for window, places in document["windows"]}
    expected: list[Any] = []
    for at, (token, weight) in enumerate(zip(document["tokens"], document["weights"], strict=True)):
        if at in pictures:
            shown = pictures[at]
            expected.append(np.asarray(spectrogram(shown[0])) if isinstance(shown, tuple) else shown)
        name = names.get(token)
        if name in (PATCH, AUDIO):
            continue
        if name:
            expected.append(name.strip("<|>"))
            continue
        kind, text = {0.0: "off", 1.0: ""}.get(weight, "more"), tokenizer.token_bytes(token).decode()
        if expected and isinstance(expected[-1], tuple) and expected[-1][0] == kind:
            text = expected.pop()[1] + text
        expected.append((kind, text))
    return expected


def test_pictures_frames_sounds_and_weights_stand_where_the_documents_have_them(tmp_path: Path) -> None:
    documents = {record["id"]: record for record in mixed.write(tmp_path, 16)}
    out = tmp_path / "prepared"
    prepare([tmp_path / "mixed.jsonl"], out, Options(tokenizer="bytes"), 0, lambda told: None)
    data = DataConfig(
        mixture={"mine": 1.0}, paths={"mine": str(out)}, tokenizer=str(out), sequence_length=512, batch_size=8, workers=0,
        tiles_per_row=24, windows_per_row=24, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    dataset = build_dataset(data, mixed.MEDIA, "train")
    write_data_page("mixed", dataset, 1, False, tmp_path / "page.html")
    segments = (tmp_path / "page.html").read_text(encoding="utf-8").split('<div class="segment"')[1:]
    seen = set()
    for segment in segments:
        [(name, tokens)] = re.findall(r'<h3>\d+\. (.*?)<small>.*?<div class="tokens">(.*?)</div>', segment, re.S)
        expected = slow_pieces(mixed.slow_document(documents[name], tmp_path, dataset.tokenizer), dataset.tokenizer)
        found = pieces(tokens)
        assert len(found) == len(expected), name
        for one, other in zip(found, expected, strict=True):
            same = np.array_equal(one, other) if isinstance(other, np.ndarray) else one == other
            assert same, f"{name}: {one}, expected {other}"
        seen |= {part["type"] for part in documents[name]["parts"]}
        seen |= {piece[0] for piece in found if isinstance(piece, tuple)}
    assert seen == {"text", "image", "video", "audio", "off", "", "more"}


def test_the_page_of_a_run_is_of_the_batch_that_it_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained for twelve steps, then with another mixture and one more source: each batch before and after."""
    monkeypatch.setattr("launch.environment.prepare", lambda verbose: None)  # it changes the process for good
    for name in "abc":
        records = [{"id": f"{name}{i}", "text": name * (1 + i % 50)} for i in range(300)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        options = Options(tokenizer="bytes", held_out=0, keep_duplicates=True)
        prepare([tmp_path / f"{name}.jsonl"], tmp_path / name, options, 0, lambda told: None)
    shared = {"tokenizer": str(tmp_path / "a"), "sequence_length": 64, "batch_size": 8, "window": 16, "workers": 0}
    shared |= {"cache_dir": str(tmp_path / "cache")}

    def run_of(**mixture: float) -> RunConfig:
        paths = {name: str(tmp_path / name) for name in mixture}
        data = DataConfig(mixture=mixture, paths=paths, **shared)
        return RunConfig(name="changed", steps=200, model=ModelConfig(vocab_size=300, vision=None), data=data)

    first, second, change = run_of(a=0.5, b=0.5), run_of(a=0.1, b=0.1, c=0.8), 12
    before = build_dataset(first.data, first.media, "train", journal=continued((), first.data, 0))
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    checkpoints = Checkpoints(directory.checkpoints, CheckpointConfig())
    journal = continued((), first.data, 0)
    position = before.plain_position(before.where(change - 1))
    after = build_dataset(
        second.data, second.media, "train", journal=continued(journal, second.data, change), position=position
    )
    zero: Any = np.zeros((), np.int32)
    show = ["data", "show", "--workdir", str(directory.root), "--step"]
    for step, dataset, changes in ((change, before, journal), (24, after, continued(journal, second.data, change))):
        facts = {"data_digest": dataset.digest, "source_digests": dataset.digests, "journal": changes}
        facts |= {"data_position": dataset.plain_position(dataset.where(step - 1))}
        checkpoints.save(TrainState(zero + step, {"w": zero}, {}, {}, zero, zero), facts)
        checkpoints.wait()
        directory.save(first if step == change else second, dataset.tokenizer)
        trained = [(n, before) for n in (1, 5, 12)] + [(n, after) for n in (13, 17, 24, 30)]
        for n, dataset in trained if step == 24 else trained[:3]:
            write_data_page("changed", dataset, n, False, tmp_path / "expected.html")
            assert main([*show, str(n), "--out", str(tmp_path / "found.html")]) == 0, capsys.readouterr().err
            assert (tmp_path / "found.html").read_text() == (tmp_path / "expected.html").read_text(), n
    checkpoints.close()
    alone = build_dataset(second.data, second.media, "train")
    assert alone.rows(4) != before.rows(4) and alone.rows(16) != after.rows(16)
    assert main([*show, "201"]) == 2
    assert "--step: found 201, expected at most 200, the steps of changed" in capsys.readouterr().err


def test_the_way_to_a_far_batch_is_shown(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the batch is the same one, from a saved position and without."""
    told: list[tuple[int, str]] = []

    @contextlib.contextmanager
    def bar(title: str, total: int) -> Iterator[Callable[[str], None]]:
        yield lambda text: told.append((total, text))

    monkeypatch.setattr(data_page, "work_bar", bar)
    monkeypatch.setattr(data_page, "_STRIDE", 10)
    far = build_dataset(run.data, run.media, "train")
    position = far.plain_position(far.where(30))
    data_page.reach(far, 0, 45)
    assert told == [(5, f"batch {at} of 45") for at in range(0, 45, 10)]
    near = build_dataset(run.data, run.media, "train", position=position)
    data_page.reach(near, 30, 45)
    assert told[5:] == [(2, "batch 30 of 45"), (2, "batch 40 of 45")]
    assert near.placed(45) == build_dataset(run.data, run.media, "train").placed(45)
