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

BLOCK_ROWS = 128
"""Rows that the CPU kernel multiplies at once; the last block of each group is padded to it in registers only."""

GroupedFFN = Callable[..., jax.Array]


def kernel_for(platform: str, choice: str) -> str:
    """Name of the implementation: `choice`, or for "auto" the one that is fastest on `platform`."""
    return choice if choice != "auto" else {"tpu": "ragged_dot", "gpu": "tokamax"}.get(platform, "blocks")


def grouped_ffn(name: str) -> GroupedFFN:
    """The implementation called `name`: (x [A,D], gate [E,D,F], up [E,D,F], down [E,F,D], sizes [E]) -> [A,D].

    Rows after the last group give zeros, and have no gradient.
    """
    kernel = {"blocks": blocks_ffn, "ragged_dot": ragged_ffn, "tokamax": tokamax_ffn}[name]

    def cleared(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E) -> jax.Array:
        used = (jnp.arange(x_AD.shape[0]) < jnp.sum(sizes_E))[:, None]
        y_AD: Any = kernel(jnp.where(used, x_AD, 0), gate_EDF, up_EDF, down_EFD, sizes_E)
        return jnp.where(used, y_AD, 0)

    return cleared


def ragged_ffn(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E) -> jax.Array:
    """Three `lax.ragged_dot`s."""
    hidden = jax.nn.silu(lax.ragged_dot(x_AD, gate_EDF, sizes_E)) * lax.ragged_dot(x_AD, up_EDF, sizes_E)
    return lax.ragged_dot(hidden, down_EFD, sizes_E)


def tokamax_ffn(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E) -> jax.Array:
    """Three `tokamax.ragged_dot`s (Triton or Mosaic kernels)."""
    import tokamax  # pyright: ignore[reportMissingImports]  (slow to import, and only a GPU needs it)

    dot = functools.partial(tokamax.ragged_dot, group_sizes=sizes_E)
    return dot(jax.nn.silu(dot(x_AD, gate_EDF)) * dot(x_AD, up_EDF), down_EFD)


def _rows(array: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, start, BLOCK_ROWS)


def _set_rows(array: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, rows, start, 0)


def _group_loop(sizes_E: jax.Array, carry, body):
    """Runs `body(carry, expert, start, valid_BLOCK)` over the blocks that exist, group after group.

    Blocks may read and write up to BLOCK_ROWS - 1 rows of the next group: those are masked by `valid` where they would
    count, and what is written to them is overwritten, since blocks run in order.
    """
    starts_E = jnp.cumsum(sizes_E) - sizes_E

    def group(expert, carry):
        size, first = sizes_E[expert], starts_E[expert]

        def block(i, carry):
            valid = (i * BLOCK_ROWS + jnp.arange(BLOCK_ROWS)) < size
            return body(carry, expert, first + i * BLOCK_ROWS, valid[:, None])

        return lax.fori_loop(0, (size + BLOCK_ROWS - 1) // BLOCK_ROWS, block, carry)

    return lax.fori_loop(0, sizes_E.shape[0], group, carry)


def _pad(array: jax.Array) -> jax.Array:
    return jnp.pad(array, ((0, BLOCK_ROWS), (0, 0)))


@jax.custom_vjp
def blocks_ffn(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E) -> jax.Array:
    """A loop over blocks of rows, as many as the group sizes ask for; dropless, and no row is multiplied twice.

    The gradient is written out because a loop of unknown length has no automatic one.
    """
    return _blocks_forward(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E)[0]


def _blocks_forward(x_AD, gate_EDF, up_EDF, down_EFD, sizes_E):
    rows, width = x_AD.shape[0], gate_EDF.shape[2]
    x_pad = _pad(x_AD)
    empty = jnp.zeros((x_pad.shape[0], width), x_AD.dtype)

    def block(carry, expert, start, valid):
        y, gates, ups = carry
        x = _rows(x_pad, start)
        gate, up = x @ gate_EDF[expert], x @ up_EDF[expert]
        out = (jax.nn.silu(gate) * up) @ down_EFD[expert]
        return _set_rows(y, out, start), _set_rows(gates, gate, start), _set_rows(ups, up, start)

    y, gates, ups = _group_loop(sizes_E, (jnp.zeros_like(x_pad), empty, empty), block)
    return y[:rows], (x_AD, gate_EDF, up_EDF, down_EFD, sizes_E, gates, ups)


def _blocks_backward(residuals, dy_AD):
    x_AD, gate_EDF, up_EDF, down_EFD, sizes_E, gates, ups = residuals
    x_pad, dy_pad = _pad(x_AD), _pad(dy_AD)

    def accumulate(total_EXY, expert, a_bX, b_bY):
        return total_EXY.at[expert].add(jnp.matmul(a_bX.T, b_bY, preferred_element_type=total_EXY.dtype))

    def block(carry, expert, start, valid):
        dx, d_gate, d_up, d_down = carry
        x, dy = _rows(x_pad, start), jnp.where(valid, _rows(dy_pad, start), 0)
        gate, up = _rows(gates, start), _rows(ups, start)
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        d_hidden = dy @ down_EFD[expert].T
        d_a = d_hidden * up * (sigmoid + silu * (1 - sigmoid))
        d_b = d_hidden * silu
        out = d_a @ gate_EDF[expert].T + d_b @ up_EDF[expert].T
        # Rows of the next group carry dy = 0 here, so they add nothing to these weights.
        return (
            _set_rows(dx, out, start),
            accumulate(d_gate, expert, x, d_a),
            accumulate(d_up, expert, x, d_b),
            accumulate(d_down, expert, silu * up, dy),
        )

    # One addition a block: in bfloat16 the sum of many would stall.
    wide = jnp.promote_types(x_AD.dtype, jnp.float32)
    zeros = tuple(jnp.zeros(w.shape, wide) for w in (gate_EDF, up_EDF, down_EFD))
    dx, *totals = _group_loop(sizes_E, (jnp.zeros_like(x_pad), *zeros), block)
    d_gate, d_up, d_down = (total.astype(dx.dtype) for total in totals)
    return dx[: x_AD.shape[0]], d_gate, d_up, d_down, None


blocks_ffn.defvjp(_blocks_forward, _blocks_backward)
