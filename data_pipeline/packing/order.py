"""Keyed pseudo-random permutations, computed element by element.

Nothing depends on a library's random stream, so orders are the same in all versions of all libraries.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 8
# With fewer bits a Feistel network has too few different round functions. Small ranges walk through a larger one.
_MIN_BITS = 6


def mix64(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: uint64 in, well-mixed uint64 out, any shape."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """One 64-bit key from several integers; their order matters."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix64(key ^ np.array([part & _MASK], dtype=np.uint64))
    return int(key[0])


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Apply a keyed permutation of `range(size)` to indices.

    A Feistel network over the smallest power of two that is at least `size`. A result outside `range(size)` goes
    through the network again until it is inside, which keeps the map one-to-one ("cycle walking"; below two passes on
    average).

    Args:
        indices: integers in `range(size)`, any shape.
        size: length of the permuted range, at least 1.
        key: any integer; different keys give unrelated permutations.

    Returns:
        int64 array of the same shape.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    indices = np.asarray(indices)
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise ValueError(f"indices must be in range({size})")
    bits = max((size - 1).bit_length(), _MIN_BITS)
    round_keys = mix64(np.uint64(derive_key(key)) ^ np.arange(_ROUNDS, dtype=np.uint64))
    flat = _feistel(indices.astype(np.uint64).ravel(), bits, round_keys)
    outside = np.flatnonzero(flat >= size)
    while outside.size:
        flat[outside] = _feistel(flat[outside], bits, round_keys)
        outside = outside[flat[outside] >= size]
    return flat.astype(np.int64).reshape(indices.shape)


def _feistel(values: np.ndarray, bits: int, round_keys: np.ndarray) -> np.ndarray:
    """One pass over `range(2**bits)`. Halves that differ by a bit swap widths in each of the (evenly many) rounds."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for round_key in round_keys:
        left, right = right, left ^ (mix64(right ^ round_key) & np.uint64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right
