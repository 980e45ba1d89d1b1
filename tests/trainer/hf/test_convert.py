"""Import and export: the same bytes both ways, through the commands; what is wrong is refused before anything is written."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from launch import cli
from model.config import AudioConfig
from sharding.errors import UserError
from tests.trainer.hf.checkpoints import GOLDEN, MODELS, tensors_of, write
from tests.trainer.saved_run import micro, save_run
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, InitConfig
from trainer.hf.config import read_model_config
from trainer.hf.exporter import export_checkpoint
from trainer.hf.importer import import_checkpoint
from trainer.hf.table import from_hf, to_hf
from trainer.initialise import initialise
from trainer.models import load_hf, load_run
from trainer.rundir import RunDirectory
from trainer.step import Skeleton

# TensorStore reports to an event loop that has ended.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.environment.prepare", lambda verbose: None)  # it changes the process for good


DATA = {"data_digest": "data", "source_digests": {}}


def drover(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def same_bytes(a: Path, b: Path) -> None:
    found, expected = tensors_of(a), tensors_of(b)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].tobytes() == tensor.tobytes(), name


def equal(a: object, b: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# The same bytes


@pytest.mark.parametrize("name", MODELS)
def test_import_then_export_gives_every_tensor_and_file_back(name: str, tmp_path: Path, capsys) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    assert drover("import", GOLDEN / name, run) == 0
    assert drover("export", run, again) == 0
    same_bytes(again, GOLDEN / name)
    assert (again / "config.json").read_bytes() == (GOLDEN / name / "config.json").read_bytes()
    assert sorted(path.name for path in again.iterdir()) == ["config.json", "model.safetensors"]
    assert "has no tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_every_precision_comes_back_from_shards(dtype: type, tmp_path: Path) -> None:
    source = GOLDEN / "text_maverick"
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors_of(source).items()}
    # One kind of tensor in another precision than the rest, as some checkpoints have their router.
    tensors |= {name: t.astype(np.float32) for name, t in tensors.items() if name.endswith("router.weight")}
    write(tmp_path / "hf", tensors, source, shards=3)
    import_checkpoint(tmp_path / "hf", tmp_path / "run", None, lambda _: None)
    done = export_checkpoint(tmp_path / "run", tmp_path / "again", None, 100_000, lambda _: None)
    assert done.tensors == len(tensors)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    same_bytes(tmp_path / "again", tmp_path / "hf")


def test_tied_embeddings_come_back_without_a_head(tmp_path: Path) -> None:
    source, hf = GOLDEN / "text_scout", tmp_path / "hf"
    tensors = tensors_of(source)
    del tensors["lm_head.weight"]
    write(hf, tensors, source)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    import_checkpoint(hf, tmp_path / "run", None, lambda _: None)
    export_checkpoint(tmp_path / "run", tmp_path / "again", None, 10**9, lambda _: None)
    same_bytes(tmp_path / "again", hf)


@pytest.mark.parametrize("changes", [{}, {"vision": None, "tie_embeddings": True, "dense_ffn_size": 40}])
def test_export_then_import_gives_the_run_back(changes: dict, tmp_path: Path, capsys) -> None:
    run = micro(**changes)
    if run.model.vision is None:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, mixture={"text": 1.0}))
    state = save_run(tmp_path / "run", run)
    assert drover("export", tmp_path / "run", tmp_path / "hf") == 0
    assert drover("import", tmp_path / "hf", tmp_path / "again") == 0
    assert capsys.readouterr().err == ""
    first, second = load_run(tmp_path / "run"), load_run(tmp_path / "again")
    equal(first.params, state.params)
    equal(second.params, state.params)
    assert second.tokenizer and first.tokenizer
    assert second.tokenizer.digest == first.tokenizer.digest
    assert second.run.image_spec == first.run.image_spec
    export_checkpoint(tmp_path / "again", tmp_path / "hf2", None, 10**9, lambda _: None)
    same_bytes(tmp_path / "hf2", tmp_path / "hf")
    for path in (tmp_path / "hf").iterdir():
        assert (tmp_path / "hf2" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_export_in_bfloat16_is_the_rounded_weights_and_says_so(tmp_path: Path) -> None:
    state = save_run(tmp_path / "run", micro())
    assert drover("export", tmp_path / "run", tmp_path / "hf", "--dtype", "bfloat16") == 0
    expected = to_hf(jax.device_get(state.params), micro().model)
    found = tensors_of(tmp_path / "hf")
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.astype(ml_dtypes.bfloat16), err_msg=name)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["torch_dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}
    # An imported model keeps its own config.json, in which the precision is changed as well.
    import_checkpoint(GOLDEN / "multimodal", tmp_path / "golden", None, lambda _: None)
    export_checkpoint(tmp_path / "golden", tmp_path / "hf2", "bfloat16", 10**9, lambda _: None)
    config = json.loads((tmp_path / "hf2" / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}


def test_what_was_trained_on_from_an_import_says_its_own_precision(tmp_path: Path) -> None:
    rounded = {name: t.astype(ml_dtypes.bfloat16) for name, t in tensors_of(GOLDEN / "text_scout").items()}
    source = write(tmp_path / "hf", rounded, GOLDEN / "text_scout")
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    import_checkpoint(source, tmp_path / "run", None, lambda _: None)
    checkpoints = Checkpoints(RunDirectory(tmp_path / "run").checkpoints, CheckpointConfig())
    run, metadata = checkpoints.run(0), checkpoints.metadata(0)
    del metadata["imported_from"]
    state, _ = initialise(run, Skeleton(run.model), checkpoints, DATA, "tokenizer")
    checkpoints.save(dataclasses.replace(state, step=state.step + 3), metadata)
    checkpoints.wait()
    export_checkpoint(tmp_path / "run", tmp_path / "trained", None, 10**9, lambda _: None)
    assert json.loads((tmp_path / "trained" / "config.json").read_text()) == config | {"dtype": "float32"}
    assert {tensor.dtype.name for tensor in tensors_of(tmp_path / "trained").values()} == {"float32"}
    export_checkpoint(tmp_path / "run" / "checkpoints" / "0", tmp_path / "first", None, 10**9, lambda _: None)
    assert (tmp_path / "first" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    same_bytes(tmp_path / "first", source)


def test_one_checkpoint_of_several_can_be_exported(tmp_path: Path) -> None:
    run = micro()
    state = save_run(tmp_path / "run", run)
    later = dataclasses.replace(state, step=state.step + 7, params=jax.tree.map(lambda p: p + 1, state.params))
    directory = RunDirectory(tmp_path / "run")
    metadata = Checkpoints(directory.checkpoints).metadata(0)
    with_both = Checkpoints(directory.checkpoints, CheckpointConfig(keep_last=2))
    with_both.save(later, metadata)
    with_both.wait()
    nothing: Callable[[str], None] = lambda _: None  # noqa: E731
    assert export_checkpoint(tmp_path / "run", tmp_path / "a", None, 10**9, nothing).step == 7
    assert export_checkpoint(tmp_path / "run" / "checkpoints" / "0", tmp_path / "b", None, 10**9, nothing).step == 0
    norm = "language_model.model.norm.weight"
    np.testing.assert_array_equal(tensors_of(tmp_path / "a")[norm], tensors_of(tmp_path / "b")[norm] + 1)


# What an imported model can be used for


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_same_from_the_run_and_from_the_directory(name: str, tmp_path: Path) -> None:
    """And are those that `tests/golden` compares with the stored answers of Hugging Face."""
    import_checkpoint(GOLDEN / name, tmp_path / "run", None, lambda _: None)
    imported = load_run(tmp_path / "run")
    equal(imported.params, load_hf(GOLDEN / name).params)
    equal(imported.params, from_hf(tensors_of(GOLDEN / name), read_model_config(GOLDEN / name)))
    assert imported.run.model == read_model_config(GOLDEN / name)


def test_a_run_starts_from_imported_weights_in_its_own_precision(tmp_path: Path) -> None:
    model = read_model_config(GOLDEN / "text_scout")
    rounded = {name: t.astype(ml_dtypes.bfloat16) for name, t in tensors_of(GOLDEN / "text_scout").items()}
    source = write(tmp_path / "hf", rounded, GOLDEN / "text_scout")
    run = dataclasses.replace(micro(), model=dataclasses.replace(model, router_bias_rate=0.1))
    import_checkpoint(source, tmp_path / "run", dataclasses.replace(run, model=model), lambda _: None)
    empty = Checkpoints(tmp_path / "new", CheckpointConfig())
    from_run = dataclasses.replace(run, init=InitConfig(from_run=str(tmp_path / "run")))
    from_hf = dataclasses.replace(run, init=InitConfig(pretrained=str(source)))
    own = Checkpoints(RunDirectory(tmp_path / "run").checkpoints)
    origins = []
    for config, checkpoints in ((from_run, empty), (from_hf, empty), (run, own)):
        state, origin = initialise(config, Skeleton(config.model), checkpoints, DATA, "tokenizer")
        origins.append(origin)
        again = to_hf(jax.device_get(state.params), model)
        for name, tensor in rounded.items():
            np.testing.assert_array_equal(again[name], tensor.astype(np.float32), err_msg=name)
        assert int(state.step) == 0
        equal(state.router_bias, jax.tree.map(np.zeros_like, state.router_bias))
        assert len(jax.tree.leaves(state.router_bias)) == len(model.super_block())
    assert origins == [
        f"weights of {tmp_path / 'run'}, step 0; its tokenizer is unknown; router biases from zero",
        f"pretrained weights of {source}; its tokenizer is unknown",
        f"weights imported from {source}; its tokenizer is unknown; router biases from zero",
    ]


def test_another_tokenizer_than_that_of_the_weights_is_refused(tmp_path: Path) -> None:
    run = micro()
    save_run(tmp_path / "run", run)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", None, 10**9, lambda _: None)
    import_checkpoint(tmp_path / "hf", tmp_path / "imported", None, lambda _: None)
    empty = Checkpoints(tmp_path / "new", CheckpointConfig())
    own = Checkpoints(RunDirectory(tmp_path / "imported").checkpoints)
    for init, checkpoints in (
        (InitConfig(from_run=str(tmp_path / "imported")), empty),
        (InitConfig(pretrained=str(tmp_path / "hf")), empty),
        (InitConfig(), own),
    ):
        with pytest.raises(UserError, match=r"found another\. Set data\.tokenizer to"):
            initialise(dataclasses.replace(run, init=init), Skeleton(run.model), checkpoints, DATA, "another")


def test_weights_fill_the_parts_that_devices_ask_for(tmp_path: Path) -> None:
    """The callback of each device reads its own slice."""
    found = load_hf(GOLDEN / "multimodal")
    abstract = Skeleton(found.run.model).abstract_params
    assert jax.tree.map(lambda a: a.shape, found.params) == jax.tree.map(lambda a: a.shape, abstract)
    assert all(leaf.is_fully_addressable for leaf in jax.tree.leaves(found.params))


# Refused, with nothing written


def broken(kind: str, directory: Path) -> str:
    """A directory that is wrong in one way, and what the message must name."""
    source = GOLDEN / "text_scout"
    tensors = tensors_of(source)
    norm, config = "model.norm.weight", json.loads((source / "config.json").read_text())
    if kind == "shape":
        tensors[norm] = tensors[norm][:-1].copy()
    elif kind == "unknown":
        tensors["model.layers.0.extra.weight"] = tensors[norm]
    elif kind == "missing":
        del tensors[norm]
    elif kind == "dtype":
        tensors[norm] = tensors[norm].astype(np.int32)
    elif kind == "feature":
        config["attention_bias"] = True
    write(directory, tensors, source, shards=2)
    (directory / "config.json").write_text(json.dumps(config))
    shard = directory / "model-00001-of-00002.safetensors"
    if kind == "shard":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif kind == "no config":
        (directory / "config.json").unlink()
    elif kind == "tokenizer":
        (directory / "tokenizer.json").write_text("{}")
    return {
        "shape": norm,
        "unknown": "left over model.layers.0.extra.weight",
        "missing": f"missing {norm}",
        "dtype": "found I32",
        "feature": "attention_bias",
        "shard": "model-00001-of-00002.safetensors",
        "truncated": "bytes are not all there",
        "no config": "config.json",
        "tokenizer": "tokenizer.json",
    }[kind]


@pytest.mark.parametrize(
    "kind", ["shape", "unknown", "missing", "dtype", "feature", "shard", "truncated", "no config", "tokenizer"]
)
def test_a_directory_that_is_wrong_is_refused_before_anything_is_written(kind: str, tmp_path: Path, capsys) -> None:
    named = broken(kind, tmp_path / "hf")
    assert drover("import", tmp_path / "hf", tmp_path / "run") == 2
    assert named in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_config_of_another_model_is_refused(tmp_path: Path, capsys) -> None:
    assert drover("import", GOLDEN / "multimodal", tmp_path / "run", "--config", "tests/micro.py") == 2
    message = capsys.readouterr().err
    assert "model.hidden_size: found 32, expected 48" in message
    assert not list(tmp_path.iterdir())


def test_a_config_of_another_tokenizer_is_refused(tmp_path: Path, capsys) -> None:
    """Before anything is copied: training would refuse it, and the run directory could not be mended."""
    save_run(tmp_path / "run", micro())
    assert drover("export", tmp_path / "run", tmp_path / "hf") == 0
    config = "--config", "tests/micro.py", "--config.data.tokenizer_size=300"
    capsys.readouterr()
    assert drover("import", tmp_path / "hf", tmp_path / "new", *config, "--config.data.tokenizer=bpe") == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'hf'}/tokenizer.json" in message and "Set data.tokenizer to the tokenizer.json" in message
    assert not (tmp_path / "new").exists()
    for n, same in enumerate(("bytes", tmp_path / "hf")):
        assert drover("import", tmp_path / "hf", tmp_path / str(n), *config, f"--config.data.tokenizer={same}") == 0


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "run", micro())
    write(tmp_path / "hf", tensors_of(GOLDEN / "text_scout"), GOLDEN / "text_scout")
    (tmp_path / "hf" / "tokenizer.json").write_text((tmp_path / "run" / "tokenizer.json").read_text())
    with pytest.raises(UserError, match=r"tokenizer.json: found ids up to 272, expected less than 256"):
        import_checkpoint(tmp_path / "hf", tmp_path / "new", None, lambda _: None)
    assert not (tmp_path / "new").exists()


def test_an_export_that_would_be_another_model_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "run", micro(router_bias_rate=0.01))
    with pytest.raises(UserError, match="has no such bias"):
        export_checkpoint(tmp_path / "run", tmp_path / "hf", None, 10**9, lambda _: None)
    narrow = dataclasses.replace(micro().model.vision, ffn_size=32)  # pyright: ignore[reportArgumentType]
    save_run(tmp_path / "narrow", micro(vision=narrow))
    with pytest.raises(UserError, match=r"model\.vision\.ffn_size=32.* = 64; it cannot hold another"):
        export_checkpoint(tmp_path / "narrow", tmp_path / "hf", None, 10**9, lambda _: None)
    save_run(tmp_path / "ears", micro(audio=AudioConfig(hidden_size=8, num_layers=1, num_heads=2, ffn_size=8)))
    with pytest.raises(UserError, match=r"has an audio encoder \(model\.audio\).* no place for one"):
        export_checkpoint(tmp_path / "ears", tmp_path / "hf", None, 10**9, lambda _: None)
    assert not (tmp_path / "hf").exists()


def test_an_export_of_what_is_no_run_or_not_whole_is_refused(tmp_path: Path, capsys) -> None:
    assert drover("export", tmp_path / "nothing", tmp_path / "hf") == 2
    assert "no checkpoint found" in capsys.readouterr().err
    save_run(tmp_path / "run", micro())
    (tmp_path / "run" / "checkpoints" / "0" / "state" / "_METADATA").unlink()
    assert drover("export", tmp_path / "run", tmp_path / "hf") == 2
    assert "found no arrays written by Orbax" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
