"""Model FLOPs and parameter counts, from `ModelConfig` alone (no jax, so that `drover inspect` and tests answer at once).

Model FLOPs are those of the mathematics, not of the program: what is recomputed, padded or masked away earns nothing.
Compiled programs cannot be asked instead: their cost analysis counts the body of a scan once.
"""

from dataclasses import dataclass

from model.config import ModelConfig

BACKWARD_FACTOR = 3
"""A training step is three forward passes: the backward pass computes two products for each one of the forward pass."""


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward FLOPs (a multiply-add is two) of one decoder token by part, and of one image tile or window of sound."""

    attention_projections: float
    """Query, key, value and output projections."""
    attention_scores: float
    """Scores and weighted values, over the mean causal context of the row."""
    dense_ffn: float
    """Feed-forward of the dense layers."""
    shared_experts: float
    """Shared expert of the mixture layers."""
    routed_experts: float
    """The experts that a token visits, not the others."""
    router: float
    """Router logits."""
    head: float
    """Output head; reading the embedding table is free."""
    vision_per_tile: float
    """Vision encoder, adapter and projector, for one tile; 0 without a vision encoder."""
    audio_per_window: float
    """Audio encoder and projector, for one full window; 0 without an audio encoder."""

    @property
    def forward(self) -> float:
        """Forward FLOPs of a token, tiles and sound aside."""
        return (
            self.attention_projections
            + self.attention_scores
            + self.dense_ffn
            + self.shared_experts
            + self.routed_experts
            + self.router
            + self.head
        )

    @property
    def training(self) -> float:
        """Forward and backward FLOPs of a token, tiles and sound aside."""
        return BACKWARD_FACTOR * self.forward

    @property
    def training_per_tile(self) -> float:
        """Forward and backward FLOPs of an image tile."""
        return BACKWARD_FACTOR * self.vision_per_tile

    @property
    def training_per_window(self) -> float:
        """Forward and backward FLOPs of a window of sound."""
        return BACKWARD_FACTOR * self.audio_per_window

    def training_step(self, tokens: float, tiles: float, windows: float = 0) -> float:
        """FLOPs of a training step that holds this many useful tokens, tiles and windows of sound.

        Empty ones of either kind earn nothing; a window that a clip fills in part counts in full.
        """
        return BACKWARD_FACTOR * self.forward_step(tokens, tiles, windows)

    def forward_step(self, tokens: float, tiles: float, windows: float = 0) -> float:
        """Those of the forward pass alone."""
        return tokens * self.forward + tiles * self.vision_per_tile + windows * self.audio_per_window

    @property
    def formula(self) -> str:
        """How model FLOP utilisation is computed, for printing beside the number."""
        media = f" + tiles/s x {self.training_per_tile:.4g}" if self.vision_per_tile else ""
        media += f" + audio windows/s x {self.training_per_window:.4g}" if self.audio_per_window else ""
        return (
            f"MFU = (tokens/s x {self.training:.4g}{media}) / peak FLOP/s; "
            "FLOPs = 3 x forward, 2 per multiply-add of the weights in use (top-k and shared experts, head; no "
            "embedding lookup) and of attention over the mean causal context; no padding, no recomputation"
        )


def mean_context(sequence_length: int, chunk_size: int | None = None) -> float:
    """Mean number of positions that a token of a document of `sequence_length` tokens attends to, itself included.

    Causal within chunks of `chunk_size` tokens counted from the start of the document; None for a single chunk.
    """
    chunk = min(chunk_size or sequence_length, sequence_length)
    full, rest = divmod(sequence_length, chunk)
    return (full * chunk * (chunk + 1) + rest * (rest + 1)) / (2 * sequence_length)


def flops_per_token(model: ModelConfig, sequence_length: int) -> FlopsPerToken:
    """FLOPs of a token in a document of `sequence_length` tokens.

    Give it the length of the row, and packed rows count as one document: the scores of shorter documents cost less, so
    this overstates by at most the share of `attention_scores`.
    """
    D, H, kinds = model.hidden_size, model.head_dim, model.layer_kinds()
    moe, rope = sum(k.moe for k in kinds), sum(k.rope for k in kinds)
    chunked, whole = mean_context(sequence_length, model.chunk_size), mean_context(sequence_length)
    context = rope * chunked + (len(kinds) - rope) * whole
    expert = 2 * 3 * D * model.expert_ffn_size
    return FlopsPerToken(
        attention_projections=len(kinds) * 2 * 2 * D * H * (model.num_heads + model.num_kv_heads),
        attention_scores=2 * 2 * model.num_heads * H * context,
        dense_ffn=(len(kinds) - moe) * 2 * 3 * D * model.dense_ffn_size,
        shared_experts=moe * expert,
        routed_experts=moe * model.experts_per_token * expert,
        router=moe * 2 * D * model.num_experts,
        head=2 * D * model.vocab_size,
        vision_per_tile=_vision_flops(model),
        audio_per_window=_audio_flops(model),
    )


def _vision_flops(model: ModelConfig) -> float:
    vision = model.vision
    if vision is None:
        return 0.0
    D, F, P = vision.hidden_size, vision.ffn_size, vision.patches_per_side**2
    attended = P + 1  # The class token travels with the patches.
    embed = P * 3 * vision.patch_size**2 * D
    layer = attended * (4 * D * D + 2 * D * F) + 2 * attended * attended * D
    shuffled = D * vision.shuffle**2
    adapter = shuffled * vision.adapter_size + vision.adapter_size**2 + vision.adapter_size * model.hidden_size
    return 2.0 * (embed + vision.num_layers * layer + vision.tokens_per_tile * adapter)


def _audio_flops(model: ModelConfig) -> float:
    audio = model.audio
    if audio is None:
        return 0.0
    W, F, P, L = audio.hidden_size, audio.ffn_size, audio.tokens_per_window, audio.window_frames
    convolutions = 3 * W * (L // 2 * audio.mel_bins + L // 4 * W + L // 8 * W)
    layer = P * (4 * W * W + 2 * W * F) + 2 * P * P * W
    return 2.0 * (convolutions + audio.num_layers * layer + P * W * model.hidden_size)


@dataclass(frozen=True)
class ParameterCounts:
    """Weights of the model by part."""

    routed_experts: int
    shared_experts: int
    dense_ffn: int
    attention: int
    router: int
    embedding: int
    head: int
    """0 when the embedding table is also the head."""
    norms: int
    """Of the decoder; the encoders' own are in `vision` and `audio`."""
    vision: int
    """Encoder and adapter."""
    projector: int
    """From the adapter's features to the decoder's width."""
    audio: int
    """Audio encoder."""
    audio_projector: int
    """From the audio encoder's features to the decoder's width."""
    active: int
    """Text weights that a token uses: all but the routed experts that it does not visit; the embedding table counts."""

    @property
    def text(self) -> int:
        """Weights of the decoder."""
        return (
            self.routed_experts
            + self.shared_experts
            + self.dense_ffn
            + self.attention
            + self.router
            + self.embedding
            + self.head
            + self.norms
        )

    @property
    def total(self) -> int:
        """All weights."""
        return self.text + self.vision + self.projector + self.audio + self.audio_projector


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Counts by part; the aux-loss-free router bias is state of the balancing, not a weight, and is left out."""
    D, kinds = model.hidden_size, model.layer_kinds()
    moe, layers = sum(k.moe for k in kinds), len(kinds)
    expert = 3 * D * model.expert_ffn_size
    routed = moe * model.num_experts * expert
    embedding = model.vocab_size * D
    counts = {
        "shared_experts": moe * expert,
        "dense_ffn": (layers - moe) * 3 * D * model.dense_ffn_size,
        "attention": layers * 2 * D * model.head_dim * (model.num_heads + model.num_kv_heads),
        "router": moe * D * model.num_experts,
        "embedding": embedding,
        "head": 0 if model.tie_embeddings else embedding,
        "norms": (2 * layers + 1) * D,
    }
    active = sum(counts.values()) + moe * model.experts_per_token * expert
    vision, projector = _vision_parameters(model)
    audio, audio_projector = _audio_parameters(model)
    return ParameterCounts(
        routed_experts=routed,
        **counts,
        vision=vision,
        projector=projector,
        audio=audio,
        audio_projector=audio_projector,
        active=active,
    )


def _vision_parameters(model: ModelConfig) -> tuple[int, int]:
    vision = model.vision
    if vision is None:
        return 0, 0
    D, F, A = vision.hidden_size, vision.ffn_size, vision.adapter_size
    positions = vision.patches_per_side**2 + 1
    embed = 3 * vision.patch_size**2 * D + D + positions * D + 2 * 2 * D  # patches, class, positions, two layer norms
    layer = _encoder_layer(D, F)
    adapter = D * vision.shuffle**2 * A + A * A
    return embed + vision.num_layers * layer + adapter, A * model.hidden_size


def _audio_parameters(model: ModelConfig) -> tuple[int, int]:
    audio = model.audio
    if audio is None:
        return 0, 0
    W = audio.hidden_size
    convolutions = 3 * W * (audio.mel_bins + W + W) + 3 * W
    own = convolutions + audio.tokens_per_window * W + 2 * W  # positions, last norm
    layer = _encoder_layer(W, audio.ffn_size) - W  # keys without bias
    return own + audio.num_layers * layer, W * model.hidden_size


def _encoder_layer(W: int, F: int) -> int:
    """Weights of a block of an encoder."""
    return 4 * (W * W + W) + (W * F + F) + (F * W + W) + 2 * 2 * W
