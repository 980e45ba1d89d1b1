"""Attention on this machine, forward and backward: in blocks, beside all scores of a block of queries at once.

    python -m benchmarks.attention [--dtype bfloat16] [--heads 8 --kv-heads 2 --width 64]

One row; several documents are of the same length. The memory is what the compiled program needs beside its arguments.
"""

import argparse
import time
from typing import Any

CASES = ((512, None, 1), (2048, None, 1), (2048, 512, 1), (8192, None, 1), (8192, None, 16), (8192, 1024, 1))
"""Length of the row, chunk, documents."""
QUERIES_AT_ONCE = 1024
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--blocks", type=int, nargs="+", help="sizes of blocks to compare")
    options = parser.parse_args()

    import jax

    from model import blockwise
    from model.attention import packed_attention

    print(f"{options.heads} heads of {options.width}, {options.dtype}, on {jax.devices()[0].device_kind}\n")
    print(f"{'row':>6} {'chunk':>6} {'documents':>10} {'at once':>18} {'in blocks of':>13} {'':>18} {'ratio':>6}")
    for length, chunk, documents in CASES:
        plain_s, plain_bytes = measure(at_once, options, length, chunk, documents)
        for block in options.blocks or [blockwise.BLOCK]:
            blockwise.BLOCK = block
            seconds, memory = measure(packed_attention, options, length, chunk, documents)
            print(
                f"{length:>6} {chunk or '-':>6} {documents:>10} {1e3 * plain_s:>7.0f} ms {plain_bytes >> 20:>4} MiB "
                f"{block:>13} {1e3 * seconds:>7.0f} ms {memory >> 20:>4} MiB {plain_s / seconds:>5.1f}x",
                flush=True,
            )


def at_once(q: Any, k: Any, v: Any, tokens: Any, chunk: int | None) -> Any:
    """Blocks of queries with all keys before them, scores computed again for the gradient."""
    import jax
    import jax.numpy as jnp

    from model.attention import attend
    from model.blockwise import allowed

    outputs = []
    for start in range(0, q.shape[1], QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, q.shape[1])
        first = 0 if chunk is None else max(0, start - chunk + 1)
        mask = allowed(tokens.part(start, stop - start), tokens.part(first, stop - first), chunk)
        outputs.append(jax.checkpoint(attend)(q[:, start:stop], k[:, first:stop], v[:, first:stop], mask))
    return jnp.concatenate(outputs, axis=1)


def measure(
    attention: Any, options: argparse.Namespace, length: int, chunk: int | None, documents: int
) -> tuple[float, int]:
    """Seconds, the fastest of a few, and bytes."""
    import jax
    import jax.numpy as jnp

    from model.blockwise import Tokens

    place, each = jnp.arange(length)[None], length // documents
    tokens = Tokens(place // each + 1, place % each, jnp.zeros(1, jnp.int32))
    heads = (options.heads, options.kv_heads, options.kv_heads)
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [
        jax.random.normal(key, (1, length, n, options.width), options.dtype) for key, n in zip(keys, heads, strict=True)
    ]

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(jnp.square(attention(q, k, v, tokens, chunk).astype(jnp.float32)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*qkv).compile()
    jax.block_until_ready(compiled(*qkv))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*qkv))
        times.append(time.perf_counter() - start)
    needs = compiled.memory_analysis()
    assert needs
    return min(times), needs.temp_size_in_bytes


if __name__ == "__main__":
    main()
