"""Decoding on this machine: milliseconds per token with the cache, beside a forward pass of the whole row for each token.

    python -m benchmarks.decode [--config configs/tiny.py] [--config.NAME=VALUE ...] [--lengths 64 256 1024] [--rows 1]

Weights are fresh. A length is that of the row when the token is decoded; the cache and the row have room for just so many.
"""

import argparse
import sys
import time
from pathlib import Path

from launch import environment
from launch.parsing import split_overrides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=40, help="tokens that are timed")
    arguments, overrides = split_overrides(sys.argv[1:])
    options = parser.parse_args(arguments)
    environment.prepare(verbose=False)
    measure(options, overrides)


def measure(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    import jax
    import numpy as np

    from launch.config_file import load_run
    from trainer.decode import Decoder, Prompt, rows_of
    from trainer.step import Skeleton, init_state

    run, rows = load_run(options.config, overrides), options.rows
    state = jax.jit(lambda: init_state(run))()
    skeleton = Skeleton(run.model)
    decoder = Decoder(skeleton, state.params, state.router_bias)

    @jax.jit
    def whole_row(params, bias, batch):
        model = skeleton.model(params, bias)
        return model.logits(model(batch).hidden_BSD[:, -1]).argmax(axis=1)

    def milliseconds(times: list[float]) -> float:
        return 1e3 * float(np.median(np.diff(times)))

    print(f"{Path(options.config).name}, {rows} row(s), {run.model.dtype}, on {jax.devices()[0].device_kind}\n")
    print(
        f"{'length':>8} {'prefill ms':>11} {'cached ms':>10} {'uncached ms':>12} {'ratio':>7}   (ms per token, median)"
    )
    for length in options.lengths:
        tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, (rows, length), np.int32)
        most = min(options.tokens, length // 2)
        prompts = [Prompt(row[: length - most]) for row in tokens]
        for _ in decoder.stream(prompts, 2):
            pass  # compiles
        times = [time.perf_counter()]
        for _ in decoder.stream(prompts, most):
            times.append(time.perf_counter())
        first, cached = 1e3 * (times[1] - times[0]), milliseconds(times[1:])
        batch = rows_of([Prompt(row) for row in tokens])
        times = []
        for _ in range(1 + min(most, 12)):
            jax.block_until_ready(whole_row(state.params, state.router_bias, batch))
            times.append(time.perf_counter())
        uncached = milliseconds(times)
        print(f"{length:>8} {first:>11.1f} {cached:>10.2f} {uncached:>12.1f} {uncached / cached:>7.1f}")


if __name__ == "__main__":
    main()
