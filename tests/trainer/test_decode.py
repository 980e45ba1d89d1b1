"""The decoder: streams of tokens, stops, images, what is compiled; the model behind it is compared in `tests/model`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import AudioConfig, ModelConfig
from model.transformer import Transformer
from sharding.errors import UserError
from tests import micro
from tests.oracle_cases import random_bias, random_params
from trainer.decode import Decoder, Prompt, bucket
from trainer.sections import resolve
from trainer.step import Skeleton

CONFIG = dataclasses.replace(
    resolve(micro.get_config(), {}, "the test").model, chunk_size=24, temperature_floor=32.0, router_bias_rate=0.1
)
"""Chunks and a temperature that take effect within the shortest rows."""

TEXT = dataclasses.replace(CONFIG, vision=None, hidden_size=16, moe_layers=(1,), vocab_size=40)
"""Quick to compile."""


@functools.cache
def weights(config: ModelConfig) -> tuple[Skeleton, Any, Any]:
    return Skeleton(config), jax.device_put(random_params(config, 0)), jax.device_put(random_bias(config, 0))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(*weights(CONFIG))


@pytest.fixture(scope="module")
def text_decoder() -> Decoder:
    return Decoder(*weights(TEXT))


def text(length: int, seed: int = 0) -> Prompt:
    return Prompt(np.random.default_rng([seed, length]).integers(0, TEXT.vocab_size, length).astype(np.int32))


def picture(length: int, tiles: int, seed: int = 0) -> Prompt:
    assert CONFIG.vision
    P, side = CONFIG.vision.tokens_per_tile, CONFIG.vision.image_size
    places = 1 + np.arange(tiles * P).reshape(tiles, P)
    drawn = np.random.default_rng([seed, tiles]).integers(0, 256, (tiles, side, side, 3)).astype(np.uint8)
    return dataclasses.replace(text(length, seed), tiles=drawn, image_positions=places)


HEARING = dataclasses.replace(
    CONFIG, audio=AudioConfig(mel_bins=12, window_frames=32, hidden_size=16, num_layers=1, num_heads=2, ffn_size=24)
)
"""Sees and hears."""


def sound(length: int, tokens: int, prompt: Prompt | None = None) -> Prompt:
    """A prompt that ends with a sound of so many tokens, the last window in part."""
    assert HEARING.audio
    P = HEARING.audio.tokens_per_window
    windows = -(-tokens // P)
    places = np.full(windows * P, -1)
    places[:tokens] = length - tokens + np.arange(tokens)
    shape = (windows, HEARING.audio.window_frames, HEARING.audio.mel_bins)
    frames = np.random.default_rng([length, tokens]).normal(0, 1, shape).astype(np.float32)
    return dataclasses.replace(prompt or text(length), audio_frames=frames, audio_positions=places.reshape(windows, P))


PROMPTS = [text(5), picture(23, 3), text(24), picture(40, 1), text(25)]
TEXTS = [text(5), text(23), text(24), text(40)]


def collect(stream: Any) -> np.ndarray:
    """[B, tokens]."""
    return np.stack(list(stream), axis=1)


@functools.cache
def forward(config: ModelConfig) -> Any:
    skeleton, params, bias = weights(config)

    @jax.jit
    def logits(batch: Any) -> jax.Array:
        model = skeleton.model(params, bias)
        return model.logits(model(batch).hidden_BSD)

    return logits


def greedy_without_a_cache(prompt: Prompt, tokens: int, config: ModelConfig = CONFIG) -> list[int]:
    """The likeliest token after the whole document so far, again and again."""
    S, n, vision = 64, len(prompt.tokens), CONFIG.vision
    assert vision
    batch: dict[str, np.ndarray] = {name: np.zeros((1, S), np.int32) for name in ("tokens", "segment_ids")}
    batch["tokens"][0, :n], batch["positions"] = prompt.tokens, np.arange(S, dtype=np.int32)[None]
    batch["image_tiles"] = np.zeros((1, 3, vision.image_size, vision.image_size, 3), np.uint8)
    batch["image_positions"] = np.full((1, 3, vision.tokens_per_tile), -1, np.int32)
    for m in range(0 if prompt.tiles is None else len(prompt.tiles)):
        batch["image_tiles"][0, m], batch["image_positions"][0, m] = prompt.tiles[m], prompt.image_positions[m]  # pyright: ignore
    if audio := config.audio:
        batch["audio_frames"] = np.zeros((1, 3, audio.window_frames, audio.mel_bins), np.float32)
        batch["audio_positions"] = np.full((1, 3, audio.tokens_per_window), -1, np.int32)
    for m in range(0 if prompt.audio_frames is None else len(prompt.audio_frames)):
        batch["audio_frames"][0, m], batch["audio_positions"][0, m] = prompt.audio_frames[m], prompt.audio_positions[m]  # pyright: ignore
    for end in range(n, n + tokens):
        batch["segment_ids"][0, :end] = 1
        batch["tokens"][0, end] = np.argmax(forward(config)(batch)[0, end - 1])
    return batch["tokens"][0, n : n + tokens].tolist()


def test_the_likeliest_tokens_are_those_without_a_cache(decoder: Decoder) -> None:
    found = collect(decoder.stream(PROMPTS, 20))
    assert found.dtype == np.int32
    assert found.tolist() == [greedy_without_a_cache(prompt, 20) for prompt in PROMPTS]


def test_after_pictures_and_sounds_too_they_are_those_without_a_cache() -> None:
    prompts = [sound(30, 6), text(24), sound(40, 5, picture(40, 2)), picture(23, 3), sound(12, 9)]
    found = collect(Decoder(*weights(HEARING)).stream(prompts, 12))
    assert found.tolist() == [greedy_without_a_cache(prompt, 12, HEARING) for prompt in prompts]
    silent = dataclasses.replace(prompts[0], audio_frames=None, audio_positions=None)
    assert found[0].tolist() != greedy_without_a_cache(silent, 12, HEARING)


def test_a_row_does_not_depend_on_the_other_rows_nor_on_the_bucket(text_decoder: Decoder) -> None:
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    together = collect(text_decoder.stream(TEXTS, 20, **drawn))
    found = collect(text_decoder.stream([TEXTS[0], text(7), text(100), TEXTS[3], text(1)], 20, **drawn))
    np.testing.assert_array_equal(found[[0, 3]], together[[0, 3]])
    assert (found[1] != together[1]).any()


def test_draws_are_those_of_the_seed_and_differ_from_row_to_row(text_decoder: Decoder) -> None:
    same = [TEXTS[0]] * 4
    first, again, other = (collect(text_decoder.stream(same, 20, 1.0, seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_a_nucleus_of_one_token_and_a_temperature_near_zero_are_greedy(text_decoder: Decoder) -> None:
    greedy = collect(text_decoder.stream(TEXTS, 20))
    np.testing.assert_array_equal(collect(text_decoder.stream(TEXTS, 20, 1.0, top_p=1e-6)), greedy)
    np.testing.assert_array_equal(collect(text_decoder.stream(TEXTS, 20, 1e-300)), greedy)


def test_a_row_that_met_a_stop_id_goes_on_to_yield_it_and_the_last_one_ends_the_stream(decoder: Decoder) -> None:
    free = collect(decoder.stream(PROMPTS, 20))
    stop = {int(free[0, 4]), int(free[1, 9]), *free[2:, 6].tolist()}
    ends = [next(i for i, token in enumerate(row) if token in stop) for row in free.tolist()]
    found = collect(decoder.stream(PROMPTS, 20, stop=stop))
    assert found.shape[1] == max(ends) + 1 < 20
    for row, expected, end in zip(found, free, ends, strict=True):
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
        assert set(row[end:].tolist()) == {int(expected[end])}


def test_it_ends_after_max_tokens(decoder: Decoder) -> None:
    assert collect(decoder.stream(PROMPTS, 1)).shape == (5, 1)
    assert collect(decoder.stream(PROMPTS, 20, stop={CONFIG.vocab_size})).shape == (5, 20)


def test_a_bucket_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []
    for name in ("prefill", "decode"):
        original = getattr(Transformer, name)

        def counted(self: Any, *arguments: Any, name: str = name, original: Any = original) -> Any:
            traced.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(Transformer, name, counted)
    decoder = Decoder(*weights(dataclasses.replace(TEXT, num_layers=1, moe_layers=(), nope_layer_step=1)))

    def compiled(*arguments: Any, **options: Any) -> list[str]:
        traced.clear()
        for _ in decoder.stream(*arguments, **options):
            pass
        return traced

    assert compiled([text(5), text(30)], 9) == ["prefill", "decode"]
    assert compiled([text(50), text(1)], 15) == []  # 50 + 15 tokens, of which the last is not read: 64
    assert compiled([text(50), text(1)], 16) == ["prefill", "decode"]  # a longer cache
    assert compiled([text(64), text(2)], 64) == []
    assert compiled([text(65), text(2)], 30) == ["prefill"]  # longer rows
    assert compiled([text(5), text(30)], 9, 0.7) == ["prefill", "decode"]  # draws
    assert compiled([text(5), text(30)], 9, 1.3, seed=8) == []


def test_buckets_are_powers_of_two_from_the_shortest_on() -> None:
    assert [bucket(n) for n in (1, 64, 65, 128, 1000)] == [64, 64, 128, 128, 1024]
    assert [bucket(n, shortest=1) for n in (1, 2, 3, 17)] == [1, 2, 4, 32]


def test_each_step_gives_the_cache_away_so_that_there_is_never_a_second_one(text_decoder: Decoder) -> None:
    stream = text_decoder.stream(TEXTS, 20)
    next(stream)
    cache: Any = stream.gi_frame.f_locals["cache"]  # pyright: ignore[reportAttributeAccessIssue]
    next(stream)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache.layers))


@pytest.mark.parametrize(("options", "words"), [
    ({"max_tokens": 0}, "max_tokens: found 0"),
    ({"temperature": -1.0}, "temperature: found -1.0"),
    ({"temperature": float("nan")}, "temperature: found nan"),
    ({"top_p": 0.0}, "top_p: found 0.0"),
    ({"top_p": 1.5}, "top_p: found 1.5"),
    ({"prompts": [Prompt(np.zeros(0, np.int32))]}, "no tokens"),
    ({"prompts": []}, "no tokens"),
    ({"max_tokens": 10**11}, "5 row.s. of 137,438,953,472 tokens need"),
])  # fmt: skip
def test_what_cannot_be_decoded_is_refused_before_anything_runs(
    decoder: Decoder, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        decoder.stream(**({"prompts": PROMPTS, "max_tokens": 3} | options))


def test_weights_of_lower_precision_give_the_answers_of_the_same_weights_widened() -> None:
    skeleton, params, bias = weights(TEXT)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    found, expected = (collect(Decoder(skeleton, p, bias).stream(TEXTS, 20)) for p in (narrow, wide))
    np.testing.assert_array_equal(found, expected)


def test_a_model_that_computes_in_bfloat16_decodes() -> None:
    _, *arrays = weights(TEXT)
    narrow = Decoder(Skeleton(dataclasses.replace(TEXT, dtype="bfloat16")), *arrays)
    assert collect(narrow.stream([text(5)], 30, 1.0)).shape == (1, 30)
