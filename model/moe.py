"""Feed-forward layers: the dense SwiGLU, and the mixture of experts with a shared expert.

Letters: T tokens, D width, F ffn width, E experts, A assignments = T x top-k, sorted by expert.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.grouped_ffn import grouped_ffn
from model.layers import at_least_float32, matrix
from sharding.experts import expert_parallel
from sharding.place import Place


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)): gate and up [D,F], down [F,D]; no biases."""

    def __init__(self, config: ModelConfig, size: int, rngs: nnx.Rngs):
        D = config.hidden_size
        self.gate = matrix(rngs, (D, size), "width ffn", D, config)
        self.up = matrix(rngs, (D, size), "width ffn", D, config)
        self.down = matrix(rngs, (size, D), "ffn width", size, config)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def narrowed(weights: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The weights in `dtype`, but for those of lower precision, which the kernels widen where they use them."""
    return weights.astype(dtype) if jnp.dtype(dtype).itemsize < weights.dtype.itemsize else weights


class Experts(nnx.Module):
    """The routed experts' weights: gate and up [E,D,F], down [E,F,D]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        E, D, F = config.num_experts, config.hidden_size, config.expert_ffn_size
        self.gate = matrix(rngs, (E, D, F), "experts expert_width expert_ffn", D, config)
        self.up = matrix(rngs, (E, D, F), "experts expert_width expert_ffn", D, config)
        self.down = matrix(rngs, (E, F, D), "experts expert_ffn expert_width", F, config)


class RouterBias(nnx.Variable):
    """Bias of the expert selection; moved by the training step after each batch, not by a gradient."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """Sums over the tokens of a micro-batch, padding aside. Returned as values, so that no loss term can get lost."""

    assignments_E: jax.Array
    """Assignments to each expert (tokens x top-k in all)."""
    probability_E: jax.Array
    """Sum over tokens of softmax(router logits)."""
    z: jax.Array
    """Sum over tokens of logsumexp(router logits)^2."""
    tokens: jax.Array
    """Number of tokens."""
    dropped: jax.Array
    """Assignments that were dropped for want of capacity; they are in `assignments_E`, as the router chose them."""
    logits_TE: jax.Array | None = None
    """Raw router logits, kept only when the forward pass is asked to capture them."""


def router_stats(logits_TE: jax.Array, choice_TK: jax.Array, real_T: jax.Array, kept_TK: jax.Array) -> RouterStats:
    """Statistics for the balance terms: `choice_TK` the experts chosen, `kept_TK` those that had room for the token (E where
    not), `real_T` false at padding.
    """
    E = logits_TE.shape[1]
    weight_T = real_T.astype(logits_TE.dtype)
    counts_E = jnp.sum(jax.nn.one_hot(choice_TK, E, dtype=logits_TE.dtype) * weight_T[:, None, None], axis=(0, 1))
    probability_E = jnp.sum(jax.nn.softmax(logits_TE, axis=-1) * weight_T[:, None], axis=0)
    z = jnp.sum(jnp.square(jax.nn.logsumexp(logits_TE, axis=-1)) * weight_T)
    dropped = jnp.sum(choice_TK != kept_TK).astype(logits_TE.dtype)
    return RouterStats(jax.lax.stop_gradient(counts_E), probability_E, z, jnp.sum(weight_T), dropped)


# Dispatch copies token rows into expert order, combine sums them back. Each is the other's transpose, and both are
# gathers: written out, since the automatic gradient of a gather is a scatter-add, which is slow on every platform.


@jax.custom_vjp
def dispatch(x_TD: jax.Array, order_A: jax.Array, inverse_TK: jax.Array) -> jax.Array:
    """Row a of the result is the token of assignment `order_A[a]` (assignment i belongs to token i // top-k)."""
    return x_TD[order_A // inverse_TK.shape[1]]


@jax.custom_vjp
def combine(y_AD: jax.Array, order_A: jax.Array, inverse_TK: jax.Array) -> jax.Array:
    """Row t of the result is the sum of token t's assignments, which stand at rows `inverse_TK[t]`."""
    return jnp.sum(y_AD[inverse_TK], axis=1)


dispatch.defvjp(
    lambda x, order, inverse: (dispatch(x, order, inverse), (order, inverse)),
    lambda saved, dy: (combine(dy, *saved), None, None),
)
combine.defvjp(
    lambda y, order, inverse: (combine(y, order, inverse), (order, inverse)),
    lambda saved, dx: (dispatch(dx, *saved), None, None),
)


def route(logits_TE: jax.Array, top_k: int, real_T: jax.Array, bias_E: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and their scores, both [T, K].

    The score is the sigmoid of the raw logit, neither softmax nor renormalised. With a bias, experts are chosen by
    sigmoid + bias (arXiv 2408.15664), and the score stays free of it. Padding goes to no expert: its choice is E.
    """
    E = logits_TE.shape[1]
    selection = logits_TE if bias_E is None else jax.nn.sigmoid(logits_TE) + bias_E
    _, choice_TK = jax.lax.top_k(jax.lax.stop_gradient(selection), top_k)
    score_TK = jax.nn.sigmoid(jnp.take_along_axis(logits_TE, choice_TK, axis=1))
    return jnp.where(real_T[:, None], choice_TK, E), score_TK


def within_capacity(choice_TK: jax.Array, rows: int, experts: int, capacity: int, place: Place) -> jax.Array:
    """The choices, but E where the expert has `capacity` tokens of the row already, earlier ones coming first.

    By the row (a group of arXiv 2006.16668), so that what is dropped does not depend on what else is in the batch, nor on
    the mesh.
    """
    choice_BA = choice_TK.reshape(rows, -1)
    order_BA = jnp.argsort(choice_BA, axis=1, stable=True)
    sorted_BA = jnp.take_along_axis(choice_BA, order_BA, axis=1)
    first_BA = jax.vmap(lambda row: jnp.searchsorted(row, row, side="left"))(sorted_BA)
    rank_BA = jnp.arange(choice_BA.shape[1]) - first_BA
    if place.size("context") > 1:
        counts_BE = jax.vmap(lambda row: jnp.bincount(row, length=experts + 1))(choice_BA)
        rank_BA += jnp.take_along_axis(place.before(counts_BE), sorted_BA, axis=1)
    back_BA = jnp.argsort(order_BA, axis=1)
    kept_BA = jnp.take_along_axis(jnp.where(rank_BA < capacity, sorted_BA, experts), back_BA, axis=1)
    return kept_BA.reshape(choice_TK.shape)


class MoE(nnx.Module):
    """shared(x) + sum over the top-k experts e of expert_e(sigmoid(router(x)_e) x). Dropless without a capacity factor.

    The score multiplies the expert's input: since SwiGLU is not linear, that is not a weight on its output.
    """

    def __init__(self, config: ModelConfig, place: Place, rngs: nnx.Rngs):
        self.config, self.place = config, place
        D, E = config.hidden_size, config.num_experts
        self.router = matrix(rngs, (D, E), "width choices", D, config, exact=True)
        if config.router_bias_rate:
            self.router_bias = RouterBias(jnp.zeros(config.num_experts, jnp.float32))
        self.experts = Experts(config, rngs)
        self.shared = SwiGLU(config, config.expert_ffn_size, rngs)

    def __call__(
        self,
        x_TD: jax.Array,
        real_T: jax.Array,
        rows: int | None = None,
        capture: bool = False,
        repeat: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """Output and statistics. `rows`: of the batch that the tokens are of, for the experts' capacity; without, there is
        no limit. Where the experts' weights are those of all repeats of the super-block [R,E,...], `repeat` says of which
        they are used.
        """
        config = self.config
        wide = at_least_float32(x_TD)
        logits_TE = wide @ self.router[...].astype(wide.dtype)
        bias_E = self.router_bias[...] if config.router_bias_rate else None
        choice_TK, score_TK = route(logits_TE, config.experts_per_token, real_T, bias_E)
        kept_TK = choice_TK
        if config.capacity_factor and rows:
            balanced = choice_TK.size * self.place.size("context") // rows / config.num_experts
            capacity = math.ceil(config.capacity_factor * balanced)
            kept_TK = within_capacity(choice_TK, rows, config.num_experts, capacity, self.place)
        routed_TD = self.routed(x_TD, kept_TK, score_TK.astype(x_TD.dtype), repeat)
        stats = router_stats(logits_TE, choice_TK, real_T, kept_TK)
        if capture:
            stats = dataclasses.replace(stats, logits_TE=logits_TE)
        return self.shared(x_TD) + routed_TD, stats

    def routed(
        self, x_TD: jax.Array, choice_TK: jax.Array, score_TK: jax.Array, repeat: jax.Array | None = None
    ) -> jax.Array:
        """Sum of the chosen experts on the scaled tokens: sort by expert, grouped SwiGLU wherever the expert is, unsort."""
        T, K = choice_TK.shape
        order_A = jnp.argsort(choice_TK.reshape(-1), stable=True)
        inverse_TK = jnp.zeros(T * K, order_A.dtype).at[order_A].set(jnp.arange(T * K), unique_indices=True)
        inverse_TK = inverse_TK.reshape(T, K)
        experts, dtype = self.experts, x_TD.dtype
        sizes_E = jnp.bincount(choice_TK.reshape(-1), length=self.config.num_experts).astype(jnp.int32)
        gate, up, down = (narrowed(w[...], dtype) for w in (experts.gate, experts.up, experts.down))
        rows_AD = dispatch(x_TD, order_A, inverse_TK) * score_TK.reshape(-1)[order_A][:, None]
        kernel = grouped_ffn(self.config.expert_kernel)
        y_AD = expert_parallel(kernel, self.place, rows_AD, (gate, up, down), sizes_E, repeat)
        return combine(y_AD, order_A, inverse_TK)
