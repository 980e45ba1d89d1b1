"""What the typed sections say of themselves: names, types, defaults and documentation of options (free of jax)."""

import ast
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal

from trainer.config import RunConfig


@cache
def annotations(cls: type) -> dict[str, Any]:
    """Field name -> annotated type, in the order of the source."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


@cache
def defaults(cls: type) -> dict[str, Any]:
    """Field name -> default value, for the fields that have one."""
    values = {}
    for field in fields(cls):
        if field.default is not MISSING:
            values[field.name] = field.default
        elif field.default_factory is not MISSING:
            values[field.name] = field.default_factory()
    return values


@cache
def documentation(cls: type) -> dict[str, str]:
    """Field name -> the docstring under the field, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[statement.target.id] = " ".join(doc.split())
    return docs


def smallest(cls: type, name: str) -> int:
    """The smallest value that the number `name` may have: 1 for a whole number, unless the section says otherwise.

    A section that has numbers of which -1 says something (`MAY_BE_REST`) sees to their 0 itself.
    """
    may_be_zero = getattr(cls, "MAY_BE_ZERO", frozenset())
    if name in getattr(cls, "MAY_BE_REST", frozenset()):
        return -1
    return 1 if int in members(annotations(cls)[name]) and name not in may_be_zero else 0


def section_classes(cls: type = RunConfig) -> list[type]:
    """`cls` and every section below it."""
    below = [inner for annotation in annotations(cls).values() if (inner := section_of(annotation))]
    return [cls, *(found for inner in below for found in section_classes(inner))]


def option_names(cls: type = RunConfig, prefix: str = "") -> list[str]:
    """The full name of every option, those of sections that may be None included."""
    names = []
    for name, annotation in annotations(cls).items():
        inner = section_of(annotation)
        names += option_names(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return names


def nearest(word: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most like `word`, best first; a dotted name may also be meant by its last part."""

    def likeness(name: str) -> float:
        leaf, asked = name.rsplit(".", 1)[-1], word.rsplit(".", 1)[-1]
        whole = difflib.SequenceMatcher(None, word, name).ratio()
        last = difflib.SequenceMatcher(None, asked, leaf).ratio()
        return max(whole, 0.97 * last, 0.8 if len(asked) > 1 and asked in leaf.split("_") else 0.0)

    scored = sorted(((likeness(name), name) for name in dict.fromkeys(names)), key=lambda pair: -pair[0])
    # Close behind the best is a second guess worth showing; far behind it is noise.
    return [name for score, name in scored if score >= max(0.7, scored[0][0] - 0.1)][:count]


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown option: the nearest names, or where to find them all."""
    close = nearest(word, names)
    return f"; did you mean {' or '.join(close)}?" if close else "; `drover config` prints every option"


def members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def section_of(annotation: Any) -> type | None:
    """The section that a field may hold."""
    return next((member for member in members(annotation) if isinstance(member, type) and is_dataclass(member)), None)


def expected(annotation: Any) -> str:
    """In words, what a value of this type looks like."""
    words = []
    for member in members(annotation):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if member is types.NoneType:
            words.append("None")
        elif is_dataclass(member):
            words.append("a section, its options in braces ({} for the defaults)")
        elif origin is Literal:
            words.append("one of " + ", ".join(map(repr, arguments)))
        elif origin is tuple:
            words.append(f"a list such as 1,3,5 with {expected(arguments[0])} in each place")
        elif is_mapping(member):
            words.append(f"names with {expected(arguments[1])} each, such as {{'a': 0.3, 'b': 0.7}}")
        else:
            words.append({int: "a whole number", float: "a number", bool: "true or false", str: "text"}[member])
    return " or ".join(words)


def is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (dict, Mapping)
