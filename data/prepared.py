"""A prepared data set on disk: what dataset.json says, the index, the shards."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from data.index import FORMAT, Index
from data.open_files import check_limit
from data.shards import Shards
from sharding.errors import UserError


@dataclass(frozen=True)
class Prepared:
    """A data set as `data.prepare` makes it."""

    folder: Path
    facts: dict[str, Any]
    """Of dataset.json."""
    index: Index
    shards: Shards

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The data set in this folder.

        Raises:
            UserError: there is none, or it is unfinished, damaged or of another version; or too many files are open.
        """
        path = folder / "dataset.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            found, dtype, written = (facts[name] for name in ("format", "token_dtype", "written"))
        except FileNotFoundError:
            if (folder / "unfinished").exists():
                raise UserError(
                    f"{folder}: is unfinished. Give the command that began it again, and it goes on."
                ) from None
            raise UserError(f"{folder}: found no dataset.json, expected data made by `drover data prepare`.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            check_limit(path, error)
            raise UserError(f"{path}: cannot be read ({error!r}). Prepare the data again.") from error
        if found != FORMAT:
            raise UserError(f"{path}: found format {found}, expected {FORMAT}. Prepare the data again.")
        index = Index.open(folder / "index")
        if len(index) != written:
            raise UserError(f"{folder}: found {len(index)} documents in the index, expected {written}. Copy it again.")
        return cls(folder, facts, index, Shards(folder / "shards", dtype))

    def __reduce__(self):
        return Prepared.open, (self.folder,)
