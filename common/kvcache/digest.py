"""The digest of published KV: one 64-bit number per block, region and shard unit.

It is an order-free sum of keyed products (NH, Black et al. 1999), so any thread or device may add terms in
any order. For every 64-bit word x of a token at absolute position p, in layer l, part a, at word index w:

    s = mix64(p * C1 + (l * num_parts + a) * C2 + 1)          one per token row
    k = mix64((w + 1) * C3) ^ s
    term = ((lo(x) + lo(k)) mod 2^32) * ((hi(x) + hi(k)) mod 2^32)
    digest = sum of terms mod 2^64

with mix64 the splitmix64 finaliser. Words are little-endian; token rows are a multiple of 8 bytes. Only
valid tokens count. Digests of disjoint runs of tokens add up, so unequal block sizes can be checked.
The native version is in csrc/; this file holds the constants and the reference.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
C1 = 0x9E3779B97F4A7C15
C2 = 0xC2B2AE3D27D4EB4F
C3 = 0x165667B19E3779F9


def mix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, elementwise."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def digest_reference(rows_LPTW: NDArray[np.uint64], first_position: int) -> int:
    """Digest of one unit. `rows_LPTW`: [layers, parts, valid tokens, words] of little-endian uint64."""
    num_layers, num_parts, num_tokens, num_words = rows_LPTW.shape
    u64 = np.uint64
    with np.errstate(over="ignore"):
        position = (np.arange(num_tokens, dtype=u64) + u64(first_position)) * u64(C1)
        row = np.arange(num_layers * num_parts, dtype=u64).reshape(num_layers, num_parts, 1) * u64(C2)
        seed = mix64(row + position + u64(1))
        key = mix64((np.arange(num_words, dtype=u64) + u64(1)) * u64(C3)) ^ seed[..., None]
        low = (rows_LPTW + key) & u64(0xFFFFFFFF)
        high = ((rows_LPTW >> u64(32)) + (key >> u64(32))) & u64(0xFFFFFFFF)
        return int((low * high).sum(dtype=u64)) & MASK
