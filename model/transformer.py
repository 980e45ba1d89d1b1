"""The decoder with early fusion: embeddings, image features, scanned super-blocks, final norm, output head.

Letters: B rows, S sequence, T = B x S tokens, D width, V vocabulary, M tiles, P patch tokens per tile, R repeats.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from model.attention import Attention, Layout
from model.config import LayerKind, ModelConfig
from model.grouped_ffn import kernel_for
from model.layers import constant, matrix, normal, rms_norm
from model.moe import MoE, RouterStats, SwiGLU
from model.vision import Vision, encode_used_tiles

Batch = Mapping[str, jax.Array]
"""One packed batch: `tokens`, `targets`, `loss_weights`, `segment_ids` (0 is padding), `positions`, `source_ids`, all
[B,S]; with images, `image_tiles` [B,M,side,side,3] and `image_positions` [B,M,P] (-1 in unused slots)."""


EMBED_STD = 1.0
"""Standard deviation of the embedding table where init_std is 0."""


def check_batch(batch: Batch, config: ModelConfig) -> None:
    """Asserts, while tracing, that the arrays have the shapes and types of `Batch`."""
    names = ("tokens", "segment_ids", "positions")
    chex.assert_rank([batch[name] for name in names], 2)
    chex.assert_equal_shape([batch[name] for name in names])
    chex.assert_type([batch[name] for name in names], int)
    if "image_tiles" in batch:
        vision = config.vision
        assert vision, "the batch has images, the model has no vision encoder"
        side = vision.image_size
        chex.assert_shape(batch["image_tiles"], (batch["tokens"].shape[0], None, side, side, 3))
        chex.assert_shape(batch["image_positions"], (*batch["image_tiles"].shape[:2], vision.tokens_per_tile))


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs):
        self.config, self.kind = config, kind
        self.attn_norm = constant((config.hidden_size,), 1.0, config.param_dtype)
        self.attn = Attention(config, kind, rngs)
        self.ffn_norm = constant((config.hidden_size,), 1.0, config.param_dtype)
        self.ffn = MoE(config, rngs) if kind.moe else SwiGLU(config, config.dense_ffn_size, rngs)

    def __call__(self, x_BSD: jax.Array, layout: Layout, capture: bool) -> tuple[jax.Array, RouterStats | None]:
        eps = self.config.norm_eps
        x_BSD = x_BSD + self.attn(rms_norm(x_BSD, self.attn_norm, eps), layout)
        normed = rms_norm(x_BSD, self.ffn_norm, eps)
        if isinstance(self.ffn, SwiGLU):
            return x_BSD + self.ffn(normed), None
        real_T = layout.segment_ids_BS.reshape(-1) > 0
        out_TD, stats = self.ffn(normed.reshape(-1, normed.shape[-1]), real_T, capture)
        return x_BSD + out_TD.reshape(x_BSD.shape), stats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a forward pass gives."""

    hidden_BSD: jax.Array
    """After the final norm; the head turns it into logits."""
    router: RouterStats | None
    """Stacked over the mixture-of-experts layers, first to last; None in a dense model."""
    layers_LBSD: jax.Array | None = None
    """With `capture`: the output of every layer."""
    embedded_BSD: jax.Array | None = None
    """With `capture`: the input of the first layer, images included."""


class Transformer(nnx.Module):
    """A Llama 4 model. `platform`, that of its devices, picks the experts' kernel where the config says auto."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, platform: str | None = None):
        kernel = kernel_for(platform or jax.devices()[0].platform, config.expert_kernel)
        config = dataclasses.replace(config, expert_kernel=kernel)
        self.config = config
        D, V, dtype = config.hidden_size, config.vocab_size, config.param_dtype
        kinds = config.super_block()
        self.embed = normal(rngs, (V, D), config.init_std or EMBED_STD, dtype)

        @nnx.split_rngs(splits=config.num_layers // len(kinds))
        @nnx.vmap
        def stacked_super_blocks(rngs: nnx.Rngs) -> nnx.List:
            return nnx.List([Layer(config, kind, rngs) for kind in kinds])

        self.blocks = stacked_super_blocks(rngs)
        self.final_norm = constant((D,), 1.0, dtype)
        if not config.tie_embeddings:
            self.lm_head = matrix(rngs, (D, V), D, config)
        if config.vision:
            self.vision = Vision(config, config.vision, rngs)
            self.projector = matrix(rngs, (config.vision.adapter_size, D), config.vision.adapter_size, config)

    def head(self) -> jax.Array:
        """The output head, [D, V], in the precision of the computation."""
        weight = self.embed[...].T if self.config.tie_embeddings else self.lm_head[...]
        return weight.astype(self.config.dtype)

    def encode_images(self, batch: Batch) -> jax.Array:
        """Projected features of a batch's tiles, [B, M, P, D]; zeros in unused slots."""
        tiles, positions_BMP = batch["image_tiles"], batch["image_positions"]
        B, M, P = positions_BMP.shape
        used = (positions_BMP >= 0).any(axis=2).reshape(-1)
        features = encode_used_tiles(self.vision, tiles.reshape(B * M, *tiles.shape[2:]), used)
        return (features @ self.projector[...].astype(features.dtype)).reshape(B, M, P, -1)

    def embed_batch(self, batch: Batch, features_BMPD: jax.Array | None) -> jax.Array:
        """Token embeddings [B,S,D], replaced by image features at the positions that the batch names."""
        x_BSD = self.embed[...].astype(self.config.dtype)[batch["tokens"]]
        if features_BMPD is None:
            return x_BSD
        B, S, D = x_BSD.shape
        positions = batch["image_positions"].reshape(B, -1)
        # Unused slots say -1, which indexing would read as the last token: past the end they are dropped.
        positions = jnp.where(positions < 0, S, positions)
        return x_BSD.at[jnp.arange(B)[:, None], positions].set(features_BMPD.reshape(B, -1, D), mode="drop")

    def __call__(self, batch: Batch, features_BMPD: jax.Array | None = None, capture: bool = False) -> Output:
        """Runs a batch. `features_BMPD`, if given, are used in place of encoding the batch's images again."""
        config = self.config
        check_batch(batch, config)
        if features_BMPD is None and "image_tiles" in batch and batch["image_tiles"].shape[1]:
            features_BMPD = self.encode_images(batch)
        embedded_BSD = self.embed_batch(batch, features_BMPD)
        layout = Layout.of(batch["segment_ids"], batch["positions"], config)
        graph, weights = nnx.split(self.blocks)

        def super_block(x_BSD, weights):
            outputs, stats = [], []
            for layer in nnx.merge(graph, weights):
                x_BSD, layer_stats = layer(x_BSD, layout, capture)
                outputs += [x_BSD] if capture else []
                stats += [layer_stats] if layer_stats else []
            return x_BSD, (stack(outputs), stack(stats))

        if config.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
            super_block = jax.checkpoint(super_block, policy=policy)
        repeats = config.num_layers // len(config.super_block())
        x_BSD, (layers, stats) = jax.lax.scan(
            super_block, embedded_BSD, weights, unroll=1 if config.scan_layers else repeats
        )
        # [R, layers of a super-block, ...] -> [layers, ...]
        layers, stats = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (layers, stats))
        hidden_BSD = rms_norm(x_BSD, self.final_norm, config.norm_eps)
        return Output(hidden_BSD, stats, layers, embedded_BSD if capture else None)


def stack(trees: list[Any]) -> Any:
    """One tree of arrays with a new leading dim, from a list of like ones; None from an empty list."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if trees else None
