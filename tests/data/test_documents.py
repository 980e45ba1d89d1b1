"""A record is accepted or refused by name, alike by our reading and by the JSON schema beside it."""

import base64
import copy
import json
import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import documents
from data.documents import Document, Part, Rejected, parse, with_files

SCHEMA = json.loads(Path(documents.__file__).with_name("document.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
BEYOND_THE_SCHEMA = ("empty", "utf-8")
"""Rules that no schema can state."""


def refusal(record: Any) -> str:
    with pytest.raises(Rejected) as raised:
        parse(record, "file:1")
    assert raised.value.rule == "schema"
    return raised.value.reason


def one_text(record: dict[str, Any]) -> Document:
    return parse({"text": "a", **record}, "file:1")


# Records, valid and broken

TEXT = st.text(max_size=5)
BASE64 = st.binary(min_size=1, max_size=7).map(lambda data: base64.b64encode(data).decode())
NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT | st.sampled_from(["train", "user", "text", "image", "a.png"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT | st.sampled_from(["path", "type"]), inner),
    max_leaves=4,
)
ROLES = st.sampled_from(documents.ROLES)
WEIGHTS = st.none() | st.floats(0, 1e6) | st.integers(0, 3)
MEDIA = st.sampled_from(documents.MEDIA)
FILE = st.text(min_size=1, max_size=5) | st.fixed_dictionaries(
    {"path": st.just("a.png")}, optional={"bytes": st.none()}
)
FILES = st.none() | FILE | st.fixed_dictionaries({"bytes": BASE64}) | st.lists(FILE, max_size=2)
NAMES = st.none() | st.text(min_size=1, max_size=5) | st.integers(-5, 10**30) | st.just(7.0)


def parts(role: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    optional = {"role": role}
    kind = st.sampled_from(documents.MEDIA)
    return st.one_of(
        st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}, optional=optional | {"weight": WEIGHTS}),
        st.fixed_dictionaries({"type": kind, "path": st.just("a.png")}, optional=optional | {"weight": st.none()}),
        st.fixed_dictionaries({"type": kind, "data": BASE64}, optional=optional | {"text": st.none()}),
    )


MESSAGE = st.fixed_dictionaries(
    {"role": ROLES, "content": TEXT | st.lists(parts(st.none()), min_size=1, max_size=3)},
    optional={"weight": WEIGHTS, "tool_calls": st.none()},
)
FORMS = st.one_of(
    st.fixed_dictionaries({"text": TEXT}, optional=dict.fromkeys(documents.MEDIA, FILES)),
    st.fixed_dictionaries({"image": FILES}, optional={"audio": FILES, "text": st.none()}),
    st.fixed_dictionaries({"parts": st.lists(parts(st.none()), min_size=1, max_size=3)}),
    st.fixed_dictionaries({"parts": st.lists(parts(ROLES | st.none()), min_size=1, max_size=3)}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=1, max_size=3)}, optional={"parts": st.none()}),
)
BESIDE = st.fixed_dictionaries(
    {},
    optional={
        "id": NAMES,
        "source": NAMES,
        "split": st.sampled_from(["train", "heldout", "", None]),
        "metadata": st.none() | st.dictionaries(TEXT, ANYTHING, max_size=2),
        "url": ANYTHING,
    },
)
VALID = st.builds(lambda form, beside: {**form, **beside}, FORMS, BESIDE)


@st.composite
def broken(draw: st.DrawFn) -> Any:
    """A record with something in it replaced, taken away or added."""
    record = copy.deepcopy(draw(VALID))
    for _ in range(draw(st.integers(1, 2))):
        places: list[tuple[Any, Any]] = []
        inner = [record]
        while inner:
            at = inner.pop()
            keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else []
            places += [(at, key) for key in keys]
            inner += [at[key] for key in keys]
        if not places:
            return record
        holder, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "remove":
            del holder[key]
        elif change == "add" and isinstance(holder, dict):
            names = [*documents.FIELDS, "role", "weight", "content", "type", "path", "data", "bytes", "other"]
            holder[draw(st.sampled_from(names))] = draw(ANYTHING | FILES | BASE64 | WEIGHTS)
        else:
            holder[key] = draw(ANYTHING | BASE64.map(lambda text: text[:-1] + "=") | FORMS)
    return record


