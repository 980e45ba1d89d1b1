"""The commands: their flags, and what each runs. Heavy imports stand inside the functions that need them."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import environment, processes
from launch.data_commands import add_data_commands
from launch.parsing import Command
from sharding.errors import UserError

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.models import LoadedModel

OVERRIDES = """\
overrides:
  --config.NAME=VALUE   sets one option of the configuration, such as --config.optimizer.peak_lr=1e-3.
                        `drover config --config FILE` prints every option with its value and what it means.
"""
SHARD_GB = 5.0
_FILE = {"metavar": "FILE[:ARG]", "help": "config file (Python code, which is run)"}
_DIRECTORY: dict[str, Any] = {"type": Path, "metavar": "DIR"}


def add_commands(subparsers: Any) -> dict[str, Command]:
    """Adds every command to argparse's `subparsers`; returns their parsers by name."""
    makers = (
        _add_train,
        _add_teach,
        _add_config,
        _add_inspect,
        _add_generate,
        _add_score,
        _add_import,
        _add_export,
        _add_report,
    )
    return dict(maker(subparsers) for maker in makers) | add_data_commands(subparsers)


def _add_train(subparsers: Any) -> tuple[str, Command]:
    train = subparsers.add_parser(
        "train",
        run=_train,
        usage="drover train --config FILE [--workdir DIR] [--config.NAME=VALUE ...]",
        help="train a model, or go on with a run that was stopped",
        description="Trains a model. The same command on the same run directory goes on where it was stopped.",
        epilog=OVERRIDES,
    )
    train.flag("--config", required=True, **_FILE)
    train.flag("--workdir", **_DIRECTORY, help="run directory (default: runs/NAME, by the name in the configuration)")
    train.flag(
        "--allow-config-change",
        action="store_true",
        help="go on although the run was started with another config or teacher",
    )
    _add_process_flags(train)
    return "train", train


def _add_process_flags(command: Command) -> None:
    command.flag("--processes", type=int, metavar="N", help="start so many processes on this machine, one device each")
    command.flag("--coordinator", metavar="HOST:PORT", help="of process 0, where JAX does not find it out by itself")
    command.flag(
        "--num-processes", type=int, metavar="N", help="processes in all, started by you; with --coordinator, or 1"
    )
    command.flag("--process-id", type=int, metavar="I", help="number of this one, from 0; with --coordinator")
    command.flag(
        "--peer-timeout", metavar="SECONDS", help="end when another process is silent for so long (default: 60)"
    )


def _train(arguments: argparse.Namespace) -> None:
    from launch.config_file import load_run

    run = load_run(arguments.config, arguments.overrides)
    # Kept in the arguments: a crash leaves its traceback there.
    arguments.workdir = arguments.workdir or Path("runs") / run.name
    reached = _joined(arguments)
    from trainer.loop import train

    with _leaving(arguments):
        train(run, arguments.workdir, allow_config_change=arguments.allow_config_change, reached=reached)


def _joined(arguments: argparse.Namespace) -> Callable[[int], None]:
    """Starts what the process needs, and finds the others; returns what tells them how far this one is. With `--processes`
    it starts them instead, and does not return."""
    if arguments.processes is not None:
        if arguments.processes < 1:
            raise UserError(f"--processes: found {arguments.processes}, expected 1 or more")
        sys.exit(processes.start_local(arguments.processes, processes.again(sys.argv[1:])))
    environment.prepare(arguments.traceback)
    arguments.watch = processes.join(arguments)
    return arguments.watch.reached if arguments.watch else lambda step: None


@contextlib.contextmanager
def _leaving(arguments: argparse.Namespace) -> Iterator[None]:
    """Tells the other processes that this one has done its part, unless it fails."""
    try:
        yield
    except SystemExit:
        _leave(arguments)
        raise
    _leave(arguments)


def _leave(arguments: argparse.Namespace) -> None:
    if arguments.watch:
        arguments.watch.leave()


def _add_teach(subparsers: Any) -> tuple[str, Command]:
    teach = subparsers.add_parser(
        "teach",
        run=_teach,
        usage="drover teach --config FILE --out CACHE [--part I/N] [--processes N] [--config.NAME=VALUE ...]",
        help="let the teacher of a run say once what students learn from it, and keep that",
        description="Runs the teacher (distill.teacher) over the batches of a student's run and keeps its targets: "
        "distill.draws of each token. Students read them with --config.distill.source=cache --config.distill.cache=CACHE. "
        "The same command goes on where it was stopped.",
        epilog=OVERRIDES,
    )
    teach.flag("--config", required=True, **_FILE)
    teach.flag("--out", required=True, **_DIRECTORY, help="folder of the cache")
    teach.flag(
        "--part",
        default="1/1",
        metavar="I/N",
        help="the Ith of N shares of the work, which N commands do (default: 1/1)",
    )
    _add_process_flags(teach)
    return "teach", teach


