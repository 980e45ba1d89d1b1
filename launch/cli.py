"""The command line: finds the command, runs it, and turns what goes wrong into a message and an exit status.

Only a command that needs jax imports it: help, a resolved config and a message about a mistake come at once.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from launch import __version__, failures
from launch.commands import add_commands
from launch.parsing import Command, Parser, split_overrides, unknown_command, unknown_flag
from sharding.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status: 0, 1 after a crash, 2 for a mistake that the user can cure."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Taken out by hand: it is obeyed wherever it stands, also for a mistake that the parser itself finds.
    parsed = argparse.Namespace(command=None, workdir=None, watch=None, traceback="--traceback" in arguments)
    try:
        _parse([argument for argument in arguments if argument != "--traceback"], parsed)
        parsed.run(parsed)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader (`| head`) has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if parsed.watch is not None:
            parsed.watch.fail(f"drover {parsed.command}: what read its output has gone.")
            os._exit(1)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        command = f"drover {parsed.command}" if parsed.command else "drover"
        status, text = failures.report(error, command, parsed.workdir, parsed.traceback)
        if parsed.watch is None or not parsed.watch.quiet:
            with contextlib.suppress(OSError):  # nobody reads it any more
                print(text, file=sys.stderr, flush=True)
        if parsed.watch is not None:
            parsed.watch.fail(text)
            os._exit(status)  # jax would wait for the other processes first
        return status


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
    # Some commands are two words.
    words = 2 if any(name.startswith(f"{arguments[0]} ") for name in commands) else 1
    parsed.command = " ".join(arguments[:words])
    if parsed.command not in commands:
        written, parsed.command = parsed.command, None
        raise UserError(unknown_command(written, list(commands)))
    subparser = commands[parsed.command]
    takes_overrides = "--config" in subparser.flags
    rest, parsed.overrides = split_overrides(arguments[words:]) if takes_overrides else (arguments[words:], {})
    for argument in rest:
        # Before argparse looks: it would name a missing --config where --cofnig is the mistake.
        if argument.startswith("--") and argument.split("=")[0] not in subparser.flags:
            subparser.error(unknown_flag(argument, subparser.flags, takes_overrides))
    subparser.parse_args(rest, parsed)


def _parsers() -> tuple[Parser, dict[str, Command]]:
    """The parser of the command line, and those of the commands by name."""
    parser = Parser(
        prog="drover",
        description="Trains sparse, natively multimodal mixture-of-experts models from one config file.",
        epilog="`drover COMMAND --help` explains a command. The first run: `drover train --config configs/tiny.py`",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"drover {__version__}", help="print the version")
    return parser, add_commands(parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Command))


if __name__ == "__main__":
    sys.exit(main())
