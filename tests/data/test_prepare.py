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
from data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, load_file
from sharding.errors import UserError
from tests.data.prepare_work import jsonl, made, records, rejected

pytestmark = pytest.mark.usefixtures("quick")


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def sound(samples: int, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(samples) / 9).astype(np.float32), 16000, format=kind)
    return file.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


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
    assert {path.name for path in (undisturbed / "index").iterdir() if path.suffix != ".npy"} == {"names.json"}


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


def test_the_bar_moves_within_a_file_and_ends_with_it(tmp_path, processes):
    (tmp_path / "a.tar").write_bytes(tar({f"{i}.txt": b"text" for i in range(300)} | {"x.xyz": b"?"}))
    (tmp_path / "slow.py").write_text("import time\ndef judge(document): time.sleep(0.01)\n")
    heard = []
    options = module.Options(tokenizer="bytes", keep_duplicates=True, classifier=f"{tmp_path / 'slow.py'}:judge")
    module.prepare([tmp_path / "a.tar"], tmp_path / "out", options, 1, heard.append)
    within = [told for told in heard if 0 < told.read < 301]
    assert within and all(0 < told.done < told.total for told in within)
    assert heard == sorted(heard, key=lambda told: (told.done, told.read))
    last = heard[-1]
    assert (last.done, last.read, last.rejected) == (last.total, 301, 1)


def test_what_was_read_is_counted_by_itself(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}, {"text": ""}, {"text": "b"}))
    interrupted(tmp_path / "out", tmp_path / "a.jsonl")
    (tmp_path / "out" / "unfinished" / "000000.rejected.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"3 records were read, but 2 are written and 0 rejected.*Remove it"):
        made(tmp_path / "out", tmp_path / "a.jsonl")


def test_all_rows_of_a_damaged_row_group_count_as_rejected(tmp_path):
    table = pa.table({"text": [os.urandom(300).hex() for _ in range(30)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10, write_page_checksum=True)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.parquet").write_bytes(content)
    facts = made(tmp_path / "out", tmp_path / "a.parquet").facts
    assert (facts["read"], facts["written"], facts["rejected"]) == (30, 20, {"damaged": 10})
    [line] = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert line["records"] == 10 and "rows 11 to 20" in line["reason"]


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


def test_two_commands_do_not_prepare_into_one_folder(tmp_path, monkeypatch):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(jsonl({"text": "a"}))
    finish = module._finish

    def finished(*given: Any) -> Any:
        with pytest.raises(UserError, match="another command prepares into it"):
            prepare([source], out, Options("bytes"), 1, lambda _: None)
        return finish(*given)

    monkeypatch.setattr(module, "_finish", finished)
    assert len(records(made(out, source))) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_without_records_says_so(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    with pytest.raises(UserError, match=rf"{name}: found no (files to read, or no )?records"):
        made(tmp_path / "out", tmp_path / name)
