"""Long rows on devices along mesh.context: what the compiled training step needs of each, and a step that is run.

    python -m benchmarks.context [--tokens 262144] [--devices 1 2 4 8] [--run 32768]

Virtual devices of this machine's CPU, one row, a small model with Scout's pattern of chunked and global layers. Memory is
the compiler's, of one device: arguments, and what it needs beside them. Steps of `--run` tokens are run on the same devices.
"""

import argparse
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--run", type=int, help="tokens of a step that is run")
    options = parser.parse_args()

    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    print(f"{options.tokens:,} tokens, memory of a device in MiB\n")
    print(f"{'devices':>8} {'arguments':>10} {'beside them':>12} {'sum':>8} {'x devices':>10}")
    for devices in options.devices:
        _, compiled = step_of(options.tokens, devices)
        arguments, beside = memory(compiled)
        total = arguments + beside
        print(
            f"{devices:>8} {arguments / 2**20:>10.1f} {beside / 2**20:>12.1f} {total / 2**20:>8.1f} "
            f"{devices * total / 2**20:>10.1f}",
            flush=True,
        )
    if options.run:
        print(f"\n{options.run:,} tokens, a step that is run\n\n{'devices':>8} {'loss':>12} {'seconds':>9}")
        for devices in options.devices:
            make, compiled = step_of(options.run, devices)
            state, batch = make()
            start = time.perf_counter()
            _, sums = compiled(state, batch)
            loss = float(sums["loss"])
            print(f"{devices:>8} {loss:>12.7f} {time.perf_counter() - start:>9.1f}", flush=True)


def memory(compiled: Any) -> tuple[int, int]:
    """Bytes of one device: arguments, and what the step needs beside them."""
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes


def step_of(tokens: int, devices: int, **changed: Any) -> tuple[Any, Any]:
    """(a function that makes a state and a batch, the compiled training step). `changed`: options of the model."""
    import dataclasses

    import jax
    import numpy as np

    from data.config import DataConfig
    from model.config import ModelConfig
    from sharding.config import MeshConfig
    from trainer.config import RunConfig
    from trainer.initialise import abstract_state
    from trainer.objective import next_token_objective
    from trainer.placement import place_run
    from trainer.step import Skeleton, init_state, make_train_step

    model = ModelConfig(
        vocab_size=512,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=1,
        head_dim=32,
        dense_ffn_size=256,
        expert_ffn_size=128,
        num_experts=4,
        remat="full",
        init_std=0,
    )
    model = dataclasses.replace(model, **changed)
    data = DataConfig(mixture={"text": 1.0}, sequence_length=tokens, batch_size=1)
    run = RunConfig(model=model, data=data, mesh=MeshConfig(fsdp=1, context=devices))
    mesh = place_run(run, jax.devices()[:devices])
    skeleton = Skeleton(model, mesh)
    state = abstract_state(run, skeleton)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    drawn = np.random.default_rng(0).integers(0, model.vocab_size, (1, tokens), np.int32)
    place = np.arange(tokens, dtype=np.int32)[None]
    short = tokens // 4 + 5  # a document of a quarter of the row, and one of the rest
    batch = {
        "tokens": drawn,
        "targets": np.roll(drawn, -1, axis=1),
        "loss_weights": np.ones((1, tokens), np.float32),
        "segment_ids": np.where(place < short, 1, 2).astype(np.int32),
        "positions": np.where(place < short, place, place - short).astype(np.int32),
        "source_ids": np.ones((1, tokens), np.int32),
    }

    def make() -> Any:
        made = jax.jit(lambda: init_state(run), out_shardings=shardings)()
        return made, mesh.put(batch, 1)

    shapes = {
        name: jax.ShapeDtypeStruct(batch[name].shape, batch[name].dtype, sharding=sharding)
        for name, sharding in mesh.batch(batch).items()
    }
    step = make_train_step(run, skeleton, next_token_objective(run.objective, 1))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, mesh.everywhere))
    return make, jitted.lower(state, shapes).compile()


if __name__ == "__main__":
    main()
