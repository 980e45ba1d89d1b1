"""Typed options of a run: training, evaluation, checkpoints, and `RunConfig`, which holds every section."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from data.config import AudioSpec, DataConfig, ImageSpec, MediaSpec, VideoSpec
from data.mixture import names
from model.config import ModelConfig
from sharding.config import MeshConfig

Problem = tuple[str, str]

MOST_IDS = 2**16 - 1
"""Draws, or likeliest ids, of a token: as many as a record of targets counts (`data/target_records.py`)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, clipping and accumulation."""

    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset({"warmup_steps", "decay_steps"})

    peak_lr: float = 3e-4
    """Learning rate at the end of the warmup."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warmup: cosine to the final rate, stay and then decay linearly (warmup-stable-decay), or stay."""
    warmup_steps: int = 100
    """Steps of linear warmup from zero."""
    decay_steps: int = 0
    """Steps at the end of the run in which the rate falls: 1 or more with wsd, 0 with the other schedules."""
    final_lr_fraction: float = 0.1
    """Final learning rate, as a fraction of peak_lr."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only: not on norms, biases or position and class embeddings."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 never clips."""
    accumulate: int = 1
    """Micro-batches that a step is cut into; the gradient is that of the whole batch."""
    max_skipped: int = 10
    """Steps in a row whose loss or gradient is not finite (each is skipped) before the run stops."""

    def problems(self) -> Iterator[Problem]:
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            wanted = "1 or more" if self.schedule == "wsd" else "0"
            yield "decay_steps", f"found {self.decay_steps}, expected {wanted} with schedule={self.schedule!r}"
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                yield name, f"found {getattr(self, name)}, expected less than 1"


@dataclass(frozen=True)
class ObjectiveConfig:
    """Next-token loss and the router's auxiliary terms."""

    load_balance_coef: float = 0.01
    """Weight of the load-balance loss (arXiv 2101.03961), over all tokens of a micro-batch; 1.0 when balanced."""
    router_z_coef: float = 0.001
    """Weight of the router z-loss (arXiv 2202.08906): mean squared log-sum-exp of the router's logits."""
    block_tokens: int = 1024
    """Tokens whose logits exist at the same time in the vocabulary loss, forward and backward."""


