from __future__ import annotations

import os
import statistics

import pytest

from services.router.randomness import PooledRandom


def test_bits_and_fractions_are_spread_evenly() -> None:
    rng = PooledRandom()
    for bits in (0, 1, 7, 8, 64, 127, 50_000):
        assert all(0 <= rng.getrandbits(bits) < 1 << bits or bits == 0 for _ in range(20))
    ones = statistics.mean(rng.getrandbits(127).bit_count() for _ in range(4000))
    assert 62.5 < ones < 64.5
    fractions = [rng.random() for _ in range(4000)]
    assert all(0 <= value < 1 for value in fractions)
    assert 0.45 < statistics.mean(fractions) < 0.55
    assert {rng.randrange(5) for _ in range(400)} == set(range(5))
    with pytest.raises(ValueError, match="negative"):
        rng.getrandbits(-1)


def test_no_byte_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that count up: every number has to be made of the bytes behind those of the one before."""
    pages = [bytes(range(256)) * 16, bytes(reversed(range(256))) * 16]
    monkeypatch.setattr(os, "urandom", lambda count: pages.pop(0)[:count])
    rng = PooledRandom()
    drawn = b"".join(rng.getrandbits(24).to_bytes(3) for _ in range(1365))  # 4095 bytes
    assert drawn == (bytes(range(256)) * 16)[:4095]
    assert rng.getrandbits(16) == 0xFFFE  # two do not fit: the next page
