"""Batches of prepared data with every kind of file, against a slow derivation from the files themselves."""

import dataclasses
import json

import numpy as np
import pytest

from data.config import DataConfig, MediaSpec
from data.inspect import inspect_data, inspect_rows, render
from data.packing import balanced
from data.pipeline import Dataset, build_dataset
from data.prepare import Options, prepare
from data.tokenizer import BEGIN_OF_TEXT, PAD, load_file
from sharding.errors import UserError
from tests.data import mixed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    mixed.write(folder)
    mixed.prepared(folder)
    return folder


@pytest.fixture(scope="module")
def config(folder) -> DataConfig:
    return DataConfig(
        mixture={"mine": 1.0},
        paths={"mine": str(folder / "prepared")},
        tokenizer=str(folder / "prepared"),
        sequence_length=256,
        tiles_per_row=12,
        windows_per_row=8,
        video_fps=2.0,
        video_frames=3,
        batch_size=2,
        workers=0,
        cache_dir=str(folder / "cache"),
    )


@pytest.fixture(scope="module")
def records(folder) -> dict[str, dict]:
    return {r["id"]: r for r in map(json.loads, (folder / "mixed.jsonl").read_text().splitlines())}


def slow_batch(dataset: Dataset, folder, records, n: int) -> dict[str, np.ndarray]:
    """The batch, document by document."""
    B, S = dataset.config.batch_size, dataset.config.sequence_length
    spec = mixed.MEDIA
    assert spec.image and spec.audio
    empty = dataset.tokenizer.special[PAD]
    zeros = ("targets", "segment_ids", "positions", "source_ids")
    batch: dict[str, np.ndarray] = {name: np.zeros((B, S), np.int32) for name in zeros}
    batch |= {"tokens": np.full((B, S), empty, np.int32), "loss_weights": np.zeros((B, S), np.float32)}
    batch["image_tiles"] = np.zeros((B, 12, 16, 16, 3), np.uint8)
    batch["image_positions"] = np.full((B, 12, 2), -1, np.int32)
    batch["audio_frames"] = np.full((B, 8, 32, 8), -1.5, np.float32)
    batch["audio_positions"] = np.full((B, 8, 4), -1, np.int32)
    for b, row in enumerate(dataset.placed(n)):
        tile = window = 0
        for segment, placed in enumerate(row, start=1):
            document = mixed.slow_document(records[placed.id], folder, dataset.tokenizer)
            assert len(document["tokens"]) == placed.length
            for i, (token, weight) in enumerate(zip(document["tokens"], document["weights"], strict=True)):
                at = placed.start + i
                batch["tokens"][b, at], batch["segment_ids"][b, at] = token, segment
                batch["positions"][b, at], batch["source_ids"][b, at] = i, 1
                if i and weight:
                    batch["targets"][b, at - 1], batch["loss_weights"][b, at - 1] = token, weight
            for piece, places in document["tiles"]:
                batch["image_tiles"][b, tile] = piece
                batch["image_positions"][b, tile] = [placed.start + p for p in places]
                tile += 1
            for frames, places in document["windows"]:
                batch["audio_frames"][b, window] = frames
                batch["audio_positions"][b, window] = [placed.start + p if p >= 0 else -1 for p in places]
                window += 1
    return batch


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_batch_is_what_a_slow_derivation_gives(folder, config, records, split):
    dataset = build_dataset(config, mixed.MEDIA, split)
    seen = set()
    for n in range(40):
        batch, slow = dataset.batch(n), slow_batch(dataset, folder, records, n)
        assert batch.keys() == slow.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], slow[name], err_msg=name)
        seen |= {placed.id for row in dataset.placed(n) for placed in row}
    assert {records[i]["split"] for i in seen} == {split}
    assert seen == {i for i, record in records.items() if record["split"] == split}


