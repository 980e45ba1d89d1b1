"""`drover teach`: what it keeps is what the teacher says beside the student; it goes on, in parts, and refuses by name."""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import shutil
import signal
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer.teach
from data.pipeline import build_dataset
from data.target_cache import NOTES, TargetCache, describe
from data.target_digests import Segment
from data.target_records import Targets
from data.target_writer import TargetWriter
from model.sampled_targets import Targets as DrawnTargets
from sharding.config import MeshConfig
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from tests.oracle_cases import FAST_COMPILE
from tests.trainer.processes import finish, metrics, start, wait_until
from tests.trainer.saved_run import nano, save_run
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, DistillConfig
from trainer.flops import flops_per_token
from trainer.hf.exporter import export_checkpoint
from trainer.hf.files import Planned, write_tensors
from trainer.initialise import abstract_state
from trainer.loop import Run, train
from trainer.report_text import percent
from trainer.step import Skeleton
from trainer.targets import OUTCOMES, CachedSource, DrawKeys, header_of
from trainer.teach import teach
from trainer.teacher import identity, load_teacher

CONSTANT = ("--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=1")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    finish(start(folder, "--config.model.hidden_size=32", config="tests/nano.py", steps=6))
    return folder


def options(teacher: Path, *others: str) -> Sequence[str]:
    given = {"teacher": teacher, "teacher_dtype": "float32", "draws": 12}
    named = [f"--config.distill.{name}={value}" for name, value in given.items()]
    return ("--config.distill={}", *named, *CONSTANT, *others)


SMALL_SHARDS = "import trainer.teach\ntrainer.teach.SHARD_BYTES = 9000\n"
"""Three or four records each, so that most end within a batch."""
KILLED_IN_THE_SECOND_BATCH = """
import os, signal
from data.target_writer import _Shard
write, calls = _Shard.write, []
def killed(*given):
    calls.append(given)
    if len(calls) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*given)
_Shard.write = killed
"""


def taught(teacher: Path, cache: Path, *others: str, before: str = "") -> Any:
    given = options(teacher, *others)
    return start(cache, *given, command="teach", folder="--out", config="tests/nano.py", steps=6, before=before)


def learn(workdir: Path, teacher: Path, *others: str) -> Any:
    return start(workdir, *options(teacher, *others), config="tests/nano.py", steps=6)


