"""Several processes for one run: how each finds the others, and how `--processes N` starts them on one machine."""

import argparse
import functools
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch import environment
from sharding.errors import UserError

if TYPE_CHECKING:
    from launch.watch import Watch

COORDINATOR, COUNT, INDEX, TIMEOUT = (
    "DROVER_COORDINATOR",
    "DROVER_NUM_PROCESSES",
    "DROVER_PROCESS_ID",
    "DROVER_PEER_TIMEOUT",
)
LOCAL = "DROVER_LOCAL"
"""Set in the processes that `--processes` starts."""
LOCAL_DEVICES = "JAX_LOCAL_DEVICE_IDS"
"""Of JAX: the GPUs of this process, of those that it sees."""
DEFAULT_TIMEOUT = 60.0
_TOKEN_BYTES, _HOST_BYTES = 16, 256
_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
_OF_TERMINAL = 0x80
"""Code of a signal that the kernel sent (SI_KERNEL)."""
_GRACE_SECONDS = 10.0
"""From the order to end to the end."""


@dataclass(frozen=True)
class Launcher:
    """What starts the same command many times, and tells each process its place in environment variables."""

    count: str
    """Variable with the number of processes; empty where none has it."""
    index: str
    """Variable with the number of this one."""
    cure: str
    """How a place is to be given here."""
    local_index: str = ""
    """Variable with the number of this process on its host."""
    local_count: str = ""
    """Variable with the number of processes on its host."""


