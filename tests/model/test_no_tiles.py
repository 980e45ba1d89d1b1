"""A model with eyes on rows that have no room for tiles: those of a run of text alone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.transformer import Transformer
from tests import micro
from trainer.sections import resolve


def test_rows_without_room_for_tiles_are_rows_without_images():
    config = resolve(micro.get_config(), {}, "the test").model
    assert config.vision
    side, P = config.vision.image_size, config.vision.tokens_per_tile
    B, S = 2, 16
    tokens = jax.random.randint(jax.random.key(0), (B, S), 0, config.vocab_size)
    positions = jnp.tile(jnp.arange(S), (B, 1))
    text = {"tokens": tokens, "positions": positions, "segment_ids": jnp.ones((B, S), jnp.int32)}
    no_tiles = {
        "image_tiles": jnp.zeros((B, 0, side, side, 3), jnp.uint8),
        "image_positions": jnp.zeros((B, 0, P), jnp.int32),
    }
    model = Transformer(config, nnx.Rngs(0))
    np.testing.assert_array_equal(model(text | no_tiles).hidden_BSD, model(text).hidden_BSD)
