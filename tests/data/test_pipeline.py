"""Batches against an obvious, slow derivation; the same batches through any number of workers."""

import dataclasses
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from data import text
from data.config import DataConfig, MediaSpec
from data.images import layout, tiles
from data.pipeline import WHERE, Dataset, build_dataset
from data.scene_text import document
from data.scenes import HELD_OUT_START, NOVEL, draw, make_scene
from data.sources import Document
from data.target_digests import segment_digests
from data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, IMAGE_TOKENS, PAD, PATCH
from sharding.errors import UserError


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def row_documents(dataset: Dataset, n: int) -> list[tuple[str, int, int]]:
    """(source, number, place) of each document in row n; batch b holds rows b * batch_size and on."""
    batch, row = divmod(n, dataset.config.batch_size)
    return [(dataset.source_names[source], number, start) for source, number, start in dataset.rows(batch)[row]]


def documents(dataset: Dataset, source: str, items: list[int]) -> list[Document]:
    return next(s for s in dataset._sources if s.name == source).read(items)


def slow_scene(dataset: Dataset, config, image, index: int):
    """Tokens, weights and tiles of a scene's document, one piece of text after the other."""
    tokenizer = dataset.tokenizer
    scene = make_scene(config.seed, index, image)
    canvas = (scene.height // image.tile_size, scene.width // image.tile_size)
    names = [BEGIN_OF_TEXT, *layout(canvas, image)]
    tokens, weights = [tokenizer.special[name] for name in names], [0.0] * len(names)
    for piece in document(scene, random.Random(f"text/{config.seed}/{index}")):
        ids = tokenizer.encode(piece.text)
        tokens += ids
        weights += [piece.weight] * len(ids)
    return (
        [*tokens, tokenizer.special[END_OF_TEXT]],
        [*weights, 1.0],
        tiles(draw(scene), image)[0],
    )


def pad_to(row: dict[str, list], length: int, dataset: Dataset) -> None:
    while len(row["tokens"]) < length:
        row["tokens"].append(dataset.tokenizer.special[PAD])
        for name in ("targets", "loss_weights", "segment_ids", "positions", "source_ids"):
            row[name].append(0)


def slow_batch(dataset: Dataset, config, image, n: int, first_scene: int):
    B, S, M = config.batch_size, config.sequence_length, config.tiles_per_row
    rows = []
    for b in range(B):
        row = {name: [] for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions", "source_ids")}
        row["image_tiles"], row["image_positions"] = [], []
        for segment, (source, number, start) in enumerate(row_documents(dataset, n * B + b), start=1):
            pad_to(row, start, dataset)
            if source == "scenes":
                tokens, weights, picture = slow_scene(dataset, config, image, first_scene + number)
                patches = [
                    i + len(row["tokens"]) for i, t in enumerate(tokens) if t == dataset.tokenizer.special[PATCH]
                ]
                row["image_tiles"] += list(picture)
                row["image_positions"] += np.array(patches).reshape(len(picture), -1).tolist()
            else:
                tokens = documents(dataset, "text", [number])[0].tokens_S.tolist()
                weights = [0.0] + [1.0] * (len(tokens) - 1)
            for i, token in enumerate(tokens):
                weight = weights[i + 1] if i + 1 < len(tokens) else 0.0
                row["tokens"].append(token)
                row["targets"].append(tokens[i + 1] if weight else 0)
                row["loss_weights"].append(weight)
                row["segment_ids"].append(segment)
                row["positions"].append(i)
                row["source_ids"].append(1 + sorted(config.mixture).index(source))
        pad_to(row, S, dataset)
        while len(row["image_tiles"]) < M:
            row["image_tiles"].append(np.zeros((image.tile_size, image.tile_size, 3)))
            row["image_positions"].append([-1] * image.tokens_per_tile)
        rows.append(row)
    kinds = {"loss_weights": np.float32, "image_tiles": np.uint8}
    return {name: np.array([row[name] for row in rows], kinds.get(name, np.int32)) for name in rows[0]}


@pytest.mark.parametrize("n", [0, 1, 17, 2000])
def test_a_batch_is_what_a_slow_derivation_gives(dataset, config, image, n):
    assert_equal(dataset.batch(n), slow_batch(dataset, config, image, n, 0))


def test_in_rows_of_parts_documents_begin_where_they_should(config, image, media):
    parts = dataclasses.replace(config, row_parts=2)
    dataset = build_dataset(parts, media, "train")
    batches = [dataset.batch(n) for n in range(4)]
    assert_equal(batches[3], slow_batch(dataset, parts, image, 3, 0))
    gaps = [ids[:, 127] == 0 for ids in (batch["segment_ids"] for batch in batches)]
    follow = [batch["segment_ids"][:, 128] > 0 for batch in batches]
    assert any((gap & after).any() for gap, after in zip(gaps, follow, strict=True))  # padding within a row


def test_held_out_batches_too(config, image, media):
    dataset = build_dataset(config, media, "heldout")
    assert_equal(dataset.batch(3), slow_batch(dataset, config, image, 3, HELD_OUT_START))


def test_image_positions_point_at_every_patch_token(dataset):
    for n in range(5):
        batch = dataset.batch(n)
        for b in range(len(batch["tokens"])):
            positions = batch["image_positions"][b]
            used = positions[positions >= 0]
            patches = np.flatnonzero(batch["tokens"][b] == dataset.tokenizer.special[PATCH])
            np.testing.assert_array_equal(used, patches)
            assert ((positions >= 0).all(axis=1) | (positions < 0).all(axis=1)).all()


def test_no_target_is_an_image_token_and_none_crosses_a_segment(dataset):
    special = [dataset.tokenizer.special[name] for name in (*IMAGE_TOKENS, BEGIN_OF_TEXT, PAD)]
    for n in range(5):
        batch = dataset.batch(n)
        weighted = batch["loss_weights"] > 0
        assert not np.isin(batch["targets"][weighted], special).any()
        assert (batch["targets"][~weighted] == 0).all()
        last = batch["segment_ids"] != np.roll(batch["segment_ids"], -1, axis=1)
        last[:, -1] = True
        assert (batch["loss_weights"][last] == 0).all()


def test_training_text_names_no_novel_combination(dataset):
    for n in range(40):
        decoded = dataset.tokenizer.decode(dataset.batch(n)["tokens"].ravel())
        assert not [pair for pair in NOVEL if " ".join(pair) in decoded]


def test_text_bytes_are_those_of_the_documents(dataset, config):
    """All of a document is predicted but its first token, which is no text."""
    total = 0
    for n in range(8):
        rows = [row_documents(dataset, n * config.batch_size + b) for b in range(config.batch_size)]
        found = documents(dataset, "text", [number for row in rows for source, number, _ in row if source == "text"])
        expected = sum(int(dataset.tokenizer.byte_lengths[document.tokens_S].sum()) for document in found)
        assert dataset.target_bytes(dataset.batch(n)).sum() == expected
        total += expected
    assert total > 0


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_whatever_the_workers_and_the_start(scenes_only, workers):
    config = dataclasses.replace(scenes_only.config, workers=workers, prefetch=2)
    position = scenes_only.plain_position(scenes_only.where(4))
    dataset = build_dataset(config, scenes_only.media, "train", position=position)
    with dataset.batches(5, 12) as batches:
        got = list(batches)
    assert len(got) == 7
    for n, batch in enumerate(got, start=5):
        assert_array_equal(batch.pop(WHERE), scenes_only.where(n))
        assert_equal(batch, scenes_only.batch(n))
        assert all(array.flags.owndata for array in batch.values())


def test_an_empty_range_gives_nothing(scenes_only):
    with scenes_only.batches(5, 5) as batches:
        assert list(batches) == []


def test_pickling_keeps_the_batches(dataset):
    assert_equal(pickle.loads(pickle.dumps(dataset)).batch(4), dataset.batch(4))


def test_the_digest_changes_with_what_the_batches_depend_on(scenes_only):
    config, media = scenes_only.config, scenes_only.media

    def digests(changed: DataConfig) -> str:
        dataset = build_dataset(changed, media, "train")
        return f"{dataset.digest} {dataset.digests}"

    others = [
        digests(dataclasses.replace(config, **change))
        for change in ({"seed": 1}, {"batch_size": 4}, {"window": 17}, {"scenes": 99}, {"sequence_length": 600})
    ]
    assert len({digests(config), *others}) == 6
    for same in ({"workers": 3, "prefetch": 9}, {"mixture": {"scenes": 3.0}}):
        assert digests(dataclasses.replace(config, **same)) == digests(config)


def test_notes_are_those_of_the_sources_and_survive_pickling(scenes_only, monkeypatch, tmp_path):
    assert scenes_only.notes == ()
    corpus = text.Corpus([text.TextFile("a", "long line\n"), text.TextFile("b", "b\n")], ("text: a note",))
    monkeypatch.setattr(text.TextFile, "held_out", property(lambda file: file.name == "b"))
    monkeypatch.setattr(text, "standard_library", lambda: corpus)
    config = DataConfig(
        mixture={"text": 0.5, "scenes": 0.5},
        tokenizer="bytes",
        sequence_length=512,
        tiles_per_row=5,
        scenes=20,
        workers=0,  # in this process, where the corpus is the one above
        cache_dir=str(tmp_path),
    )
    dataset = build_dataset(config, scenes_only.media, "train")
    assert pickle.loads(pickle.dumps(dataset)).notes == dataset.notes
    assert dataset.notes == ("text: a note",)


def test_text_alone_needs_no_images(config):
    only_text = dataclasses.replace(config, mixture={"text": 1.0}, tokenizer="bytes")
    batch = build_dataset(only_text, MediaSpec(), "heldout").batch(0)
    assert "image_tiles" not in batch
    assert set(np.unique(batch["source_ids"])) <= {0, 1}


def test_documents_that_do_not_fit_a_row_are_told(scenes_only):
    for change, words in (
        (
            {"sequence_length": 60},
            r"scenes: \d+ documents do not fit a row \(60 tokens, .*\) and were split into \d+ pieces",
        ),
        ({"sequence_length": 250, "long_documents": "drop"}, r"and were dropped \(\d+\) \(data\.long_documents\)"),
        ({"tiles_per_row": 2}, r"; \d+ were dropped, since one of their files alone does not fit"),
    ):
        dataset = build_dataset(dataclasses.replace(scenes_only.config, **change), scenes_only.media, "train")
        [note] = dataset.notes
        assert re.search(words, note), note


def test_a_row_that_no_document_fits_is_refused(scenes_only):
    config = dataclasses.replace(scenes_only.config, sequence_length=5)
    with pytest.raises(UserError, match=r"data\.mixture\.scenes: .* has no training document that fits a row"):
        build_dataset(config, scenes_only.media, "train")


def test_on_the_largest_canvas_every_scene_has_all_its_tiles(scenes_only):
    """One tile of picture becomes four and a global one; all else is as it was."""
    image = dataclasses.replace(scenes_only.media.image, resize_to_max_canvas=True)
    large = build_dataset(scenes_only.config, MediaSpec(image), "train")
    assert large.digest != scenes_only.digest
    everything = documents(large, "scenes", list(range(100)))
    for n in range(3):
        batch = large.batch(n)
        for b in range(len(batch["tokens"])):
            patches = np.flatnonzero(batch["tokens"][b] == large.tokenizer.special[PATCH])
            positions = batch["image_positions"][b]
            np.testing.assert_array_equal(positions[positions >= 0], patches)
            for segment in range(1, batch["segment_ids"][b].max() + 1):
                ids = batch["tokens"][b][batch["segment_ids"][b] == segment]
                index = next(i for i in range(100) if everything[i].tokens_S.tolist() == ids.tolist())
                picture = draw(make_scene(scenes_only.config.seed, index, image))
                cut, canvas = tiles(picture, image)
                assert len(cut) == 5 if picture.width == picture.height else 3
                expected = [large.tokenizer.special[name] for name in layout(canvas, image)]
                assert ids[1 : 1 + len(expected)].tolist() == expected
                at = np.flatnonzero(batch["segment_ids"][b] == segment)
                slots = [m for m in range(len(positions)) if positions[m, 0] in at]
                np.testing.assert_array_equal(batch["image_tiles"][b][slots], cut)


def test_scenes_without_an_image_encoder_are_refused(scenes_only):
    with pytest.raises(UserError, match=r"data\.mixture\.scenes"):
        build_dataset(scenes_only.config, MediaSpec(), "train")


def test_nothing_here_imports_jax_until_batches_are_iterated():
    code = "import sys, data.pipeline, data.questions; sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


@pytest.mark.parametrize("augment", [(), ("colour",)])
def test_segments_of_earlier_batches_are_told_without_reading(scenes_only, augment):
    """Against digests of all that was read. A picture whose colours change is never the same."""
    config = dataclasses.replace(scenes_only.config, scenes=20, augment=augment)
    dataset, met = build_dataset(config, scenes_only.media, "train"), set()
    for n, repeated in enumerate(dataset.repeated(12)):
        for segment, told in zip(segment_digests(dataset.batch(n), b""), np.concatenate(repeated), strict=True):
            assert told == (segment.digest in met and not augment)
            met.add(segment.digest)
    assert len(met) > 30 if augment else len(met) == 20
