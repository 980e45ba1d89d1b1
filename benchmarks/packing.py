"""How full packed rows are, and how fast they are packed: lengths as on the web, and rows of several parts.

    python -m benchmarks.packing [--documents 65536] [--window 256] [--rows 8192 32768]

Lengths are lognormal (median 600 tokens, mean 1,500), cut to the row; `parts` is data.row_parts.
"""

import argparse
import time

import numpy as np

from data.packing import Packing

PARTS = (1, 2, 4, 8)
MEDIAN, SIGMA = 600, 1.35


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=65_536)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[8_192, 32_768])
    options = parser.parse_args()
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN), SIGMA, options.documents)
    print(f"{'row':>7} {'parts':>6} {'useful tokens':>14} {'million tokens a second':>24}")
    for row in options.rows:
        lengths = drawn.clip(16, row).astype(np.int64)
        for parts in PARTS:
            sizes = np.column_stack([lengths, np.zeros((len(lengths), 2), np.int64)])
            packing = Packing([sizes], lambda n: (1.0,), (row, 0, 0), options.window, 0, parts)
            rows, documents = 0, 0
            start = time.perf_counter()
            while documents < options.documents:
                documents += len(packing.row(rows))
                rows += 1
            seconds = time.perf_counter() - start
            useful = lengths.sum() / (rows * row)
            print(f"{row:>7,} {parts:>6} {100 * useful:>12.1f} % {lengths.sum() / seconds / 1e6:>24.1f}", flush=True)


if __name__ == "__main__":
    main()
