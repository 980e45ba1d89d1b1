"""What the encoders of pictures and of sound share: biased projections, pre-norm blocks, and no work for unused slots.

Letters: M items (tiles or windows of sound), P tokens of an item, W encoder width, N heads, H head width.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import AudioConfig, ModelConfig, VisionConfig
from model.layers import LayerNorm, at_least_float32, constant, matrix, scan_stacked

NORM_EPS = 1e-5
"""Fixed in every release of Llama 4: its encoder does not read the decoder's epsilon. Sound keeps to the same."""

Turn = Callable[[jax.Array], jax.Array]
"""What positions do to queries and keys [M,P,N,H]."""


class Projection(nnx.Module):
    """A linear map, with bias unless told otherwise."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        dims: str,
        config: ModelConfig,
        rngs: nnx.Rngs,
        bias: bool = True,
    ):
        self.kernel = matrix(rngs, (*inputs, *outputs), dims, math.prod(inputs), config)
        self.bias = constant(outputs, 0.0, config.param_dtype) if bias else None

    def __call__(self, x: jax.Array, equation: str) -> jax.Array:
        y = jnp.einsum(equation, x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class EncoderBlock(nnx.Module):
    """Pre-norm transformer block with biases, attention in both directions inside an item, exact GELU."""

    def __init__(self, config: ModelConfig, sizes: VisionConfig | AudioConfig, name: str, rngs: nnx.Rngs):
        """`name` begins the names of the dims: `vision` or `audio`.

        Where positions do not turn keys, theirs has no bias: it would add one number to all scores of a query, which
        softmax does not see, and learn from rounding errors.
        """
        W, N, F = sizes.hidden_size, sizes.num_heads, sizes.ffn_size
        width, heads, ffn = (f"{name}_{dim}" for dim in ("width", "heads", "ffn"))
        self.attn_norm = LayerNorm(W, NORM_EPS, config.param_dtype)
        self.q, self.k, self.v = (
            Projection((W,), (N, W // N), f"{width} {heads} head", config, rngs, bias)
            for bias in (True, isinstance(sizes, VisionConfig), True)
        )
        self.o = Projection((N, W // N), (W,), f"{heads} head {width}", config, rngs)
        self.ffn_norm = LayerNorm(W, NORM_EPS, config.param_dtype)
        self.fc1 = Projection((W,), (F,), f"{width} {ffn}", config, rngs)
        self.fc2 = Projection((F,), (W,), f"{ffn} {width}", config, rngs)

    def __call__(self, x_MPW: jax.Array, turn: Turn | None, seen_MP: jax.Array | None) -> jax.Array:
        """`seen_MP`: the tokens that others attend to; None for all. An item without any gives finite nonsense."""
        normed = self.attn_norm(x_MPW)
        q, k, v = (project(normed, "mpw,wnh->mpnh") for project in (self.q, self.k, self.v))
        q, k = (q, k) if turn is None else (turn(q), turn(k))
        scores = at_least_float32(jnp.einsum("mpnh,mqnh->mnpq", q * q.shape[-1] ** -0.5, k))
        if seen_MP is not None:
            scores = jnp.where(seen_MP[:, None, None], scores, jnp.finfo(scores.dtype).min)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(x_MPW.dtype)
        x_MPW = x_MPW + self.o(jnp.einsum("mnpq,mqnh->mpnh", probabilities, v), "mpnh,nhw->mpw")
        hidden = jax.nn.gelu(self.fc1(self.ffn_norm(x_MPW), "mpw,wf->mpf"), approximate=False)
        return x_MPW + self.fc2(hidden, "mpf,fw->mpw")


def stacked_blocks(config: ModelConfig, sizes: VisionConfig | AudioConfig, name: str, rngs: nnx.Rngs) -> EncoderBlock:
    """All blocks of an encoder, their weights stacked."""

    @nnx.split_rngs(splits=sizes.num_layers)
    @nnx.vmap
    def stacked(rngs: nnx.Rngs) -> EncoderBlock:
        return EncoderBlock(config, sizes, name, rngs)

    return stacked(rngs)


def through(
    blocks: EncoderBlock,
    x_MPW: jax.Array,
    config: ModelConfig,
    turn: Turn | None = None,
    seen_MP: jax.Array | None = None,
) -> jax.Array:
    """What comes out of the stacked blocks; the backward pass computes each again where `config.remat` asks for any."""
    graph, weights = nnx.split(blocks)

    def block(x_MPW, weights):
        return nnx.merge(graph, weights)(x_MPW, turn, seen_MP), None

    if config.remat != "none":
        block = jax.checkpoint(block)
    return scan_stacked(block, x_MPW, weights)[0]


def encode_used(
    encode: Callable[..., jax.Array], weights: nnx.State, items: tuple[jax.Array, ...], used_M: jax.Array, block: int
) -> jax.Array:
    """`encode(weights, *items)` [M, P, W] of the used items, zeros for the others.

    `items` are arrays [M, ...], which `encode` gets `block` at a time, used ones first; a block in which nothing is used
    is not computed.
    """
    M = used_M.shape[0]
    block = min(block, M)
    blocks = -(-M // block)
    order = jnp.argsort(~used_M, stable=True)
    padded = jnp.concatenate([order, jnp.zeros(blocks * block - M, order.dtype)])
    count = jnp.sum(used_M)
    features = jax.eval_shape(encode, weights, *(array[:block] for array in items))

    def skip(weights, *items):
        return jnp.zeros(features.shape, features.dtype)

    def one_block(_, i):
        slots = jax.lax.dynamic_slice_in_dim(padded, i * block, block)
        return None, jax.lax.cond(i * block < count, encode, skip, weights, *(array[slots] for array in items))

    _, found = jax.lax.scan(one_block, None, jnp.arange(blocks))
    found = found.reshape(blocks * block, *features.shape[1:])[jnp.argsort(order)]
    return jnp.where(used_M[:, None, None], found, 0)
