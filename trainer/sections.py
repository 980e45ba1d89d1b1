"""What the typed sections have in common: conversion, overrides, validation, printing (free of jax, flax and grain).

A section is a plain frozen dataclass (`RunConfig` and what it holds). Its annotations are the types of its options, the
docstrings under its fields are their documentation, its `problems()` are its own rules. A run is made in this order:
config file -> overrides -> one validation that names every problem -> frozen `RunConfig`.

Two rules hold for every number, so that no section has to repeat them: it is finite and not negative; and a whole
number is at least 1, unless the section's `MAY_BE_ZERO` names it.
"""

import ast
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

from sharding.errors import UserError
from trainer.config import Problem, RunConfig
from trainer.options import (
    annotations,
    defaults,
    did_you_mean,
    documentation,
    expected,
    is_mapping,
    members,
    option_names,
    section_of,
    smallest,
)

Section = TypeVar("Section")


# From and to dictionaries


def to_config_dict(section: Any) -> ConfigDict:
    """A section as an `ml_collections.ConfigDict`, to be returned by a config file's `get_config`.

    It accepts any name and any value, so that a config file may change it freely; `resolve` then names every mistake at
    once.
    """
    return ConfigDict(_plain(section, tuple), type_safe=False)


def to_plain(section: Any) -> dict[str, Any]:
    """A section as nested dictionaries of what JSON holds (tuples become lists)."""
    return _plain(section, list)


def from_plain(cls: type[Section], plain: Mapping[str, Any], source: str = "the configuration") -> Section:
    """The inverse of `to_plain`, also after a way through JSON. Options that `plain` lacks have their defaults.

    Args:
      cls: the section that `plain` describes.
      plain: option name -> value; sections as dictionaries.
      source: where the values come from, for the message.

    Raises:
      UserError: an unknown name, a wrong type or a broken rule; the message lists all of them.
    """
    return _freeze(plain, cls, [], source)


def resolve(config: ConfigDict, overrides: Mapping[str, str], source: str) -> RunConfig:
    """Overrides first, then one validation, then frozen.

    Args:
      config: what the config file returned.
      overrides: option name -> value as text, as written on the command line.
      source: where the configuration comes from, for the message.

    Raises:
      UserError: the message lists every problem of the overrides and of the result.
    """
    problems: list[Problem] = []
    changed = _override(config, overrides, problems)
    return _freeze(changed, RunConfig, problems, source)


def _freeze(plain: Any, cls: type[Section], problems: list[Problem], source: str) -> Section:
    """The section that `plain` describes; raises `UserError` for the problems known so far and those found now.

    Types come first, then the limits of numbers, then each section's own rules.
    """
    section = _conform(plain, cls, "", problems)
    problems += _rule_problems(section, problems)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} in {source}:\n" + "\n".join(f"  {name}: {text}" for name, text in problems))
    return section


