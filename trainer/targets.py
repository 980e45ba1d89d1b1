"""A teacher's targets beside the batches: the keys of its draws, and what it has said before.

Letters: B rows, S sequence, K ids of a sparse target, O outcomes of a look-up.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.pipeline import Batch, empty_batch
from data.target_cache import Header, Lack, TargetCache
from data.target_digests import Segment, segment_digests, token_keys
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from trainer.config import DistillConfig, RunConfig
from trainer.distillation import KEYS, CachedTargets
from trainer.teacher import identity

OUTCOMES = ("found", *Lack)
"""What may come of it when a segment is looked up in a cache."""
OUTCOME = "soft_outcome"
"""Of a batch: at the first token of each segment 1 + the place in `OUTCOMES`, at others 0; int8 [B, S]."""
CUT = ("sequence_length", "tiles_per_row", "windows_per_row", "long_documents")
"""Options of the data that decide where documents too long for a row are cut."""


def header_of(run: RunConfig, distill: DistillConfig, tokenizer_digest: str, teacher: Mapping[str, Any]) -> Header:
    """Of the cache of this run's teacher."""
    return Header(
        teacher=teacher,
        tokenizer=tokenizer_digest,
        vocab_size=run.model.vocab_size,
        preprocessing=asdict(run.media),
        draws=distill.draws,
        top_k=distill.top_k,
        temperature=distill.temperature,
        proposal=distill.proposal,
        cut=cut_of(run),
    )


def teacher_digest(distill: DistillConfig, cached: "CachedSource | None") -> str | None:
    """Of the teacher that a run learns from, beside it or through a cache; None where a cache names none."""
    if cached:
        return cached.header.teacher.get("digest")
    return identity(Path(distill.teacher).expanduser())["digest"]


def cut_of(run: RunConfig) -> dict[str, Any]:
    return {name: getattr(run.data, name) for name in CUT}


def check_recipe(folder: Path, header: Header, distill: DistillConfig) -> None:
    """Refuses the cache in a folder if its targets were made in another way than the configuration says."""
    differing = [
        f"distill.{name}: found {getattr(header, name)}, expected {getattr(distill, name)}"
        for name in ("draws", "top_k", "temperature", "proposal")
        if getattr(header, name) != getattr(distill, name)
    ]
    if differing:
        raise UserError(
            f"{folder}/header.json: {'; '.join(differing)} as in the configuration. Make the options the same, or make "
            "another cache."
        )


def empty_targets(rows: int, length: int, slots: int) -> Batch:
    """The arrays of `CachedTargets` for rows [B, S] of which a teacher has said nothing; K slots for ids."""
    arrays = (
        np.full((rows, length, slots), -1, np.int32),
        np.zeros((rows, length, slots), np.float32),
        *np.zeros((2, rows, length), np.float32),
        np.zeros((rows, length), bool),
    )
    return dict(zip(CachedTargets._fields, arrays, strict=True))


def outcomes(outcome_BS: jax.Array) -> jax.Array:
    """How many of a batch's segments had each of `OUTCOMES`, int32 [O]."""
    return jnp.stack([jnp.sum(outcome_BS == 1 + i, dtype=jnp.int32) for i in range(len(OUTCOMES))])


