"""Import and export of a model that does not fit in memory: time, and peak memory of the process.

    python -m benchmarks.convert --directory DIR [--gib 14]

Makes a random Llama 4 in bfloat16 with shards of 2 GiB in DIR, runs `drover import` and `drover export` on it as
processes of their own, watches their memory, and compares every tensor of the result with the first one, byte by byte.
Needs three times the size in disk. Anonymous memory is what a process needs; pages of files that it reads or has just
written are the system's cache, given back when something else wants them, and are counted apart.
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from model.config import ModelConfig, RopeScaling
from trainer.hf.config import model_config_to_hf
from trainer.hf.descriptions import ROLES
from trainer.hf.files import Planned, open_tensors, write_tensors
from trainer.hf.table import pieces
from trainer.rundir import write_json

SHAPE = ModelConfig(
    hidden_size=2048,
    num_layers=4,
    num_heads=16,
    num_kv_heads=4,
    dense_ffn_size=8192,
    expert_ffn_size=4096,
    rope_scaling=RopeScaling(),
)
"""Scout's proportions at two fifths of its width; layers are added until the size is reached."""
BLOCK = 2**24
GIB = 2**30


def of_size(nbytes: float) -> ModelConfig:
    """`SHAPE` with as many super-blocks as it takes to reach this many bytes in bfloat16."""

    def size(model: ModelConfig) -> float:
        return sum(2 * np.prod(of[0].leaf.hf_shape, dtype=float) for of in pieces(model).values())

    layers = range(4, 1000, 4)
    return next(m for m in (dataclasses.replace(SHAPE, num_layers=n) for n in layers) if size(m) >= nbytes)


def make(directory: Path, model: ModelConfig) -> None:
    """A random model as a Hugging Face directory."""
    block = np.random.default_rng(0).standard_normal(BLOCK, np.float32).astype(ml_dtypes.bfloat16)
    plan = [Planned(name, block.dtype, of[0].leaf.hf_shape) for name, of in pieces(model).items()]
    place = {tensor.name: i for i, tensor in enumerate(plan)}

    def runs(tensor: Planned) -> Iterator[np.ndarray]:
        left = tensor.nbytes // 2
        shift = 7919 * place[tensor.name] % BLOCK  # no two tensors alike
        while left:
            run = block[shift : shift + left]
            yield run
            left, shift = left - len(run), 0

    directory.mkdir(parents=True)
    write_tensors(directory, plan, runs, 2 * GIB, lambda _: None)
    write_json(directory / "config.json", model_config_to_hf(model, "bfloat16", dict.fromkeys(ROLES), 8192))


def watched(*arguments: str) -> tuple[float, int, int]:
    """Seconds, peak anonymous memory and peak memory with file pages, of a `drover` command."""
    peak = {"RssAnon": 0, "VmHWM": 0}
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "launch.cli", *arguments])

    def watch() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for name, value in (line.split(":", 1) for line in lines):
                if name in peak:
                    peak[name] = max(peak[name], int(value.split()[0]) * 1024)
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    status = process.wait()
    thread.join()
    if status:
        sys.exit(f"drover {' '.join(arguments)}: exit status {status}")
    return time.monotonic() - began, peak["RssAnon"], peak["VmHWM"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="a new directory on a disk with room")
    parser.add_argument("--gib", type=float, default=14.0, help="size of the model")
    options = parser.parse_args()
    source, run, exported = (options.directory / name for name in ("hf", "run", "exported"))
    model = of_size(options.gib * GIB)
    make(source, model)
    tensors = open_tensors(source)
    nbytes, largest = (f([t.nbytes for t in tensors.values()]) for f in (sum, max))
    print(f"{len(tensors)} tensors, {nbytes / GIB:.2f} GiB in all, the largest {largest / GIB:.2f} GiB")
    for command in (("import", source, run), ("export", run, exported)):
        seconds, anonymous, resident = watched(*map(str, command))
        print(
            f"{command[0]}: {seconds:.0f} s, {nbytes / seconds / 1e6:.0f} MB/s; peak memory {anonymous / GIB:.2f} GiB "
            f"anonymous, {resident / GIB:.2f} GiB with file pages"
        )
    again = open_tensors(exported)
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[n][...].view(np.uint16), tensors[n][...].view(np.uint16)) for n in tensors)
    print("every tensor came back with the same bytes")
    shutil.rmtree(options.directory)


if __name__ == "__main__":
    main()
