"""The command line as a new user meets it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import cli
from trainer.config import RunConfig
from trainer.generate import Request
from trainer.sections import from_plain

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    # It changes the process for good.
    monkeypatch.setattr("launch.environment.prepare", lambda verbose: None)


def drover(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def complaint(capsys, *arguments: str) -> str:
    """What a command that the user got wrong says on stderr."""
    status = cli.main(arguments)
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    return err


# What needs no jax answers at once

QUICK = [
    ["--help"],
    ["train", "--help"],
    ["--version"],
    ["train", "--confg", "configs/tiny.py"],
    ["trian"],
    ["config", "--config", "configs/tiny.py"],
    ["config", "--config", "configs/behemoth.py", "--config.steps=abc"],
    ["generate", "--workdir", "no/such/run", "--prompt", "hello"],
]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_help_config_and_mistakes_import_no_jax(arguments):
    code = (
        "import sys\n"
        "from launch.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('jax', 'jaxlib', 'flax', 'grain', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_is_quick():
    # A fifth of a second on an idle machine; the bound leaves room for a busy one.
    started = time.perf_counter()
    assert drover("--help").returncode == 0
    assert time.perf_counter() - started < 3


# What it says


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "did you mean train?"),
        (["plan"], "the commands are train, teach, config, inspect"),
        (["train"], "required: --config"),
        (["train", "--cofnig", "x.py"], "no flag --cofnig; did you mean --config?"),
        (["train", "--config", "configs/tiny.py", "--wrokdir=x"], "did you mean --workdir?"),
        (["train", "--config", "configs/tiny.py", "--optimizer.peak_lr=1"], "--config.optimizer.peak_lr=VALUE"),
        (["train", "--config", "configs/tiny.py", "--peak_lr", "1"], "--config.optimizer.peak_lr=VALUE"),
        (["train", "--config", "configs/tiny.py", "--config.steps"], "write --config.steps=VALUE"),
        (["train", "--config", "configs/tiny.py", "--config.steps", "--workdir=x"], "write --config.steps=VALUE"),
        (["train", "--config", "configs/tiny.py", "stray"], "stray"),
        (["train", "--config", "configs/tniy.py"], "configs/tniy.py does not exist; did you mean configs/tiny.py?"),
        (["train", "--config", "tiny"], "did you mean configs/tiny.py?"),
        (["config", "--config", "configs/tiny.py", "--jsno"], "did you mean --json?"),
        (["config", "--config", "configs/tiny.py", "--config.model.num_heads=7"], "num_heads=7: [1, 7]"),
        (["report", "--workdir", "x", "--config.steps=3"], "takes no overrides"),
        (["report", "--workdir", "no/such/run"], "no/such/run does not exist"),
        (["report", "--workdir", "configs"], "configs has no config.json"),
        (["generate", "--workdir", "x"], "required: --prompt"),
        (["generate", "--workdir", "x", "--prompt", "p", "--max-tokens", "many"], "invalid int value: 'many'"),
    ],
)
def test_a_mistake_is_answered_with_its_cure(capsys, arguments, told):
    assert told in complaint(capsys, *arguments)


def test_nothing_at_all_is_answered_with_the_help(capsys):
    assert cli.main([]) == 0
    assert "train a model" in capsys.readouterr().out


@pytest.mark.parametrize("spelling", [["--config.optimizer.peak_lr=0.25"], ["--config.optimizer.peak_lr", "0.25"]])
def test_an_override_may_be_written_with_or_without_an_equals_sign(capsys, spelling):
    assert cli.main(["config", "--config=configs/tiny.py", *spelling]) == 0
    assert "* optimizer.peak_lr = 0.25  (default" in capsys.readouterr().out


def test_the_last_of_two_overrides_counts_and_values_may_look_like_anything():
    arguments = ["--config.name=a=b", "--config.steps", "-5", "rest", "--config.steps=6"]
    assert cli.split_overrides(arguments) == (["rest"], {"name": "a=b", "steps": "6"})


def test_config_as_json_is_the_run(capsys):
    assert cli.main(["config", "--config", "configs/tiny.py", "--json"]) == 0
    assert from_plain(RunConfig, json.loads(capsys.readouterr().out)).name == "tiny"


def test_a_reader_that_leaves_early_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m launch.cli config --config configs/scout.py | head -1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("* name = 'scout'")
    assert done.stderr == ""


def test_a_traceback_comes_only_when_it_is_asked_for(capsys):
    for arguments in (["--traceback", "trian"], ["trian", "--traceback"]):
        assert cli.main(arguments) == 2
        assert "Traceback" in capsys.readouterr().err


# What it starts


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Other processes are looked for before jax has any device, and here another test may have asked it for one."""
    monkeypatch.setattr("launch.processes.join", lambda _: None)


def test_train_is_given_the_run_the_directory_and_who_watches(monkeypatch):
    calls, steps = [], []
    watch = SimpleNamespace(reached=steps.append, leave=lambda: steps.append("left"))
    monkeypatch.setattr("trainer.loop.train", lambda run, workdir, **options: calls.append((run, workdir, options)))
    assert cli.main(["train", "--config", "configs/tiny.py", "--config.name=mine"]) == 0
    monkeypatch.setattr("launch.processes.join", lambda _: watch)
    assert cli.main(["train", "--config", "configs/tiny.py", "--workdir", "w", "--allow-config-change"]) == 0
    (first, here, options), (second, there, more) = calls
    assert (first.name, here, options.pop("reached")(7)) == ("mine", Path("runs/mine"), None)
    assert (second.name, there, more.pop("reached")(8)) == ("tiny", Path("w"), None)
    assert (options, more) == ({"allow_config_change": False}, {"allow_config_change": True})
    assert steps == ["left", 8]


