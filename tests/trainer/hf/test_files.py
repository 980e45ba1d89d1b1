"""Safetensors directories: what is read and written, against the format's own library, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from sharding.errors import UserError
from tests.trainer.hf.checkpoints import GOLDEN, tensors_of, write
from trainer.hf.files import Planned, finished_or_absent, open_tensors, write_tensors

SCOUT = GOLDEN / "text_scout"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_files_of_the_library_are_read_exactly(tmp_path: Path, dtype: type, shards: int) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors_of(SCOUT).items()}
    found = open_tensors(write(tmp_path, tensors, SCOUT, shards))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name][...].tobytes() == tensor.tobytes()
        assert found[name][1:3].tobytes() == tensor[1:3].tobytes()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000, 1])
def test_the_library_reads_what_is_written(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors_of(SCOUT).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    plan = [Planned(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    done: list[int] = []
    write_tensors(tmp_path, plan, lambda t: iter(tensors[t.name]), max_shard_bytes, done.append)
    assert sum(done) == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 or max_shard_bytes == 10**9
    found = {}
    for file in files:
        with safe_open(file, framework="np") as reader:
            assert reader.metadata() == {"format": "pt"}
            found |= {name: (file.name, reader.get_tensor(name)) for name in reader.keys()}  # noqa: SIM118
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name][1].dtype == tensor.dtype
        assert found[name][1].tobytes() == tensor.tobytes(), name
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        largest = max(tensor.nbytes for tensor in tensors.values())
        assert all(file.stat().st_size < max(max_shard_bytes, largest) + 10_000 for file in files)


def test_reading_keeps_one_tensor_in_memory(tmp_path: Path) -> None:
    """Pages of a file that stayed mapped would count as this process's memory, to the size of the model."""
    big = {f"t{i}": np.full((64, 2**16), i, np.float32) for i in range(8)}
    tensors = open_tensors(write(tmp_path, big, SCOUT))

    def mapped() -> int:
        return (tmp_path / "model.safetensors").name in Path("/proc/self/maps").read_text()

    for name, tensor in tensors.items():
        assert tensor[3].sum() == 2**16 * int(name[1:])
        assert not mapped()


# Damaged, incomplete and refused


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, tensors_of(SCOUT), SCOUT, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors, which is not in the directory"):
        open_tensors(tmp_path)


def test_an_index_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(UserError, match="expected one in the same directory"):
        open_tensors(tmp_path)


def test_a_shard_with_other_tensors_than_the_index_lists_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tensors_of(SCOUT), SCOUT, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"such as model\.norm\.weight"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_pickles_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}, which are pickles: loading one runs"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 200, -4])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    data = (SCOUT / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:kept])
    with pytest.raises(UserError, match="Fetch the file again"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
    {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 99]},
    {"dtype": "F32", "shape": [2]},
    [1, 2],
])  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path: Path, entry: object) -> None:
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(UserError, match=r"tensor a: .*Fetch the file again"):
        open_tensors(tmp_path)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(UserError, match="found F8_E4M3"):
        open_tensors(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no directory"):
        open_tensors(tmp_path / "absent")
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        open_tensors(tmp_path)


# Whole or not at all


def names(directory: Path) -> Iterator[str]:
    return (path.name for path in directory.iterdir())


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), finished_or_absent(tmp_path / "a", 1) as partial:
        (partial / "half").write_text("written")
        raise KeyboardInterrupt
    assert not list(names(tmp_path))


def test_what_a_killed_one_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "old").write_text("half")
    (tmp_path / "a").mkdir()  # empty: may be taken
    with finished_or_absent(tmp_path / "a", 1) as partial:
        (partial / "new").write_text("whole")
    assert list(names(tmp_path)) == ["a"]
    assert list(names(tmp_path / "a")) == ["new"]


def test_an_existing_directory_a_full_disk_and_a_read_only_place_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kept").write_text("mine")
    with pytest.raises(UserError, match="exists already"), finished_or_absent(tmp_path / "a", 1):
        pass
    with (
        pytest.raises(UserError, match=r"needs 1.0 EB, found .* free on its disk"),
        finished_or_absent(tmp_path / "b", 10**18),
    ):
        pass
    with pytest.raises(UserError, match="cannot be written"), finished_or_absent(Path("/proc/a/b"), 1):
        pass
    assert list(names(tmp_path)) == ["a"]
