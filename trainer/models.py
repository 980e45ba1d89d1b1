"""A model to ask, from a run directory or a Hugging Face directory: its config, tokenizer and weights on a device."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from data.tokenizer import Tokenizer
from sharding.errors import UserError
from trainer.checkpoint import Checkpoints
from trainer.config import RunConfig
from trainer.hf.importer import default_run
from trainer.hf.load import open_model
from trainer.initialise import abstract_state
from trainer.memory import check_room, tree_bytes
from trainer.rundir import RunDirectory
from trainer.runtime import configure_jax
from trainer.step import Params, Skeleton


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that can compute; its weights are in the precision in which they are stored."""

    run: RunConfig
    tokenizer: Tokenizer | None
    """None if the weights came without one."""
    skeleton: Skeleton
    params: Params
    router_bias: Params
    origin: str
    """Where the weights are from, for a line to the user."""

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises `UserError` where there is none."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.origin}: has no tokenizer.json, so text cannot be read or written. Put the model's "
                "tokenizer.json into the Hugging Face directory (and import it again, if it was imported)."
            )
        return self.tokenizer


def load_run(workdir: Path) -> LoadedModel:
    """The newest checkpoint of a run directory.

    Raises:
        UserError: no checkpoint, a damaged one, another tokenizer beside it than it was saved with, or too little memory.
    """
    directory = RunDirectory(workdir)
    run = directory.load_config()
    configure_jax(run)
    checkpoints = Checkpoints(directory.checkpoints)
    step = checkpoints.latest()
    if step is None:
        raise UserError(f"{directory.root}: has no checkpoint yet. Train it first: drover train --workdir {workdir}.")
    digest = checkpoints.metadata(step)["tokenizer_digest"]
    tokenizer = directory.load_tokenizer(digest) if digest else None
    skeleton = Skeleton(run.model)
    like = abstract_state(run, skeleton)
    shapes = checkpoints.as_stored(step, like.params)
    _check_room(shapes, skeleton)
    params, router_bias = checkpoints.restore_weights(step, shapes, like.router_bias)
    if router_bias is None:  # an imported model has none, and its run has not moved any yet
        router_bias = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like.router_bias)
    return LoadedModel(run, tokenizer, skeleton, params, router_bias, f"{directory.root}, step {step}")


def load_hf(directory: Path) -> LoadedModel:
    """The model in a Hugging Face directory, straight from its files.

    Raises:
        UserError: see `trainer.hf.load.open_model`; too little memory.
    """
    found = open_model(directory)
    run = default_run(found, directory)
    configure_jax(run)
    skeleton = Skeleton(run.model)
    shapes: Any = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        found.abstract(),
        skeleton.shardings,
    )
    _check_room(shapes, skeleton)
    return LoadedModel(run, found.tokenizer, skeleton, found.weights(shapes), {}, str(found.directory))


def _check_room(params: Params, skeleton: Skeleton) -> None:
    check_room(
        tree_bytes(params),
        skeleton.mesh.devices[0],
        "the weights alone",
        "Serving a large model is the business of vLLM and transformers: `drover export` writes what they open.",
    )
