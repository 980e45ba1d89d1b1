"""What the TPU compiler makes of the shipped training step on a mesh: which collectives, how many, of how many bytes.

    python -m tests.sharding.collectives [--topology v5p:2x2x2] [--check FILE | --write FILE]

No TPU is needed: libtpu compiles for a topology that it is told (`make collectives` installs it beside .venv's packages).
Each line is a mesh of 8 chips, TPU v5e unless another topology is asked for, and a kind of collective: instructions in the
program, and the bytes of their results on one chip, those in a loop counted once. With --check, another table than the
file's is an error: a change of sharding shows here, and not on a pod.
"""

import argparse
import collections
import difflib
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.topology import ENVIRONMENT

MESHES = (
    {"data": 8},
    {"fsdp": 8},
    {"fsdp": 2, "expert": 4},
    {"fsdp": 2, "context": 4},
    {"stage": 2, "fsdp": 4},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
)
ROWS, LENGTH = 8, 256
KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8, "s64": 8}
REMATERIALISED = "Involuntary full rematerialization"
"""XLA's warning that it gathers an array whole to change its sharding."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4", help="of 8 chips, as libtpu names it (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", type=Path, metavar="FILE", help="compare with this table")
    what.add_argument("--write", type=Path, metavar="FILE", help="write the table here")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT | {"TPU_STDERR_LOG_LEVEL": "1"}  # warnings
    if REMATERIALISED not in warnings_of(one_that_warns(options.topology))[0]:
        print(f"of a program that gives rise to it, this compiler does not say: {REMATERIALISED}", file=sys.stderr)
        return 1
    lines, warned = [], False
    for sizes in MESHES:
        log, program = compiled(sizes, options.topology)
        warned |= REMATERIALISED in log
        lines += [*rows(sizes, program), ""]
        print("\n".join(lines[-len(rows(sizes, program)) - 1 :]), flush=True)
    if warned:
        print(f"the compiler warned: {REMATERIALISED}", file=sys.stderr)
        return 1
    table = "\n".join(lines)
    if options.write:
        options.write.write_text(table)
    if options.check and options.check.read_text() != table:
        expected = options.check.read_text().splitlines()
        print("\n".join(difflib.unified_diff(expected, table.splitlines(), str(options.check), "found", lineterm="")))
        return 1
    return 0


def compiled(sizes: dict[str, int], topology_name: str) -> tuple[str, str]:
    """What the compiler logged, and the program of a training step on a mesh of these sizes."""
    import jax
    from jax.experimental import topologies

    from data.config import DataConfig
    from model.config import ModelConfig, VisionConfig
    from sharding.mesh import DeviceMesh
    from trainer.config import OptimizerConfig, RunConfig
    from trainer.initialise import abstract_state
    from trainer.objective import next_token_objective
    from trainer.step import Skeleton, make_train_step

    vision = VisionConfig(image_size=56, hidden_size=128, num_layers=2, num_heads=2, ffn_size=512, adapter_size=256)
    model = ModelConfig(
        vocab_size=1024,
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        dense_ffn_size=512,
        expert_ffn_size=512,
        num_experts=8,
        moe_layer_step=2,
        nope_layer_step=2,
        chunk_size=128,
        vision=vision,
        dtype="bfloat16",
        remat="full",
    )
    run = RunConfig(
        model=model,
        data=DataConfig(batch_size=ROWS, sequence_length=LENGTH),
        optimizer=OptimizerConfig(),
    )
    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name)
    mesh = DeviceMesh.of(topology.devices, sizes)
    skeleton = Skeleton(model, mesh)
    state = abstract_state(run, skeleton)

    names = ("tokens", "targets", "segment_ids", "positions", "source_ids")
    shapes = dict.fromkeys(names, ((ROWS, LENGTH), "int32")) | {"loss_weights": ((ROWS, LENGTH), "float32")}
    shapes |= {"image_tiles": ((ROWS, 2, 56, 56, 3), "uint8")}
    shapes |= {"image_positions": ((ROWS, 2, vision.tokens_per_tile), "int32")}
    shardings = mesh.batch(shapes)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[name]) for name, (shape, dtype) in shapes.items()
    }
    step = make_train_step(run, skeleton, next_token_objective(run.objective, 2))
    outputs = jax.tree.map(lambda leaf: leaf.sharding, state), mesh.everywhere
    lowered = jax.jit(step, donate_argnums=0, out_shardings=outputs).lower(state, batch)
    return warnings_of(lowered)


def one_that_warns(topology_name: str) -> Any:
    """A program, lowered, for which a whole array has to be gathered: rows and columns change the axes that split them."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices
    mesh = Mesh(np.array(devices).reshape(2, 4), ("a", "b"))

    def moved(x_RC: jax.Array) -> jax.Array:
        x_RC = jax.lax.with_sharding_constraint(jax.numpy.sin(x_RC), NamedSharding(mesh, P("b", "a")))
        y_RC = x_RC.reshape(16, 48, 16).transpose(1, 0, 2).reshape(48 * 8, 32)
        return jax.numpy.cos(jax.lax.with_sharding_constraint(y_RC, NamedSharding(mesh, P(("b", "a"), None))))

    split = NamedSharding(mesh, P("a", "b"))
    return jax.jit(moved, out_shardings=split).lower(jax.ShapeDtypeStruct((16 * 48, 16), "float32", sharding=split))


def warnings_of(lowered: Any) -> tuple[str, str]:
    """What C++ writes to stderr while it compiles, and the program."""
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            program = lowered.compile().as_text()
        finally:
            os.dup2(before, 2)
            os.close(before)
        file.seek(0)
        assert program
        return file.read().decode(errors="replace"), program


def instructions(program: str) -> Iterator[tuple[str, str]]:
    """(kind, shapes of the results) of every collective.

    One that the compiler overlaps with computation stands in several fusions: where it starts, in all that it runs
    beside, and where it is done. It counts where it starts.
    """
    done = set(re.findall(r"%async-collective-done[^\n]*calls=%([\w.\-]+)", program))
    computation = ""
    for line in re.sub(r"/\*.*?\*/", "", program).splitlines():
        begins = re.match(r"(?:ENTRY )?%([\w.\-]+) \(", line)
        if begins:
            computation = begins.group(1)
        found = re.search(rf"= ([^=]*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if found and computation not in done and not computation.startswith("async_collective_fusion"):
            yield found.group(2), found.group(1)


def rows(sizes: dict[str, int], program: str) -> list[str]:
    """The lines of the table for one program."""
    counts: collections.Counter[str] = collections.Counter()
    totals: collections.Counter[str] = collections.Counter()
    for kind, shapes in instructions(program):
        counts[kind] += 1
        totals[kind] += sum(
            BYTES[dtype] * math.prod(map(int, filter(None, dims.split(","))))
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
    name = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    return [f"{name:30} {kind:20} {counts[kind]:4} {totals[kind]:12,} bytes" for kind in KINDS if counts[kind]]


if __name__ == "__main__":
    sys.exit(main())
