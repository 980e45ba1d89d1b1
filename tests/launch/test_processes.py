"""Several real processes on one machine: one run whatever their number, and one end whichever of them dies."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from launch.processes import ALONE, Group, again, check_gpus, gpus_name, group_of, join, local_devices
from sharding.errors import UserError
from tests.trainer.processes import ROOT, finish, logged, metrics, reached, saving, start, wait_until

CONSTANT = ("--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=1")
"""A rate that does not depend on the number of steps."""


SPIED = """
import os
from data.pipeline import Dataset
from tests.nano import get_config
read = Dataset._read
def spied(self, rows, keys):
    with open("{folder}/read" + os.environ["DROVER_PROCESS_ID"], "a") as file:
        file.writelines(f"{{self._again[2]}} {{n}} {{row}}\\n" for _, n, row in keys)
    return read(self, rows, keys)
Dataset._read = spied
"""
"""A config in whose processes each writes down which rows it reads: held out or not, number of the batch, row."""


def begin(
    workdir: Path, *arguments: str, config: str = "tests/nano.py", steps: int = 6, **options: Any
) -> subprocess.Popen[str]:
    return start(workdir, *arguments, config=config, steps=steps, **options)


def assert_same_run(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Every number of every record, to what another order of additions may change."""
    assert [(record["kind"], record["step"]) for record in found] == [(r["kind"], r["step"]) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float):
                assert math.isclose(ours[name], value, rel_tol=1e-5 if name == "grad_norm" else 1e-6), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of six steps in one process, and held-out scores at the end."""
    workdir = tmp_path_factory.mktemp("alone")
    finish(begin(workdir, *CONSTANT))
    return metrics(workdir)


def test_a_run_goes_on_with_another_number_of_processes_as_if_nothing_had_happened(
    alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    spied = tmp_path / "spied.py"
    spied.write_text(SPIED.format(folder=tmp_path))
    for steps, processes, context in ((2, 4, 2), (4, 1, 1), (6, 2, 2)):
        mesh = (f"--processes={processes}", f"--config.mesh.context={context}")
        config = str(spied) if steps == 2 else "tests/nano.py"
        output = finish(begin(tmp_path, *CONSTANT, *mesh, "--allow-config-change", config=config, steps=steps))
        assert output.count(f"step {steps}/{steps}  train") == 1, output  # one process speaks
        assert "Gloo" not in output
    found = [record for record in metrics(tmp_path) if record["kind"] == "train" or record["step"] == 6]
    assert_same_run(found, alone)
    for process in range(4):  # of which two have the same rows, and half of the tokens each
        rows = range(4) if process < 2 else range(4, 8)
        batches = (("False", 0), ("False", 1), ("True", 0))
        lines = (tmp_path / f"read{process}").read_text().splitlines()
        assert sorted(lines) == [f"{held_out} {n} {row}" for held_out, n in batches for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "mesh"), [
    ("tests/nano.py", "data=2, expert=2"),
    ("tests/micro.py", "expert=2, context=2"),  # with pictures
])  # fmt: skip
def test_processes_with_several_devices_and_a_mesh_across_them(config: str, mesh: str, tmp_path: Path) -> None:
    options = ("--config.data.batch_size=8", "--config.checkpoint.every_steps=6", *CONSTANT)
    finish(begin(tmp_path / "alone", *options, config=config))
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    across = ("--processes=2", *(f"--config.mesh.{part}" for part in mesh.split(", ")))
    output = finish(begin(tmp_path / "several", *options, *across, config=config, environment=devices))
    assert "4 x cpu" in output and mesh in output
    assert_same_run(metrics(tmp_path / "several"), metrics(tmp_path / "alone"))
    if config == "tests/micro.py":
        answers, expected = (
            json.loads((tmp_path / run / "evaluation.json").read_text()) for run in ("several", "alone")
        )
        assert answers["questions"] == expected["questions"] and answers["questions"]


def children(parent: int) -> dict[int, int]:
    """Number of the process in the run -> process id."""
    found = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        found |= {int(v.partition("=")[2]): int(pid) for v in variables if v.startswith("DROVER_PROCESS_ID=")}
    return found


def endless(workdir: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    process = begin(
        workdir,
        "--processes=3",
        "--peer-timeout=10",
        "--config.data.batch_size=6",
        "--config.mesh.data=3",
        "--config.mesh.fsdp=1",
        "--config.checkpoint.every_steps=5",
        *arguments,
        steps=100_000,
        **options,
    )
    wait_until(lambda: reached(workdir, 8), process)
    return process


def assert_all_end(process: subprocess.Popen[str], victim: int, pids: dict[int, int], words: str) -> None:
    """After a process of a run has died or was stopped."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL, output
    assert f"process {victim} (pid {pids[victim]} on {socket.gethostname()}) {words}" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.mark.slow
