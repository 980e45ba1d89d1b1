"""`drover data prepare`: what went in comes out or is told of, whatever interrupts it and whatever is in the input."""

import base64
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from PIL import Image
from pyarrow import parquet

from data import prepare as module
from data.inspect import inspect_data, render
from data.prepare import Options, prepare
from data.prepared import Prepared
from data.records import Record
from data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, TURN_END, load_file
from sharding.errors import UserError


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def sound(samples: int, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(samples) / 9).astype(np.float32), 16000, format=kind)
    return file.getvalue()


def jsonl(*records: Any) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


class InProcess:
    """Stands for the processes, which take seconds to start."""

    def __init__(self, workers: int, context: object, start: object, arguments: tuple[Any, ...]):
        classify = module.load_classifier(arguments[1].classifier) if arguments[1].classifier else None
        module._worker = (*arguments, classify)

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", InProcess)


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", ProcessPoolExecutor)


def made(out: Path, *sources: Path, workers: int = 1, **options: Any) -> Prepared:
    prepare(sources, out, Options(**{"tokenizer": "bytes", **options}), workers, lambda _: None)
    return Prepared.open(out)


def records(data: Prepared) -> list[Record]:
    places = zip(data.index.shards.tolist(), data.index.records.tolist(), strict=True)
    with data.shards as shards:
        return shards.read(list(places))


def ids(data: Prepared) -> list[str]:
    return [record.id for record in records(data)]


def rejected(out: Path) -> list[tuple[str, str]]:
    lines = (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["where"], line["rule"]) for line in map(json.loads, lines)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


COMMAND = [sys.executable, "-m", "launch.cli", "data", "prepare"]
ROOT = str(Path(module.__file__).parents[1])


def _mind_ctrl_c() -> None:  # which what a shell starts in its background does not
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(*arguments: object, slow: float = 0.0, **options: Any) -> "subprocess.Popen[str]":
    """In a group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": ROOT, "SLOW": str(slow)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=options.pop("preexec_fn", _mind_ctrl_c),
        **options,
    )


# Everything at once

PICTURES = {name: picture(20 + i, 10 + i, kind) for i, (name, kind) in enumerate([("a.png", "PNG"), ("b.jpg", "JPEG")])}
SOUNDS = {"a.wav": sound(1600), "b.flac": sound(3200, "FLAC")}
TEXTS = ["A cat.", "Größe  \n\tund <|patch|> 你好 🦜\r\n", "x" * 3000, " leading and trailing "]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """Every format; the classifier of `slow.py` lets the command take its time."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "a.png").write_bytes(PICTURES["a.png"])
    (folder / "t.jsonl").write_bytes(jsonl(*({"id": f"t{i}", "text": text} for i, text in enumerate(TEXTS))))
    chat = [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]}]
    (folder / "m.jsonl").write_bytes(
        jsonl({"id": "m0", "messages": [*chat, {"role": "assistant", "content": "A cat."}], "n": {"deep": [1, None]}})
        + b"no json\n"
    )
    parts = [{"type": "audio", "data": base64.b64encode(SOUNDS["a.wav"]).decode()}, {"type": "text", "text": "Sine."}]
    (folder / "z.jsonl.gz").write_bytes(gzip.compress(jsonl({"id": "z0", "parts": parts, "split": "heldout"})))
    images = [{"bytes": PICTURES["b.jpg"], "path": None}, {"bytes": b"no picture", "path": None}]
    parquet.write_table(pa.table({"id": ["p0", "p1"], "image": images, "text": ["One.", "Two."]}), folder / "p.parquet")
    members = {"0.flac": SOUNDS["b.flac"], "0.txt": b"Hum.", "0.json": b'{"source": "web"}', "1.txt": b"Alone."}
    (folder / "w.tar").write_bytes(tar(members))
    (folder / "w.tgz").write_bytes(gzip.compress(tar({"0.txt": b"In tgz."})))
    (folder / "files" / "inner").mkdir(parents=True)
    (folder / "files" / "inner" / "a.png").write_bytes(PICTURES["a.png"])
    (folder / "files" / "inner" / "a.txt").write_bytes(b"Caption.")
    (folder / "slow.py").write_text(
        "import os, time\ndef judge(document):\n    time.sleep(float(os.environ.get('SLOW', 0)))\n"
    )
    return [folder / name for name in ("t.jsonl", "m.jsonl", "z.jsonl.gz", "p.parquet", "w.tar", "w.tgz", "files")]


