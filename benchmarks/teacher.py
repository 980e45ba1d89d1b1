"""A teacher as it is kept: what int8 costs in what it says, and what a device must hold.

    python -m benchmarks.teacher RUN [--batches 4]
    python -m benchmarks.teacher --topology v5e:2x4

The first compares the model of a run directory in bfloat16 and int8 with itself in float32, on the run's held-out batches.
The second compiles the forward pass of a small mixture of experts for a TPU, which takes libtpu (`make collectives` installs
it; PYTHONPATH=.venv/libtpu) and no TPU, and prints the memory that the compiler says it needs; nothing of it is run.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks.topology import ENVIRONMENT

MESHES: tuple[dict[str, int], ...] = ({}, {"fsdp": 2, "expert": 2, "tensor": 2})
ROWS, LENGTH = 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="run directory or one of its checkpoints")
    parser.add_argument("--batches", type=int, default=4, help="held-out batches (default: %(default)s)")
    parser.add_argument("--topology", help="of TPUs, as libtpu names it")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT if options.topology else {"JAX_PLATFORMS": "cpu"}
    if options.run:
        closeness(options.run, options.batches)
    if options.topology:
        memory(options.topology)


def closeness(path: Path, batches: int) -> None:
    """Prints how far the model is from itself in float32."""
    import jax
    import numpy as np

    from data.pipeline import build_dataset
    from model.distillation import distillation_losses
    from sharding.mesh import DeviceMesh
    from trainer.checkpoint import Checkpoints, locate
    from trainer.config import DistillConfig
    from trainer.memory import tree_bytes
    from trainer.teacher import load_teacher

    folder, step = locate(path)
    run = Checkpoints(folder).run(step)
    dataset = build_dataset(run.data, run.media, "heldout")

    def kept(dtype: Any) -> Any:
        distill = DistillConfig(teacher=str(path), teacher_dtype=dtype)
        return load_teacher(run, distill, DeviceMesh.alone(), None, dataset.tokenizer.digest).teacher

    def compared(teacher: Any, exact: Any, batch: Any) -> Any:
        (hidden, head), (exact_hidden, exact_head) = (
            (model(batch).hidden_BSD, model.head())
            for model in (given.skeleton.model(given.params, given.router_bias) for given in (teacher, exact))
        )
        flat = [array.reshape(-1, array.shape[-1]).astype("float32") for array in (hidden, exact_hidden)]
        found = distillation_losses(
            flat[0],
            head.astype("float32"),
            flat[1],
            exact_head,
            batch["targets"].reshape(-1),
            kind="forward",
            temperature=1.0,
            block=4096,
        )
        weights = batch["loss_weights"].reshape(-1)
        return [(array * weights).sum() for array in (found.divergence_T, found.cross_entropy_T)] + [weights.sum()]

    exact, program = kept("float32"), jax.jit(compared)
    print(f"{path}, step {step}: {batches} held-out batches\n")
    print(f"{'kept in':>8} {'weights':>10} {'KL from float32':>16} {'next-token loss':>16}   nats per predicted token")
    for dtype in ("float32", "bfloat16", "int8"):
        teacher = kept(dtype)
        sums = np.array([program(teacher, exact, dataset.batch(n)) for n in range(batches)], np.float64).sum(axis=0)
        divergence, loss = sums[:2] / sums[2]
        print(f"{dtype:>8} {tree_bytes(teacher.params):>10,} {divergence:>16.2e} {loss:>16.4f}", flush=True)


def memory(topology_name: str) -> None:
    """Prints what the forward pass needs on a chip and of its host."""
    import jax
    from jax.experimental import topologies

    from model.config import ModelConfig
    from model.storage import Storage
    from sharding.config import written
    from sharding.mesh import DeviceMesh
    from trainer.memory import tree_bytes
    from trainer.step import Skeleton

    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name)
    model = ModelConfig(
        vocab_size=1024,
        hidden_size=512,
        num_layers=16,
        num_heads=8,
        num_kv_heads=4,
        head_dim=128,
        dense_ffn_size=1024,
        expert_ffn_size=1024,
        num_experts=8,
        moe_layer_step=2,
        nope_layer_step=2,
        chunk_size=128,
        vision=None,
        dtype="bfloat16",
        param_dtype="bfloat16",  # pyright: ignore[reportArgumentType]  # as a frozen teacher is kept
        remat="none",
    )
    print(f"compiled for {topology.devices[0].device_kind}; KiB of a chip\n")
    print(f"{'mesh':28} {'kept':>15} {'arguments':>10} {'temporary':>10} {'of the host':>12}   one super-block")
    for sizes in MESHES:
        for storage in (Storage(), Storage(int8=True), Storage(host=True), Storage(int8=True, host=True)):
            mesh = DeviceMesh.of(topology.devices[: len(topology.devices) if sizes else 1], sizes)
            skeleton = Skeleton(model, mesh, storage)
            names = ("tokens", "targets", "segment_ids", "positions", "source_ids")
            homes = mesh.batch(names)
            batch = {name: jax.ShapeDtypeStruct((ROWS, LENGTH), "int32", sharding=homes[name]) for name in names}

            def on_one(params: Any, biases: Any, batch: Any, skeleton: Any = skeleton) -> Any:
                return skeleton.model(params, biases)(batch).hidden_BSD

            inputs = (skeleton.shardings, mesh.everywhere, homes)
            run = jax.jit(mesh.on_all(on_one, inputs, homes["tokens"]))
            needs = run.lower(*skeleton.abstract_weights, batch).compile().memory_analysis()
            assert needs
            kept = " ".join(["int8" if storage.int8 else "bfloat16", *(["host"] if storage.host else [])])
            on_host = needs.host_argument_size_in_bytes + needs.host_temp_size_in_bytes
            print(
                f"{written(mesh.sizes):28} {kept:>15} {needs.argument_size_in_bytes >> 10:>10,} "
                f"{needs.temp_size_in_bytes >> 10:>10,} {on_host >> 10:>12,}   "
                f"{tree_bytes(skeleton.one_super_block) >> 10:,}",
                flush=True,
            )


if __name__ == "__main__":
    main()