def _contents(value: Any) -> dict[str, Any] | None:
    """The names and values of a section, ConfigDict or dictionary; None for anything else."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    # ConfigDict is not registered as a Mapping.
    return dict(value.items()) if isinstance(value, Mapping | ConfigDict) else None


def _plain(value: Any, sequence: Callable[[Iterable[Any]], Any]) -> Any:
    """Sections and ConfigDicts as dictionaries, lists and tuples as `sequence`, all else as it is."""
    contents = _contents(value)
    if contents is not None:
        return {name: _plain(inner, sequence) for name, inner in contents.items()}
    return sequence(_plain(inner, sequence) for inner in value) if isinstance(value, list | tuple) else value


# Types and rules


def _conform(value: Any, annotation: Any, name: str, problems: list[Problem]) -> Any:
    """`value` as its annotation wants it (sections built, whole numbers as floats, lists as tuples).

    What does not fit is appended to `problems` and left as it is.
    """
    contents = _contents(value)
    for member in members(annotation):
        if is_dataclass(member) and contents is not None:
            return _conform_section(contents, typing.cast(type, member), name, problems)
        if is_mapping(member) and contents is not None:
            inner = typing.get_args(member)[1]
            return {key: _conform(item, inner, f"{name}.{key}", problems) for key, item in contents.items()}
        if typing.get_origin(member) is tuple and isinstance(value, list | tuple):
            inner = typing.get_args(member)[0]
            return tuple(_conform(item, inner, f"{name}[{i}]", problems) for i, item in enumerate(value))
        if typing.get_origin(member) is Literal and type(value) is str and value in typing.get_args(member):
            return value
        if member is float and type(value) in (int, float):
            return float(value)
        # Not isinstance: True is an int to Python, and to nobody else.
        if isinstance(member, type) and type(value) is member:
            return value
    problems.append((name or "(all of it)", f"found {value!r}, expected {expected(annotation)}"))
    return value


def _conform_section(contents: dict[str, Any], cls: type, prefix: str, problems: list[Problem]) -> Any:
    """A section built from `contents`, with defaults where it has nothing."""
    hints, values = annotations(cls), {}
    dot = f"{prefix}." if prefix else ""
    for name in contents:
        if name not in hints:
            problems.append((dot + str(name), "no such option" + did_you_mean(dot + str(name), _reachable(cls, dot))))
    for name, annotation in hints.items():
        if name in contents:
            values[name] = _conform(contents[name], annotation, dot + name, problems)
            problems += _range_problems(values[name], dot + name, smallest(cls, name))
    return cls(**values)


def _reachable(cls: type, prefix: str) -> list[str]:
    """Names to suggest inside a section: its own first, else those of the whole run."""
    return [prefix + name for name in annotations(cls)] + option_names()


def _range_problems(value: Any, name: str, least: float) -> Iterator[Problem]:
    if type(value) is float and not math.isfinite(value):
        yield name, f"found {value}, expected a finite number"
    elif type(value) in (int, float) and value < least:
        yield name, f"found {value}, expected {least} or more"
    elif type(value) is tuple:
        for i, item in enumerate(value):
            yield from _range_problems(item, f"{name}[{i}]", 0)
    elif type(value) is dict:  # What its numbers may be is for the section's rules to say, together with the names.
        for key, item in value.items():
            yield from _range_problems(item, f"{name}.{key}", -math.inf)


def _rule_problems(run: Any, known: list[Problem]) -> list[Problem]:
    """What the sections' `problems()` say, of options that have no problem yet."""
    named = {re.sub(r"\[\d+\]$", "", name) for name, _ in known}
    found: list[Problem] = []
    for prefix, section in _sections(run, ""):
        rules = getattr(section, "problems", None)
        if rules is None:
            continue
        try:
            for name, text in rules():
                if prefix + name not in named:
                    found.append((prefix + name, text))
        except (TypeError, ValueError, AttributeError, ZeroDivisionError):
            # A rule cannot be worked out from values of the wrong type or from a size of 0; those are listed already.
            if not known:
                raise
    return found


