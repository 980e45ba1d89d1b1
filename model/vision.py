"""The vision encoder: tiles -> patches -> ViT -> pixel shuffle -> adapter, one tile at a time as far as attention goes.

Letters: M tiles of a block, P patches per tile (P+1 with the class token), W encoder width, N heads, H head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.config import ModelConfig, VisionConfig
from model.encoder import NORM_EPS, encode_used, stacked_blocks, through
from model.layers import LayerNorm, matrix, rope_frequencies, rotate_pairs, table


def normalize_tiles(tiles: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """uint8 tiles to -1..1; tiles that are already floating point are taken as they are."""
    if tiles.dtype == jnp.uint8:
        return (tiles.astype(jnp.promote_types(dtype, jnp.float32)) / 127.5 - 1).astype(dtype)
    return tiles.astype(dtype)


def patchify(tiles: jax.Array, patch: int) -> jax.Array:
    """[M, side, side, 3] -> [M, P, 3 x patch x patch]: a row-major grid, each patch flattened channel first."""
    M, side, _, channels = tiles.shape
    n = side // patch
    grid = tiles.reshape(M, n, patch, n, patch, channels)
    return grid.transpose(0, 1, 3, 5, 2, 4).reshape(M, n * n, channels * patch * patch)


def vision_rope(config: VisionConfig, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin, [P+1, 1, H/2]: the first half of the pairs turns by the column, the second by the row.

    Both count from one; the class token, which comes last, is not turned.
    """
    n, head_dim = config.patches_per_side, config.hidden_size // config.num_heads
    frequencies = rope_frequencies(head_dim // 2, config.rope_theta, None)
    rows, columns = np.divmod(np.arange(n * n), n)
    angles = np.concatenate([np.outer(columns + 1, frequencies), np.outer(rows + 1, frequencies)], axis=1)
    angles = np.concatenate([angles, np.zeros((1, angles.shape[1]))])[:, None]
    return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


def pixel_shuffle(x: jax.Array, ratio: int) -> jax.Array:
    """[M, P, W] -> [M, P/ratio^2, W x ratio^2]: a square of neighbours becomes one token, row-major inside and out."""
    M, P, W = x.shape
    n = round(P**0.5)
    grid = x.reshape(M, n // ratio, ratio, n // ratio, ratio, W)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(M, P // ratio**2, W * ratio**2)


class Adapter(nnx.Module):
    """gelu(fc2(gelu(fc1(x)))), no biases."""

    def __init__(self, config: ModelConfig, vision: VisionConfig, rngs: nnx.Rngs):
        inputs, size = vision.hidden_size * vision.shuffle**2, vision.adapter_size
        self.fc1 = matrix(rngs, (inputs, size), "- adapter", inputs, config)
        self.fc2 = matrix(rngs, (size, size), "- adapter", size, config)

    def __call__(self, x: jax.Array) -> jax.Array:
        for weight in (self.fc1, self.fc2):
            x = jax.nn.gelu(x @ weight[...].astype(x.dtype), approximate=False)
        return x


class Vision(nnx.Module):
    """Encoder and adapter: tiles -> features for the projector."""

    def __init__(self, config: ModelConfig, vision: VisionConfig, rngs: nnx.Rngs):
        self.config, self.vision = config, vision
        W, dtype = vision.hidden_size, config.param_dtype
        positions, pixels = vision.patches_per_side**2 + 1, 3 * vision.patch_size**2
        self.patch_embed = matrix(rngs, (pixels, W), "- vision_width", pixels, config)
        self.class_embed = table(rngs, (W,), "-", config)
        self.pos_embed = table(rngs, (positions, W), "- vision_width", config)
        self.pre_norm = LayerNorm(W, NORM_EPS, dtype)
        self.post_norm = LayerNorm(W, NORM_EPS, dtype)
        self.blocks = stacked_blocks(config, vision, "vision", rngs)
        self.adapter = Adapter(config, vision, rngs)

    def __call__(self, tiles: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """tiles [M, side, side, 3] (uint8, or already normalised) -> features [M, tokens per tile, adapter width].

        Also returns the stages that tests compare: the encoder's output with the class token last, before the final
        norm, and the adapter's.
        """
        dtype = jnp.dtype(self.config.dtype)
        x = patchify(normalize_tiles(tiles, dtype), self.vision.patch_size) @ self.patch_embed[...].astype(dtype)
        class_token = jnp.broadcast_to(self.class_embed[...].astype(dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([x, class_token], axis=1) + self.pos_embed[...].astype(dtype)
        x = self.pre_norm(x)
        cos, sin = vision_rope(self.vision, jnp.promote_types(dtype, jnp.float32))
        encoded = through(self.blocks, x, self.config, lambda heads: rotate_pairs(heads, cos, sin))
        patches = self.post_norm(encoded)[:, :-1]
        features = self.adapter(pixel_shuffle(patches, self.vision.shuffle))
        return features, {"encoder_out": encoded, "adapter_out": features}


def encode_used_tiles(vision: Vision, tiles: jax.Array, used: jax.Array) -> jax.Array:
    """Features of the used tiles, zeros for the others; blocks that hold no used tile are not computed.

    `tiles` [M, side, side, 3], `used` [M] -> [M, tokens per tile, adapter width].
    """
    graph, weights = nnx.split(vision)

    def encode(weights, tiles):
        return nnx.merge(graph, weights)(tiles)[0]

    return encode_used(encode, weights, (tiles,), used, vision.vision.tiles_per_block)
