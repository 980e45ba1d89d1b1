"""`drover data ...`: the user's own data, prepared, counted and looked at."""

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from launch.parsing import Command
from sharding.errors import UserError


def add_data_commands(subparsers: Any) -> dict[str, Command]:
    """Adds the commands to argparse's `subparsers`; returns their parsers by name."""
    return dict(maker(subparsers) for maker in (_add_prepare, _add_inspect, _add_show))


def _add_prepare(subparsers: Any) -> tuple[str, Command]:
    prepare = subparsers.add_parser(
        "data prepare",
        run=_prepare,
        usage="drover data prepare SOURCE [SOURCE ...] --out DIR [options]",
        help="make training data from your own files",
        description="Reads JSONL, Parquet and WebDataset tar files, and folders of such files or of texts, images, videos "
        "and sounds; writes them, tokenised, as one data set. The same command goes on where it was stopped. "
        "docs/DATA.md has the form of a document.",
    )
    prepare.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="files and folders to read")
    prepare.flag("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    prepare.flag(
        "--tokenizer",
        default="bpe",
        metavar="NAME",
        help="bpe (default: trained on this data), bytes, or the path of a tokenizer.json or of another data set",
    )
    prepare.flag("--tokenizer-size", type=int, default=8192, metavar="N", help="tokens of a bpe (default: 8192)")
    prepare.flag(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one for each core)"
    )
    prepare.flag(
        "--held-out",
        type=float,
        default=0.005,
        metavar="SHARE",
        help="of the documents that do not say their split, by the hash of their id (default: 0.005)",
    )
    prepare.flag(
        "--max-record-mb", type=float, default=64.0, metavar="N", help="largest record, files included (default: 64)"
    )
    prepare.flag("--filter", action="append", default=[], metavar="NAME=N", help="refuse documents; see docs/DATA.md")
    prepare.flag("--transform", action="append", default=[], metavar="NAME", help="change texts; see docs/DATA.md")
    prepare.flag(
        "--classifier", default="", metavar="FILE.py:NAME", help="your function, run on each document: why to refuse it"
    )
    prepare.flag("--keep-duplicates", action="store_true", help="keep documents whose content an earlier one has")
    return "data prepare", prepare


def _prepare(arguments: argparse.Namespace) -> None:
    if arguments.workers < 1:
        raise UserError(f"--workers: found {arguments.workers}, expected 1 or more")
    from data.filters import parse_filter
    from data.prepare import Options, Told, prepare
    from trainer.progress import prepare_bar

    options = Options(
        tokenizer=arguments.tokenizer,
        tokenizer_size=arguments.tokenizer_size,
        held_out=arguments.held_out,
        max_record_mb=arguments.max_record_mb,
        filters=tuple(parse_filter(written) for written in arguments.filter),
        transforms=tuple(arguments.transform),
        classifier=arguments.classifier,
        keep_duplicates=arguments.keep_duplicates,
    )
    with contextlib.ExitStack() as bars:
        bar, doing = None, ""

        def tell(told: Told) -> None:
            nonlocal bar, doing
            if bar is None or told.doing != doing:
                bars.close()
                bar, doing = bars.enter_context(prepare_bar(told.doing)), told.doing
            bar(told)

        facts = prepare(arguments.sources, arguments.out, options, arguments.workers, tell)
    print(f"{arguments.out}: {_counted(facts)}")
    for folder, count in facts["read_only_if_named"].items():
        print(
            f"{folder}: {count:,} files beside its JSONL, Parquet and tar files were read only where a record names them. To "
            "make documents of the others, put them in a folder of their own."
        )
    print(f"train on it: --config.data.paths.NAME={arguments.out} --config.data.tokenizer={arguments.out}")


def _counted(facts: dict[str, Any]) -> str:
    files = "".join(f", {count:,} {kind} files" for kind, count in facts["files"].items() if count)
    rejected = sum(facts["rejected"].values())
    rules = ", ".join(f"{count:,} {rule}" for rule, count in facts["rejected"].items())
    return (
        f"{facts['read']:,} records read = {facts['written']:,} documents ({facts['held_out']:,} held out; "
        f"{facts['tokens']:,} tokens of text{files}) + {rejected:,} rejected"
        + (f" (rejected.jsonl: {rules})" if rejected else "")
    )


