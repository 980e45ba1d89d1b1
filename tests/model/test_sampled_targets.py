"""Sparse targets and the losses on them against numpy's inverse transform and the computation that builds every logit."""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from model import sampled_targets
from model.sampled_targets import Recipe, Targets, draw_targets, sparse_losses
from model.vocab_loss import token_losses
from sharding.mesh import DeviceMesh
from tests.oracle_cases import FAST_COMPILE

T, D, V = 11, 6, 40
DRAWS = Recipe(draws=9, temperature=1.0, proposal=1.0, top_k=0)
FLATTER = Recipe(draws=9, temperature=2.0, proposal=0.5, top_k=0)
TOP = Recipe(draws=0, temperature=2.0, proposal=1.0, top_k=6)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def teacher(tokens: int = T, vocabulary: int = V, scale: float = 1.5) -> tuple[Any, ...]:
    """hidden, head, targets, keys."""
    rng = np.random.default_rng(tokens + vocabulary)
    hidden, head = rng.normal(size=(tokens, D)), scale * rng.normal(size=(D, vocabulary))
    return hidden, head, rng.integers(0, vocabulary, tokens), keys(tokens)


fast = functools.partial(jax.jit, compiler_options=FAST_COMPILE)
drawn = fast(draw_targets, static_argnames=("recipe", "block"))


def keys(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 2**32, (count, 2), dtype=np.uint32)


