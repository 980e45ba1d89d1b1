"""The vocabulary loss in blocks against the one that builds every logit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.vocab_loss import token_losses

D, V = 8, 37


def naive(hidden, head, targets):
    logits = hidden @ head
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]


@pytest.mark.parametrize("tokens, block", [(24, 8), (25, 8), (5, 8), (1, 1)])
def test_values_and_gradients_equal_the_full_computation(tokens: int, block: int) -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(tokens)
        hidden, head = jnp.asarray(rng.normal(size=(tokens, D))), jnp.asarray(rng.normal(size=(D, V)))
        targets, weights = jnp.asarray(rng.integers(0, V, tokens)), jnp.asarray(rng.random(tokens))

        def run(losses):
            return jax.value_and_grad(lambda h, w: jnp.sum(weights * losses(h, w)), argnums=(0, 1))(hidden, head)

        got = run(lambda h, w: token_losses(h, w, targets, block))
        want = run(lambda h, w: naive(h, w, targets))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-13)


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    tokens, vocabulary, block = 8192, 8192, 64

    def temporaries(losses) -> int:
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((tokens, D), (D, vocabulary))]
        targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        step = jax.grad(lambda h, w, t: jnp.sum(losses(h, w, t)), argnums=(0, 1))
        return jax.jit(step).lower(*arrays, targets).compile().memory_analysis().temp_size_in_bytes  # pyright: ignore

    full = tokens * vocabulary * 4
    assert temporaries(lambda h, w, t: token_losses(h, w, t, block)) < full / 20
    assert temporaries(naive) > full / 2  # what the measure says of logits that do exist