def options_of(sources: list[Path]) -> dict[str, Any]:
    return {"tokenizer": "bpe", "tokenizer_size": 400, "classifier": f"{sources[0].parent / 'slow.py'}:judge"}


def arguments_of(sources: list[Path], out: Path, workers: int) -> list[object]:
    options = options_of(sources)
    size, classifier = options["tokenizer_size"], options["classifier"]
    return [*sources, "--out", out, "--tokenizer-size", size, "--classifier", classifier, "--workers", workers]


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    made(out, *sources, **options_of(sources))
    return out


def test_what_went_in_comes_out(undisturbed):
    data = Prepared.open(undisturbed)
    tokenizer = load_file(undisturbed)
    found = {record.id: record for record in records(data)}
    expected: dict[str, tuple[str, list[bytes], Any]] = {
        **{f"t{i}": (text, [], None) for i, text in enumerate(TEXTS)},
        "m0": ("user\n\nWhat?assistant\n\nA cat.", [PICTURES["a.png"]], {"n": {"deep": [1, None]}}),
        "z0": ("Sine.", [SOUNDS["a.wav"]], None),
        "p0": ("One.", [PICTURES["b.jpg"]], None),
        "w.tar/0": ("Hum.", [SOUNDS["b.flac"]], None),
        "w.tar/1": ("Alone.", [], None),
        "w.tgz/0": ("In tgz.", [], None),
        "files/inner/a": ("Caption.", [PICTURES["a.png"]], None),
    }
    assert list(found) == list(expected)
    for name, (text, files, metadata) in expected.items():
        record = found[name]
        assert tokenizer.decode(record.tokens.tolist()) == text
        assert [file.data for file in record.files] == files
        assert record.metadata == metadata and len(record.weights) == len(record.tokens)
        assert record.tokens[0] == tokenizer.special[BEGIN_OF_TEXT] and record.weights[0] == 0
    assert found["w.tar/0"].source == "web" and found["t3"].where == "t.jsonl:4"
    assert found["t0"].tokens[-1] == tokenizer.special[END_OF_TEXT] and set(found["t0"].weights[1:]) == {1}
    assert rejected(undisturbed) == [("m.jsonl:2", "json"), ("p.parquet:2", "file")]


def test_the_index_knows_each_document(undisturbed):
    data = Prepared.open(undisturbed)
    index = data.index
    facts = index.facts.tolist()
    assert facts == [[10, 20, 0], [1600, 0, 0], [11, 21, 0], [3200, 0, 0], [10, 20, 0]]
    assert index.kinds.tolist() == [0, 2, 0, 2, 0] and index.names == ("", "web")
    found = records(data)
    assert index.tokens.tolist() == [len(record.tokens) for record in found]
    assert index.places.tolist() == [file.at for record in found for file in record.files]
    assert index.held_out[[record.id for record in found].index("z0")]
    assert [index.names[i] for i in index.sources] == [record.source for record in found]


def test_the_counts_agree(undisturbed):
    facts = json.loads((undisturbed / "dataset.json").read_text())
    assert facts["read"] == facts["written"] + sum(facts["rejected"].values()) == 13
    assert facts["rejected"] == {"json": 1, "file": 1} and facts["files"] == {"image": 3, "video": 0, "audio": 2}
    counted = inspect_data(undisturbed)
    assert sum(counted["documents"].values()) == 11 and "11" not in render(counted, "x").splitlines()[0]


def test_nothing_but_what_is_documented_is_there(undisturbed):
    assert sorted(os.listdir(undisturbed)) == ["dataset.json", "index", "rejected.jsonl", "shards", "tokenizer.json"]
    assert sorted(os.listdir(undisturbed / "shards")) == [f"{i:06d}.array_record" for i in range(7)]
    assert {path.suffix for path in (undisturbed / "index").iterdir()} == {".npy"}


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(sources, undisturbed, tmp_path, processes, workers):
    made(tmp_path / "out", *sources, workers=workers, **options_of(sources))
    assert contents(tmp_path / "out") == contents(undisturbed)


