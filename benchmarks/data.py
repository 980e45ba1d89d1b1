"""How fast batches are made of prepared text, where the time goes, and whether memory stays flat.

    python -m benchmarks.data [--documents 60000] [--row 2048] [--batch 16] [--jump 20000]

Makes documents of random letters of 60 and of 1,000 tokens on average (lognormal), prepares them into a temporary folder
with the tokenizer of plain bytes, and goes through an epoch in one process: packing, reading, filling. Then the cost of
jumping to a far batch: from the start, from a saved position, and where another process has been there; in seconds of processor
time, as it is nothing but packing. How full and how evenly dear rows of texts as on the web are: `benchmarks.packing`.
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
from data.pipeline import Dataset, build_dataset
from data.prepare import Options, prepare

SIGMA = 0.6


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


def jump(config: DataConfig, n: int) -> tuple[float, float, float]:
    """Seconds of processor time to the rows of batch n: from the start, from a position, from what the first has left."""

    def asked(position: dict[str, Any] | None) -> tuple[Dataset, float]:
        dataset = build_dataset(config, MediaSpec(), "train", position=position)
        start = time.process_time()
        dataset.rows(n)
        return dataset, time.process_time() - start

    first, alone = asked(None)
    _, saved = asked(first.plain_position(first.where(n)))
    _, again = asked(None)
    return alone, saved, again


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
            if mean == 60:
                alone, saved, again = jump(config, options.jump)
                print(
                    f"  jump to batch {options.jump:,}: {alone:.1f} s from the start, {1000 * saved:.0f} ms from a position, "
                    f"{1000 * again:.0f} ms the second time"
                )


if __name__ == "__main__":
    main()