def abstract_batch(run: RunConfig, mesh: DeviceMesh, asked: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of what a step of the run takes, targets of a teacher or their keys included.

    `asked`: of what a teacher on devices of its own takes.
    """
    distill, length = run.distill, run.data.sequence_length
    row = empty_batch(run.data, run.media, 1)
    if distill and distill.source != "mesh" and not asked:
        row |= empty_targets(1, length, distill.draws or distill.top_k)
        row |= {OUTCOME: np.zeros((1, length), np.int8)} if distill.source == "cache" else {}
    elif distill and distill.sparse:
        row = DrawKeys(header_of(run, distill, "", {}))(row)
    shardings = mesh.batch(row)
    return {
        name: jax.ShapeDtypeStruct((run.data.batch_size, *array.shape[1:]), array.dtype, sharding=shardings[name])
        for name, array in row.items()
    }


class DrawKeys:
    """Gives batches the random keys of their draws."""

    def __init__(self, header: Header):
        self._recipe, self._segment_recipe = header.recipe, header.segment_recipe

    def segments(self, batch: Batch) -> list[Segment]:
        """Where the segments of a batch stand, and their digests."""
        return segment_digests(batch, self._segment_recipe)

    def __call__(self, batch: Batch, segments: list[Segment] | None = None) -> Batch:
        """The batch with `KEYS`."""
        keys_BS2 = np.zeros((*batch["tokens"].shape, 2), np.uint32)
        for row, start, stop, digest in self.segments(batch) if segments is None else segments:
            keys_BS2[row, start:stop] = token_keys(digest, np.arange(stop - start), self._recipe)
        return batch | {KEYS: keys_BS2}


class CachedSource:
    """Gives batches what a teacher has said of their segments before."""

    def __init__(self, run: RunConfig, distill: DistillConfig, tokenizer_digest: str):
        """
        Raises:
            UserError: no cache, or one of other targets, tokens or data than those of this run, or of another teacher than
                `distill.teacher`, where that can be seen.
        """
        folder, teacher = Path(distill.cache).expanduser(), Path(distill.teacher).expanduser()
        here = bool(distill.teacher) and teacher.exists()
        self._cache = TargetCache(
            folder,
            distill.missing,
            tokenizer=tokenizer_digest,
            preprocessing=asdict(run.media),
            cut=cut_of(run),
            vocab_size=run.model.vocab_size,
            teacher=identity(teacher) if here else None,
        )
        self.header = self._cache.header
        check_recipe(folder, self.header, distill)
        self._slots, self._segment_recipe = distill.draws or distill.top_k, self.header.segment_recipe
        self._form = self.header.record_format
        self.origin = f"{folder}, of {self.header.teacher.get('name', 'an unknown teacher')}"
        if distill.teacher and not here:
            self.origin += f"; not compared with {distill.teacher}, which is not there"
        if self._cache.cut_otherwise:
            self.origin += f"; long documents are cut in other places ({self._cache.cut_otherwise}) and will be missing"

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the arrays of `CachedTargets`, and `OUTCOME`."""
        B, S = batch["tokens"].shape
        segments = segment_digests(batch, self._segment_recipe)
        arrays = empty_targets(B, S, self._slots) | {OUTCOME: np.zeros((B, S), np.int8)}
        found = self._cache.get([segment.digest for segment in segments])
        for (row, start, stop, _), targets in zip(segments, found, strict=True):
            arrays[OUTCOME][row, start] = 1 + OUTCOMES.index(targets if isinstance(targets, Lack) else "found")
            if isinstance(targets, Lack):
                continue
            here = row, slice(start, stop)
            used = targets.rows(np.ones(len(targets.ids), bool), self._slots)
            shares = targets.counts / max(self._form.draws, 1) if targets.weights is None else targets.weights
            arrays["soft_ids"][here] = np.where(used, targets.rows(targets.ids, self._slots), -1)
            arrays["soft_weights"][here] = targets.rows(shares.astype(np.float32), self._slots)
            arrays["soft_log_prob"][here] = targets.target_log_prob
            arrays["soft_entropy"][here] = targets.entropy
            arrays["soft_correct"][here] = targets.correct
        return batch | arrays

    @property
    def facts(self) -> Mapping[str, float]:
        """For the report: tokens of the cache, bytes of each, and what it took to make them."""
        held, cost = self._cache.progress, self._cache.cost
        return {
            "tokens": held.tokens,
            "bytes_per_token": held.bytes_per_token,
            "device_seconds": cost.device_seconds,
            "tokens_of_known_cost": cost.tokens,
        }

    def take_notes(self) -> list[str]:
        """The first of the segments that this process found missing or damaged since the last call, a line each."""
        return self._cache.take_notes()

    def close(self) -> None:
        self._cache.close()
