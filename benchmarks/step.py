"""One training step of a config on this machine: time, tokens per second, page faults, and where the time goes.

    python -m benchmarks.step [--config configs/tiny.py] [--config.NAME=VALUE ...] [--steps 10] [--no-allocator] [--fed]

`--fed` runs the steps twice in turns, on batches that lie ready as arrays and on the same ones as a run gets them: decoded,
packed and moved by a worker process meanwhile. `--no-allocator` leaves glibc's allocator as it is (see
`launch.environment.keep_freed_memory`).
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from launch import environment
from launch.parsing import split_overrides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--no-allocator", action="store_true")
    parser.add_argument("--fed", action="store_true")
    arguments, overrides = split_overrides(sys.argv[1:])
    options = parser.parse_args(arguments)
    if options.no_allocator:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    else:
        environment.prepare(verbose=False)
    measure(options.config, overrides, options.steps, options.fed)


def measure(config: str, overrides: dict[str, str], steps: int, fed: bool) -> None:
    import jax

    from data.pipeline import build_dataset
    from launch.config_file import load_run
    from trainer.flops import flops_per_token
    from trainer.objective import next_token_objective
    from trainer.step import Skeleton, init_state, make_train_step

    run = load_run(config, overrides)
    dataset = build_dataset(run.data, run.media, "train")
    batch = jax.device_put(dataset.batch(0))
    objective = next_token_objective(run.objective, len(dataset.source_names))
    state = jax.jit(lambda: init_state(run))()
    start = time.perf_counter()
    step = jax.jit(make_train_step(run, Skeleton(run.model), objective), donate_argnums=0).lower(state, batch).compile()
    print(f"{Path(config).name} on {jax.devices()[0].device_kind}: compiled in {time.perf_counter() - start:.1f} s")
    state, sums = jax.block_until_ready(step(state, batch))
    if fed:
        compare(dataset, step, state, steps)
        return
    before, wall = resource.getrusage(resource.RUSAGE_SELF), []
    for _ in range(steps):
        start = time.perf_counter()
        state, sums = jax.block_until_ready(step(state, batch))
        wall.append(time.perf_counter() - start)
    after, middle = resource.getrusage(resource.RUSAGE_SELF), sorted(wall)[len(wall) // 2]
    tokens, tiles, windows = (float(sums.get(name, 0)) for name in ("tokens", "tiles", "audio_windows"))
    flops = flops_per_token(run.model, run.data.sequence_length).training_step(tokens, tiles, windows)
    print(f"step          {1e3 * middle:8.0f} ms (median of {steps}; least {1e3 * min(wall):.0f})")
    print(f"tokens        {tokens / middle:8.0f} a second, {flops / middle / 1e9:.0f} GFLOP/s")
    print(
        f"user / system {1e3 * (after.ru_utime - before.ru_utime) / steps:8.0f} / "
        f"{1e3 * (after.ru_stime - before.ru_stime) / steps:.0f} ms of processor time a step"
    )
    print(f"page faults   {(after.ru_minflt - before.ru_minflt) / steps:8.0f} a step")
    print(f"peak memory   {after.ru_maxrss / 2**20:8.2f} GiB")


def compare(dataset: Any, step: Any, state: Any, steps: int, rounds: int = 5) -> None:
    """Steps on arrays that lie ready, and on what a run's feeder gives, in turns."""
    import jax

    from trainer.feeder import Feeder

    seconds: dict[str, list[float]] = {"ready": [], "fed": []}
    with dataset.batches(0, 2 * steps * rounds) as batches:
        feeder = Feeder(batches, jax.device_put)
        for turn in range(rounds):
            ready = [dataset.batch(turn * steps + i) for i in range(steps)]
            for name in ("ready", "fed"):
                start = time.perf_counter()
                for i in range(steps):
                    batch = jax.device_put(ready[i]) if name == "ready" else feeder.next(lambda: None).batch
                    state, _ = step(state, batch)
                jax.block_until_ready(state)
                seconds[name].append((time.perf_counter() - start) / steps)
        feeder.close()
    ratios = sorted(fed / ready for fed, ready in zip(seconds["fed"], seconds["ready"], strict=True))
    for name, found in seconds.items():
        print(f"{name:8} {1e3 * sorted(found)[rounds // 2]:8.1f} ms a step (median of {rounds} turns of {steps})")
    print(f"fed over ready: {ratios[rounds // 2]:.3f} (median; {ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
