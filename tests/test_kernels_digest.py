"""The native digest against its definition in numpy, on fresh random bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from common.kernels import native
from common.kernels.native import BlockDigester, DigestGeometry
from common.kvcache.digest import digest_reference

LEVELS = {0: "portable", 1: "avx2", 2: "avx512"}


@pytest.fixture(params=LEVELS, ids=list(LEVELS.values()))
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    if not native.library().nd_digest_use(request.param):
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    yield request.param
    assert any(native.library().nd_digest_use(best) for best in (2, 1, 0))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def random_block(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def geometry_of(block_LPUTB: NDArray[np.uint8]) -> DigestGeometry:
    """Of one unit in [layers, parts, units, tokens, bytes]."""
    layers, parts, _, _, nbytes = block_LPUTB.shape
    layer, part, _, token, _ = block_LPUTB.strides
    return DigestGeometry(layers, parts, layer, part, token, nbytes)


def reference(rows_LPTB: NDArray[np.uint8], first_position: int) -> int:
    pad = -rows_LPTB.shape[-1] % 8
    padded = np.pad(rows_LPTB, [(0, 0)] * 3 + [(0, pad)])
    return digest_reference(np.ascontiguousarray(padded).view(np.uint64), first_position)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 3, 8, 20, 64, 72, 128, 576])
def test_every_width_and_item_size_matches(level: int, rng: np.random.Generator, width: int, itemsize: int) -> None:
    block = random_block(rng, (3, 2, 2, 16, width * itemsize))
    for unit in range(2):
        for tokens in (1, 7, 16):
            got = native.digest(geometry_of(block), [(block[:, :, unit].ctypes.data, 4099, tokens)])
            assert got == reference(block[:, :, unit, :tokens], 4099)


@pytest.mark.parametrize("nbytes", [2048 * 8 - 8, 2048 * 8, 2048 * 8 + 12, 3 * 2048 * 8 + 40])
def test_rows_longer_than_the_key_table(level: int, rng: np.random.Generator, nbytes: int) -> None:
    block = random_block(rng, (2, 1, 1, 3, nbytes))
    assert native.digest(geometry_of(block), [(block.ctypes.data, 11, 3)]) == reference(block[:, :, 0], 11)


def test_unaligned_rows_with_gaps(level: int, rng: np.random.Generator) -> None:
    memory = random_block(rng, (9 + 2 * 2 * 5 * 80,))
    rows = np.lib.stride_tricks.as_strided(memory[9:], (2, 2, 5, 72), (2 * 5 * 80, 5 * 80, 80, 1))
    geometry = DigestGeometry(2, 2, 2 * 5 * 80, 5 * 80, 80, 72)
    assert native.digest(geometry, [(memory.ctypes.data + 9, 2**40 + 5, 5)]) == reference(rows, 2**40 + 5)


def test_extreme_words_do_not_saturate(level: int) -> None:
    block = np.full((4, 2, 1, 16, 128), 255, np.uint8)
    assert native.digest(geometry_of(block), [(block.ctypes.data, 0, 16)]) == reference(block[:, :, 0], 0)


def test_segments_add_up_in_any_order(level: int, rng: np.random.Generator) -> None:
    block = random_block(rng, (5, 2, 1, 32, 128))
    geometry, token = geometry_of(block), block.strides[3]
    cuts = [0, 5, 6, 19, 32]
    runs = [(block.ctypes.data + a * token, 100 + a, b - a) for a, b in itertools.pairwise(cuts)]
    whole = native.digest(geometry, [(block.ctypes.data, 100, 32)])
    assert whole == reference(block[:, :, 0], 100)
    rng.shuffle(runs)
    assert native.digest(geometry, runs) == whole
    assert sum(native.digest(geometry, [run]) for run in runs) % 2**64 == whole
    assert native.digest(geometry, []) == 0


def test_blocks_of_unequal_size_have_equal_sums(level: int, rng: np.random.Generator) -> None:
    """48 tokens as one block of 48 at the source and three blocks of 16, elsewhere, at the reader."""
    source = random_block(rng, (3, 2, 2, 48, 64))
    readers = [np.ascontiguousarray(source[:, :, :, i : i + 16]) for i in (0, 16, 32)]
    for unit in range(2):
        one = native.digest(geometry_of(source), [(source[:, :, unit].ctypes.data, 32, 48)])
        runs = [(r[:, :, unit].ctypes.data, 32 + 16 * i, 16) for i, r in enumerate(readers)]
        assert native.digest(geometry_of(readers[0]), runs) == one


def test_any_single_change_is_seen(level: int, rng: np.random.Generator) -> None:
    block = random_block(rng, (2, 2, 1, 16, 64))
    geometry, address = geometry_of(block), block.ctypes.data
    before = native.digest(geometry, [(address, 7, 16)])
    for _ in range(200):
        index = tuple(rng.integers(0, n) for n in block.shape)
        bit = np.uint8(1 << rng.integers(0, 8))
        block[index] ^= bit
        assert native.digest(geometry, [(address, 7, 16)]) != before
        block[index] ^= bit
    assert native.digest(geometry, [(address, 8, 16)]) != before
    block[:, :, :, [2, 9]] = block[:, :, :, [9, 2]]
    assert native.digest(geometry, [(address, 7, 16)]) != before


def test_blocks_in_one_call(level: int, rng: np.random.Generator) -> None:
    """Two regions (3 and 1 units) in each of 4 blocks, the last one not full."""
    kv, scales = 2 * 2 * 3 * 16 * 64, 2 * 1 * 1 * 16 * 4
    pool = random_block(rng, (6, kv + scales))
    wide = DigestGeometry(2, 2, 2 * 3 * 16 * 64, 3 * 16 * 64, 64, 64)
    narrow = DigestGeometry(2, 1, 16 * 4, 16 * 4, 4, 4)
    digester = BlockDigester([(unit * 16 * 64, wide) for unit in range(3)] + [(kv, narrow)])
    blocks = [(4, 0, 16), (0, 16, 16), (5, 32, 16), (2, 48, 9)]
    got = digester.digest([(pool[b].ctypes.data, position, tokens) for b, position, tokens in blocks])
    want: list[int] = []
    for b, position, tokens in blocks:
        k = pool[b, :kv].reshape(2, 2, 3, 16, 64)
        s = pool[b, kv:].reshape(2, 1, 1, 16, 4)
        want += [reference(k[:, :, unit, :tokens], position) for unit in range(3)]
        want.append(reference(s[:, :, 0, :tokens], position))
    assert got == want
    assert digester.digest([]) == []
