"""Config files: Python code whose `get_config` returns a ConfigDict.

Reading a config file runs it, as `python FILE` would: read only those that you trust.
"""

import contextlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from sharding.errors import UserError
from trainer.config import RunConfig
from trainer.options import annotations, nearest, section_classes
from trainer.sections import resolve


def load_run(spec: str, overrides: Mapping[str, str]) -> RunConfig:
    """The resolved run of a config file.

    Args:
      spec: `FILE` or `FILE:ARG`; ARG is handed to the file's `get_config`.
      overrides: option name -> value as text; applied before the one validation.

    Raises:
      UserError: a missing or broken file, an unknown option, a value that does not fit; all problems in one message.
    """
    path, argument = split_spec(spec)
    source = f"{path} with the overrides given" if overrides else str(path)
    return resolve(_get_config(path, argument), overrides, source)


def split_spec(spec: str) -> tuple[Path, str | None]:
    """`FILE.py:ARG` as (FILE.py, ARG); ARG is None where there is no colon after the `.py`."""
    match = re.fullmatch(r"(.*?\.py):(.*)", spec, re.DOTALL)
    return (Path(match[1]), match[2]) if match else (Path(spec), None)


def _get_config(path: Path, argument: str | None) -> ConfigDict:
    get_config = getattr(_run_file(path), "get_config", None)
    if not callable(get_config):
        raise UserError(
            f"{path} has no function get_config. A config file ends in\n\n"
            '    def get_config(arg=""):\n'
            "        return to_config_dict(RunConfig(...))\n\n"
            "with to_config_dict from trainer.sections and RunConfig from trainer.config."
        )
    arguments = () if argument is None else (argument,)
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        wanted = "no argument" if argument is None else "one argument"
        raise UserError(
            f"{path}: found get_config{inspect.signature(get_config)}, expected it to work with {wanted}: "
            'write `def get_config(arg=""):`, and :ARG after the file name only where it is used.'
        ) from None
    with _errors_named(path):
        config = get_config(*arguments)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config returned a {type(config).__name__}, expected a ConfigDict: "
            "end it with `return to_config_dict(run)` (from trainer.sections import to_config_dict)."
        )
    return config


def _run_file(path: Path) -> ModuleType:
    """The module that the file's code makes."""
    if not path.is_file():
        raise UserError(_missing(path))
    if path.suffix != ".py":
        raise UserError(f"{path}: expected a Python file (*.py) with a function get_config.")
    module = ModuleType(f"drover_config_{path.stem}", "A config file.")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up the module that they are made in
    with _errors_named(path):
        # Not imported: that would leave compiled files beside the user's, and trust their time stamps.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def _missing(path: Path) -> str:
    """What to say of a config file that is not there, with the nearest ones that are."""
    folders = [path if path.is_dir() else path.parent, Path("configs")]
    candidates = {candidate.stem: candidate for folder in folders for candidate in _config_files(folder)}
    close = [candidates[stem] for stem in nearest(path.stem, candidates)] or sorted(candidates.values())
    text = f"config file {path} " + ("is a folder" if path.is_dir() else "does not exist")
    return f"{text}; did you mean {' or '.join(map(str, close))}?" if close else f"{text} (looked from {Path.cwd()})."


def _config_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.py") if path.stem != "__init__"] if folder.is_dir() else []


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Turns an exception of the config file's code into a UserError that says where in the file it arose."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_describe(path, error)) from error


def _describe(path: Path, error: Exception) -> str:
    """File, line, the line itself, and what Python says, with the nearest option where a name is at fault."""
    what = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError):
        line, code = error.lineno or 0, (error.text or "").strip()
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line, code = (frames[-1].lineno or 0, frames[-1].line or "") if frames else (0, "")
    where = f"{path}, line {line}:\n\n    {code}\n\n" if line else f"{path}: "
    return f"{where}{what}{_option_hint(error)}"


def _option_hint(error: Exception) -> str:
    """`Did you mean ...?` for an argument that a section does not have."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not match or "Did you mean" in str(error):
        return ""
    classes = {cls.__name__: cls for cls in section_classes()}
    close = nearest(match[2], annotations(classes[match[1]])) if match[1] in classes else []
    return f". Did you mean {' or '.join(close)}?" if close else ""
