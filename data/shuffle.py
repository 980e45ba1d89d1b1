"""A random order of any number of things, place by place: nothing is stored, and no place needs the ones before it."""

import hashlib

import numpy as np

_ROUNDS = 6


def shuffled(places: np.ndarray, count: int, key: tuple[int | str, ...]) -> np.ndarray:
    """Which of `count` things stand at these places of the order that `key` names.

    A Feistel network over the next even number of bits, walked along its cycles until it is back among the count
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002): a bijection of 0 ... count - 1.

    Args:
        places: whole numbers from 0 to count - 1, any shape.
        count: 1 or more, below 2^62.
        key: decides the order.

    Returns:
        int64, the same shape.
    """
    half = max((int(count - 1).bit_length() + 1) // 2, 1)
    mask = np.uint64((1 << half) - 1)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")
    values = np.asarray(places).astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        values[outside] = _network(values[outside], keys, half, mask)
        outside = values >= count
    return values.astype(np.int64)


def _network(values: np.ndarray, keys: np.ndarray, half: int, mask: np.uint64) -> np.ndarray:
    shift = np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return left << shift | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014); products wrap around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