def finished_units(out: Path) -> int:
    return len(list((out / "unfinished").glob("[0-9]*.npz")))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.01)


def test_the_same_command_goes_on_where_it_was_killed_or_interrupted(sources, undisturbed, tmp_path):
    out = tmp_path / "out"
    arguments = arguments_of(sources, out, 2)
    for units, how in [(0, signal.SIGKILL), (1, signal.SIGINT), (3, signal.SIGKILL)]:
        process = started(*arguments, slow=0.4)
        wait_for(lambda u=units: (out / "unfinished" / "plan").exists() and finished_units(out) >= u, f"{units} units")
        workers = children(process.pid)
        with pytest.raises(UserError, match="is unfinished"):
            Prepared.open(out)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)
            _, said = process.communicate(timeout=60)
            assert process.returncode == 130 and "Traceback" not in said, said
        else:
            process.kill()
            process.communicate(timeout=60)
        wait_for(lambda w=workers: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in w), "workers end")
    before = finished_units(out)
    process = started(*arguments)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and before >= 3, errors
    assert "13 records read = 11 documents" in said and "2 rejected (rejected.jsonl: 1 json, 1 file)" in said
    assert contents(out) == contents(undisturbed)


def test_a_disk_that_is_full_is_said_and_the_command_goes_on_later(sources, tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"text": f"{i} " * 500} for i in range(300))))
    arguments = [tmp_path / "a.jsonl", "--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", 1]
    process = started(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "cannot be written" in said and "File too large" in said, said
    assert not list((tmp_path / "out" / "shards").iterdir())
    assert len(records(made(tmp_path / "out", tmp_path / "a.jsonl"))) == 300


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}))
    for out in (tmp_path / "a.jsonl", tmp_path / "a.jsonl" / "out", Path("/proc/out")):
        with pytest.raises(UserError, match=rf"--out {out}: .* cannot be written"):
            made(out, tmp_path / "a.jsonl")


def interrupted(out: Path, *sources: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(out, *sources, **options)


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path):
    source, out, folder = tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "files"
    folder.mkdir()
    source.write_bytes(jsonl({"text": "a"}))
    (folder / "a.txt").write_bytes(b"one")
    (tmp_path / "judge.py").write_text("def judge(document): return None")
    options: dict[str, Any] = {"classifier": f"{tmp_path / 'judge.py'}:judge"}
    interrupted(out, source, folder, **options)
    refused = pytest.raises(UserError, match="was begun with other options, or the input has changed")
    with refused:
        made(out, source, folder, held_out=0.1, **options)
    with refused:
        made(out, source, **options)
    for path, content in (
        (source, jsonl({"text": "b"})),
        (folder / "a.txt", b"two"),
        (tmp_path / "judge.py", b"def judge(document): return 'no'"),
    ):
        before, times = path.read_bytes(), path.stat()
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
        with refused:
            made(out, source, folder, **options)
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(records(made(out, source, folder, **options))) == 2


def test_a_folder_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").write_bytes(b"years")
    with pytest.raises(UserError, match="holds something else"):
        made(tmp_path / "foreign", tmp_path / "a.jsonl")
    assert os.listdir(tmp_path / "foreign") == ["thesis.doc"]
    made(tmp_path / "out", tmp_path / "a.jsonl")
    (tmp_path / "out" / "unfinished").mkdir()  # killed between its last two steps
    with pytest.raises(UserError, match="is finished already"):
        made(tmp_path / "out", tmp_path / "a.jsonl")
    assert not (tmp_path / "out" / "unfinished").exists()
    with pytest.raises(UserError, match="lies in the source"):
        made(tmp_path / "inner" / "out", tmp_path)


# What is kept


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
    assert [(text, weight) for text, weight in chat if weight] == [
        (f"Hello{TURN_END}", 1.0),
        ("Ciao", 0.5),
        (TURN_END, 1.0),
    ]
    assert plain == [(f"{BEGIN_OF_TEXT}a", 0.0), (f"b{END_OF_TEXT}", 2.0)]


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


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"no json\n" * 3)
    with pytest.raises(UserError, match=r"none of 3 records could be used; .*rejected.jsonl says why"):
        made(tmp_path / "out", tmp_path / "a.jsonl")
    assert len(rejected(tmp_path / "out")) == 3