@dataclass(frozen=True)
class DistillConfig:
    """What a student learns from a teacher, beside the next token."""

    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset({"draws", "top_k"})

    teacher: str = ""
    """Run directory, one of its checkpoints, or directory of Hugging Face Llama 4 safetensors: the teacher's weights.
    Where targets come from a cache they are not read, but a cache of another teacher is refused; empty takes any."""
    teacher_dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Type of the teacher's weights and of what it computes. int8: its layers' matrices are kept in 8 bits with a scale for
    each output, all else in bfloat16, in which it computes."""
    teacher_memory: Literal["device", "host"] = "device"
    """Where its layers' matrices are kept; from the memory of the host those of one super-block at a time come to the
    device."""
    source: Literal["mesh", "devices", "cache"] = "mesh"
    """Where targets come from. mesh: the teacher computes inside the student's step, on its mesh; devices: on a part of the
    devices that is its own (teacher_mesh), a batch ahead of the student; cache: it has computed before, and `drover teach` kept
    what it said."""
    teacher_mesh: MeshConfig | None = None
    """How the teacher's own devices are laid out, for source="devices": of those of each process it has the last ones, and
    `mesh` is of the others. One axis of one of the two meshes may be -1, and takes what the other mesh leaves."""
    cache: str = ""
    """Folder that `drover teach` wrote, for source="cache"."""
    missing: Literal["fail", "hard"] = "fail"
    """What happens to a segment that the cache lacks or that is damaged there: the run ends, or learns the next token alone
    from it, which is counted."""
    draws: int = 0
    """Draws from the teacher's distribution that are a token's target: their mean gradient is that of the whole distribution
    (arXiv 2503.16870). 0 for the whole distribution, which needs the teacher on the student's mesh."""
    proposal: float = 1.0
    """Draws come from the teacher's distribution to this power, 0.1 to 1, with importance weights; 1 draws from itself."""
    top_k: int = 0
    """Instead of draws: the likeliest ids and the mass of all others; a biased target. 0 for none."""
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    """KL of the teacher's distribution from the student's, of the student's from the teacher's, or the mean of both from
    their mean. Draws know the first alone."""
    temperature: float = 1.0
    """Both distributions are softmax(logits / temperature), and their divergence counts temperature squared times, so that
    its gradient keeps its size (arXiv 1503.02531)."""
    soft_weight: float = 0.5
    """Weight w of the divergence at the start; the next-token loss has 1 - w."""
    final_soft_weight: float | None = None
    """Weight of the divergence at the end of the run; None keeps soft_weight throughout."""
    soft_schedule: Literal["linear", "cosine"] = "linear"
    """How the weight goes from soft_weight to final_soft_weight."""
    adapt: Literal["none", "confidence", "correct", "gap"] = "none"
    """What the weight of a token is multiplied by. confidence: 1 - entropy of the teacher / log of the vocabulary; correct: 1
    where the teacher's likeliest token is the target, else 0; gap: p / (p + q) with the teacher's and the student's
    probability of the target. These rules are ours."""
    block_vocabulary: int = 4096
    """Token ids whose logits exist at the same time in the loss, forward and backward."""
    on_policy: float = 0.0
    """Share of the batches whose documents the student goes on with itself (arXiv 2306.13649): from what it has written it
    learns the divergence alone, with weight 1. Needs the teacher's whole distribution, on the mesh."""
    rollout_prompt: float = 0.5
    """Share of a document's targets, from its start, that stay in these batches; what is no target stays, too."""
    rollout_temperature: float = 1.0
    """The student writes with softmax(logits / rollout_temperature)."""

    @property
    def sparse(self) -> bool:
        """Whether a token's target is a few ids instead of the whole distribution."""
        return bool(self.draws or self.top_k)

    def problems(self) -> Iterator[Problem]:
        if not self.teacher and self.source != "cache":
            yield "teacher", "found nothing, expected a run directory, a checkpoint or a Hugging Face directory"
        if self.source != "cache" and self.cache:
            yield (
                "cache",
                f"found {self.cache!r} with source={self.source!r}, which reads none; expected source='cache', or nothing",
            )
        if self.source == "cache":
            if not self.cache:
                yield "cache", "found nothing, expected a folder that `drover teach` wrote, with source='cache'"
            if not self.sparse:
                yield (
                    "draws",
                    "found 0, as top_k is; expected 1 or more of one of them: a cache keeps no whole distribution",
                )
        if self.source == "devices":
            if self.teacher_mesh is None:
                yield "teacher_mesh", "found None, expected the sizes of the teacher's mesh, with source='devices'"
            if not self.sparse:
                yield (
                    "draws",
                    "found 0, as top_k is; expected 1 or more of one of them: from devices of its own the teacher would have "
                    "to send the whole distribution of every token to the student's",
                )
        if self.source != "devices" and self.teacher_mesh is not None:
            yield (
                "teacher_mesh",
                f"found sizes, expected None: with source={self.source!r} no teacher has devices of its own",
            )
        for name in ("draws", "top_k"):
            if getattr(self, name) > MOST_IDS:
                yield name, f"found {getattr(self, name)}, expected {MOST_IDS} or less, as many as a record counts"
        if self.draws and self.top_k:
            yield "top_k", f"found {self.top_k} beside draws={self.draws}, expected one of them to be 0"
        if self.sparse and self.divergence != "forward":
            yield (
                "divergence",
                f"found {self.divergence!r}, expected 'forward' with draws or top_k: the gradient of others is not linear in "
                "the teacher's distribution, so a few ids of it would bias them",
            )
        if self.proposal != 1 and not self.draws:
            yield "proposal", f"found {self.proposal}, expected 1 without draws"
        elif not 0.1 <= self.proposal <= 1:
            yield (
                "proposal",
                f"found {self.proposal}, expected 0.1 to 1: above 1 the weights of unlikely ids have no bound, and below 0.1 a "
                "cache may have no room for them",
            )
        if self.on_policy and self.source == "cache":
            yield (
                "on_policy",
                f"found {self.on_policy}, expected 0 with source='cache': a cache has what the teacher said of the data, not "
                "of what the student will write",
            )
        elif self.on_policy and self.sparse:
            yield (
                "on_policy",
                f"found {self.on_policy}, expected 0 with draws or top_k: their targets belong to the segments of the data",
            )
        if self.rollout_prompt == 1:
            yield "rollout_prompt", "found 1, expected less, or there is nothing to write"
        for name in ("temperature", "rollout_temperature"):
            if not getattr(self, name):
                yield name, "found 0, expected more than 0"
        for name in ("soft_weight", "final_soft_weight", "on_policy", "rollout_prompt"):
            if (getattr(self, name) or 0) > 1:
                yield name, f"found {getattr(self, name)}, expected 0 to 1"


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset({"keep_every"})

    every_steps: int = 200
    """Steps between checkpoints; the last step and an interrupted one are always saved."""
    keep_last: int = 2
    """Latest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for ever; 0 keeps none beyond keep_last."""


@dataclass(frozen=True)
class InitConfig:
    """Where a run that has no checkpoint of its own begins."""

    from_run: str = ""
    """Run directory or checkpoint whose weights to start from (optimizer and data start afresh)."""
    pretrained: str = ""
    """Directory of Hugging Face Llama 4 safetensors to start from."""
    layers: Literal["same", "pruned"] = "same"
    """pruned: those weights are of a deeper model, and some of its super-blocks (the repeated run of layers) are left out;
    all else about the two models is the same."""
    keep: tuple[int, ...] = ()
    """Super-blocks that stay with layers="pruned", counted from 0; empty for evenly spaced ones, first and last included."""

    def problems(self) -> Iterator[Problem]:
        if self.layers == "pruned" and not (self.from_run or self.pretrained):
            yield "layers", "found 'pruned', expected 'same' without from_run and pretrained: there is nothing to prune"
        if self.keep and self.layers != "pruned":
            yield "keep", f"found {self.keep}, expected nothing with layers={self.layers!r}"
        if list(self.keep) != sorted(set(self.keep)):
            yield "keep", f"found {self.keep}, expected each super-block once, in their order"