def _add_inspect(subparsers: Any) -> tuple[str, Command]:
    inspect = subparsers.add_parser(
        "data inspect",
        run=_inspect,
        usage="drover data inspect DIR [--config FILE [--config.NAME=VALUE ...]] [--json]",
        help="count prepared data, or a teacher's targets",
        description="Counts the documents of a prepared data set, their lengths, tokens, files and bytes, and what was "
        "rejected; or the segments, tokens and bytes of a cache of a teacher's targets, and tells how they were made.",
    )
    inspect.add_argument("folder", type=Path, metavar="DIR", help="made by drover data prepare or by drover teach")
    inspect.flag("--config", metavar="FILE[:ARG]", help="count also the tokens that this run's model makes of files")
    inspect.flag("--json", action="store_true", help="as JSON")
    return "data inspect", inspect


def _inspect(arguments: argparse.Namespace) -> None:
    if arguments.overrides and not arguments.config:
        raise UserError("overrides (--config.NAME=VALUE) go with --config FILE")
    from data.inspect import inspect_data, inspect_rows, render

    if (arguments.folder / "header.json").exists():
        if arguments.config:
            raise UserError(f"--config: found with {arguments.folder}, a cache of targets; it goes with prepared data.")
        from data.target_cache import describe

        facts = describe(arguments.folder)
        print(json.dumps(facts, indent=2) if arguments.json else render(facts, str(arguments.folder)))
        return
    facts = inspect_data(arguments.folder)
    if arguments.config:
        from launch.config_file import load_run

        run = load_run(arguments.config, arguments.overrides)
        facts |= {f"in rows of {run.name}": inspect_rows(arguments.folder, run.data, run.media)}
    print(json.dumps(facts, indent=2) if arguments.json else render(facts, str(arguments.folder)))
    if facts["files"] and not arguments.config and not arguments.json:
        print(
            f"  how many tokens the files are depends on the model: --config FILE counts them ({', '.join(facts['files'])})"
        )


def _add_show(subparsers: Any) -> tuple[str, Command]:
    show = subparsers.add_parser(
        "data show",
        run=_show,
        usage="drover data show (--config FILE [--config.NAME=VALUE ...] | --workdir RUN) [--step N] [--out FILE.html]",
        help="a page of the batch that a step trains on",
        description="Writes a page of one batch as the model gets it: rows, segments, texts with their weights in the loss, "
        "images and sounds in their places. Of a run (--workdir), the batch that it trained on, whatever was changed since.",
    )
    one = show.one_of()
    show.flag("--config", one, metavar="FILE[:ARG]", help="config file (Python code, which is run)")
    show.flag("--workdir", one, type=Path, metavar="RUN", help="run directory; quick from its checkpoints on")
    show.flag("--step", type=int, default=1, metavar="N", help="from 1, the default")
    show.flag("--held-out", action="store_true", help="held-out batch N instead")
    show.flag("--out", type=Path, metavar="FILE.html", help="default: batch-N.html")
    return "data show", show


def _show(arguments: argparse.Namespace) -> None:
    step, held_out = arguments.step, arguments.held_out
    if step < 1:
        raise UserError(f"--step: found {step}, expected 1 or more")
    if arguments.workdir:
        if arguments.overrides:
            raise UserError("overrides (--config.NAME=VALUE) go with --config FILE; a run has its config")
        os.environ["JAX_PLATFORMS"] = "cpu"  # the other devices may be the run's, which goes on
        from launch import environment

        environment.prepare(arguments.traceback)
        from trainer.rundir import RunDirectory

        directory = RunDirectory(arguments.workdir)
        run = directory.load_config()
    else:
        from launch.config_file import load_run

        directory, run = None, load_run(arguments.config, arguments.overrides)
    if step > run.steps and not held_out:
        raise UserError(f"--step: found {step:,}, expected at most {run.steps:,}, the steps of {run.name}")
    from trainer.data_page import reach, write_data_page

    if directory:
        from trainer.trained_data import trained_data

        dataset, first = trained_data(directory, run, step, held_out)
    else:
        from data.pipeline import build_dataset

        dataset, first = build_dataset(run.data, run.media, "heldout" if held_out else "train"), 0
    reach(dataset, first, step - 1)
    print(write_data_page(run.name, dataset, step, held_out, arguments.out or Path(f"batch-{step}.html")))