def test_a_process_dies_within_a_save_and_the_same_command_goes_on_as_if_nothing_had_happened(
    alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    command = tmp_path, *CONSTANT, "--processes=2", "--config.mesh.context=2"
    process = begin(*command)
    wait_until(lambda: len(children(process.pid)) == 2, process)
    pids = children(process.pid)
    wait_until(lambda: saving(tmp_path), process)
    os.kill(pids[1], signal.SIGKILL)
    assert_all_end(process, 1, pids, "ended without a word (killed, or out of memory)")
    finish(begin(*command))
    found, expected = (
        [record for record in records if record["kind"] == "train"] for records in (metrics(tmp_path), alone)
    )
    assert_same_run(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number", "words"), [
    (0, signal.SIGKILL, "ended without a word"),
    (2, signal.SIGSTOP, "has not been heard of for 10 s"),
    (0, signal.SIGSTOP, "has not been heard of for 10 s"),
])  # fmt: skip
def test_when_a_process_dies_or_hangs_the_others_say_which_and_end(
    victim: int, number: signal.Signals, words: str, tmp_path: Path
) -> None:
    process = endless(tmp_path)
    pids = children(process.pid)
    os.kill(pids[victim], number)
    assert_all_end(process, victim, pids, words)
    saved = {entry.name for entry in (tmp_path / "checkpoints").iterdir() if entry.name.isdigit()}
    assert saved
    before = max(map(int, saved))
    output = finish(begin(tmp_path, "--allow-config-change", "--config.data.batch_size=6", steps=before + 1))
    assert f"own checkpoint, step {before}" in output


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "trouble", "status", "words"), [
    ("n == 4", "raise UserError('a batch is broken.')", 2, "process 1: drover train: a batch is broken."),
    ("n == 4", "time.sleep(3600)", 3, "is alive, but has not gone on from step 4"),
    ("self._again[2]", "time.sleep(3600)", 3, "others wait for it at step 6, part 1 (held-out data, a save, a cache)"),
])  # fmt: skip
def test_a_process_that_fails_or_is_stuck_does_not_leave_the_others_waiting(
    batch: str, trouble: str, status: int, words: str, tmp_path: Path
) -> None:
    config = tmp_path / "broken.py"
    config.write_text(
        "import os, time\n"
        "from data import pipeline\n"
        "from sharding.errors import UserError\n"
        "from tests.nano import get_config\n"
        "batch = pipeline.Dataset.batch\n"
        "def broken(self, n, rows=None):\n"
        f"    if os.environ.get('DROVER_PROCESS_ID') == '1' and {batch}:\n"
        f"        {trouble}\n"
        "    return batch(self, n, rows)\n"
        "pipeline.Dataset.batch = broken\n"
    )
    output = finish(start(tmp_path / "run", "--processes=2", "--peer-timeout=10", config=str(config), steps=6), status)
    assert output.count(words) == 1, output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_save_that_fails_in_one_process_does_not_leave_the_others_waiting(victim: int, tmp_path: Path) -> None:
    config = tmp_path / "full.py"
    config.write_text(
        "import os, resource\n"
        "from tests.nano import get_config\n"
        "from trainer.checkpoint import Checkpoints\n"
        "save = Checkpoints.save\n"
        "def without_room(self, *arguments):\n"
        f"    if os.environ.get('DROVER_PROCESS_ID') == '{victim}':\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "    save(self, *arguments)\n"
        "Checkpoints.save = without_room\n"
    )
    output = finish(start(tmp_path / "run", "--processes=2", config=str(config), steps=100_000), 2)
    told = f"drover train: checkpoints {tmp_path}/run/checkpoints: cannot be written"
    assert output.count(told) == 1 and "checkpoint saved" not in output, output
    assert (f"process 1: {told}" in output) == (victim == 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_at_one_step_and_saves(number: signal.Signals, tmp_path: Path) -> None:
    process = endless(tmp_path)
    if number == signal.SIGINT:  # as from a terminal, which sends it to all
        for pid in children(process.pid).values():
            os.kill(pid, number)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    (line,) = [line for line in output.splitlines() if "saved step" in line]
    step = int(line.split("saved step ")[1].split(".")[0])
    assert (tmp_path / "checkpoints" / str(step)).is_dir() and metrics(tmp_path)[-1]["step"] == step


@pytest.mark.slow
def test_where_nobody_reads_the_output_any_more_all_save_and_end(tmp_path: Path) -> None:
    process = begin(tmp_path, "--processes=2", "--config.checkpoint.every_steps=100000", steps=100_000)
    assert process.stdout
    assert any("/100000  train" in line for line in process.stdout)  # as with `| head`
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    (saved,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == logged(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cluster", ["slurm", "mpirun", "mpirun of Open MPI 5", "mpiexec of MPICH", "kubernetes", "flags"]
)
def test_processes_that_something_else_starts_find_each_other(cluster: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    runs = []
    for i in range(2):
        variables: dict[str, str] = {"JAX_COORDINATOR_PORT": port}
        flags: list[str] = []
        if cluster == "slurm":
            variables |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
            variables |= {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        elif cluster == "mpirun":
            variables |= {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}
            variables |= {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)}
        elif cluster == "mpirun of Open MPI 5":
            variables |= {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(i)}
            flags = [f"--coordinator=127.0.0.1:{port}"]
        elif cluster == "mpiexec of MPICH":
            variables |= {"PMI_SIZE": "2", "PMI_RANK": str(i), "DROVER_COORDINATOR": f"127.0.0.1:{port}"}
        elif cluster == "kubernetes":
            variables |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(i)}
            variables |= {"DROVER_COORDINATOR": f"127.0.0.1:{port}", "DROVER_NUM_PROCESSES": "2"}
        else:
            flags = [f"--coordinator=127.0.0.1:{port}", "--num-processes=2", f"--process-id={i}"]
        runs.append(begin(tmp_path, *CONSTANT, *flags, steps=2, environment=variables | {"DROVER_PEER_TIMEOUT": "30"}))
    first, second = (finish(process) for process in runs)
    assert "2 x cpu" in first and "step 2/2  train" in first and "step 2/2" not in second
    assert "kubernetes" not in first + second  # of a package that is not needed


def arguments(**given: Any) -> Namespace:
    return Namespace(**{"coordinator": None, "num_processes": None, "process_id": None} | given)


def test_a_place_comes_from_flags_before_variables() -> None:
    variables = {"DROVER_COORDINATOR": "a:1", "DROVER_NUM_PROCESSES": "4", "DROVER_PROCESS_ID": "3"}
    assert group_of(arguments(), {}) is None
    assert group_of(arguments(), variables) == Group("a:1", 4, 3)
    assert group_of(arguments(process_id=0, coordinator="b:2"), variables) == Group("b:2", 4, 0)


def test_the_manifest_gives_every_pod_its_place() -> None:
    text = (ROOT / "docs" / "MESH.md").read_text()
    manifest = text.split("```yaml\n")[1].split("```")[0]
    service, job = manifest.split("---\n")

    def field(part: str, name: str) -> str:
        (value,) = re.findall(rf"(?m)\b{name}: *([^\s}}]+)", part)
        return value

    # A pod of an indexed job is reached as JOB-INDEX.SUBDOMAIN, where a headless service of that name selects it.
    assert field(service, "clusterIP") == "None" and field(job, "completionMode") == "Indexed"
    assert field(service, "metadata: {name") == field(job, "subdomain")
    assert field(service, "job-name") == field(job, "metadata: {name")
    assert field(job, "completions") == field(job, "parallelism")
    # Every restart of any pod counts: one incident has as many as there are pods.
    assert int(field(job, "backoffLimit")) >= 1000 * int(field(job, "completions"))
    variables = dict(re.findall(r'name: (DROVER_\w+), value: "(.+)"', job))
    coordinator = f"{field(job, 'metadata: {name')}-0.{field(job, 'subdomain')}:4321"
    count = int(field(job, "parallelism"))
    places = [group_of(arguments(), variables | {"JOB_COMPLETION_INDEX": str(i)}) for i in range(count)]
    assert places == [Group(coordinator, count, i) for i in range(count)]


MPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "3"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
STEP = BATCH_SCRIPT | {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize("variables", [MPI_5, MPICH, STEP, MPI_5 | BATCH_SCRIPT, POD | {"DROVER_NUM_PROCESSES": "4"}])
def test_a_launcher_says_the_rest_once_the_coordinator_is_said(variables: dict[str, str]) -> None:
    assert group_of(arguments(coordinator="a:1"), variables) == Group("a:1", 4, 3)
    assert group_of(arguments(coordinator="a:1", num_processes=2, process_id=0), variables) == Group("a:1", 2, 0)
    assert group_of(arguments(num_processes=1), {**variables, "DROVER_NUM_PROCESSES": "4"}) == ALONE


JOIN = """
import json, os, sys, types
from argparse import Namespace
from launch import processes
from sharding.errors import UserError

class NoAccount(Exception): pass

def load():
    raise NoAccount("no service account")

for case in json.loads(sys.argv[1]):
    os.environ.update(case)
    if "stub" in case:
        kubernetes = sys.modules["kubernetes"] = types.ModuleType("kubernetes")
        kubernetes.config = types.SimpleNamespace(load_incluster_config=load)
    try:
        found = processes.join(Namespace(coordinator=None, num_processes=None, process_id=None, peer_timeout=None))
        print(json.dumps(f"alone {found}"))
    except UserError as error:
        print(json.dumps(str(error)))
    for name in case:
        del os.environ[name]
"""


def test_who_may_be_one_of_several_never_trains_alone() -> None:
    unknown = "may be one of several, and where process 0 is was not found out"
    four, one = {"OMPI_COMM_WORLD_SIZE": "4"}, {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1", "PMI_RANK": "0"}
    cases: list[tuple[dict[str, str], str]] = [
        (MPI_5, f"OMPI_COMM_WORLD_SIZE=4: this process {unknown}. Give --coordinator HOST:PORT"),
        (four, f"OMPI_COMM_WORLD_SIZE=4: this process {unknown}. Give --coordinator HOST:PORT"),
        (MPICH, f"PMI_SIZE=4: this process {unknown}. Give --coordinator HOST:PORT"),
        # The daemons of MPI were started by srun, one on each of two hosts.
        (MPI_5 | STEP | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, f"OMPI_COMM_WORLD_SIZE=4: this process {unknown}"),
        (BATCH_SCRIPT, f"SLURM_NTASKS=4: this process {unknown}. Start the command with srun"),
        (POD, f"JOB_COMPLETION_INDEX=3: this process {unknown}. Set DROVER_COORDINATOR to JOB-0.SERVICE:PORT"),
        (BATCH_SCRIPT | {"DROVER_NUM_PROCESSES": "1"}, "alone None"),
        (POD | {"DROVER_NUM_PROCESSES": "1"}, "alone None"),
        (one, "alone None"),
        ({"SLURM_PROCID": "0"}, "alone None"),
        ({}, "alone None"),
        (POD | {"stub": ""}, "did not find each other within 10 s (no service account)"),
    ]
    command = [sys.executable, "-c", JOIN, json.dumps([variables for variables, _ in cases])]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI_"))}
    clean["DROVER_PEER_TIMEOUT"] = "2"
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for (variables, words), found in zip(cases, said, strict=True):
        assert words in found, variables
    assert "kubernetes" not in done.stderr


def test_no_gpu_is_left_without_a_process() -> None:
    check_gpus([("a", 4, 0), ("b", 1, 0)])  # no GPUs
    check_gpus([("a", 1, 2), ("a", 1, 2), ("b", 2, 2)])  # one process for each, or for all of a host
    check_gpus([("a", 1, 1), ("a", 1, 1)])  # containers with one each
    with pytest.raises(
        UserError, match=r"b: found 8 GPUs, of which the run would use 2: .*JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7"
    ):
        check_gpus([("a", 8, 8), ("b", 1, 8), ("b", 1, 8)])


def test_each_process_of_a_host_has_the_gpu_of_its_number_there() -> None:
    group = Group("a:1", 16, 11)
    open_mpi = MPI_5 | {"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    mpich = MPICH | {"MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "8"}
    daemons = {"SLURM_LOCALID": "0"}  # of MPI, in a job of Slurm
    for variables in (open_mpi, mpich, STEP, open_mpi | daemons, mpich | daemons, MPICH | {"SLURM_LOCALID": "3"}):
        assert local_devices(variables, group, 8) == [3]
        assert local_devices(variables, group, 1) == [0]  # CUDA_VISIBLE_DEVICES leaves one
        assert local_devices(variables | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, group, 8) is None
        assert local_devices(variables, group, 0) is None
        assert local_devices(variables, group, 2) is None  # of its own: check_gpus looks at all together
    one_on_each_host = {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert local_devices(one_on_each_host, group, 8) is None
    assert local_devices({}, group, 8) is None
    assert local_devices({"DROVER_LOCAL": "1"}, group, 16) == [11]


def test_no_gpu_is_given_to_two_processes() -> None:
    with pytest.raises(UserError, match=r"a: found 2 GPUs, expected no more .* would use 4, each the same ones\."):
        check_gpus([("a", 2, 2), ("a", 2, 2)])
    assert gpus_name({"CUDA_VISIBLE_DEVICES": "3,2"}, "a") == "a, GPUs 2,3" != gpus_name({}, "a") == "a"


@pytest.mark.parametrize(("given", "expected"), [("60", 180), ("20", 100), ("600", 1800)])
def test_jax_waits_longer_for_a_silent_process_than_we_do(
    given: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, Any] = {}

    def initialize(*place: Any, **options: Any) -> None:
        said.update(options, place=place)
        raise RuntimeError("that will do")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    monkeypatch.setattr("launch.environment.nvidia_gpus", lambda: [Path(f"/dev/nvidia{i}") for i in range(4)])
    for name, value in (MPI_5 | {"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="that will do"):
        join(arguments(coordinator="a:1", peer_timeout=given))
    assert said["heartbeat_timeout_seconds"] == expected
    assert said["place"] == ("a:1", 4, 3, [3])


@pytest.mark.parametrize(("given", "words"), [
    ({"coordinator": "a:1"}, "--num-processes (or DROVER_NUM_PROCESSES), --process-id (or DROVER_PROCESS_ID): not given"),
    ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process-id: found 2, expected 0 to 1"),
    ({"coordinator": "a", "num_processes": 2, "process_id": 1}, "--coordinator: found a, expected HOST:PORT"),
    ({"coordinator": "a:1", "num_processes": "two", "process_id": 1}, "expected two whole numbers"),
])  # fmt: skip
def test_half_a_place_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        group_of(arguments(**given), {})
    assert words in str(error.value)


def test_a_place_that_is_known_in_part_is_not_taken_for_a_run_of_one_process(tmp_path: Path) -> None:
    output = finish(begin(tmp_path, environment={"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234"}), 2)
    assert "known only in part (Number of processes must be defined.)" in output, output


def test_local_processes_run_the_same_command() -> None:
    said = ["train", "--processes", "4", "--config", "a.py", "--processes=2", "--config.steps=3"]
    assert again(said) == [sys.executable, "-m", "launch.cli", "train", "--config", "a.py", "--config.steps=3"]
