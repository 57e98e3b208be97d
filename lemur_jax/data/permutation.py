"""A seeded permutation of [0, n) that is evaluated in O(1), at any place, for any n.

A Feistel network permutes a power of four not below n; values of n or more are sent through it again until
they fall below ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). A test pins it,
because a resumed run must see the order that the first run saw.
"""

import hashlib

import numpy as np

_ROUNDS = 6


def key_of(*parts: object) -> int:
    """A 64-bit key from anything with a stable `repr`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def permute(values: np.ndarray, size: int, key: int, tweaks: np.ndarray) -> np.ndarray:
    """Where the permutation of [0, size) that belongs to (key, tweak) sends each value: int64 [n].

    `values` are int64 [n] in [0, size), `size` is at most 2^60, `key` has 64 bits, and each of `tweaks`, int64 [n],
    chooses another permutation (here: the epoch).
    """
    # Narrower halves make only a few of the possible permutations.
    half = max(2, ((size - 1).bit_length() + 1) // 2)
    keys = _mix(_mix(tweaks.astype(np.uint64)) ^ np.uint64(key))
    result = values.astype(np.uint64)
    pending = np.arange(len(result))
    while len(pending):
        result[pending] = _feistel(result[pending], half, keys[pending])
        pending = pending[result[pending] >= size]
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, 4^half) for each key."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for i in range(_ROUNDS):
        keys = _mix(keys + np.uint64(i + 1))
        left, right = right, left ^ (_mix(right ^ keys) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014): uint64 to uint64, each bit of the input moves half of the output's."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
