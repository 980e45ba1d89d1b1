"""The comparison with the oracle notices when an encoder is broken, or where its features go: each mutation must be caught."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import audio, encoder, transformer, vision
from tests.model.mutations import Mutation, Patch, check, half_split

# --------------------------------------------------------------------------------------------------------------- images


def slots_at(change: Callable[[jax.Array], jax.Array], medium: str = "image") -> Callable[[Patch], None]:
    """Replaces the positions of images or sound by `change(positions)`."""
    original = transformer.Transformer.embed_batch

    def embed_batch(self: Any, batch: Any, features: Any) -> jax.Array:
        name = f"{medium}_positions"
        return original(self, {**batch, name: change(batch[name])}, features)

    return lambda patch: patch.setattr(transformer.Transformer, "embed_batch", embed_batch)


def shifted_by_one(positions: jax.Array) -> jax.Array:
    return jnp.where(positions < 0, -1, positions + 1)


def unused_is_the_first(positions: jax.Array) -> jax.Array:
    return jnp.maximum(positions, 0)


def only_the_first_block(patch: Patch) -> None:
    original = encoder.encode_used

    def encode_used(encode: Any, weights: Any, items: Any, used: jax.Array, block: int) -> jax.Array:
        return original(encode, weights, items, used & (jnp.cumsum(used) <= block), block)

    patch.setattr(vision, "encode_used", encode_used)
    patch.setattr(audio, "encode_used", encode_used)


def features_of_the_next_tile(patch: Patch) -> None:
    original = transformer.encode_used_tiles
    patch.setattr(transformer, "encode_used_tiles", lambda *arguments: jnp.roll(original(*arguments), 1, axis=0))


def vision_rope_with(first: int, swapped: bool) -> Callable[[Patch], None]:
    def rope(config: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
        n, axis_dim = config.patches_per_side, config.hidden_size // config.num_heads // 2
        speeds = config.rope_theta ** (-np.arange(0, axis_dim, 2) / axis_dim)
        rows, columns = np.divmod(np.arange(n * n), n) + np.array(first)
        axes = (rows, columns) if swapped else (columns, rows)
        angles = np.concatenate([np.outer(axis, speeds) for axis in axes], axis=1)
        angles = np.concatenate([angles, np.zeros((1, angles.shape[1]))])[:, None]
        return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)

    return lambda patch: patch.setattr(vision, "vision_rope", rope)


vision_positions_from_zero = vision_rope_with(first=0, swapped=False)
vision_axes_swapped = vision_rope_with(first=1, swapped=True)


def vision_half_split_rope(patch: Patch) -> None:
    patch.setattr(vision, "rotate_pairs", half_split)


def tanh_gelu(patch: Patch) -> None:
    original = jax.nn.gelu
    patch.setattr(jax.nn, "gelu", lambda x, approximate: original(x, approximate=True))


def no_gelu_after_the_adapter(patch: Patch) -> None:
    def call(self: Any, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x @ self.fc1[...], approximate=False) @ self.fc2[...]

    patch.setattr(vision.Adapter, "__call__", call)


def pixel_shuffle_by_columns(patch: Patch) -> None:
    def shuffle(x: jax.Array, r: int) -> jax.Array:
        M, P, W = x.shape
        n = round(P**0.5) // r
        return x.reshape(M, n, r, n, r, W).transpose(0, 1, 3, 4, 2, 5).reshape(M, n * n, W * r * r)

    patch.setattr(vision, "pixel_shuffle", shuffle)


def channels_last_patches(patch: Patch) -> None:
    def patchify(tiles: jax.Array, size: int) -> jax.Array:
        M, side, _, channels = tiles.shape
        n = side // size
        return tiles.reshape(M, n, size, n, size, channels).transpose(0, 1, 3, 2, 4, 5).reshape(M, n * n, -1)

    patch.setattr(vision, "patchify", patchify)


def pixels_from_zero_to_one(patch: Patch) -> None:
    patch.setattr(vision, "normalize_tiles", lambda tiles, dtype: tiles.astype(dtype) / 255)


# ---------------------------------------------------------------------------------------------------------------- sound


def features_of_the_next_window(patch: Patch) -> None:
    original = transformer.encode_used_windows
    patch.setattr(transformer, "encode_used_windows", lambda *arguments: jnp.roll(original(*arguments), 1, axis=0))


def unused_tokens_attended_to(patch: Patch) -> None:
    original = audio.through
    patch.setattr(audio, "through", lambda blocks, x, config, seen_MP: original(blocks, x, config))


def inputs_with(offsets: tuple[int, ...]) -> Callable[[Patch], None]:
    """Replaces what output i of a convolution reads by inputs 2i + offset."""

    def taps(x: jax.Array) -> jax.Array:
        padded, outputs = jnp.pad(x, ((0, 0), (2, 2), (0, 0))), x.shape[1] // 2
        starts = [2 + offset for offset in offsets]
        return jnp.stack([padded[:, start : start + 2 * outputs : 2] for start in starts], axis=2)

    return lambda patch: patch.setattr(audio, "taps", taps)


convolutions_that_look_ahead = inputs_with((0, 1, 2))
convolutions_backwards = inputs_with((1, 0, -1))


def encoder_of_sound_with(gelus: int = 3, positions: bool = True, last_norm: bool = True) -> Callable[[Patch], None]:
    """The audio encoder, some of its parts left out."""

    def call(self: Any, frames: jax.Array, used: jax.Array) -> jax.Array:
        x, layers = frames.astype(jnp.float64), self.convolutions
        for i, layer in enumerate((layers.first, layers.second, layers.third)):
            x = layer(audio.taps(x), "mlti,tiw->mlw")
            x = jax.nn.gelu(x, approximate=False) if i < gelus else x
        x = x + self.pos_embed[...] if positions else x
        x = encoder.through(self.blocks, x, self.config, seen_MP=used)
        return self.post_norm(x) if last_norm else x

    return lambda patch: patch.setattr(audio.Audio, "__call__", call)


def sound_learns_nothing(patch: Patch) -> None:
    original = transformer.encode_used_windows
    patch.setattr(transformer, "encode_used_windows", lambda *given: jax.lax.stop_gradient(original(*given)))


# ------------------------------------------------------------------------------------------------------------- the test


MUTATIONS: dict[str, Mutation] = {
    "image slots shifted by one": Mutation("images", slots_at(shifted_by_one)),
    "an unused slot overwrites a token": Mutation("images", slots_at(unused_is_the_first)),
    "features of the next tile": Mutation("images", features_of_the_next_tile),
    "vision positions from 0": Mutation("images", vision_positions_from_zero),
    "vision rows and columns swapped": Mutation("images", vision_axes_swapped),
    "vision half-split RoPE": Mutation("images", vision_half_split_rope),
    "tanh GELU": Mutation("images", tanh_gelu),
    "no GELU after the adapter": Mutation("images", no_gelu_after_the_adapter),
    "pixel shuffle by columns": Mutation("images", pixel_shuffle_by_columns),
    "patches with channels last": Mutation("images", channels_last_patches),
    "pixels from 0 to 1": Mutation("images", pixels_from_zero_to_one),
    "only the first block of tiles": Mutation("images", only_the_first_block),
    "sound shifted by one": Mutation("sound", slots_at(shifted_by_one, "audio")),
    "an unused token of sound overwrites one": Mutation("sound", slots_at(unused_is_the_first, "audio")),
    "features of the next window": Mutation("sound", features_of_the_next_window),
    "only the first block of windows": Mutation("sound", only_the_first_block),
    "unused tokens of sound attended to": Mutation("sound", unused_tokens_attended_to),
    "convolutions that look ahead": Mutation("sound", convolutions_that_look_ahead),
    "convolutions backwards": Mutation("sound", convolutions_backwards),
    "no GELU after the last convolution": Mutation("sound", encoder_of_sound_with(gelus=2)),
    "sound without positions": Mutation("sound", encoder_of_sound_with(positions=False)),
    "sound without the last norm": Mutation("sound", encoder_of_sound_with(last_norm=False)),
    "sound learns nothing": Mutation("sound", sound_learns_nothing, gradient=True),
}


UNBROKEN: dict[str, Mutation] = {
    "image slots": Mutation("images", slots_at(lambda positions: positions)),
    "vision rope": Mutation("images", vision_rope_with(first=1, swapped=False)),
    "convolutions": Mutation("sound", inputs_with((-1, 0, 1))),
    "encoder of sound": Mutation("sound", encoder_of_sound_with()),
}
"""What builds the mutations, given the right formula: else a mutation might be caught for a mistake of its own."""


@pytest.mark.parametrize("name", UNBROKEN)
def test_what_builds_the_mutations_breaks_nothing_by_itself(name: str, monkeypatch: Patch) -> None:
    check(UNBROKEN[name], monkeypatch, caught=False)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name: str, monkeypatch: Patch) -> None:
    check(MUTATIONS[name], monkeypatch, caught=True)
