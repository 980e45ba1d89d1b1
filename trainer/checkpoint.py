"""Checkpoints: the training state, with the config and the position in the data, by Orbax.

Saving is asynchronous and atomic: Orbax writes to a temporary folder and renames it when all is there, so a killed save
leaves the checkpoint before it. A checkpoint folder holds `state` (arrays) and `run` (JSON: config, next batch,
digests of data and tokenizer).
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import multihost

from data.open_files import check_limit
from sharding.errors import UserError
from trainer.config import CheckpointConfig, RunConfig
from trainer.pruning import Kept
from trainer.sections import from_plain
from trainer.step import Params, TrainState

Metadata = dict[str, Any]

CHUNK_BYTES = 2**20
"""Largest chunk on disk: a device that holds a part of an array reads the chunks that its part is in, not all of it."""


def _named(tree: Any) -> dict[tuple[str, ...], Any]:
    """Leaves by the names on their way, ("params", "blocks", "0", "attn", "q"): the layout on disk."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def _on_disk(tree: Any) -> dict[str, Any]:
    """Nested dicts with string keys, whatever containers the tree is made of."""
    return traverse_util.unflatten_dict(_named(tree))


def _like(tree: Any, saved: dict[str, Any]) -> Any:
    """The inverse of `_on_disk`, with the containers of `tree`: matched by name, never by order."""
    flat = traverse_util.flatten_dict(saved)
    return jax.tree.unflatten(jax.tree.structure(tree), [flat[name] for name in _named(tree)])


def _stacked(name: tuple[str, ...]) -> bool:
    """Whether an array, ("params", "blocks", ...), has a leading dim of super-blocks."""
    return name[1] == "blocks"


def _cut(name: tuple[str, ...]) -> ocp.SaveArgs:
    """How an array is cut into chunks: each is of one layer and, of experts, of one expert."""
    dims = 2 if "experts" in name else 1 if "blocks" in name else 0
    return ocp.SaveArgs(shard_axes=tuple(range(dims)), chunk_byte_size=CHUNK_BYTES)


def _unpruned(name: tuple[str, ...], leaf: jax.ShapeDtypeStruct, kept: Kept) -> jax.ShapeDtypeStruct:
    """The shape that an array has in the deeper model, on the same devices."""
    if not _stacked(name):
        return leaf
    # Not split by super-blocks: their number there need not divide.
    whole = jax.sharding.PartitionSpec(None, *leaf.sharding.spec[1:])
    sharding = jax.sharding.NamedSharding(leaf.sharding.mesh, whole)
    return jax.ShapeDtypeStruct((kept.total, *leaf.shape[1:]), leaf.dtype, sharding=sharding)


def _pruned(array: jax.Array, like: jax.ShapeDtypeStruct, kept: Kept) -> jax.Array:
    """The super-blocks of an array that are kept."""
    return jax.jit(lambda array: array[np.array(kept.blocks)], out_shardings=like.sharding)(array)


def _weights(stored: dict[tuple[str, ...], Any], params: Params, router_bias: Params) -> dict[str, Params]:
    """What there is of a model in a checkpoint: router biases not everywhere."""
    has_biases = any(name[0] == "router_bias" for name in stored)
    return {"params": params} | ({"router_bias": router_bias} if has_biases else {})


