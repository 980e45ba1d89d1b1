"""Typed options of the model: the decoder, the encoders of pictures and of sound (free of jax, so `--help` is instant)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

Problem = tuple[str, str]
"""(field, what was found, what was expected and what to do)."""

Dtype = Literal["float32", "bfloat16", "float64"]
ParamDtype = Literal["float32", "float64"]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3 frequency scaling: long wavelengths are stretched so that a model reads past its pretraining length."""

    factor: float = 16.0
    """Wavelengths beyond `original_length / low_freq_factor` are multiplied by this."""
    low_freq_factor: float = 1.0
    """Wavelengths above `original_length` over this are scaled in full."""
    high_freq_factor: float = 1.0
    """Wavelengths below `original_length` over this are left alone."""
    original_length: int = 8192
    """Sequence length (tokens) before scaling."""

    def problems(self) -> Iterator[Problem]:
        if self.factor < 1:
            yield "factor", f"found {self.factor}, expected 1 or more"
        for name in ("low_freq_factor", "high_freq_factor"):
            if getattr(self, name) <= 0:
                yield name, f"found {getattr(self, name)}, expected more than 0"
        if self.low_freq_factor > self.high_freq_factor:
            yield (
                "low_freq_factor",
                f"found {self.low_freq_factor}, expected at most high_freq_factor={self.high_freq_factor}",
            )


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: one ViT per square tile, pixel shuffle, adapter MLP."""

    image_size: int = 336
    """Side of a tile, in pixels."""
    patch_size: int = 14
    """Side of a patch, in pixels."""
    hidden_size: int = 1408
    """Width of the encoder."""
    num_layers: int = 34
    """Number of encoder blocks."""
    num_heads: int = 16
    """Attention heads; each is hidden_size / num_heads wide."""
    ffn_size: int = 5632
    """Width of the encoder's MLP."""
    shuffle: int = 2
    """Pixel shuffle: shuffle x shuffle neighbouring patches become one token (Llama's pixel_shuffle_ratio, inverted)."""
    adapter_size: int = 4096
    """Width of the adapter MLP after the pixel shuffle, and of the features that the projector maps to the decoder."""
    rope_theta: float = 10000.0
    """Base of the two-dimensional rotary position embedding."""
    tiles_per_block: int = 8
    """Tiles encoded at once; blocks that hold only padding are skipped."""

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Decoder tokens that one tile becomes."""
        return (self.patches_per_side // self.shuffle) ** 2

    def problems(self) -> Iterator[Problem]:
        if self.image_size % (self.patch_size * self.shuffle):
            yield (
                "image_size",
                f"found {self.image_size}, expected a multiple of patch_size x shuffle: {self.patch_size * self.shuffle}",
            )
        if self.hidden_size % self.num_heads or self.hidden_size // max(self.num_heads, 1) % 4:
            yield (
                "num_heads",
                f"found {self.num_heads}, expected a divisor of hidden_size={self.hidden_size} that leaves heads whose "
                "width is a multiple of 4 (two rotary axes of complex pairs)",
            )
        if self.rope_theta <= 1:
            yield "rope_theta", f"found {self.rope_theta}, expected more than 1"


AUDIO_STRIDE = 8
"""Log-mel frames (10 ms each) that become one token: three convolutions of stride 2."""


@dataclass(frozen=True)
class AudioConfig:
    """The audio encoder: windows of log-mel frames, three strided convolutions, a small transformer within a window."""

    mel_bins: int = 80
    """Mel bins of a frame."""
    window_frames: int = 128
    """Log-mel frames of a window, 10 ms each; a token stands for 8 of them, and sees no other window."""
    hidden_size: int = 512
    """Width of the encoder, and of the features that its projector maps to the decoder."""
    num_layers: int = 6
    """Number of encoder blocks, behind the convolutions."""
    num_heads: int = 8
    """Attention heads; each is hidden_size / num_heads wide."""
    ffn_size: int = 2048
    """Width of the encoder's MLP."""
    windows_per_block: int = 8
    """Windows encoded at once; blocks that hold only padding are skipped."""

    @property
    def tokens_per_window(self) -> int:
        """Decoder tokens that a full window becomes."""
        return self.window_frames // AUDIO_STRIDE

    def problems(self) -> Iterator[Problem]:
        if self.window_frames % AUDIO_STRIDE:
            yield (
                "window_frames",
                f"found {self.window_frames}, expected a multiple of {AUDIO_STRIDE}, the frames of a token",
            )
        if self.hidden_size % self.num_heads:
            yield "num_heads", f"found {self.num_heads}, expected a divisor of hidden_size={self.hidden_size}"


class LayerKind(NamedTuple):
    """What one decoder layer is made of."""

    moe: bool
    """Mixture of experts, else a dense MLP."""
    rope: bool
    """Rotary positions and chunked attention, else no positions and full attention."""


