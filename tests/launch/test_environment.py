"""The process is arranged before jax is there, in a process of its own since it cannot be undone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.environment import NVIDIA_FLAGS, with_flags

ROOT = Path(__file__).parents[2]

CODE = """
import os, sys
from launch import environment
environment.prepare(verbose={verbose})
assert "jax" not in sys.modules
from absl import logging
logging.error("logged and raised")
class Gone:
    def __init__(self, text): self.text = text
    def __del__(self): raise RuntimeError(self.text)
Gone("Event loop is closed")
Gone("something else")
print(os.environ["TF_CPP_MIN_LOG_LEVEL"])
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_are_quiet_unless_asked(verbose):
    code = CODE.format(verbose=verbose)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("logged and raised" in done.stderr) is verbose
    assert ("Event loop is closed" in done.stderr) is verbose
    assert "something else" in done.stderr


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    code = CODE.format(verbose=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_flags_of_the_compiler_are_added_but_never_changed():
    (name,) = NVIDIA_FLAGS
    assert with_flags("", NVIDIA_FLAGS) == f"--{name}=true"
    assert with_flags("--xla_a=1 --xla_b", NVIDIA_FLAGS) == f"--xla_a=1 --xla_b --{name}=true"
    assert with_flags(f"--{name}=false", NVIDIA_FLAGS) == f"--{name}=false"


def test_the_compiler_knows_the_flags():
    """An unknown one ends the process."""
    code = "import jax; jax.devices()"
    for flags, status in ((with_flags("", NVIDIA_FLAGS), True), ("--xla_gpu_no_such_flag=true", False)):
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
        assert (done.returncode == 0) is status
