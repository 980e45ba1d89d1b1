"""Long rows over devices along the context axis: memory of the shipped step, and one that is run."""

import pytest

from benchmarks.context import memory, step_of


@pytest.mark.slow
def test_a_quarter_of_a_million_tokens_cost_each_of_several_devices_its_part() -> None:
    """Of the shipped step; `python -m benchmarks.context` prints it for more tokens."""
    alone, half, quarter, eighth = (sum(memory(step_of(262_144, devices)[1])) for devices in (1, 2, 4, 8))
    assert 2 * half < 1.05 * alone and 4 * quarter < 1.05 * alone and 8 * eighth < 1.05 * alone


@pytest.mark.slow
def test_a_step_of_32k_tokens_on_eight_devices_is_that_of_one() -> None:
    small = {"num_layers": 2, "nope_layer_step": 2, "hidden_size": 32, "num_heads": 2, "head_dim": 16}

    def done(devices: int) -> tuple[float, float]:
        make, compiled = step_of(32_768, devices, **small)
        _, sums = compiled(*make())
        return float(sums["loss"]), float(sums["grad_norm"])

    assert done(8) == pytest.approx(done(1), rel=1e-5)
