"""`drover data prepare`: which records stay, on which side, with which weights, and which are refused with their reason."""

import base64
import json
import re
import resource
import tarfile
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data import formats, groups
from data import prepare as prepare_module
from data.chat import Message, chat_tokens
from data.config import DataConfig, MediaSpec
from data.inspect import inspect_data, render
from data.pipeline import build_dataset
from data.prepared import Prepared
from data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, TURN_END, load_file
from sharding.errors import UserError
from tests.data.mixed import image
from tests.data.prepare_work import ids, jsonl, made, records, rejected

pytestmark = pytest.mark.usefixtures("quick")


def test_the_first_of_several_alike_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("data.formats.UNIT_BYTES", 1)
    monkeypatch.setattr("data.formats._BLOCK", 64)
    lines = [("x", "a"), ("y", "b"), ("x", "c"), ("z", "a"), ("y", "b"), ("v", "c"), ("w", "A")]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"id": name, "text": text, "n": name} for name, text in lines)))
    data = made(tmp_path / "out", tmp_path / "a.jsonl")
    assert ids(data) == ["x", "y", "v", "w"] and data.facts["read"] == 7
    assert sorted(rejected(tmp_path / "out")) == [
        ("a.jsonl:3", "duplicate id"),
        ("a.jsonl:4", "duplicate"),
        ("a.jsonl:5", "duplicate id"),
    ]
    assert data.facts["rejected"] == {"duplicate id": 2, "duplicate": 1}
    assert ids(made(tmp_path / "all", tmp_path / "a.jsonl", keep_duplicates=True)) == ["x", "y", "z", "v", "w"]


def test_a_document_stays_on_its_side_when_data_are_added(tmp_path):
    def held_out(count: int) -> set[str]:
        (tmp_path / "a.jsonl").write_bytes(jsonl(*({"text": f"{i}"} for i in range(count))))
        data = made(tmp_path / str(count), tmp_path / "a.jsonl", held_out=0.1)
        return {record.id for record, out in zip(records(data), data.index.held_out, strict=True) if out}

    few, many = held_out(300), held_out(600)
    assert few == {name for name in many if int(name.split(":")[1]) <= 300} and 10 < len(few) < 60


def test_of_a_few_documents_one_is_held_out_unless_they_say(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}, {"text": "b"}))
    (tmp_path / "b.jsonl").write_bytes(jsonl({"text": "a", "split": "train"}, {"text": "b", "split": "train"}))
    assert made(tmp_path / "one", tmp_path / "a.jsonl").index.held_out.sum() == 1
    assert made(tmp_path / "none", tmp_path / "b.jsonl").index.held_out.sum() == 0
    assert made(tmp_path / "asked", tmp_path / "a.jsonl", held_out=0.0).index.held_out.sum() == 0


def test_the_split_is_part_of_the_digest(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"text": f"{i}"} for i in range(40))))
    some, none, again = (
        made(tmp_path / name, tmp_path / "a.jsonl", held_out=share)
        for name, share in (("some", 0.3), ("none", 0.0), ("again", 0.3))
    )
    assert some.facts["digest"] == again.facts["digest"] != none.facts["digest"]

    def packed(data: Prepared, split: str) -> set[int]:
        config = DataConfig(
            mixture={"x": 1.0},
            paths={"x": str(data.folder)},
            tokenizer=str(data.folder),
            cache_dir=str(tmp_path / "cache"),
        )
        return set(build_dataset(config, MediaSpec(), split)._sources[0].documents.tolist())

    assert packed(none, "train") == set(range(40))
    assert packed(some, "train") | packed(some, "heldout") == set(range(40))
    assert not packed(some, "train") & packed(some, "heldout")


def test_of_many_sources_the_largest_are_named(tmp_path):
    lines = [{"text": f"{i} {k}", "source": f"s{i}"} for i in range(25) for k in range(i + 1)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*lines))
    data = made(tmp_path / "out", tmp_path / "a.jsonl")
    assert data.facts["documents_by_source"] == {f"s{i}": i + 1 for i in range(24, 4, -1)}
    assert data.facts["other_sources"] == {"sources": 5, "documents": 15}
    assert [data.index.names[i] for i in data.index.sources] == [record.source for record in records(data)]
    said = render(inspect_data(data.folder), "x")
    assert "s24 25" in said and "s4 " not in said
    assert re.search(r"other sources +sources 5 +documents 15", said)


def weighed(data: Prepared) -> list[list[tuple[str, float]]]:
    """Each document as texts of equal weight; special tokens by name."""
    tokenizer = load_file(data.folder)
    names = {number: name for name, number in tokenizer.special.items()}
    documents = []
    for record in records(data):
        runs: list[tuple[str, float]] = []
        for token, weight in zip(record.tokens.tolist(), record.weights.tolist(), strict=True):
            text = names.get(token) or tokenizer.token_bytes(token).decode()
            if runs and runs[-1][1] == weight:
                text = runs.pop()[0] + text
            runs.append((text, weight))
        documents.append(runs)
    return documents


