"""What the student writes itself, for its teacher to judge: batches whose continuations are sampled from the student
(generalised knowledge distillation, arXiv 2306.13649).

A batch stays packed as it is. It is read token by token with a cache of keys and values, every row at once: a token that the
student is to write is drawn from what it has read so far, any other is the batch's own.

Letters: B rows, S sequence, V vocabulary, G documents of a row.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model.cache import Cache, empty
from model.transformer import Batch, Transformer
from sharding.mesh import DeviceMesh
from trainer.config import DistillConfig, RunConfig
from trainer.objective import SAMPLED
from trainer.sampling import Sampling, choose
from trainer.step import Params, Skeleton, TrainState


class Rollout:
    """Replaces the continuations in some of a run's batches by what the student writes; marks those targets, `SAMPLED`.

    Which batches, and every draw, are functions of the run's seed and the step; draws also of the row's number and the
    place in it, on any mesh.
    """

    def __init__(self, run: RunConfig, distill: DistillConfig, mesh: DeviceMesh, ends: Collection[int]):
        """`ends`: ids that end a document when the student writes them."""
        self._seed, self._distill, self._mesh = run.seed, distill, mesh
        self._ends = np.array(sorted(ends), np.int32)
        self._skeleton = Skeleton(run.model, mesh.outside())
        self._rows = mesh.row_order(run.data.batch_size, run.optimizer.accumulate)
        shape = run.data.batch_size, run.data.sequence_length
        self._none = jax.make_array_from_callback(
            shape, mesh.batch([SAMPLED])[SAMPLED], lambda index: np.zeros(shape, bool)[index]
        )
        self._run: Any = None

    def shapes(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """Those of the batches that it returns, from those that it is given."""
        return {**batch, SAMPLED: jax.ShapeDtypeStruct(self._none.shape, bool, sharding=self._none.sharding)}

    def compile(self, state: TrainState, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Ahead of the first step; by shapes."""

        def run(params: Params, router_bias: Params, batch: Batch, step: jax.Array) -> dict[str, jax.Array]:
            key = jax.random.fold_in(jax.random.key(self._seed), step)
            sampling = Sampling(key, jnp.float32(self._distill.rollout_temperature), None)
            sampled_BS = to_write(batch, self._distill.rollout_prompt)
            model = self._skeleton.model(params, router_bias)
            return written(model, batch, sampled_BS, sampling, self._ends, jnp.asarray(self._rows), self._mesh)

        compiled = jax.jit(run, out_shardings=self._mesh.batch([*batch, SAMPLED]))
        self._run = compiled.lower(state.params, state.router_bias, dict(batch), np.int32(0)).compile()

    def writes(self, step: int) -> bool:
        """Whether the batch of a step is one of those that the student writes."""
        return np.random.default_rng([self._seed, step]).random() < self._distill.on_policy

    def __call__(self, state: TrainState, batch: dict[str, jax.Array], step: int) -> dict[str, jax.Array]:
        if not self.writes(step):
            return batch | {SAMPLED: self._none}
        return self._run(state.params, state.router_bias, batch, np.int32(step))


def to_write(batch: Batch, prompt: float) -> jax.Array:
    """Targets that the student is to write itself, bool [B,S]: of each document's, all behind the first share `prompt`.

    What has no loss weight, such as a question, a user's turn or an image's tokens, is not a target and stays.
    """

    def of_row(target_S: jax.Array, segments_S: jax.Array) -> jax.Array:
        count_S = jnp.cumsum(target_S)
        G = len(segments_S) + 1
        before_G = jax.ops.segment_min(count_S - target_S, segments_S, G)
        total_G = jax.ops.segment_max(count_S, segments_S, G) - before_G
        rank_S = count_S - target_S - before_G[segments_S]
        return rank_S >= jnp.floor(prompt * total_G)[segments_S]

    target_BS = batch["loss_weights"] > 0
    return target_BS & jax.vmap(of_row)(target_BS.astype(jnp.int32), batch["segment_ids"])


def written(
    model: Transformer,
    batch: Batch,
    sampled_BS: jax.Array,
    sampling: Sampling,
    ends: np.ndarray,
    rows_B: jax.Array,
    mesh: DeviceMesh,
) -> dict[str, jax.Array]:
    """The batch with these targets drawn from the model, each after the ones before it, and with the mark `SAMPLED`.

    After an id of `ends` that the model has drawn, the rest of the document is padding. `rows_B`: the rows' numbers, on
    which the draws depend.
    """
    B, S = sampled_BS.shape
    embedded_BSD = model.embedded(batch)
    kept = NamedSharding(mesh.mesh, PartitionSpec(None, mesh.place.row_axes, "tensor"))
    cache = empty(model.config, B, S)
    layers = jax.lax.with_sharding_constraint(cache.layers, kept) if mesh.place.axes else cache.layers

    def one_token(carry: Any, inputs: Any) -> Any:
        layers, drawn_B, is_drawn_B, over_B = carry
        place, embedded_BD, token_B, position_B, draw_B = inputs
        token_B = jnp.where(is_drawn_B, drawn_B, token_B)
        embedded_BD = jnp.where(is_drawn_B[:, None], model.embed_tokens(token_B), embedded_BD)
        over_B &= position_B > 0
        ended_B = over_B | (is_drawn_B & jnp.isin(token_B, ends))
        # A document's position is the number of its tokens before: what other documents left in the cache is behind it.
        hidden_BD, cache = model.decode_embedded(embedded_BD, Cache(layers, position_B))
        drawn_B = choose(model.logits(hidden_BD), jnp.full(B, place), sampling, rows_B)
        return (cache.layers, drawn_B, draw_B, ended_B), (token_B, drawn_B, over_B, ended_B)

    start = layers, jnp.zeros(B, jnp.int32), jnp.zeros(B, bool), jnp.zeros(B, bool)
    by_place = (embedded_BSD, batch["tokens"], batch["positions"], sampled_BS)
    inputs = (jnp.arange(S), *(jnp.swapaxes(array, 0, 1) for array in by_place))
    _, outputs = jax.lax.scan(one_token, start, inputs)
    tokens_BS, drawn_BS, over_BS, ended_BS = (array.T for array in outputs)
    sampled_BS &= ~ended_BS

    def unless(gone_BS: jax.Array, name: str) -> jax.Array:
        return jnp.where(gone_BS, 0, batch[name])

    padded = {name: unless(over_BS, name) for name in ("segment_ids", "positions", "source_ids")}
    targets_BS = jnp.where(sampled_BS, drawn_BS, unless(ended_BS, "targets"))
    return {
        **batch,
        **padded,
        "tokens": tokens_BS,
        "targets": targets_BS,
        "loss_weights": unless(ended_BS, "loss_weights"),
        SAMPLED: sampled_BS,
    }
