"""Rows that the packer made with `data.row_parts`, split over devices that fetch nothing, next to one device, in float64."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from data.config import DataConfig
from data.packing import pack_rows
from sharding.config import MeshConfig
from sharding.mesh import DeviceMesh
from tests import oracle
from tests.oracle_cases import COEFFICIENTS, FAST_COMPILE, SOURCES, random_params
from tests.sharding.sameness import WIDE
from trainer.config import RunConfig
from trainer.objective import next_token_objective
from trainer.placement import place_run
from trainer.step import Skeleton, loss_and_gradient

ROWS, LENGTH, PARTS = 2, 64, 8
MODEL = dataclasses.replace(
    WIDE, num_layers=2, nope_layer_step=2, chunk_size=LENGTH // PARTS, dtype="float64", param_dtype="float64"
)


def packed(row_parts: int) -> dict[str, np.ndarray]:
    """Documents of random lengths, some longer than a part, as the packer puts them into rows."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 3 * LENGTH // PARTS, 40)
    names = ("tokens", "targets", "segment_ids", "positions", "source_ids")
    batch: dict[str, Any] = {name: np.zeros((ROWS, LENGTH), np.int32) for name in names}
    batch["loss_weights"] = np.zeros((ROWS, LENGTH), np.float32)
    rows = pack_rows([(int(length), 0, 0) for length in lengths], (LENGTH, 0, 0), row_parts)
    for b, row in enumerate(rows[:ROWS]):
        for segment, (document, start) in enumerate(row, start=1):
            where = slice(start, start + lengths[document])
            batch["segment_ids"][b, where] = segment
            batch["positions"][b, where] = np.arange(lengths[document])
            batch["tokens"][b, where] = rng.integers(0, MODEL.vocab_size, lengths[document])
            batch["targets"][b, where] = np.roll(batch["tokens"][b, where], -1)
            batch["loss_weights"][b, where.start : where.stop - 1] = 1
            batch["source_ids"][b, where] = 1
    return batch


@functools.cache
def compiled(mesh: DeviceMesh) -> Any:
    """(weights, batch) -> loss, sums and gradient, on the host."""
    skeleton, objective = Skeleton(MODEL, mesh), next_token_objective(COEFFICIENTS, SOURCES)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params: Any, batch: Any) -> Any:
        return loss_and_gradient(skeleton, objective, params, {}, batch, 1)

    return lambda params, batch: jax.device_get(
        run(jax.device_put(params, skeleton.shardings), jax.device_put(batch, mesh.batch(batch)))
    )


def largest_error(row_parts: int) -> float:
    """Of the loss and of every gradient, of its norm, where nothing is fetched."""
    data = DataConfig(sequence_length=LENGTH, batch_size=ROWS, row_parts=PARTS)
    run = RunConfig(model=MODEL, data=data, mesh=MeshConfig(fsdp=1, context=PARTS))
    mesh = place_run(run, jax.devices()[:PARTS])
    assert not mesh.place.straddle
    params, batch = oracle.as_float64(random_params(MODEL, 3)), packed(row_parts)
    with jax.enable_x64(True):
        (loss, _, gradient), (expected, _, gradient_alone) = (
            compiled(on)(params, batch) for on in (mesh, DeviceMesh.alone())
        )
    pairs = zip(jax.tree.leaves((loss, gradient)), jax.tree.leaves((expected, gradient_alone)), strict=True)
    return max(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)) for ours, theirs in pairs)


def test_rows_packed_in_parts_need_no_fetch() -> None:
    assert largest_error(PARTS) < 1e-10


def test_other_rows_would_be_seen_to_need_one() -> None:
    assert largest_error(1) > 1e-3


def test_parts_begin_with_a_document_or_go_on_with_one_that_began_at_an_edge() -> None:
    """So the rows above have documents longer than a part, and padding before an edge."""
    batch, part = packed(PARTS), LENGTH // PARTS
    edges = batch["positions"][:, part::part]
    assert (edges % part == 0).all() and (edges > 0).any()
    assert (batch["segment_ids"][:, :-1] == 0).any()
    assert (packed(1)["positions"][:, part::part] % part).any()
