"""Generating text: one pass over the prompts fills a cache of keys and values, then each token costs one token.

Letters: B rows, S sequence, D width, V vocabulary, M tiles or windows of sound, P tokens of one.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model.cache import Cache
from sharding.errors import UserError
from trainer.memory import check_room, tree_bytes
from trainer.processes import wait_for_all
from trainer.sampling import Sampling, choose
from trainer.step import Params, Skeleton

SHORTEST = 64
"""Length of the shortest rows and caches. Longer ones are powers of two, so that few lengths are compiled."""


def bucket(length: int, shortest: int = SHORTEST) -> int:
    """The smallest power of two, `shortest` at least, that is no less than `length`."""
    return max(shortest, 1 << (length - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A document to continue."""

    tokens: np.ndarray
    """Token ids, image tokens included, [n]."""
    tiles: np.ndarray | None = None
    """Image tiles, uint8 [M, side, side, 3]; None without an image."""
    image_positions: np.ndarray | None = None
    """Position in `tokens` of each tile's patch tokens, [M, P]."""
    audio_frames: np.ndarray | None = None
    """Windows of sound, float32 [M, frames of a window, mel bins]; None without a sound."""
    audio_positions: np.ndarray | None = None
    """Position in `tokens` of each window's tokens, [M, P]; -1 where a sound has ended."""


