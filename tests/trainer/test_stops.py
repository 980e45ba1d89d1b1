"""Runs that stop by themselves: with one message, and with what was saved before left whole."""

import json
from pathlib import Path

import pytest

from data.pipeline import build_dataset
from tests.data import llama4
from tests.trainer.processes import finish, metrics, start
from tests.trainer.saved_run import micro


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    # The first step throws the weights so far away that nothing after it is finite.
    arguments = (
        "--config.optimizer.peak_lr=1e30",
        "--config.optimizer.clip_norm=0",
        "--config.optimizer.max_skipped=3",
    )
    output = finish(start(tmp_path, *arguments), 2)
    assert "was not finite 3 steps in a row" in output and "optimizer.peak_lr" in output
    assert "Traceback" not in output
    assert metrics(tmp_path)[-1]["skipped"] == 3


@pytest.mark.slow
def test_a_save_that_finds_no_room_stops_the_run_and_is_explained(tmp_path: Path) -> None:
    run = micro()
    build_dataset(run.data, run.media, "train")  # what is prepared once has larger files
    small_files = ("sh", "-c", 'ulimit -f 300; exec "$@"', "sh")  # 150 KiB
    output = finish(start(tmp_path, "--config.compile_cache=", through=small_files), 2)
    assert "cannot be written" in output and "start the same command again" in output
    assert "Traceback" not in output and "checkpoint saved" not in output
    assert not [entry for entry in (tmp_path / "checkpoints").iterdir() if entry.name.isdigit()]
    finish(start(tmp_path, "--allow-config-change"))
    assert json.loads((tmp_path / "evaluation.json").read_text())["step"] == 40


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(llama4.serialised())
    ids = llama4.BPE_SIZE + len(llama4.SPECIAL)
    output = finish(start(tmp_path / "run", f"--config.data.tokenizer={tmp_path}"), 2)
    told = " ".join(output.split())
    assert f"model.vocab_size: found 320, expected at least {ids}, as many ids as" in told
    assert "/tokenizer.json has" in told and "Traceback" not in output
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_a_run_that_ends_while_it_compiles_has_said_what_it_is(tmp_path: Path) -> None:
    config = tmp_path / "large.py"
    config.write_text(
        "from tests.nano import get_config\n"
        "from trainer.loop import Run\n"
        "def compiled(*_):\n"
        "    raise MemoryError\n"
        "Run._compiled = compiled\n"
    )
    output = finish(
        start(tmp_path / "run", config=str(config), environment={"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}), 2
    )
    said, _, told = output.partition("drover train: out of memory")
    assert told, output
    for label in (
        "drover: nano",
        "devices",
        "mesh",
        "weights and optimizer state",
        "parameters",
        "starts from",
        "compiler",
    ):
        assert label in said, output
    assert "--xla_cpu_enable_fast_math=false" in said and "first step" not in said
