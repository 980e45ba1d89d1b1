"""Rows without room for tiles, as a run of text alone may have them."""

import dataclasses

import numpy as np

from data.pipeline import build_dataset


def test_text_needs_no_room_for_tiles(config, image, media):
    text = dataclasses.replace(config, mixture={"text": 1.0, "scenes": 0.0}, tokenizer="bytes")
    roomless = build_dataset(dataclasses.replace(text, tiles_per_row=0), media, "heldout").batch(0)
    B, t, P = config.batch_size, image.tile_size, image.tokens_per_tile
    assert roomless["image_tiles"].shape == (B, 0, t, t, 3)
    assert roomless["image_positions"].shape == (B, 0, P)
    np.testing.assert_array_equal(roomless["tokens"], build_dataset(text, media, "heldout").batch(0)["tokens"])
