"""A run directory as `drover train` leaves it, without training or optimizer: random weights of the micro config."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from data.tokenizer import load_bytes
from launch.config_file import load_run
from tests.oracle_cases import random_params
from tests.trainer.processes import ROOT
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, RunConfig
from trainer.rundir import RunDirectory
from trainer.sections import to_plain
from trainer.step import TrainState


def micro(**model: Any) -> RunConfig:
    """The micro config, with these options of the model."""
    run = load_run(str(ROOT / "tests" / "micro.py"), {})
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **model))


def nano(**options: Any) -> RunConfig:
    """The nano config, with these options of the run."""
    return dataclasses.replace(load_run(str(ROOT / "tests" / "nano.py"), {}), **options)


def save_run(root: Path, run: RunConfig, **weights: Any) -> TrainState:
    """Writes config, tokenizer and a checkpoint with random weights but for the ones given; returns its state."""
    directory, tokenizer = RunDirectory(root), load_bytes()
    directory.create()
    directory.save(run, tokenizer)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, random_params(run.model, seed=0) | weights, {}, {}, zero, zero)
    metadata = {"config": to_plain(run), "data_digest": "none", "tokenizer_digest": tokenizer.digest}
    checkpoints = Checkpoints(directory.checkpoints, CheckpointConfig())
    checkpoints.save(state, metadata)
    checkpoints.wait()
    checkpoints.close()
    return state
