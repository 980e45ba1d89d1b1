"""What holds for every test."""

import os

# Before jax is imported: without a word from the user, tests run on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import settings

# Meshes are made of virtual devices; programs that tests start have as many as they ask for themselves.
jax.config.update("jax_num_cpu_devices", 8)

# Compilation makes the first example of a property far slower than the others.
settings.register_profile("drover", deadline=None)
settings.load_profile("drover")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests recorded as `shown` is worth reading when they pass, too."""
    reports = terminalreporter.getreports("passed")
    lines = sorted(str(value) for report in reports for name, value in report.user_properties if name == "shown")
    if lines:
        terminalreporter.section("measured")
        terminalreporter.write("\n".join(lines) + "\n")
