"""Settings of jax that a run asks for, process-wide."""

from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from trainer.config import RunConfig


def configure_jax(run: RunConfig, devices: int = 1) -> None:
    """Precision, and the compilation cache for programs on so many devices. Call it before the first array is made."""
    if "float64" in (run.model.dtype, run.model.param_dtype):
        jax.config.update("jax_enable_x64", True)
    # Of a program that it takes from the cache, XLA:CPU has lost the order between collectives inside of its loops and
    # branches and those outside: devices begin them in different orders and wait for each other for ever.
    if devices > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_compilation_cache_dir", None)
    elif run.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(run.compile_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    compilation_cache.reset_cache()  # in a process that has compiled before, the folder counts only from here
