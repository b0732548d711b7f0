"""The GPU's digest against its definition in numpy, on fresh random bytes."""

from __future__ import annotations

import time

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.kernels.native import DigestGeometry
from common.kvcache.digest import digest_reference
from common.kvtransfer.device_digests import DeviceDigests
from common.kvtransfer.transport import DigestCheck

pytestmark = pytest.mark.gpu

SHAPES = {  # layers, parts, units, tokens, bytes of a row
    "keys and values": (3, 2, 2, 16, 256),
    "latent": (5, 1, 1, 16, 1152),
    "packed latent": (4, 1, 1, 16, 656),
    "8-bit keys and values": (3, 2, 2, 16, 128),
    "index keys": (3, 1, 1, 16, 136),
    "scales": (3, 1, 1, 16, 8),
    "large block": (2, 2, 1, 80, 256),
    "state": (2, 1, 3, 1, 16384),
    "tail": (1, 1, 1, 1, 8192),
    "odd": (2, 1, 1, 5, 24),
}


def reference(rows_LPTB: NDArray[np.uint8], position: int) -> int:
    return digest_reference(np.ascontiguousarray(rows_LPTB).view(np.uint64), position)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("offset", [0, 8])
def test_blocks_of_every_kind(kernel_device: torch.device, shape: tuple[int, ...], offset: int) -> None:
    """Four blocks, whole and in part, at scattered places; the last two segments add to one sum."""
    from common.kernels.gpu import digest

    layers, parts, units, tokens, row = shape
    rng = np.random.default_rng()
    nbytes = int(np.prod(shape))
    memory = torch.from_numpy(rng.integers(0, 256, 6 * nbytes + 64, dtype=np.uint8)).to(kernel_device)
    anchor = torch.zeros(2, dtype=torch.int64, device=kernel_device)
    host, base = memory.cpu().numpy(), memory.data_ptr() - anchor.data_ptr()
    assert base % 16 == 0
    run = tokens * row
    geometry = DigestGeometry(layers, parts, parts * units * run, units * run, row, row)
    segments, expected = [], [0] * (3 * units)
    for index, block in enumerate((4, 0, 3, 1)):
        at = offset + block * nbytes
        valid = tokens if index < 2 else int(rng.integers(1, tokens + 1))
        position = int(rng.integers(0, 2**31))
        rows = host[at : at + nbytes].reshape(shape)
        for unit in range(units):
            which = min(index, 2) * units + unit
            segments.append(((base + at + unit * run) // 8, position, valid, which))
            expected[which] = (expected[which] + reference(rows[:, :, unit, :valid], position)) % 2**64
    table = torch.tensor(segments, dtype=torch.int64, device=kernel_device)
    sums = torch.zeros(len(expected), dtype=torch.int64, device=kernel_device)
    digest.add_digests(sums, anchor, table, geometry, tokens, aligned=offset % 16 == 0 and run % 16 == 0)
    assert sums.tolist() == [signed(value) for value in expected]


def test_one_flipped_bit_is_seen(kernel_device: torch.device) -> None:
    from common.kernels.gpu import digest

    rng = np.random.default_rng()
    memory = torch.from_numpy(rng.integers(0, 256, 2 * 2 * 16 * 256, dtype=np.uint8)).to(kernel_device)
    geometry = DigestGeometry(2, 2, 2 * 16 * 256, 16 * 256, 256, 256)
    table = torch.tensor([(0, 7, 16, 0)], dtype=torch.int64, device=kernel_device)

    def digest_now() -> int:
        total = torch.zeros(1, dtype=torch.int64, device=kernel_device)
        digest.add_digests(total, memory.view(torch.int64), table, geometry, 16, aligned=True)
        return int(total.item())

    before = digest_now()
    for _ in range(8):
        at, bit = int(rng.integers(0, memory.numel())), int(rng.integers(0, 8))
        memory[at] ^= 1 << bit
        assert digest_now() != before
        memory[at] ^= 1 << bit
    assert digest_now() == before


def checks_of(memory: torch.Tensor, rng: np.random.Generator) -> list[DigestCheck]:
    """Two regions that take turns in three blocks, as one launch gets them; the last block in part."""
    host, checks = memory.cpu().numpy(), []
    for block, tokens in enumerate((16, 16, 5)):
        position = int(rng.integers(0, 2**20))
        for shape, at in (((3, 2, 2, 16, 64), 0), ((2, 1, 1, 16, 136), 3 * 2 * 2 * 16 * 64)):
            layers, parts, units, size, row = shape
            start = block * 16640 + at
            rows = host[start : start + int(np.prod(shape))].reshape(shape)
            for unit in range(units):
                segments = ((memory.data_ptr() + start + unit * size * row, position, tokens),)
                strides = (parts * units * size * row, units * size * row, row)
                expected = reference(rows[:, :, unit, :tokens], position)
                checks.append(DigestCheck(segments, layers, parts, *strides, row, expected))
    return checks


def test_checks_of_several_shapes_come_back_in_their_order(kernel_device: torch.device) -> None:
    rng = np.random.default_rng()
    memory = torch.from_numpy(rng.integers(0, 256, 3 * 16640, dtype=np.uint8)).to(kernel_device)
    checks = checks_of(memory, rng)
    digests = DeviceDigests(kernel_device)
    assert digests.launch(checks).values() == [c.expected for c in checks]
    assert digests.compare(digests.prepare(checks)).values() == [0] * len(checks)
    wrong = [msgspec.structs.replace(c, expected=c.expected ^ (i == 4)) for i, c in enumerate(checks)]
    assert [v != 0 for v in digests.compare(digests.prepare(wrong)).values()] == [i == 4 for i in range(len(checks))]


def test_a_comparison_on_a_stream_of_its_own_waits_for_nothing(cuda: torch.device) -> None:
    """The main stream is busy for a second: the comparison is done long before."""
    rng = np.random.default_rng()
    memory = torch.from_numpy(rng.integers(0, 256, 3 * 16640, dtype=np.uint8)).to(cuda)
    checks = checks_of(memory, rng)
    digests = DeviceDigests(cuda, torch.cuda.Stream(cuda))
    digests.compare(digests.prepare(checks)).values()  # compiles
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # cycles
    busy.record()
    began = time.monotonic()
    assert digests.compare(digests.prepare(checks)).values() == [0] * len(checks)
    assert time.monotonic() - began < 0.5
    assert not busy.query()
