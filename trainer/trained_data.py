"""The batches that a run trained on, after the fact: with every change of its mixture, from a position that it saved."""

from data.mixture import continued
from data.pipeline import Dataset, build_dataset
from trainer.checkpoint import Checkpoints
from trainer.config import RunConfig
from trainer.initialise import check_data
from trainer.rundir import RunDirectory


def trained_data(directory: RunDirectory, run: RunConfig, step: int, held_out: bool) -> tuple[Dataset, int]:
    """The data of a run.

    Args:
        directory: of the run.
        run: as it was last started.
        step: from 1; batches from the one that it trains on are found soonest.
        held_out: of the held-out split.

    Returns:
        Its data, and the first batch that these find without packing those before it.

    Raises:
        UserError: its data are not what they were.
    """
    checkpoints = Checkpoints(directory.checkpoints) if directory.checkpoints.is_dir() else None
    saved = sorted(checkpoints.manager.all_steps()) if checkpoints else []
    split = "heldout" if held_out else "train"
    if checkpoints is None or not saved:
        return build_dataset(run.data, run.media, split), 0
    newest = checkpoints.metadata(saved[-1])
    # As where a run goes on: what was changed since the checkpoint holds from there on.
    journal = continued(newest.get("journal", ()), run.data, saved[-1])
    near = max((at for at in saved if at <= step), default=0)
    position = checkpoints.metadata(near).get("data_position") if near and not held_out else None
    dataset = build_dataset(run.data, run.media, split, journal=journal, position=position)
    if saved[-1]:  # at 0 nothing was trained on: it was imported
        check_data(checkpoints, saved[-1], {"data_digest": dataset.digest, "source_digests": dataset.digests})
    checkpoints.close()
    return dataset, near - 1 if position else 0
