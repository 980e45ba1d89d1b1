"""The pipeline next to layers one after the other, in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding import stage
from sharding.mesh import DeviceMesh
from tests.oracle_cases import FAST_COMPILE

D, ROWS = 3, 2
"""Width; rows of a micro-batch."""


def layer(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.tanh(x @ weight) + x


def inputs(devices: int, batches: int, rounds: int) -> list[np.ndarray]:
    """Rows of all devices, weights of all repeats, the gradient of the result."""
    rng = np.random.default_rng(0)
    rows = (devices * batches * ROWS, D)
    return [rng.normal(size=shape) for shape in (rows, (devices * rounds, D, D), rows)]


def in_turn(rows: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The result, and for each repeat the sum of what goes into it."""
    told = []
    for weight in weights:
        told.append(rows.sum())
        rows = layer(rows, weight)
    return rows, jnp.stack(told)


def pipelined(devices: int, batches: int, rounds: int) -> Any:
    mesh = DeviceMesh.of(jax.devices()[:devices], {"stage": devices}, stage_batches=batches)
    place = mesh.place

    def on_one(rows: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        mine, everyones = stage.dealt(place, weights), stage.micro_batches(place, rows)

        def layers(x: jax.Array, number: jax.Array, round_: jax.Array, real: jax.Array) -> tuple[jax.Array, Any]:
            # What enters is the micro-batch of that number.
            enters = real & (round_ == 0) & (jax.lax.axis_index("stage") == 0)
            other = jnp.where(enters, jnp.max(jnp.abs(x - everyones[number])), 0)
            return layer(x, mine[round_]), (jnp.sum(x), jax.lax.stop_gradient(other))

        out, told = stage.pipeline(place, layers, rows, rounds)
        told, other = (place.total(stage.of_all(place, one)) for one in told)
        return out, told + jnp.where(other > 0, jnp.nan, 0)

    split = P("stage")
    return jax.shard_map(on_one, mesh=mesh.mesh, in_specs=(split, split), out_specs=(split, P()), check_vma=False)


def with_gradient(run: Any) -> Any:
    def both(rows: jax.Array, weights: jax.Array, d_out: jax.Array) -> Any:
        out, gradient, told = jax.vjp(run, rows, weights, has_aux=True)
        return out, gradient(d_out), told

    return jax.jit(both, compiler_options=FAST_COMPILE)


def compare(devices: int, batches: int, rounds: int) -> None:
    with jax.enable_x64(True):
        arrays = [jnp.asarray(array) for array in inputs(devices, batches, rounds)]
        expected, found = with_gradient(in_turn)(*arrays), with_gradient(pipelined(devices, batches, rounds))(*arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found, expected)


@pytest.mark.parametrize(("devices", "batches", "rounds"), [
    (2, 1, 1), (2, 3, 1), (2, 1, 4), (2, 2, 3), (3, 2, 2), (4, 1, 2), (4, 3, 5), (8, 1, 1), (8, 2, 3)
])  # fmt: skip
def test_a_pipeline_gives_what_layers_one_after_the_other_give(devices: int, batches: int, rounds: int) -> None:
    compare(devices, batches, rounds)


@pytest.mark.parametrize(("devices", "rounds"), [(2, 1), (2, 5), (3, 2), (3, 3), (4, 6), (8, 3)])
def test_each_device_gets_every_so_manyth_repeat(devices: int, rounds: int) -> None:
    mesh = DeviceMesh.of(jax.devices()[:devices], {"stage": devices})
    repeats = np.arange(devices * rounds)

    def on_one(share: jax.Array, whole: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mine = stage.dealt(mesh.place, share)
        return mine, stage.every(mesh.place, whole), mesh.place.total(stage.of_all(mesh.place, mine))

    split = P("stage")
    run = jax.shard_map(on_one, mesh=mesh.mesh, in_specs=(split, P()), out_specs=(split, split, P()), check_vma=False)
    dealt, every, whole = jax.jit(run)(repeats, repeats)
    expected = repeats.reshape(rounds, devices).T.reshape(-1)  # device by device
    np.testing.assert_array_equal(dealt, expected)
    np.testing.assert_array_equal(every, expected)
    np.testing.assert_array_equal(whole, repeats)


def test_micro_batches_are_numbered_as_they_enter() -> None:
    mesh = DeviceMesh.of(jax.devices()[:2], {"stage": 2}, stage_batches=3)
    rows = jnp.arange(12)  # two devices of three micro-batches of two rows
    run = jax.shard_map(
        functools.partial(stage.micro_batches, mesh.place),
        mesh=mesh.mesh,
        in_specs=P("stage"),
        out_specs=P(),
        check_vma=False,
    )
    np.testing.assert_array_equal(run(rows), [[0, 1], [6, 7], [2, 3], [8, 9], [4, 5], [10, 11]])


@pytest.mark.parametrize("name", ["dealt", "of_all"])
def test_a_broken_pipeline_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {
        "dealt": lambda place, repeats: repeats,  # those that it has, not those that it should
        "of_all": lambda place, mine: jnp.concatenate([mine] + [0 * mine] * (place.size("stage") - 1)),
    }
    monkeypatch.setattr(stage, name, broken[name])
    with pytest.raises(AssertionError):
        compare(2, 1, 4)
