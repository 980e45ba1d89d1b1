"""What is cached is whole or absent, and a folder that cannot be written says so."""

import numpy as np
import pytest

from data import cache
from sharding.errors import UserError


def test_arrays_are_made_once_and_read_back(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(5), "b": np.zeros((2, 0), np.uint16)}

    for _ in range(2):
        arrays = cache.arrays(tmp_path / "new", "x", make)
        np.testing.assert_array_equal(arrays["a"], np.arange(5))
        assert arrays["b"].shape == (2, 0)
    assert made == [1]


def test_what_another_process_made_meanwhile_is_taken(tmp_path):
    def make_slowly():
        cache.arrays(tmp_path, "x", lambda: {"a": np.array([1])})
        return {"a": np.array([2])}

    assert cache.arrays(tmp_path, "x", make_slowly)["a"].tolist() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot use .*No space left"):
        cache.arrays(tmp_path, "x", lambda: {"a": np.array([1])})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for use in (
        lambda: cache.arrays(tmp_path / "file" / "cache", "x", lambda: {"a": np.array([1])}),
        lambda: cache.text_file(tmp_path / "file" / "cache", "x", lambda: "text"),
    ):
        with pytest.raises(UserError, match=r"data\.cache_dir: cannot use .*file/cache"):
            use()


def test_a_damaged_file_says_what_to_delete(tmp_path):
    cache.arrays(tmp_path, "x", lambda: {"a": np.arange(100)})
    (tmp_path / "x" / "a.npy").write_bytes(b"")
    with pytest.raises(UserError, match="Delete that folder"):
        cache.arrays(tmp_path, "x", lambda: {})
