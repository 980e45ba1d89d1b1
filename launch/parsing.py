"""Parsing of the command line: argparse with errors that name the nearest word, and overrides taken out by hand."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from sharding.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{self.format_usage()}`{self.prog} --help` explains.")


class Command(Parser):
    """The parser of one command."""

    def __init__(self, *, run: Callable[[argparse.Namespace], None], **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.set_defaults(run=run)
        self.flags: list[str] = ["-h", "--help"]
        self.flag("--traceback", action="store_true", default=argparse.SUPPRESS, help="print the traceback of an error")

    def flag(self, name: str, among: Any = None, **options) -> None:
        """Adds a flag; `among` is what `one_of` returned, if just one of several flags is to be given."""
        self.flags.append(name)
        if options.get("action") is argparse.BooleanOptionalAction:
            self.flags.append(f"--no-{name.removeprefix('--')}")
        (among or self).add_argument(name, **options)

    def one_of(self) -> Any:
        """A group of flags out of which exactly one is needed."""
        return self.add_mutually_exclusive_group(required=True)


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


def unknown_command(word: str, commands: list[str]) -> str:
    from trainer.options import nearest

    close = nearest(word, commands)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the commands are {', '.join(commands)}"
    return f"no command {word!r}; {hint}"


def unknown_flag(argument: str, flags: list[str], takes_overrides: bool) -> str:
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
