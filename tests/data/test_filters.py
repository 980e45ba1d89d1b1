"""Each named rule keeps what is at its limit and refuses what is beyond it; users bring their own."""

from typing import Any

import pytest

from data.documents import MEDIA, Document, Part, Rejected
from data.filters import FILTERS, TRANSFORMS, check, load_classifier, parse_filter, transformed
from data.records import Entry
from sharding.errors import UserError


def document(*texts: str) -> Document:
    return Document("x", tuple(Part("text", text=text) for text in texts))


def entry(tokens: int = 5, **files: tuple[tuple[int, int, int], ...]) -> Entry:
    kinds = tuple(MEDIA.index(kind) for kind, found in files.items() for _ in found)  # pyright: ignore[reportArgumentType]
    facts = tuple(fact for found in files.values() for fact in found)
    return Entry(tokens, kinds, (0,) * len(kinds), facts, 0, "", b"", b"", 1)


def reason(name: str, limit: float, text: Document, facts: Entry) -> str | None:
    try:
        check(text, facts, ((name, limit),), None)
    except Rejected as rejected:
        assert rejected.rule == name
        return rejected.reason
    return None


LINES = document("a\nb", "a\n\n  \n a \nc")  # 3 of 5 lines are the first of their kind
SYMBOLS = document("ab1é你-- \n\t__!*")  # 6 of 11 characters
OTHERS = {"video": ((1, 1, 999),), "audio": ((1, 1, 999),)}


@pytest.mark.parametrize(
    ("name", "text", "facts", "kept", "refused", "why"),
    [
        ("min_tokens", LINES, entry(5), (4, 5), (5.5, 6), "found 5 tokens of text, refused by min_tokens="),
        ("max_tokens", LINES, entry(5), (5, 6), (4, 4.5), "found 5 tokens of text, refused by max_tokens="),
        ("max_repeated_lines", LINES, entry(), (0.4001, 0.41), (0.39, 0), "found 40% of the lines to repeat others"),
        (
            "max_symbols",
            SYMBOLS,
            entry(),
            (0.55, 1),
            (0.54, 0),
            "found 55% of the characters to be neither letters nor",
        ),
        ("min_image_side", LINES, entry(image=((30, 20, 0),)), (19, 20), (21,), "found an image of 20 x 30 pixels"),
        ("min_image_side", LINES, entry(image=((99, 99, 0), (20, 30, 0))), (20,), (21,), "found an image of 30 x 20"),
        ("max_image_aspect", LINES, entry(image=((10, 30, 0),)), (3, 4), (2.9,), "found an image of 30 x 10 pixels"),
        ("max_image_aspect", LINES, entry(image=((30, 10, 0),)), (3, 4), (2.9,), "found an image of 10 x 30 pixels"),
    ],
)
def test_a_rule_keeps_what_is_at_its_limit(name, text, facts, kept, refused, why):
    assert [reason(name, limit, text, facts) for limit in kept] == [None] * len(kept)
    for limit in refused:
        assert (reason(name, limit, text, facts) or "").startswith(why)


@pytest.mark.parametrize("name", ["max_repeated_lines", "max_symbols"])
def test_shares_of_no_text_are_zero(name):
    assert reason(name, 0, document(" \n"), entry()) is None


@pytest.mark.parametrize(("name", "limit"), [("min_image_side", 100), ("max_image_aspect", 1)])
def test_rules_of_images_are_for_images(name, limit):
    assert reason(name, limit, LINES, entry(5, **OTHERS)) is None


def test_the_first_rule_that_refuses_is_named():
    with pytest.raises(Rejected) as raised:
        check(LINES, entry(5), (("max_tokens", 9), ("min_tokens", 8), ("max_symbols", 0)), lambda _: "no")
    assert raised.value.rule == "min_tokens"


def test_a_filter_is_written_as_name_and_number():
    assert parse_filter("min_tokens=5") == ("min_tokens", 5.0) and parse_filter("max_symbols=.5") == (
        "max_symbols",
        0.5,
    )
    for written in ("min_tokens", "min_tokens=", "min_tokens=x", "min_tokens=nan", "other=5", ""):
        with pytest.raises(UserError, match=r"--filter: found .*expected NAME=NUMBER with a name of min_tokens"):
            parse_filter(written)
    assert all(name in str(FILTERS) for name in FILTERS)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("nfc", "e\u0301 \ufb01", "\u00e9 \ufb01"),
        ("unix_newlines", "a\r\nb\rc\n\r\n", "a\nb\nc\n\n"),
        ("strip_lines", "  a \t\n\n b\u00a0\n", "  a\n\n b\n"),
    ],
)
def test_a_transform_changes_texts_alone(name, before, after):
    whole = Document("x", (Part("text", text=before), Part("image", data=b" a \r\n")), metadata={"a": before})
    changed = transformed(whole, (name,))
    assert changed.parts == (Part("text", text=after), Part("image", data=b" a \r\n"))
    assert changed.metadata == {"a": before} and set(TRANSFORMS) == {"nfc", "unix_newlines", "strip_lines"}


@pytest.mark.parametrize(
    ("answer", "refused"), [(None, None), ("", None), (False, None), ("spam", "spam"), (True, "True")]
)
def test_a_classifier_says_why(answer, refused):
    def classify(_: Document) -> Any:
        return answer

    if refused is None:
        check(LINES, entry(), (), classify)
    else:
        with pytest.raises(Rejected) as raised:
            check(LINES, entry(), (), classify)
        assert (raised.value.rule, raised.value.reason) == ("classifier", refused)


def test_a_classifier_may_name_a_rule_of_its_own():
    def classify(_: Document) -> None:
        raise Rejected("spam", "too much of it")

    with pytest.raises(Rejected, match="too much of it"):
        check(LINES, entry(), (), classify)


@pytest.mark.parametrize(
    ("body", "written", "expected"),
    [
        ("", "missing.py:judge", "there is no file"),
        ("", "judge", "expected FILE.py:FUNCTION"),
        ("", "judge.py:judge", "has no function 'judge'"),
        ("judge = 5", "judge.py:judge", "has no function 'judge'"),
        ("1 / 0", "judge.py:judge", "fails when it is run .ZeroDivisionError"),
        ("raise SystemExit(0)", "judge.py:judge", "fails when it is run .SystemExit"),
        ("def judge(:", "judge.py:judge", "fails when it is run .SyntaxError"),
    ],
)
def test_a_classifier_that_cannot_be_loaded_is_an_error(tmp_path, monkeypatch, body, written, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text(body)
    with pytest.raises(UserError, match=f"--classifier: .*{expected}"):
        load_classifier(written)
