"""The logger's promises: nothing lost, nothing rounded, nothing half written, and a failure that is heard."""

import json
import math
import os
import resource
import threading
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] (made by protobuf at import)

from sharding.errors import UserError
from trainer import metrics
from trainer.metrics import MetricsLogger, read_metrics


def train(step: int, **values) -> dict:
    return {"kind": "train", "step": step, **values}


def events(directory) -> list[Event]:
    found = []
    for path in sorted(directory.glob("events.out.tfevents.*"), key=os.path.getmtime):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return found


def test_values_of_every_kind_come_back_exactly(tmp_path):
    load_LE = np.random.default_rng(0).random((3, 5), np.float32)
    values = {
        "loss": jnp.float32(1) / 3,
        "python": 0.1 + 0.2,
        "float64": np.float64(1) / 3,
        "bfloat16": jnp.bfloat16(1e30),
        "tokens": jnp.int32(2**31 - 1),
        "tokens_seen": 2**40 + 1,
        "experts/load": jnp.asarray(load_LE),
        "list": [1, np.float32(0.7)],
        "tiny": np.nextafter(np.float32(0), np.float32(1)),
    }
    with MetricsLogger(tmp_path, 0) as logger:
        logger.write(train(1, **values))
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record == {
        "kind": "train",
        "step": 1,
        "loss": float(np.float32(1) / np.float32(3)),
        "python": 0.1 + 0.2,
        "float64": 1 / 3,
        "bfloat16": float(ml_dtypes.bfloat16(1e30)),
        "tokens": 2**31 - 1,
        "tokens_seen": 2**40 + 1,
        "experts/load": load_LE.astype(np.float64).tolist(),
        "list": [1, float(np.float32(0.7))],
        "tiny": 2.0**-149,
    }
    assert np.array_equal(np.float32(record["experts/load"]), load_LE)


def test_values_that_are_not_finite_are_valid_json_and_come_back(tmp_path):
    with MetricsLogger(tmp_path, 0) as logger:
        logger.write(train(1, loss=jnp.float32("nan"), grad_norm=math.inf, load=np.array([1.0, -np.inf])))
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    strict = json.loads(line, parse_constant=refuse)
    assert (strict["loss"], strict["grad_norm"], strict["load"]) == ("NaN", "Infinity", [1.0, "-Infinity"])
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf and record["load"] == [1.0, -math.inf]


class Unfinished:
    """A value that the device is still computing."""

    def __init__(self):
        self.done, self.copied = threading.Event(), False

    def copy_to_host_async(self):
        self.copied = True

    def __array__(self, dtype=None, copy=None):
        assert self.done.wait(10)
        return np.array(7.0, np.float32)


def test_writing_does_not_wait_for_the_device(tmp_path):
    value = Unfinished()
    with MetricsLogger(tmp_path, 0) as logger:
        logger.write(train(1, loss=value))
        logger.write(train(2, loss=8.0))
        assert value.copied and logger.path.read_text() == ""
        value.done.set()
        logger.flush()
        assert [r["loss"] for r in read_metrics(logger.path)] == [7.0, 8.0]


def test_a_full_queue_makes_the_loop_wait_and_loses_nothing(tmp_path):
    seen, gate = [], threading.Event()

    def slow_console(record):
        gate.wait(10)
        seen.append(record["step"])

    logger = MetricsLogger(tmp_path, 0, observers=[slow_console], queue_size=2)
    blocked = threading.Thread(target=lambda: [logger.write(train(step)) for step in range(1, 21)])
    blocked.start()
    time.sleep(0.1)
    assert blocked.is_alive()
    gate.set()
    blocked.join(10)
    logger.close()
    assert seen == list(range(1, 21)) == [r["step"] for r in read_metrics(logger.path)]