def _teach(arguments: argparse.Namespace) -> None:
    from launch.config_file import load_run

    part, _, parts = arguments.part.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--part: found {arguments.part}, expected I/N with I from 1 to N, such as 1/4")
    run = load_run(arguments.config, arguments.overrides)
    reached = _joined(arguments)
    from trainer.teach import teach

    with _leaving(arguments):
        teach(run, arguments.out, int(part) - 1, int(parts), reached=reached)


def _add_config(subparsers: Any) -> tuple[str, Command]:
    config = subparsers.add_parser(
        "config",
        run=_config,
        usage="drover config --config FILE [--config.NAME=VALUE ...] [--json]",
        help="print the resolved configuration of a run, every option",
        description="Prints every option: its value, whether that differs from the default (*), and what it means.",
        epilog=OVERRIDES,
    )
    config.flag("--config", required=True, **_FILE)
    config.flag("--json", action="store_true", help="values only, as JSON")
    return "config", config


def _config(arguments: argparse.Namespace) -> None:
    from launch.config_file import load_run
    from trainer.sections import render, to_plain

    run = load_run(arguments.config, arguments.overrides)
    print(json.dumps(to_plain(run), indent=2) if arguments.json else render(run).rstrip())


def _add_inspect(subparsers: Any) -> tuple[str, Command]:
    inspect = subparsers.add_parser(
        "inspect",
        run=_inspect,
        usage="drover inspect (--config FILE [--config.NAME=VALUE ...] | --workdir DIR | --hf HF_DIR) [--devices N] [--json]",
        help="count a model: parameters, FLOPs, cache and memory; plan its run on any number of devices",
        description="Counts parameters by part, FLOPs per token, bytes of the decoding cache, and memory by precision. With "
        "--devices it also lays the run out over so many devices, none of which has to be there, traces its training step, and "
        "counts what each of them holds.",
        epilog=OVERRIDES,
    )
    which = inspect.one_of()
    inspect.flag("--config", among=which, **_FILE)
    inspect.flag("--workdir", among=which, **_DIRECTORY, help="run directory")
    inspect.flag(
        "--hf", among=which, type=Path, metavar="HF_DIR", help="Hugging Face directory; its config.json is read"
    )
    inspect.flag("--devices", type=int, metavar="N", help="plan the run on so many devices; not with --hf")
    inspect.flag(
        "--teacher-config",
        metavar="FILE[:ARG]",
        help="config file of the teacher, for a plan before distill.teacher has weights; with --devices",
    )
    inspect.flag("--json", action="store_true", help="numbers only, as JSON")
    return "inspect", inspect


def _inspect(arguments: argparse.Namespace) -> None:
    if arguments.overrides and not arguments.config:
        raise UserError("overrides (--config.NAME=VALUE) go with --config FILE")
    if arguments.devices is not None and (arguments.hf or arguments.devices < 1):
        found = "--hf, a model without a run" if arguments.hf else str(arguments.devices)
        raise UserError(f"--devices: found {found}; expected 1 or more, and --config or --workdir")
    if arguments.teacher_config and arguments.devices is None:
        raise UserError("--teacher-config: is for a plan; give --devices as well, such as 4096")
    run = None
    if arguments.hf:
        from trainer.hf.config import read_model_config

        model, name = read_model_config(arguments.hf), str(arguments.hf)
        length = model.chunk_size
    else:
        run = _run_of(arguments)
        model, length, name = run.model, run.data.sequence_length, run.name
    environment.prepare(arguments.traceback)
    from trainer.inspect import inspect_model, show

    facts = inspect_model(model, length)
    if run and arguments.devices:
        facts["plan"] = _plan(run, arguments)
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    show(facts, name)
    if "plan" in facts:
        from trainer.plan import show_plan

        show_plan(facts["plan"])


def _plan(run: "RunConfig", arguments: argparse.Namespace) -> dict[str, Any]:
    from launch.config_file import load_run
    from trainer.plan import plan_run

    if arguments.teacher_config and not run.distill:
        raise UserError("--teacher-config: found a run without a teacher; expected one with the section distill")
    teacher = load_run(arguments.teacher_config, {}).model if arguments.teacher_config else None
    return plan_run(run, arguments.devices, teacher)


