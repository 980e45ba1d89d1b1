"""Distillation losses and their gradient: over blocks of the vocabulary, beside all logits at once.

    python -m benchmarks.distillation [--topology v5p:2x2x1] [--tokens 1024 4096 16384] [--block 4096] [--memory]
    python -m benchmarks.distillation --cache

First (with --memory, that alone) the memory that the compiled program needs beside its arguments and results, with the
vocabulary of Llama 4, student and teacher as wide as Scout (5,120) and Behemoth (16,384); `drawn` makes 12 draws from the
teacher's distribution and learns them, `sparse` learns 12 ids that are given; nothing of that size is run. It is compiled for
this machine's CPU in float32 (XLA's CPU backend slices bfloat16 by way of float32 copies of the whole head), or with --topology
in bfloat16 for a TPU, which takes libtpu (`make collectives` installs it; PYTHONPATH=.venv/libtpu) and no TPU. Then times at a
size that runs on this machine, in float32, pair by pair in turns.

With --cache: what a token takes in the cache of a teacher's targets, by the number of draws, and how fast it is decoded; of
made-up distributions (`data.target_estimate`).
"""

import argparse
import os
import statistics
import time
from typing import Any

from benchmarks.topology import ENVIRONMENT

VOCABULARY, STUDENT, TEACHER = 202_048, 5_120, 16_384
SMALL = (1_024, 16_384, 256, 512)
"""Tokens, vocabulary, widths of student and teacher of what is run."""
SMALL_BLOCK = 2_048
PAIRS = 5
TEMPERATURE = 2.0
DRAWS, SEGMENTS = (12, 25, 50), 8
DECODINGS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="of TPUs, as libtpu names it; its first device is compiled for")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_024, 4_096, 16_384])
    parser.add_argument("--block", type=int, default=4_096)
    parser.add_argument("--memory", action="store_true", help="no times")
    parser.add_argument("--cache", action="store_true", help="the cache of targets instead")
    options = parser.parse_args()
    if options.cache:
        return cache()
    os.environ |= ENVIRONMENT if options.topology else {"JAX_PLATFORMS": "cpu"}

    import jax
    from jax.experimental import topologies

    from model.distillation import Kind, distillation_losses
    from model.sampled_targets import Recipe, draw_targets, sparse_losses

    device, dtype = jax.devices()[0], "float32"
    if options.topology:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
        device, dtype = topology.devices[0], "bfloat16"

    def in_blocks(kind: Kind, block: int) -> Any:
        return lambda *arrays: distillation_losses(*arrays, kind=kind, temperature=TEMPERATURE, block=block)[:2]

    def with_draws(drawn: bool, block: int) -> Any:
        recipe = Recipe(DRAWS[0], TEMPERATURE, proposal=1.0, top_k=0)

        def losses(hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any, targets: Any) -> Any:
            if drawn:
                found = draw_targets(teacher_hidden, teacher_head, targets, made_up_keys(targets), recipe, block=block)
                ids, weights = found.ids_TK, found.weights_TK
            else:
                ids, weights = made_up_ids(targets)
            return sparse_losses(hidden, head, targets, ids, weights, temperature=TEMPERATURE, tail=False, block=block)

        return losses

    print(f"compiled for {device.device_kind}, {dtype}, vocabulary {VOCABULARY:,}, blocks of {options.block:,}; MiB\n")
    print(f"{'tokens':>7} {'divergence':>15} {'at once':>9} {'in blocks':>10} {'ratio':>6}")
    kinds: tuple[Kind, ...] = ("forward", "reverse", "jensen_shannon")
    for tokens in options.tokens:
        losses_of: dict[str, tuple[Any, Any]] = {
            kind: (at_once(kind), in_blocks(kind, options.block)) for kind in kinds
        }
        for drawn in (True, False):
            losses_of["drawn" if drawn else "sparse"] = draws_at_once(drawn), with_draws(drawn, options.block)
        for name, pair in losses_of.items():
            shapes = tokens, VOCABULARY, STUDENT, TEACHER
            plain, blocks = (
                compiled(losses, shapes, dtype, device).memory_analysis().temp_size_in_bytes for losses in pair
            )
            print(f"{tokens:>7,} {name:>15} {plain >> 20:>9,} {blocks >> 20:>10,} {plain / blocks:>5.0f}x", flush=True)
    if options.memory:
        return

    device = jax.devices()[0]
    print(
        f"\nrun on {device.device_kind}, float32: {SMALL[0]:,} tokens, vocabulary {SMALL[1]:,}, blocks of {SMALL_BLOCK:,}"
    )
    print(f"\n{'divergence':>15} {'at once':>10} {'in blocks':>10} {'time x':>7}")
    for kind in kinds:
        programs = [
            compiled(losses, SMALL, "float32", device) for losses in (at_once(kind), in_blocks(kind, SMALL_BLOCK))
        ]
        pairs = measure(programs)
        plain, blocks = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(second / first for first, second in pairs)
        print(f"{kind:>15} {1e3 * plain:>7.0f} ms {1e3 * blocks:>7.0f} ms {ratio:>7.2f}", flush=True)


