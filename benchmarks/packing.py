"""How full packed rows are, how evenly dear the shares of a batch, and how fast rows are packed.

    python -m benchmarks.packing [--documents 65536] [--window 256] [--rows 8192 32768]

Texts as long as on the web: lognormal (median 600 tokens, mean 1,500), cut to the row; `parts` is data.row_parts. And, with
budgets for tokens, tiles and windows of sound at once, a mixture by documents of 30 % such texts, 40 % pictures (1 to 5 tiles
of 144 tokens), 15 % videos (4 to 8 frames) and 15 % sounds (1 to 5 windows of 125 tokens), with captions of some 80 tokens:
a row has 24 tiles and 5 windows for each 8,192 tokens, somewhat more than the mixture asks for.
"""

import argparse
import time

import numpy as np

from data.packing import Packing, Size, balanced, row_cost

PARTS = (1, 2, 4, 8)
MEDIAN, SIGMA = 600, 1.35
BATCH, DEVICES = 16, (2, 4, 8)
TILE_TOKENS, WINDOW_TOKENS = 144, 125


def texts(count: int, row: int) -> np.ndarray:
    """int64 [count, 3], sizes of texts."""
    lengths = np.random.default_rng(0).lognormal(np.log(MEDIAN), SIGMA, count).clip(16, row).astype(np.int64)
    return np.column_stack([lengths, np.zeros((count, 2), np.int64)])


def mixed(count: int, row: int) -> np.ndarray:
    """int64 [count, 3], sizes of texts, pictures, videos and sounds."""
    random = np.random.default_rng(1)
    kind = random.choice(4, count, p=[0.3, 0.4, 0.15, 0.15])
    captions = random.lognormal(np.log(60), 0.8, count).clip(8, 500).astype(np.int64)
    pictures, frames = random.choice([1, 2, 3, 5], count, p=[0.4, 0.3, 0.1, 0.2]), random.integers(4, 9, count)
    sounds = np.ceil(random.lognormal(np.log(8), 1, count).clip(1, 50) / 10).astype(np.int64)
    tiles = np.select([kind == 1, kind == 2], [pictures, frames], 0)
    windows = np.where(kind == 3, sounds, 0)
    written = np.where(kind == 0, texts(count, row)[:, 0], captions)
    return np.column_stack([written + TILE_TOKENS * tiles + WINDOW_TOKENS * windows, tiles, windows])


def spread(rows: list[list[Size]], room: Size, parts: int) -> tuple[float, float]:
    """Cost of the dearest of so many shares of a batch over the mean, (as packed, as ordered), mean over batches."""
    found = []
    for start in range(0, len(rows) - BATCH + 1, BATCH):
        costs = np.array([row_cost(row, room) for row in rows[start : start + BATCH]])
        for order in (np.arange(BATCH), balanced(costs.tolist())):
            shares = costs[order].reshape(parts, -1).sum(axis=1)
            found.append(shares.max() / shares.mean())
    return float(np.mean(found[::2])), float(np.mean(found[1::2]))


def measured(name: str, sizes: np.ndarray, room: Size, window: int, parts: int) -> None:
    packing = Packing({name: sizes}, lambda n: (1.0,), room, window, 0, parts)
    rows: list[list[Size]] = []
    documents, start = 0, time.process_time()
    while documents < len(sizes):
        rows.append([tuple(sizes[document].tolist()) for _, document, _ in packing.row(len(rows))])
        documents += len(rows[-1])
    seconds = time.process_time() - start
    used = np.array([np.sum(row, axis=0) for row in rows])
    full = " / ".join(
        f"{100 * part.sum() / (most * len(rows)):.1f}" for part, most in zip(used.T, room, strict=True) if most
    )
    shares = ", ".join("{:.2f} -> {:.2f}".format(*spread(rows, room, count)) for count in DEVICES)
    speed = f"{used[:, 0].sum() / seconds / 1e6:.1f}"
    print(f"{name:>6} {room[0]:>7,} {parts:>6} {full:>20} {shares:>46} {speed:>10}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=65_536)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[8_192, 32_768])
    options = parser.parse_args()
    print("% full: of the slots for tokens / tiles / windows of sound. Millions of tokens a second of processor time.")
    print(f"Dearest share of a batch of {BATCH} rows over the mean, as packed -> as ordered: for {DEVICES} devices.\n")
    print(f"{'':>6} {'row':>7} {'parts':>6} {'% full':>20} {'dearest share':>46} {'M tokens/s':>10}")
    for row in options.rows:
        for parts in PARTS:
            measured("texts", texts(options.documents, row), (row, 0, 0), options.window, parts)
        room = (row, 24 * row // 8192, 5 * row // 8192)
        measured("mixed", mixed(options.documents, row), room, options.window, 1)


if __name__ == "__main__":
    main()
