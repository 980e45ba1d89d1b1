"""The training step and the evaluation step: pure functions of (state, batch), compiled once.

The function that `train` runs is the one that the tests compare. Letters: L mixture-of-experts layers, E experts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from model.config import ModelConfig
from model.moe import RouterBias
from model.storage import AS_THEY_ARE, HOST, Storage, as_int8, is_matrix, stored
from model.transformer import Batch, Transformer
from sharding.mesh import DeviceMesh
from sharding.rules import GATHERED, Axes
from trainer.config import RunConfig
from trainer.objective import Extras, Objective, Sums, extras_for
from trainer.optimizer import adamw, learning_rate

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; plain nested dicts of arrays."""

    step: jax.Array
    """Steps done, skipped ones included; also the number of the next batch."""
    params: Params
    """Weights."""
    router_bias: Params
    """Biases of the expert selection; empty unless `model.router_bias_rate` is set."""
    optimizer: Any
    """Optax state."""
    skipped: jax.Array
    """Steps skipped so far because the loss or the gradient was not finite."""
    skipped_in_a_row: jax.Array
    """Of these, those since the last good one."""


class Skeleton:
    """A model without its arrays: puts weights in, and takes them out as plain nested dicts."""

    def __init__(self, config: ModelConfig, mesh: DeviceMesh | None = None, storage: Storage = AS_THEY_ARE):
        """`mesh`: the devices that it will run on; by default one. `storage`: how weights are kept that nothing trains.

        Raises:
            UserError: the mesh does not divide a weight.
        """
        self.mesh, self.storage = mesh or DeviceMesh.alone(), storage
        model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), self.mesh.platform, self.mesh.place))
        self.config = model.config
        self._graph, params, self._bias = nnx.split(model, nnx.Param, RouterBias)
        # A part of a weight does not show what the whole was, so `Place` reads there how it is split.
        self._params = jax.tree_util.tree_map_with_path(
            lambda path, weight: stored(weight.copy(split=self._split(path, weight)), storage),
            params,
            is_leaf=_is_variable,
        )
        self.shardings: Params = nnx.to_pure_dict(
            jax.tree.map(lambda weight: weight.replace(self._home(weight)), self._params, is_leaf=_is_variable)
        )
        """Where each weight lives."""

    def _split(self, path: Any, weight: nnx.Variable) -> tuple[Axes, ...]:
        dims = weight.get_metadata()["dims"]
        return self.mesh.rules.split(path_of(path), dims, weight.get_value().shape, self.mesh.sizes)

    def _home(self, weight: nnx.Variable) -> Any:
        note = weight.get_metadata()
        home = self.mesh.split(note["split"])
        if self.storage.host and is_matrix(weight):
            home = home.with_memory_kind(HOST)
        # Scales are few, and would cost a transfer each.
        return as_int8(home, self.mesh.split(note["scale_split"])) if "scale_split" in note else home

    def summed(self, gradient: Params) -> Params:
        """The gradient of every weight, of which `Place` has summed what it gathered, summed over all devices."""
        state = jax.tree.map(lambda weight: weight, self._params, is_leaf=_is_variable)
        nnx.replace_by_pure_dict(state, gradient)
        return nnx.to_pure_dict(jax.tree.map(self.mesh.place.summed, state, is_leaf=_is_variable))

    @property
    def abstract_params(self) -> Params:
        """Shapes and dtypes of the weights."""
        return nnx.to_pure_dict(self._params)

    @property
    def abstract_weights(self) -> tuple[Params, Params]:
        """Shapes, dtypes and shardings of the weights and of the router biases."""

        def shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        biases = jax.tree.map(lambda leaf: shape(leaf, self.mesh.everywhere), nnx.to_pure_dict(self._bias))
        return jax.tree.map(shape, self.abstract_params, self.shardings), biases

    @property
    def one_super_block(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a super-block's matrices where they are used: gathered, as they are computed with."""
        shapes = []
        for weight in jax.tree.leaves(self._params, is_leaf=_is_variable):
            if is_matrix(weight):
                note, dtype = weight.get_metadata(), jnp.dtype(self.config.dtype)
                parts = zip(note["dims"], note["split"], strict=True)
                split = [() if name in GATHERED else axes for name, axes in parts][1:]
                shape = weight.get_value().shape[1:]
                shapes.append(jax.ShapeDtypeStruct(shape, dtype, sharding=self.mesh.split(split)))
        return shapes

    def model(self, params: Params, router_bias: Params) -> Transformer:
        """The model with these weights."""
        states = []
        for template, values in ((self._params, params), (self._bias, router_bias)):
            state = jax.tree.map(lambda leaf: leaf, template)
            nnx.replace_by_pure_dict(state, values)
            states.append(state)
        return nnx.merge(self._graph, *states)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that others learn from, on its skeleton's mesh with its own shardings; nothing changes it."""

    skeleton: Skeleton = dataclasses.field(metadata={"static": True})
    params: Params
    router_bias: Params


def weight_shapes(config: ModelConfig) -> Params:
    """Shapes and dtypes of a model's weights, without asking for a device."""
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), "cpu"))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def path_of(path: Any) -> str:
    """The keys of a path in a tree of weights, as `blocks.0.attn.q`."""
    return ".".join(str(step.key) for step in path)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def init_state(run: RunConfig) -> TrainState:
    """A fresh state from the run's seed, the same on any mesh."""
    model = Transformer(run.model, nnx.Rngs(run.seed))
    _, params, bias = nnx.split(model, nnx.Param, RouterBias)
    params = nnx.to_pure_dict(params)
    optimizer = adamw(run.optimizer).init(params)
    # Three arrays, not one three times: the step donates its state, and a buffer can be given away once.
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, nnx.to_pure_dict(bias), optimizer, skipped, in_a_row)


