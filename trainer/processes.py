"""Several processes that train one model: who speaks for all, and what all must agree on.

Everything here returns at once where there is one process.
"""

import hashlib
from collections.abc import Iterable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from sharding.errors import UserError

DAY_MS = 86_400_000
Answer = TypeVar("Answer", bool, int)


def is_leader() -> bool:
    """Whether this process writes the run directory and speaks to the user; one does."""
    return jax.process_index() == 0


def leader_says(answer: Answer) -> Answer:
    """The leader's answer, a number below 2^31, in every process. All have to ask."""
    if jax.process_count() == 1:
        return answer
    return type(answer)(multihost_utils.broadcast_one_to_all(np.array(answer)))


def anyone_says(answer: bool) -> bool:
    """Whether any process says yes. All have to ask."""
    if jax.process_count() == 1:
        return answer
    return bool(np.asarray(multihost_utils.process_allgather(np.array(answer))).any())


def sum_of_all(numbers: Iterable[int]) -> list[int]:
    """The sums over all processes of as many whole numbers, below 2^63. All have to ask."""
    own = np.array(list(numbers), np.int64)
    if jax.process_count() == 1:
        return own.tolist()
    everyones = np.asarray(multihost_utils.process_allgather(own.view(np.uint8)))  # jax would make int32 of them
    return everyones.reshape(jax.process_count(), -1).view(np.int64).sum(axis=0).tolist()


def wait_for_all(what: str) -> None:
    """Returns when all processes have come here, `what` they have done being said by all alike.

    It is no collective, which may not take long: where they meet for the first time in one, gloo, on CPUs, gives a process
    that compiles longer than another 30 s. Who is dead or hangs is found out by the watch (`launch/watch.py`).
    """
    if jax.process_count() > 1:
        multihost.get_barrier_sync_fn()(key=what, timeout_ms=DAY_MS)


def check_same(what: str, value: str) -> None:
    """Refuses to begin where processes differ in something that decides the run. All have to ask.

    Raises:
        UserError: names the processes that have another value than the first.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    everyones = np.asarray(multihost_utils.process_allgather(digest))
    others = np.flatnonzero((everyones != everyones[0]).any(axis=1)).tolist()
    if others:
        raise UserError(
            f"processes {', '.join(map(str, others))} of {len(everyones)}: found another {what} than process 0 has, "
            "expected the same in all. Give every process the same command, files and Python."
        )
