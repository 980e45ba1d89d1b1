"""Experts on this machine: each kernel's forward and backward pass beside one dense layer of the same FLOPs.

    python -m benchmarks.experts [--tokens 4096] [--width 256] [--ffn 512] [--experts 8 16 64]

Prints milliseconds of processor time, which other programs on the machine disturb least, and the ratio to the dense layer.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from model.grouped_ffn import grouped_ffn

KERNELS = ("blocks", "ragged_dot")


def processor_ms(function, *arguments, repeats: int = 7) -> float:
    """Least processor time of a call, in milliseconds."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(function(*arguments))
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 64])
    options = parser.parse_args()
    T, D, F = options.tokens, options.width, options.ffn
    keys = jax.random.split(jax.random.key(0), 5)
    x_TD = jax.random.normal(keys[0], (T, D))
    print(f"{T} tokens, width {D}, ffn {F}, float32, forward + backward, top-1, random routing\n")
    print(f"{'experts':>8} {'kernel':>12} {'ms':>8} {'x dense':>8}")
    for E in options.experts:
        gate, up = (jax.random.normal(key, (E, D, F)) * D**-0.5 for key in keys[1:3])
        down = jax.random.normal(keys[3], (E, F, D)) * F**-0.5
        sizes = jnp.bincount(jax.random.randint(keys[4], (T,), 0, E), length=E).astype(jnp.int32)

        def dense(x, gate, up, down, sizes):
            return (jax.nn.silu(x @ gate[0]) * (x @ up[0])) @ down[0]

        base = None
        for name, ffn in [("dense layer", dense)] + [(name, grouped_ffn(name)) for name in KERNELS]:
            loss = jax.jit(jax.grad(lambda x, *rest, ffn=ffn: jnp.sum(ffn(x, *rest) ** 2), argnums=(0, 1, 2, 3)))
            ms = processor_ms(loss, x_TD, gate, up, down, sizes)
            base = base or ms
            print(f"{E:>8} {name:>12} {ms:>8.0f} {ms / base:>8.1f}")


if __name__ == "__main__":
    main()