def cache() -> None:
    """Prints the table of docs/TARGET_CACHE.md."""
    import numpy as np

    from data.target_estimate import made_up_targets
    from data.target_records import RecordFormat, decode, encode

    digest = bytes(16)

    def speed(records: list[bytes], form: RecordFormat, tokens: int) -> float:
        """Tokens decoded in a second of processor time, the best of several times."""
        seconds = []
        for _ in range(DECODINGS):
            start = time.process_time()
            for record in records:
                decode(record, form, digest)
            seconds.append(time.process_time() - start)
        return tokens * len(records) / min(seconds)

    print(f"vocabulary {VOCABULARY:,}; a token, in segments of 512 tokens")
    print(f"{'draws':>5} {'ids':>5} {'bytes':>6} {'bits of counts (in unary)':>26} {'decoded, M tokens/s':>20}")
    for draws in DRAWS:
        form = RecordFormat(VOCABULARY, draws)
        segments = [made_up_targets(form, tokens=512, seed=seed) for seed in range(SEGMENTS)]
        records = [encode(digest, targets, form) for targets in segments]
        counts = np.concatenate([targets.counts for targets in segments])
        bits = f"{(2 * np.floor(np.log2(counts)) + 1).sum() / SEGMENTS / 512:.1f} ({draws})"
        print(
            f"{draws:>5} {len(counts) / SEGMENTS / 512:>5.1f} {sum(map(len, records)) / SEGMENTS / 512:>6.1f} {bits:>26} "
            f"{speed(records, form, 512) / 1e6:>20.1f}"
        )
    form = RecordFormat(VOCABULARY, DRAWS[0])
    record = encode(digest, made_up_targets(form, tokens=64), form)
    print(f"segments of 64 tokens, {DRAWS[0]} draws: {speed([record] * 64, form, 64) / 1e6:.1f} M tokens/s")


def at_once(kind: str) -> Any:
    """(student's hidden and head, teacher's, targets) -> cross-entropy and divergence, with every logit."""
    import jax
    import jax.numpy as jnp

    def losses(hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any, targets: Any) -> Any:
        student = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        teacher = jnp.matmul(teacher_hidden, teacher_head, preferred_element_type=jnp.float32)
        log_p, log_q = (jax.nn.log_softmax(logits / TEMPERATURE) for logits in (teacher, student))
        if kind == "forward":
            divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)
        elif kind == "reverse":
            divergence = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=1)
        else:
            log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
            divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m), axis=1) / 2
        target = jnp.take_along_axis(student, targets[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(student, axis=1) - target, TEMPERATURE**2 * divergence

    return losses


def draws_at_once(drawn: bool) -> Any:
    """The same -> cross-entropies with the target and with `DRAWS[0]` ids, drawn from the teacher or given."""
    import jax
    import jax.numpy as jnp

    def losses(hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any, targets: Any) -> Any:
        student = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        ids, weights = made_up_ids(targets)
        if drawn:
            teacher = jnp.matmul(teacher_hidden, teacher_head, preferred_element_type=jnp.float32)
            sums = jnp.cumsum(jax.nn.softmax(teacher / TEMPERATURE), axis=1)
            uniforms = jax.vmap(lambda key: jax.random.uniform(key, (DRAWS[0],)))(made_up_keys(targets))
            ids = jax.vmap(jnp.searchsorted)(sums, uniforms)
        log_q = jax.nn.log_softmax(student / TEMPERATURE)
        target = jnp.take_along_axis(student, targets[:, None], axis=1)[:, 0]
        soft = -jnp.sum(weights * jnp.take_along_axis(log_q, ids, axis=1), axis=1)
        return jax.nn.logsumexp(student, axis=1) - target, TEMPERATURE**2 * soft

    return losses


def made_up_keys(targets: Any) -> Any:
    """uint32 [T, 2]: a key for the draws of each token."""
    import jax.numpy as jnp

    return jnp.stack([targets, jnp.arange(targets.size)], axis=1).astype("uint32")


def made_up_ids(targets: Any) -> tuple[Any, Any]:
    """Ids and weights [T, `DRAWS[0]`]."""
    import jax.numpy as jnp

    ids = (targets[:, None] + jnp.arange(DRAWS[0])) % VOCABULARY
    return ids, jnp.full(ids.shape, 1 / DRAWS[0], "float32")


def compiled(losses: Any, shapes: tuple[int, ...], dtype: str, device: Any) -> Any:
    """The losses' sum and its gradient with respect to the student."""
    import jax
    import jax.numpy as jnp

    tokens, vocabulary, student, teacher = shapes
    here = jax.sharding.SingleDeviceSharding(device)
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=here)
        for shape in ((tokens, student), (student, vocabulary), (tokens, teacher), (teacher, vocabulary))
    ]
    targets = jax.ShapeDtypeStruct((tokens,), "int32", sharding=here)

    def total(*arrays: Any) -> Any:
        cross_entropy, divergence = losses(*arrays)
        return jnp.sum(cross_entropy + divergence)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*arrays, targets).compile()


def measure(programs: list[Any]) -> list[tuple[float, ...]]:
    """Seconds of each program, in pairs one after the other."""
    import jax

    tokens, vocabulary, student, teacher = SMALL
    keys = jax.random.split(jax.random.key(0), 5)
    widths = ((tokens, student), (student, vocabulary), (tokens, teacher), (teacher, vocabulary))
    arrays = [jax.random.normal(key, shape) / shape[0] ** 0.5 for key, shape in zip(keys[:4], widths, strict=True)]
    arrays.append(jax.random.randint(keys[4], (tokens,), 0, vocabulary))
    for program in programs:
        jax.block_until_ready(program(*arrays))
    pairs = []
    for _ in range(PAIRS):
        times = []
        for program in programs:
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            times.append(time.perf_counter() - start)
        pairs.append(tuple(times))
    return pairs


if __name__ == "__main__":
    main()
