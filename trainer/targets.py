"""A teacher's targets beside the batches: the keys of its draws, and what it has said before.

Letters: B rows, S sequence, K ids of a sparse target.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.pipeline import Batch
from data.target_cache import Header, TargetCache
from data.target_digests import Segment, segment_digests, token_keys
from sharding.errors import UserError
from trainer.config import DistillConfig, RunConfig
from trainer.distillation import KEYS, CachedTargets
from trainer.teacher import identity


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
    )


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

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the arrays of `CachedTargets`."""
        B, S = batch["tokens"].shape
        segments = segment_digests(batch, self._segment_recipe)
        arrays = empty_targets(B, S, self._slots)
        found = self._cache.get([segment.digest for segment in segments])
        for (row, start, stop, _), targets in zip(segments, found, strict=True):
            if targets is None:
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

    @property
    def counts(self) -> Mapping[str, int]:
        """Segments found, missing and damaged so far."""
        return self._cache.counts

    def close(self) -> None:
        self._cache.close()
