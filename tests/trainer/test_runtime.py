"""What a run sets in jax."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from trainer.config import RunConfig
from trainer.runtime import configure_jax


@pytest.fixture
def folder() -> Iterator[None]:
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_of_several_cpu_devices_are_not_taken_from_the_cache(tmp_path: Path, folder: None) -> None:
    """They hang: two processes with one of them warm did, at the pictures of the held-out questions."""
    run = RunConfig(compile_cache=str(tmp_path))
    for devices, expected in ((1, str(tmp_path)), (2, None), (1, str(tmp_path))):
        configure_jax(run, devices)
        assert jax.config.values["jax_compilation_cache_dir"] == expected