def test_after_an_interruption_batches_are_the_same(config):
    dataset = build_dataset(config, mixed.MEDIA, "train")
    kept = json.loads(json.dumps(dataset.plain_position(dataset.where(6))))
    again = build_dataset(config, mixed.MEDIA, "train", position=kept)
    for n in (6, 7, 30, 2):
        expected = dataset.batch(n)
        for name, array in again.batch(n).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_rows_are_ordered_by_what_their_tokens_tiles_and_windows_cost(config):
    dataset = build_dataset(dataclasses.replace(config, batch_size=8), mixed.MEDIA, "train")
    for n in range(6):
        batch, rows, costs = dataset.batch(n), list(map(str, dataset.rows(n))), {}
        for b, row in enumerate(rows):
            lengths = np.bincount(batch["segment_ids"][b])[1:]
            tiles, windows = (batch[f"{name}_positions"][b, :, 0] >= 0 for name in ("image", "audio"))
            costs[row] = float((lengths**2).sum() / 256**2 + tiles.sum() / 12 + windows.sum() / 8)
        packed = [str(dataset._packing.row(n * 8 + b)) for b in range(8)]
        assert [packed[i] for i in balanced([costs[row] for row in packed])] == rows


@pytest.mark.parametrize(("length", "tiles", "windows"), [(60, 12, 8), (256, 4, 8), (256, 12, 3), (40, 5, 4)])
def test_pieces_put_together_are_the_document_and_no_file_is_cut(folder, config, records, length, tiles, windows):
    small = dataclasses.replace(config, sequence_length=length, tiles_per_row=tiles, windows_per_row=windows)
    dataset = build_dataset(small, mixed.MEDIA, "train")
    [source] = dataset._sources
    assert (source.sizes <= (length, tiles, windows)).all()
    assert (source.sizes.max(axis=0) == (length, tiles, windows)).any()
    begin, by_id = dataset.tokenizer.special[BEGIN_OF_TEXT], {}
    for item in range(len(source)):
        by_id.setdefault(source.record(item).id, []).append(item)
    assert any(len(items) > 1 for items in by_id.values())
    for name, items in by_id.items():
        whole = mixed.slow_document(records[name], folder, dataset.tokenizer)
        tokens, weights, cut, heard, places = [], [], [], [], []
        for k, piece in enumerate(source.read(items)):
            assert piece.tokens_S[0] == begin
            again = int(k > 0)
            if piece.window_places_A is not None and piece.windows_A is not None:
                moved = len(tokens) - again
                places += np.where(piece.window_places_A >= 0, piece.window_places_A + moved, -1).tolist()
                heard += list(piece.windows_A)
            tokens += piece.tokens_S[again:].tolist()
            weights += piece.weights_S[again:].tolist()
            cut += [] if piece.tiles_M is None else list(piece.tiles_M)
        assert tokens == whole["tokens"] and weights == whole["weights"]
        np.testing.assert_array_equal(np.array(cut), np.array([piece for piece, _ in whole["tiles"]]))
        np.testing.assert_array_equal(np.array(heard), np.array([frames for frames, _ in whole["windows"]]))
        assert places == [place for _, place in whole["windows"]]
    unfit = {i for i, record in records.items() if record["split"] == "train"} - by_id.keys()
    for name in unfit:  # one of its files alone is too large
        whole = mixed.slow_document(records[name], folder, dataset.tokenizer)
        assert len(whole["tiles"]) > tiles or len(whole["windows"]) > windows or len(whole["tokens"]) > length
    [note] = dataset.notes
    assert f"; {len(unfit)} were dropped" in note if unfit else "were dropped" not in note


def test_inspect_counts_the_tokens_of_each_modality(folder, config, records):
    facts = inspect_rows(folder / "prepared", config, mixed.MEDIA)
    tokenizer = load_file(folder / "prepared")
    slow = [mixed.slow_document(record, folder, tokenizer) for record in records.values()]
    assert sum(facts["tokens"].values()) == sum(len(document["tokens"]) for document in slow)
    assert facts["tiles"] == sum(len(document["tiles"]) for document in slow)
    assert facts["windows of sound"] == sum(len(document["windows"]) for document in slow)
    assert facts["tokens"].keys() == {"text", "image", "video", "audio"}
    assert "tokens" in render(inspect_data(folder / "prepared") | {"rows": facts}, "title")


