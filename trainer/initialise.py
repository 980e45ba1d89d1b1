"""Where the weights come from: own checkpoint > another run's checkpoint > pretrained weights > scratch."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from sharding.errors import UserError
from trainer.checkpoint import Checkpoints, locate
from trainer.config import RunConfig
from trainer.hf import load_pretrained
from trainer.step import TrainState, init_state


def abstract_state(run: RunConfig, device: Any) -> TrainState:
    """Shapes, dtypes and shardings of the run's state; nothing is computed."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.eval_shape(lambda: init_state(run, device.platform))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def initialise(
    run: RunConfig, checkpoints: Checkpoints, data_digest: str, tokenizer_digest: str
) -> tuple[TrainState, str]:
    """The state to go on from, and one line that says where it came from.

    Raises `UserError` where a checkpoint or a directory does not fit the run, or was made with other data or, where only
    the weights are taken, with another tokenizer.
    """
    device = jax.devices()[0]
    like = abstract_state(run, device)

    def fresh() -> TrainState:
        # With the sharding named, a fresh state and a restored one are the same to the compiler.
        return jax.jit(lambda: init_state(run, device.platform), out_shardings=like.step.sharding)()

    step = checkpoints.latest()
    if step is not None:
        check_data(checkpoints, step, data_digest)
        return checkpoints.restore(step, like), f"own checkpoint, step {step}"
    if run.init.from_run:
        folder, step = locate(Path(run.init.from_run))
        other = Checkpoints(folder)
        check_tokenizer(other, step, tokenizer_digest)
        return other.restore_weights(step, fresh()), f"weights of {folder.parent}, step {step}"
    if run.init.pretrained:
        directory = Path(run.init.pretrained).expanduser()
        loaded = load_pretrained(directory, run.model)
        state = fresh()
        params = jax.tree.map(
            lambda old, new: jax.device_put(new.astype(old.dtype), old.sharding), state.params, loaded
        )
        return dataclasses.replace(state, params=params), f"pretrained weights of {directory}"
    return fresh(), f"scratch, seed {run.seed}"


def check_memory(state: TrainState, device: Any) -> None:
    """Refuses a model whose weights, gradients and optimizer state alone exceed the device's memory."""
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, state.params)))
    stats = device.memory_stats() or {}
    if device.platform == "cpu":
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        room = stats.get("bytes_limit", total)
    if total > room:
        raise UserError(
            f"model: weights, gradients and optimizer state need {total / 2**30:,.1f} GiB, found {room / 2**30:,.1f} GiB "
            f"on {device.device_kind}. A run uses one device today: take a smaller model (model.num_layers, "
            "model.num_experts)."
        )


def check_data(checkpoints: Checkpoints, step: int, data_digest: str) -> None:
    """Refuses to go on with data that is not what the checkpoint was trained on: batch n would not be batch n."""
    saved = checkpoints.metadata(step)["data_digest"]
    if saved != data_digest:
        raise UserError(
            f"checkpoint {checkpoints.directory / str(step)}: was trained on data {saved}, found {data_digest}. The text "
            "comes with Python, so another Python version, or another config of the data, gives other data. Use the "
            "Python and config that the run was started with, or start a new run from its weights (same tokenizer) with "
            f"--config.init.from_run={checkpoints.directory.parent} and another --workdir."
        )


def check_tokenizer(checkpoints: Checkpoints, step: int, tokenizer_digest: str) -> None:
    """Refuses weights whose embeddings belong to other tokens."""
    saved = checkpoints.metadata(step)["tokenizer_digest"]
    if saved != tokenizer_digest:
        raise UserError(
            f"checkpoint {checkpoints.directory / str(step)}: was trained with tokenizer {saved}, found {tokenizer_digest}. "
            "A tokenizer is trained on the training split, so data.mixture, data.tokenizer, data.tokenizer_size, and "
            "the Python whose standard library is read must be those of that run."
        )
