"""The command line: `drover train`, `config`, `generate` and `report`.

Only the command that needs jax imports it: help, a resolved config and a message about a mistake come at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from launch import __version__, environment, failures
from sharding.errors import UserError

OVERRIDES = """\
overrides:
  --config.NAME=VALUE   sets one option of the configuration, such as --config.optimizer.peak_lr=1e-3.
                        `drover config --config FILE` prints every option with its value and what it means.
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{self.format_usage()}`{self.prog} --help` explains.")


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status: 0, 1 after a crash, 2 for a mistake that the user can cure."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Taken out by hand: it is obeyed wherever it stands, also for a mistake that the parser itself finds.
    parsed = argparse.Namespace(command=None, workdir=None, traceback="--traceback" in arguments)
    try:
        _parse([argument for argument in arguments if argument != "--traceback"], parsed)
        parsed.run(parsed)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader (`| head`) has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        command = f"drover {parsed.command}" if parsed.command else "drover"
        return failures.report(error, command, parsed.workdir, parsed.traceback)


def _parse(arguments: list[str], parsed: argparse.Namespace) -> None:
    """Fills in `parsed`: the command, the function that runs it, its flags, and `overrides`.

    Raises:
      UserError: anything that the command line does not mean.
    """
    parser, commands = _parsers()
    if not arguments:
        parsed.run = lambda _: parser.print_help()
        return
    if arguments[0].startswith("-"):
        parser.parse_args(arguments, parsed)
    if arguments[0] not in commands:
        raise UserError(_unknown_command(arguments[0], list(commands)))
    parsed.command = arguments[0]
    subparser = commands[parsed.command]
    takes_overrides = "--config" in subparser.flags
    rest, parsed.overrides = split_overrides(arguments[1:]) if takes_overrides else (arguments[1:], {})
    for argument in rest:
        # Before argparse looks: it would name a missing --config where --cofnig is the mistake.
        if argument.startswith("--") and argument.split("=")[0] not in subparser.flags:
            subparser.error(_unknown_flag(argument, subparser.flags, takes_overrides))
    subparser.parse_args(rest, parsed)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.NAME=VALUE` and `--config.NAME VALUE` out of the arguments; of two for one name the last counts.

    Raises:
      UserError: an override without a value.
    """
    rest, overrides = [], {}
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise UserError(f"--config.{name} has no value; write --config.{name}=VALUE")
        overrides[name] = value
    return rest, overrides


class _Command(_Parser):
    """The parser of one command."""

    def __init__(self, *, run: Callable[[argparse.Namespace], None], **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.set_defaults(run=run)
        self.flags: list[str] = ["-h", "--help"]
        self.flag("--traceback", action="store_true", default=argparse.SUPPRESS, help="print the traceback of an error")

    def flag(self, name: str, **options) -> None:
        """Adds a flag."""
        self.flags.append(name)
        self.add_argument(name, **options)


def _parsers() -> tuple[_Parser, dict[str, _Command]]:
    """The parser of the command line, and those of the commands by name."""
    parser = _Parser(
        prog="drover",
        description="Trains sparse, natively multimodal mixture-of-experts models from one config file.",
        epilog="`drover COMMAND --help` explains a command. The first run: `drover train --config configs/tiny.py`",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"drover {__version__}", help="print the version")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Command)
    file = {"required": True, "metavar": "FILE[:ARG]", "help": "config file (Python code, which is run)"}
    directory = {"type": Path, "metavar": "DIR"}

    train = subparsers.add_parser(
        "train",
        run=_train,
        usage="drover train --config FILE [--workdir DIR] [--config.NAME=VALUE ...]",
        help="train a model, or go on with a run that was stopped",
        description="Trains a model. The same command on the same run directory goes on where it was stopped.",
        epilog=OVERRIDES,
    )
    train.flag("--config", **file)
    train.flag("--workdir", **directory, help="run directory (default: runs/NAME, by the name in the configuration)")
    train.flag(
        "--allow-config-change", action="store_true", help="go on although the run was started with another config"
    )

    config = subparsers.add_parser(
        "config",
        run=_config,
        usage="drover config --config FILE [--config.NAME=VALUE ...] [--json]",
        help="print the resolved configuration of a run, every option",
        description="Prints every option: its value, whether that differs from the default (*), and what it means.",
        epilog=OVERRIDES,
    )
    config.flag("--config", **file)
    config.flag("--json", action="store_true", help="values only, as JSON")

    generate = subparsers.add_parser(
        "generate",
        run=_generate,
        help="answer a prompt about images, or go on with a text",
        description="Writes what the model of a run says to a prompt, and to the images before it if there are any.",
    )
    generate.flag("--workdir", **directory, required=True, help="run directory of the model")
    generate.flag("--image", type=Path, nargs="+", action="extend", default=[], metavar="FILE", help="images, in order")
    generate.flag("--prompt", required=True, metavar="TEXT", help="text to answer or to go on with")
    generate.flag("--max-tokens", type=int, default=64, metavar="N", help="tokens at most (default: 64)")
    generate.flag(
        "--temperature", type=float, default=0.0, metavar="X", help="0, the default, always takes the likeliest token"
    )
    generate.flag("--first-line", action="store_true", help="stop at the end of the first line, as answers do")
    generate.flag("--seed", type=int, default=0, metavar="N", help="seed of the draws at a temperature above 0")

    report = subparsers.add_parser(
        "report",
        run=_report,
        help="write report.html of a run again",
        description="Writes report.html from what the run directory holds, and prints its path.",
    )
    report.flag("--workdir", **directory, required=True, help="run directory")
    return parser, {"train": train, "config": config, "generate": generate, "report": report}


def _unknown_command(word: str, commands: list[str]) -> str:
    from trainer.options import nearest

    close = nearest(word, commands)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the commands are {', '.join(commands)}"
    return f"no command {word!r}; {hint}"


def _unknown_flag(argument: str, flags: list[str], takes_overrides: bool) -> str:
    from trainer.options import nearest, option_names

    flag = argument.split("=")[0]
    if flag.startswith("--config."):
        return f"{flag}: this command takes no overrides, it reads the configuration from the run directory"
    option = flag.removeprefix("--")
    close = nearest(flag, flags)
    if takes_overrides and not close:
        # --optimizer.peak_lr, --confg.optimizer.peak_lr and --peak_lr are all meant as overrides.
        prefixed = option.partition(".")[2]
        names = [prefixed] if prefixed in option_names() else nearest(option, option_names(), count=1)
        close = [f"--config.{name}=VALUE" for name in names]
    return f"no flag {flag}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def _train(arguments: argparse.Namespace) -> None:
    from launch.config_file import load_run

    run = load_run(arguments.config, arguments.overrides)
    # Kept in the arguments: a crash leaves its traceback there.
    arguments.workdir = arguments.workdir or Path("runs") / run.name
    environment.prepare(arguments.traceback)
    from trainer.loop import train

    train(run, arguments.workdir, allow_config_change=arguments.allow_config_change)


def _config(arguments: argparse.Namespace) -> None:
    from launch.config_file import load_run
    from trainer.sections import render, to_plain

    run = load_run(arguments.config, arguments.overrides)
    print(json.dumps(to_plain(run), indent=2) if arguments.json else render(run).rstrip())


def _generate(arguments: argparse.Namespace) -> None:
    _check_run_directory(arguments.workdir)
    for path in arguments.image:
        if not path.is_file():
            raise UserError(f"image {path} does not exist; give --image the path of a picture (PNG, JPEG, ...)")
    if arguments.max_tokens < 1:
        raise UserError(f"--max-tokens: found {arguments.max_tokens}, expected 1 or more")
    if not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature: found {arguments.temperature}, expected a number that is 0 or more")
    environment.prepare(arguments.traceback)
    from trainer.generate import generate

    pieces = generate(
        arguments.workdir,
        arguments.prompt,
        arguments.image,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    for piece in pieces:
        line, end, _ = piece.partition("\n") if arguments.first_line else (piece, "", "")
        print(line, end="", flush=True)
        if end:
            break
    print()


def _report(arguments: argparse.Namespace) -> None:
    _check_run_directory(arguments.workdir)
    environment.prepare(arguments.traceback)
    from trainer.report import write_report

    print(write_report(arguments.workdir))


def _check_run_directory(workdir: Path) -> None:
    if not (workdir / "config.json").is_file():
        found = "has no config.json" if workdir.is_dir() else "does not exist"
        raise UserError(f"run directory {workdir} {found}; give --workdir a directory made by `drover train`")


if __name__ == "__main__":
    sys.exit(main())
