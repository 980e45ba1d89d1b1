"""A digest is of what a model is fed of a segment and of nothing else; keys differ where their inputs do."""

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.target_digests import segment_digests, token_keys

RECIPE = b"tiles of 4"
P, A = 3, 2
Batch = dict[str, np.ndarray]


def segment(rng: np.random.Generator, images: int, sounds: int) -> dict[str, Any]:
    """Tokens, targets, tiles and windows, with the places of their tokens in the segment."""
    n = int(rng.integers(2, 6)) + (P + 1) * images + (A + 1) * sounds
    starts = np.cumsum([1, *[P + 1] * images, *[A + 1] * sounds])
    return {
        "tokens": rng.integers(0, 9, n),
        "targets": rng.integers(0, 9, n),
        "image": [(starts[i] + np.arange(P), rng.integers(0, 256, (4, 4, 3))) for i in range(images)],
        # The last token of a window is not used.
        "audio": [
            (np.append(starts[images + i] + np.arange(A - 1), -1), rng.random((5, 2), np.float32))
            for i in range(sounds)
        ],
    }


def packed(rng: np.random.Generator, rows: list[list[dict[str, Any]]], media: bool = True, slack: int = 4) -> Batch:
    """Rows of segments with gaps of padding, numbers and slots at random."""
    gaps = [rng.integers(0, slack + 1, len(row) + 1) for row in rows]
    S = max(int(gap.sum()) + sum(len(s["tokens"]) for s in row) for row, gap in zip(rows, gaps, strict=True))
    M = max(sum(len(s["image"]) for s in row) for row in rows) + slack
    W = max(sum(len(s["audio"]) for s in row) for row in rows) + slack
    B = len(rows)
    batch: Batch = {
        "tokens": rng.integers(0, 9, (B, S)).astype(np.int32),  # whatever stands at padding
        "targets": rng.integers(0, 9, (B, S)).astype(np.int32),
        "segment_ids": np.zeros((B, S), np.int32),
        "loss_weights": rng.random((B, S), np.float32),
    }
    if media:
        batch |= {
            "image_positions": np.full((B, M, P), -1, np.int32),
            "image_tiles": rng.integers(0, 256, (B, M, 4, 4, 3)).astype(np.uint8),
            "audio_positions": np.full((B, W, A), -1, np.int32),
            "audio_frames": rng.random((B, W, 5, 2), np.float32),
        }
    for b, (row, gap) in enumerate(zip(rows, gaps, strict=True)):
        numbers, slots = rng.permutation(len(row)) + 1, {"image": rng.permutation(M), "audio": rng.permutation(W)}
        at, used = 0, {"image": 0, "audio": 0}
        for s, before, number in zip(row, gap, numbers, strict=False):
            at += before
            span = slice(at, at + len(s["tokens"]))
            batch["tokens"][b, span], batch["targets"][b, span] = s["tokens"], s["targets"]
            batch["segment_ids"][b, span] = number
            for medium, contents in (("image", "image_tiles"), ("audio", "audio_frames")):
                for places, content in s[medium]:
                    slot = slots[medium][used[medium]]
                    used[medium] += 1
                    batch[f"{medium}_positions"][b, slot] = np.where(places >= 0, places + at, -1)
                    batch[contents][b, slot] = content
            at = span.stop
    return batch


def digest_of(batch: Batch, recipe: bytes = RECIPE) -> bytes:
    [found] = segment_digests(batch, recipe)
    return found.digest


@given(st.integers(0, 2**32), st.integers(1, 3))
@settings(max_examples=60)
def test_place_neighbours_padding_batch_and_slots_do_not_matter(seed: int, num_rows: int) -> None:
    rng = np.random.default_rng(seed)
    segments = [segment(rng, int(rng.integers(3)), int(rng.integers(3))) for _ in range(5)]
    alone = [digest_of(packed(rng, [[s]], slack=1)) for s in segments]
    order = rng.permutation(5)
    rows = [[segments[i] for i in part] for part in np.array_split(order, num_rows)]
    batch = packed(rng, rows)
    found = segment_digests(batch, RECIPE)
    assert [s.digest for s in found] == [alone[i] for i in order]
    expected = [(b, s["tokens"]) for b, row in enumerate(rows) for s in row]
    for (row, start, stop, _), (b, tokens) in zip(found, expected, strict=True):
        assert row == b and batch["tokens"][row, start:stop].tolist() == tokens.tolist()
        ids = batch["segment_ids"][row]
        assert len(set(ids[start:stop].tolist())) == 1 and (stop == len(ids) or ids[stop] != ids[start])


