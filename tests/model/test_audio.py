"""What sound may reach and what may reach it; that it is the oracle's, `test_against_oracle.py` shows."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.transformer import Transformer
from tests.oracle_cases import AUDIO, FAST_COMPILE, TINY, random_batch, random_params
from trainer.step import Skeleton

CONFIG = dataclasses.replace(TINY, num_layers=2, moe_layer_step=1, nope_layer_step=2, audio=AUDIO)
SEED = 3
Array = np.ndarray


@functools.cache
def inputs() -> tuple[Any, dict[str, Array]]:
    batch = random_batch(CONFIG, SEED)
    # Data has silence where nothing is used; here it is noise, which would show.
    assert (batch["audio_positions"] >= 0).any(axis=2).sum() > 2
    return random_params(CONFIG, SEED), batch


def compiled(function: Callable[[Transformer, Any], Any], config: ModelConfig = CONFIG) -> Callable[[Any, Any], Any]:
    skeleton = Skeleton(config)
    return jax.jit(lambda params, batch: function(skeleton.model(params, {}), batch), compiler_options=FAST_COMPILE)


@functools.cache
def hidden() -> Callable[[Any, Any], Any]:
    return compiled(lambda model, batch: model(batch).hidden_BSD)


@functools.cache
def features() -> Callable[[Any, Any], Any]:
    return compiled(lambda model, batch: model.encode_audio(batch))


def with_frames(batch: dict[str, Array], change: Callable[[Array, Array], None]) -> dict[str, Array]:
    """The batch, its frames changed in place by `change(frames, positions)`."""
    frames = batch["audio_frames"].copy()
    change(frames, batch["audio_positions"])
    return batch | {"audio_frames": frames}


def behind_the_last_used_token(frames: Array, positions: Array) -> None:
    for where in np.ndindex(positions.shape[:2]):
        frames[where][8 * (positions[where] >= 0).sum() :] = 100.0


def test_frames_behind_the_last_used_token_change_nothing() -> None:
    params, batch = inputs()
    changed = with_frames(batch, behind_the_last_used_token)
    used = batch["audio_positions"] >= 0
    found, expected = (np.asarray(features()(params, each)) for each in (changed, batch))
    assert not np.array_equal(found, expected), "unused tokens are features too, which nobody reads"
    np.testing.assert_array_equal(found[used], expected[used])
    np.testing.assert_array_equal(hidden()(params, changed), hidden()(params, batch))


def test_windows_without_a_used_token_have_no_features() -> None:
    params, batch = inputs()
    found, unused = features()(params, batch), (batch["audio_positions"] < 0).all(axis=2)
    assert unused.any()
    np.testing.assert_array_equal(np.asarray(found)[unused], 0)


def test_sound_is_heard_in_its_own_segment_and_not_before_it() -> None:
    params, batch = inputs()
    before = np.asarray(hidden()(params, batch))
    for b, m in zip(*np.nonzero((batch["audio_positions"] >= 0).any(axis=2)), strict=True):
        first = batch["audio_positions"][b, m, 0]
        own = batch["segment_ids"] == batch["segment_ids"][b, first]
        own &= (np.arange(len(own)) == b)[:, None] & (np.arange(own.shape[1]) >= first)

        def louder(frames: Array, positions: Array, at: Any = (b, m)) -> None:
            frames[at] *= 3

        after = np.asarray(hidden()(params, with_frames(batch, louder)))
        np.testing.assert_array_equal(after[~own], before[~own])
        assert (after[b, first] != before[b, first]).all()


@pytest.mark.parametrize(("windows_per_block", "computed"), [(2, False), (5, True)])
def test_a_block_of_unused_windows_is_not_computed(windows_per_block: int, computed: bool) -> None:
    """What is computed from NaN has gradients of NaN, even if nobody reads it."""
    config = dataclasses.replace(CONFIG, audio=dataclasses.replace(AUDIO, windows_per_block=windows_per_block))
    params, batch = inputs()
    positions = np.full((1, 5, AUDIO.tokens_per_window), -1, np.int32)
    positions[0, 1, :2], positions[0, 4, :1] = (2, 3), 5
    row = {name: array[:1] for name, array in batch.items()} | {"audio_positions": positions}

    def silent_unless_used(frames: Array, positions: Array) -> None:
        frames[(positions < 0).all(axis=2)] = np.nan

    gradient = compiled(lambda model, batch: nnx.grad(lambda m: jnp.sum(m.encode_audio(batch)[0, 1, 0]))(model), config)
    leaves = jax.tree.leaves(nnx.to_pure_dict(gradient(params, with_frames(row, silent_unless_used)))["audio"])
    assert any(np.isnan(leaf).any() for leaf in leaves) == computed


def test_the_loss_teaches_every_weight_of_the_encoder() -> None:
    params, batch = inputs()
    gradient = compiled(
        lambda model, batch: nnx.grad(lambda m: jnp.sum(m(batch).hidden_BSD ** 2 * jnp.arange(12)))(model)
    )
    found = nnx.to_pure_dict(gradient(params, batch))
    weights = {"audio": found["audio"], "audio_projector": found["audio_projector"]}
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        assert (np.asarray(leaf) != 0).any(), jax.tree_util.keystr(path)


def test_rows_without_room_for_sound_are_rows_without_sound() -> None:
    params, batch = inputs()
    text = {name: array for name, array in batch.items() if not name.startswith("audio_")}
    none = {name: batch[name][:, :0] for name in ("audio_frames", "audio_positions")}
    np.testing.assert_array_equal(hidden()(params, text | none), hidden()(params, text))


def test_an_audio_encoder_leaves_the_other_initial_weights_alone() -> None:
    def initial(config: ModelConfig) -> Any:
        return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(0)), nnx.Param))

    with_sound, without = (
        jax.jit(functools.partial(initial, config), compiler_options=FAST_COMPILE)()
        for config in (CONFIG, dataclasses.replace(CONFIG, audio=None))
    )
    jax.tree.map(np.testing.assert_array_equal, {name: with_sound[name] for name in without}, without)


@pytest.mark.parametrize(("name", "change"), [
    ("audio_frames", lambda frames: frames[:, :, :-1]),
    ("audio_frames", lambda frames: frames[..., :-1]),
    ("audio_frames", lambda frames: frames.astype(np.int32)),
    ("audio_positions", lambda positions: positions[:, :-1]),
])  # fmt: skip
def test_arrays_of_another_shape_or_type_are_refused(name: str, change: Any) -> None:
    params, batch = inputs()
    with pytest.raises(AssertionError):
        hidden()(params, batch | {name: change(batch[name])})


def test_sound_for_a_model_without_ears_is_refused() -> None:
    config = dataclasses.replace(CONFIG, audio=None)
    deaf = compiled(lambda model, batch: model(batch).hidden_BSD, config)
    with pytest.raises(AssertionError, match="the model has no audio encoder"):
        deaf(random_params(config, SEED), inputs()[1])
