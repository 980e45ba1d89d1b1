"""Held-out batches are the same each time, and kept as far as there is room."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import trainer.evaluate
from trainer.evaluate import HeldOut


def test_batches_are_kept_up_to_so_many_bytes_and_made_again_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def batch(n: int, rows: Any) -> dict[str, np.ndarray]:
        made.append(n)
        return {"loss": np.full(10, n, np.float64)}

    def step(params: Any, router_bias: Any, share: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"source_loss": share["loss"][:1], "source_weight": np.ones(1)}

    monkeypatch.setattr(trainer.evaluate, "KEPT_BYTES", 200)  # two of them
    dataset: Any = SimpleNamespace(batch=batch, source_names=("a",))
    put: Any = lambda share: share  # noqa: E731
    held_out = HeldOut(dataset, step, [0], put)
    assert [held_out.score({}, {}, 4)["loss"] for _ in range(2)] == [1.5, 1.5]
    assert made == [0, 1, 2, 3, 2, 3]