@settings(max_examples=600)
@given(VALID | broken() | ANYTHING)
@example({"text": "a", "split": 0})
@example({"text": "a", "split": []})
@example({"text": "a", "metadata": []})
@example({"text": "a", "metadata": ""})
@example({"text": "a", "id": 1.0})
@example({"text": "a", "id": True})
@example({"text": "a", "id": ""})
@example({"text": "a", "image": []})
@example({"image": ""})
@example({"image": [], "parts": None})
@example({"image": {"bytes": "AAAA="}})
@example({"image": {"bytes": "AAAA\n"}})
@example({"image": {"path": 5, "bytes": "AB=="}})
@example({"parts": [{"type": "text", "text": "a", "other": None}]})
@example({"parts": [{"type": "image", "path": "a", "data": None, "weight": None}]})
@example({"parts": [{"type": "image", "path": "a", "data": "AAAA"}]})
@example({"parts": [{"type": "text", "text": "a", "role": "user"}, {"type": "text", "text": "a"}]})
@example({"parts": [{"type": "text", "text": "a", "weight": 10**400}]})
@example({"parts": [{"type": "text", "text": "a", "weight": 1e300}]})
@example({"messages": [{"role": "user", "content": "a", "name": None}]})
@example({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "role": None}]}]})
@example({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "role": "user"}]}]})
def test_the_schema_and_the_reading_accept_the_same_records(record):
    try:
        parse(record, "file:1")
        refused = None
    except Rejected as rejected:
        refused = None if rejected.rule in BEYOND_THE_SCHEMA else rejected
    assert VALIDATOR.is_valid(record) == (refused is None), refused


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@given(VALID)
def test_most_generated_records_are_valid(record):
    """Or the comparison above would say little."""
    try:
        parse(record, "file:1")
    except Rejected as rejected:
        assert rejected.rule == "empty" or "role: missing" in rejected.reason or "found the fields" in rejected.reason


# What a record says


def test_a_short_form_says_what_the_long_one_does():
    short = parse({"text": "A cat.", "audio": ["a.wav", "b.wav"], "image": "cat.jpg"}, "file:1")
    assert short.parts == (
        Part("image", path="cat.jpg"),
        Part("audio", path="a.wav"),
        Part("audio", path="b.wav"),
        Part("text", text="A cat."),
    )
    assert not short.conversation


def test_messages_give_their_role_and_weight_to_their_parts():
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]},
            {
                "role": "assistant",
                "weight": 0.5,
                "content": [
                    {"type": "text", "text": "A", "weight": 2},
                    {"type": "text", "text": "B"},
                    {"type": "image", "data": "AAAA"},
                ],
            },
        ]
    }
    document = parse(record, "file:1")
    assert document.conversation
    assert [(part.kind, part.role, part.weight) for part in document.parts] == [
        ("image", "user", None),
        ("text", "user", None),
        ("text", "assistant", 2.0),
        ("text", "assistant", 0.5),
        ("image", "assistant", None),
    ]
    assert document.parts[-1].data == b"\0\0\0"


def test_what_is_not_said_has_a_default():
    document = one_text({})
    assert document == Document("file:1", (Part("text", text="a"),), source="", split="", metadata=None)
    assert document.parts[0].weight is None and document.parts[0].role is None


@pytest.mark.parametrize(("value", "expected"), [(7, "7"), (7.0, "7"), ("7", "7"), (None, "file:1"), (-(10**30), None)])
def test_ids_may_be_numbers(value, expected):
    assert one_text({"id": value}).id == (expected or str(value))


