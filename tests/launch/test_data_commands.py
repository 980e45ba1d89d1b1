"""`drover data prepare`, `inspect` and `show` as a user gives them, one after the other."""

import json
import re
from pathlib import Path

import pytest

from data.documents import MEDIA
from launch.cli import main
from tests.data import mixed
from tests.data.prepare_work import InProcess

ROOT = Path(__file__).parents[2]
CONFIG = """
from model.config import AudioConfig
from tests import micro
from trainer.sections import to_config_dict

def get_config():
    config = micro.get_config()
    audio = AudioConfig(mel_bins=8, window_frames=32, hidden_size=8, num_layers=1, num_heads=2, ffn_size=8)
    config.model.audio = to_config_dict(audio)
    config.data.mixture, config.data.paths = {{"mine": 1.0}}, {{"mine": "{0}"}}
    config.data.tokenizer, config.data.cache_dir = "{0}", "{1}"
    config.data.windows_per_row, config.data.tiles_per_row = 24, 24
    return config
"""


def said(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """What a command prints: on stderr if it fails."""
    found = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert found == status, err
    return err if status else out


def test_data_are_prepared_counted_and_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("launch.environment.prepare", lambda verbose: None)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", InProcess)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    records = mixed.write(source, 20)
    (source / "bad.jsonl").write_text('no json\n{"txt": 1}\nno json either\n')
    (source / "lone.txt").write_text("never read")
    beside = len([path for path in source.iterdir() if path.suffix != ".jsonl"])

    text = said(capsys, "data", "prepare", source, "--out", out, "--tokenizer", "bytes", "--workers", "2")
    assert f"{len(records) + 3} records read = {len(records)} documents (2 held out;" in text
    assert "+ 3 rejected (rejected.jsonl: 2 json, 1 schema)" in text
    assert (
        f"{source}: {beside} files beside its JSONL, Parquet and tar files were read only where a record names" in text
    )
    assert json.loads((out / "dataset.json").read_text())["read_only_if_named"] == {str(source): beside}
    assert "--out" in said(capsys, "data", "prepare", source, "--out", out, status=2)

    text = said(capsys, "data", "inspect", out)
    files = {kind: sum(part["type"] == kind for record in records for part in record["parts"]) for kind in MEDIA}
    assert f"{out!s}\n" in text and re.search(rf"documents +train {len(records) - 2}  held out 2\n", text)
    for kind, count in files.items():
        assert re.search(rf"    {kind}\n +files +{count}\n", text), text
    assert re.search(r"rejected +json 2  schema 1\n", text)
    assert "source/bad.jsonl:1: the line: found no JSON" in text and "source/bad.jsonl:2: found the fields txt" in text
    assert f"{out / 'rejected.jsonl'}\n" in text
    assert "--config FILE counts them (image, video, audio)" in text

    config = tmp_path / "mine.py"
    config.write_text(CONFIG.format(out, tmp_path / "cache"))
    text = said(capsys, "data", "inspect", out, "--config", config)
    counts = re.search(
        r"in rows of micro\n +tokens +text [\d,]+  image ([\d,]+)  video ([\d,]+)  audio ([\d,]+)\n", text
    )
    assert counts and "--config FILE counts" not in text
    plain = json.loads(said(capsys, "data", "inspect", out, "--json", "--config", config))
    tokens = plain["in rows of micro"]["tokens"]
    assert [f"{tokens[kind]:,}" for kind in MEDIA] == list(counts.groups())

    page = tmp_path / "page.html"
    text = said(capsys, "data", "show", "--config", config, "--step", 2, "--out", page)
    assert text.startswith(f"{page}: 2 rows, ") and page.read_text().startswith("<!doctype html>")
    assert "<h1>micro: batch of step 2</h1>" in page.read_text() and 'src="data:image/png;base64,' in page.read_text()
    said(capsys, "data", "show", "--config", config, "--held-out", "--out", page)
    assert "<h1>micro: held-out batch 1</h1>" in page.read_text()
    for arguments, expected in (
        (["--config", config, "--step", 0], "--step: found 0, expected 1 or more"),
        (["--config", config, "--step", 41], "--step: found 41, expected at most 40, the steps of micro"),
        (["--step", 1], "one of the arguments --config --workdir is required"),
        (["--workdir", tmp_path, "--config.steps=3"], "overrides .* go with --config FILE"),
        (["--workdir", tmp_path], "config.json: not found; expected a run directory"),
    ):
        assert re.search(expected, said(capsys, "data", "show", *arguments, status=2)), expected
