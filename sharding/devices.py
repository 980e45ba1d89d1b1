"""Peak FLOP/s of a device, the denominator of model FLOP utilisation."""

import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NVIDIA = "NVIDIA data sheet, dense (half of the figure with sparsity where only that is given)"
TPU = "Google Cloud TPU documentation"


class Peak(NamedTuple):
    """Peak rate of one device, and where the figure comes from."""

    flops_per_s: float
    source: str


class _Known(NamedTuple):
    words: frozenset[str]
    """All of these are words of `device_kind`, upper case."""
    tflops: float
    """Dense bfloat16 TFLOP/s of one jax device, accumulated in float32."""
    name: str
    source: str


def _known(words: str, tflops: float, name: str, source: str) -> _Known:
    return _Known(frozenset(words.split()), tflops, name, source)


# The first match counts, so the variants of a chip stand before the chip. jax sees a TPU v4 or v5p chip as one device,
# and each of the two cores of a v3 or 7x chip as a device of its own.
_TABLE = (
    _known("GB300", 2500, "GB300", NVIDIA),
    _known("GB200", 2500, "GB200", NVIDIA),
    _known("B300", 2250, "B300", NVIDIA),
    _known("B200", 2250, "B200", NVIDIA),
    _known("GH200", 989, "GH200", NVIDIA),
    _known("H200 NVL", 835, "H200 NVL", NVIDIA),
    _known("H200", 989, "H200 SXM", NVIDIA),
    _known("H100 NVL", 835, "H100 NVL", NVIDIA),
    _known("H100 PCIE", 756, "H100 PCIe", NVIDIA),
    _known("H100", 989, "H100 SXM", NVIDIA),
    _known("H800 PCIE", 756, "H800 PCIe", NVIDIA),
    _known("H800", 989, "H800 SXM", NVIDIA),
    _known("A100", 312, "A100", NVIDIA),
    _known("L40S", 362, "L40S", NVIDIA),
    _known("L4", 121, "L4", NVIDIA),
    _known("MI300X", 1307, "Instinct MI300X", "AMD data sheet, dense"),
    _known("TPU V3", 61.5, "TPU v3 core", TPU),
    _known("TPU V5 LITE", 197, "TPU v5e", TPU),
    _known("TPU V5E", 197, "TPU v5e", TPU),
    _known("TPU V5P", 459, "TPU v5p", TPU),
    _known("TPU V6 LITE", 918, "TPU v6e", TPU),
    _known("TPU V6E", 918, "TPU v6e", TPU),
    _known("TPU7X", 1153.5, "TPU7x core", TPU),
)
# Kinds that are the first words of another kind ("TPU v5" is a v5p, "TPU v5 lite" a v5e).
_WHOLE_KINDS = {
    "TPU V4": _known("TPU V4", 275, "TPU v4", TPU),
    "TPU V5": _known("TPU V5", 459, "TPU v5p", TPU),
}


def peak_flops(device: Any, dtype: str = "bfloat16", seconds: float = 0.3) -> Peak:
    """Peak FLOP/s of one `jax.Device` for a run that computes in `dtype`.

    Known accelerators have their published dense bfloat16 peak, whatever `dtype` is: utilisation can then be compared
    between runs, and the source says when the run's own precision is slower than the figure. Anything else, the CPU
    above all, is measured for about `seconds`: the best rate of a square matrix product, in float32 on the CPU and in
    bfloat16 elsewhere. Virtual CPU devices share one machine and get an equal part of its rate each.
    """
    known = _lookup(device.device_kind)
    if known is None:
        measured = _measure(device, seconds)
        peak_dtype = "float32" if device.platform == "cpu" else "bfloat16"
    else:
        measured = Peak(known.tflops * 1e12, f"{known.name}, dense bfloat16 ({known.source})")
        peak_dtype = "bfloat16"
    if dtype == peak_dtype:
        return measured
    return Peak(measured.flops_per_s, f"{measured.source}; the run computes in {dtype}, the peak is for {peak_dtype}")


def _lookup(kind: str) -> _Known | None:
    words = frozenset(re.split(r"[\s\-]+", kind.upper()))
    if "MIG" in words:  # A slice of a GPU carries the name of the whole one.
        return None
    whole = _WHOLE_KINDS.get(kind.strip().upper())
    return whole or next((known for known in _TABLE if known.words <= words), None)


def _measure(device: Any, seconds: float) -> Peak:
    on_cpu = device.platform == "cpu"
    dtype, size = (jnp.float32, 1024) if on_cpu else (jnp.bfloat16, 8192)
    x_DD = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.dot).lower(x_DD, x_DD).compile()
    product(x_DD, x_DD).block_until_ready()  # The first call loads the program and wakes the threads.
    best, start = float("inf"), time.perf_counter()
    while True:
        before = time.perf_counter()
        product(x_DD, x_DD).block_until_ready()
        after = time.perf_counter()
        best = min(best, after - before)
        if after - start >= seconds:
            break
    sharing = len(device.client.local_devices()) if on_cpu else 1
    shared = f", shared by {sharing} devices" if sharing > 1 else ""
    name = jnp.dtype(dtype).name
    what = f"measured: best {size} x {size} {name} matrix product on this {device.device_kind}{shared}"
    return Peak(2 * size**3 / best / sharing, what)
