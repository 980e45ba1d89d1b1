"""What a cache of targets takes, before there is one: the record of a teacher that is made up.

Letters: V vocabulary, n tokens, K draws or ids of a token, L levels of entropy.
"""

import numpy as np

from data.target_records import DIGEST_BYTES, RecordFormat, Targets, encode

MEAN_ENTROPY = 2.0
"""Of the made-up distributions, in nats."""
TOKENS = 4096
"""Of the made-up segment."""
_SLOPES = np.geomspace(8.0, 0.5, 40).tolist()
"""Of Zipf distributions, by level: the probability of rank r is proportional to r^-slope."""


def made_up_targets(form: RecordFormat, proposal: float = 1.0, tokens: int = TOKENS, seed: int = 0) -> Targets:
    """Targets of a segment as a teacher might give them: of Zipf distributions whose entropies are exponentially distributed
    with mean `MEAN_ENTROPY`, over ids in random order.

    Args:
        form: of the records; with `top_k`, the likeliest ids.
        proposal: draws come from the distribution to this power.
        tokens: n.
        seed: of ids, entropies and draws.
    """
    rng = np.random.default_rng(seed)
    log_rank_V, ids_V = np.log(np.arange(1, form.vocab_size + 1)), rng.permutation(form.vocab_size)
    K = form.draws or form.top_k
    entropy_L = np.array([_zipf(slope, log_rank_V)[1] for slope in _SLOPES])
    level_n = np.abs(entropy_L - rng.exponential(MEAN_ENTROPY, tokens)[:, None]).argmin(axis=1)
    ranks_nK, weights_nK = np.tile(np.arange(K), (tokens, 1)), np.ones((tokens, K))
    for level in np.unique(level_n):
        here, (p_V, _) = level_n == level, _zipf(_SLOPES[level], log_rank_V)
        q_V, _ = _zipf(_SLOPES[level] * proposal, log_rank_V)
        if form.draws:
            drawn = np.searchsorted(np.cumsum(q_V), rng.random((here.sum(), K)))
            ranks_nK[here] = np.sort(np.minimum(drawn, form.vocab_size - 1), axis=1)
        weights_nK[here] = (p_V / q_V if form.draws else p_V)[ranks_nK[here]]
    # Of draws of the same id, which are neighbours now, the first has the count of all.
    starts = np.flatnonzero(np.diff(ranks_nK, axis=1, prepend=-1))
    counts_nK = np.zeros((tokens, K), np.int64)
    counts_nK.reshape(-1)[starts] = np.diff(starts, append=counts_nK.size)
    return Targets.of(
        ids_V[ranks_nK],
        counts_nK,
        weights_nK if form.weighted else None,
        -rng.exponential(MEAN_ENTROPY, tokens),
        entropy_L[level_n],
        rng.random(tokens) < 0.5,
    )


def _zipf(slope: float, log_rank_V: np.ndarray) -> tuple[np.ndarray, float]:
    """Probabilities by rank, and their entropy in nats."""
    p_V = np.exp(-slope * log_rank_V)
    total = p_V.sum()
    p_V /= total
    return p_V, float(slope * (p_V @ log_rank_V) + np.log(total))


def bytes_per_token(form: RecordFormat, proposal: float = 1.0) -> float:
    """Of the record of such a segment."""
    return len(encode(bytes(DIGEST_BYTES), made_up_targets(form, proposal), form)) / TOKENS
