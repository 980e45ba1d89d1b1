"""Checkpoints: a snapshot of the moment, matched by name, explained when damaged."""

import dataclasses
import errno
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.config import DataConfig
from model.config import ModelConfig
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from tests.golden.goldens import SHIPPED
from tests.oracle_cases import TINY
from trainer.checkpoint import Checkpoints, locate
from trainer.config import CheckpointConfig, InitConfig, RunConfig
from trainer.hf.config import read_model_config
from trainer.initialise import abstract_state, initialise
from trainer.memory import check_memory
from trainer.step import Skeleton, TrainState, init_state

# TensorStore reports to an event loop that has ended.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def run_config(model: ModelConfig = TINY, **init: Any) -> RunConfig:
    return RunConfig(steps=200, model=model, data=DataConfig(batch_size=4), init=InitConfig(**init))


def same(a: TrainState, b: TrainState) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def filled(state: TrainState, value: float) -> TrainState:
    """Distinct values in every leaf."""
    leaves, structure = jax.tree.flatten(state)
    full = [jnp.full(leaf.shape, value + i).astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    return dataclasses.replace(jax.tree.unflatten(structure, full), step=jnp.int32(int(value)))


def save(folder: Path, state: TrainState, **config: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, CheckpointConfig(**config))
    checkpoints.save(state, METADATA)
    checkpoints.wait()
    return checkpoints


METADATA = {"data_digest": "abc", "source_digests": {"a": "1"}, "tokenizer_digest": "xyz"}


def shapes(run: RunConfig) -> TrainState:
    return abstract_state(run, Skeleton(run.model))


def test_a_save_is_a_snapshot_although_the_step_reuses_the_memory(tmp_path: Path) -> None:
    """The arrays are donated while the save still runs in the background."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    arrays = {str(i): jnp.full((1024, 1024), i, jnp.float32) for i in range(24)}
    state = TrainState(jnp.int32(3), arrays, {}, {}, jnp.int32(0), jnp.int32(0))
    expected, like = jax.device_get(state), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(state, {})
    for _ in range(5):
        arrays = overwrite(arrays)
    jax.block_until_ready(arrays)
    checkpoints.wait()
    assert same(checkpoints.restore(3, like), expected)


def test_leaves_are_matched_by_name_even_with_more_than_ten_layers(tmp_path: Path) -> None:
    model = dataclasses.replace(TINY, num_layers=12, nope_layer_step=12, moe_layer_step=12, router_bias_rate=0.1)
    like = shapes(run_config(model))
    state = filled(init_state(run_config(model)), 7)
    assert same(save(tmp_path, state).restore(7, like), state)


def test_weights_alone_are_read_without_the_rest(tmp_path: Path) -> None:
    state = filled(init_state(run_config()), 7)
    like = shapes(run_config())
    params, router_bias = save(tmp_path, state).restore_weights(7, like.params, like.router_bias)
    fresh = init_state(run_config())
    restored = dataclasses.replace(fresh, params=params, router_bias=router_bias)
    assert same(restored, dataclasses.replace(fresh, params=state.params, router_bias=state.router_bias))


def test_the_policy_keeps_the_latest_and_the_milestones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_every=20))
    state = init_state(run_config())
    for step in (10, 20, 30, 40, 50):
        checkpoints.save(dataclasses.replace(state, step=jnp.int32(step)), {})
        checkpoints.wait()
    assert sorted(checkpoints.manager.all_steps()) == [20, 40, 50]


def test_a_damaged_checkpoint_is_named_with_its_cure(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, filled(init_state(run_config()), 7))
    shutil.rmtree(tmp_path / "7" / "state" / "ocdbt.process_0")
    shutil.rmtree(tmp_path / "7" / "state" / "d")
    with pytest.raises(UserError, match=r"checkpoint .*/7: cannot be read") as caught:
        checkpoints.restore(7, shapes(run_config()))
    assert "delete that folder" in str(caught.value)


def test_weights_come_from_own_checkpoint_before_another_run_before_pretrained_before_scratch(tmp_path: Path) -> None:
    golden = next(path for path in SHIPPED if path.name == "text_scout")
    model = read_model_config(golden)
    other = filled(init_state(run_config(model)), 5)
    save(tmp_path / "other" / "checkpoints", other)
    own = Checkpoints(tmp_path / "own" / "checkpoints", CheckpointConfig())
    both = {"from_run": str(tmp_path / "other"), "pretrained": str(golden)}

    def start(tokenizer: str = "xyz", data: Any = METADATA, **init: Any) -> tuple[TrainState, str]:
        return initialise(run_config(model, **init), Skeleton(model), own, data, tokenizer)

    scratch, line = start()
    assert line == "scratch, seed 0"
    pretrained, line = start(pretrained=str(golden))
    assert line == f"pretrained weights of {golden}; its tokenizer is unknown"
    assert not np.allclose(pretrained.params["embed"], scratch.params["embed"])
    from_run, line = start(**both)
    assert line == f"weights of {tmp_path / 'other'}, step 5"
    assert np.array_equal(from_run.params["embed"], other.params["embed"])
    with pytest.raises(UserError, match="its tokens are those of tokenizer xyz, found another"):
        start(tokenizer="another", **both)
    own.save(filled(other, 9), METADATA)
    own.wait()
    resumed, line = start(**both)
    assert line == "own checkpoint, step 9"
    assert int(resumed.step) == 9
    start(data={"data_digest": "abc", "source_digests": {"a": "1", "b": "2"}}, **both)  # a source has come
    with pytest.raises(UserError, match=r"other data: of source a it has 1, found 2"):
        start(data={"data_digest": "abc", "source_digests": {"a": "2"}}, **both)
    with pytest.raises(UserError, match=r"other data: of the options of the data it has abc, found abd"):
        start(data={"data_digest": "abd", "source_digests": {"a": "1"}}, **both)


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_of_another_model_is_refused_by_its_shapes(tmp_path: Path, whole: bool) -> None:
    checkpoints = save(tmp_path, filled(init_state(run_config()), 7))
    wider = shapes(run_config(dataclasses.replace(TINY, hidden_size=14)))
    deeper = shapes(run_config(dataclasses.replace(TINY, num_layers=8)))

    def restore(step: int, like: TrainState) -> object:
        if whole:
            return checkpoints.restore(step, like)
        return checkpoints.restore_weights(step, like.params, like.router_bias)

    with pytest.raises(UserError, match=r"params\.blocks\.0\.attn\.k: found \(1, 12, 2, 6\), expected \(2, 12, 2, 6\)"):
        restore(7, deeper)
    with pytest.raises(UserError, match="holds another model") as caught:
        restore(7, wider)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("whole", [True, False])
def test_router_biases_that_the_model_has_no_place_for_are_not_dropped(tmp_path: Path, whole: bool) -> None:
    checkpoints = save(tmp_path, filled(init_state(run_config(dataclasses.replace(TINY, router_bias_rate=0.1))), 7))
    like = shapes(run_config(dataclasses.replace(TINY, router_bias_rate=0.0)))
    with pytest.raises(UserError, match=r"holds another model .*\n  router_bias\.\S+: found \(.*\), expected nothing"):
        checkpoints.restore(7, like) if whole else checkpoints.restore_weights(7, like.params, like.router_bias)


def test_too_little_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else a whole checkpoint would be deleted."""
    checkpoints = save(tmp_path, filled(init_state(run_config()), 7))
    for error, expected in (
        (MemoryError(), MemoryError),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), RuntimeError),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), UserError),
    ):
        raising = functools.partial(raise_, error)
        monkeypatch.setattr(checkpoints.manager, "restore", raising)
        with pytest.raises(expected) as caught:
            checkpoints.restore(7, shapes(run_config()))
        assert "delete" not in str(caught.value)


def raise_(error: Exception, *_: Any, **__: Any) -> None:
    raise error


def test_a_run_directory_may_be_named_by_its_date(tmp_path: Path) -> None:
    run = tmp_path / "20261122"
    for step in (3, 5):
        save(run / "checkpoints", filled(init_state(run_config()), step))
    assert locate(run) == (run / "checkpoints", 5)
    assert locate(run / "checkpoints" / "3") == (run / "checkpoints", 3)


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint found; expected a run directory"):
        locate(tmp_path)


def test_a_model_that_cannot_fit_is_refused_before_anything_is_allocated() -> None:
    run = run_config(ModelConfig())  # Scout
    with pytest.raises(UserError, match=r"need 1,6\d\d\.\d GiB, found .* a smaller model"):
        check_memory(shapes(run), DeviceMesh.alone())