def test_unknown_fields_of_a_record_are_kept_as_metadata():
    assert one_text({"url": "u", "n": [1], "metadata": {"url": "v", "m": 2}}).metadata == {"url": "v", "n": [1], "m": 2}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ([], "found an empty list, expected an object"),
        ("text", "found 'text', expected an object"),
        ({}, "found no fields, expected one of text, parts, messages"),
        ({"txt": "a"}, "found the fields txt, expected one of"),
        ({"text": "a", "messages": []}, "found the fields messages, text, expected one of"),
        ({"parts": [], "image": "a"}, "found the fields image, parts, expected one of"),
        ({"text": 5}, "text: found 5, expected a string"),
        ({"image": 5}, "image: found 5, expected the path of a file"),
        ({"image": ["a", {}]}, "image[1]: found an empty dict, expected the path"),
        ({"image": {"bytes": "a"}}, "image: found no base64"),
        ({"parts": []}, "parts: found an empty list, expected a list with at least one entry"),
        ({"parts": ["a"]}, "parts[0]: found 'a', expected one of text, image"),
        ({"parts": [{"type": "txt"}]}, "parts[0].type: found 'txt', expected one of text, image"),
        ({"parts": [{"type": "text"}]}, "parts[0].text: found None, expected a string"),
        ({"parts": [{"type": "text", "text": "a", "path": "b"}]}, "parts[0]: found the unknown field path"),
        ({"parts": [{"type": "image", "path": ""}]}, "parts[0].path: found '', expected the path"),
        ({"parts": [{"type": "image"}]}, "parts[0]: found the fields type, expected exactly one of path, data"),
        ({"parts": [{"type": "image", "data": ""}]}, "parts[0].data: found an empty bytes"),
        ({"parts": [{"type": "text", "text": "a", "role": "bot"}]}, "parts[0].role: found 'bot', expected one of"),
        (
            {"parts": [{"type": "text", "text": "a", "weight": -1}]},
            "parts[0].weight: found -1, expected a number from 0",
        ),
        ({"parts": [{"type": "text", "text": "a", "weight": True}]}, "parts[0].weight: found True"),
        ({"messages": [{"content": "a"}]}, "messages[0].role: found None, expected one of system, user, assistant"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: found None"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0]: found the unknown field name"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text: found None"),
        ({"text": "a", "id": ""}, "id: found 0 characters, expected 1 to 512"),
        ({"text": "a", "id": "a" * 513}, "id: found 513 characters"),
        ({"text": "a", "id": 1.5}, "id: found 1.5, expected a string"),
        ({"text": "a", "source": [1]}, "source: found a list, expected a string"),
        ({"text": "a", "split": "test"}, "split: found 'test', expected one of train, heldout"),
        ({"text": "a", "metadata": "b"}, "metadata: found 'b', expected an object"),
    ],
)
def test_a_refusal_names_the_field(record, expected):
    assert refusal(record).startswith(expected)


def test_roles_are_in_all_parts_or_in_none():
    parts = [{"type": "text", "text": "a", "role": "user"}, {"type": "image", "path": "a.png"}]
    assert refusal({"parts": parts}) == "parts[1].role: missing, expected one in all parts or in none"


@pytest.mark.parametrize("record", [{"text": " \n\t"}, {"messages": [{"role": "user", "content": ""}]}, {"image": []}])
def test_blanks_alone_are_no_document(record):
    with pytest.raises(Rejected) as raised:
        parse(record, "file:1")
    assert raised.value.rule == "empty"


@pytest.mark.parametrize("record", [{"text": "\ud800"}, {"image": "\udcff.png"}, {"text": "a", "id": "\udfff"}])
def test_half_a_surrogate_pair_is_no_text(record):
    with pytest.raises(Rejected, match="found half a surrogate pair at character 0") as raised:
        parse(record, "file:1")
    assert raised.value.rule == "utf-8"


def test_a_reason_can_be_written_whatever_it_quotes():
    reason = refusal({"parts": [{"type": "text", "text": "a", "\udcff": 1}]})
    assert "unknown field \\udcff" in reason and reason.encode()
    assert len(refusal({"parts": [{"type": "text", "text": "a", "b" * 10**6: 1}]})) < 1000


def test_a_rejection_keeps_its_rule_between_processes():
    rejected = pickle.loads(pickle.dumps(Rejected("link", "a: is a link")))
    assert (rejected.rule, rejected.reason, str(rejected)) == ("link", "a: is a link", "a: is a link")


def test_files_are_read_where_bytes_did_not_come_along():
    document = parse({"parts": [{"type": "image", "path": "a"}, {"type": "image", "data": "AAAA"}]}, "file:1")
    read = with_files(document, lambda path: path.encode() * 3)
    assert [part.data for part in read.parts] == [b"aaa", b"\0\0\0"]
    assert with_files(read, lambda _: pytest.fail("read again")) == read
