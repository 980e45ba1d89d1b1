"""Every option that makes no sense is named, and the defaults make sense."""

import pytest

from data.config import DataConfig


def test_the_defaults_have_no_problems():
    assert list(DataConfig().problems()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixture": {"txt": 1.0}}, "expected names out of"),
        ({"mixture": {"text": -1.0, "scenes": 2.0}}, "none below zero"),
        ({"mixture": {}}, "a sum above zero"),
        ({"sequence_length": 2}, "expected 3 or more"),
        ({"batch_size": 0}, "expected 1 or more"),
        ({"prefetch": 0}, "expected 1 or more"),
        ({"workers": -1}, "expected 0 or more"),
        ({"answer_weight": -0.5}, "expected 0 or more"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(change, message):
    problems = list(DataConfig(**change).problems())
    assert [name for name, _ in problems] == list(change)
    assert message in problems[0][1]
