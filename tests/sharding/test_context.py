"""Attention of rows that are split over devices, next to that of whole rows on one device, in float64."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from model import attention, blockwise
from model.attention import Layout, packed_attention
from model.blockwise import Tokens
from sharding import context
from sharding.mesh import DeviceMesh
from sharding.place import Place
from tests.model.test_blockwise import at_once
from tests.oracle_cases import FAST_COMPILE

S, N, K, H = 48, 4, 2, 4
ROWS = ([17, 1, 22, 5], [48], [3, 40])
"""Lengths of documents; what is left is padding."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", 5)


def row_tokens() -> tuple[np.ndarray, np.ndarray]:
    segments, positions = np.zeros((len(ROWS), S), np.int32), np.zeros((len(ROWS), S), np.int32)
    for b, lengths in enumerate(ROWS):
        used = sum(lengths)
        segments[b, :used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        positions[b, :used] = np.concatenate([np.arange(n) for n in lengths])
    return segments, positions


def inputs() -> list[np.ndarray]:
    """q, k, v and the gradient of the result."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(len(ROWS), S, heads, H)) for heads in (N, K, K, N)]


def layout(segments: jax.Array, positions: jax.Array, place: Place) -> Layout:
    row = Tokens(place.row(segments), place.row(positions), jnp.zeros(len(ROWS), jnp.int32))
    share = segments.shape[1]
    return Layout(row.part(place.first("context", share), share), row, positions, positions, positions)


def split(devices: int, chunk: int | None, straddle: bool = True) -> Any:
    """(segments, positions, q, k, v) -> attention, with rows split."""
    mesh = DeviceMesh.of(jax.devices()[:devices], {"context": devices}, straddle=straddle)

    def on_one(segments: Any, positions: Any, q: Any, k: Any, v: Any) -> jax.Array:
        return packed_attention(q, k, v, layout(segments, positions, mesh.place), chunk, mesh.place)

    part = P(None, "context")
    return jax.shard_map(on_one, mesh=mesh.mesh, in_specs=(part,) * 5, out_specs=part, check_vma=False)


def whole(segments: Any, positions: Any, q: Any, k: Any, v: Any, chunk: int | None) -> Any:
    """The same of whole rows, all scores at once."""
    at = layout(segments, positions, Place()).tokens
    grouped = attention.by_heads(q * H**-0.5, K)
    mask = blockwise.allowed(at, at, chunk)
    return at_once(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), mask).swapaxes(1, 2).reshape(q.shape)


def with_gradient(run: Any) -> Any:
    """(..., gradient of the result) -> result and gradients of q, k, v."""

    def both(segments: Any, positions: Any, q: Any, k: Any, v: Any, d_out: Any) -> Any:
        out, gradient = jax.vjp(functools.partial(run, segments, positions), q, k, v)
        return out, gradient(d_out)

    return jax.jit(both, compiler_options=FAST_COMPILE)


def compare(devices: int, chunk: int | None) -> None:
    with jax.enable_x64(True):
        arrays = [jnp.asarray(array) for array in (*row_tokens(), *inputs())]
        expected = with_gradient(functools.partial(whole, chunk=chunk))(*arrays)
        found = with_gradient(split(devices, chunk))(*arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12), found, expected)


@pytest.mark.parametrize(
    ("devices", "chunk"), [(2, None), (3, None), (8, None), (2, 24), (3, 7), (8, 7), (8, 1), (4, 100)]
)
def test_attention_of_split_rows_is_that_of_whole_rows(devices: int, chunk: int | None) -> None:
    """Chunks shorter than a device's share, longer than several, longer than the row; and none."""
    compare(devices, chunk)


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_on_the_ring_every_half_meets_those_before_it_once_and_no_step_has_more_than_two(devices: int) -> None:
    mesh = DeviceMesh.of(jax.devices()[:devices], {"context": devices})
    size = S // devices // 2

    def numbers(step: int) -> Any:
        def on_one() -> jax.Array:
            owner = (jax.lax.axis_index("context") - step) % devices
            queries, keys = context._meetings(mesh.place, step if step == 0 else jnp.asarray(step))
            row = Tokens(jnp.zeros((1, S), jnp.int32), jnp.arange(S)[None], jnp.zeros(1, jnp.int32))
            halves = [
                [context._standing(mesh.place, row, device, slot, size).positions[0, 0] // size for slot in slots]
                for device, slots in ((jax.lax.axis_index("context"), queries), (owner, keys))
            ]
            return jnp.stack([jnp.stack(half) for half in halves], axis=1)[None]

        return jax.shard_map(on_one, mesh=mesh.mesh, in_specs=(), out_specs=P("context"), check_vma=False)()

    met = jax.device_get(jax.jit(lambda: [numbers(step) for step in range(devices)])())
    assert [pairs.shape[1] for pairs in met] == [3] + [2] * (devices - 1)
    pairs = sorted((int(q), int(k)) for step in met for q, k in step.reshape(-1, 2))
    assert pairs == [(q, k) for q in range(2 * devices) for k in range(q + 1)]


def permuted(devices: int, chunk: int | None, straddle: bool = True) -> list[int]:
    """Tokens that each collective of the program sends, keys first, without the gathered ids."""
    arrays = [np.asarray(array, np.float32) for array in inputs()[:3]]
    text = str(jax.make_jaxpr(split(devices, chunk, straddle))(*row_tokens(), *arrays))
    assert "psum" not in text and "all_to_all" not in text
    assert text.count("all_gather[") <= 2  # of segment ids and positions
    return [int(n) for n in re.findall(rf"f32\[{len(ROWS)},{K},(\d+),{H}\] = ppermute\[", text)]


def test_chunked_layers_fetch_what_a_chunk_over_the_edge_needs_and_no_more() -> None:
    assert permuted(4, chunk=8) == [7, 7]
    assert permuted(8, chunk=8) == [1, 6, 1, 6]  # shares of 6: the farther one first
    assert permuted(4, chunk=100) == [12] * 6  # all of the row that is not here
    assert permuted(4, chunk=1) == []


def test_where_no_chunk_straddles_an_edge_nothing_is_fetched() -> None:
    assert permuted(4, chunk=8, straddle=False) == []


MUTATIONS = {
    "keys are passed the wrong way": (
        "_passed_on",
        lambda place, arrays: jax.lax.ppermute(
            arrays, "context", [(i, (i - 1) % place.size("context")) for i in range(place.size("context"))]
        ),
    ),
    "no mirrored halves": ("_shares", lambda place, halves: jnp.concatenate([halves[0], halves[1]], axis=2)),
    "a device's own halves do not meet themselves": (
        "_meetings",
        lambda place, step, original=context._meetings: tuple(
            halves[-2:] if isinstance(step, int) else halves for halves in original(place, step)
        ),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_ring_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, *MUTATIONS[name])
    with pytest.raises(AssertionError):
        compare(3, None)


def test_too_little_fetched_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = context.from_the_left
    broken = lambda place, share, count: original(place, share, count).at[:, :, 0].set(0)  # noqa: E731
    monkeypatch.setattr(attention, "from_the_left", broken)
    with pytest.raises(AssertionError):
        compare(3, 7)