def on_tensor_axis(devices: int, function: Any, inputs: Any, outputs: Any) -> Any:
    """`function(place)` compiled for a tensor axis; "head" marks what is split by vocabulary."""
    mesh = DeviceMesh.of(jax.devices()[:devices], {"tensor": devices})
    specs = [jax.tree.map(lambda kind: P(None, "tensor") if kind == "head" else P(), t) for t in (inputs, outputs)]
    run = jax.shard_map(function(mesh.place), mesh=mesh.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
    return fast(run)


def softmax(logits: np.ndarray) -> np.ndarray:
    mass = np.exp(logits - logits.max(-1, keepdims=True))
    return mass / mass.sum(-1, keepdims=True)


@functools.cache
def words(count: int, draws: int) -> np.ndarray:
    """Of so many keys, [count, N, 2]."""
    typed = jax.random.wrap_key_data(keys(count), impl="threefry2x32")
    return np.asarray(fast(jax.vmap(lambda key: jax.random.bits(key, (draws, 2), jnp.uint32)))(typed))


def uniforms(count: int, draws: int) -> np.ndarray:
    whole = (words(count, draws) >> 9).astype(np.float64)
    return whole[..., 0] / 2**23 + (whole[..., 1] + 0.5) / 2**46


def obvious(hidden: Any, head: Any, targets: Any, recipe: Recipe) -> list[Any]:
    """`Targets` of one token after another."""
    rows, u_TN = [], uniforms(len(targets), recipe.draws)
    for logits, target, u_N in zip(hidden @ head, targets, u_TN, strict=True):
        p, cold = softmax(logits / recipe.temperature), softmax(logits)
        if recipe.top_k:
            counts = dict.fromkeys(np.argsort(-logits, kind="stable")[: recipe.top_k].tolist(), 1)
            weights = {i: p[i] for i in counts}
        else:
            q = softmax(recipe.proposal * logits / recipe.temperature)
            ids = np.searchsorted(np.cumsum(q), u_N, side="right")
            counts = Counter(ids.tolist())
            weights = {i: n / recipe.draws * p[i] / q[i] for i, n in counts.items()}
        ids = sorted(counts)
        free = (recipe.top_k or recipe.draws) - len(ids)
        facts = np.log(cold[target]), -np.sum(cold * np.log(cold)), np.argmax(logits) == target
        listed = ([of[i] for i in ids] + [0] * free for of in (weights, counts))
        rows.append((ids + [-1] * free, *listed, *facts))
    return [np.array(column) for column in zip(*rows, strict=True)]


def assert_same(got: Any, want: Any) -> None:
    for name, g, w in zip(Targets._fields, got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("recipe, block", [(DRAWS, 7), (FLATTER, 7), (TOP, 7), (FLATTER, 64)])
def test_targets_are_those_of_the_inverse_transform(recipe: Recipe, block: int) -> None:
    hidden, head, targets, keys_T = teacher(100)
    targets[:50] = np.argmax(hidden @ head, axis=1)[:50]
    got = drawn(hidden, head, targets, keys_T, recipe=recipe, block=block)
    assert (got.ids_TK.dtype, got.counts_TK.dtype, got.correct_T.dtype) == (jnp.int32, jnp.int32, bool)
    assert_same(got, obvious(hidden, head, targets, recipe))


@pytest.mark.parametrize("recipe", [FLATTER, TOP])
def test_a_token_is_drawn_alike_in_any_company(recipe: Recipe) -> None:
    hidden, head, targets, keys_T = teacher(100)
    rows = np.random.default_rng(0).permutation(100)[:25]
    together = drawn(hidden, head, targets, keys_T, recipe=recipe, block=7)
    apart = drawn(hidden[rows], head, targets[rows], keys_T[rows], recipe=recipe, block=7)
    assert_same(apart, [column[rows] for column in together])


@pytest.mark.parametrize("recipe, devices", [(FLATTER, 2), (FLATTER, 4), (TOP, 4)])
def test_a_tensor_axis_draws_the_same(recipe: Recipe, devices: int) -> None:
    arrays = teacher(100)
    draw = functools.partial(draw_targets, recipe=recipe, block=7)
    run = on_tensor_axis(devices, lambda place: functools.partial(draw, place=place), ("", "head", "", ""), "")
    assert_same(run(*arrays), drawn(*arrays, recipe=recipe, block=7))


def test_more_draws_begin_with_the_fewer() -> None:
    numbers = fast(sampled_targets._uniforms, static_argnums=(1, 2))
    few, more = numbers(keys(3), 4, float), numbers(keys(3), 16, float)
    for f, m in zip(few, more, strict=True):
        np.testing.assert_array_equal(f, m[:, :4])
    np.testing.assert_array_equal(more[0] + more[1], uniforms(3, 16))
    for single, double in zip(numbers(keys(3), 16, jnp.float32), more, strict=True):
        np.testing.assert_array_equal(single.astype(float), double)


def test_cumulative_sums_give_no_place_to_ids_of_no_mass() -> None:
    rng = np.random.default_rng(0)
    mass = jnp.asarray(rng.random((50, 4096)) ** 8 * (rng.random((50, 4096)) < 0.3), jnp.float32)

    def steps_without_mass(sums: Any) -> int:
        return int(jnp.sum((jnp.diff(sums, axis=1) != 0) & (mass[:, 1:] == 0)))

    sums = sampled_targets._cumulative(mass)
    assert steps_without_mass(sums) == 0 and bool(jnp.all(jnp.diff(sums, axis=1) >= 0))
    np.testing.assert_allclose(sums, np.cumsum(mass, axis=1, dtype=float), rtol=1e-5)
    assert steps_without_mass(jnp.cumsum(mass, axis=1)) > 100  # what rounding does otherwise
    between = sampled_targets._search(jnp.asarray([[0, 0, 0.5, 0.5, 1, 1]]), jnp.asarray([[0, 0.25, 0.5, 0.75]]))
    np.testing.assert_array_equal(between, [[2, 2, 4, 4]])


@pytest.mark.parametrize("devices, dtype", [(4, jnp.float32), (1, float)])
def test_the_ends_of_the_unit_interval_are_ids_with_a_probability(devices: int, dtype: Any) -> None:
    """Uniform numbers as small and as large as they come, with ids of no probability before and after and between."""
    vocabulary, rng = 4000, np.random.default_rng(0)
    logits = np.full((8, vocabulary), -1e4)
    for row, count in enumerate((1, 2, 3, 10, 100, 500, 1000, 1500)):
        likely = rng.choice(np.arange(200, 3700), count, replace=False)
        logits[row, likely] = 3 * rng.normal(size=count)
    head = jnp.asarray(logits, dtype)
    hidden = jnp.eye(8, dtype=dtype)
    ends = np.array([0, 1, 2**23 - 2, 2**23 - 1])
    edges: Any = tuple(jnp.asarray(np.broadcast_to(x, (8, 4)), dtype) for x in (ends / 2**23, (ends + 0.5) / 2**46))

    def ids(place: Any) -> Any:
        def run(hidden: Any, head: Any) -> Any:
            _, sums = sampled_targets._through(
                lambda carry, part: (carry, sampled_targets._sums(part.logits_Tb, (1.0,))),
                None,
                hidden,
                head,
                300,
                place,
            )
            return sampled_targets._drawn(hidden, head, edges, 1.0, sums, 300, place)[0]

        return run

    got = np.asarray(on_tensor_axis(devices, ids, ("", "head"), "")(hidden, head))
    likely = [np.flatnonzero(row > -1e3) for row in logits]
    np.testing.assert_array_equal(got[:, 0], [row[0] for row in likely])
    np.testing.assert_array_equal(got[:, 3], [row[-1] for row in likely])
    assert all(np.isin(g, row).all() for g, row in zip(got, likely, strict=True))


@pytest.mark.parametrize("recipe, dtype", [(FLATTER, jnp.float32), (Recipe(1, 1.0, 1.0, 0), float)])
def test_extreme_teachers(recipe: Recipe, dtype: Any) -> None:
    hidden = jnp.asarray([[1.0], [1e4], [0.0], [-1e4]], dtype)
    head = jnp.asarray([[3.0, 3.0, 2.0, 1.0, -1.0]], dtype)  # of the second the first two alone, of the third all alike
    got = drawn(hidden, head, jnp.asarray([0, 1, 2, 4]), keys(4), recipe, block=512)
    assert all(bool(jnp.all(jnp.isfinite(column))) for column in got)
    np.testing.assert_array_equal(got.counts_TK.sum(axis=1), recipe.draws)
    assert set(np.asarray(got.ids_TK[1]).tolist()) <= {-1, 0, 1}
    np.testing.assert_array_equal(got.ids_TK[3], [4] + [-1] * (recipe.draws - 1))
    np.testing.assert_allclose(got.weights_TK[1:].sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(got.entropy_T[1:], np.log([2, 5, 1]), rtol=1e-6)
    np.testing.assert_allclose(got.target_log_prob_T[1:], -np.log([2, 5, 1]), rtol=1e-6)
    assert bool(jnp.all(got.correct_T))
    losses = fast(functools.partial(sparse_losses, temperature=1.0, tail=True, block=2))
    for loss in losses(hidden, head, jnp.asarray([0, 1, 2, 4]), got.ids_TK, got.weights_TK):
        np.testing.assert_allclose(loss[1:], np.log([2, 5, 1]), rtol=1e-6)


def test_more_likely_ids_than_there_are() -> None:
    hidden, head, targets, keys_T = teacher(5, 8)
    top = Recipe(draws=0, temperature=1.0, proposal=1.0, top_k=10)
    got = drawn(hidden, head, targets, keys_T, top, block=3)
    assert_same(got, obvious(hidden, head, targets, top))
    np.testing.assert_allclose(got.weights_TK.sum(axis=1), 1)
    run = on_tensor_axis(
        4, lambda place: functools.partial(draw_targets, recipe=top, block=3, place=place), ("", "head", "", ""), ""
    )
    assert_same(run(hidden, head, targets, keys_T), got)


def test_of_ids_alike_the_first_are_the_most_likely() -> None:
    got = drawn(np.ones((1, 1)), np.zeros((1, 9)), np.zeros(1, int), keys(1), TOP, block=4)
    np.testing.assert_array_equal(got.ids_TK, [range(6)])


def test_no_gradient_goes_to_the_teacher() -> None:
    hidden, head, targets, keys_T = teacher()

    def total(hidden: Any, head: Any) -> Any:
        got = draw_targets(hidden, head, targets, keys_T, FLATTER, block=16)
        return jnp.sum(got.weights_TK) + jnp.sum(got.target_log_prob_T + got.entropy_T)

    for gradient in fast(jax.grad(total, argnums=(0, 1)))(hidden, head):
        np.testing.assert_array_equal(gradient, 0)


def full_losses(hidden: Any, head: Any, targets: Any, ids: Any, weights: Any, temperature: float, tail: bool) -> Any:
    logits = hidden @ head
    cross_entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
    log_q = jax.nn.log_softmax(logits / temperature)
    whole: Any = np.zeros(logits.shape)
    for row, ids_K, weights_K in zip(whole, ids, weights, strict=True):
        row[ids_K[ids_K >= 0]] = weights_K[ids_K >= 0]
    soft = -jnp.sum(whole * log_q, axis=1)
    if tail:
        soft -= (1 - whole.sum(axis=1)) * jax.nn.logsumexp(jnp.where(whole > 0, -jnp.inf, log_q), axis=1)
    return cross_entropy, temperature**2 * soft


def assert_equal(got: Any, want: Any) -> None:
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)


def sparse(tokens: int = T, vocabulary: int = V, slots: int = 5) -> tuple[Any, Any]:
    """ids and weights, also where no id is; the first token has none, the second fills its slots."""
    rng = np.random.default_rng(slots)
    ids, weights = np.full((tokens, slots), -1), rng.random((tokens, slots)) / slots
    for row, used in enumerate([0, slots, *rng.integers(1, slots + 1, tokens - 2)]):
        ids[row, :used] = np.sort(rng.choice(vocabulary, used, replace=False))
    return ids, weights


def with_gradients(losses: Any) -> Any:
    """((weighted sum, both losses), gradients), of hidden and head."""
    rng = np.random.default_rng(0)
    scales = rng.normal(size=(2, T))

    def total(hidden: Any, head: Any) -> Any:
        both = losses(hidden, head)
        return sum(jnp.sum(scale * loss) for scale, loss in zip(scales, both, strict=True)), both

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)


def values_and_gradients(losses: Any, hidden: Any, head: Any) -> Any:
    return fast(with_gradients(losses))(hidden, head)


@functools.cache
def full_computation(temperature: float, tail: bool) -> Any:
    hidden, head, targets, _ = teacher()
    ids, weights = sparse()
    return values_and_gradients(lambda h, w: full_losses(h, w, targets, ids, weights, temperature, tail), hidden, head)


@pytest.mark.parametrize("temperature, tail, block", [(2.5, False, 7), (2.5, True, 7), (1.0, True, 64)])
def test_losses_and_gradients_equal_the_full_computation(temperature: float, tail: bool, block: int) -> None:
    hidden, head, targets, _ = teacher()
    ids, weights = sparse()

    def in_blocks(hidden: Any, head: Any) -> Any:
        return sparse_losses(hidden, head, targets, ids, weights, temperature=temperature, tail=tail, block=block)

    got = values_and_gradients(in_blocks, hidden, head)
    assert_equal(got, full_computation(temperature, tail))
    np.testing.assert_allclose(got[0][1][0], fast(token_losses, static_argnums=3)(hidden, head, targets, 4), rtol=1e-12)


@pytest.mark.parametrize("devices, temperature, tail", [(2, 2.5, False), (4, 2.5, True)])
def test_losses_and_gradients_on_a_tensor_axis(devices: int, temperature: float, tail: bool) -> None:
    hidden, head, targets, _ = teacher()
    ids, weights = sparse()

    def on_one(place: Any) -> Any:
        def part(hidden: Any, head: Any) -> Any:
            both = sparse_losses(
                hidden, head, targets, ids, weights, temperature=temperature, tail=tail, block=7, place=place
            )
            return tuple(loss / place.copies for loss in both)

        def run(hidden: Any, head: Any) -> Any:
            values, (d_hidden, d_head) = with_gradients(part)(hidden, head)
            values, d_hidden = place.joined((values, d_hidden))
            return values, (d_hidden, d_head)

        return run

    run = on_tensor_axis(devices, on_one, ("", "head"), (("", ("", "")), ("", "head")))
    assert_equal(run(hidden, head), full_computation(temperature, tail))


def test_a_tail_of_next_to_nothing_keeps_its_digits() -> None:
    """1 - sum of q rounds to 0 here, in float32 and float64, or is the difference of numbers all but equal."""
    logits = np.array([[60.0, 0.0, 1.0, -3.0], [14.0, 0.0, 1.0, -3.0], [150.0, 0.0, 1.0, -3.0]])
    want = 0.25 * (logits[:, 0] - np.log(np.exp(logits[:, 1:]).sum(axis=1)))  # of -log q the rest is below rounding

    def total(hidden: Any, head: Any) -> Any:
        ids, weights, targets = jnp.zeros((3, 1), int), jnp.full((3, 1), 0.75), jnp.zeros(3, int)
        soft = sparse_losses(hidden, head, targets, ids, weights, temperature=1.0, tail=True, block=3)[1]
        return jnp.sum(soft), soft

    tail = softmax(logits[:, 1:])
    for dtype in (jnp.float32, float):
        arrays = jnp.eye(3, dtype=dtype), jnp.asarray(logits, dtype)
        gradient, soft = fast(jax.grad(total, argnums=1, has_aux=True))(*arrays)
        np.testing.assert_allclose(soft, want, rtol=1e-5)
        np.testing.assert_allclose(gradient[:, 1:], -0.25 * tail, rtol=1e-4)


def test_ids_that_are_all_there_are_leave_no_tail() -> None:
    hidden, head, targets, _ = teacher(T, 5)
    ids, p = np.broadcast_to(np.arange(5), (T, 5)), softmax(hidden @ head)
    losses: Any = functools.partial(sparse_losses, temperature=1.0, block=2)
    with_tail, without = (
        values_and_gradients(lambda h, w, t=t: losses(h, w, targets, ids, 0.9 * p, tail=t), hidden, head)
        for t in (True, False)
    )
    assert_equal(with_tail, without)


def test_half_precision_is_added_up_in_float32() -> None:
    hidden, head, targets, keys_T = teacher()
    half = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    exact = tuple(np.asarray(array, float) for array in half)
    got = drawn(half[0], half[1], targets, keys_T, recipe=FLATTER, block=16)
    want = obvious(exact[0], exact[1], targets, FLATTER)
    assert {number.dtype for number in (got.weights_TK, got.target_log_prob_T, got.entropy_T)} == {jnp.dtype("float32")}
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5)
    ids, weights = sparse()

    def losses(hidden: Any, head: Any) -> Any:
        return sparse_losses(hidden, head, targets, ids, weights, temperature=2.5, tail=True, block=16)

    (_, both), gradients = values_and_gradients(losses, *half)
    assert {loss.dtype for loss in both} == {jnp.dtype("float32")}
    assert {gradient.dtype for gradient in gradients} == {jnp.dtype("bfloat16")}
    (_, want), d_want = values_and_gradients(lambda h, w: full_losses(h, w, targets, ids, weights, 2.5, True), *exact)
    for g, w in zip(both, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
    for g, w in zip(gradients, d_want, strict=True):
        np.testing.assert_allclose(g.astype(float), w, rtol=0.03, atol=0.03)


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    tokens, vocabulary, slots = 1024, 16384, 32
    shapes = (((tokens, D), jnp.float32), ((D, vocabulary), jnp.float32), ((tokens,), jnp.int32))
    hidden, head, targets = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
    ids, weights = (jax.ShapeDtypeStruct((tokens, slots), dtype) for dtype in (jnp.int32, jnp.float32))
    keys_T = jax.ShapeDtypeStruct((tokens, 2), jnp.uint32)

    def temporaries(function: Any, *arrays: Any) -> int:
        return fast(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes  # pyright: ignore

    def total(hidden: Any, head: Any, targets: Any, ids: Any, weights: Any) -> Any:
        both = sparse_losses(hidden, head, targets, ids, weights, temperature=2.0, tail=True, block=256)
        return jnp.sum(both[0] + both[1])

    full = tokens * vocabulary * 4
    assert temporaries(jax.grad(total, argnums=(0, 1)), hidden, head, targets, ids, weights) < full / 8
    for recipe in (FLATTER, TOP):
        draw = functools.partial(draw_targets, recipe=recipe, block=256)
        assert temporaries(draw, hidden, head, targets, keys_T) < full / 8


TOKENS, INPUT, WORDS, SAMPLES = 6, 5, 48, 3000
"""Of the little model, and how often its targets are drawn."""
WARM = 1.5
"""Temperature that it learns at."""


class Little:
    """A student of two layers some way from its teacher, and gradients of all its weights and of its hidden states."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        shapes = {"first": (INPUT, D), "second": (D, D), "head": (D, WORDS)}
        theirs = {name: rng.normal(size=shape) * (1.6 if name == "head" else 1) for name, shape in shapes.items()}
        self.weights = {name: value + 0.4 * rng.normal(size=value.shape) for name, value in theirs.items()}
        self.weights["hidden"] = np.zeros((TOKENS, D))  # added to the hidden states
        self.input: Any = rng.normal(size=(TOKENS, INPUT))
        self.targets: Any = rng.integers(0, WORDS, TOKENS)
        self.teacher = self.hidden(theirs), theirs["head"]
        self.p_TV = p_TV = softmax(self.teacher[0] @ self.teacher[1] / WARM)

        def divergence(weights: Any) -> Any:
            log_q_TV = jax.nn.log_softmax(self.hidden(weights) @ weights["head"] / WARM)
            return WARM**2 * jnp.sum(p_TV * (np.log(p_TV) - log_q_TV))

        self.full = fast(jax.grad(divergence))(self.weights)

    def hidden(self, weights: Any) -> Any:
        return jnp.tanh(jnp.tanh(self.input @ weights["first"]) @ weights["second"]) + weights.get("hidden", 0)

    def draw(self, recipe: Recipe, samples: int = SAMPLES) -> Targets:
        """Targets [samples, TOKENS, K] with keys of their own."""
        hidden, targets = (np.concatenate([array] * samples) for array in (self.teacher[0], self.targets))
        got = drawn(hidden, self.teacher[1], targets, keys(samples * TOKENS), recipe=recipe, block=20)
        return jax.tree.map(lambda column: column.reshape(samples, TOKENS, *column.shape[1:]), got)

    def gradients(self, ids: Any, weights: Any, tail: bool = False) -> Any:
        """Of each sample."""
        free = ((0, 0), (0, 0), (0, 64 - ids.shape[2]))  # so that all recipes share what is compiled
        return self.compiled(tail)(self.weights, np.pad(ids, free, constant_values=-1), np.pad(weights, free))

    @functools.cache  # noqa: B019
    def compiled(self, tail: bool) -> Any:
        def soft(student: Any, ids: Any, weights: Any) -> Any:
            options: Any = {"temperature": WARM, "tail": tail, "block": 20}
            return jnp.sum(
                sparse_losses(self.hidden(student), student["head"], self.targets, ids, weights, **options)[1]
            )

        return fast(jax.vmap(jax.grad(soft), in_axes=(None, 0, 0)))

    def spread(self, gradients: Any) -> dict[str, float]:
        """Standard error of the mean gradient, of each weight."""
        return {name: float(np.sqrt(g.var(axis=0).sum() / len(g))) for name, g in gradients.items()}

    def distances(self, gradients: Any, errors: dict[str, float]) -> list[Any]:
        """From the full gradient to the mean gradient of each weight, in standard errors."""
        return [np.linalg.norm(g.mean(axis=0) - self.full[name]) / errors[name] for name, g in gradients.items()]


@pytest.fixture(scope="module")
def little() -> Little:
    with jax.enable_x64(True):
        return Little()


@pytest.mark.parametrize("proposal", [1.0, 0.25])
def test_the_mean_gradient_is_that_of_the_whole_distribution(little: Little, proposal: float) -> None:
    error = {}
    for draws in (4, 16, 64):
        got = little.draw(Recipe(draws, WARM, proposal, 0))
        gradients = little.gradients(got.ids_TK, got.weights_TK)
        assert max(little.distances(gradients, little.spread(gradients))) < 4
        squares = (np.sum((g - little.full[name]) ** 2) for name, g in gradients.items())
        error[draws] = np.sqrt(sum(squares) / SAMPLES)
        if draws == 4 and proposal < 1:
            shares = got.weights_TK / got.weights_TK.sum(axis=2, keepdims=True)
            biased = little.gradients(got.ids_TK, shares)
            assert min(little.distances(biased, little.spread(biased))) > 8  # weights made to add up to 1
    np.testing.assert_allclose([error[4] / error[16], error[16] / error[64]], 2, rtol=0.04)


def test_the_most_likely_ids_are_a_biased_target(little: Little) -> None:
    """By the measure that twice as many draws pass; their own gradient has no spread."""
    got = little.draw(Recipe(16, WARM, 1.0, 0))
    gradients = little.gradients(got.ids_TK, got.weights_TK)
    errors = little.spread(gradients)
    assert max(little.distances(gradients, errors)) < 4
    top = little.draw(Recipe(0, WARM, 1.0, 8), samples=1)
    for weights, tail in (
        (top.weights_TK, False),
        (top.weights_TK / top.weights_TK.sum(axis=2, keepdims=True), False),
        (top.weights_TK, True),
    ):
        assert min(little.distances(little.gradients(top.ids_TK, weights, tail), errors)) > 8
    ids = np.broadcast_to(np.arange(WORDS), little.p_TV.shape)
    for name, gradient in little.gradients(ids[None], little.p_TV[None]).items():
        np.testing.assert_allclose(gradient[0], little.full[name], rtol=1e-10, atol=1e-12)
