"""What is said of a cache before there is one: made-up targets are what they claim, and take what real ones do."""

import numpy as np
import pytest

from data.target_estimate import MEAN_ENTROPY, TOKENS, bytes_per_token, made_up_targets
from data.target_records import RecordFormat, Targets, decode, encode


def rows(targets: Targets) -> list[tuple[list[int], list[int]]]:
    bounds = zip(targets.starts[:-1], targets.starts[1:], strict=True)
    return [(targets.ids[a:b].tolist(), targets.counts[a:b].tolist()) for a, b in bounds]


def test_every_token_has_its_draws_and_entropies_are_as_said() -> None:
    targets = made_up_targets(RecordFormat(202_048, 12))
    assert targets.tokens == TOKENS
    assert all(sum(counts) == 12 and len(set(ids)) == len(ids) for ids, counts in rows(targets))
    assert np.mean(targets.entropy) == pytest.approx(MEAN_ENTROPY, rel=0.1)
    certain, unsure = (targets.entropy < 0.1, targets.entropy > 4)
    numbers = np.diff(targets.starts)
    assert numbers[certain].mean() < 1.3 and numbers[unsure].mean() > 8


def test_the_number_of_distinct_draws_is_that_of_the_distribution() -> None:
    """Of K draws, sum over ids of 1 - (1 - p)^K are expected to be distinct."""
    form = RecordFormat(1000, 20)
    targets = made_up_targets(form, tokens=20_000)
    numbers = np.diff(targets.starts)
    log_rank = np.log(np.arange(1, 1001))
    for level in np.unique(targets.entropy)[::9]:
        here = targets.entropy == level

        def entropy(slope: float) -> float:
            p = np.exp(-slope * log_rank) / np.exp(-slope * log_rank).sum()
            return float(-(p * np.log(p)).sum())

        low, high = 0.0, 20.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if entropy(middle) > level else (low, middle)
        p = np.exp(-low * log_rank) / np.exp(-low * log_rank).sum()
        expected = (1 - (1 - p) ** 20).sum()
        assert numbers[here].mean() == pytest.approx(expected, abs=4 * numbers[here].std() / here.sum() ** 0.5 + 1e-3)


def test_weights_are_the_importance_of_draws_or_the_likeliest_probabilities() -> None:
    flat = made_up_targets(RecordFormat(300, 12, 0, True), proposal=0.5)
    plain = made_up_targets(RecordFormat(300, 12))
    assert len(flat.ids) > 1.2 * len(plain.ids)  # unlikely ids are drawn more often
    assert flat.weights is not None
    of_a_token = np.repeat(np.arange(TOKENS), np.diff(flat.starts))
    means = np.bincount(of_a_token, flat.weights * flat.counts) / 12
    assert means.mean() == pytest.approx(1, abs=0.02)  # of p / q over draws from q
    top = made_up_targets(RecordFormat(300, 0, 5, True))
    assert top.weights is not None and len(top.ids) == 5 * TOKENS
    sums = top.weights.reshape(-1, 5).sum(axis=1)
    assert sums.max() <= 1 + 1e-6 and sums[top.entropy < 0.1].min() > 0.97


@pytest.mark.parametrize(
    "form", [RecordFormat(202_048, 12), RecordFormat(300, 7, 0, True), RecordFormat(300, 0, 5, True)]
)
def test_bytes_are_those_of_a_record_that_can_be_read(form: RecordFormat) -> None:
    record = encode(bytes(16), made_up_targets(form, 0.9 if form.weighted else 1), form)
    assert bytes_per_token(form, 0.9 if form.weighted else 1) == len(record) / TOKENS
    assert decode(record, form).tokens == TOKENS


def test_the_estimate_grows_with_draws_and_with_the_bits_of_an_id() -> None:
    sizes = [
        bytes_per_token(RecordFormat(vocabulary, draws))
        for vocabulary, draws in ((4096, 12), (202_048, 12), (202_048, 50))
    ]
    assert sizes == sorted(sizes) and 15 < sizes[1] < 17 and 32 < sizes[2] < 36