def _sections(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every section below and including this one, inner ones first, with the prefix of its options' names."""
    for name, value in (_contents(section) or {}).items():
        if is_dataclass(value):
            yield from _sections(value, f"{prefix}{name}.")
    yield prefix, section


# Overrides


def _override(config: ConfigDict, overrides: Mapping[str, str], problems: list[Problem]) -> dict[str, Any]:
    """A plain copy of `config` with every override applied that can be; the others are appended to `problems`."""
    changed = _plain(config, tuple)
    for name, text in overrides.items():
        try:
            _set(changed, name, text)
        except ValueError as problem:
            problems.append((name, str(problem)))
    return changed


def _set(config: dict[str, Any], name: str, text: str) -> None:
    """Sets one option. Raises ValueError, worded for the user, for an unknown name or a value of the wrong type."""
    here, annotation, done = config, typing.cast(Any, RunConfig), ""
    *path, last = name.split(".")
    for step in path:
        done, default = f"{done}{step}.", _default(annotation, step)
        annotation = _inner(annotation, step, name)
        if not section_of(annotation) and not any(map(is_mapping, members(annotation))):
            raise ValueError(f"no such option; {done[:-1]} is one value, not a section")
        inner = here.setdefault(step, _plain(default, tuple))
        if inner is None:
            raise ValueError(f"{done[:-1]} is None here and has no options; put --config.{done[:-1]}={{}} before this")
        if not isinstance(inner, dict):
            return  # The config file gave a value of the wrong type, which the validation names.
        here = inner
    here[last] = _parse(text, _inner(annotation, last, name))


def _default(annotation: Any, name: str) -> Any:
    section = section_of(annotation)
    return defaults(section).get(name) if section else None


def _inner(annotation: Any, name: str, full: str) -> Any:
    """The type of one option of a section, or of one name of a mapping."""
    section = section_of(annotation)
    if section is None:
        mapping = next(member for member in members(annotation) if is_mapping(member))
        return typing.get_args(mapping)[1]
    if name not in annotations(section):
        raise ValueError("no such option" + did_you_mean(full, option_names()))
    return annotations(section)[name]


def _parse(text: str, annotation: Any) -> Any:
    """The value that `text` writes down. Raises ValueError saying what was found and expected."""
    for member in members(annotation):
        value = _parse_one(text.strip(), member)
        if value is not MISSING:
            return value
    raise ValueError(f"found {text!r}, expected {expected(annotation)}")


def _parse_one(text: str, member: Any) -> Any:
    """As `_parse` for one type, MISSING where the text is no value of it."""
    origin = typing.get_origin(member)
    if member is types.NoneType:
        return None if text.lower() in ("none", "null") else MISSING
    if member is bool:
        return {"true": True, "false": False}.get(text.lower(), MISSING)
    if member is str:
        return text
    if member in (int, float):
        try:
            return member(text)
        except ValueError:
            return MISSING
    if origin is Literal:
        return text if text in typing.get_args(member) else MISSING
    if origin is tuple:
        items = [item for item in text.strip("()[]").split(",") if item.strip()]
        values = tuple(_parse_one(item.strip(), typing.get_args(member)[0]) for item in items)
        return MISSING if MISSING in values else values
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return MISSING
    return value if isinstance(value, dict) else MISSING


# For reading


def render(run: RunConfig) -> str:
    """Every option of a run as text, one line each, with its documentation below it, indented by eight spaces.

    A line that begins with `*` differs from the default of its section, which it shows. The names and values are
    written as an override takes them.
    """
    return "\n".join(_render(run, RunConfig(), "")) + "\n"


def _render(section: Any, reference: Any, prefix: str) -> Iterator[str]:
    texts, inner = documentation(type(section)), []
    for name, value in (_contents(section) or {}).items():
        other = getattr(reference, name)
        if is_dataclass(value):
            inner.append((name, value, other))
            continue
        if is_dataclass(other):
            mark, note = "* ", "  (default: a section)"
        else:
            mark, note = ("  ", "") if value == other else ("* ", f"  (default {_plain(other, tuple)!r})")
        yield f"{mark}{prefix}{name} = {_plain(value, tuple)!r}{note}"
        if name in texts:
            yield from textwrap.wrap(texts[name], 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    for name, value, other in inner:
        yield ""
        summary = (inspect.getdoc(type(value)) or "").split("\n")[0]
        yield f"# {prefix}{name}: {summary}{'  (default None)' if other is None else ''}"
        yield from _render(value, type(value)() if other is None else other, f"{prefix}{name}.")


def diff(a: RunConfig | Mapping[str, Any], b: RunConfig | Mapping[str, Any]) -> list[str]:
    """A line for each option whose value differs; each side is a run, or the dictionary read from its JSON."""
    return list(_diff(to_plain(a), to_plain(b), ""))


def _diff(a: Any, b: Any, name: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            yield from _diff(a.get(key, MISSING), b.get(key, MISSING), f"{name}.{key}" if name else key)
    elif a != b:
        before, after = ("(absent)" if side is MISSING else repr(side) for side in (a, b))
        yield f"{name}: {before} -> {after}"