def _run_of(arguments: argparse.Namespace) -> "RunConfig":
    """The run of `--config`, or of `--workdir`."""
    if arguments.config:
        from launch.config_file import load_run

        return load_run(arguments.config, arguments.overrides)
    _check_run_directory(arguments.workdir)
    from trainer.rundir import RunDirectory

    return RunDirectory(arguments.workdir).load_config()


def _add_generate(subparsers: Any) -> tuple[str, Command]:
    generate = subparsers.add_parser(
        "generate",
        run=_generate,
        help="answer a prompt about images, or go on with a text",
        description="Writes what a model says to a prompt, and to the images before it if there are any.",
    )
    _add_model(generate)
    generate.flag("--image", type=Path, nargs="+", action="extend", default=[], metavar="FILE", help="images, in order")
    generate.flag("--prompt", required=True, metavar="TEXT", help="text to answer or to go on with")
    generate.flag("--chat", action="store_true", help="give the prompt as a user's turn, to a model trained on turns")
    generate.flag("--system", metavar="TEXT", help="a system turn before it; with --chat")
    generate.flag("--max-tokens", type=int, default=64, metavar="N", help="tokens at most (default: 64)")
    generate.flag(
        "--temperature", type=float, default=0.0, metavar="X", help="0, the default, always takes the likeliest token"
    )
    generate.flag(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together reach this probability (default: 1, all)",
    )
    generate.flag("--seed", type=int, default=0, metavar="N", help="seed of the draws at a temperature above 0")
    generate.flag("--first-line", action="store_true", help="stop at the end of the first line, as answers do")
    generate.flag(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="write each piece as it comes (default: on a terminal), or all at the end",
    )
    return "generate", generate