@pytest.fixture(scope="module")
def cache(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    output = finish(taught(teacher, folder, before=SMALL_SHARDS))
    assert "48 segments, 6,144 tokens" in output, output
    facts = describe(folder)
    assert facts["device seconds"] > 0 and facts["tokens of known cost"] == facts["tokens"] == 6144
    return folder


def files(cache: Path) -> dict[str, bytes]:
    """All but what the shards took to make."""
    return {path.name: path.read_bytes() for path in cache.iterdir() if not re.match(r"\d+\.json", path.name)}


@pytest.mark.slow
def test_a_student_of_the_cache_learns_what_one_beside_the_teacher_does(
    teacher: Path, cache: Path, tmp_path: Path
) -> None:
    """The same draws of the same distribution; only the facts about it are rounded, to float16."""
    finish(learn(tmp_path / "beside", teacher))
    source = ("--config.distill.source=cache", f"--config.distill.cache={cache}")
    output = finish(learn(tmp_path / "cached", teacher, *source))
    assert f"{cache}, of {teacher.name}, step 6" in output
    beside, cached = metrics(tmp_path / "beside"), metrics(tmp_path / "cached")
    assert [record["step"] for record in beside] == [record["step"] for record in cached]
    for ours, theirs in zip(cached, beside, strict=True):
        for name in ("loss", "grad_norm", "soft", "soft_weight", "taught", "teacher_loss", "teacher_entropy"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    facts = json.loads((tmp_path / "cached" / "run.json").read_text())["teacher_cache"]
    page, spent = (tmp_path / "cached" / "report.html").read_text(), describe(cache)["device seconds"]
    assert facts["tokens"] == facts["tokens_of_known_cost"] == 6144 and round(facts["device_seconds"], 1) == spent
    assert f"100.0 % of the tokens had targets from the cache, where one takes {facts['bytes_per_token']:.1f}" in page
    model = nano().model
    student, teachers = (flops_per_token(dataclasses.replace(model, hidden_size=size), 128) for size in (16, 32))
    own = teachers.forward / (teachers.forward + student.training)
    for record in (record for record in metrics(tmp_path / "beside") if record["kind"] == "train"):
        assert record["teacher_flops"] / record["flops"] == pytest.approx(own)
    page = (tmp_path / "beside" / "report.html").read_text()
    assert f"100.0 % of the tokens had targets from the teacher beside the student, which took {percent(own)}" in page
    train = [record for record in metrics(tmp_path / "cached") if record["kind"] == "train"]
    assert train[0]["taught"] == 1 and [record["cache/found"] for record in train] == [8, 16, 24, 32, 40, 48]


@pytest.mark.slow
def test_it_goes_on_after_a_kill_and_in_parts_to_the_same_records(teacher: Path, cache: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    process = taught(teacher, whole, before=SMALL_SHARDS + KILLED_IN_THE_SECOND_BATCH)
    finish(process, -signal.SIGKILL)
    done = describe(whole)
    assert 8 < done["segments"] < 15 and done["unfinished shards"] == 1
    output = finish(taught(teacher, whole, before=SMALL_SHARDS))
    assert f"; {6144 - done['tokens']:,} tokens of them now" in output
    assert files(whole) == files(cache)
    assert "; 0 tokens of them now" in finish(taught(teacher, whole, before=SMALL_SHARDS))
    assert files(whole) == files(cache)

    parts = tmp_path / "parts"
    for part in ("2/2", "1/2"):
        finish(taught(teacher, parts, f"--part={part}"))
    facts, expected = describe(parts), describe(cache)
    assert facts["shards"] == 2 and facts["repeated segments"] == 0
    assert facts["device seconds"] > 0
    for name in ("segments", "tokens", "ids of a token", "bytes of records", "tokens of known cost"):
        assert facts[name] == expected[name]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["mesh", "cache"])
def test_a_student_that_was_killed_goes_on_as_if_it_had_not_been(
    source: str, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    words = (f"--config.distill.source={source}", "--config.distill.soft_weight=0.8")
    words += (f"--config.distill.cache={cache}",) if source == "cache" else ()
    words += (
        "--config.distill.final_soft_weight=0.2",
        "--config.distill.adapt=gap",
        "--config.checkpoint.every_steps=1",
    )
    for name in ("whole", "killed"):
        process = learn(tmp_path / name, teacher, *words)
        if name == "killed":
            wait_until(lambda: (tmp_path / "killed" / "checkpoints" / "2").is_dir(), process)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            process = learn(tmp_path / name, teacher, *words)
        output = finish(process)
    assert re.search("own checkpoint, step [2345]", output), output
    states = []
    for name in ("whole", "killed"):
        checkpoints = Checkpoints(tmp_path / name / "checkpoints")
        run = checkpoints.run(6)
        states.append(checkpoints.restore(6, abstract_state(run, Skeleton(run.model, DeviceMesh.alone()))))
    assert states[0].optimizer and states[0].step == 6
    jax.tree.map(np.testing.assert_array_equal, *states)
    whole, killed = (metrics(tmp_path / name) for name in ("whole", "killed"))
    assert whole == killed and [record["step"] for record in whole if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_mesh_keeps_what_one_device_does(
    teacher: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it took counts on each of its devices."""
    clock, ask = itertools.count(100), trainer.teach.Asked.__call__
    hours = [next(clock)]

    def asked(self: Any, batch: Any) -> Any:
        hours.append(next(clock))
        return ask(self, batch)

    monkeypatch.setattr(trainer.teach.Asked, "__call__", asked)
    monkeypatch.setattr(trainer.teach, "time", SimpleNamespace(monotonic=lambda: 3600.0 * hours[-1]))
    run = nano()
    distill = DistillConfig(teacher=str(teacher), teacher_dtype="float32", draws=12)
    teach(dataclasses.replace(run, distill=distill), tmp_path)  # on all devices here
    assert jax.device_count() == 8
    assert describe(tmp_path)["device seconds"] == 8 * 6 * 3600  # six batches
    with TargetCache(cache) as alone, TargetCache(tmp_path) as mesh:
        assert alone.header == mesh.header
        batch = build_dataset(run.data, run.media, "train").batch(1)
        digests = [segment.digest for segment in DrawKeys(alone.header).segments(batch)]
        assert len(digests) == 8
        same = []
        for ours, theirs in zip(mesh.get(digests), alone.get(digests), strict=True):
            assert isinstance(ours, Targets) and isinstance(theirs, Targets) and ours.tokens == theirs.tokens
            np.testing.assert_allclose(ours.target_log_prob, theirs.target_log_prob, atol=4e-3)  # a float16 near 5
            rows = [targets.rows(targets.ids, 12) for targets in (ours, theirs)]
            same += np.all(rows[0] == rows[1], axis=1).tolist()
        assert np.mean(same) > 0.98  # a draw on the edge between two ids may fall to either side


@pytest.mark.slow
def test_segments_that_are_missing_end_the_run_or_are_learned_hard_and_counted(teacher: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    finish(taught(teacher, half, "--part=1/2"))
    source = ("--config.distill.source=cache", f"--config.distill.cache={half}")
    output = finish(learn(tmp_path / "fails", teacher, *source), status=2)
    assert f"{half}: has no targets for segment" in output and "`drover teach` goes on with it" in output
    output = finish(learn(tmp_path / "hard", teacher, *source, "--config.distill.missing=hard", "--processes=2"))
    assert output.count("has no targets for segment") == NOTES
    train = [record for record in metrics(tmp_path / "hard") if record["kind"] == "train"]
    assert [record["taught"] for record in train] == [1, 0, 1, 0, 1, 0]
    assert [record["soft_weight"] for record in train] == [0.5, 0, 0.5, 0, 0.5, 0]
    assert [record["cache/missing"] for record in train] == [0, 8, 8, 16, 16, 24]  # of both processes
    assert [record["cache/found"] for record in train] == [8, 8, 16, 16, 24, 24]
    assert [("soft" in record, "teacher_loss/text" in record) for record in train] == [(True, True), (False, False)] * 3


def made_up(segment: Segment) -> Targets:
    """Targets of a segment, of a teacher that there is not."""
    one = np.ones((segment.stop - segment.start, 1))
    return Targets.of(5 * one, 4 * one, None, -one[:, 0], one[:, 0], one[:, 0])


def test_a_run_whose_cache_lacks_targets_names_and_counts_them_though_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One segment is missing, the record of another damaged."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST_COMPILE))
    folder = tmp_path / "cache"
    distill = DistillConfig(source="cache", cache=str(folder), draws=4, missing="hard")
    run = nano(mesh=MeshConfig(data=8, fsdp=1), distill=distill)
    dataset = build_dataset(run.data, run.media, "train")
    header = header_of(run, distill, dataset.tokenizer.digest, {"name": "made up"})
    segments = [segment for n in range(run.steps) for segment in DrawKeys(header).segments(dataset.batch(n))]
    assert len({segment.digest for segment in segments}) == len(segments) == 48
    missing, damaged = segments.pop(9), segments[29]  # of the second batch and of the fourth
    with TargetWriter(folder, header) as writer:
        writer.add([segment.digest for segment in segments], [made_up(segment) for segment in segments])
    shard = folder / "000000.array_record"
    data = bytearray(shard.read_bytes())
    data[data.index(damaged.digest) + 40] ^= 4
    shard.write_bytes(data)

    threads, agreed, look_up, done = set(), [], CachedSource.__call__, Run._done

    def looked_up(self: CachedSource, batch: Any) -> Any:
        threads.add(threading.current_thread().name)
        return look_up(self, batch)

    def waited(self: Run, pending: Any) -> None:
        done(self, pending)
        if self.start == 0 and pending.step == 1:
            self.stop.requested.set()

    monkeypatch.setattr(CachedSource, "__call__", looked_up)
    monkeypatch.setattr(Run, "_done", waited)
    monkeypatch.setattr("trainer.loop.check_same", lambda what, value: agreed.append(value))
    with pytest.raises(SystemExit):
        train(run, tmp_path / "run")
    train(run, tmp_path / "run")
    output = capsys.readouterr().out
    assert f"{folder}: has no targets for segment {missing.digest.hex()}" in output
    assert f"{shard}: record 29 is damaged" in output
    lacking = "2 of 48 segments had no targets (1 missing, 1 damaged), and were learned from the next token alone"
    assert f"cache of targets: {lacking}" in output and "targets missing 1  targets damaged 1" in output
    assert lacking in (tmp_path / "run" / "report.html").read_text()
    records = [record for record in metrics(tmp_path / "run") if record["kind"] == "train"]
    found = [[record[f"cache/{name}"] for record in records] for name in OUTCOMES]
    assert found == [[8, 15, 23, 30, 38, 46], [0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert [record["taught"] == 1 for record in records] == [True, False, True, False, True, True]
    assert [record["teacher_loss"] for record in records] == [1] * 6  # of those that are taught
    assert threads == {"feeder"} and header.digest.hex() in agreed[0]


@pytest.mark.parametrize(("change", "words"), [
    ({"draws": 25}, "distill.draws: found 12, expected 25"),
    ({"temperature": 2.0}, "distill.temperature: found 1.0, expected 2.0"),
    ({"cache": "/nowhere"}, "/nowhere: found no header.json, expected a cache of targets"),
])  # fmt: skip
def test_a_cache_of_other_targets_is_refused(change: dict[str, Any], words: str, cache: Path) -> None:
    run = nano()
    distill = DistillConfig(source="cache", cache=str(cache), draws=12)
    tokenizer = TargetCache(cache).header.tokenizer
    CachedSource(run, distill, tokenizer).close()
    with pytest.raises(UserError, match=words):
        CachedSource(run, dataclasses.replace(distill, **change), tokenizer)
    with pytest.raises(UserError, match=r"tokenizer: found .*, expected another"):
        CachedSource(run, distill, "another")
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, video_fps=9.0))
    with pytest.raises(UserError, match="preprocessing: found"):
        CachedSource(other, distill, tokenizer)


def test_a_cache_of_another_teacher_is_refused(teacher: Path, cache: Path, tmp_path: Path) -> None:
    run = nano()
    distill = DistillConfig(source="cache", cache=str(cache), draws=12, teacher=str(teacher))
    tokenizer = TargetCache(cache).header.tokenizer
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    for same in (teacher, moved):
        with contextlib.closing(CachedSource(run, dataclasses.replace(distill, teacher=str(same)), tokenizer)) as found:
            assert "not compared" not in found.origin
    absent = dataclasses.replace(distill, teacher=str(tmp_path / "absent"))
    with contextlib.closing(CachedSource(run, absent, tokenizer)) as found:
        assert found.origin.endswith(f"; not compared with {tmp_path}/absent, which is not there")
    earlier = dataclasses.replace(distill, teacher=str(teacher / "checkpoints" / "3"))
    with pytest.raises(UserError, match=f"teacher: found {teacher.name}, step 6 .*expected {teacher.name}, step 3"):
        CachedSource(run, earlier, tokenizer)


def test_a_hugging_face_teacher_is_named_by_its_config_and_all_of_its_tensors(tmp_path: Path) -> None:
    """The weights differ in the last number of the last tensor, or in an eighth of its middle; both are far behind 1 MiB."""
    numbers = np.arange(2**19, dtype=np.float32)
    tensors = {"a": numbers, "b": numbers[:5], "c": numbers.reshape(2**10, -1)}

    def made(name: str, config: str = "{}", changed: Any = np.s_[:0], max_shard_bytes: int = 10**9) -> dict[str, str]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config)
        last = numbers.copy()
        last[changed] += 1
        given = tensors | {"c": last.reshape(2**10, -1)}
        planned = [Planned(key, array.dtype, array.shape) for key, array in given.items()]
        write_tensors(folder, planned, lambda tensor: iter([given[tensor.name]]), max_shard_bytes, lambda _: None)
        return identity(folder)

    one, same, sharded = made("one"), made("same"), made("sharded", max_shard_bytes=2**21)
    assert one["name"] == "one" and one["digest"] == same["digest"] == sharded["digest"]
    others = made("config", "{ }"), made("last", changed=np.s_[-1:]), made("middle", changed=np.s_[2**18 : 5 * 2**16])
    assert len({one["digest"], *(other["digest"] for other in others)}) == 4


def test_a_teacher_whose_tokenizer_is_another_or_unknown_is_refused(tmp_path: Path) -> None:
    run = nano()
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, router_bias_rate=0.0))
    state = save_run(tmp_path / "run", run)
    hf, checkpoints = tmp_path / "hf", Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig())
    export_checkpoint(tmp_path / "run", hf, None, 10**9, lambda _: None)
    metadata, mesh = checkpoints.metadata(0), DeviceMesh.alone()

    def load(path: Path) -> str:
        distill = DistillConfig(teacher=str(path), teacher_dtype="float32")
        return load_teacher(run, distill, mesh, None, metadata["tokenizer_digest"]).origin

    assert load(hf) == str(hf)
    tokenizer = json.loads((hf / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["content"] = "<|another|>"
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=f"^{hf}/tokenizer.json: its tokens are those of tokenizer .*, found"):
        load(hf)
    (hf / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"^distill.teacher: {hf} has no tokenizer.json, expected that .* Put the one"):
        load(hf)
    checkpoints.save(dataclasses.replace(state, step=jnp.asarray(1)), metadata | {"tokenizer_digest": None})
    checkpoints.close()
    with pytest.raises(UserError, match=r"^distill.teacher: checkpoint .*/1 names no tokenizer, .* `drover import`"):
        load(tmp_path / "run")


def test_a_teacher_that_says_what_is_no_number_keeps_nothing(tmp_path: Path) -> None:
    run = nano()
    save_run(tmp_path / "teacher", run, final_norm=np.full(run.model.hidden_size, np.nan, np.float32))
    distill = DistillConfig(teacher=str(tmp_path / "teacher"), teacher_dtype="float32", draws=12)
    with pytest.raises(UserError, match=r"gives no finite distribution for .* of batch 0, first in row 0 at 0\."):
        teach(dataclasses.replace(run, distill=distill), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.array_record"))


@pytest.mark.slow
@pytest.mark.parametrize("other", [
    "seed = run.seed + 1; teach(dataclasses.replace(run, seed=seed), *others, **options)",
    "folder, _, parts = others; teach(run, folder, 1, parts, **options)",
])  # fmt: skip
def test_processes_that_have_the_teacher_together_have_one_command(other: str, teacher: Path, tmp_path: Path) -> None:
    """Where each had a part of its own, say, half of the work would be left."""
    config = tmp_path / "other.py"
    config.write_text(
        "import dataclasses, os, trainer.teach\nfrom tests.nano import get_config\nteach = trainer.teach.teach\n"
        f"def of_second(run, *others, **options):\n    {other}\n"
        "if os.environ.get('DROVER_PROCESS_ID') == '1':\n    trainer.teach.teach = of_second\n"
    )
    given = options(teacher, "--part=1/2", "--processes=2")
    process = start(tmp_path / "cache", *given, command="teach", folder="--out", config=str(config), steps=6)
    output = finish(process, 2)
    assert "processes 1 of 2: found another config, data or --part" in output, output
    assert not list(tmp_path.glob("cache/*"))


def test_a_weight_that_no_record_holds_is_refused() -> None:
    """That of a target which is not learned does not matter."""
    distill, batch = DistillConfig(teacher="big", draws=2, proposal=0.1), {"loss_weights": np.array([[0.0, 1.0, 1.0]])}
    weights = np.array([[[1e6, 0], [1.0, 65504], [65504, 65505]]])
    facts = np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 3), bool)
    for last, words in (
        (2, None),
        (3, r"above 65,504, .* to 1 of 2 .* batch 7, first in row 3 at 1.*proposal nearer to 1"),
    ):
        held = {name: array[:, last - 2 : last] for name, array in batch.items()}
        arrays: list[Any] = [weights, weights[:, last - 2 : last], weights]
        found = DrawnTargets(*arrays + [fact[:, last - 2 : last] for fact in facts])
        with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
            trainer.teach._check_kept(distill, 7, np.array([3]), held, found)


def test_teach_refuses_what_it_cannot_keep(teacher: Path, cache: Path, tmp_path: Path) -> None:
    run = nano()
    for distill in (None, DistillConfig(teacher=str(teacher)), DistillConfig(draws=12)):
        with pytest.raises(UserError, match="expected a teacher, and draws"):
            teach(dataclasses.replace(run, distill=distill), tmp_path)
    other = DistillConfig(teacher=str(teacher), teacher_dtype="float32", draws=13)
    before = files(cache)
    with pytest.raises(UserError, match="draws: found 12, expected 13"):
        teach(dataclasses.replace(run, distill=other), cache)
    assert files(cache) == before
    output = finish(taught(teacher, tmp_path, "--part=3/2"), status=2)
    assert "--part: found 3/2, expected I/N" in output


@pytest.mark.slow
def test_processes_that_have_the_teacher_together_keep_what_one_does(
    teacher: Path, cache: Path, tmp_path: Path
) -> None:
    """One of them killed in its second batch: the others end, and the same command goes on, with other processes; also
    where one has nothing left to ask of a batch and the other has."""
    folder, config = tmp_path / "cache", tmp_path / "killed.py"
    in_one = textwrap.indent(KILLED_IN_THE_SECOND_BATCH.replace("15", "7"), "    ")
    config.write_text(
        f"from tests.nano import get_config\n{SMALL_SHARDS}"
        f"import os\nif os.environ.get('DROVER_PROCESS_ID') == '1':\n{in_one}"
    )
    for processes, config_file, status in (
        (2, str(config), 128 + signal.SIGKILL),
        (2, "tests/nano.py", 0),
        (2, "tests/nano.py", None),
        (1, "tests/nano.py", 0),
    ):
        if status is None:  # a shard is lost, which one process wrote
            lost = min(folder.glob("*.array_record"))
            for file in folder.glob(f"{lost.stem}.*"):
                file.unlink()
            assert describe(folder)["segments"] < 48
        given = options(teacher, f"--processes={processes}")
        process = start(folder, *given, command="teach", folder="--out", config=config_file, steps=6)
        output = finish(process, status or 0)
        if status:
            assert "ended without a word" in output, output
            assert 4 < describe(folder)["segments"] < 48
        else:
            assert output.count(f"{folder}: 48 segments, 6,144 tokens") == 1, output  # one speaks
    assert "; 0 tokens of them now" in output
    facts, expected = describe(folder), describe(cache)
    assert facts["repeated segments"] == 0 and facts["ids of a token"] == pytest.approx(
        expected["ids of a token"], rel=1e-2
    )
    run = nano()
    dataset = build_dataset(run.data, run.media, "train")
    kept = []
    for each in (folder, cache):
        distill = DistillConfig(teacher=str(teacher), source="cache", cache=str(each), draws=12)
        with contextlib.closing(CachedSource(run, distill, dataset.tokenizer.digest)) as source:
            kept.append([source(dataset.batch(n)) for n in range(6)])
    for ours, theirs in zip(*kept, strict=True):
        for name in ("soft_log_prob", "soft_entropy"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=4e-3, err_msg=name)  # a float16 near 5
        assert (ours["soft_ids"] == theirs["soft_ids"]).all(axis=-1).mean() > 0.98  # a draw may fall on an edge
