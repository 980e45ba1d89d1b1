"""Peaks by the names that jax gives to devices, and the measured peak of this machine."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from sharding import devices
from sharding.devices import Peak, peak_flops

KINDS = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU7x": 1153.5,
}


def accelerator(kind: str) -> Any:
    return SimpleNamespace(device_kind=kind, platform="tpu" if kind.startswith("TPU") else "gpu")


@pytest.mark.parametrize(("kind", "tflops"), KINDS.items())
def test_known_accelerators_have_their_published_peak(kind, tflops):
    peak = peak_flops(accelerator(kind), "bfloat16")
    assert peak.flops_per_s == tflops * 1e12
    assert "bfloat16" in peak.source and "measured" not in peak.source and "computes in" not in peak.source


def test_a_float32_run_is_told_that_the_peak_is_for_bfloat16():
    exact, other = peak_flops(accelerator("NVIDIA H200"), "bfloat16"), peak_flops(accelerator("NVIDIA H200"), "float32")
    assert other.flops_per_s == exact.flops_per_s
    assert other.source == f"{exact.source}; the run computes in float32, the peak is for bfloat16"


@pytest.mark.parametrize(
    "kind", ["NVIDIA H20", "NVIDIA GeForce RTX 3060", "TPU v4 lite", "TPU v9", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_other_accelerators_are_measured_instead_of_taken_for_a_similar_name(kind, monkeypatch):
    monkeypatch.setattr(devices, "_measure", lambda device, seconds: Peak(1.0, f"measured {device.device_kind}"))
    assert peak_flops(accelerator(kind), "bfloat16") == Peak(1.0, f"measured {kind}")


def test_the_cpu_is_measured_and_split_between_virtual_devices(monkeypatch):
    cpu = jax.devices("cpu")[0]
    peak = peak_flops(cpu, "float32", seconds=0.05)
    assert "measured" in peak.source and "float32" in peak.source
    assert 1e8 < peak.flops_per_s < 1e14

    # The same timings, seen by one device and by one of four that share the machine.
    def timed(sharing: int) -> Peak:
        clock = iter(range(100))
        monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
        client = SimpleNamespace(local_devices=lambda: [cpu] * sharing)
        monkeypatch.setattr(devices.jax, "device_put", lambda x, device: x)
        device: Any = SimpleNamespace(device_kind="cpu", platform="cpu", client=client)
        return peak_flops(device, "float32", seconds=3)

    alone, one_of_four = timed(1), timed(4)
    assert alone.flops_per_s == 2 * 1024**3
    assert one_of_four.flops_per_s == alone.flops_per_s / 4
    assert "shared by 4 devices" in one_of_four.source and "shared" not in alone.source