def test_long_documents_are_split_cut_off_or_dropped(config):
    found = {}
    for policy in ("split", "truncate", "drop"):
        changed = dataclasses.replace(config, sequence_length=60, long_documents=policy)
        [source] = build_dataset(changed, mixed.MEDIA, "train")._sources
        found[policy] = source
    firsts = found["split"].starts == 0
    assert np.array_equal(found["truncate"].documents, found["split"].documents[firsts])
    assert np.array_equal(found["truncate"].stops, found["split"].stops[firsts])
    counts = np.bincount(found["split"].documents)
    assert set(found["drop"].documents) == {d for d in found["truncate"].documents if counts[d] == 1} - {
        d for d in found["truncate"].documents if not whole(found["truncate"], d)
    }


def whole(source, document: int) -> bool:
    return bool(source.stops[source.documents == document][0] == source.sizes[source.documents == document][0, 0]) and (
        source.starts[source.documents == document][0] == 0
    )


@pytest.mark.parametrize(
    ("change", "spec", "message"),
    [
        ({}, dataclasses.replace(mixed.MEDIA, audio=None), r"data\.paths\.mine: has sounds, and model\.audio is None"),
        (
            {},
            dataclasses.replace(mixed.MEDIA, image=None),
            r"data\.paths\.mine: has image files, and model\.vision is None",
        ),
        ({"tokenizer": "bytes"}, mixed.MEDIA, r"data\.tokenizer: found bytes.* Set data\.tokenizer=.*prepared\."),
        ({"tokenizer": "bpe"}, mixed.MEDIA, r"data\.tokenizer: found bpe"),
        ({"paths": {"mine": "/nowhere"}}, mixed.MEDIA, r"data\.paths\.mine: /nowhere: found no dataset\.json"),
    ],
)
def test_what_cannot_be_is_refused(config, change, spec, message):
    with pytest.raises(UserError, match=message):
        build_dataset(dataclasses.replace(config, **change), spec, "train")


def test_data_of_another_tokenizer_are_refused(folder, config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n{"text": "other text"}\n')
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", Options("bpe", tokenizer_size=280), 1, lambda told: None)
    other = dataclasses.replace(config, paths={"mine": str(tmp_path / "out")})
    with pytest.raises(
        UserError, match=r"data\.tokenizer: found .*prepared/tokenizer\.json, but data\.paths\.mine was"
    ):
        build_dataset(other, mixed.MEDIA, "train")


def test_a_shard_of_other_data_is_noticed(folder, config, tmp_path):
    mixed.write(tmp_path, 41)
    out = mixed.prepared(tmp_path)
    changed = dataclasses.replace(config, paths={"mine": str(out)}, cache_dir=str(tmp_path / "cache"))
    dataset = build_dataset(changed, mixed.MEDIA, "train")
    dataset.batch(0)
    shard = next((folder / "prepared" / "shards").iterdir())
    (out / "shards" / shard.name).unlink()
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(60)))
    prepare([tmp_path / "b.jsonl"], tmp_path / "b", Options("bytes"), 1, lambda told: None)
    (tmp_path / "b" / "shards" / shard.name).rename(out / "shards" / shard.name)
    with pytest.raises(UserError, match=r"The shards are not those of the index"):
        build_dataset(changed, mixed.MEDIA, "train").batch(0)


def test_text_alone_has_no_arrays_of_files(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(20)))
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", Options("bytes", held_out=0), 1, lambda told: None)
    config = DataConfig(
        mixture={"a": 1.0}, paths={"a": str(tmp_path / "out")}, tokenizer=str(tmp_path / "out"), sequence_length=32,
        cache_dir=str(tmp_path / "cache"), workers=0,
    )  # fmt: skip
    batch = build_dataset(config, MediaSpec(), "train").batch(0)
    assert not [name for name in batch if name.startswith(("image_", "audio_"))]