def test_a_text_has_one_digest_whether_or_not_others_have_images() -> None:
    rng = np.random.default_rng(0)
    text, picture = segment(rng, 0, 0), segment(rng, 1, 0)
    beside = segment_digests(packed(rng, [[text, picture]]), RECIPE)
    assert beside[0].digest == digest_of(packed(rng, [[text]], media=False))
    wide = packed(rng, [[text]], media=False)
    assert digest_of({name: array.astype(np.int64) for name, array in wide.items() if name != "loss_weights"}) == (
        beside[0].digest
    )


@given(st.integers(0, 2**32))
@settings(max_examples=10)
def test_whatever_else_changes_the_digest_changes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one = segment(rng, 2, 2)
    batch = packed(np.random.default_rng(1), [[one]])
    start = segment_digests(batch, RECIPE)[0].start
    seen = {digest_of(batch), digest_of(batch, b"tiles of 5"), digest_of(batch, b"")}
    changes = 0

    def changed(name: str, index: Any, value: Any) -> None:
        nonlocal changes
        other = batch | {name: batch[name].copy()}
        other[name][index] = value
        seen.add(digest_of(other))
        changes += 1

    n = len(one["tokens"])
    for name in ("tokens", "targets"):
        for at in range(start, start + n):
            changed(name, (0, at), batch[name][0, at] + 1)
    changed("segment_ids", (0, start), 0)  # shorter at one end, at the other
    changed("segment_ids", (0, start + n - 1), 0)
    for medium, contents in (("image", "image_tiles"), ("audio", "audio_frames")):
        name = f"{medium}_positions"
        slots = np.flatnonzero(np.any(batch[name] >= 0, axis=2)[0])
        for slot in slots:
            index = (0, slot, *(int(rng.integers(size)) for size in batch[contents].shape[2:]))
            changed(contents, index, 255 - batch[contents][index])
            changed(name, (0, slot), np.where(batch[name][0, slot] >= 0, batch[name][0, slot] + 1, -1))
            changed(name, (0, slot), -1)
            if medium == "image":  # of a window one token is used, and it would be without any again
                changed(name, (0, slot, 0), -1)
        changed(contents, (0, slots), batch[contents][0, slots[::-1]])  # two pictures that change places
    assert len(seen) == 3 + changes


def test_a_digest_is_what_the_page_on_the_format_says() -> None:
    tokens, targets = [5, 9, 9, 9, 7, 7, 2], [0, 0, 0, 7, 0, 2, 0]
    tile, window = np.arange(48, dtype=np.uint8).reshape(4, 4, 3), np.linspace(0, 1, 10, dtype=np.float32).reshape(5, 2)
    batch = {
        "tokens": np.array([[1, 1, *tokens]]),
        "targets": np.array([[1, 1, *targets]]),
        "segment_ids": np.array([[0, 0, *[3] * 7]]),
        "image_positions": np.array([[[-1, -1, -1], [3, 4, 5]]]),
        "image_tiles": np.array([[tile * 0, tile]]),
        "audio_positions": np.array([[[6, 7, -1]]]),
        "audio_frames": np.array([[window]]),
    }
    written = struct.pack("<QQ", len(RECIPE), 7) + RECIPE + struct.pack("<14i", *tokens, *targets)
    written += b"image_tiles 1;" + struct.pack("<4Q3i", 3, 4, 4, 3, 1, 2, 3) + bytes(range(48))
    written += b"audio_frames 1;" + struct.pack("<3Q3i", 3, 5, 2, 4, 5, -1) + struct.pack("<10f", *window.ravel())
    assert digest_of(batch) == hashlib.blake2b(written, digest_size=16, person=b"segment").digest()


def test_tokens_and_targets_and_media_are_told_apart() -> None:
    base: Batch = {"segment_ids": np.ones((1, 2), int)}
    one = digest_of(base | {"tokens": np.array([[1, 2]]), "targets": np.array([[3, 4]])})
    other = digest_of(base | {"tokens": np.array([[3, 4]]), "targets": np.array([[1, 2]])})
    assert one != other
    assert digest_of(base | {"tokens": np.array([[1, 2]]), "targets": np.array([[3, 4]])}, b"") != one


