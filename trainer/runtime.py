"""Settings of jax that a run asks for, process-wide."""

from pathlib import Path

import jax

from trainer.config import RunConfig


def configure_jax(run: RunConfig) -> None:
    """Precision and compilation cache. Call it before the first array is made."""
    if "float64" in (run.model.dtype, run.model.param_dtype):
        jax.config.update("jax_enable_x64", True)
    if run.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(run.compile_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