@pytest.fixture
def run_directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("source", ["--workdir", "--hf"])
def test_generate_writes_what_the_model_says(monkeypatch, capsys, run_directory, source, stream):
    image = run_directory / "a.png"
    image.touch()
    calls = []

    def generate(model, request):
        calls.append((model, request))
        yield from ("a ", "red ", "circle")

    monkeypatch.setattr("trainer.models.load_run", lambda path: ("--workdir", path))
    monkeypatch.setattr("trainer.models.load_hf", lambda path: ("--hf", path))
    monkeypatch.setattr("trainer.generate.generate", generate)
    flags = [source, str(run_directory), "--prompt", "what?", "--image", str(image), str(image), stream]
    sampling = ["--max-tokens=5", "--temperature=0.5", "--top-p", "0.9", "--seed=3", "--chat", "--system", "Be brief."]
    assert cli.main(["generate", *flags, "--image", str(image), *sampling]) == 0
    assert capsys.readouterr().out == "a red circle\n"
    ((model, request),) = calls
    assert model == (source, run_directory)
    assert request == Request("what?", [image] * 3, True, "Be brief.", 5, 0.5, 0.9, 3)


def test_generate_stops_at_the_end_of_the_first_line_when_asked(monkeypatch, capsys, run_directory):
    def generate(model, request):
        yield from ("red", " circle\nand", "more")

    monkeypatch.setattr("trainer.models.load_run", lambda path: path)
    monkeypatch.setattr("trainer.generate.generate", generate)
    flags = ["--workdir", str(run_directory), "--prompt", "what?"]
    assert cli.main(["generate", *flags, "--first-line"]) == 0
    assert capsys.readouterr().out == "red circle\n"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--image", "no.png"], "image no.png does not exist"),
        (["--max-tokens", "0"], "--max-tokens: found 0, expected 1 or more"),
        (["--temperature", "-1"], "--temperature: found -1.0"),
        (["--temperature", "nan"], "--temperature: found nan"),
        (["--temperature", "1", "--top-p", "0"], "--top-p: found 0.0"),
        (["--temperature", "1", "--top-p", "1.5"], "--top-p: found 1.5"),
        (["--top-p", "0.5"], "--top-p: has no effect at temperature 0"),
        (["--system", "x"], "--system: is a turn of a conversation; give --chat"),
        (["--hf", "x"], "not allowed with argument --workdir"),
    ],
)
def test_generate_refuses_before_anything_is_loaded(capsys, run_directory, flags, told):
    assert told in complaint(capsys, "generate", "--workdir", str(run_directory), "--prompt", "p", *flags)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["score", "--workdir", ".", "--input", "no.jsonl", "--output", "o"],
            "--input no.jsonl: there is no such file",
        ),
        (["score", "--workdir", ".", "--input", "README.md", "--output", "README.md"], "README.md: exists already"),
        (["score", "--input", "README.md", "--output", "o"], "one of the arguments --workdir --hf is required"),
        (["inspect"], "one of the arguments --config --workdir --hf is required"),
        (["inspect", "--hf", ".", "--config.steps=3"], "go with --config FILE"),
        (["inspect", "--hf", "."], "config.json: not found"),
        (["inspect", "--hf", ".", "--devices", "8"], "--devices: found --hf, a model without a run"),
        (["inspect", "--config", "configs/tiny.py", "--devices", "0"], "--devices: found 0; expected 1 or more"),
        (["inspect", "--config", "configs/tiny.py", "--teacher-config", "configs/tiny.py"], "give --devices as well"),
        (
            ["inspect", "--config", "configs/tiny.py", "--devices", "8", "--teacher-config", "configs/tiny.py"],
            "--teacher-config: found a run without a teacher",
        ),
        (["inspect", "--config", "configs/maverick.py", "--devices", "7"], "fsdp=7: "),
        (["import", "a"], "the following arguments are required: RUN_DIR"),
        (["import", "a", "b", "--config.steps=3"], "go with --config FILE"),
        (["import", "no/such", "b"], "no directory no/such"),
        (["export", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["export", "a", "b", "--shard-gb", "0"], "--shard-gb: found 0.0"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(capsys, arguments, told):
    assert told in complaint(capsys, *arguments)


def test_report_prints_where_it_was_written(monkeypatch, capsys, run_directory):
    monkeypatch.setattr("trainer.report.write_report", lambda workdir: workdir / "report.html")
    assert cli.main(["report", "--workdir", str(run_directory)]) == 0
    assert capsys.readouterr().out.strip() == str(run_directory / "report.html")


# What it does when something breaks


def test_a_crash_leaves_its_traceback_in_the_run_directory(monkeypatch, capsys, tmp_path):
    def train(*_, **__):
        raise RuntimeError("shapes (3,) and (4,) differ")

    monkeypatch.setattr("trainer.loop.train", train)
    arguments = ["train", "--config", "configs/tiny.py", "--workdir", str(tmp_path)]
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert "drover train: crashed: RuntimeError: shapes (3,) and (4,) differ" in err
    assert "Traceback" not in err
    (written,) = tmp_path.glob("crash-*.txt")
    assert str(written) in err
    assert 'raise RuntimeError("shapes (3,) and (4,) differ")' in written.read_text()

    assert cli.main([*arguments, "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_ends_without_a_traceback(monkeypatch, capsys, tmp_path):
    def train(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.loop.train", train)
    assert cli.main(["train", "--config", "configs/tiny.py", "--workdir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\ndrover train: interrupted\n"
