"""Draws of tokens against an obvious NumPy version of nucleus sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.sampling import Sampling, choose, nucleus


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def filtered(logits: np.ndarray, top_p: float) -> np.ndarray:
    """Probabilities after nucleus filtering, one token after the other until they are enough."""
    probabilities, total, kept = softmax(logits), 0.0, np.zeros(len(logits))
    for token in sorted(range(len(logits)), key=lambda token: (-logits[token], token)):
        kept[token] = probabilities[token]
        total += probabilities[token]
        if total >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_has_the_probabilities_of_the_obvious_version(top_p: float) -> None:
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.normal(size=(20, 50)) * rng.uniform(0.1, 8, (20, 1)), rng.integers(0, 3, (9, 50))])
    with jax.enable_x64(True):
        found = jax.nn.softmax(nucleus(jnp.asarray(logits), jnp.float64(top_p)))
    np.testing.assert_allclose(found, [filtered(row, top_p) for row in logits], rtol=1e-12, atol=0)


def test_a_nucleus_that_is_reached_exactly_takes_no_token_more() -> None:
    logits = jnp.log(jnp.array([[0.125, 0.25, 0.5, 0.125], [0.25, 0.25, 0.25, 0.25]]))
    kept = np.isfinite(nucleus(logits, jnp.float32(0.75)))
    assert kept.tolist() == [[False, True, True, False], [True, True, True, False]]
    assert np.isfinite(nucleus(logits, jnp.float32(1e-9))).tolist() == [
        [False, False, True, False],
        [True] + 3 * [False],
    ]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (0.5, None), (2.0, 0.7)])
def test_tokens_are_drawn_as_often_as_their_probability(temperature: float, top_p: float | None) -> None:
    draws, logits = 20_000, np.random.default_rng(1).normal(size=12).astype(np.float32)
    sampling = Sampling(
        jax.random.key(0), jnp.float32(temperature), None if top_p is None else jnp.float32(top_p)
    )  # fmt: skip
    tokens = choose(jnp.tile(logits, (draws, 1)), jnp.arange(draws) // 7, sampling)
    expected = filtered(logits / temperature, 1.0 if top_p is None else top_p)
    frequency = np.bincount(tokens, minlength=12) / draws
    assert np.all(frequency[expected == 0] == 0)
    np.testing.assert_allclose(frequency, expected, atol=4 * 0.5 / draws**0.5)


def test_draws_of_rows_and_of_positions_are_independent() -> None:
    """Each pair of draws is as likely as chance would have it, along a row and down a column."""
    logits = jnp.zeros((200, 4))
    sampling = Sampling(jax.random.key(0), jnp.float32(1.0), None)
    tokens = np.stack([choose(logits, jnp.full(200, position), sampling) for position in range(100)])
    for one, other in ((tokens[1:], tokens[:-1]), (tokens[:, 1:], tokens[:, :-1]), (tokens[1:, 1:], tokens[:-1, :-1])):
        pairs = np.bincount((4 * one + other).reshape(-1), minlength=16) / one.size
        np.testing.assert_allclose(pairs, 1 / 16, atol=0.01)


def test_without_sampling_the_first_of_the_likeliest_is_taken() -> None:
    assert choose(jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 5.0]]), jnp.zeros(2, int), None).tolist() == [1, 0]


def test_the_lowest_temperature_takes_the_likeliest() -> None:
    sampling = Sampling(jax.random.key(0), jnp.float32(jnp.finfo(jnp.float32).tiny), jnp.float32(0.5))
    assert choose(jnp.array([[100.0, 200.0, 150.0]]), jnp.zeros(1, int), sampling).tolist() == [1]