def test_of_a_conversation_the_answers_alone_weigh(tmp_path):
    turns = [("system", " Be brief. "), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao")]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    messages[-1]["weight"] = 0.5
    parts = [{"type": "text", "text": "a", "weight": 0}, {"type": "text", "text": "b", "weight": 2}]
    (tmp_path / "a.jsonl").write_bytes(jsonl({"messages": messages}, {"parts": parts}))
    chat, plain = weighed(made(tmp_path / "out", tmp_path / "a.jsonl"))
    assert [(text, weight) for text, weight in chat if weight] == [(f"Hello{TURN_END}", 1.0), (f"Ciao{TURN_END}", 0.5)]
    assert plain == [(f"{BEGIN_OF_TEXT}a", 0.0), (f"b{END_OF_TEXT}", 2.0)]


def test_each_message_is_a_turn_as_the_template_writes_it(tmp_path):
    said = [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "")]
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    apart = {"messages": [{"role": role, "content": text} for role, text in said]}
    together = {"messages": [{"role": "user", "content": content}, *apart["messages"][2:]]}
    parts = {"parts": [{"type": "text", "text": text, "role": role} for role, text in said]}
    (tmp_path / "a.jsonl").write_bytes(jsonl(apart, together, parts))
    data = made(tmp_path / "out", tmp_path / "a.jsonl", held_out=0)
    assert ids(data) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]  # none is taken for another one
    tokenizer = load_file(tmp_path / "out")
    turns = [said, [("user", "ab"), *said[2:]], [("user", "ab"), ("assistant", "cd"), ("user", "")]]
    expected = [chat_tokens(tokenizer, [Message(*turn) for turn in one], ask=False) for one in turns]
    assert [record.tokens.tolist() for record in records(data)] == expected


def test_the_end_of_a_turn_weighs_as_its_last_text(tmp_path):
    (tmp_path / "a.png").write_bytes(image(0, (8, 8)))
    file, texts = (
        {"type": "image", "path": "a.png"},
        [{"type": "text", "text": "A", "weight": 2}, {"type": "text", "text": "B"}],
    )
    turns: list[tuple[str, Any, float | None, list[tuple[str, float]]]] = [
        ("assistant", "masked", 0, []),
        ("user", "asked", 0.25, [(f"asked{TURN_END}", 0.25)]),
        ("assistant", texts, None, [("A", 2.0), (f"B{TURN_END}", 1.0)]),
        ("user", [file], None, []),
        ("assistant", [file], None, [(TURN_END, 1.0)]),
        ("assistant", [{"type": "text", "text": "C", "weight": 0}, file], None, []),
    ]
    conversations = []
    for role, content, weight, _ in turns:
        message = {"role": role, "content": content} | ({} if weight is None else {"weight": weight})
        conversations.append({"messages": [{"role": "system", "content": "S"}, message]})
    (tmp_path / "a.jsonl").write_bytes(jsonl(*conversations))
    found = weighed(made(tmp_path / "out", tmp_path / "a.jsonl", keep_duplicates=True))
    assert [[run for run in runs if run[1]] for runs in found] == [expected for *_, expected in turns]


def test_what_a_table_has_and_json_has_not_is_kept_as_text(tmp_path):
    from datetime import datetime
    from decimal import Decimal

    row = {"text": "a", "at": datetime(2020, 1, 2), "price": Decimal("1.50"), "raw": b"\xff", "big": 2**63 - 1}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    [record] = records(made(tmp_path / "out", tmp_path / "a.parquet"))
    assert record.metadata == {"at": "2020-01-02T00:00:00", "price": "1.50", "raw": b"\xff", "big": 2**63 - 1}


def test_filters_and_transforms_are_applied_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "short"}, {"text": "e\u0301t\u00e9 \r\n long enough"}))
    options: dict[str, Any] = {
        "filters": (("min_tokens", 10.0),),
        "transforms": ("nfc", "unix_newlines", "strip_lines"),
    }
    data = made(tmp_path / "out", tmp_path / "a.jsonl", **options)
    [record] = records(data)
    assert load_file(tmp_path / "out").decode(record.tokens.tolist()) == "\u00e9t\u00e9\n long enough"
    assert data.facts["rejected"] == {"min_tokens": 1}


