"""The command in its own processes, on input that lies, is damaged or is enormous: counted, named, in bounded memory."""

import base64
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import prepare as module
from data.prepared import Prepared
from tests.data.mixed import clip
from tests.data.test_prepare import jsonl, picture, rejected, sound, tar

MB = 10**6


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG of one bit a pixel."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


MEASURE = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
"""A small process in between: what a process is started from counts as its own memory, and the tests' may be large."""


def prepared(out: Path, *sources: Path) -> tuple[str, int]:
    """What the command says, and the most memory that one of its processes had, in bytes."""
    options = ["--out", str(out), "--tokenizer", "bytes", "--workers", "2"]
    command = [sys.executable, "-m", "launch.cli", "data", "prepare", *map(str, sources), *options]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        env={**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    said, _, memory = done.stdout.rstrip().rpartition("\n")
    return said, int(memory) * 1024


def test_bad_input_is_rejected_by_name(tmp_path):
    folder = tmp_path / "in"
    (folder / "d").mkdir(parents=True)
    wave = bytearray(sound(16000))
    wave[40:44] = struct.pack("<I", 10**9)
    (tmp_path / "secret.png").write_bytes(picture(8, 8))
    files = {
        "good.png": picture(9, 9),
        "half.jpg": picture(64, 64, "JPEG")[:1000],
        "liar.wav": bytes(wave),
        "header.png": png(25_000, 20_000, b""),
        "real.png": png(25_000, 20_000, bytes((25_000 // 8 + 1) * 20_000)),
        "text.mp3": b"no sound",
        "empty.png": b"",
        "empty.mp4": b"",
        "half.mkv": clip(0, 8)[:900],
        "good.mkv": clip(1, 4),
    }
    for name, content in files.items():
        (folder / "d" / name).write_bytes(content)
    (folder / "d" / "linked.png").symlink_to(tmp_path / "secret.png")
    (folder / "d" / "l").symlink_to(tmp_path)
    names = [*files, "missing.png", "../../secret.png", "linked.png", "l/secret.png", "https://example.com/a.png"]
    kinds = {"wav": "audio", "mp3": "audio", "mp4": "video", "mkv": "video"}
    named = {name: kinds.get(name.rpartition(".")[2], "image") for name in names}
    records: list[Any] = [{named[name]: f"d/{name}" if name[0] != "h" or "://" not in name else name} for name in names]
    records += [{"id": "x", "text": "one"}, {"id": "x", "text": "two"}, {"text": "\ud800"}, {"text": " "}, {"txt": "a"}]
    records += [{"text": "a", "n": 10**30}, {"parts": [{"type": "text", "text": "a", "weight": 10**400}]}, 5]
    records += [{"text": "one"}, {"text": "w", "image": {"bytes": base64.b64encode(b"no picture").decode()}}]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode() + b'{"text": "\xff"}\n{"text": \n'
    (folder / "a.jsonl").write_bytes(lines)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said, memory = prepared(tmp_path / "out", folder)
    rules = [
        *("file", "file", "file", "file", "file", "file", "file", "file"),
        *("missing file", "path", "link", "link", "path"),
        *(
            "utf-8",
            "empty",
            "schema",
            "schema",
            "schema",
            "schema",
            "file",
            "utf-8",
            "json",
            "duplicate id",
            "duplicate",
        ),
    ]
    assert [rule for _, rule in rejected(tmp_path / "out")] == rules
    assert f"{len(rules) + 3} records read = 3 documents" in said and f"+ {len(rules)} rejected" in said
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    for name, reason in zip([name for name in names if "good" not in name], reasons, strict=False):
        assert name in reason, reason
    assert memory < 400 * MB, f"{memory:,}"
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_enormous_input_takes_bounded_memory(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with open(folder / "a.jsonl", "wb") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * MB)
        file.write(b'"}\n' + jsonl({"text": "after"}))
    (folder / "b.jsonl").write_bytes(jsonl({"text": "x" * (9 * MB)}, {"text": "word " * 200_000}))
    hundred = gzip.compress(bytes(100 * MB), 1)
    (folder / "c.tgz").write_bytes(gzip.compress(tar({"a.txt": b"first"})[:1024]) + hundred * 12)
    (folder / "d.jsonl.gz").write_bytes(hundred * 12)
    giant = tarfile.TarInfo("a.txt")
    giant.size = 10**10
    (folder / "e.tar").write_bytes(giant.tobuf() + bytes(MB))
    said, memory = prepared(tmp_path / "out", folder)
    assert "2 documents" in said
    assert rejected(tmp_path / "out") == [
        ("in/a.jsonl:1", "too large"),
        ("in/b.jsonl:1", "too large"),
        ("in/c.tgz/a.txt", "damaged"),
        ("in/d.jsonl.gz:1", "damaged"),
        ("in/e.tar/a.txt", "damaged"),
    ]
    assert memory < 400 * MB, f"{memory:,}"


def test_what_is_held_of_records_does_not_grow_with_the_file(tmp_path):
    """One unit of 400,000 records: kept as Python objects, they would take hundreds of MB."""
    good = b"".join(b'{"text": "%d"}\n' % i for i in range(100_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(good + b"a\n" * 300_000))
    said, memory = prepared(tmp_path / "out", tmp_path / "a.jsonl.gz")
    assert "400,000 records read = 100,000 documents" in said and "+ 300,000 rejected" in said
    assert memory < 260 * MB, f"{memory:,}"


def test_a_word_without_end_does_not_keep_the_tokenizer_busy(tmp_path):
    rng = np.random.default_rng(0)
    dna = "".join(rng.choice(list("ACGT"), 200_000))
    texts = ["A word.", dna, " " * 200_000, "x" * 200_000]
    assert all("".join(module._cut(text)) == text for text in (*texts, ""))
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"text": f"{text}."} for text in texts)))
    began = time.monotonic()
    module.prepare([tmp_path / "a.jsonl"], tmp_path / "out", module.Options(tokenizer_size=1000), 1, lambda _: None)
    assert time.monotonic() - began < 30 and len(Prepared.open(tmp_path / "out").index) == 4


@pytest.mark.slow
def test_a_data_set_larger_than_memory_may_be_takes_bounded_memory(tmp_path):
    """600 MB of noise in pictures and texts."""
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(200):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (1000, 1000, 3), np.uint8)).save(file, "PNG", compress_level=1)
            for name, content in ((f"{i}.png", file.getvalue()), (f"{i}.txt", b"noise")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    _, memory = prepared(tmp_path / "out", tmp_path / "a.tar")
    data = Prepared.open(tmp_path / "out")
    assert len(data.index) == 200 and data.index.nbytes.sum() > 590 * MB
    assert memory < 500 * MB, f"{memory:,}"