_COORDINATOR_CURE = f"Give --coordinator HOST:PORT of process 0 (or {COORDINATOR}) in every process."
OPEN_MPI = Launcher(
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    _COORDINATOR_CURE,
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
PMI = Launcher("PMI_SIZE", "PMI_RANK", _COORDINATOR_CURE, "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SLURM = Launcher(
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "Start the command with srun, which starts it once for each task.",
    "SLURM_LOCALID",
)
KUBERNETES = Launcher(
    "",
    "JOB_COMPLETION_INDEX",
    f"Set {COORDINATOR} to JOB-0.SERVICE:PORT and {COUNT} to the parallelism of the job in its manifest (docs/MESH.md).",
)
LAUNCHERS = (OPEN_MPI, PMI, SLURM, KUBERNETES)
"""The first whose variables are set counts: MPI runs within jobs of Slurm."""


@dataclass(frozen=True)
class Group:
    """A process's place among all, as flags or environment variables say."""

    coordinator: str
    """HOST:PORT of process 0, as the others reach it."""
    count: int
    index: int


ALONE = Group("", 1, 0)
"""What `--num-processes 1` says, whatever started the process."""


def launcher_of(environ: Mapping[str, str]) -> Launcher | None:
    """What started this process, maybe as one of several."""
    return next((each for each in LAUNCHERS if each.count in environ or each.index in environ), None)


def group_of(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Group | None:
    """What flags say, or else environment variables; None where neither says anything.

    Once a coordinator is said, the variables of a launcher may say the rest.

    Raises:
        UserError: only a part is said, or a number is none.
    """
    launcher = launcher_of(environ)
    named = {
        "--coordinator": (COORDINATOR, arguments.coordinator, ""),
        "--num-processes": (COUNT, arguments.num_processes, launcher.count if launcher else ""),
        "--process-id": (INDEX, arguments.process_id, launcher.index if launcher else ""),
    }
    said = {flag: environ.get(name) if given is None else str(given) for flag, (name, given, _) in named.items()}
    if all(value is None for value in said.values()):
        return None
    if said == {"--coordinator": None, "--num-processes": "1", "--process-id": None}:
        return ALONE
    values = {flag: said[flag] or environ.get(named[flag][2]) for flag in named}
    missing = [f"{flag} (or {named[flag][0]})" for flag, value in values.items() if not value]
    if missing:
        raise UserError(f"{', '.join(missing)}: not given; expected all of {', '.join(named)}, or none of them.")
    coordinator, *numbers = (str(value) for value in values.values())
    try:
        count, index = map(int, numbers)
    except ValueError:
        raise UserError(f"--num-processes, --process-id: found {numbers}, expected two whole numbers.") from None
    if not 0 <= index < count:
        raise UserError(f"--process-id: found {index}, expected 0 to {count - 1}, as there are {count} processes.")
    if not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator: found {coordinator}, expected HOST:PORT of process 0, such as node1:4321.")
    return Group(coordinator, count, index)


def mistaken_by_jax(environ: Mapping[str, str]) -> bool:
    """Whether MPI, of a kind that JAX does not know, says another place than Slurm, which may have started only its daemons."""
    mpi = launcher_of(environ)
    if mpi not in (OPEN_MPI, PMI) or "OMPI_MCA_orte_hnp_uri" in environ:
        return False
    return [environ.get(mpi.count), environ.get(mpi.index)] != [environ.get(SLURM.count), environ.get(SLURM.index)]


def check_alone(environ: Mapping[str, str]) -> None:
    """Refuses to train in this process alone where a launcher may have started others.

    Raises:
        UserError: names its variable.
    """
    launcher = launcher_of(environ)
    if launcher is None or (launcher.count and environ.get(launcher.count, "1") == "1"):
        return
    variable = launcher.count or launcher.index
    raise UserError(
        f"{variable}={environ[variable]}: this process may be one of several, and where process 0 is was not found out. "
        f"{launcher.cure} To train in this process alone, give --num-processes 1."
    )


def local_devices(environ: Mapping[str, str], group: Group, gpus: int) -> list[int] | None:
    """Which of the GPUs that a process sees are its own; None where JAX is to say, or all are.

    Of several processes on a host each has one, as JAX has it under those launchers that it knows.
    """
    if environ.get(LOCAL):
        return [group.index]
    if environ.get(LOCAL_DEVICES) or group.count == 1 or not gpus:
        return None
    if gpus == 1:
        return [0]
    launcher = next((each for each in LAUNCHERS if each.local_index and each.local_index in environ), None)
    if launcher is None or environ.get(launcher.local_count, "") == "1":
        return None
    index, count = int(environ[launcher.local_index]), int(environ.get(launcher.local_count, 0))
    return [index] if max(index + 1, count) <= gpus else None


def join(arguments: argparse.Namespace) -> "Watch | None":
    """Finds the other processes of the run, if there are any, and watches them. Call it before jax has any device.

    Places come from flags and environment variables, or else from what JAX knows of Slurm, Open MPI and TPU pods.

    Raises:
        UserError: the others cannot be reached, or there are others and no place is known.
    """
    group, timeout = group_of(arguments, os.environ), _timeout(arguments)
    if group == ALONE:
        return None
    if group is None and mistaken_by_jax(os.environ):
        check_alone(os.environ)
    import jax

    # It misses a package that only its detection needs; check_alone says what to do.
    warnings.filterwarnings("ignore", r"\s*Kubernetes environment detected")
    # Signals are ours (trainer/signals.py): this service would take SIGTERM away.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own watch ends a process without saying which other one hangs: it comes after ours.
    patience: dict[str, Any] = {
        "initialization_timeout": int(5 * timeout),
        "heartbeat_timeout_seconds": max(100, int(3 * timeout)),
    }
    try:
        if group:
            devices = local_devices(os.environ, group, environment.visible_gpus(os.environ))
            jax.distributed.initialize(group.coordinator, group.count, group.index, devices, **patience)
        else:
            jax.distributed.initialize(**patience)
    except ValueError as error:
        if group is None and "coordinator_address should be defined" in str(error):
            check_alone(os.environ)
            return None  # no cluster: one process
        raise UserError(
            f"the place of this process among others is known only in part ({error}). Give all of --coordinator, "
            "--num-processes and --process-id, or take JAX's own variables (JAX_COORDINATOR_ADDRESS) out of the environment."
        ) from error
    except Exception as error:  # detection asks libraries of others
        place = f"process {group.index} of {group.count} at {group.coordinator}" if group else "this process"
        alone = "" if group else " To train in this process alone, give --num-processes 1."
        raise UserError(
            f"{place}: the processes of the run did not find each other within {5 * timeout:g} s "
            f"({(str(error) or repr(error)).strip().splitlines()[0][:200]}). See that all are started, and that the "
            f"coordinator's port is open between the hosts and free on the first.{alone}"
        ) from error
    if jax.process_count() == 1:
        return None
    if not arguments.traceback:
        environment.keep_stdout_for_python()
    _check_gpus()
    return _watch(timeout, group)


def _timeout(arguments: argparse.Namespace) -> float:
    given = os.environ.get(TIMEOUT, DEFAULT_TIMEOUT) if arguments.peer_timeout is None else arguments.peer_timeout
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 2 <= seconds < float("inf"):
        raise UserError(f"--peer-timeout: found {given}, expected a number of seconds, 2 or more.")
    return seconds


def check_gpus(hosts: Sequence[tuple[str, int, int]]) -> None:
    """Refuses to leave GPUs without a process, or to give one to several. Those who see one each are believed: in containers of
    one host each has another.

    Args:
        hosts: of each process the name of its host and of the GPUs that it sees there, the devices that it uses, and how
            many GPUs it sees.

    Raises:
        UserError: the processes that see the same GPUs use fewer than those together, or more.
    """
    used: dict[str, int] = {}
    for name, devices, _ in hosts:
        used[name] = used.get(name, 0) + devices
    for name, _, seen in hosts:
        if used[name] < seen:
            raise UserError(
                f"{name}: found {seen} GPUs, of which the run would use {used[name]}: under srun and mpirun each process "
                "gets the one of its own number on the host. Start one process for each GPU, or say "
                f"which each is to have: {LOCAL_DEVICES}={','.join(map(str, range(seen)))} for a single process on the host."
            )
        if used[name] > seen > 1:
            raise UserError(
                f"{name}: found {seen} GPUs, expected no more than those in use; the processes there would use {used[name]}, "
                f"each the same ones. Start no more than {seen} processes on a host, by srun or mpirun, which number them "
                f"there, or say which GPUs each is to have: {LOCAL_DEVICES}=0 for the first process, 1 for the second."
            )


def _check_gpus() -> None:
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    chosen = {LOCAL, LOCAL_DEVICES} & os.environ.keys()
    seen = environment.visible_gpus(os.environ) if jax.default_backend() == "gpu" and not chosen else 0
    note = np.zeros(2 + _HOST_BYTES, np.uint8)
    content = bytes([jax.local_device_count(), seen]) + gpus_name(os.environ, socket.gethostname()).encode()
    note[: len(content)] = np.frombuffer(content, np.uint8)
    everyones = [np.asarray(each).tobytes() for each in multihost_utils.process_allgather(note)]
    check_gpus([(each[2:].rstrip(b"\0").decode(), each[0], each[1]) for each in everyones])


def gpus_name(environ: Mapping[str, str], host: str) -> str:
    """The same in processes that see the same GPUs: containers on one host, or processes that were told, see other ones."""
    files = [path.name.removeprefix("nvidia") for path in environment.nvidia_gpus()]
    told = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    numbers = ",".join(sorted(filter(None, told)) or files)
    return (f"{host}, GPUs {numbers}" if numbers else host)[:_HOST_BYTES]


def _watch(timeout: float, group: Group | None) -> "Watch":
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from launch.watch import connect

    listener, index = None, jax.process_index()
    note = np.zeros(_TOKEN_BYTES + 2 + _HOST_BYTES, np.uint8)
    if index == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, backlog=jax.process_count(), dualstack_ipv6=both)
        host = socket.gethostname()
        if group is None and "KUBERNETES_SERVICE_HOST" in os.environ:  # other pods do not know that name
            host = socket.gethostbyname(host)
        content = secrets.token_bytes(_TOKEN_BYTES) + listener.getsockname()[1].to_bytes(2, "big") + host.encode()
        note[: len(content)] = np.frombuffer(content, np.uint8)
    content = np.asarray(multihost_utils.broadcast_one_to_all(note)).tobytes()
    token, port, host = content[:_TOKEN_BYTES], content[_TOKEN_BYTES : _TOKEN_BYTES + 2], content[_TOKEN_BYTES + 2 :]
    # Process 0 is where the coordinator is.
    host = group.coordinator.rpartition(":")[0].strip("[]") if group else host.rstrip(b"\0").decode()
    address = host, int.from_bytes(port, "big")
    quiet = index > 0 and LOCAL in os.environ
    try:
        return connect(index, jax.process_count(), token, address, listener, timeout, quiet)
    except OSError as error:
        failed = f"process {index}: cannot reach process 0 at" if index else "process 0: waited at"
        raise UserError(
            f"{failed} {address[0]}, port {address[1]} ({error}). Processes watch each other on a port of its own: see that "
            "hosts can reach each other by name, on any port."
        ) from error


def start_local(count: int, command: Sequence[str]) -> int:
    """Runs the command in so many processes of this machine, each with one device; returns the exit status.

    That of the process that ended first with another one than 0. SIGINT and SIGTERM reach all of them. When one has failed,
    the others have `--peer-timeout` to end by themselves: until all have found each other, they do not know of it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--peer-timeout")
    timeout = _timeout(parser.parse_known_args(command)[0])
    with socket.create_server(("127.0.0.1", 0)) as free:
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would leave nobody to wait for
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    children: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(count):
            place = {COORDINATOR: coordinator, COUNT: str(count), INDEX: str(index), LOCAL: "1"}
            unblock = functools.partial(signal.pthread_sigmask, signal.SIG_SETMASK, before)
            children.append(subprocess.Popen(command, env=os.environ | place, preexec_fn=unblock))
        return _wait(children, timeout)
    finally:
        for child in children:
            child.kill()  # where starting or waiting failed
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(children: list[subprocess.Popen[bytes]], timeout: float) -> int:
    from launch.watch import PEER_LOST

    statuses: dict[int, int] = {}
    failed_at, told = None, False
    while left := [child for i, child in enumerate(children) if i not in statuses]:
        heard = signal.sigtimedwait(_HEARD, 1.0)
        # Ctrl-C reaches the children by itself, as they share the terminal.
        if heard and heard.si_signo != signal.SIGCHLD and heard.si_code != _OF_TERMINAL:
            for child in left:
                child.send_signal(heard.si_signo)
        # By their numbers: as the first process of a container, this one gets orphans, too.
        ended = {i: child.returncode for i, child in enumerate(children) if child in left and child.poll() is not None}
        statuses |= ended
        left = [child for i, child in enumerate(children) if i not in statuses]
        if not left or not any(statuses.values()):
            continue
        now = time.monotonic()
        failed_at = failed_at or now
        if all(_stopped(child.pid) for child in left) or now - failed_at > timeout + _GRACE_SECONDS:
            for child in left:  # the others have ended because of them
                child.kill()
        elif now - failed_at > timeout and not told:
            told = True
            failed = next(i for i, status in statuses.items() if status)
            numbers = ", ".join(str(i) for i, child in enumerate(children) if child in left)
            print(
                f"\nprocess {failed} has ended with status {statuses[failed]}, and {timeout:g} s later processes {numbers} "
                "still run: they are told to end.",
                file=sys.stderr,
                flush=True,
            )
            for child in left:
                child.terminate()
    # The first cause, rather than that of those that ended because of it.
    failures = [status for status in statuses.values() if status]
    first = next((status for status in failures if status != PEER_LOST), failures[0] if failures else 0)
    return 128 - first if first < 0 else first


def _stopped(pid: int) -> bool:
    """Whether a process is alive but stands still (SIGSTOP)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def again(arguments: Sequence[str]) -> list[str]:
    """The command that runs `drover` with these arguments, without `--processes`."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--processes" and not argument.startswith("--processes="):
            kept.append(argument)
        skip = argument == "--processes"
    return [sys.executable, "-m", "launch.cli", *kept]