def rows_of(prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Prompts as a batch: one a row, padded on the right to a length of few, and to numbers of tiles and windows of few."""
    B, S = len(prompts), bucket(max(len(prompt.tokens) for prompt in prompts))
    batch: dict[str, np.ndarray] = {name: np.zeros((B, S), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for b, prompt in enumerate(prompts):
        n = len(prompt.tokens)
        batch["tokens"][b, :n], batch["segment_ids"][b, :n], batch["positions"][b, :n] = prompt.tokens, 1, np.arange(n)
    tiles = [(prompt.tiles, prompt.image_positions) for prompt in prompts]
    windows = [(prompt.audio_frames, prompt.audio_positions) for prompt in prompts]
    return batch | _slots(tiles, "image_tiles", "image_positions") | _slots(windows, "audio_frames", "audio_positions")


def _slots(
    files: Sequence[tuple[np.ndarray | None, np.ndarray | None]], blocks_name: str, places_name: str
) -> dict[str, np.ndarray]:
    """Tiles or windows of each row, and where their tokens are; nothing if no row has any."""
    present = {
        b: (blocks, places)
        for b, (blocks, places) in enumerate(files)
        if blocks is not None and places is not None and len(blocks)
    }
    if not present:
        return {}
    B, M = len(files), bucket(max(len(blocks) for blocks, _ in present.values()), shortest=1)
    blocks, places = next(iter(present.values()))
    all_blocks = np.zeros((B, M, *blocks.shape[1:]), blocks.dtype)
    all_places = np.full((B, M, places.shape[1]), -1, np.int32)
    for b, (blocks, places) in present.items():
        all_blocks[b, : len(blocks)], all_places[b, : len(blocks)] = blocks, places
    return {blocks_name: all_blocks, places_name: all_places}


class Decoder:
    """A model ready to continue prompts. Each bucket of lengths is compiled once, for each number of prompts."""

    def __init__(self, skeleton: Skeleton, params: Params, router_bias: Params):
        self._skeleton = skeleton
        # Once: weights that are still in the host's memory would be sent again for every token. Others lie where they shall.
        self._weights = jax.tree.map(
            lambda w: w if isinstance(w, jax.Array) else jax.device_put(w), (params, router_bias)
        )
        sharding = jax.tree.leaves(self._weights)[0].sharding
        # Where weights are split over devices, tokens are for every process.
        self._everywhere = (
            NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
        )
        self._programs: dict[Any, Any] = {}

    def _first(self, batch: dict[str, np.ndarray], sampling: Sampling | None, length: int) -> Any:
        """The program that makes of such prompts a first token each, and a cache."""
        function = jax.jit(self._first_token, static_argnames="length", out_shardings=(self._everywhere, None))
        shapes = tuple((name, array.shape) for name, array in batch.items())
        key = shapes, jax.tree.structure(sampling), length
        return self._compiled(key, lambda: function.lower(self._weights, batch, sampling, length=length))

    def _next(self, tokens_B: jax.Array, cache: Cache, sampling: Sampling | None) -> Any:
        """The program that makes of tokens and such a cache the next ones, the cache staying where it is."""
        places = jax.tree.map(lambda array: array.sharding, cache)
        function = jax.jit(self._next_token, donate_argnames="cache", out_shardings=(self._everywhere, places))
        shapes = tuple((array.shape, array.sharding) for array in jax.tree.leaves(cache))
        key = shapes, jax.tree.structure(sampling)
        return self._compiled(key, lambda: function.lower(self._weights, tokens_B, cache, sampling))

    def _compiled(self, key: Any, lowered: Callable[[], Any]) -> Any:
        if key not in self._programs:
            self._programs[key] = lowered().compile()
            wait_for_all("compiled")
        return self._programs[key]

    def _first_token(
        self, weights: Any, batch: dict[str, jax.Array], sampling: Sampling | None, length: int
    ) -> tuple[jax.Array, Cache]:
        model = self._skeleton.model(*weights)
        hidden_BSD, cache = model.prefill(batch, length)
        last_BD = jnp.take_along_axis(hidden_BSD, (cache.lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return choose(model.logits(last_BD), cache.lengths_B, sampling), cache

    def _next_token(
        self, weights: Any, tokens_B: jax.Array, cache: Cache, sampling: Sampling | None
    ) -> tuple[jax.Array, Cache]:
        model = self._skeleton.model(*weights)
        hidden_BD, cache = model.decode(tokens_B, cache)
        return choose(model.logits(hidden_BD), cache.lengths_B, sampling), cache

    def stream(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int,
        temperature: float = 0.0,
        *,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> Iterator[np.ndarray]:
        """Yields one new token id per prompt at a time, int32 [B], up to `max_tokens` times.

        Args:
            prompts: one or more, of any lengths; ones with images or sounds next to ones without.
            max_tokens: new tokens of each prompt at most.
            temperature: 0 always takes the likeliest token.
            top_p: at a temperature above 0, draws from the fewest tokens whose probability reaches this.
            seed: of the draws. Those of a prompt depend on its number and its own tokens, not on the other prompts.
            stop: ids that end a row. It goes on to yield the id that ended it; once all rows have ended, so does this.

        Raises:
            UserError: a number outside its range, a prompt without tokens, or too little memory for so many tokens.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens: found {max_tokens}, expected 1 or more")
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature: found {temperature}, expected a number that is 0 or more")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p: found {top_p}, expected a number above 0 and up to 1")
        if not prompts or not all(len(prompt.tokens) for prompt in prompts):
            raise UserError("a prompt has no tokens; begin it with the tokenizer's begin-of-text token")
        sampling = None
        if temperature > 0:
            nucleus = jnp.float32(top_p) if top_p < 1 else None
            smallest = float(jnp.finfo(jnp.float32).tiny)
            sampling = Sampling(jax.random.key(seed), jnp.float32(max(temperature, smallest)), nucleus)
        length = bucket(max(len(prompt.tokens) for prompt in prompts) + max_tokens - 1)  # the last one is not read
        config = self._skeleton.config
        check_room(
            tree_bytes(self._weights) + len(prompts) * config.cache_bytes(length, jnp.dtype(config.dtype).itemsize),
            jax.local_devices()[0],
            f"weights, keys and values of {len(prompts)} row(s) of {length:,} tokens",
            "Ask for fewer tokens: a smaller max_tokens, a shorter prompt; at the end of a run, for none with "
            "--config.eval.questions=0 --allow-config-change.",
        )
        return self._tokens(prompts, max_tokens, sampling, np.array(sorted(stop), np.int32), length)

    def _tokens(
        self, prompts: Sequence[Prompt], max_tokens: int, sampling: Sampling | None, stop: np.ndarray, length: int
    ) -> Iterator[np.ndarray]:
        batch, following = rows_of(prompts), None
        tokens_B, cache = self._first(batch, sampling, length)(self._weights, batch, sampling)
        chosen_B, stopped_B = np.zeros(len(prompts), np.int32), np.zeros(len(prompts), bool)
        for count in range(max_tokens):
            if count:
                following = following or self._next(tokens_B, cache, sampling)
                tokens_B, cache = following(self._weights, tokens_B, cache, sampling)
            chosen_B = np.where(stopped_B, chosen_B, np.asarray(tokens_B))
            stopped_B = np.isin(chosen_B, stop)
            yield chosen_B
            if stopped_B.all():
                return
