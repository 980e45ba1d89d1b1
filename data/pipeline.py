"""Batches: packed rows by number, made ahead of the step by grain."""

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection, parent_process, resource_tracker
from typing import Any, NamedTuple, Self

import numpy as np

from data import cache
from data.audio import SILENCE
from data.config import DataConfig, MediaSpec
from data.mixture import Change, Schedule
from data.packing import Packing, balanced, row_cost
from data.positions import Position, Positions
from data.prepare import Told
from data.sources import Document, cache_folder, load_sources, load_tokenizer
from data.tokenizer import PAD, PATCH
from sharding.errors import UserError

_FORMAT = 3
"""Of the order of rows: another one makes other batches of the same data."""

Batch = dict[str, np.ndarray]

WHERE = "where"
"""In what `Batches` give, beside the arrays of the batch: `Dataset.where` of it."""


class Placed(NamedTuple):
    """Where a document, or a piece of one, stands in a row."""

    source: str
    id: str
    where: str
    """File and line, row or member that it was prepared from."""
    start: int
    length: int


class Dataset:
    """Batch n of one split, for any n, as a pure function of (data, seed, config, n).

    Attributes:
        tokenizer: the tokenizer, trained on the training split.
        source_names: sources with a weight above zero; `source_ids` counts them from 1.
        digest: names the options that decide batches, the mixture aside, which may change in a run.
        digests: name the content of each source.
        notes: what is missing from the data or out of the ordinary, one line for the user each; most often none.
    """

    def __init__(
        self,
        config: DataConfig,
        media: MediaSpec,
        held_out: bool,
        journal: Sequence[Change] = (),
        position: Mapping[str, Any] | None = None,
        tell: Callable[[Told], None] = lambda told: None,
    ):
        self.config, self.media = config, media
        self._again = (config, media, held_out, journal, position)
        self.tokenizer = load_tokenizer(config, media, journal)
        schedule = Schedule.of(config, journal)
        self.source_names = schedule.names
        self._sources = load_sources(config, media, held_out, self.tokenizer, schedule.names, tell)
        self._numbers = [i for i, source in enumerate(self._sources) if len(source)]
        self._check(held_out)
        kept = [self._sources[i] for i in self._numbers]

        def shares(row: int) -> list[float]:
            of_all = schedule.most if held_out else schedule.shares(row // config.batch_size)
            return [of_all[i] for i in self._numbers]

        def caps(row: int) -> list[float]:
            return [schedule.caps(row // config.batch_size)[i] for i in self._numbers]

        self.digests = {source.name: source.data.facts["digest"] for source in self._sources}
        self.digest = _digest(config, media, self.tokenizer.digest)
        self._names = [source.name for source in kept]
        order = (self.digest, self.digests, schedule.changes, held_out)
        file = cache_folder(config) / cache.name("positions", *order)
        given = Position.from_plain(position, self._names) if position else None
        self._room = (config.sequence_length, config.tiles_per_row, config.windows_per_row)
        self._packing = Packing(
            {source.name: source.sizes for source in kept},
            shares,
            self._room,
            config.window,
            config.seed,
            config.row_parts,
            None if held_out else caps,
            Positions(len(kept), file, given),
        )
        self.notes = tuple(note for source in self._sources for note in source.notes) + tuple(
            f"{source.name}: has no held-out documents" for source in self._sources if held_out and not len(source)
        )

    def _check(self, held_out: bool) -> None:
        """Refuses sources without a document that fits; some may have none held out."""
        empty = [source for source in self._sources if not len(source)]
        if empty and (not held_out or not self._numbers):
            split = "held-out" if held_out else "training"
            raise UserError(
                f"data.mixture.{empty[0].name}: {empty[0].data.folder} has no {split} document that fits a row. Raise "
                "data.sequence_length, data.tiles_per_row or data.windows_per_row, or prepare it with another --held-out."
            )

    def __reduce__(self):
        return Dataset, self._again

    def rows(self, n: int) -> list[list[tuple[int, int, int]]]:
        """The documents in each row of batch n, as (source, item, where it begins).

        Rows are in an order in which equal shares of the batch cost about the same.
        """
        B = self.config.batch_size
        packed = [self._packing.row(n * B + row) for row in range(B)]
        rows = [[(self._numbers[source], item, at) for source, item, at in row] for row in packed]
        return [rows[i] for i in balanced(list(map(self._cost, rows)))]

    def _cost(self, row: list[tuple[int, int, int]]) -> float:
        return row_cost((self._sources[source].sizes[item].tolist() for source, item, _ in row), self._room)

    def repeated(self, stop: int) -> Iterator[list[np.ndarray]]:
        """For each of the batches 0 to stop - 1 and each of its rows: bool, which of its segments stood in a batch or a row
        before. Nothing is read; of documents of the same words, and with images or clips where `augment` is on, each counts as
        another.
        """
        met = [np.zeros(len(source), bool) for source in self._sources]
        for n in range(stop):
            batch = []
            for row in self.rows(n):
                repeated = []
                for source, item, _ in row:
                    of = self._sources[source]
                    repeated.append(met[source][item])
                    met[source][item] = not (of.augment and of.sizes[item, 1])
                batch.append(np.array(repeated, bool))
            yield batch

    def position(self, n: int) -> Position:
        """From which rows of batch n and later ones are found at once."""
        return self._packing.position(n * self.config.batch_size)

    def where(self, n: int) -> np.ndarray:
        """float64, for `plain_position` and `epochs`: where in the data batch n begins."""
        taken = self._packing.taken(n * self.config.batch_size)
        epochs = [taken[i] / len(self._sources[number]) for i, number in enumerate(self._numbers)]
        return np.concatenate([self.position(n).as_array(), epochs])

    def plain_position(self, where: np.ndarray) -> dict[str, Any]:
        """For a checkpoint: from this `position`, another dataset finds the batch and later ones at once."""
        return Position.from_array(where[: -len(self._names)]).plain(self._names)

    def epochs(self, where: np.ndarray) -> dict[str, float]:
        """How often each source has been gone through."""
        return dict(zip(self._names, where[-len(self._names) :].tolist(), strict=True))

    def batch(self, n: int, rows: Sequence[int] | None = None) -> Batch:
        """Batch n, or these rows of it, in this order.

        Returns:
            tokens, targets, segment_ids, positions, source_ids: int32 [B, S]; loss_weights: float32 [B, S]. A target
            is the next token of the same segment, 0 where its weight is 0. Segments count from 1, positions from 0 in
            each segment, sources from 1; all are 0 at padding.
            image_tiles: uint8 [B, M, t, t, 3] and image_positions: int32 [B, M, P], the index in the row of each
            tile's patch tokens; 0 and -1 in unused slots. Absent without an image encoder.
            audio_frames: float32 [B, A, f, m] and audio_positions: int32 [B, A, P], the index in the row of each
            window's tokens; that of silence and -1 in unused slots. Absent without an audio encoder.
        """
        rows = range(self.config.batch_size) if rows is None else rows
        batch = empty_batch(self.config, self.media, len(rows))
        batch["tokens"][:] = self.tokenizer.special[PAD]
        all_rows = self.rows(n)
        packed = [all_rows[row] for row in rows]
        documents = self._read(packed, [(self.config.seed, n, row) for row in rows])
        for b, placed in enumerate(packed):
            self._fill_row({name: array[b] for name, array in batch.items()}, placed, documents[b])
        return batch

    def placed(self, n: int) -> list[list[Placed]]:
        """For each row of batch n, what stands in it, in order."""
        rows = []
        for row in self.rows(n):
            found = []
            for source, item, start in row:
                of = self._sources[source]
                record = of.record(item)
                found.append(Placed(of.name, record.id, record.where, start, int(of.sizes[item, 0])))
            rows.append(found)
        return rows

    def _read(self, rows: list[list[tuple[int, int, int]]], keys: list[tuple[int, ...]]) -> list[list[Document]]:
        """The documents of these rows; those of a source are read together."""
        documents: list[list[Any]] = [[None] * len(row) for row in rows]
        for i, source in enumerate(self._sources):
            places = [(b, k) for b, row in enumerate(rows) for k, (of, _, _) in enumerate(row) if of == i]
            items = [rows[b][k][1] for b, k in places]
            for (b, k), document in zip(places, source.read(items, [(*keys[b], k) for b, k in places]), strict=True):
                documents[b][k] = document
        return documents

    def batches(self, start: int, stop: int, rows: Sequence[int] | None = None) -> "Batches":
        """Batches start to stop - 1 in order, or these rows of each, made ahead by worker processes (or threads).

        Use it in a `with`.
        """
        return Batches(self, start, stop, rows)

    def target_bytes(self, batch: Batch, source: str = "text") -> np.ndarray:
        """Bytes of UTF-8 that each weighted target of a source stands for, int32 [B, S]; the end of a text counts none."""
        of_source = batch["source_ids"] == self.source_names.index(source) + 1
        counted = of_source & (batch["loss_weights"] > 0)
        return np.where(counted, self.tokenizer.byte_lengths[batch["targets"]], 0).astype(np.int32)

    def _fill_row(self, row: Batch, placed: list[tuple[int, int, int]], documents: list[Document]) -> None:
        tile = window = 0
        for segment, ((source, _, at), document) in enumerate(zip(placed, documents, strict=True), start=1):
            length = len(document.tokens_S)
            span = slice(at, at + length)
            row["tokens"][span] = document.tokens_S
            row["segment_ids"][span] = segment
            row["positions"][span] = np.arange(length)
            row["source_ids"][span] = source + 1
            weights_S = document.weights_S[1:]
            row["loss_weights"][at : at + length - 1] = weights_S
            row["targets"][at : at + length - 1] = np.where(weights_S > 0, document.tokens_S[1:], 0)
            if document.tiles_M is not None:
                slots = slice(tile, tile + len(document.tiles_M))
                patches = np.flatnonzero(document.tokens_S == self.tokenizer.special[PATCH]) + at
                row["image_tiles"][slots] = document.tiles_M
                row["image_positions"][slots] = patches.reshape(len(document.tiles_M), -1)
                tile = slots.stop
            if document.windows_A is not None and document.window_places_A is not None:
                slots = slice(window, window + len(document.windows_A))
                places = document.window_places_A
                row["audio_frames"][slots] = document.windows_A
                row["audio_positions"][slots] = np.where(places >= 0, places + at, -1)
                window = slots.stop


def empty_batch(config: DataConfig, media: MediaSpec, rows: int) -> Batch:
    """The arrays of a batch of so many rows, with nothing in them; see `Dataset.batch`."""
    B, S = rows, config.sequence_length
    batch: Batch = {
        "tokens": np.zeros((B, S), np.int32),
        "targets": np.zeros((B, S), np.int32),
        "loss_weights": np.zeros((B, S), np.float32),
        "segment_ids": np.zeros((B, S), np.int32),
        "positions": np.zeros((B, S), np.int32),
        "source_ids": np.zeros((B, S), np.int32),
    }
    if image := media.image:
        M, t = config.tiles_per_row, image.tile_size
        batch["image_tiles"] = np.zeros((B, M, t, t, 3), np.uint8)
        batch["image_positions"] = np.full((B, M, image.tokens_per_tile), -1, np.int32)
    if sound := media.audio:
        A = config.windows_per_row
        batch["audio_frames"] = np.full((B, A, sound.frames_per_window, sound.mel_bins), SILENCE, np.float32)
        batch["audio_positions"] = np.full((B, A, sound.tokens_per_window), -1, np.int32)
    return batch


def build_dataset(config: DataConfig, media: MediaSpec, split: str, **options: Any) -> Dataset:
    """The data of a split, "train" or "heldout".

    Args:
        config: which data, and how they are packed.
        media: what files become.
        split: which documents.
        options: `journal`, the changes of the mixture so far, of which the config's options are the last; `position`, one
            of an earlier batch, from which later ones are found at once; `tell`, which hears how far built-in data are
            that have to be prepared first.

    Raises:
        UserError: the options cannot be met, or the cache cannot be written.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'heldout'")
    return Dataset(config, media, split == "heldout", **options)


class Batches:
    """An iterator over batches that owns worker processes: close it, or use it in a `with`."""

    def __init__(self, dataset: Dataset, start: int, stop: int, rows: Sequence[int] | None = None):
        import grain  # it imports jax, and takes a second
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain reads its options there, and fails if nobody has parsed them
            flags.FLAGS.mark_as_parsed()
        config = dataset.config
        self._next, self._stop = start, stop
        numbered = grain.MapDataset.source(_Numbered(dataset, stop, rows)).slice(slice(start, stop))
        if config.workers == 0:
            iterable = numbered.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch))
        else:
            iterable = numbered.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).mp_prefetch(
                grain.multiprocessing.MultiprocessingOptions(
                    num_workers=config.workers, per_worker_buffer_size=config.prefetch
                ),
                worker_init_fn=_start_worker,
            )
        self._iterator: Any = iter(iterable)
        with _signals_blocked():
            self._iterator.get_state()  # makes the iterator of each worker, which start_prefetch alone would not
            self._iterator.start_prefetch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None or self._next >= self._stop:
            raise StopIteration
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                error.add_note(f"while making batch {self._next}")
                raise
            raise UserError(
                f"data.workers: a process that makes batches ended by itself ({error}). If memory or "
                "/dev/shm ran out, lower data.workers or data.prefetch; data.workers=0 needs neither."
            ) from error
        except UserError:
            raise
        except Exception as error:
            error.add_note(f"while making batch {self._next}")
            raise
        self._next += 1
        copied = {name: np.array(array) for name, array in batch.items()}  # out of memory shared with the worker
        batch.clear()  # grain holds on to the dict of the last batch; this lets go of its memory
        return copied

    def close(self) -> None:
        """Ends the worker processes. Nothing more can be asked for."""
        self._stop = self._next
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
            _free_shared_memory()


def _free_shared_memory() -> None:
    """Waits until grain has freed what nobody uses; Python complains at exit of what is left.

    Grain frees on a thread of its own, one block after the other, so a call that runs there comes after all of them.
    """
    import grain

    freeing = getattr(grain.multiprocessing.SharedMemoryArray, "_del_thread_pool", None)
    if freeing is not None:
        freeing.apply(int)


class _Numbered:
    """The dataset as grain's random-access source."""

    def __init__(self, dataset: Dataset, stop: int, rows: Sequence[int] | None):
        self._dataset, self._stop, self._rows = dataset, stop, rows

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, index: int) -> Batch:
        if _trainer_gone.is_set():
            os._exit(1)
        return self._dataset.batch(index, self._rows) | {WHERE: self._dataset.where(index)}


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C or SIGTERM, which go to all processes: the trainer ends its own."""
    resource_tracker.ensure_running()  # where it is started by the first process, it unblocks both signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_index: int, _count: int) -> None:
    """Runs first in each worker process."""
    if "jax" in sys.modules:  # grain imports it; should anything in it look for a device, the trainer has them all
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_trainer, daemon=True).start()


_trainer_gone = threading.Event()


def _end_with_trainer() -> None:
    """Ends a worker whose trainer was killed.

    Best before the next batch: a process that ends while it makes a block of shared memory leaves it behind for ever.
    The wait is for one that stands still because nobody takes its batches.
    """
    trainer = parent_process()
    if trainer is not None:
        connection.wait([trainer.sentinel])
        _trainer_gone.set()
        time.sleep(2)
        os._exit(1)


def _digest(config: DataConfig, media: MediaSpec, tokenizer_digest: str) -> str:
    """Over every option that decides what batches are made of, but for the mixture, which may change; not the sources."""
    options = (
        _FORMAT,
        config.sequence_length,
        config.batch_size,
        config.tiles_per_row,
        config.windows_per_row,
        config.window,
        config.seed,
        config.row_parts,
        config.long_documents,
        config.augment,
        media,
    )
    return hashlib.sha256(repr((options, tokenizer_digest)).encode()).hexdigest()
