"""Where the weights come from: own checkpoint > another run's checkpoint > pretrained weights > scratch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sharding.errors import UserError
from trainer.checkpoint import Checkpoints, locate
from trainer.config import RunConfig
from trainer.hf.load import open_model
from trainer.pruning import Kept, kept_blocks
from trainer.step import Params, Skeleton, TrainState, init_state, state_shardings


def abstract_state(run: RunConfig, skeleton: Skeleton) -> TrainState:
    """Shapes, dtypes and shardings of the run's state; nothing is computed."""
    shapes = jax.eval_shape(lambda: init_state(run))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(run, skeleton, shapes),
    )


def initialise(
    run: RunConfig, skeleton: Skeleton, checkpoints: Checkpoints, data: Mapping[str, Any], tokenizer_digest: str
) -> tuple[TrainState, str]:
    """The state to go on from, and one line that says where it came from.

    Raises `UserError` where a checkpoint or a directory does not fit the run, or was made with other data or, where only
    the weights are taken, with another tokenizer.
    """
    like = abstract_state(run, skeleton)

    def fresh(params: Params | None = None, router_bias: Params | None = None) -> TrainState:
        """A state at step 0, around these weights where they are given."""

        def make(given: dict[str, Params]) -> TrainState:
            # The random weights that are replaced are never computed: nothing depends on them.
            return dataclasses.replace(init_state(run), **given)

        given = {"params": params, "router_bias": router_bias}
        given = {name: value for name, value in given.items() if value is not None}
        # With the sharding named, a fresh state and a restored one are the same to the compiler.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        return jax.jit(make, out_shardings=shardings, donate_argnums=0)(given)

    def weights_of(source: Checkpoints, step: int, kept: Kept | None = None) -> tuple[TrainState, str]:
        known = check_tokenizer(source, step, tokenizer_digest)
        params, router_bias = source.restore_weights(step, like.params, like.router_bias, kept)
        notes = [] if known else ["its tokenizer is unknown"]
        notes += [str(kept)] if kept else []
        notes += ["router biases from zero"] if router_bias is None else []
        return fresh(params, router_bias), "".join(f"; {note}" for note in notes)

    step, pruned = checkpoints.latest(), run.init.layers == "pruned"
    if step is not None:
        imported = checkpoints.metadata(step).get("imported_from")
        if imported:
            state, notes = weights_of(checkpoints, step)
            return state, f"weights imported from {imported}{notes}"
        check_data(checkpoints, step, data)
        return checkpoints.restore(step, like), f"own checkpoint, step {step}"
    if run.init.from_run:
        folder, step = locate(Path(run.init.from_run))
        source = Checkpoints(folder)
        kept = (
            kept_blocks(source.run(step).model, run.model, run.init.keep, f"{folder.parent}, step {step}")
            if pruned
            else None
        )
        state, notes = weights_of(source, step, kept)
        return state, f"weights of {folder.parent}, step {step}{notes}"
    if run.init.pretrained:
        found = open_model(Path(run.init.pretrained), None if pruned else run.model)
        kept = kept_blocks(found.model, run.model, run.init.keep, str(found.directory)) if pruned else None
        if found.tokenizer:
            check_same_tokenizer(f"{found.directory}/tokenizer.json", found.tokenizer.digest, tokenizer_digest)
        note = "" if found.tokenizer else "; its tokenizer is unknown"
        note += f"; {kept}" if kept else ""
        weights = found.weights(like.params, kept.blocks if kept else None)
        return fresh(weights), f"pretrained weights of {found.directory}{note}"
    return fresh(), f"scratch, seed {run.seed}"


def check_data(checkpoints: Checkpoints, step: int, data: Mapping[str, Any]) -> None:
    """Refuses to go on with data that are not what the checkpoint was trained on: batch n would not be batch n.

    Sources may have come, and shares of the mixture may have changed.
    """
    metadata = checkpoints.metadata(step)
    saved, found = metadata["data_digest"], data["data_digest"]
    differing = "the options of the data" if saved != found else ""
    for name, digest in metadata.get("source_digests", {}).items():
        if data["source_digests"].get(name) != digest:
            differing, saved, found = f"source {name}", digest, data["source_digests"].get(name, "nothing")
    if differing:
        raise UserError(
            f"checkpoint {checkpoints.directory / str(step)}: was trained on other data: of {differing} it has {saved}, found "
            f"{found}. The built-in text comes with Python, so another Python version gives other data. Use the data, Python "
            "and config that the run was started with, or start a new run from its weights (same tokenizer) with "
            f"--config.init.from_run={checkpoints.directory.parent} and another --workdir."
        )


def check_tokenizer(checkpoints: Checkpoints, step: int, tokenizer_digest: str) -> bool:
    """Refuses weights whose embeddings belong to other tokens. False where the checkpoint names no tokenizer."""
    saved = checkpoints.metadata(step)["tokenizer_digest"]
    if saved is not None:
        check_same_tokenizer(f"checkpoint {checkpoints.directory / str(step)}", saved, tokenizer_digest)
    return saved is not None


def check_same_tokenizer(where: str, theirs: str, ours: str) -> None:
    """Refuses weights that come with another tokenizer."""
    if theirs != ours:
        raise UserError(
            f"{where}: its tokens are those of tokenizer {theirs}, found {ours}. Set data.tokenizer to the tokenizer.json "
            "beside those weights. Of a run on the embedded data: a tokenizer is trained on the training split, so "
            "data.mixture, data.tokenizer, data.tokenizer_size, and the Python whose standard library is read must be "
            "those of that run."
        )
