"""The second oracle: the whole model and objective again, slow and obvious, in float64 NumPy.

It shares no code with `model/` and no framework with it either: `autograd` differentiates plain NumPy, so there is no
tracing, no precision switch and no kernel to trust. Nothing is packed, padded, scanned, masked or batched: every
document is run alone, every query gathers the keys that it may see, every token visits its experts one at a time. The
formulas are those of transformers' `models/llama4`, whose stored answers it reproduces (`tests/golden/test_oracle.py`).

Legend: S tokens of the one document, D width, N query heads, K kv heads, H head width, F ffn width, E experts,
V vocabulary, M tiles or windows of sound, P patches per tile or tokens per window, W encoder width, C chunk.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import autograd
import autograd.numpy
import numpy
from autograd.scipy.special import erf
from autograd.tracer import getval

from model.config import AudioConfig, ModelConfig, VisionConfig

Tree = dict[Any, Any]

np: Any = autograd.numpy
"""NumPy that can be differentiated; `numpy` is the plain one, for what needs no gradient."""
value_and_grad: Any = autograd.value_and_grad


@dataclasses.dataclass(frozen=True)
class Document:
    """One document, alone."""

    tokens: numpy.ndarray
    """[S]."""
    tiles: numpy.ndarray = dataclasses.field(default_factory=lambda: numpy.zeros((0, 0, 0, 3)))
    """[M, side, side, 3], from -1 to 1."""
    slots: numpy.ndarray = dataclasses.field(default_factory=lambda: numpy.zeros((0, 0), int))
    """[M, tokens per tile]: the position in the document that each patch token of each tile replaces."""
    windows: numpy.ndarray = dataclasses.field(default_factory=lambda: numpy.zeros((0, 0, 0)))
    """[M, frames, mel bins]: log-mel windows of sound."""
    sound_slots: numpy.ndarray = dataclasses.field(default_factory=lambda: numpy.zeros((0, 0), int))
    """[M, tokens per window]: the position in the document that each token of each window replaces, -1 if unused."""
    start: int = 0
    """Where in its row it stood; read only where the temperature counts from there."""


@dataclasses.dataclass(frozen=True)
class Stages:
    """Everything that a forward pass goes through."""

    logits: Any
    """[S, V]."""
    hidden: list[Any]
    """[S, D]: the input of layer 0, then the output of every layer, before the final norm."""
    router_logits: dict[int, Any]
    """[S, E] of every mixture-of-experts layer."""
    choices: dict[int, numpy.ndarray]
    """[S, top-k]: the experts that each token visits, in every such layer."""
    vision: dict[str, Any]
    """encoder_out [M, P+1, W], adapter_out [M, tokens per tile, A], projected [M, tokens per tile, D]."""


def forward(
    params: Tree, document: Document, config: ModelConfig, router_bias: Mapping[int, Any] | None = None
) -> Stages:
    """The model on one document. `params` is our layout; `router_bias` maps layers to [E] (aux-loss-free balance)."""
    x = params["embed"][document.tokens]
    vision: dict[str, Any] = {}
    feature_of: dict[int, Any] = {}
    if len(document.tiles):
        assert config.vision
        vision = encode_tiles(params, document.tiles, config.vision)
        for features, positions in zip(vision["projected"], document.slots, strict=True):
            feature_of |= {int(position): feature for position, feature in zip(positions, features, strict=True)}
    for window, positions in zip(document.windows, document.sound_slots, strict=True):
        assert config.audio
        features = encode_window(params["audio"], window, positions >= 0, config.audio) @ params["audio_projector"]
        feature_of |= {int(position): features[i] for i, position in enumerate(positions[positions >= 0])}
    if feature_of:
        x = np.stack([feature_of.get(s, x[s]) for s in range(len(document.tokens))])
    hidden, router_logits, choices = [x], {}, {}
    for i, kind in enumerate(config.layer_kinds()):
        layer = layer_of(params["blocks"], i, len(config.super_block()))
        x = x + attention(rms(x, config.norm_eps) * layer["attn_norm"], layer["attn"], kind.rope, document, config)
        h = rms(x, config.norm_eps) * layer["ffn_norm"]
        if kind.moe:
            bias = None if router_bias is None else router_bias[i]
            out, router_logits[i], choices[i] = mixture_of_experts(h, layer["ffn"], config, bias)
        else:
            out = swiglu(h, layer["ffn"])
        x = x + out
        hidden.append(x)
    head = params["embed"].T if config.tie_embeddings else params["lm_head"]
    logits = (rms(x, config.norm_eps) * params["final_norm"]) @ head
    return Stages(logits, hidden, router_logits, choices, vision)


def layer_of(blocks: Any, i: int, period: int) -> Any:
    """The weights of decoder layer i: repeat i // period of member i % period of the super-block."""

    def pick(tree: Any) -> Any:
        return {key: pick(value) for key, value in tree.items()} if hasattr(tree, "items") else tree[i // period]

    return pick(blocks[i % period])


def rms(x: Any, eps: float) -> Any:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def softmax(x: Any) -> Any:
    e = np.exp(x - numpy.max(getval(x), axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def logsumexp(x: Any) -> Any:
    shift = numpy.max(getval(x), axis=-1, keepdims=True)
    return np.log(np.sum(np.exp(x - shift), axis=-1)) + shift[..., 0]


def swiglu(x: Any, weights: Any) -> Any:
    gate = x @ weights["gate"]
    return (gate * sigmoid(gate) * (x @ weights["up"])) @ weights["down"]


def frequencies(config: ModelConfig) -> numpy.ndarray:
    """Angle per position of each pair, [H/2], with Llama 3's stretching of long wavelengths."""
    result = []
    for j in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * j / config.head_dim)
        scaling = config.rope_scaling
        if scaling is not None:
            turns = scaling.original_length * frequency / (2 * numpy.pi)
            if turns < scaling.low_freq_factor:
                frequency /= scaling.factor
            elif turns <= scaling.high_freq_factor and scaling.high_freq_factor > scaling.low_freq_factor:
                t = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
                frequency *= (1 - t) / scaling.factor + t
        result.append(frequency)
    return numpy.array(result)


def rotate(x: Any, angles: numpy.ndarray) -> Any:
    """Multiplies the complex numbers x[..., 2j] + i x[..., 2j+1] by e^(i angle); x [S, heads, H], angles [S, H/2]."""
    cos, sin = numpy.cos(angles)[:, None], numpy.sin(angles)[:, None]
    real, imaginary = x[..., 0::2], x[..., 1::2]
    return np.reshape(np.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1), x.shape)


def attention(x: Any, weights: Any, rope: bool, document: Document, config: ModelConfig) -> Any:
    S, N = x.shape[0], config.num_heads
    q, k, v = (np.einsum("sd,dnh->snh", x, weights[name]) for name in "qkv")
    positions = numpy.arange(S)
    if rope:
        angles = positions[:, None] * frequencies(config)
        q, k = rotate(q, angles), rotate(k, angles)
        if config.qk_norm:
            q, k = rms(q, config.norm_eps), rms(k, config.norm_eps)
    elif config.temperature_tuning:
        p = positions + (document.start if config.temperature_from == "row" else 0)
        scale = 1 + config.temperature_scale * numpy.log(1 + numpy.floor((p + 1) / config.temperature_floor))
        q = q * scale[:, None, None]
    shared = [n // (N // config.num_kv_heads) for n in range(N)]
    k, v = k[:, shared], v[:, shared]
    outputs = []
    for s in range(S):
        first = s - s % config.chunk_size if rope else 0
        scores = np.einsum("nh,tnh->nt", q[s], k[first : s + 1]) / numpy.sqrt(config.head_dim)
        outputs.append(np.einsum("nt,tnh->nh", softmax(scores), v[first : s + 1]))
    return np.einsum("snh,nhd->sd", np.stack(outputs), weights["o"])


def mixture_of_experts(x: Any, weights: Any, config: ModelConfig, bias: Any) -> tuple[Any, Any, numpy.ndarray]:
    """Output [S, D], router logits [S, E] and the experts of each token [S, top-k]."""
    logits = x @ weights["router"]
    scores = sigmoid(logits)
    preference = getval(logits) if bias is None else getval(scores) + bias
    choices = numpy.argsort(-preference, axis=-1, kind="stable")[:, : config.experts_per_token]
    experts = [{name: w[e] for name, w in weights["experts"].items()} for e in range(config.num_experts)]
    outputs = []
    for s in range(x.shape[0]):
        out = swiglu(x[s], weights["shared"])
        for e in choices[s]:
            out = out + swiglu(scores[s, e] * x[s], experts[e])  # the score is on the input
        outputs.append(out)
    return np.stack(outputs), logits, choices


# --------------------------------------------------------------------------------------------------------------- vision


def encode_tiles(params: Tree, tiles: numpy.ndarray, config: VisionConfig) -> dict[str, Any]:
    """Every stage of the vision encoder, tile after tile."""
    encoded, adapted = [], []
    for tile in tiles:
        x = encode_tile(params["vision"], tile, config)
        encoded.append(x)
        patches = layer_norm(x, params["vision"]["post_norm"])[:-1]
        tokens = pixel_shuffle(patches, config)
        for name in ("fc1", "fc2"):
            tokens = gelu(tokens @ params["vision"]["adapter"][name])
        adapted.append(tokens)
    adapter_out = np.stack(adapted)
    return {
        "encoder_out": np.stack(encoded),
        "adapter_out": adapter_out,
        "projected": adapter_out @ params["projector"],
    }


def encode_tile(params: Any, tile: numpy.ndarray, config: VisionConfig) -> Any:
    """[side, side, 3] -> [P+1, W], the class token last, before the final norm."""
    n, side = config.patches_per_side, config.patch_size
    pixels = []
    for row in range(n):
        for column in range(n):
            patch = tile[row * side : (row + 1) * side, column * side : (column + 1) * side]
            pixels.append(numpy.transpose(patch, (2, 0, 1)).reshape(-1))  # channel, then row, then column
    x = np.concatenate([np.stack(pixels) @ params["patch_embed"], params["class_embed"][None]])
    x = layer_norm(x + params["pos_embed"], params["pre_norm"])
    angles = vision_angles(config)
    for i in range(config.num_layers):
        x = encoder_block(x, layer_of({0: params["blocks"]}, i, 1), angles)
    return x


def vision_angles(config: VisionConfig) -> numpy.ndarray:
    """[P+1, H/2]: half of the pairs turn by the column, half by the row, both counted from 1; the class token by 0."""
    n, axis_dim = config.patches_per_side, config.hidden_size // config.num_heads // 2
    speeds = [config.rope_theta ** (-2 * j / axis_dim) for j in range(axis_dim // 2)]
    angles = [
        [(column + 1) * speed for speed in speeds] + [(row + 1) * speed for speed in speeds]
        for row in range(n)
        for column in range(n)
    ]
    return numpy.array([*angles, [0.0] * (2 * len(speeds))])


def encoder_block(x: Any, weights: Any, angles: numpy.ndarray | None = None) -> Any:
    h = layer_norm(x, weights["attn_norm"])
    q, k, v = (np.einsum("pw,wnh->pnh", h, weights[name]["kernel"]) + weights[name].get("bias", 0) for name in "qkv")
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    scores = np.einsum("pnh,rnh->npr", q, k) / numpy.sqrt(q.shape[-1])
    heads = np.einsum("npr,rnh->pnh", softmax(scores), v)
    x = x + np.einsum("pnh,nhw->pw", heads, weights["o"]["kernel"]) + weights["o"]["bias"]
    h = gelu(layer_norm(x, weights["ffn_norm"]) @ weights["fc1"]["kernel"] + weights["fc1"]["bias"])
    return x + h @ weights["fc2"]["kernel"] + weights["fc2"]["bias"]


def layer_norm(x: Any, weights: Any, eps: float = 1e-5) -> Any:
    centred = x - np.mean(x, axis=-1, keepdims=True)
    return rms(centred, eps) * weights["scale"] + weights["bias"]


def gelu(x: Any) -> Any:
    return x * (1 + erf(x / numpy.sqrt(2))) / 2


def pixel_shuffle(x: Any, config: VisionConfig) -> Any:
    """[P, W] -> [tokens per tile, W r^2]: each square of r x r neighbours, row-major, becomes one token."""
    n, r = config.patches_per_side, config.shuffle
    return np.stack(
        [
            np.concatenate([x[(i + a) * n + (j + b)] for a in range(r) for b in range(r)])
            for i in range(0, n, r)
            for j in range(0, n, r)
        ]
    )


# ---------------------------------------------------------------------------------------------------------------- audio


def encode_window(params: Any, frames: numpy.ndarray, used: numpy.ndarray, config: AudioConfig) -> Any:
    """[frames, mel bins] -> [used tokens, W]. What is not used does not exist: neither its frames nor its token."""
    count = int(numpy.flatnonzero(used)[-1]) + 1
    x = frames[: count * config.window_frames // config.tokens_per_window]
    for name in ("first", "second", "third"):
        x = gelu(convolution(x, params["convolutions"][name]))
    x = (x + params["pos_embed"][:count])[numpy.flatnonzero(used)]
    for i in range(config.num_layers):
        x = encoder_block(x, layer_of({0: params["blocks"]}, i, 1))
    return layer_norm(x, params["post_norm"])


def convolution(x: Any, weights: Any) -> Any:
    """[L, I] -> [L/2, W]: output i is made of inputs 2i - 1, 2i and 2i + 1, of those that there are."""
    outputs = []
    for i in range(len(x) // 2):
        near = [(tap, 2 * i + tap - 1) for tap in range(3) if 2 * i + tap - 1 >= 0]
        outputs.append(sum(x[at] @ weights["kernel"][tap] for tap, at in near) + weights["bias"])
    return np.stack(outputs)


# ------------------------------------------------------------------------------------------------------------ objective


def documents(batch: Mapping[str, numpy.ndarray]) -> Iterator[tuple[int, slice, Document]]:
    """Every segment of a packed batch: its row, where in the row it is, and what is there as a document of its own."""
    for b in range(batch["tokens"].shape[0]):
        segments = batch["segment_ids"][b]
        for segment in range(1, int(segments.max()) + 1):
            where = numpy.flatnonzero(segments == segment)
            start, stop = int(where[0]), int(where[0]) + len(where)
            assert where.tolist() == list(range(start, stop)), "a segment is contiguous"
            assert batch["positions"][b, where].tolist() == list(range(len(where))), "positions restart in each segment"
            document = Document(batch["tokens"][b, where], start=start)
            if "image_tiles" in batch:
                inside = numpy.isin(batch["image_positions"][b], where).all(axis=-1)
                tiles = batch["image_tiles"][b][inside]
                tiles = tiles / 127.5 - 1 if tiles.dtype == numpy.uint8 else tiles.astype(numpy.float64)
                slots = batch["image_positions"][b][inside] - start
                document = dataclasses.replace(document, tiles=tiles, slots=slots)
            if "audio_frames" in batch:
                positions = batch["audio_positions"][b]
                inside = numpy.isin(positions, where).any(axis=-1)
                assert numpy.isin(positions[inside], numpy.append(where, -1)).all(), "a window belongs to one segment"
                windows = batch["audio_frames"][b][inside].astype(numpy.float64)
                slots = numpy.where(positions < 0, -1, positions - start)[inside]
                document = dataclasses.replace(document, windows=windows, sound_slots=slots)
            yield b, slice(start, stop), document


def objective(
    params: Tree,
    batch: Mapping[str, numpy.ndarray],
    config: ModelConfig,
    load_balance_coef: float,
    router_z_coef: float,
    micro_batches: int = 1,
    router_bias: Mapping[int, Any] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """What a training step minimises, and its parts.

    Weighted mean of the next-token losses over the whole batch, plus, averaged over the micro-batches (consecutive
    rows), the load-balance loss (arXiv 2101.03961) and the router z-loss (arXiv 2202.08906) over the micro-batch's
    tokens, each averaged over the mixture-of-experts layers. The parts also hold the assignments to each expert of
    each such layer (`counts`) and, of each source, the weighted sum of losses and the weight (`per_source`).
    """
    weights_total = float(numpy.sum(batch["loss_weights"], dtype=numpy.float64))
    rows = batch["tokens"].shape[0] // micro_batches
    nll_sum = balance = z = 0.0
    per_source: dict[int, list[float]] = {}
    counts = {i: numpy.zeros(config.num_experts) for i, kind in enumerate(config.layer_kinds()) if kind.moe}
    for m in range(micro_batches):
        part = {name: value[m * rows : (m + 1) * rows] for name, value in batch.items()}
        logits: dict[int, list[Any]] = {}
        choices: dict[int, list[numpy.ndarray]] = {}
        for b, where, document in documents(part):
            stages = forward(params, document, config, router_bias)
            targets, weights, sources = (part[name][b, where] for name in ("targets", "loss_weights", "source_ids"))
            for s in numpy.flatnonzero(weights):
                weight = float(weights[s])
                nll = logsumexp(stages.logits[s]) - stages.logits[s, targets[s]]
                nll_sum = nll_sum + weight * nll
                tally = per_source.setdefault(int(sources[s]), [0.0, 0.0])
                tally[0] += weight * float(getval(nll))
                tally[1] += weight
            for i, layer_logits in stages.router_logits.items():
                logits.setdefault(i, []).append(layer_logits)
                choices.setdefault(i, []).append(stages.choices[i])
        for i, of_documents in logits.items():
            all_logits, all_choices = np.concatenate(of_documents), numpy.concatenate(choices[i])
            tokens = all_logits.shape[0]
            count = numpy.bincount(all_choices.reshape(-1), minlength=config.num_experts)
            counts[i] += count
            share = count / (config.experts_per_token * tokens)
            probability = np.mean(softmax(all_logits), axis=0)
            balance = balance + config.num_experts * np.sum(share * probability) / len(logits) / micro_batches
            z = z + np.mean(logsumexp(all_logits) ** 2) / len(logits) / micro_batches
    loss = nll_sum / weights_total
    parts = {"loss": loss, "load_balance": balance, "router_z": z, "counts": counts, "per_source": per_source}
    return loss + load_balance_coef * balance + router_z_coef * z, parts


def objective_and_gradient(params: Tree, *arguments: Any, **options: Any) -> tuple[float, dict[str, Any], Tree]:
    """The objective, its parts and its gradient for every parameter, all float64."""
    kept: dict[str, Any] = {}

    def total(params: Tree) -> Any:
        value, parts = objective(params, *arguments, **options)
        kept.update({name: getval(part) for name, part in parts.items()})
        return value

    value, gradient = value_and_grad(total)(as_float64(params))
    return float(value), kept, gradient


def as_float64(params: Any) -> Any:
    return map_leaves(lambda leaf: numpy.asarray(leaf, numpy.float64), params)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    return {k: map_leaves(function, v) for k, v in tree.items()} if isinstance(tree, dict) else function(tree)