def test_flush_returns_after_fsync(tmp_path, monkeypatch):
    synced = []
    with MetricsLogger(tmp_path, 0) as logger:
        monkeypatch.setattr(metrics.os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
        logger.write(train(1, loss=jnp.float32(1)))
        assert synced == []
        logger.flush()
        assert synced[0] == logger.path.stat().st_size > 0


def test_observers_get_plain_values_in_order(tmp_path):
    seen = []
    with MetricsLogger(tmp_path, 0, observers=[seen.append]) as logger:
        logger.write(train(1, loss=jnp.float32(2), load=jnp.ones((2, 2))))
        logger.write({"kind": "eval", "step": 1, "loss": np.float64(3)})
    assert seen == [train(1, loss=2.0, load=[[1.0, 1.0], [1.0, 1.0]]), {"kind": "eval", "step": 1, "loss": 3.0}]
    assert type(seen[1]["loss"]) is float


def test_an_observer_can_stop_the_run(tmp_path):
    def health(record):
        raise UserError("ten steps in a row were not finite")

    logger = MetricsLogger(tmp_path, 0, observers=[health])
    logger.write(train(1))
    with pytest.raises(UserError, match="ten steps"):
        logger.flush()
    with pytest.raises(UserError, match="ten steps"):
        logger.write(train(2))
    with pytest.raises(UserError, match="ten steps"):
        logger.close()
    logger.close()
    assert [r["step"] for r in read_metrics(logger.path)] == [1]


def test_a_full_disk_is_named_and_does_not_hang_the_loop(tmp_path):
    logger = MetricsLogger(tmp_path, 0, queue_size=1)
    logger.write(train(1))
    logger.flush()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (logger.path.stat().st_size + 100, hard))
        logger.write(train(2, text="x" * 200))
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write the metrics \(File too large\)"):
            logger.flush()
        with pytest.raises(UserError, match="File too large"):
            for step in range(3, 50):  # more than the queue holds
                logger.write(train(step))
        with pytest.raises(UserError, match="File too large"):
            logger.flush()
        with pytest.raises(UserError, match="File too large"):
            logger.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [r["step"] for r in read_metrics(logger.path)] == [1]


def test_leaving_on_an_exception_keeps_that_exception(tmp_path):
    def broken(record):
        raise RuntimeError("observer")

    with pytest.raises(ValueError, match="from the loop"), MetricsLogger(tmp_path, 0, observers=[broken]) as logger:
        logger.write(train(1))
        raise ValueError("from the loop")


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "metrics").write_text("a file where a directory belongs")
    with pytest.raises(UserError, match=r"metrics/metrics\.jsonl: cannot write the metrics"):
        MetricsLogger(tmp_path / "metrics", 0)


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(0, []), (2, [0, 1, 2, 2]), (3, [0, 1, 2, 2, 3]), (99, [0, 1, 2, 2, 3])]
)
def test_resuming_removes_what_came_after_the_checkpoint(tmp_path, resume_step, kept):
    with MetricsLogger(tmp_path, 0) as logger:
        for record in (train(0), train(1), train(2, loss=0.1), {"kind": "eval", "step": 2}, train(3, loss=math.nan)):
            logger.write(record)
    before = logger.path.read_text().splitlines(keepends=True)
    with logger.path.open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    with MetricsLogger(tmp_path, resume_step) as logger:
        assert [r["step"] for r in read_metrics(logger.path)] == kept
        assert logger.path.read_text() == "".join(before[: len(kept)])
        logger.write(train(100))
    assert [r["step"] for r in read_metrics(logger.path)] == [*kept, 100]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}')
    with MetricsLogger(tmp_path, 2) as logger:
        logger.write(train(3))
    assert [r["step"] for r in read_metrics(logger.path)] == [1, 2, 3]


def test_a_failed_truncation_leaves_the_old_file_whole(tmp_path, monkeypatch):
    with MetricsLogger(tmp_path, 0) as logger:
        for step in range(1, 5):
            logger.write(train(step))
    before = logger.path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(metrics.os, name, full)
            with pytest.raises(UserError, match="No space left on device"):
                MetricsLogger(tmp_path, 2)
        assert logger.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train", "step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)
    path.write_text('{"kind": "train", "step": 1}\n[1]\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


def test_tensorboard_gets_every_scalar_and_hides_what_is_written_again(tmp_path):
    with MetricsLogger(tmp_path, 0) as logger:
        logger.write(train(5, loss=jnp.float32(2.5), **{"time/step": 0.5, "experts/load": [[1.0]], "note": "text"}))
    (first,) = tmp_path.glob("events.out.tfevents.*")
    os.utime(first, (0, 0))
    first.rename(str(first).replace(".tfevents.", ".tfevents.0"))  # The same process, in the same second.
    with MetricsLogger(tmp_path, 4) as logger:
        logger.write({"kind": "eval", "step": 5, "loss": 1.5})
    found = events(tmp_path)
    scalars = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in found if e.summary.value]
    assert scalars == [(5, {"train/loss": 2.5, "train/time/step": 0.5}), (5, {"eval/loss": 1.5})]
    starts = [e.step for e in found if e.session_log.status == SessionLog.START]
    assert starts == [0, 5]
