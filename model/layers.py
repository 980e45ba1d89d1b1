"""Small parts that the decoder and the vision encoder share: weights, norms, rotary embeddings.

Letters: B rows, S sequence, D width, H head width (see `model/__init__.py`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.config import ModelConfig, RopeScaling


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, or in its own precision where that is higher (a float64 test stays float64 throughout)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pick(stacked: jax.Array, index: jax.Array) -> jax.Array:
    """`stacked[index]`, of which only that is read.

    XLA's CPU backend computes bfloat16 in float32. Without the barrier it would convert before it indexes, and outside
    of the loops around that: all of the weights, for every token that is decoded.
    """
    if stacked.dtype.itemsize < 4:
        stacked, index = jax.lax.optimization_barrier((stacked, index))
    return stacked[index]


def scan_stacked(body: Callable[..., Any], start: Any, stacked: Any, unroll: int = 1) -> Any:
    """`lax.scan` of `body(carry, layer)` over layers whose arrays are stacked along their first dim."""
    leaves = jax.tree.leaves(stacked)
    if all(leaf.dtype.itemsize >= 4 for leaf in leaves):
        return jax.lax.scan(body, start, stacked, unroll=unroll)

    def picked(carry: Any, i: jax.Array) -> Any:
        return body(carry, jax.tree.map(lambda leaf: pick(leaf, i), stacked))

    return jax.lax.scan(picked, start, jnp.arange(len(leaves[0])), unroll=unroll)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dims: str, std: float, dtype: str, **notes: Any) -> nnx.Param:
    """A weight drawn from N(0, std^2).

    `dims` names its dims, separated by spaces, for `sharding.rules` to split them over devices ("-": never split); the
    weight's metadata has them, and the `notes`.
    """
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.dtype(dtype)), dims=tuple(dims.split()), **notes)


def matrix(
    rngs: nnx.Rngs, shape: tuple[int, ...], dims: str, inputs: int, config: ModelConfig, exact: bool = False
) -> nnx.Param:
    """A weight that sums over `inputs` values, those of its first dims but for stacked experts, with the standard deviation
    that the config asks for; see `normal`. `exact`: used in its own precision, whatever that of the computation.
    """
    std = config.init_std or inputs**-0.5
    return normal(rngs, shape, dims, std, config.param_dtype, exact=exact, inputs=inputs)


def table(rngs: nnx.Rngs, shape: tuple[int, ...], dims: str, config: ModelConfig) -> nnx.Param:
    """Embeddings, of tokens or positions, with the standard deviation that the config asks for; see `normal`."""
    return normal(rngs, shape, dims, config.init_std or 1.0, config.param_dtype)


def constant(shape: tuple[int, ...], value: float, dtype: str) -> nnx.Param:
    """A weight that starts at `value`; a vector, which no mesh splits."""
    return nnx.Param(jnp.full(shape, value, jnp.dtype(dtype)), dims=())


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last dim, statistics in at least float32, result in the dtype of `x`."""
    wide = at_least_float32(x)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: nnx.Param, eps: float) -> jax.Array:
    """RMSNorm (arXiv 1910.07467): the cast to the input's dtype comes before the product with `scale`."""
    return rms_normalize(x, eps) * scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias over the last dim, statistics in at least float32."""

    def __init__(self, size: int, eps: float, dtype: str):
        self.eps = eps
        self.scale = constant((size,), 1.0, dtype)
        self.bias = constant((size,), 0.0, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = at_least_float32(x)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal_x = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normal_x * self.scale[...] + self.bias[...]).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angle per position of each of the head_dim/2 pairs, float64, shape [H/2].

    `scaling` stretches long wavelengths as Llama 3 does. Scout has low_freq_factor == high_freq_factor: the band in
    between is then empty, and its width, zero, must not be divided by.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_length / wavelengths - low) / (high - low if high > low else 1.0)
    middle = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = np.where(wavelengths > scaling.original_length / low, frequencies / scaling.factor, middle)
    return np.where(wavelengths < scaling.original_length / high, frequencies, scaled)


def rotate_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the interleaved pairs (x[2j], x[2j+1]) of the last dim by the given angles, in at least float32.

    `cos` and `sin` are [..., H/2] and broadcast against the pairs of `x`. Llama 4 interleaves; the half-split layout of
    other Llama implementations would need permuted weights.
    """
    pairs = at_least_float32(x).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def text_rope(positions_BS: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles, each [B, S, 1, H/2] (one for all heads), in at least float32."""
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    frequencies = jnp.asarray(rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling), dtype)
    angles = positions_BS[..., None, None].astype(dtype) * frequencies
    return jnp.cos(angles), jnp.sin(angles)
