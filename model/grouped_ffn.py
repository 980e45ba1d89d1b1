"""The experts' SwiGLU over rows sorted by expert: one seam, one implementation per platform.

Every implementation computes `(silu(x gate_e) * (x up_e)) down_e` for the rows of each group e. What it gives for rows
after the last group is undefined: `grouped_ffn` clears them, before and after, whatever the kernel. Which one is used
depends on the platform; only the CPU's has been measured here:

- CPU: `blocks`. `lax.ragged_dot` there computes every expert on every row (8 experts: 8 times a dense layer of the same
  work; `benchmarks/experts.py` prints it).
- TPU: `ragged_dot`, a native kernel. GPU: `tokamax`, since XLA masks there as it does on CPU.

Letters: A rows (assignments, sorted by expert), D width, F expert width, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from model.layers import pick

BLOCK_ROWS = 128
"""Rows that the CPU kernel multiplies at once, unless there are fewer in all; the last block of a group is padded."""

GroupedFFN = Callable[..., jax.Array]


def kernel_for(platform: str, choice: str) -> str:
    """Name of the implementation: `choice`, or for "auto" the one that is fastest on `platform`."""
    return choice if choice != "auto" else {"tpu": "ragged_dot", "gpu": "tokamax"}.get(platform, "blocks")


def grouped_ffn(name: str) -> GroupedFFN:
    """The implementation called `name`: (x [A,D], gate [E,D,F], up [E,D,F], down [E,F,D], sizes [E]) -> [A,D].

    Rows after the last group give zeros, and have no gradient. Weights may be of lower precision than the rows.
    """
    kernel = {"blocks": blocks_ffn, "ragged_dot": ragged_ffn, "tokamax": tokamax_ffn}[name]

    def cleared(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E) -> jax.Array:
        used = (jnp.arange(x_AD.shape[0]) < jnp.sum(sizes_E))[:, None]
        y_AD: Any = kernel(jnp.where(used, x_AD, 0), gate_EDF, up_EDF, down_EFD, sizes_E)
        return jnp.where(used, y_AD, 0)

    return cleared


def ragged_ffn(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E) -> jax.Array:
    """Three `lax.ragged_dot`s."""
    gate_EDF, up_EDF, down_EFD = (w.astype(x_AD.dtype) for w in (gate_EDF, up_EDF, down_EFD))
    hidden = jax.nn.silu(lax.ragged_dot(x_AD, gate_EDF, sizes_E)) * lax.ragged_dot(x_AD, up_EDF, sizes_E)
    return lax.ragged_dot(hidden, down_EFD, sizes_E)


def tokamax_ffn(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E) -> jax.Array:
    """Three `tokamax.ragged_dot`s (Triton or Mosaic kernels)."""
    import tokamax  # pyright: ignore[reportMissingImports]  (slow to import, and only a GPU needs it)

    gate_EDF, up_EDF, down_EFD = (w.astype(x_AD.dtype) for w in (gate_EDF, up_EDF, down_EFD))
    dot = functools.partial(tokamax.ragged_dot, group_sizes=sizes_E)
    return dot(jax.nn.silu(dot(x_AD, gate_EDF)) * dot(x_AD, up_EDF), down_EFD)


def _block_of(x_AD: jax.Array) -> int:
    """Rows of a block: a token that is decoded alone is not multiplied as if it were many."""
    return min(BLOCK_ROWS, x_AD.shape[0])


def _rows(array: jax.Array, start: jax.Array, block: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, start, block)


def _set_rows(array: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, rows, start, 0)


def _weight(weights_EXY: jax.Array, expert: jax.Array, x: jax.Array) -> jax.Array:
    """One expert's, in the precision of the rows."""
    return pick(weights_EXY, expert).astype(x.dtype)