@dataclass(frozen=True)
class ModelConfig:
    """The decoder, and the encoders of pictures and of sound if there are any. Defaults are Llama 4 Scout's."""

    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset({"moe_layer_step", "nope_layer_step"})

    vocab_size: int = 202048
    """Rows of the embedding table and columns of the output head."""
    hidden_size: int = 5120
    """Width D of the residual stream."""
    num_layers: int = 48
    """Number of decoder layers."""
    num_heads: int = 40
    """Query heads N."""
    num_kv_heads: int = 8
    """Key and value heads K; consecutive groups of num_heads / num_kv_heads query heads share one."""
    head_dim: int = 128
    """Width H of a head; num_heads x head_dim need not equal hidden_size."""
    dense_ffn_size: int = 16384
    """Width of the MLP in dense layers."""
    expert_ffn_size: int = 8192
    """Width F of each expert, and of the shared expert."""
    num_experts: int = 16
    """Experts E in each mixture-of-experts layer."""
    experts_per_token: int = 1
    """Experts that each token visits (top-k)."""
    moe_layer_step: int = 1
    """Every so many layers, the last of the group is a mixture of experts; 0 makes all layers dense."""
    moe_layers: tuple[int, ...] | None = None
    """Exactly these layers are mixtures of experts; overrides moe_layer_step."""
    nope_layer_step: int = 4
    """Every so many layers, the last of the group has no rotary positions and attends globally; 0 makes none so."""
    nope_layers: tuple[int, ...] | None = None
    """Exactly these layers are global without rotary positions; overrides nope_layer_step."""
    chunk_size: int = 8192
    """Rotary layers attend within chunks of this many tokens, counted from the start of the document."""
    qk_norm: bool = True
    """Normalise queries and keys (no learned weight) after the rotary embedding, in rotary layers."""
    rope_theta: float = 500000.0
    """Base of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """Frequency scaling for long context; None leaves the frequencies alone."""
    temperature_tuning: bool = True
    """Scale the queries of global layers by 1 + scale x log(1 + floor((position + 1) / floor))."""
    temperature_floor: float = 8192.0
    """The position before this is the first one that is scaled."""
    temperature_scale: float = 0.1
    """Strength of the temperature tuning."""
    temperature_from: Literal["document", "row"] = "document"
    """Where its positions count from: the document's start, or the row's, padding and documents before it included."""
    tie_embeddings: bool = False
    """Use the embedding table as the output head."""
    norm_eps: float = 1e-5
    """Added to the mean square in every normalisation."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; 0 draws each matrix with 1 / sqrt(inputs) and embeddings with 1."""
    vision: VisionConfig | None = None
    """The vision encoder; None for a model that sees no pictures."""
    audio: AudioConfig | None = None
    """The audio encoder; None for a model that hears nothing."""
    dtype: Dtype = "float32"
    """Precision of the computation. Norms, router, rotary embedding and softmax are at least float32."""
    param_dtype: ParamDtype = "float32"
    """Precision of weights, gradients and optimizer moments. Not bfloat16, which would round small updates away."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or whole super-blocks."""
    scan_layers: bool = True
    """Scan over super-blocks, so that compile time does not grow with depth. The weights are stacked either way."""
    expert_kernel: Literal["auto", "blocks", "ragged_dot", "tokamax"] = "auto"
    """Grouped matrix product of the experts; auto takes blocks on CPU, tokamax on GPU, ragged_dot on TPU."""
    capacity_factor: float = 0.0
    """Most tokens that an expert takes of a packed row, as a multiple of what balanced routing gives it; those that come
    later in the row skip it and are counted. 0 for no limit: no token is dropped. Decoding never drops any."""
    router_bias_rate: float = 0.0
    """Step of the aux-loss-free router bias (arXiv 2408.15664), moved against an expert's excess load; 0 for no bias."""

    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, first to last."""

        def last_of_group(step: int) -> set[int]:
            return set(range(step - 1, self.num_layers, step)) if step else set()

        moe = last_of_group(self.moe_layer_step) if self.moe_layers is None else set(self.moe_layers)
        nope = last_of_group(self.nope_layer_step) if self.nope_layers is None else set(self.nope_layers)
        return tuple(LayerKind(i in moe, i not in nope) for i in range(self.num_layers))

    def cache_slots(self, kind: LayerKind, length: int) -> int:
        """Tokens whose keys and values a layer of this kind keeps to decode documents of up to `length` tokens."""
        return min(self.chunk_size, length) if kind.rope else length

    def cache_bytes(self, length: int, bytes_per_value: int) -> int:
        """Bytes of keys and values that decoding keeps for one document of up to `length` tokens."""
        slots = sum(self.cache_slots(kind, length) for kind in self.layer_kinds())
        return 2 * slots * self.num_kv_heads * self.head_dim * bytes_per_value

    def super_block(self) -> tuple[LayerKind, ...]:
        """The shortest run of layers that, repeated, gives the whole decoder."""
        kinds = self.layer_kinds()
        periods = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
        return next(kinds[:n] for n in periods if kinds[:n] * (len(kinds) // n) == kinds)

    def problems(self) -> Iterator[Problem]:
        if self.num_heads % max(self.num_kv_heads, 1):
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            yield (
                "num_kv_heads",
                f"found {self.num_kv_heads}, expected a divisor of num_heads={self.num_heads}: {divisors}",
            )
        if self.head_dim % 2:
            yield "head_dim", f"found {self.head_dim}, expected an even number (rotary embedding turns pairs)"
        if self.experts_per_token > self.num_experts:
            yield (
                "experts_per_token",
                f"found {self.experts_per_token}, expected at most num_experts={self.num_experts}",
            )
        if self.rope_theta <= 1:
            yield "rope_theta", f"found {self.rope_theta}, expected more than 1"
        if self.norm_eps <= 0:
            yield "norm_eps", f"found {self.norm_eps}, expected more than 0"
        if self.temperature_tuning and not self.temperature_floor:
            yield "temperature_floor", "found 0.0, expected more than 0 with temperature_tuning"
        for name in ("moe_layers", "nope_layers"):
            layers = getattr(self, name) or ()
            outside = [i for i in layers if i >= self.num_layers]
            if outside:
                yield name, f"found layers {outside}, expected 0 to {self.num_layers - 1}"
            twice = sorted({i for i in layers if layers.count(i) > 1})
            if twice:
                yield name, f"found layers {twice} more than once, expected each layer once"
