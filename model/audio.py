"""The audio encoder: log-mel frames -> strided convolutions -> transformer -> features, one window at a time.

It is ours, not Meta's: Llama 4 was released without ears. Convolutions, GELU, added positions, pre-norm blocks and a last
norm are those of Whisper's encoder (arXiv 2212.04356), with two differences: windows are short, so that a clip costs what
it is long, and a convolution does not look past its stride. So token p is made of frames up to the last one of its own,
8 p + 7, and what stands behind the last used token (silence, which fills up a clip's last window) reaches no used one.

Letters: M windows, L frames of a window, I inputs of a convolution, P tokens of a window, W encoder width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import AudioConfig, ModelConfig
from model.encoder import NORM_EPS, Projection, encode_used, stacked_blocks, through
from model.layers import LayerNorm, table

TAPS = 3
"""Inputs that an output of a convolution reads: 2i - 1, 2i and 2i + 1; before the first one stand zeros."""


def taps(x_MLI: jax.Array) -> jax.Array:
    """What each output of a convolution of stride 2 reads: [M, L, I] -> [M, L/2, TAPS, I]."""
    before = jnp.pad(x_MLI[:, 1:-1:2], ((0, 0), (1, 0), (0, 0)))
    return jnp.stack([before, x_MLI[:, 0::2], x_MLI[:, 1::2]], axis=2)


class Convolutions(nnx.Module):
    """Three convolutions of stride 2 with biases, each followed by exact GELU."""

    def __init__(self, config: ModelConfig, audio: AudioConfig, rngs: nnx.Rngs):
        W = audio.hidden_size
        self.first, self.second, self.third = (
            Projection((TAPS, inputs), (W,), "- - audio_width", config, rngs) for inputs in (audio.mel_bins, W, W)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Frames [M, L, mel bins] -> [M, P, W]."""
        for convolution in (self.first, self.second, self.third):
            x = jax.nn.gelu(convolution(taps(x), "mlti,tiw->mlw"), approximate=False)
        return x


class Audio(nnx.Module):
    """Windows of sound -> features for the projector."""

    def __init__(self, config: ModelConfig, audio: AudioConfig, rngs: nnx.Rngs):
        self.config, self.audio = config, audio
        P, W, dtype = audio.tokens_per_window, audio.hidden_size, config.param_dtype
        self.convolutions = Convolutions(config, audio, rngs)
        self.pos_embed = table(rngs, (P, W), "- audio_width", config)
        self.blocks = stacked_blocks(config, audio, "audio", rngs)
        self.post_norm = LayerNorm(W, NORM_EPS, dtype)

    def __call__(self, frames: jax.Array, used_MP: jax.Array) -> jax.Array:
        """frames [M, L, mel bins] (floating point) -> features [M, P, W]; nothing of unused tokens is in those of used ones.

        Features of unused tokens mean nothing; frames are finite numbers there too.
        """
        dtype = jnp.dtype(self.config.dtype)
        x_MPW = self.convolutions(frames.astype(dtype)) + self.pos_embed[...].astype(dtype)
        return self.post_norm(through(self.blocks, x_MPW, self.config, seen_MP=used_MP))


def encode_used_windows(audio: Audio, frames: jax.Array, used_MP: jax.Array, wanted_M: jax.Array) -> jax.Array:
    """Features [M, P, W] of the wanted windows, zeros for the others; blocks that hold no wanted one are not computed.

    `used_MP`: the tokens that the row has, wherever they stand, since all of a window's see each other. `wanted_M`: the
    windows some of whose tokens stand here.
    """
    graph, weights = nnx.split(audio)

    def encode(weights, frames, used_MP):
        return nnx.merge(graph, weights)(frames, used_MP)

    return encode_used(encode, weights, (frames, used_MP), wanted_M, audio.audio.windows_per_block)
