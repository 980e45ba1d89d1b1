"""Small data for the tests of this folder, made once per test session."""

import dataclasses
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from data.config import DataConfig, ImageSpec, MediaSpec
from data.pipeline import Dataset, build_dataset
from tests.data import target_work
from tests.data.prepare_work import InProcess

IMAGE = ImageSpec(tile_size=32, tokens_per_tile=4, max_tiles=4)


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> DataConfig:
    return DataConfig(
        sequence_length=256,
        batch_size=3,
        tiles_per_row=5,
        tokenizer_size=600,
        scenes=600,
        window=32,
        workers=0,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )


@pytest.fixture(scope="session")
def image() -> ImageSpec:
    return IMAGE


@pytest.fixture(scope="session")
def media(image) -> MediaSpec:
    return MediaSpec(image)


@pytest.fixture(scope="session")
def dataset(config, media) -> Dataset:
    return build_dataset(config, media, "train")


@pytest.fixture(scope="session")
def scenes_only(config, media) -> Dataset:
    """Bytes for tokens, so that nothing has to be trained; quick to make again in another process."""
    small = dataclasses.replace(config, mixture={"scenes": 1.0}, tokenizer="bytes", sequence_length=512, scenes=100)
    return build_dataset(small, media, "train")


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A cache of targets that was written without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    target_work.write(folder)
    return folder


@pytest.fixture
def cache(whole, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


@pytest.fixture
def quick(monkeypatch) -> None:
    """`drover data prepare` works in this process."""
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", InProcess)


@pytest.fixture
def processes(monkeypatch) -> None:
    """It does not, after all."""
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", ProcessPoolExecutor)
