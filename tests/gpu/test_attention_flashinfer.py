"""FlashInfer's kernels on a pool of our layout, against the reference in fp32, with NaN wherever nothing may be read.

A pool is bytes 0xFF, NaN in bf16 and in float8_e4m3fn, but for the keys and values that a step's tokens may see. Blocks
of all layers lie one after the other, so a layer's view has the stride of a whole block between its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from common.attention import flashinfer
from common.attention.context import AttentionContext, GroupTables, HostLengths
from common.attention.flashinfer import FlashInferBackend
from common.attention.reference import ReferenceBackend, store
from common.kvcache.scales import KVScales

pytestmark = pytest.mark.gpu

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
LAYERS, LAYER = 3, 1
SCALES = KVScales(0.02, 0.05)
SEED = 20261126


@pytest.fixture(params=["xqa", "own", "fa2"])
def backend(cuda: torch.device, request: pytest.FixtureRequest) -> FlashInferBackend:
    """Few new tokens go to our own kernel, or to one of FlashInfer's."""
    if why := flashinfer.capability().unavailable:
        pytest.skip(why)
    return FlashInferBackend(own_kernel=request.param == "own", xqa=request.param == "xqa")


@dataclass
class Pool:
    """`cache`: the view of one layer, [num_blocks, 2, U, size, D]; the last block is padding."""

    memory: Tensor
    cache: Tensor
    size: int

    @classmethod
    def make(
        cls, device: torch.device, num_blocks: int, units: int, size: int, dim: int, dtype: torch.dtype, nbytes: int = 0
    ) -> Pool:
        """`nbytes`: of a block with all its layers, if more than needed."""
        part = units * size * dim * dtype.itemsize
        nbytes = nbytes or LAYERS * 2 * part
        memory = torch.full((num_blocks * nbytes,), 0xFF, dtype=torch.uint8, device=device)
        item = dtype.itemsize
        shape = (num_blocks, 2, units, size, dim)
        strides = (nbytes // item, part // item, size * dim, dim, 1)
        cache = memory.view(dtype).as_strided(shape, strides, LAYER * 2 * part // item)
        return cls(memory, cache, size)

    @property
    def scales(self) -> KVScales | None:
        return SCALES if self.cache.dtype == FP8 else None


@dataclass
class Step:
    """Sequences with `counts` new tokens after `befores` others, with tables into a pool."""

    pool: Pool
    tables: GroupTables
    ctx: AttentionContext

    @classmethod
    def make(
        cls,
        pool: Pool,
        backend: Any,
        counts: Sequence[int],
        befores: Sequence[int],
        window: int = 0,
        first: int = 0,
        blocks: Sequence[int] | None = None,
        width: int = 0,
    ) -> Step:
        """Random keys and values at all positions that a token may see. `blocks`: which to use, a random few else."""
        size, device = pool.size, pool.memory.device
        lens = [c + b for c, b in zip(counts, befores, strict=True)]
        needed = [-(-n // size) for n in lens]
        order = list(blocks) if blocks is not None else torch.randperm(pool.cache.shape[0] - 1).tolist()
        tables_SB = np.zeros((len(counts), max(width, *needed)), np.int32)
        slots: list[int] = []
        for s, (count, length) in enumerate(zip(counts, lens, strict=True)):
            held = max(0, length - count + 1 - window) // size if window else 0
            tables_SB[s, held : needed[s]] = [order.pop() for _ in range(needed[s] - held)]
            seen = range(held * size, length)
            fill(pool, [int(tables_SB[s, p // size]) * size + p % size for p in seen])
            slots += [int(tables_SB[s, p // size]) * size + p % size for p in range(length - count, length)]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        host = HostLengths(starts, np.array(lens, np.int32))
        tables = GroupTables(
            torch.from_numpy(tables_SB).to(device), torch.tensor(slots, device=device), size, window, first, tables_SB
        )
        ctx = AttentionContext(
            query_starts_S1=torch.from_numpy(starts).to(device),
            seq_lens_S=torch.from_numpy(host.seq_lens_S).to(device),
            max_query_len=max(counts),
            max_seq_len=max(lens),
            groups={"full": tables},
            kv=cast(Any, None),
            backend=backend,
            host=host,
        )
        return cls(pool, tables, ctx)

    def queries(self, heads: int) -> Tensor:
        """A part of wider rows, as layers give them."""
        tokens, dim = len(self.tables.slots_T), self.pool.cache.shape[4]
        rows = torch.randn(tokens, heads + 3, dim, device=self.pool.memory.device, dtype=BF16)
        return rows[:, :heads]

    def expected(self, q_THD: Tensor) -> Tensor:
        ctx = replace(self.ctx, scratch={})
        scale = q_THD.shape[2] ** -0.5
        return ReferenceBackend().attend(q_THD.float(), self.pool.cache, self.tables, ctx, scale, self.pool.scales)


def fill(pool: Pool, slots: Sequence[int]) -> None:
    units, dim, device = pool.cache.shape[2], pool.cache.shape[4], pool.memory.device
    k, v = (torch.randn(len(slots), units, dim, device=device) for _ in range(2))
    at = torch.tensor(slots, device=device)
    store(k, v, pool.cache, (at // pool.size, at % pool.size), pool.scales)


def error(out: Tensor, expected: Tensor) -> float:
    """NaN, which no bound holds for, if there is one."""
    return float((out.float() - expected).norm() / expected.norm())


def check(backend: FlashInferBackend, step: Step, heads: int, bound: float = 8e-3) -> None:
    q_THD = step.queries(heads)
    expected = step.expected(q_THD)
    assert expected.isfinite().all()
    backend.plan(step.ctx)
    out = backend.attend(q_THD, step.pool.cache, step.tables, step.ctx, q_THD.shape[2] ** -0.5, step.pool.scales)
    assert out.shape == q_THD.shape
    assert out.dtype == q_THD.dtype
    for s, (first, end) in enumerate(zip(*(step.ctx.query_starts_S1.tolist()[i:] for i in (0, 1)), strict=False)):
        assert error(out[first:end], expected[first:end]) < bound, f"sequence {s}"


STEPS = {
    "decode": ([1] * 9, [0, 1, 62, 63, 64, 127, 700, 2047, 5000]),
    "one": ([1], [3000]),
    "prompts": ([70, 130, 64, 257], [0, 0, 0, 0]),
    "chunks": ([90, 200, 3, 128], [64, 511, 1000, 37]),
    "mixed": ([1, 1, 1, 150, 300, 1, 5], [30, 900, 63, 0, 128, 400, 11]),
    "drafts": ([4] * 5, [0, 60, 100, 1500, 900]),
}


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", STEPS)
def test_steps(backend: FlashInferBackend, cuda: torch.device, name: str, dim: int, size: int) -> None:
    if backend.takes_xqa and (dim, size) != (128, 64):
        pytest.skip("XQA is compiled for each size: some are enough")
    torch.manual_seed(SEED)
    pool = Pool.make(cuda, 9000 // size + 60, 2, size, dim, BF16)
    check(backend, Step.make(pool, backend, *STEPS[name]), 8)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (10, 2), (12, 2), (7, 1), (16, 2), (16, 1)])
@pytest.mark.parametrize("name", ["decode", "mixed", "drafts"])
def test_groups(backend: FlashInferBackend, cuda: torch.device, name: str, heads: tuple[int, int]) -> None:
    if backend.takes_xqa and heads not in ((4, 2), (16, 2)):
        pytest.skip("XQA is compiled for each size: some are enough")
    torch.manual_seed(SEED + 1)
    pool = Pool.make(cuda, 300, heads[1], 64, 128, BF16)
    check(backend, Step.make(pool, backend, *STEPS[name]), heads[0])


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", STEPS)
def test_8bit(backend: FlashInferBackend, cuda: torch.device, name: str, dim: int) -> None:
    torch.manual_seed(SEED + 2)
    pool = Pool.make(cuda, 300, 2, 64, dim, FP8)
    check(backend, Step.make(pool, backend, *STEPS[name]), 8)


@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize("dim", [16, 32])
@pytest.mark.parametrize("name", STEPS)
def test_small_heads(backend: FlashInferBackend, cuda: torch.device, name: str, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(SEED + 7)
    pool = Pool.make(cuda, 600, 2, 16, dim, dtype)
    check(backend, Step.make(pool, backend, *STEPS[name]), 8)


@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize("window", [1, 40, 64, 129, 1000, 100000])
@pytest.mark.parametrize("name", STEPS)
def test_windows(backend: FlashInferBackend, cuda: torch.device, name: str, window: int, dtype: torch.dtype) -> None:
    torch.manual_seed(SEED + window)
    pool = Pool.make(cuda, 600, 2, 16, 128, dtype)
    check(backend, Step.make(pool, backend, *STEPS[name], window=window), 8)


@pytest.mark.parametrize("name", STEPS)
def test_positions_that_hold_nothing(backend: FlashInferBackend, cuda: torch.device, name: str) -> None:
    """What lies there is multiplied by zero: it may be any number."""
    torch.manual_seed(SEED + 3)
    pool = Pool.make(cuda, 300, 1, 64, 256, BF16)
    counts, befores = STEPS[name]
    step = Step.make(pool, backend, counts, [b + 3 for b in befores], first=3)
    for block_id in set(step.tables.block_tables_SB[:, 0].tolist()):
        pool.cache[block_id, :, :, :3] = 3e4
    check(backend, step, 8)


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_blocks_far_apart(backend: FlashInferBackend, cuda: torch.device, dtype: torch.dtype) -> None:
    """Offsets beyond 2 ** 31 elements and 2 ** 32 bytes."""
    torch.manual_seed(SEED + 4)
    nbytes = 10 << 20
    num_blocks = 700 if dtype == BF16 else 500
    if torch.cuda.mem_get_info()[0] < num_blocks * nbytes + (2 << 30):
        pytest.skip("needs 10 GB of GPU memory")
    pool = Pool.make(cuda, num_blocks, 8, 64, 128, dtype, nbytes)
    last = list(range(num_blocks - 101, num_blocks - 1))
    check(backend, Step.make(pool, backend, [1, 1, 1, 200, 90], [500, 1200, 77, 300, 0], blocks=last), 32)


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_writes_go_where_slots_say(backend: FlashInferBackend, cuda: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(SEED + 5)
    pool = Pool.make(cuda, 40, 2, 16, 128, dtype)
    step = Step.make(pool, backend, [1, 1, 40], [16, 30, 100])
    pool.memory.fill_(0xFF)
    k, v = (torch.randn(42, 2, 128, device=cuda, dtype=BF16) for _ in range(2))
    backend.write(k, v, pool.cache, step.tables, pool.scales)
    other = Pool.make(cuda, 40, 2, 16, 128, dtype)
    ReferenceBackend().write(k, v, other.cache, step.tables, other.scales)
    assert torch.equal(pool.memory, other.memory)
    assert int((pool.memory != 0xFF).sum()) <= 42 * 2 * 2 * 128 * dtype.itemsize


@dataclass
class Recorded:
    """A step of `size` sequences with `count` new tokens each, recorded over memory that keeps its place."""

    backend: FlashInferBackend
    pool: Pool
    size: int
    count: int
    window: int
    heads: int = 8
    width: int = 50

    def __post_init__(self) -> None:
        device, tokens = self.pool.memory.device, self.size * self.count
        self.tables_SB = torch.zeros(self.size, self.width, dtype=torch.int32, device=device)
        self.slots_T = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.lens_S = torch.zeros(self.size, dtype=torch.int32, device=device)
        self.starts_S1 = torch.arange(0, tokens + 1, self.count, dtype=torch.int32, device=device)
        self.q_THD = torch.zeros(tokens, self.heads, self.pool.cache.shape[4], dtype=BF16, device=device)
        self.tables = GroupTables(self.tables_SB, self.slots_T, self.pool.size, self.window)
        self.ctx = AttentionContext(
            self.starts_S1,
            self.lens_S,
            self.count,
            self.width * self.pool.size,
            {"full": self.tables},
            cast(Any, None),
            self.backend,
            graph=self.size,
        )
        self._put(None)
        for _ in range(2):
            self._attend()
        torch.cuda.synchronize()
        self._put(None)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out_THD = self._attend()

    def replay(self, step: Step, q_THD: Tensor) -> Tensor:
        self._put(step)
        self.q_THD[: len(q_THD)] = q_THD
        self.out_THD.fill_(float("nan"))
        self.graph.replay()
        return self.out_THD[: len(q_THD)].clone()

    def _attend(self) -> Tensor:
        scale = self.q_THD.shape[2] ** -0.5
        ctx = replace(self.ctx, scratch={})
        return self.backend.attend(self.q_THD, self.pool.cache, self.tables, ctx, scale, self.pool.scales)

    def _put(self, step: Step | None) -> None:
        padding = self.pool.cache.shape[0] - 1
        tables_SB = np.full((self.size, self.width), padding, np.int32)
        lens_S = np.full(self.size, self.count, np.int32)
        if step is not None:
            assert step.ctx.host is not None
            assert step.tables.host_tables_SB is not None
            rows, width = step.tables.host_tables_SB.shape
            tables_SB[:rows, :width] = step.tables.host_tables_SB
            lens_S[:rows] = step.ctx.host.seq_lens_S
        fill(self.pool, [padding * self.pool.size + i for i in range(self.count)])
        self.tables_SB.copy_(torch.from_numpy(tables_SB))
        self.lens_S.copy_(torch.from_numpy(lens_S))
        host = HostLengths(self.starts_S1.cpu().numpy(), lens_S)
        groups = {"full": replace(self.tables, host_tables_SB=tables_SB)}
        self.backend.plan(replace(self.ctx, groups=groups, host=host))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize("window", [0, 100])
def test_recorded_steps(
    backend: FlashInferBackend, cuda: torch.device, dtype: torch.dtype, count: int, window: int
) -> None:
    """Replays of several sizes in turns, with eager steps between: what they share is theirs in their turn."""
    torch.manual_seed(SEED + 6)
    rng = np.random.default_rng(SEED)
    pool = Pool.make(cuda, 2600, 2, 64, 128, dtype)
    check(backend, Step.make(pool, backend, [count, count], [50, 100], window), 8)
    recorded = [Recorded(backend, pool, size, count, window) for size in (200, 72, 8, 1)]
    for turn in range(12):
        one = recorded[turn % 4]
        rows = one.size if turn < 4 else int(rng.integers(max(1, one.size - 7), one.size + 1))
        longest = 700 if one.size > 100 else 3000
        befores = rng.integers(0, longest, rows).tolist()
        step = Step.make(pool, backend, [count] * rows, befores, window, width=50)
        q_THD = step.queries(8)
        expected = step.expected(q_THD)
        out = one.replay(step, q_THD)
        assert error(out, expected) < 8e-3, f"turn {turn}, {rows} of {one.size}"
        backend.plan(step.ctx)
        eager = backend.attend(q_THD, pool.cache, step.tables, step.ctx, 128**-0.5, pool.scales)
        if rows == one.size or count > 1 or window or dtype == FP8 or not backend.takes_xqa:  # XQA splits by size
            assert torch.equal(eager, out), (
                f"turn {turn}, {rows} of {one.size}: a recorded step differs from an eager one"
            )
        check(backend, Step.make(pool, backend, [1, 1, 90], [40, 300, 500], window), 8)


def test_plans_do_not_wait_for_the_gpu(backend: FlashInferBackend, cuda: torch.device) -> None:
    import time

    pool = Pool.make(cuda, 2600, 8, 64, 128, BF16)
    check(backend, Step.make(pool, backend, [1, 1], [50, 100]), 32)
    one = Recorded(backend, pool, 256, 1, 0, heads=32)
    step = Step.make(pool, backend, [1] * 100, [300] * 100, width=50)
    host, tables = step.ctx.host, step.tables.host_tables_SB
    assert host is not None
    assert tables is not None
    wide = np.full((256, 50), pool.cache.shape[0] - 1, np.int32)
    wide[:100] = tables
    lens_S = np.ones(256, np.int32)
    lens_S[:100] = host.seq_lens_S
    groups = {"full": replace(one.tables, host_tables_SB=wide)}
    ctx = replace(one.ctx, groups=groups, host=HostLengths(np.arange(257, dtype=np.int32), lens_S))
    times = []
    torch.cuda._sleep(200_000_000)  # cycles: the GPU is busy for 0.1 s
    for _ in range(5):
        began = time.perf_counter()
        backend.plan(ctx)
        times.append(time.perf_counter() - began)
    busy = not torch.cuda.current_stream().query()
    print("plans at batch 256, us:", [round(t * 1e6) for t in times])
    assert busy
    assert sorted(times)[2] < 1e-3
