"""The same training run on any mesh: what `train` runs, on 8 virtual devices and on one.

    python -m tests.sharding.sameness [--cases NAME ...] [--meshes fsdp=4,expert=2 ...] [--float64]

Prints a line for each case and mesh, and exits with 1 where a difference is larger than it may be. In float64: the loss
and every gradient to 1e-10 of its norm. Then, unless only that is asked for, in float32: the loss to 1e-5, every gradient
to 1e-4 of its largest value, every weight after 10 steps of AdamW to 1e-4 of its norm, replicas bit for bit.
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.config import DataConfig
from model.config import ModelConfig
from sharding.config import AXES, meshes, written
from sharding.mesh import DeviceMesh
from tests import oracle
from tests.oracle_cases import (
    AUDIO,
    COEFFICIENTS,
    FAST_COMPILE,
    SOURCES,
    TINY,
    VISION,
    bias_of_layers,
    random_batch,
    random_bias,
    random_params,
)
from trainer.config import OptimizerConfig, RunConfig
from trainer.initialise import abstract_state
from trainer.objective import next_token_objective
from trainer.step import Skeleton, init_state, loss_and_gradient, make_train_step

DEVICES, ROWS, LENGTH, STEPS = 8, 16, 32, 10
FLOAT64, LOSS, GRADIENT, WEIGHTS = 1e-10, 1e-5, 1e-4, 1e-4
"""What may differ; see above."""

WIDE = dataclasses.replace(
    TINY,
    hidden_size=16,
    num_experts=8,
    num_heads=16,
    num_kv_heads=8,
    dense_ffn_size=16,
    expert_ffn_size=8,
    vocab_size=24,
)
"""Of sizes that 8 devices can split."""


class Case(NamedTuple):
    """What is trained on each mesh."""

    model: ModelConfig
    micro_batches: int
    """Of a step."""
    seed: int
    """One that leaves every choice of experts clear of rounding; see `margin`."""


CASES: dict[str, Case] = {
    "everything": Case(
        dataclasses.replace(
            WIDE,
            num_layers=8,
            moe_layer_step=2,
            nope_layer_step=2,
            experts_per_token=2,
            router_bias_rate=0.1,
            vision=dataclasses.replace(VISION, adapter_size=8),
            audio=dataclasses.replace(AUDIO, hidden_size=8, num_layers=1),
        ),
        micro_batches=2,
        seed=8,
    ),
    "tied, a capacity": Case(
        dataclasses.replace(
            WIDE,
            num_layers=8,
            moe_layer_step=2,
            nope_layer_step=4,
            tie_embeddings=True,
            remat="full",
            capacity_factor=1.0,
        ),
        micro_batches=1,
        seed=6,
    ),
}
"""The first has dense and expert layers, chunked and global ones, images, sound, packed rows, router losses and bias, and
accumulation, in 8 layers of 4 super-blocks; the second what cannot be had together with that, and experts in chunked layers."""


def in_precision(case: str, dtype: str) -> tuple[ModelConfig, Any, Any, dict[str, np.ndarray], int]:
    model, parts, seed = CASES[case]
    model = dataclasses.replace(model, dtype=dtype, param_dtype=dtype)
    params = random_params(model, seed)
    if dtype == "float64":
        params = oracle.as_float64(params)
    return model, params, random_bias(model, seed), random_batch(model, seed, rows=ROWS, length=LENGTH), parts


def placed(mesh: DeviceMesh, batch: dict[str, np.ndarray], parts: int) -> dict[str, jax.Array]:
    order = mesh.row_order(ROWS, parts)
    return jax.device_put({name: array[order] for name, array in batch.items()}, mesh.batch(batch))


def loss_sums_gradient(case: str, mesh: DeviceMesh) -> Any:
    """Of the whole batch, in float64, on the host."""
    model, params, bias, batch, parts = in_precision(case, "float64")
    skeleton, objective = Skeleton(model, mesh), next_token_objective(COEFFICIENTS, SOURCES)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params: Any, bias: Any, batch: Any) -> Any:
        return loss_and_gradient(skeleton, objective, params, bias, batch, parts)

    weights = jax.device_put(params, skeleton.shardings), jax.device_put(bias, mesh.everywhere)
    return jax.device_get(run(*weights, placed(mesh, batch, parts)))


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the shipped step made of weights, on the host."""

    loss: np.ndarray
    """Of the first step."""
    gradient: Any
    """Of the first step: Adam's first moment after it, which is the clipped gradient times a constant."""
    assignments: np.ndarray
    """Of all steps: tokens of each expert, [steps, L, E]."""
    weights: Any
    """After all steps."""
    replicas_agree: bool
    """Bit for bit."""
    selection: list[np.ndarray]
    """What experts are chosen by before each step, [L, T, E]; on one device only."""


