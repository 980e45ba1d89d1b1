"""What would go wrong on a mesh, done on purpose: the comparison with one device sees each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import transformer
from model.moe import RouterStats
from sharding import experts, stage
from sharding.config import AXES
from sharding.mesh import DeviceMesh
from sharding.place import Place
from tests.sharding.sameness import CASES, alone_losses, compare

EVERYTHING, TIED = CASES
Patch = pytest.MonkeyPatch


def gradients_not_summed(patch: Patch) -> None:
    patch.setattr(Place, "summed", lambda self, gradient: gradient)


def balance_of_own_rows(patch: Patch) -> None:
    original = Place.total
    patch.setattr(Place, "total", lambda self, tree: tree if isinstance(tree, RouterStats) else original(self, tree))


def later_rounds_lost(patch: Patch) -> None:
    patch.setattr(experts, "_further_rounds", lambda exchange, rows, *_: jnp.zeros_like(rows))


def loss_counted_by_every_copy(patch: Patch) -> None:
    patch.setattr(Place, "copies", 1)


def vocabulary_from_the_first_token(patch: Patch) -> None:
    original = Place.first
    patch.setattr(Place, "first", lambda self, axis, size: 0 if axis == "tensor" else original(self, axis, size))


def rows_not_arranged(patch: Patch) -> None:
    patch.setattr(DeviceMesh, "row_order", lambda self, rows, parts: np.arange(rows))


def chunks_cut_at_the_edge(patch: Patch) -> None:
    original = DeviceMesh.of.__func__
    patch.setattr(DeviceMesh, "of", classmethod(lambda cls, *given: original(cls, *given, straddle=False)))


def images_at_their_place_in_the_row(patch: Patch) -> None:
    patch.setattr(transformer, "here", lambda batch, medium, place: batch[f"{medium}_positions"])


def sound_heard_in_shares(patch: Patch) -> None:
    original = transformer.Transformer.encode_audio

    def encode_audio(self: transformer.Transformer, batch: transformer.Batch) -> jax.Array:
        positions, local = batch["audio_positions"], transformer.here(batch, "audio", self.place)
        return original(self, {**batch, "audio_positions": jnp.where(local < 0, -1, positions)})

    patch.setattr(transformer.Transformer, "encode_audio", encode_audio)


def capacity_of_each_share(patch: Patch) -> None:
    patch.setattr(Place, "before", lambda self, counts: jnp.zeros_like(counts))


def documents_of_another_micro_batch(patch: Patch) -> None:
    original = stage.micro_batches
    patch.setattr(stage, "micro_batches", lambda place, rows: jnp.roll(original(place, rows), 1, axis=0))


def repeats_not_dealt(patch: Patch) -> None:
    patch.setattr(stage, "dealt", lambda place, repeats: repeats)


MUTATIONS: tuple[tuple[Callable[[Patch], None], str, dict[str, int]], ...] = (
    (gradients_not_summed, TIED, {"data": 8}),
    (balance_of_own_rows, TIED, {"fsdp": 8}),
    (loss_counted_by_every_copy, TIED, {"fsdp": 4, "tensor": 2}),
    (vocabulary_from_the_first_token, TIED, {"fsdp": 4, "tensor": 2}),
    (rows_not_arranged, EVERYTHING, {"fsdp": 8}),
    (later_rounds_lost, EVERYTHING, {"expert": 8}),
    (chunks_cut_at_the_edge, TIED, {"context": 8}),
    (images_at_their_place_in_the_row, EVERYTHING, {"context": 8}),
    (sound_heard_in_shares, EVERYTHING, {"context": 8}),
    (capacity_of_each_share, TIED, {"context": 8}),
    (documents_of_another_micro_batch, TIED, {"stage": 2, "fsdp": 4}),
    (repeats_not_dealt, EVERYTHING, {"stage": 2, "fsdp": 4}),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutation", "case", "sizes"), MUTATIONS, ids=[mutation.__name__ for mutation, *_ in MUTATIONS]
)
def test_a_mistake_is_seen(mutation: Any, case: str, sizes: dict[str, int], monkeypatch: Patch) -> None:
    mesh = dict.fromkeys(AXES, 1) | sizes
    with jax.enable_x64(True):
        alone_losses(case)  # before anything is broken
    mutation(monkeypatch)
    good, line = compare(case, mesh, only_float64=True)
    assert not good, line
