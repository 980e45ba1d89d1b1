"""Every kernel of the experts against one dense product per expert, in float64, group by group."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import grouped_ffn
from model.grouped_ffn import BLOCK_ROWS

E, D, F = 4, 6, 10
SIZES = {
    "empty groups": (0, 5, 0, 3),
    "all rows to one": (0, 0, 3 * BLOCK_ROWS + 1, 0),
    "exact blocks": (BLOCK_ROWS, 2 * BLOCK_ROWS, 0, BLOCK_ROWS),
    "one row each": (1, 1, 1, 1),
    "skewed": (BLOCK_ROWS + 7, 2, 3 * BLOCK_ROWS - 1, 0),
    "no rows": (0, 0, 0, 0),
}
UNUSED = 9
"""Rows after the last group: padding, which goes to no expert."""


def reference(x, gate, up, down, sizes):
    """One expert after the other."""
    ends = np.cumsum(sizes)
    parts = [
        (jax.nn.silu(rows @ gate[e]) * (rows @ up[e])) @ down[e]
        for e, rows in enumerate(x[end - size : end] for end, size in zip(ends, sizes, strict=True))
    ]
    return jnp.concatenate([*parts, jnp.zeros((x.shape[0] - ends[-1], D), x.dtype)])


@pytest.mark.parametrize("kernel", ["blocks", "ragged_dot"])
@pytest.mark.parametrize("case", SIZES)
def test_values_and_gradients_equal_one_dense_product_per_expert(kernel: str, case: str) -> None:
    sizes = np.array(SIZES[case], np.int32)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = ((sizes.sum() + UNUSED, D), (E, D, F), (E, D, F), (E, F, D))
        arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        weight = jnp.asarray(rng.normal(size=shapes[0]))

        def loss(function, groups, *arrays):
            y = function(*arrays, groups)
            return jnp.sum(y * weight), y

        def run(function, groups):
            return jax.value_and_grad(lambda *a: loss(function, groups, *a), argnums=(0, 1, 2, 3), has_aux=True)(
                *arrays
            )

        (_, y), gradients = jax.jit(lambda groups: run(grouped_ffn.grouped_ffn(kernel), groups))(jnp.asarray(sizes))
        (_, expected_y), expected = run(reference, sizes)
    np.testing.assert_allclose(y, expected_y, rtol=1e-12, atol=1e-12)
    for name, got, want in zip(("x", "gate", "up", "down"), gradients, expected, strict=True):
        # Each expert by itself: an error in a small group must not hide behind a large one.
        groups = zip(got, want, strict=True) if name != "x" else [(got, want)]
        for e, (g, w) in enumerate(groups):
            np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-11, err_msg=f"{name}, expert {e}")


def test_rows_after_the_last_group_reach_nothing_not_even_when_they_are_not_finite() -> None:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape)) for shape in ((12, D), (E, D, F), (E, D, F), (E, F, D))]
    arrays[0] = arrays[0].at[10:].set(jnp.nan)
    sizes = jnp.array([4, 0, 5, 1])
    for kernel in ("blocks", "ragged_dot"):
        ffn = grouped_ffn.grouped_ffn(kernel)
        y, back = jax.vjp(lambda *a, ffn=ffn: ffn(*a, sizes), *arrays)
        assert np.array_equal(y[10:], np.zeros((2, D)))
        gradients = back(jnp.ones_like(y).at[10:].set(jnp.nan))
        assert all(np.isfinite(gradient).all() for gradient in gradients)
        assert np.array_equal(gradients[0][10:], np.zeros((2, D)))


def test_gradients_of_many_blocks_keep_their_precision_in_bfloat16() -> None:
    """As many additions as blocks: in bfloat16 they would stall at a few per cent of the sum."""
    rng, rows = np.random.default_rng(0), 64 * BLOCK_ROWS
    shapes = ((rows, D), (1, D, F), (1, D, F), (1, F, D))
    arrays = [jnp.asarray(rng.normal(size=shape) + 0.5, jnp.bfloat16) for shape in shapes]
    sizes = jnp.array([rows], jnp.int32)

    def gradients(dtype):
        cast = [array.astype(dtype) for array in arrays]
        ffn = grouped_ffn.grouped_ffn("blocks")
        return jax.grad(lambda *a: jnp.sum(ffn(*a, sizes).astype(jnp.float32)), argnums=(1, 2, 3))(*cast)

    for got, want in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert jnp.linalg.norm(got.astype(jnp.float32) - want) < 0.01 * jnp.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU (and JAX_PLATFORMS=cuda)")
@pytest.mark.parametrize("sizes", [(1000, 0, 1047, 1), (0, 0, 2048, 0), (512, 512, 512, 512)], ids=str)
def test_the_gpu_kernel_equals_one_dense_product_per_expert(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    width, ffn = 256, 512
    shapes = ((2048 + UNUSED, width), (E, width, ffn), (E, width, ffn), (E, ffn, width))
    arrays = [jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, jnp.bfloat16) for shape in shapes]
    arrays[0] = arrays[0] * shapes[0][0] ** 0.5

    def run(function, dtype):
        cast = [array.astype(dtype) for array in arrays]
        loss = jax.grad(lambda *a: jnp.sum(function(*a).astype(jnp.float32) ** 2), argnums=(0, 1, 2, 3))
        return loss(*cast)

    got = run(lambda *a: grouped_ffn.grouped_ffn("tokamax")(*a, jnp.asarray(sizes, jnp.int32)), jnp.bfloat16)
    want = run(lambda *a: grouped_ffn.grouped_ffn("ragged_dot")(*a, jnp.asarray(sizes, jnp.int32)), jnp.float32)
    for g, w in zip(got, want, strict=True):
        assert jnp.linalg.norm(g.astype(jnp.float32) - w) < 0.03 * jnp.linalg.norm(w)


def test_auto_picks_by_the_platform_of_the_devices_and_a_choice_stands() -> None:
    chosen = [grouped_ffn.kernel_for(platform, "auto") for platform in ("cpu", "gpu", "tpu")]
    assert chosen == ["blocks", "tokamax", "ragged_dot"]
    assert grouped_ffn.kernel_for("gpu", "ragged_dot") == "ragged_dot"


def test_the_cpu_kernel_does_not_multiply_by_every_expert() -> None:
    """Work and memory do not grow with the number of experts, as they do where rows are masked per expert."""

    def temporaries(experts: int) -> int:
        shapes = [(512, 64), (experts, 64, 64), (experts, 64, 64), (experts, 64, 64)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
        compiled = jax.jit(grouped_ffn.blocks_ffn).lower(*arrays, sizes).compile()
        return compiled.memory_analysis().temp_size_in_bytes  # pyright: ignore

    assert temporaries(64) < 1.5 * temporaries(4)


def test_a_row_alone_is_not_multiplied_as_a_whole_block() -> None:
    """A decoded token: its cost is that of a row, however many experts there are."""
    width, ffn = 64, 128
    shapes = [(1, width), (E, width, ffn), (E, width, ffn), (E, ffn, width)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(grouped_ffn.blocks_ffn).lower(*arrays, jax.ShapeDtypeStruct((E,), jnp.int32)).compile()
    cost: Any = compiled.cost_analysis()
    assert cost["flops"] < 2 * (3 * 2 * width * ffn)


@pytest.mark.parametrize("kernel", ["blocks", "ragged_dot"])
def test_weights_of_lower_precision_are_widened_to_that_of_the_rows(kernel: str) -> None:
    rng = np.random.default_rng(0)
    sizes, x_AD = jnp.array([3, 0, 5, 1]), jnp.asarray(rng.normal(size=(9, D)), jnp.float32)
    narrow = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((E, D, F), (E, D, F), (E, F, D))]
    wide = [w.astype(jnp.float32) for w in narrow]
    run = jax.value_and_grad(lambda *w: jnp.sum(grouped_ffn.grouped_ffn(kernel)(x_AD, *w, sizes)), argnums=(0, 1, 2))
    (found, gradients), (expected, wanted) = run(*narrow), run(*wide)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(gradient.astype(np.float32), want, rtol=0.01, atol=1e-5)