def state_shardings(run: RunConfig, skeleton: Skeleton, state: TrainState) -> TrainState:
    """Where each array of a state (or of its shapes) lives: moments beside their weights, all else on every device."""
    everywhere = skeleton.mesh.everywhere
    whole = jax.tree.map(lambda _: everywhere, state)
    optimizer = optax.tree.map_params(
        adamw(run.optimizer),
        lambda _, sharding: sharding,
        state.optimizer,
        skeleton.shardings,
        transform_non_params=lambda _: everywhere,
    )
    return dataclasses.replace(whole, params=skeleton.shardings, optimizer=optimizer)


def split_batch(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...]: micro-batch i is rows i x B / parts and on."""
    return {name: array.reshape(parts, -1, *array.shape[1:]) for name, array in batch.items()}


def loss_and_gradient(
    skeleton: Skeleton,
    objective: Objective,
    params: Params,
    router_bias: Params,
    batch: Batch,
    micro_batches: int,
    progress: jax.Array | float = 0.0,
    teacher: Teacher | None = None,
) -> tuple[jax.Array, Sums, Params]:
    """Loss of the step, sums and gradient with respect to `params`, accumulated over micro-batches.

    On a mesh of several devices the rows of `batch` are in the order of `DeviceMesh.row_order`.
    """
    mesh = skeleton.mesh
    place, everywhere = mesh.place, mesh.everywhere

    def on_one(
        params: Params, router_bias: Params, batch: Batch, extras: Extras, frozen: tuple[Params, Params]
    ) -> tuple[jax.Array, Sums, Params]:
        if teacher:
            extras = dataclasses.replace(extras, teacher=teacher.skeleton.model(*frozen))
        loss, sums, gradient = _accumulated(skeleton, objective, params, router_bias, batch, extras, micro_batches)
        return place.total(loss), place.total(sums), skeleton.summed(gradient)

    step = mesh.on_all(
        on_one,
        inputs=(
            skeleton.shardings,
            everywhere,
            mesh.batch(batch),
            everywhere,
            (teacher.skeleton.shardings, everywhere) if teacher else everywhere,
        ),
        outputs=(everywhere, everywhere, skeleton.shardings),
    )
    frozen = (teacher.params, teacher.router_bias) if teacher else ({}, {})
    return step(params, router_bias, batch, extras_for(batch, micro_batches * place.parts, progress), frozen)


def _accumulated(
    skeleton: Skeleton,
    objective: Objective,
    params: Params,
    router_bias: Params,
    batch: Batch,
    extras: Extras,
    micro_batches: int,
) -> tuple[jax.Array, Sums, Params]:
    """What one device adds to the loss, the sums and the gradient."""

    def loss(params: Params, part: Batch, extras: Extras) -> tuple[jax.Array, tuple[jax.Array, Sums]]:
        whole, sums = objective(skeleton.model(params, router_bias), part, extras)
        return whole / skeleton.mesh.place.copies, (whole, sums)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if micro_batches == 1:
        (_, (total, sums)), gradient = value_and_grad(params, batch, extras)
        return total, sums, gradient

    def add_part(carry, part):
        return jax.tree.map(jnp.add, carry, value_and_grad(params, part, extras)), None

    parts = split_batch(batch, micro_batches)
    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda array: array[0], parts), extras)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ((_, (total, sums)), gradient), _ = jax.lax.scan(add_part, zeros, parts)
    return total, sums, gradient


def moved_bias(router_bias: Params, assignments_LE: jax.Array, model: ModelConfig) -> Params:
    """Each bias moved by `router_bias_rate` against the expert's excess load (arXiv 2408.15664, algorithm 1)."""
    excess_LE = assignments_LE - jnp.mean(assignments_LE, axis=1, keepdims=True)
    # Layers are numbered through the super-block first, the biases are stacked over its repeats.
    moe_places = [i for i, kind in enumerate(model.super_block()) if kind.moe]
    per_repeat = excess_LE.reshape(-1, len(moe_places), excess_LE.shape[1])
    moved = {}
    for i, place in enumerate(moe_places):
        bias_RE = router_bias["blocks"][place]["ffn"]["router_bias"]
        change_RE = model.router_bias_rate * jnp.sign(per_repeat[:, i])
        moved[place] = {"ffn": {"router_bias": bias_RE - change_RE.astype(bias_RE.dtype)}}
    return {"blocks": moved}


