"""The process is arranged before jax is there, in a process of its own since it cannot be undone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.environment import NVIDIA_FLAGS, visible_gpus, with_flags

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


PREPARED = """
import os, sys
from pathlib import Path
from launch import environment
environment.DEVICES = Path(sys.argv[1])
environment.prepare(verbose=False)
print(os.environ.get("XLA_FLAGS"))
"""


@pytest.mark.parametrize("device", ["nvidia0", "nvidia5", "nvidiactl", "nothing"])
def test_the_flags_are_set_where_there_is_a_gpu_whatever_its_number(device, tmp_path):
    (tmp_path / device).touch()
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"} | {
        "XLA_FLAGS": "--a=1"
    }
    command = [sys.executable, "-c", PREPARED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    gpu = device.removeprefix("nvidia").isdigit()
    assert done.stdout.strip() == (with_flags("--a=1", NVIDIA_FLAGS) if gpu else "--a=1")


def test_gpus_are_those_that_cuda_has(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.environment.DEVICES", tmp_path)
    for name in ("nvidia3", "nvidia11", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,2,5"}) == 3
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0


def test_the_compiler_knows_the_flags():
    """An unknown one ends the process."""
    code = "import jax; jax.devices()"
    for flags, status in ((with_flags("", NVIDIA_FLAGS), True), ("--xla_gpu_no_such_flag=true", False)):
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
        assert (done.returncode == 0) is status