def test_a_batch_that_cannot_be_cut_into_segments_is_refused() -> None:
    rng = np.random.default_rng(2)
    batch = packed(rng, [[segment(rng, 1, 0), segment(rng, 1, 1)]], slack=2)
    pieces = batch["segment_ids"].copy()
    pieces[0, np.flatnonzero(pieces[0])[[0, -1]]] = 7
    with pytest.raises(ValueError, match="segment 7 of row 0 is in several pieces"):
        segment_digests(batch | {"segment_ids": pieces}, RECIPE)
    found = segment_digests(batch, RECIPE)
    slot = int(np.flatnonzero((batch["image_positions"][0] >= 0).any(axis=1))[0])
    for place, message in (
        ([found[0].stop - 1, found[1].start, -1], f"slot {slot} of row 0 is not within one segment"),
        ([found[0].start, batch["tokens"].shape[1], -1], "expected places below"),
    ):
        wrong = batch["image_positions"].copy()
        wrong[0, slot] = place
        with pytest.raises(ValueError, match=message):
            segment_digests(batch | {"image_positions": wrong}, RECIPE)
    padding = np.where(batch["segment_ids"] == batch["segment_ids"][0, found[0].start], 0, batch["segment_ids"])
    with pytest.raises(ValueError, match="is not within one segment"):
        segment_digests(batch | {"segment_ids": padding}, RECIPE)
    with pytest.raises(ValueError, match="depth_positions: is of no medium"):
        segment_digests(batch | {"depth_positions": batch["image_positions"]}, RECIPE)
    with pytest.raises(TypeError):
        segment_digests(batch | {"image_tiles": batch["image_tiles"] / 255}, RECIPE)


def test_the_batches_of_the_pipeline_are_cut_into_their_documents(scenes_only) -> None:
    seen: dict[bytes, list[int]] = {}
    for n in range(8):
        batch = scenes_only.batch(n)
        found = segment_digests(batch, RECIPE)
        placed = [(b, p.start, p.start + p.length) for b, row in enumerate(scenes_only.placed(n)) for p in row]
        assert [s[:3] for s in found] == sorted(placed)
        for row, start, stop, digest in found:
            tokens = batch["tokens"][row, start:stop].tolist()
            assert seen.setdefault(digest, tokens) == tokens
        assert [s.digest for s in segment_digests(scenes_only.batch(n, [2, 0]), RECIPE)] == [
            s.digest for b in (2, 0) for s in found if s.row == b
        ]
    assert len(seen) > 1 and any(len(row) > 1 for n in range(8) for row in scenes_only.placed(n))


def slow_key(digest: bytes, offset: int, recipe: bytes) -> tuple[int, int]:
    words = hashlib.blake2b(recipe, digest_size=16, key=digest, person=b"token keys").digest()
    a, b = int.from_bytes(words[:8], "little"), int.from_bytes(words[8:], "little")

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    word = mix(mix((a + offset * 0x9E3779B97F4A7C15) % 2**64) ^ b)
    return word % 2**32, word >> 32


def test_keys_are_those_of_the_formula() -> None:
    offsets = np.array([0, 1, 5, 2**31, 10**12])
    keys = token_keys(bytes(range(16)), offsets, b"recipe")
    assert keys.dtype == np.uint32 and keys.shape == (5, 2)
    assert [tuple(key) for key in keys.tolist()] == [slow_key(bytes(range(16)), int(o), b"recipe") for o in offsets]
    assert (token_keys(bytes(range(16)), offsets[::-1].astype(np.uint64), b"recipe") == keys[::-1]).all()
    assert token_keys(bytes(16), np.zeros(0, int), b"").shape == (0, 2)


def test_keys_differ_where_digest_offset_or_recipe_do() -> None:
    rng = np.random.default_rng(0)
    digests = [bytes(16), bytes(15) + b"\1", b"\1" + bytes(15), *(rng.bytes(16) for _ in range(17))]
    keys = [token_keys(d, np.arange(20_000), recipe) for d in digests for recipe in (b"", b"a", b"a\0")]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 20 * 3 * 20_000


def test_keys_are_as_even_as_random_bits() -> None:
    n = 30_000
    bits = np.unpackbits(token_keys(b"0123456789abcdef", np.arange(n), b"r").view(np.uint8), axis=1).astype(np.float64)
    sign = 2 * bits - 1
    bound = 5 * n**0.5
    assert (np.abs(sign.sum(axis=0)) < bound).all()
    between = sign.T @ sign  # of any two bits of a key
    assert (np.abs(between - np.diag(np.diag(between))) < bound).all()
    following = sign[1:].T @ sign[:-1]  # of keys of neighbours
    assert (np.abs(following) < bound).all()
