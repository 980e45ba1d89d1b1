"""What the tests of `drover data prepare` have in common: it called from Python, and what came out."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from data import prepare_unit
from data.prepare import Options, prepare
from data.prepared import Prepared
from data.records import Record


def jsonl(*records: Any) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


class InProcess:
    """Stands for the processes, which take seconds to start."""

    def __init__(self, workers: int, context: object, start: object, arguments: tuple[Any, ...]):
        prepare_unit.use(*arguments)

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: object) -> None:
        pass


def made(out: Path, *sources: Path, workers: int = 1, **options: Any) -> Prepared:
    prepare(sources, out, Options(**{"tokenizer": "bytes", **options}), workers, lambda _: None)
    return Prepared.open(out)


def records(data: Prepared) -> list[Record]:
    places = zip(data.index.shards.tolist(), data.index.records.tolist(), strict=True)
    with data.shards as shards:
        return shards.read(list(places))


def ids(data: Prepared) -> list[str]:
    return [record.id for record in records(data)]


def rejected(out: Path) -> list[tuple[str, str]]:
    lines = (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["where"], line["rule"]) for line in map(json.loads, lines)]