TrainStep = Callable[..., tuple[TrainState, Sums]]
"""(state, batch, teacher=None) -> (state, sums)"""


def make_train_step(run: RunConfig, skeleton: Skeleton, objective: Objective) -> TrainStep:
    """The training step, not yet compiled.

    A step whose loss or gradient is not finite leaves weights and optimizer as they were, and is counted.
    """
    optimizer, rate = adamw(run.optimizer), learning_rate(run.optimizer, run.steps)

    def train_step(state: TrainState, batch: Batch, teacher: Teacher | None = None) -> tuple[TrainState, Sums]:
        loss, sums, gradient = loss_and_gradient(
            skeleton,
            objective,
            state.params,
            state.router_bias,
            batch,
            run.optimizer.accumulate,
            state.step / run.steps,
            teacher,
        )
        norm, lr = optax.tree.norm(gradient), rate(state.step)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def update(state: TrainState) -> tuple[Params, Params, Any]:
            direction, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
            params = jax.tree.map(lambda p, d: (p - lr * d).astype(p.dtype), state.params, direction)
            bias = state.router_bias
            return params, moved_bias(bias, sums["assignments"], skeleton.config) if bias else bias, optimizer_state

        def keep(state: TrainState) -> tuple[Params, Params, Any]:
            return state.params, state.router_bias, state.optimizer

        params, router_bias, optimizer_state = jax.lax.cond(finite, update, keep, state)
        after = TrainState(
            state.step + 1,
            params,
            router_bias,
            optimizer_state,
            state.skipped + ~finite,
            jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        # A state that changed shape or type would compile again at the next step, and could not be donated.
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        state = after
        health = {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        return state, sums | health | {"grad_norm": norm, "learning_rate": lr}

    return train_step


def make_eval_step(skeleton: Skeleton, objective: Objective) -> Callable[[Params, Params, Batch], Sums]:
    """The objective's sums on a held-out batch, not yet compiled."""

    mesh = skeleton.mesh

    def on_one(params: Params, router_bias: Params, batch: Batch, extras: Extras) -> Sums:
        return mesh.place.total(objective(skeleton.model(params, router_bias), batch, extras)[1])

    def eval_step(params: Params, router_bias: Params, batch: Batch) -> Sums:
        inputs = (skeleton.shardings, mesh.everywhere, mesh.batch(batch), mesh.everywhere)
        step = mesh.on_all(on_one, inputs, outputs=mesh.everywhere)
        return step(params, router_bias, batch, extras_for(batch, mesh.place.parts))

    return eval_step
