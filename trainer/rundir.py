"""The run directory: everything a run writes, one process at a time.

config.json      the resolved run
tokenizer.json   the tokenizer that the run was started with, as Hugging Face writes one
run.json         facts of the latest start: devices, versions, parameters, compile time
checkpoints/     Orbax checkpoints, one folder a step
metrics/         metrics.jsonl and TensorBoard events
evaluation.json  held-out scores and sampled answers, at the end
report.html      all of it, to read
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer, load_file
from sharding.errors import UserError
from trainer.config import RunConfig
from trainer.metrics import FILE_NAME, replace_file
from trainer.sections import diff, from_plain, to_plain


class RunDirectory:
    """Paths of a run, and what may be read from them."""

    def __init__(self, root: Path):
        self.root = root.expanduser().absolute()
        self.config = self.root / "config.json"
        self.tokenizer = self.root / "tokenizer.json"
        self.facts = self.root / "run.json"
        self.checkpoints = self.root / "checkpoints"
        self.metrics = self.root / "metrics"
        self.evaluation = self.root / "evaluation.json"
        self.report = self.root / "report.html"
        self.lock = self.root / ".lock"

    def create(self) -> None:
        """Makes the directory; raises `UserError` where that cannot be."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with open(self.lock, "a"):
                pass
        except OSError as error:
            raise UserError(
                f"run directory {self.root}: cannot be written ({error.strerror}). "
                "Give another one with --workdir, or free it."
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the directory for this process. The lock goes with the process, however that ends."""
        with open(self.lock, "a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                raise UserError(
                    f"run directory {self.root}: {holder} is training here. Wait for it, stop it, "
                    "or give this run another directory with --workdir."
                ) from None
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {os.uname().nodename}")
            handle.flush()
            yield

    def check_config(self, run: RunConfig, allow_change: bool) -> None:
        """Refuses to go on with a config that differs, and shows the differences, unless they are allowed.

        Before the first step there is nothing to lose, and any config may be started with.
        """
        records = self.metrics / FILE_NAME
        saved = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        started = saved or (records.exists() and records.stat().st_size > 0)
        differences = self.differences(run)
        if started and differences and not allow_change:
            raise UserError(
                f"run directory {self.root}: was started with another config:\n  "
                + "\n  ".join(differences)
                + "\nGive another directory with --workdir to start a new run, or --allow-config-change to go on "
                "with the new values."
            )

    def load_config(self) -> RunConfig:
        """The run that the directory was started with."""
        plain = read_json(self.config, "a run directory made by `drover train`")
        return from_plain(RunConfig, plain, str(self.config))

    def differences(self, run: RunConfig) -> list[str]:
        """A line for each option in which `run` differs from what the directory was started with.

        The meshes aside: a run is the same on any.
        """
        lines = diff(read_json(self.config, "the config of the run"), run) if self.config.exists() else []
        return [line for line in lines if not line.startswith(("mesh.", "distill.teacher_mesh"))]

    def save(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        """Writes the config, and keeps the tokenizer: another Python has another standard library to train one on."""
        write_json(self.config, to_plain(run))
        replace_file(self.tokenizer, tokenizer.serialised)

    def load_tokenizer(self, digest: str) -> Tokenizer:
        """The tokenizer that `save` kept.

        Args:
            digest: what a checkpoint of this run says of the tokenizer that it was trained with.

        Raises:
            UserError: the file is missing or damaged, or is another tokenizer.
        """
        try:
            tokenizer = load_file(self.tokenizer)
        except UserError as error:
            raise UserError(
                f"{error}\nIt should be the tokenizer that the run was started with: restore it from a copy. Run "
                "directories of an earlier version keep another form of it, which cannot be read any more."
            ) from error
        if tokenizer.digest != digest:
            raise UserError(
                f"{self.tokenizer}: digest found {tokenizer.digest}, expected {digest}, with which the checkpoint was "
                "saved. The file was changed, or is another run's: restore it from a copy."
            )
        return tokenizer


def write_json(path: Path, value: Any) -> None:
    """Writes atomically: a reader sees the old file or the new one, whenever the writer dies."""
    replace_file(path, json.dumps(value, indent=1))


def read_json(path: Path, expected: str) -> Any:
    """Reads a JSON file; raises `UserError` that says what should have been there."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected {expected}.") from None
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected {expected}.") from error