def trained(case: str, mesh: DeviceMesh, dtype: str = "float32") -> Trained:
    model, params, bias, batch, parts = in_precision(case, dtype)
    run = RunConfig(
        steps=100,
        model=model,
        data=DataConfig(batch_size=ROWS),
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=2, accumulate=parts),
    )
    skeleton = Skeleton(model, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, skeleton))
    state = dataclasses.replace(init_state(run), params=params, router_bias=bias)
    state = jax.device_put(state, shardings)
    step = jax.jit(
        make_train_step(run, skeleton, next_token_objective(COEFFICIENTS, SOURCES)),
        donate_argnums=0,
        out_shardings=(shardings, mesh.everywhere),
        compiler_options=FAST_COMPILE,
    )
    select = jax.jit(functools.partial(selection, skeleton), compiler_options=FAST_COMPILE)
    told, selected, gradient = [], [], None
    for i in range(STEPS):
        selected += [] if mesh.place.axes else [select(state.params, state.router_bias, batch)]
        state, sums = step(state, placed(mesh, batch, parts))
        told.append(jax.device_get((sums["loss"], sums["assignments"])))
        gradient = jax.device_get(optax.tree.get(state.optimizer, "mu")) if i == 0 else gradient
    return Trained(
        loss=told[0][0],
        gradient=gradient,
        assignments=np.stack([assignments for _, assignments in told]),
        weights=jax.device_get(state.params),
        replicas_agree=all(map(replicas_agree, jax.tree.leaves(state))),
        selection=[np.asarray(scores, np.float64)[:, batch["segment_ids"].reshape(-1) > 0] for scores in selected],
    )


def selection(skeleton: Skeleton, params: Any, bias: Any, batch: Any) -> jax.Array:
    """What the experts of each token are chosen by, [L, T, E]: logits, or with a bias their sigmoid and the bias."""
    router = skeleton.model(params, bias)(batch, capture=True).router
    assert router is not None and router.logits_TE is not None
    of_layers = bias_of_layers(skeleton.config, bias)
    if of_layers is None:
        return router.logits_TE
    return jax.nn.sigmoid(router.logits_TE) + jnp.stack(list(of_layers.values()))[:, None]


def replicas_agree(array: jax.Array) -> bool:
    first: dict[str, bytes] = {}
    return all(
        first.setdefault(str(shard.index), np.asarray(shard.data).tobytes()) == np.asarray(shard.data).tobytes()
        for shard in array.addressable_shards
    )


alone_losses = functools.cache(lambda case: loss_sums_gradient(case, DeviceMesh.alone()))
alone_trained = functools.cache(lambda case: trained(case, DeviceMesh.alone()))


class Margin(NamedTuple):
    """How clear of rounding the choice of experts is on one device, over all steps, layers and tokens."""

    gap: float
    """Smallest difference between what the last expert that is chosen and the next one are chosen by, in float64."""
    rounding: float
    """Largest change of what experts are chosen by, where all steps are in float32."""
    clearance: float
    """Smallest gap of a token over twice the largest such change of this token; below 1 rounding could choose."""

    def __str__(self) -> str:
        return f"smallest gap {self.gap:.0e}, rounding up to {self.rounding:.0e}, clearance {self.clearance:.1f}"


