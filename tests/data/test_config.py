"""Every option that makes no sense is named, and the defaults make sense."""

import pytest

from data.config import DataConfig
from sharding.errors import UserError
from trainer.config import RunConfig
from trainer.sections import resolve, to_config_dict


def test_the_defaults_have_no_problems():
    assert list(DataConfig().problems()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixture": {"txt": 1.0}}, "expected names out of"),
        ({"mixture": {"text": -1.0, "scenes": 2.0}}, "none below zero"),
        ({"mixture": {}}, "a sum above zero"),
        ({"sequence_length": 2}, "expected 3 or more"),
        ({"tokenizer": " "}, "expected bpe, bytes or the path of a tokenizer.json"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(change, message):
    problems = list(DataConfig(**change).problems())
    assert [name for name, _ in problems] == list(change)
    assert message in problems[0][1]


@pytest.mark.parametrize("change", ["batch_size=0", "prefetch=0", "workers=-1", "video_fps=-0.5"])
def test_numbers_out_of_range_are_refused_with_the_option_and_what_was_found(change):
    name, value = change.split("=")
    with pytest.raises(UserError, match=rf"data\.{name}: found {value}"):
        resolve(to_config_dict(RunConfig()), {f"data.{name}": value}, "a test")