@dataclass(frozen=True)
class EvalConfig:
    """Held-out scores: the training objective in the loop, generated answers at the end."""

    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset({"questions"})

    every_steps: int = 100
    """Steps between evaluations of the objective on held-out data."""
    batches: int = 4
    """Held-out batches in each of them."""
    final_batches: int = 16
    """Held-out batches in the last one."""
    questions: int = 256
    """Questions asked at the end about each of scenes, clips and tones in the mixture, for each of: the real file, another
    question's and a blank one; 0 asks none."""


@dataclass(frozen=True)
class LogConfig:
    """What is written while it runs."""

    every_steps: int = 10
    """Steps between two lines of metrics."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset({"seed"})
    """Whole numbers that may be 0; all others, in every section, are at least 1."""

    name: str = "run"
    """Names the default run directory, runs/<name>."""
    steps: int = 1000
    """Optimizer steps."""
    seed: int = 0
    """Seed of the initial weights, and of what a student writes (distill.on_policy)."""
    compile_cache: str = "~/.cache/drover/xla"
    """Folder of jax's compilation cache, so that a second start compiles nothing; empty for none. Not used on several CPU
    devices, where programs from it hang (`trainer/runtime.py`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    distill: DistillConfig | None = None
    """Learning from a teacher; None for the next-token loss alone."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def image_spec(self) -> ImageSpec | None:
        """How pictures become tiles and tokens; None without a vision encoder."""
        vision, data = self.model.vision, self.data
        if vision is None:
            return None
        return ImageSpec(vision.image_size, vision.tokens_per_tile, data.max_tiles, data.resize_to_max_canvas)

    @property
    def audio_spec(self) -> AudioSpec | None:
        """How sound becomes windows and tokens; None without an audio encoder."""
        audio = self.model.audio
        return AudioSpec(audio.mel_bins, audio.window_frames, audio.tokens_per_window) if audio else None

    @property
    def media(self) -> MediaSpec:
        """How files of each kind become tokens."""
        return MediaSpec(self.image_spec, VideoSpec(self.data.video_fps, self.data.video_frames), self.audio_spec)

    def problems(self) -> Iterator[Problem]:
        """Conflicts between sections; each section names its own."""
        if not self.name or "/" in self.name or self.name.startswith("."):
            yield "name", f"found {self.name!r}, expected the name of a folder"
        if self.data.batch_size % self.optimizer.accumulate:
            yield (
                "optimizer.accumulate",
                f"found {self.optimizer.accumulate}, expected a divisor of data.batch_size={self.data.batch_size}",
            )
        if self.data.tokenizer == "bpe" and self.data.tokenizer_size > self.model.vocab_size:
            yield (
                "data.tokenizer_size",
                f"found {self.data.tokenizer_size}, expected at most model.vocab_size={self.model.vocab_size}",
            )
        part = self.data.sequence_length // self.data.row_parts
        if self.data.row_parts > 1 and part % self.model.chunk_size and any(k.rope for k in self.model.layer_kinds()):
            yield (
                "data.row_parts",
                f"found {self.data.row_parts}, parts of {part} tokens; expected parts of a multiple of "
                f"model.chunk_size={self.model.chunk_size}, or chunks would cross their edges",
            )
        if self.distill and self.distill.top_k > self.model.vocab_size:
            yield (
                "distill.top_k",
                f"found {self.distill.top_k}, expected at most model.vocab_size={self.model.vocab_size}",
            )
        if self.distill and self.distill.on_policy and self.model.temperature_from == "row":
            yield (
                "distill.on_policy",
                f"found {self.distill.on_policy}, expected 0 with model.temperature_from='row': what the student writes is "
                "decoded with positions of the document",
            )
        if self.distill and self.distill.source == "devices" and self.distill.teacher_mesh:
            ours, theirs = self.mesh.rest, self.distill.teacher_mesh.rest
            if ours and theirs:
                yield (
                    f"distill.teacher_mesh.{theirs[0]}",
                    f"found -1, expected a size: mesh.{ours[0]} is -1, and takes all devices that the teacher leaves",
                )
        for name, encoder in (("scenes", "vision"), ("clips", "vision"), ("tones", "audio")):
            if name in names(self.data) and getattr(self.model, encoder) is None:
                yield f"data.mixture.{name}", f"found a weight above zero, expected 0 when model.{encoder} is None"
        if self.optimizer.warmup_steps >= self.steps:
            yield (
                "optimizer.warmup_steps",
                f"found {self.optimizer.warmup_steps}, expected less than steps={self.steps}",
            )
        elif self.optimizer.decay_steps > self.steps - self.optimizer.warmup_steps:
            yield (
                "optimizer.decay_steps",
                f"found {self.optimizer.decay_steps}, expected at most {self.steps - self.optimizer.warmup_steps}, the "
                "steps that the warmup leaves: steps - optimizer.warmup_steps",
            )
