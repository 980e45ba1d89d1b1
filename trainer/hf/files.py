"""Safetensors files: a directory's tensors by name, read where they are indexed, and shards written one run at a time.

The format: eight bytes of header length, a JSON header with dtype, shape and place of each tensor, the tensors' bytes.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from rich.filesize import decimal

from sharding.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file. Indexing reads what it takes, into memory of its own, and keeps nothing."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any, /) -> np.ndarray:
        # Mapped anew each time, or the pages of every tensor read so far would stay with this process.
        mapped = np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
        return np.array(mapped.view(self.dtype).reshape(self.shape)[index])


def open_tensors(directory: Path) -> dict[str, FileTensor]:
    """Every tensor of a directory by name. Headers are read and checked against the files' sizes, numbers are not.

    Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
        UserError: no such files, a damaged or missing one, quantised weights. Pickled weights are refused.
    """
    if not directory.is_dir():
        raise UserError(f"Hugging Face weights: no directory {directory}. Give the directory that holds {SINGLE}.")
    index = directory / INDEX
    if (directory / SINGLE).exists():
        return _open_file(directory / SINGLE)
    if not index.exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
        if pickles:
            raise UserError(
                f"Hugging Face weights: {directory} holds {', '.join(pickles[:3])}, which are pickles: loading one runs "
                "whatever code is inside. Drover reads safetensors only; save the model again with transformers' "
                "save_pretrained, which writes them."
            )
        raise UserError(f"Hugging Face weights: {directory} holds neither {SINGLE} nor {INDEX}.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: found no weight_map from tensor names to file names. Fetch the file again.")
    outside = sorted({shard for shard in weight_map.values() if Path(shard).name != shard})
    if outside:
        raise UserError(f"{index}: found the file name {outside[0]!r}, expected one in the same directory.")
    missing = sorted({shard for shard in weight_map.values() if not (directory / shard).is_file()})
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise UserError(f"{index} names {missing[0]}{more}, which is not in the directory. Fetch what is missing.")
    tensors: dict[str, FileTensor] = {}
    for shard in sorted(set(weight_map.values())):
        found = _open_file(directory / shard)
        listed = {name for name, where in weight_map.items() if where == shard}
        if found.keys() != listed:
            odd = sorted(found.keys() ^ listed)
            raise UserError(f"{directory / shard}: its tensors are not those that {INDEX} lists, such as {odd[0]}.")
        tensors |= found
    return tensors


def _open_file(path: Path) -> dict[str, FileTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: found {size} bytes, too few for a safetensors file. Fetch the file again.")
        header = _json(path, file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            stored, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
            begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, tensor {name}: found the entry {entry}. Fetch the file again.") from error
        dtype = DTYPES.get(stored)
        if dtype is None:
            raise UserError(
                f"{path}, tensor {name}: found {stored}, expected one of {', '.join(DTYPES)}. Drover reads weights "
                "that are not quantised."
            )
        tensors[name] = FileTensor(path, begin, np.dtype(dtype), shape)
        if not 8 + length <= begin <= end <= size or end - begin != tensors[name].nbytes:
            raise UserError(f"{path}, tensor {name}: its bytes are not all there. Fetch the file again.")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; raises `UserError` where it is none."""
    return _json(path, path.read_bytes())


def _json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: found no valid JSON ({error}). Fetch the file again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: found JSON that is not an object. Fetch the file again.")
    return value


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    directory: Path,
    tensors: list[Planned],
    runs: Callable[[Planned], Iterator[np.ndarray]],
    max_shard_bytes: int,
    advance: Callable[[int], None],
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` (or one tensor) with their index.

    Args:
        directory: an existing one.
        tensors: in the order in which they are to stand.
        runs: the numbers of a tensor, as arrays that follow each other; no more than one is held.
        max_shard_bytes: size of a shard, its header aside.
        advance: called with the bytes written.
    """
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            _write_shard(file, shard, runs, advance)
    if count > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(
    file: BinaryIO,
    shard: list[Planned],
    runs: Callable[[Planned], Iterator[np.ndarray]],
    advance: Callable[[int], None],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
    offset = 0
    for tensor in shard:
        place = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in shard:
        written = 0
        for run in runs(tensor):
            data = np.ascontiguousarray(run, tensor.dtype)
            file.write(data.reshape(-1).view(np.uint8).data)
            written += data.nbytes
            advance(data.nbytes)
        assert written == tensor.nbytes, f"{tensor.name}: {written} of {tensor.nbytes} bytes written"


@contextlib.contextmanager
def finished_or_absent(target: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside `target` to write into, renamed to it at the end; whatever happens before, nothing is left.

    Raises:
        UserError: `target` exists and is not an empty directory, cannot be written beside, or the disk has no room for
            the `nbytes` to come.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already, expected a new or empty directory. Give another, or remove it.")
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed one
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}). Give another directory.") from error
    try:
        free = shutil.disk_usage(partial).free
        if nbytes > free:
            raise UserError(
                f"{target}: needs {decimal(nbytes)}, found {decimal(free)} free on its disk. Free space, or give a "
                "directory on another disk."
            )
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