def test_a_classifier_refuses_with_its_reason(tmp_path):
    (tmp_path / "judge.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Limit:\n    least: int = 3\n"
        "def judge(document): return 'short' if len(document.parts[0].text) < Limit().least else None\n"
    )
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "ab"}, {"text": "abc"}))
    data = made(tmp_path / "out", tmp_path / "a.jsonl", classifier=f"{tmp_path / 'judge.py'}:judge")
    assert data.facts["rejected"] == {"classifier": 1} and len(records(data)) == 1
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["reason"] == "short"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("1 / 0", r"fails on 'a.jsonl:1' \(ZeroDivisionError: division by zero\). Let it return why"),
        ("raise SystemExit(0)", r"fails on 'a.jsonl:1' \(SystemExit: 0\)"),
        ("__import__('os')._exit(3)", "--workers: a process ended by itself"),
    ],
)
def test_a_classifier_that_fails_ends_the_command(tmp_path, processes, body, expected):
    (tmp_path / "judge.py").write_text(f"def judge(document): {body}\n")
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "ab"}))
    with pytest.raises(UserError, match=expected):
        made(tmp_path / "out", tmp_path / "a.jsonl", classifier=f"{tmp_path / 'judge.py'}:judge")


@pytest.mark.parametrize(
    "options",
    [
        {"held_out": 1.0},
        {"held_out": float("nan")},
        {"max_record_mb": 0},
        {"max_record_mb": float("nan")},
        {"max_record_mb": float("inf")},
        {"transforms": ("rot13",)},
        {"classifier": "missing.py:judge"},
        {"tokenizer": "missing"},
        {"tokenizer": "bpe", "tokenizer_size": 5},
    ],
)
def test_an_option_that_cannot_be_is_an_error(tmp_path, options):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}))
    with pytest.raises(UserError):
        made(tmp_path / "out", tmp_path / "a.jsonl", **options)


def test_a_tokenizer_that_is_too_small_is_said_before_anything_is_done(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}))
    with pytest.raises(UserError, match=r"^--tokenizer-size: found 272, expected 273 or more"):
        made(tmp_path / "out", tmp_path / "a.jsonl", tokenizer="bpe", tokenizer_size=272)
    assert not (tmp_path / "out").exists()


def test_a_disk_too_full_for_the_tokenizer_names_the_folder(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match=r"^--out .*/out: .* cannot be written \(File too large\)"):
            made(tmp_path / "out", tmp_path / "a.jsonl", tokenizer="bpe")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_for_the_tokenizer_no_media_are_read_and_it_is_told(tmp_path, monkeypatch):
    picture, folder = image(0, (300, 300)), tmp_path / "f"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture)
    (folder / "a.txt").write_bytes(b"of a folder")
    (tmp_path / "b.jsonl").write_bytes(jsonl({"text": "of a line", "image": "f/a.png"}))
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for name in ("a.png", "a.txt"):
            tar.add(folder / name, name)
    read, heard = [], []
    within, stream = groups.read_within, groups.Stream.read
    monkeypatch.setattr(groups, "read_within", lambda *place: read.append(within(*place)) or read[-1])
    monkeypatch.setattr(formats, "read_within", groups.read_within)
    monkeypatch.setattr(groups.Stream, "read", lambda *size: read.append(stream(*size)) or read[-1])
    monkeypatch.setattr(prepare_module, "_SECONDS_BETWEEN_TELLS", 0)
    units = formats.plan([folder, tmp_path / "b.jsonl", tmp_path / "c.tar"])
    found = prepare_module._sample(units, prepare_module.Options(), heard.append)
    assert [text for text in found if text] == ["of a folder", "of a line", "of a folder"]
    assert not any(piece in content for content in read for piece in (picture[:100], picture[-100:]))
    assert [(told.done, told.read) for told in heard] == sorted((told.done, told.read) for told in heard)
    assert [told.doing for told in heard] == ["reading texts for the tokenizer"] * 3 + ["training the tokenizer"]
    made(tmp_path / "out", folder, tokenizer="bpe")
    assert any(content == picture for content in read)


def test_files_in_a_record_and_beside_it_are_too_large_together(tmp_path):
    (tmp_path / "a.png").write_bytes(bytes(6000))
    inside = {"bytes": base64.b64encode(bytes(6000)).decode()}
    (tmp_path / "a.jsonl").write_bytes(jsonl({"image": [inside, "a.png"]}, {"text": "a"}))
    made(tmp_path / "out", tmp_path / "a.jsonl", max_record_mb=0.01)
    assert rejected(tmp_path / "out") == [("a.jsonl:1", "too large")]


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"no json\n" * 3)
    with pytest.raises(UserError, match=r"none of 3 records could be used; .*rejected.jsonl says why"):
        made(tmp_path / "out", tmp_path / "a.jsonl")
    assert len(rejected(tmp_path / "out")) == 3
