"""The exchange of tokens between experts' devices, next to all experts on one device, in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from model.grouped_ffn import grouped_ffn
from sharding import experts
from sharding.experts import expert_parallel
from sharding.mesh import DeviceMesh

PARTS, E, A, D, F = 4, 8, 40, 6, 5
COMPUTE = grouped_ffn("blocks")

ROUTINGS = {
    "balanced": [np.full(E, A // E)] * PARTS,
    "all to one expert": [np.eye(E, dtype=int)[5] * A] * PARTS,
    "every device to another one": [np.eye(E, dtype=int)[2 * p] * A for p in range(PARTS)],
    "one device alone is skewed": [np.eye(E, dtype=int)[7] * A] + [np.full(E, A // E)] * (PARTS - 1),
    "padding": [np.arange(E) % 3] * PARTS,
    "fewer tokens than experts": [np.eye(E, dtype=int)[p] for p in range(PARTS)],
    "no token at all": [np.zeros(E, int)] * PARTS,
    "a device without tokens": [np.zeros(E, int), *[np.full(E, 4)] * (PARTS - 1)],
}


def inputs(routing: str) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(PARTS * A, D))
    weights = tuple(rng.normal(size=shape) for shape in ((E, D, F), (E, D, F), (E, F, D)))
    return rows, weights, np.stack(ROUTINGS[routing]).astype(np.int32), rng.normal(size=(PARTS * A, D))


def one_device(rows: Any, weights: Any, sizes_PE: Any) -> jax.Array:
    """The rows of each device by themselves, with all experts."""
    parts = rows.reshape(PARTS, A, D)
    return jnp.concatenate([COMPUTE(parts[p], *weights, sizes_PE[p]) for p in range(PARTS)])


@functools.cache
def exchanged(buffer: float, others: int) -> Any:
    """The same on a mesh: the rows and the experts in parts; the rest of the mesh does the same again."""
    mesh = DeviceMesh.of(jax.devices()[: PARTS * others], {"data": others, "expert": PARTS}, expert_buffer=buffer)
    split = P("expert")

    def on_one(rows: Any, weights: Any, sizes_PE: Any) -> jax.Array:
        return expert_parallel(COMPUTE, mesh.place, rows, weights, sizes_PE[0])

    run = jax.shard_map(on_one, mesh=mesh.mesh, in_specs=(split, split, split), out_specs=split, check_vma=False)

    def with_gradient(rows: Any, weights: Any, sizes_PE: Any, d_result: Any) -> Any:
        result, gradient = jax.vjp(lambda x, w: run(x, w, sizes_PE), rows, weights)
        return result, gradient(d_result)

    return jax.jit(with_gradient)


def compare(routing: str, buffer: float, others: int = 1) -> None:
    with jax.enable_x64(True):
        rows, weights, sizes_PE, d_result = jax.tree.map(jnp.asarray, inputs(routing))
        result, gradient = jax.vjp(lambda x, w: one_device(x, w, sizes_PE), rows, weights)
        expected = result, gradient(d_result)
        found = exchanged(buffer, others)(rows, weights, sizes_PE, d_result)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found, expected)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_token_reaches_its_expert_and_comes_back(routing: str) -> None:
    compare(routing, buffer=1.0)


def test_a_buffer_for_everything_takes_one_round() -> None:
    compare("all to one expert", buffer=float(PARTS))


def test_rows_are_sent_in_as_many_rounds_as_the_fullest_device_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows are balanced, a buffer takes 16: 40 rows to one device are sent in three rounds, by all devices."""
    rounds = []
    loop = experts._further_rounds  # the one that is counted here runs none

    def counted(exchange: Any, rows: Any, weights: Any, sizes: Any, number: Any) -> Any:
        jax.debug.callback(lambda n: rounds.append(int(n)), number)
        return loop(exchange, rows, weights, sizes, number)

    monkeypatch.setattr(experts, "_further_rounds", counted)
    exchanged.cache_clear()
    for routing, expected in (("balanced", 1), ("all to one expert", 3), ("one device alone is skewed", 3)):
        rounds.clear()
        compare(routing, buffer=1.0)
        jax.effects_barrier()
        assert set(rounds) == {expected}
    exchanged.cache_clear()


def test_what_a_broken_exchange_loses_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged.cache_clear()
    monkeypatch.setattr(experts, "_further_rounds", lambda exchange, rows, *_: jnp.zeros_like(rows))
    compare("balanced", buffer=1.0)
    with pytest.raises(AssertionError):
        compare("one device alone is skewed", buffer=1.0)
    exchanged.cache_clear()


def test_the_buffers_are_a_small_multiple_of_balanced_routing() -> None:
    """Not of E times as much: the largest array of the program is the tokens', with their rows for all experts."""
    sizes = np.stack(ROUTINGS["balanced"]).astype(np.int32)
    rows, weights, _, d_result = inputs("balanced")
    hlo = exchanged(1.5, 1).lower(rows, weights, sizes, d_result).as_text()
    assert f"tensor<{PARTS}x16x{D}" in hlo  # 16 rows for each device: 1.5 x 10, up to a multiple of 8
    assert f"tensor<{PARTS}x{A}x{D}" not in hlo
