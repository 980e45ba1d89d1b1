"""What must be arranged before jax is imported: environment variables, the allocator, who may write to the terminal."""

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

DEFAULTS = {
    # Log lines of XLA's C++ side: errors only. Its warnings speak to people who build XLA.
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

NVIDIA_FLAGS = {
    # Collectives run beside computation. The TPU compiler does that by itself (docs/MESH.md).
    "xla_gpu_enable_latency_hiding_scheduler": "true",
}
"""Of XLA, where there is an NVIDIA GPU."""

DEVICES = Path("/dev")

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def prepare(verbose: bool) -> None:
    """Sets environment variables that the user has not set, settles the allocator, and quietens libraries.

    Call it before the first import of jax.

    Args:
      verbose: leave the libraries their log, with a traceback for every error that they meet on the way.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not has_accelerator():
        keep_freed_memory()
    elif nvidia_gpus():
        os.environ["XLA_FLAGS"] = with_flags(os.environ.get("XLA_FLAGS", ""), NVIDIA_FLAGS)
    if not verbose:
        _quieten()


def has_accelerator() -> bool:
    """Whether jax may use another device than the CPU here."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if chosen:
        return chosen != "cpu"
    others = (path for name in ("kfd", "accel[0-9]*", "vfio/[0-9]*") for path in DEVICES.glob(name))
    return bool(nvidia_gpus()) or any(others)


def nvidia_gpus() -> list[Path]:
    """Device files of the NVIDIA GPUs of this host or container, which may lack the first ones of the host."""
    return sorted(DEVICES.glob("nvidia[0-9]*"))


def visible_gpus(environ: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs CUDA has here."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    return len(nvidia_gpus()) if chosen is None else len(list(filter(None, chosen.split(","))))


def with_flags(given: str, flags: Mapping[str, str]) -> str:
    """XLA_FLAGS with these flags as well, but for those that it sets already."""
    names = {flag.lstrip("-").partition("=")[0] for flag in given.split()}
    added = [f"--{name}={value}" for name, value in flags.items() if name not in names]
    return " ".join([*given.split(), *added])


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that XLA frees, in one arena, instead of giving it back to the kernel.

    On a CPU every step allocates the same large temporaries. By default each is mapped anew and the kernel clears its
    pages, 88,000 page faults in a step of the tiny run: `python -m benchmarks.step`, with and without `--no-allocator`.
    Threads that exist keep the arenas they have, so this must come before jax starts its own.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, value)


def keep_stdout_for_python() -> None:
    """Sends nowhere what C++ writes to stdout: on a CPU, Gloo tells there of every group of processes that it makes."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _quieten() -> None:
    """Keeps off the terminal what is raised as well, and so reaches the user as one message."""
    from absl.logging import get_absl_logger

    # A full disk alone makes Orbax log four tracebacks. A filter and not a level, which parsing absl's flags resets.
    get_absl_logger().addFilter(lambda record: record.levelno > logging.ERROR)

    # TensorStore's own tasks fail there as well, each with a traceback, for one array that does not fit.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)

    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        # After a failed write, TensorStore reports every other one of it to an event loop that is gone.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
