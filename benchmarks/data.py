"""How fast batches are made of prepared text, where the time goes, and whether memory stays flat.

    python -m benchmarks.data [--documents 60000] [--row 2048] [--batch 16] [--jump 20000]

Makes documents of random letters of 60 and of 1,000 tokens on average (lognormal), prepares them into a temporary folder
with the tokenizer of plain bytes, and goes through an epoch in one process: packing, reading, filling. Then the cost of
jumping to a far batch, from the start and from a saved position, and how full and how evenly dear rows are.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, MediaSpec
from data.packing import Packing
from data.pipeline import Dataset, build_dataset
from data.prepare import Options, prepare

SIGMA = 0.6
DEVICES = (2, 4, 8)


def made(folder: Path, count: int, mean: int) -> Path:
    """A data set of so many documents of about so many tokens."""
    random = np.random.default_rng(mean)
    lengths = np.maximum(random.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, count) - 2, 1).astype(int)
    letters = random.integers(97, 123, lengths.sum() + 1, dtype=np.uint8).tobytes().decode()
    ends = np.cumsum(lengths)
    with open(folder / f"{mean}.jsonl", "w") as file:
        for i, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
            file.write(json.dumps({"id": i, "text": letters[end - length : end]}) + "\n")
    out = folder / str(mean)
    prepare(
        [folder / f"{mean}.jsonl"],
        out,
        Options(tokenizer="bytes", held_out=0, keep_duplicates=True),
        1,
        lambda told: None,
    )
    return out


def timed(owner: Any, name: str, spent: dict[str, float]) -> None:
    """Adds up the seconds that calls of a method take."""
    inner: Callable[..., Any] = getattr(owner, name)

    def outer(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return inner(*arguments)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    setattr(owner, name, outer)


def memory() -> float:
    """Peak resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def epoch(dataset: Dataset) -> tuple[int, int, int, float]:
    """Goes through the documents once: (documents, useful tokens, slots, seconds)."""
    documents = tokens = slots = n = 0
    count = len(dataset._sources[0])
    start = time.perf_counter()
    while documents < count:
        batch = dataset.batch(n)
        documents += int(batch["segment_ids"].max(axis=1).sum())
        tokens += int((batch["segment_ids"] > 0).sum())
        slots += batch["tokens"].size
        n += 1
    return documents, tokens, slots, time.perf_counter() - start


def spread(dataset: Dataset, parts: int, batches: int = 50) -> tuple[float, float]:
    """Cost of the dearest of so many shares of a batch over the mean, (as packed, as ordered): squares of lengths."""
    found = []
    for order in ("packed", "ordered"):
        ratios = []
        for n in range(batches):
            B = dataset.config.batch_size
            rows = dataset.rows(n) if order == "ordered" else [dataset._packing.row(n * B + b) for b in range(B)]
            costs = np.array([dataset._cost(row) for row in rows], float).reshape(parts, -1).sum(axis=1)
            ratios.append(costs.max() / costs.mean())
        found.append(float(np.mean(ratios)))
    return found[0], found[1]


def jump(dataset: Dataset, n: int) -> tuple[float, float]:
    """Seconds to the rows of batch n, without and with a saved position."""
    start = time.perf_counter()
    rows = dataset.rows(n)
    first = time.perf_counter() - start
    p, position = dataset._packing, dataset.position(n)
    start = time.perf_counter()
    arguments = p._sizes, p._shares, p._room, p._least, p._seed, p._row_parts, p._caps
    dataset._packing = Packing(*arguments, position=position)
    assert dataset.rows(n) == rows
    return first, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--row", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--jump", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for mean in (60, 1000):
            out = made(folder, options.documents if mean == 60 else options.documents // 10, mean)
            config = DataConfig(
                mixture={"made": 1.0},
                paths={"made": str(out)},
                tokenizer=str(out),
                sequence_length=options.row,
                batch_size=options.batch,
                workers=0,
                cache_dir=str(folder / "cache"),
            )
            dataset = build_dataset(config, MediaSpec(), "train")
            dataset.batch(0)
            before, spent = memory(), {}
            for owner, name in ((dataset, "rows"), (dataset, "_read"), (dataset, "_fill_row")):
                timed(owner, name, spent)
            documents, tokens, slots, seconds = epoch(dataset)
            others = seconds - sum(spent.values())
            where = ", ".join(f"{name} {100 * part / seconds:.0f} %" for name, part in spent.items())
            print(f"\n{mean} tokens a document, rows of {options.row:,}, {documents:,} documents")
            print(
                f"  {tokens / seconds / 1e6:.2f} million tokens/s, {documents / seconds:,.0f} documents/s, one process"
            )
            print(f"  {where}, other {100 * others / seconds:.0f} %")
            print(
                f"  {100 * tokens / slots:.1f} % of the token slots useful; peak memory {before:.0f} -> {memory():.0f} MB"
            )
            for parts in DEVICES:
                packed, ordered = spread(dataset, parts)
                print(
                    f"  dearest of {parts} shares of a batch over the mean: {packed:.2f} as packed, {ordered:.2f} as ordered"
                )
            if mean == 60:
                alone, saved = jump(dataset, options.jump)
                print(
                    f"  jump to batch {options.jump:,}: {alone:.0f} s from the start, {1000 * saved:.0f} ms from a position"
                )


if __name__ == "__main__":
    main()
