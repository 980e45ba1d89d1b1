"""The decoder with early fusion: embeddings, features of pictures and sound, scanned super-blocks, final norm, output head.

Letters: B rows, S sequence, T = B x S tokens, D width, V vocabulary, M tiles or windows of sound, P tokens of each of them,
R repeats.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.attention import Attention, Layout
from model.audio import Audio, encode_used_windows
from model.blockwise import Tokens
from model.cache import Cache, Cached, KeysValues, chunk_of, filled
from model.config import LayerKind, ModelConfig
from model.grouped_ffn import kernel_for
from model.layers import constant, matrix, pick, rms_norm, scan_stacked, table
from model.moe import MoE, RouterBias, RouterStats, SwiGLU
from model.storage import whole
from model.vision import Vision, encode_used_tiles
from sharding import stage
from sharding.place import GATHERED_WEIGHT, Place

Batch = Mapping[str, jax.Array]
"""One packed batch: `tokens`, `targets`, `loss_weights`, `segment_ids` (0 is padding), `positions`, `source_ids`, all
[B,S]; with images, `image_tiles` [B,M,side,side,3] and `image_positions` [B,M,P] (-1 in unused slots); with sound,
`audio_frames` [B,M,frames,mel bins] and `audio_positions` [B,M,P] (-1 for unused tokens: of a window the first are used)."""

Medium = Literal["image", "audio"]
"""What a batch can hold beside text: its positions are `<medium>_positions`."""


ALONE = Place()
EXPERTS = nnx.PathContains("experts")
"""One device, with all weights."""

Encoder = TypeVar("Encoder", Vision, Audio)


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
    if "audio_frames" in batch:
        audio, frames = config.audio, batch["audio_frames"]
        assert audio, "the batch has sound, the model has no audio encoder"
        chex.assert_type(frames, float)
        chex.assert_shape(frames, (batch["tokens"].shape[0], None, audio.window_frames, audio.mel_bins))
        chex.assert_shape(batch["audio_positions"], (*frames.shape[:2], audio.tokens_per_window))


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, kind: LayerKind, place: Place, rngs: nnx.Rngs):
        self.config, self.kind, self.place = config, kind, place
        self.attn_norm = constant((config.hidden_size,), 1.0, config.param_dtype)
        self.attn = Attention(config, kind, place, rngs)
        self.ffn_norm = constant((config.hidden_size,), 1.0, config.param_dtype)
        self.ffn = MoE(config, place, rngs) if kind.moe else SwiGLU(config, config.dense_ffn_size, rngs)

    def __call__(
        self,
        x_BSD: jax.Array,
        layout: Layout,
        capture: bool = False,
        cached: Cached | None = None,
        repeat: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats | None, KeysValues]:
        """The third is what `Attention` gives. With `repeat`, that of the super-block which the layer is in, the experts'
        weights are those of all repeats, and no capacity limits them.
        """
        eps = self.config.norm_eps
        attended_BSD, kept = self.attn(rms_norm(x_BSD, self.attn_norm, eps), layout, cached)
        x_BSD = x_BSD + self.place.joined(attended_BSD)
        normed = rms_norm(x_BSD, self.ffn_norm, eps)
        if isinstance(self.ffn, SwiGLU):
            return x_BSD + self.place.joined(self.ffn(normed)), None, kept
        real_T = layout.tokens.segment_ids.reshape(-1) > 0
        out_TD, stats = self.ffn(
            normed.reshape(-1, normed.shape[-1]),
            real_T,
            x_BSD.shape[0] if repeat is None else None,
            capture,
            repeat,
        )
        return x_BSD + self.place.joined(out_TD).reshape(x_BSD.shape), stats, kept


def here(batch: Batch, medium: Medium, place: Place) -> jax.Array:
    """Positions [B,M,P] of tiles or windows as places in the share of the row that is on this device; -1 elsewhere.

    One whose tokens are on two devices is encoded by both.
    """
    S, positions_BMP = batch["tokens"].shape[1], batch[f"{medium}_positions"]
    within_BMP = positions_BMP - place.first("context", S)
    return jnp.where((positions_BMP >= 0) & (within_BMP >= 0) & (within_BMP < S), within_BMP, -1)


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
    """With `capture`: the input of the first layer, images and sound included."""


class Transformer(nnx.Module):
    """A Llama 4 model. `platform`, that of its devices, picks the experts' kernel where the config says auto.

    In a `place` of several devices it runs inside `jax.shard_map`: on rows of its own, with its parts of the weights.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, platform: str | None = None, place: Place = ALONE):
        kernel = kernel_for(platform or jax.devices()[0].platform, config.expert_kernel)
        config = dataclasses.replace(config, expert_kernel=kernel)
        self.config, self.place = config, place
        D, V, dtype = config.hidden_size, config.vocab_size, config.param_dtype
        kinds = config.super_block()
        self.embed = table(rngs, (V, D), "vocab width", config)

        @nnx.split_rngs(splits=config.num_layers // len(kinds))
        @nnx.vmap
        def stacked_super_blocks(rngs: nnx.Rngs) -> nnx.List:
            return nnx.List([Layer(config, kind, place, rngs) for kind in kinds])

        self.blocks = stacked_super_blocks(rngs)
        for weight in jax.tree.leaves(
            nnx.state(self.blocks, nnx.Param), is_leaf=lambda node: isinstance(node, nnx.Param)
        ):
            others = ("-",) * (weight.get_value().ndim - 1 - len(weight.get_metadata()["dims"]))
            weight.set_metadata(dims=("repeats", *others, *weight.get_metadata()["dims"]))
        self.final_norm = constant((D,), 1.0, dtype)
        if not config.tie_embeddings:
            self.lm_head = matrix(rngs, (D, V), "width vocab", D, config)
        if config.vision:
            self.vision = Vision(config, config.vision, rngs)
            self.projector = matrix(
                rngs, (config.vision.adapter_size, D), "- width", config.vision.adapter_size, config
            )
        if config.audio:
            self.audio = Audio(config, config.audio, rngs)
            width = config.audio.hidden_size
            self.audio_projector = matrix(rngs, (width, D), "- width", width, config)

    def head(self) -> jax.Array:
        """The output head, [D, V], in the precision of the computation; on a tensor axis this device's part of V."""
        tied, dtype = self.config.tie_embeddings, self.config.dtype
        weight = self.place.whole(self.embed if tied else self.lm_head, dtype)[...]
        return (weight.T if tied else weight).astype(dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V], in at least float32."""
        accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.matmul(hidden, self.head(), preferred_element_type=accumulate)

    def encode_images(self, batch: Batch) -> jax.Array:
        """Projected features of a batch's tiles, [B, M, P, D]; zeros in unused slots."""
        tiles, used_BM = batch["image_tiles"], (here(batch, "image", self.place) >= 0).any(axis=2)
        features = encode_used_tiles(self._gathered(self.vision), merged(tiles), used_BM.reshape(-1))
        return self._projected(features, self.projector, used_BM.shape)

    def encode_audio(self, batch: Batch) -> jax.Array:
        """Projected features of a batch's windows of sound, [B, M, P, D]; zeros in unused windows."""
        used_BMP, wanted_BM = batch["audio_positions"] >= 0, (here(batch, "audio", self.place) >= 0).any(axis=2)
        features = encode_used_windows(
            self._gathered(self.audio), merged(batch["audio_frames"]), merged(used_BMP), wanted_BM.reshape(-1)
        )
        return self._projected(features, self.audio_projector, wanted_BM.shape)

    def _gathered(self, encoder: Encoder) -> Encoder:
        """The encoder with whole weights.

        Gathered here: inside, devices run as many blocks as they have items, and could not wait for each other. Not
        narrowed: the gradients of all blocks are summed in the weights' precision.
        """
        graph, weights = nnx.split(encoder)
        return nnx.merge(graph, self.place.whole(weights))

    def _projected(self, features: jax.Array, projector: nnx.Param, items: tuple[int, ...]) -> jax.Array:
        """Features of an encoder in the decoder's width, [*items, P, D]."""
        weight = self.place.whole(projector, self.config.dtype)[...]
        return (features @ weight.astype(features.dtype)).reshape(*items, features.shape[1], -1)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Rows of the embedding table, [..., D]; only those that are asked for change their precision."""
        if self.place.axes:
            return self.place.rows(self.embed, tokens, self.config.dtype)
        return pick(self.embed[...], tokens).astype(self.config.dtype)

    def embed_batch(self, batch: Batch, features: Mapping[Medium, jax.Array]) -> jax.Array:
        """Token embeddings [B,S,D], replaced by features [B,M,P,D] at the positions that the batch names."""
        x_BSD = self.embed_tokens(batch["tokens"])
        B, S, D = x_BSD.shape
        for medium, features_BMPD in features.items():
            positions = here(batch, medium, self.place).reshape(B, -1)
            # Unused slots say -1, which indexing would read as the last token: past the end they are dropped.
            positions = jnp.where(positions < 0, S, positions)
            x_BSD = x_BSD.at[jnp.arange(B)[:, None], positions].set(features_BMPD.reshape(B, -1, D), mode="drop")
        return x_BSD

    def __call__(self, batch: Batch, capture: bool = False) -> Output:
        """Runs a batch."""
        return self._decoder(*self._inputs(batch), capture)[0]

    def prefill(self, batch: Batch, length: int) -> tuple[jax.Array, Cache]:
        """Runs a batch whose rows hold one document each, from the row's start, padding after it.

        Returns what `__call__` does as `hidden_BSD`, and the cache with which `decode` goes on, to up to `length`
        tokens a row.
        """
        lengths_B, config = jnp.sum(batch["segment_ids"] > 0, axis=1, dtype=jnp.int32), self.config

        def keep(kind: LayerKind, tokens: KeysValues) -> KeysValues:
            return filled(tokens, lengths_B, config.cache_slots(kind, length), chunk_of(kind, config))

        output, layers = self._decoder(*self._inputs(batch), keep=keep)
        return output.hidden_BSD, Cache(layers, lengths_B)

    def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One more token of each row: the hidden state after it, [B, D], and the cache that includes it.

        A row that has as many tokens as the cache was made for cannot take another one.
        """
        return self.decode_embedded(self.embed_tokens(tokens_B), cache)

    def decode_embedded(self, embedded_BD: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`decode` of tokens that are embedded already, or of a picture's or a sound's features."""
        layout = Layout.of_next(cache.lengths_B, self.config)
        graph, experts, weights = nnx.split(self.blocks, EXPERTS, ...)

        def super_block(carry, inputs):
            x_BSD, slots = carry
            weights, repeat = inputs
            after = []
            # Experts are not scanned over: those of a repeat would all be copied, to use a few.
            for layer, of_layer in zip(nnx.merge(graph, experts, weights), slots, strict=True):
                x_BSD, _, of_layer = layer(x_BSD, layout, cached=Cached(of_layer, repeat), repeat=repeat)
                after.append(of_layer)
            return (x_BSD, tuple(after)), None

        # Carried, not stacked up by the scan: so each repeat writes its tokens into the one cache that there is.
        start = embedded_BD[:, None], cache.layers
        (x_BSD, slots), _ = self._scan(super_block, start, (weights, jnp.arange(self._repeats)))
        return self._normed(x_BSD)[:, 0], Cache(slots, cache.lengths_B + 1)

    def embedded(self, batch: Batch) -> jax.Array:
        """The first layer's input [B,S,D], images and sound included."""
        check_batch(batch, self.config)
        features: dict[Medium, jax.Array] = {}
        if "image_tiles" in batch and batch["image_tiles"].shape[1]:
            features["image"] = self.encode_images(batch)
        if "audio_frames" in batch and batch["audio_frames"].shape[1]:
            features["audio"] = self.encode_audio(batch)
        return self.embed_batch(batch, features)

    def _inputs(self, batch: Batch) -> tuple[jax.Array, Layout]:
        """The first layer's input, and where each token stands."""
        return self.embedded(batch), Layout.of(batch["segment_ids"], batch["positions"], self.config, self.place)

    def _decoder(
        self,
        embedded_BSD: jax.Array,
        layout: Layout,
        capture: bool = False,
        keep: Callable[[LayerKind, KeysValues], KeysValues] | None = None,
    ) -> tuple[Output, Any]:
        """All layers and the final norm; and, for each layer of the super-block, stacked over its repeats, what `keep`
        makes of the layer's keys and values. Then experts are not scanned over, so that on a mesh they stay where they are."""
        config = self.config
        graph, experts, weights = nnx.split(self.blocks, EXPERTS if keep else nnx.Nothing(), ...)

        def super_block(x_BSD, weights, layout, repeat=None):
            outputs, stats, kept = [], [], []
            for layer in nnx.merge(graph, experts, whole(self.place, weights, config.dtype)):
                x_BSD, layer_stats, tokens = layer(x_BSD, layout, capture, repeat=repeat)
                outputs += [x_BSD] if capture else []
                stats += [layer_stats] if layer_stats else []
                kept += [keep(layer.kind, tokens)] if keep else []
            return x_BSD, (stack(outputs), stack(stats), tuple(kept))

        if self.place.size("stage") > 1:
            x_BSD, stats = self._pipelined(super_block, embedded_BSD, layout.tokens, weights)
            layers = kept = None
        else:
            recomputed = self._recomputed(lambda x_BSD, inputs: super_block(x_BSD, inputs[0], layout, inputs[1]))
            numbers = jnp.arange(self._repeats) if keep else None
            x_BSD, (layers, stats, kept) = self._scan(recomputed, embedded_BSD, (weights, numbers))
        # [R, layers of a super-block, ...] -> [layers, ...]
        layers, stats = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (layers, stats))
        return Output(self._normed(x_BSD), stats, layers, embedded_BSD if capture else None), kept

    def _recomputed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with what the config lets its backward pass compute again; never are gathered weights kept."""
        policies = jax.checkpoint_policies
        if self.config.remat != "none":
            policy = policies.dots_with_no_batch_dims_saveable if self.config.remat == "dots" else None
            return jax.checkpoint(function, policy=policy)
        if self.place.axes:
            return jax.checkpoint(function, policy=policies.save_anything_except_these_names(GATHERED_WEIGHT))
        return function

    def _pipelined(
        self, super_block: Callable[..., Any], embedded_BSD: jax.Array, tokens: Tokens, weights: nnx.State
    ) -> tuple[jax.Array, Any]:
        """All layers in a pipeline of devices, and the statistics [R, layers of a super-block, ...] of this one's repeats,
        zeros for the others'."""
        place = self.place
        segments_MBS, positions_MBS = (
            stage.micro_batches(place, array) for array in (tokens.segment_ids, tokens.positions)
        )

        def of_mine(weight):
            share = stage.every if isinstance(weight, RouterBias) else stage.dealt
            return weight.replace(jax.tree.map(lambda array: share(place, array), weight.get_value()))

        def is_weight(node):
            return isinstance(node, nnx.Variable)

        mine = jax.tree.map(of_mine, weights, is_leaf=is_weight)

        @self._recomputed
        def one_round(x_BSD, mine, number, round_, real):
            picked = jax.tree.map(lambda stacked: checkpoint_name(pick(stacked, round_), GATHERED_WEIGHT), mine)
            # Where there is no micro-batch, all is padding: no expert gets it, and it tells nothing.
            segments_BS = jnp.where(real, segments_MBS[number], 0)
            layout = Layout.of(segments_BS, positions_MBS[number], self.config, place)
            x_BSD, (_, stats, _) = super_block(x_BSD, picked, layout)
            return x_BSD, stats

        def layers(x_BSD, number, round_, real):
            return one_round(x_BSD, mine, number, round_, real)

        x_BSD, stats = stage.pipeline(place, layers, embedded_BSD, self._repeats // place.size("stage"))
        return x_BSD, jax.tree.map(lambda told: stage.of_all(place, told), stats)

    @property
    def _repeats(self) -> int:
        """Of the super-block."""
        return self.config.num_layers // len(self.config.super_block())

    def _scan(self, super_block: Callable[..., Any], start: Any, inputs: Any) -> Any:
        return scan_stacked(super_block, start, inputs, unroll=1 if self.config.scan_layers else self._repeats)

    def _normed(self, x_BSD: jax.Array) -> jax.Array:
        return rms_norm(x_BSD, self.final_norm, self.config.norm_eps)


def merged(array: jax.Array) -> jax.Array:
    """[B, M, ...] -> [B x M, ...]."""
    return array.reshape(-1, *array.shape[2:])


def stack(trees: list[Any]) -> Any:
    """One tree of arrays with a new leading dim, from a list of like ones; None from an empty list."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if trees else None