def _generate(arguments: argparse.Namespace) -> None:
    for path in arguments.image:
        if not path.is_file():
            raise UserError(f"image {path} does not exist; give --image the path of a picture (PNG, JPEG, ...)")
    if arguments.max_tokens < 1:
        raise UserError(f"--max-tokens: found {arguments.max_tokens}, expected 1 or more")
    if not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature: found {arguments.temperature}, expected a number that is 0 or more")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p: found {arguments.top_p}, expected a probability above 0, at most 1")
    if arguments.top_p < 1 and not arguments.temperature:
        raise UserError("--top-p: has no effect at temperature 0; give --temperature as well, such as 1")
    if arguments.system is not None and not arguments.chat:
        raise UserError("--system: is a turn of a conversation; give --chat as well")
    model = _load_model(arguments)
    from trainer.generate import Request, generate

    request = Request(
        text=arguments.prompt,
        images=arguments.image,
        chat=arguments.chat,
        system=arguments.system,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    pieces = generate(model, request)
    if arguments.first_line:
        pieces = _first_line(pieces)
    stream = sys.stdout.isatty() if arguments.stream is None else arguments.stream
    for piece in pieces if stream else ["".join(pieces)]:
        print(piece, end="", flush=True)
    print()


def _first_line(pieces: Iterator[str]) -> Iterator[str]:
    for piece in pieces:
        line, end, _ = piece.partition("\n")
        yield line
        if end:
            return


def _add_score(subparsers: Any) -> tuple[str, Command]:
    score = subparsers.add_parser(
        "score",
        run=_score,
        help="log-probabilities of documents, token by token",
        description="Scores every document of a JSON-lines file: {'text': ...}, {'tokens': [...]}, {'parts': [...]} with "
        "images, or {'messages': [...]}, one a line. docs/CHECKPOINTS.md has the fields.",
    )
    _add_model(score)
    score.flag(
        "--input", type=Path, required=True, metavar="FILE.jsonl", help="documents; image paths beside this file"
    )
    score.flag("--output", type=Path, required=True, metavar="FILE.jsonl", help="a new file")
    return "score", score


def _score(arguments: argparse.Namespace) -> None:
    if not arguments.input.is_file():
        raise UserError(f"--input {arguments.input}: there is no such file")
    if arguments.output.exists():
        raise UserError(f"--output {arguments.output}: exists already. Give another file, or remove it.")
    model = _load_model(arguments)
    from trainer.score import score_file

    summary = score_file(model, arguments.input, arguments.output)
    mean = summary.logprob / max(summary.tokens, 1)
    print(
        f"{arguments.output}: {summary.documents:,} documents, {summary.tokens:,} scored tokens, "
        f"mean log-probability {mean:.4f}"
    )


def _add_import(subparsers: Any) -> tuple[str, Command]:
    importer = subparsers.add_parser(
        "import",
        run=_import,
        usage="drover import HF_DIR RUN_DIR [--config FILE [--config.NAME=VALUE ...]]",
        help="make a run directory from Hugging Face Llama 4 weights",
        description="Makes RUN_DIR from the safetensors in HF_DIR, tensor by tensor, in their own precision. Ask it with "
        "generate and score, train from it with the same --config, or give it to other runs as init.from_run.",
        epilog=OVERRIDES,
    )
    importer.add_argument("source", type=Path, metavar="HF_DIR", help="config.json, *.safetensors, maybe a tokenizer")
    importer.add_argument("target", type=Path, metavar="RUN_DIR", help="a new directory")
    importer.flag("--config", **_FILE)
    return "import", importer


def _import(arguments: argparse.Namespace) -> None:
    if arguments.overrides and not arguments.config:
        raise UserError("overrides (--config.NAME=VALUE) go with --config FILE")
    run = None
    if arguments.config:
        from launch.config_file import load_run

        run = load_run(arguments.config, arguments.overrides)
    environment.prepare(arguments.traceback)
    from trainer.hf.importer import import_checkpoint
    from trainer.report_text import compact

    found = import_checkpoint(arguments.source, arguments.target, run, _note)
    print(f"{arguments.target}: {len(found.tensors):,} tensors, {compact(found.nbytes, 'B')}")


def _add_export(subparsers: Any) -> tuple[str, Command]:
    export = subparsers.add_parser(
        "export",
        run=_export,
        help="write a checkpoint as a Hugging Face directory",
        description="Writes what transformers and vLLM open: safetensors, config.json, tokenizer and processor files.",
    )
    export.add_argument("source", type=Path, metavar="RUN_DIR", help="run directory, or one of its checkpoints")
    export.add_argument("target", type=Path, metavar="HF_DIR", help="a new directory")
    export.flag("--dtype", choices=("float32", "bfloat16"), help="precision of the weights (default: as stored)")
    export.flag("--shard-gb", type=float, default=SHARD_GB, metavar="N", help="GB of a file at most (default: 5)")
    return "export", export


def _export(arguments: argparse.Namespace) -> None:
    if not arguments.shard_gb > 0:
        raise UserError(f"--shard-gb: found {arguments.shard_gb}, expected more than 0")
    environment.prepare(arguments.traceback)
    from trainer.hf.exporter import export_checkpoint
    from trainer.report_text import compact

    most = int(arguments.shard_gb * 10**9)
    done = export_checkpoint(arguments.source, arguments.target, arguments.dtype, most, _note)
    print(f"{arguments.target}: step {done.step}, {done.tensors:,} tensors, {compact(done.nbytes, 'B')}")


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _add_report(subparsers: Any) -> tuple[str, Command]:
    report = subparsers.add_parser(
        "report",
        run=_report,
        help="write report.html of a run again",
        description="Writes report.html from what the run directory holds, and prints its path.",
    )
    report.flag("--workdir", **_DIRECTORY, required=True, help="run directory")
    return "report", report


def _report(arguments: argparse.Namespace) -> None:
    _check_run_directory(arguments.workdir)
    environment.prepare(arguments.traceback)
    from trainer.report import write_report

    print(write_report(arguments.workdir))


def _add_model(command: Command) -> None:
    """The flags that name a model: of a run, or of a Hugging Face directory."""
    which = command.one_of()
    command.flag("--workdir", among=which, **_DIRECTORY, help="run directory of the model")
    command.flag("--hf", among=which, type=Path, metavar="HF_DIR", help="Hugging Face directory of the model")


def _load_model(arguments: argparse.Namespace) -> "LoadedModel":
    if arguments.workdir:
        _check_run_directory(arguments.workdir)
    environment.prepare(arguments.traceback)
    from trainer.models import load_hf, load_run

    return load_run(arguments.workdir) if arguments.workdir else load_hf(arguments.hf)


def _check_run_directory(workdir: Path) -> None:
    if not (workdir / "config.json").is_file():
        found = "has no config.json" if workdir.is_dir() else "does not exist"
        raise UserError(f"run directory {workdir} {found}; give --workdir a directory made by `drover train`")
