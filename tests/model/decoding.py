"""Teacher-forced decoding with a cache, for the tests: rows of documents, their prompts cut at every kind of place.

Letters: B rows, S sequence, D width, V vocabulary, M tiles, P patch tokens per tile, Z decoding steps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import AudioConfig, ModelConfig, VisionConfig
from tests import oracle
from tests.oracle_cases import FAST_COMPILE, bias_of_layers
from trainer.step import Skeleton

TOLERANCE = 1e-10
TOTAL = 17
PROMPTS = (8, 1, 4, 5, 6, 9, 10, 11)
"""Tokens of each row's prompt. The chunks of `oracle_cases.TINY` are 5 long: they end before, at and after a boundary."""


def float64(config: ModelConfig, **changes: Any) -> ModelConfig:
    config = dataclasses.replace(config, dtype="float64", param_dtype="float64", **changes)
    assert not list(config.problems())
    return config


def documents(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """One document of `TOTAL` tokens a row; with a vision encoder, the first three rows begin with 2, 0 and 1 tiles.

    With an audio encoder, the fourth begins with two windows of sound, the second of which is not full.
    """
    rng, shape = np.random.default_rng([seed, 3]), (len(PROMPTS), TOTAL)
    batch = {
        "tokens": rng.integers(0, config.vocab_size, shape).astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(TOTAL, dtype=np.int32), (len(PROMPTS), 1)),
    }
    batch |= _images(config.vision, rng) if config.vision else {}
    return batch | (_sound(config.audio, rng) if config.audio else {})


def _images(vision: VisionConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    P, side = vision.tokens_per_tile, vision.image_size
    positions = np.full((len(PROMPTS), 2, P), -1, np.int32)
    tiles = np.zeros((len(PROMPTS), 2, side, side, 3), np.uint8)
    for row, slot, start in ((0, 0, 0), (0, 1, P), (2, 1, 0)):
        positions[row, slot] = start + np.arange(P)
        tiles[row, slot] = rng.integers(0, 256, (side, side, 3))
    return {"image_tiles": tiles, "image_positions": positions}


def _sound(audio: AudioConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    P = audio.tokens_per_window
    positions = np.full((len(PROMPTS), 2, P), -1, np.int32)
    positions[3, 0], positions[3, 1, : P - 1] = np.arange(P), P + np.arange(P - 1)
    frames = rng.standard_normal((*positions.shape[:2], audio.window_frames, audio.mel_bins)).astype(np.float32)
    return {"audio_frames": frames, "audio_positions": positions}


def decoding(config: ModelConfig, steps: int) -> Callable[..., Any]:
    """(params, router_bias, documents, prompt lengths [B]) -> logits of the prompts [B,S,V], and decoded [Z,B,V].

    What follows a prompt is fed token by token, whatever the model thinks of it; while the prompt is read, the same
    tokens stand behind it as padding.
    """
    skeleton = Skeleton(config)

    def run(params: Any, router_bias: Any, batch: Any, lengths_B: jax.Array) -> Any:
        model = skeleton.model(params, router_bias)
        S = batch["tokens"].shape[1]
        inside_BS = jnp.arange(S) < lengths_B[:, None]
        padded = {"segment_ids": inside_BS.astype(jnp.int32), "positions": jnp.where(inside_BS, batch["positions"], 0)}
        hidden_BSD, cache = model.prefill({**batch, **padded}, S)

        def step(cache: Any, _: Any) -> Any:
            here_B = jnp.minimum(cache.lengths_B, S - 1)[:, None]
            hidden_BD, cache = model.decode(jnp.take_along_axis(batch["tokens"], here_B, axis=1)[:, 0], cache)
            return cache, model.logits(hidden_BD)

        _, decoded_ZBV = jax.lax.scan(step, cache, None, steps)
        return model.logits(hidden_BSD), decoded_ZBV

    return jax.jit(run, compiler_options=FAST_COMPILE)


def uncached(config: ModelConfig) -> Callable[..., jax.Array]:
    """(params, router_bias, batch) -> logits [B,S,V] of one forward pass."""
    skeleton = Skeleton(config)

    def run(params: Any, router_bias: Any, batch: Any) -> jax.Array:
        model = skeleton.model(params, router_bias)
        return model.logits(model(batch).hidden_BSD)

    return jax.jit(run, compiler_options=FAST_COMPILE)


def of_oracle(config: ModelConfig, params: Any, router_bias: Any, batch: Any) -> np.ndarray:
    """Logits of the oracle [B,S,V]; zeros at padding."""
    bias, (B, S) = bias_of_layers(config, router_bias), batch["tokens"].shape
    logits_BSV = np.zeros((B, S, config.vocab_size))
    for b, where, document in oracle.documents(batch):
        logits_BSV[b, where] = oracle.forward(params, document, config, bias).logits
    return logits_BSV


def compare(found: tuple[np.ndarray, np.ndarray], expected_BSV: np.ndarray, lengths_B: Sequence[int]) -> None:
    """Prompts and what was decoded after them, at every position of every row."""
    prompts_BSV, decoded_ZBV = found
    for b, length in enumerate(lengths_B):
        steps = expected_BSV.shape[1] - length
        row_SV = np.concatenate([prompts_BSV[b, :length], decoded_ZBV[:steps, b]])
        np.testing.assert_allclose(row_SV, expected_BSV[b], rtol=0, atol=TOLERANCE, err_msg=f"prompt of {length}")