@functools.cache
def margin(case: str) -> Margin:
    k = CASES[case].model.experts_per_token
    with jax.enable_x64(True):
        exact = np.stack(trained(case, DeviceMesh.alone(), "float64").selection)
    ordered = np.sort(exact, axis=-1)
    gap = ordered[..., -k] - ordered[..., -k - 1]
    rounding = np.abs(exact - np.stack(alone_trained(case).selection)).max(axis=-1)
    return Margin(float(gap.min()), float(rounding.max()), float((gap / (2 * rounding)).min()))


def largest(error: Any, ours: Any, theirs: Any) -> float:
    """The largest error of all leaves."""
    return max(jax.tree.leaves(jax.tree.map(error, ours, theirs)))


def of_norm(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30))


def of_largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def fitting(case: str) -> list[dict[str, int]]:
    """The meshes that the case's layers can be split over; all else divides."""
    model = CASES[case][0]
    repeats = model.num_layers // len(model.super_block())
    return [sizes for sizes in meshes(DEVICES) if repeats % sizes["stage"] == 0]


def unsupported(case: str) -> list[dict[str, int]]:
    """The others."""
    possible = fitting(case)
    return [sizes for sizes in meshes(DEVICES) if sizes not in possible]


def supported_line(case: str) -> str:
    """How many meshes the case can be split over, and which it cannot."""
    others, total = unsupported(case), len(list(meshes(DEVICES)))
    names = f": {'; '.join(map(written, others))} (stage does not divide the super-blocks)" if others else ""
    return f"{total - len(others)} of the {total} meshes of {DEVICES} devices are supported, not {len(others)}{names}"


def compare(case: str, sizes: dict[str, int], only_float64: bool, **options: Any) -> tuple[bool, str]:
    """Whether a mesh, with options as in `Place`, gives what one device does, and a line that says how close."""
    mesh = DeviceMesh.of(jax.devices()[: math.prod(sizes.values())], sizes, **options)
    with jax.enable_x64(True):
        wide = largest(of_norm, loss_sums_gradient(case, mesh), alone_losses(case))
    line, good = f"float64 {wide:.0e}", wide < FLOAT64
    if not only_float64:
        found, expected = trained(case, mesh), alone_trained(case)
        loss, gradient = of_largest(found.loss, expected.loss), largest(of_largest, found.gradient, expected.gradient)
        weights = largest(of_norm, found.weights, expected.weights)
        line += f"   float32 loss {loss:.0e} gradient {gradient:.0e} weights after {STEPS} steps {weights:.0e}"
        routed_alike = np.array_equal(found.assignments, expected.assignments)
        line += "" if routed_alike else "   experts have other tokens"
        line += "" if found.replicas_agree else "   replicas differ"
        good &= loss < LOSS and gradient < GRADIENT and weights < WEIGHTS and routed_alike and found.replicas_agree
    return good, line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--meshes", nargs="+", help="default: every mesh of 8 devices that divides the case")
    parser.add_argument("--float64", action="store_true", help="compare losses and gradients in float64, no more")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    asked = [dict(pair.split("=") for pair in mesh.split(",")) for mesh in options.meshes or []]
    chosen = [{name: int(mesh.get(name, 1)) for name in AXES} for mesh in asked]
    same, wrong = 0, 0
    for case in options.cases:
        possible = fitting(case)
        print(f"{case}; experts are chosen with: {margin(case)}")
        for sizes in chosen or possible:
            good, line = compare(case, sizes, options.float64)
            same, wrong = same + good, wrong + (not good)
            print(f"  {written(sizes):28} {'same' if good else 'DIFFERS':8} {line}", flush=True)
        if not chosen:
            print(f"  {supported_line(case)}")
    print(f"{same} of {same + wrong} are the same")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
