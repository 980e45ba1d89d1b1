"""Generating text: greedy or sampled, by running the whole row again for each token.

That is enough for short answers; a cache of keys and values would make long ones faster.
Letters: B rows, S sequence, M tiles, P patch tokens per tile, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.step import Params, Skeleton

ROW_MULTIPLE = 64
"""Rows are padded to a multiple of this, so that few lengths are compiled."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A document to continue."""

    tokens: np.ndarray
    """Token ids, image tokens included, [n]."""
    tiles: np.ndarray | None = None
    """Image tiles, uint8 [M, side, side, 3]; None without an image."""
    image_positions: np.ndarray | None = None
    """Position in `tokens` of each tile's patch tokens, [M, P]."""


class Decoder:
    """A model ready to continue prompts."""

    def __init__(self, skeleton: Skeleton, params: Params, router_bias: Params):
        self._skeleton, self._weights = skeleton, (params, router_bias)
        self._encode = jax.jit(lambda weights, batch: skeleton.model(*weights).encode_images(batch))
        self._logits = jax.jit(self._last_logits)

    def _last_logits(self, weights: Any, batch: dict[str, jax.Array], features: Any, last_B: jax.Array) -> jax.Array:
        model = self._skeleton.model(*weights)
        hidden_BSD = model(batch, features).hidden_BSD
        last_BD = jnp.take_along_axis(hidden_BSD, last_B[:, None, None], axis=1)[:, 0]
        return (last_BD @ model.head()).astype(jnp.float32)

    def _layout(self, prompts: Sequence[Prompt], max_tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Rows with room for the new tokens, and the length of each prompt, [B]."""
        lengths_B = np.array([len(prompt.tokens) for prompt in prompts])
        S = -(-(lengths_B.max() + max_tokens) // ROW_MULTIPLE) * ROW_MULTIPLE
        tokens_BS = np.zeros((len(prompts), S), np.int32)
        for row, prompt in zip(tokens_BS, prompts, strict=True):
            row[: len(prompt.tokens)] = prompt.tokens
        batch = {"tokens": tokens_BS, "positions": np.tile(np.arange(S, dtype=np.int32), (len(prompts), 1))}
        with_image = [prompt for prompt in prompts if prompt.tiles is not None and prompt.image_positions is not None]
        if with_image:
            M = max(len(prompt.tiles) for prompt in with_image)  # pyright: ignore[reportArgumentType]
            tile, places = with_image[0].tiles[0], with_image[0].image_positions[0]  # pyright: ignore
            batch["image_tiles"] = np.zeros((len(prompts), M, *tile.shape), np.uint8)
            batch["image_positions"] = np.full((len(prompts), M, len(places)), -1, np.int32)
            for i, prompt in enumerate(prompts):
                if prompt.tiles is not None and prompt.image_positions is not None:
                    batch["image_tiles"][i, : len(prompt.tiles)] = prompt.tiles
                    batch["image_positions"][i, : len(prompt.tiles)] = prompt.image_positions
        return batch, lengths_B

    def stream(
        self, prompts: Sequence[Prompt], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[np.ndarray]:
        """Yields one new token id per prompt at a time, [B]; temperature 0 takes the likeliest."""
        batch, lengths_B = self._layout(prompts, max_tokens)
        images = {name: batch.pop(name) for name in ("image_tiles", "image_positions") if name in batch}
        features = self._encode(self._weights, images) if images else None
        places = {name: images[name] for name in images if name == "image_positions"}
        generator, rows = np.random.default_rng(seed), np.arange(len(prompts))
        index = np.arange(batch["tokens"].shape[1])
        for count in range(max_tokens):
            end_B = lengths_B + count
            segment_ids = (index < end_B[:, None]).astype(np.int32)
            row = {**batch, **places, "segment_ids": segment_ids}
            logits_BV = np.asarray(self._logits(self._weights, row, features, end_B - 1))
            if temperature > 0:
                # The largest of logits / temperature + Gumbel noise is a draw from the softmax.
                logits_BV = logits_BV / temperature + generator.gumbel(size=logits_BV.shape)
            chosen_B = logits_BV.argmax(axis=1).astype(np.int32)
            batch["tokens"][rows, end_B] = chosen_B
            yield chosen_B