def _block_loop(sizes_E: jax.Array, total: int, rows: int, carry, body):
    """Runs `body(carry, expert, start, valid)` over the blocks that exist, of `rows` each, group after group.

    `total` is the number of rows, at least the sum of the sizes. Empty groups cost nothing, so that a token that is
    decoded does not pay for the experts that it does not visit.

    Blocks may read and write up to `rows` - 1 rows of the next group: those are masked by `valid` where they would
    count, and what is written to them is overwritten, since blocks run in order.
    """
    E = sizes_E.shape[0]
    starts_E, blocks_E = jnp.cumsum(sizes_E) - sizes_E, (sizes_E + rows - 1) // rows
    ends_E = jnp.cumsum(blocks_E)
    index_b = jnp.arange(total // rows + min(E, total))  # at most so many blocks
    expert_b = jnp.searchsorted(ends_E, index_b, side="right", method="compare_all")
    row_b = (index_b - (ends_E - blocks_E)[expert_b]) * rows

    def block(i, carry):
        expert, row = expert_b[i], row_b[i]
        valid = (row + jnp.arange(rows)) < sizes_E[expert]
        return body(carry, expert, starts_E[expert] + row, valid[:, None])

    return lax.fori_loop(0, ends_E[-1], block, carry)


def _pad(array: jax.Array, block: int) -> jax.Array:
    return jnp.pad(array, ((0, block), (0, 0)))


@jax.custom_vjp
def blocks_ffn(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E) -> jax.Array:
    """A loop over blocks of rows, as many as the group sizes ask for; dropless, and no row is multiplied twice.

    The gradient is written out because a loop of unknown length has no automatic one.
    """
    return _blocks_forward(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E)[0]


def _blocks_forward(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E):
    rows, width, size = x_AD.shape[0], gate_EDF.shape[2], _block_of(x_AD)
    x_pad = _pad(x_AD, size)
    empty = jnp.zeros((x_pad.shape[0], width), x_AD.dtype)

    def block(carry, expert, start, valid):
        y, gates, ups = carry
        x = _rows(x_pad, start, size)
        gate, up = x @ _weight(gate_EDF, expert, x), x @ _weight(up_EDF, expert, x)
        out = (jax.nn.silu(gate) * up) @ _weight(down_EFD, expert, x)
        return _set_rows(y, out, start), _set_rows(gates, gate, start), _set_rows(ups, up, start)

    y, gates, ups = _block_loop(sizes_E, rows, size, (jnp.zeros_like(x_pad), empty, empty), block)
    return y[:rows], (x_AD, gate_EDF, up_EDF, down_EFD, sizes_E, gates, ups)


def _blocks_backward(residuals, dy_AD):
    x_AD, gate_EDF, up_EDF, down_EFD, sizes_E, gates, ups = residuals
    size = _block_of(x_AD)
    x_pad, dy_pad = _pad(x_AD, size), _pad(dy_AD, size)

    def accumulate(total_EXY, expert, a_bX, b_bY):
        return total_EXY.at[expert].add(jnp.matmul(a_bX.T, b_bY, preferred_element_type=total_EXY.dtype))

    def block(carry, expert, start, valid):
        dx, d_gate, d_up, d_down = carry
        x, dy = _rows(x_pad, start, size), jnp.where(valid, _rows(dy_pad, start, size), 0)
        gate, up = _rows(gates, start, size), _rows(ups, start, size)
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        d_hidden = dy @ _weight(down_EFD, expert, x).T
        d_a = d_hidden * up * (sigmoid + silu * (1 - sigmoid))
        d_b = d_hidden * silu
        out = d_a @ _weight(gate_EDF, expert, x).T + d_b @ _weight(up_EDF, expert, x).T
        # Rows of the next group carry dy = 0 here, so they add nothing to these weights.
        return (
            _set_rows(dx, out, start),
            accumulate(d_gate, expert, x, d_a),
            accumulate(d_up, expert, x, d_b),
            accumulate(d_down, expert, silu * up, dy),
        )

    # One addition a block: in bfloat16 the sum of many would stall.
    wide = jnp.promote_types(x_AD.dtype, jnp.float32)
    weights_EXY = (gate_EDF, up_EDF, down_EFD)
    zeros = tuple(jnp.zeros(w.shape, wide) for w in weights_EXY)
    dx, *totals = _block_loop(sizes_E, x_AD.shape[0], size, (jnp.zeros_like(x_pad), *zeros), block)
    d_gate, d_up, d_down = (total.astype(w.dtype) for total, w in zip(totals, weights_EXY, strict=True))
    return dx[: x_AD.shape[0]], d_gate, d_up, d_down, None


blocks_ffn.defvjp(_blocks_forward, _blocks_backward)
