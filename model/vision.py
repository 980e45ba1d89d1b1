"""The vision encoder: tiles -> patches -> ViT -> pixel shuffle -> adapter, one tile at a time as far as attention goes.

Letters: M tiles of a block, P patches per tile (P+1 with the class token), W encoder width, N heads, H head width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.config import ModelConfig, VisionConfig
from model.layers import (
    LayerNorm,
    at_least_float32,
    constant,
    matrix,
    normal,
    rope_frequencies,
    rotate_pairs,
    scan_stacked,
)

NORM_EPS = 1e-5
"""Fixed in every release of Llama 4: the encoder does not read the decoder's epsilon."""


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


class Projection(nnx.Module):
    """A linear map with bias."""

    def __init__(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], dims: str, config: ModelConfig, rngs: nnx.Rngs
    ):
        self.kernel = matrix(rngs, (*inputs, *outputs), dims, math.prod(inputs), config)
        self.bias = constant(outputs, 0.0, config.param_dtype)

    def __call__(self, x: jax.Array, equation: str) -> jax.Array:
        return jnp.einsum(equation, x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)


class VisionBlock(nnx.Module):
    """Pre-norm transformer block with biases, full attention inside a tile, exact GELU."""

    def __init__(self, config: ModelConfig, vision: VisionConfig, rngs: nnx.Rngs):
        W, N, F = vision.hidden_size, vision.num_heads, vision.ffn_size
        self.attn_norm = LayerNorm(W, NORM_EPS, config.param_dtype)
        self.q, self.k, self.v = (
            Projection((W,), (N, W // N), "vision_width vision_heads head", config, rngs) for _ in range(3)
        )
        self.o = Projection((N, W // N), (W,), "vision_heads head vision_width", config, rngs)
        self.ffn_norm = LayerNorm(W, NORM_EPS, config.param_dtype)
        self.fc1 = Projection((W,), (F,), "vision_width vision_ffn", config, rngs)
        self.fc2 = Projection((F,), (W,), "vision_ffn vision_width", config, rngs)

    def __call__(self, x_MPW: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        normed = self.attn_norm(x_MPW)
        q, k, v = (project(normed, "mpw,wnh->mpnh") for project in (self.q, self.k, self.v))
        q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
        scores = jnp.einsum("mpnh,mqnh->mnpq", q * q.shape[-1] ** -0.5, k)
        probabilities = jax.nn.softmax(at_least_float32(scores), axis=-1).astype(x_MPW.dtype)
        x_MPW = x_MPW + self.o(jnp.einsum("mnpq,mqnh->mpnh", probabilities, v), "mpnh,nhw->mpw")
        hidden = jax.nn.gelu(self.fc1(self.ffn_norm(x_MPW), "mpw,wf->mpf"), approximate=False)
        return x_MPW + self.fc2(hidden, "mpf,fw->mpw")


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
        W, std, dtype = vision.hidden_size, vision.hidden_size**-0.5, config.param_dtype
        positions, pixels = vision.patches_per_side**2 + 1, 3 * vision.patch_size**2
        self.patch_embed = matrix(rngs, (pixels, W), "- vision_width", pixels, config)
        self.class_embed = normal(rngs, (W,), "-", std, dtype)
        self.pos_embed = normal(rngs, (positions, W), "- vision_width", std, dtype)
        self.pre_norm = LayerNorm(W, NORM_EPS, dtype)
        self.post_norm = LayerNorm(W, NORM_EPS, dtype)

        @nnx.split_rngs(splits=vision.num_layers)
        @nnx.vmap
        def stacked_blocks(rngs: nnx.Rngs) -> VisionBlock:
            return VisionBlock(config, vision, rngs)

        self.blocks = stacked_blocks(rngs)
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
        graph, weights = nnx.split(self.blocks)

        def block(x, weights):
            return nnx.merge(graph, weights)(x, cos, sin), None

        if self.config.remat != "none":
            block = jax.checkpoint(block)
        encoded, _ = scan_stacked(block, x, weights)
        patches = self.post_norm(encoded)[:, :-1]
        features = self.adapter(pixel_shuffle(patches, self.vision.shuffle))
        return features, {"encoder_out": encoded, "adapter_out": features}


def encode_used_tiles(vision: Vision, tiles: jax.Array, used: jax.Array) -> jax.Array:
    """Features of the used tiles, zeros for the others; blocks that hold no used tile are not computed.

    `tiles` [M, side, side, 3], `used` [M] -> [M, tokens per tile, adapter width].
    """
    M, block = tiles.shape[0], min(vision.vision.tiles_per_block, tiles.shape[0])
    blocks = -(-M // block)
    order = jnp.argsort(~used, stable=True)
    padded = jnp.concatenate([order, jnp.zeros(blocks * block - M, order.dtype)])
    count = jnp.sum(used)
    graph, weights = nnx.split(vision)
    shape = (block, vision.vision.tokens_per_tile, vision.vision.adapter_size)

    def encode(weights, tiles):
        return nnx.merge(graph, weights)(tiles)[0]

    def skip(weights, tiles):
        return jnp.zeros(shape, vision.config.dtype)

    def one_block(_, i):
        slots = jax.lax.dynamic_slice_in_dim(padded, i * block, block)
        return None, jax.lax.cond(i * block < count, encode, skip, weights, tiles[slots])

    _, features = jax.lax.scan(one_block, None, jnp.arange(blocks))
    features = features.reshape(blocks * block, *shape[1:])[jnp.argsort(order)]
    return jnp.where(used[:, None, None], features, 0)
