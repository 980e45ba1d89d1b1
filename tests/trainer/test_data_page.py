"""The page of a batch: everything that is in it, and nothing that a document could make of the page."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.pipeline import build_dataset
from data.prepare import Options, prepare
from model.config import ModelConfig
from sharding.errors import UserError
from trainer.config import RunConfig
from trainer.data_page import write_data_page

TEXTS = ["<script>alert(1)</script>", "plain & simple", "ünïcödé", "a" * 40]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("page")
    records: list[dict[str, Any]] = [{"id": f"<b>{i}", "text": text} for i, text in enumerate(TEXTS)]
    records.append({"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]})
    records.append({"parts": [{"type": "text", "text": "half", "weight": 0.5}]})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepare([folder / "a.jsonl"], folder / "out", Options(tokenizer="bytes", held_out=0), 1, lambda told: None)
    data = DataConfig(
        mixture={"mine": 1.0}, paths={"mine": str(folder / "out")}, tokenizer=str(folder / "out"), sequence_length=64,
        batch_size=3, workers=0, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    return RunConfig(name="a <i>run", model=ModelConfig(vocab_size=300), data=data)


def test_every_document_of_the_batch_is_on_the_page_with_its_weights(run: RunConfig, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    line = write_data_page(run, 1, False, page)
    text = page.read_text(encoding="utf-8")
    dataset = build_dataset(run.data, run.media, "train")
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
    with pytest.raises(UserError, match=r"--out .*nowhere/page\.html: cannot be written"):
        write_data_page(run, 1, False, tmp_path / "nowhere" / "page.html")


def test_a_split_without_documents_is_refused(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.mixture\.mine: .* has no held-out document"):
        write_data_page(run, 1, True, tmp_path / "page.html")