def _barrier() -> multihost.BarrierSyncFn:
    """Where processes wait for each other within a save: all but one whose part of it has failed.

    That one would wait with its error for those who wait for its part, for 20 minutes; so it raises the error, and its end
    is theirs (`launch/watch.py`).
    """
    wait = multihost.get_barrier_sync_fn()

    def unless_failed(*, key: str, timeout_ms: int) -> None:
        if sys.exc_info()[0] is None:
            wait(key=key, timeout_ms=timeout_ms)

    return unless_failed


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, config: CheckpointConfig | None = None):
        """Opens `directory`; without a config, to read only."""
        self.directory = directory
        options = ocp.CheckpointManagerOptions(read_only=True)
        if config:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last,
                keep_period=config.keep_every or None,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=ocp.options.AsyncOptions(barrier_sync_fn=_barrier()),
            )
        self.manager = ocp.CheckpointManager(directory, options=options, item_names=("state", "run"))

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(self, state: TrainState, metadata: Metadata) -> None:
        """Starts to save `state` under its step; returns when the arrays are copied, before they are on disk."""
        cuts = traverse_util.unflatten_dict({name: _cut(name) for name in _named(state)})
        with self._explained():
            started = self.manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_on_disk(state), cuts),  # pyright: ignore[reportCallIssue]
                    run=ocp.args.JsonSave(metadata),  # pyright: ignore[reportCallIssue]
                ),
            )
            assert started, f"Orbax declined to save step {int(state.step)}"

    def busy(self) -> bool:
        """Whether a save is still going on in the background."""
        return self.manager.is_saving_in_progress()

    def check(self) -> None:
        """Raises what went wrong in a save that is no longer going on in the background."""
        with self._explained():
            # Orbax's own thread has taken the error from check_for_errors, and hands it out where it is joined.
            self.manager.wait_until_finished()
            self.manager.check_for_errors()

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with self._explained():
            self.manager.wait_until_finished()
            self.manager.check_for_errors()

    def metadata(self, step: int) -> Metadata:
        """The JSON that was saved with a step."""
        with self._explained(step):
            return self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

    def run(self, step: int) -> RunConfig:
        """The config that a step was saved with."""
        return from_plain(RunConfig, self.metadata(step)["config"], f"checkpoint {self.directory / str(step)}")

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, with the structure, dtypes and shardings of `like` (arrays or their shapes)."""
        self._check_fits(step, _named(like), self._stored(step))
        with self._explained(step):
            args = ocp.args.StandardRestore(_on_disk(like))  # pyright: ignore[reportCallIssue]
            saved = self.manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        return _like(like, saved)

    def restore_weights(
        self, step: int, params: Params, router_bias: Params, kept: Kept | None = None
    ) -> tuple[Params, Params | None]:
        """The weights and router biases saved at `step`, with the dtypes and shardings of the given shapes; of a deeper
        model, only the super-blocks that are kept.

        Biases are None where the checkpoint has none, such as one that was imported.
        """
        stored = self._stored(step)
        weights = _weights(stored, params, router_bias)
        wanted = _named(weights)
        if kept is None:
            self._check_fits(step, wanted, stored)
            found = self._read(step, wanted)
        else:
            deeper, found = {name: _unpruned(name, leaf, kept) for name, leaf in wanted.items()}, {}
            self._check_fits(step, deeper, stored)
            # One array at a time, so that no more than one is in memory with what is left out.
            for name, leaf in deeper.items():
                array = self._read(step, {name: leaf})[name]
                found[name] = _pruned(array, wanted[name], kept) if _stacked(name) else array
        saved = _like(weights, traverse_util.unflatten_dict(found))
        return saved["params"], saved.get("router_bias", None if router_bias else {})

    def restore_weights_in_turn(
        self, step: int, params: Params, router_bias: Params, made: Callable[[Iterator[jax.Array]], Params]
    ) -> tuple[Params, Params | None]:
        """The same, but weights are read one at a time, in the order of the leaves of `params`, and are what is `made` of
        them."""
        stored = self._stored(step)
        weights = _weights(stored, params, router_bias)
        self._check_fits(step, _named(weights), stored)
        each = _named({"params": weights.pop("params")}).items()
        params = made(self._read(step, {name: leaf})[name] for name, leaf in each)
        if not weights:
            return params, None if router_bias else {}
        found = self._read(step, _named(weights))
        return params, _like(weights, traverse_util.unflatten_dict(found))["router_bias"]

    def _read(self, step: int, wanted: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
        """Some arrays of the state saved at `step`, by name, like the given shapes."""
        item = traverse_util.unflatten_dict(wanted)
        with self._explained(step), ocp.PyTreeCheckpointer() as checkpointer:
            args = ocp.args.PyTreeRestore(  # pyright: ignore[reportCallIssue]
                item=item,  # pyright: ignore[reportCallIssue]
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),  # pyright: ignore[reportCallIssue]
                partial_restore=True,  # pyright: ignore[reportCallIssue]
            )
            return traverse_util.flatten_dict(checkpointer.restore(self.directory / str(step) / "state", args=args))

    def as_stored(self, step: int, params: Params) -> Params:
        """The shapes of `params` in the dtypes in which a step has them."""
        stored = {name: leaf.dtype for name, leaf in self._stored(step).items()}
        dtypes = [stored.get(("params", *name), leaf.dtype) for name, leaf in _named(params).items()]
        leaves = jax.tree.leaves(params)
        shapes = [
            jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
            for leaf, dtype in zip(leaves, dtypes, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), shapes)

    def _stored(self, step: int) -> dict[tuple[str, ...], Any]:
        """Shape and dtype of every array of a checkpoint, by name."""
        with self._explained(step), ocp.PyTreeCheckpointer() as checkpointer:
            stored: Any = checkpointer.metadata(self.directory / str(step) / "state").item_metadata
            return traverse_util.flatten_dict(stored.tree)

    def _check_fits(self, step: int, wanted: dict[tuple[str, ...], Any], stored: dict[tuple[str, ...], Any]) -> None:
        """Raises `UserError` where the arrays of a checkpoint are not those of the model."""
        path = self.directory / str(step)
        shapes = {name: tuple(leaf.shape) for name, leaf in stored.items()}
        tops = {name[0] for name in wanted} | {"router_bias"}  # a model may have none

        def weights_first(name: tuple[str, ...]) -> tuple[bool, tuple[str, ...]]:
            return name[0] != "params", name

        differing = [
            f"{'.'.join(name)}: found {shapes.get(name, 'nothing')}, expected "
            f"{tuple(wanted[name].shape) if name in wanted else 'nothing'}"
            for name in sorted(wanted.keys() | {name for name in shapes if name[0] in tops}, key=weights_first)
            if name not in wanted or shapes.get(name) != tuple(wanted[name].shape)
        ]
        if differing:
            more = f"\n  and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise UserError(
                f"checkpoint {path}: holds another model than the config describes:\n  "
                + "\n  ".join(differing[:5])
                + f"{more}\nMake the options under model the same as in that checkpoint's run "
                "(`drover config` prints them, and config.json in its run directory keeps them)."
            )

    def close(self) -> None:
        self.manager.close()

    def _explained(self, step: int | None = None) -> "_Explained":
        return _Explained(self.directory if step is None else self.directory / str(step), reading=step is not None)


class _Explained:
    """Turns what Orbax and the file system raise into one message that names the checkpoint and the cure."""

    def __init__(self, path: Path, reading: bool):
        self.path, self.reading = path, reading

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, (UserError, KeyboardInterrupt, SystemExit, MemoryError)):
            return
        if "RESOURCE_EXHAUSTED" in str(error):  # too little memory says nothing of the checkpoint
            return
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if self.reading:
            if isinstance(error, Exception):
                check_limit(self.path, error)
            raise UserError(
                f"checkpoint {self.path}: cannot be read: {reason}\nIf it is damaged, and not only out of reach, delete that "
                "folder: the run then goes on from the checkpoint before it."
            ) from error
        raise UserError(
            f"checkpoints {self.path}: cannot be written: {reason}\nEarlier checkpoints are whole. Free space or mend "
            "the permissions, then start the same command again."
        ) from error


def locate(path: Path) -> tuple[Path, int]:
    """The checkpoints folder and the step that `path` (a run directory, or one of its checkpoints) stands for."""
    path = path.expanduser().absolute()
    numbered = path.name.isdigit() and not (path / "checkpoints").is_dir()  # a run may be named by its date
    folder, step = (path.parent, int(path.name)) if numbered else (path / "checkpoints", None)
    steps = Checkpoints(folder).manager.all_steps() if folder.is_dir() else []
    if not steps or (step is not None and step not in steps):
        raise UserError(
            f"{path}: no checkpoint found; expected a run directory with checkpoints/<step>, or one of those."
        )
    return folder, max(steps) if step is None else step
