"""The CPU attention kernels against naive dense attention, with fresh random inputs, on every instruction set."""

from __future__ import annotations

import random

import pytest
import torch
from test_attention_reference import FIRST_SPANS, Case
from torch import Tensor

from common.attention import cpu as cpu_attention
from common.attention.cpu import CpuBackend
from common.attention.reference import ReferenceBackend
from common.kernels import cpu


@pytest.fixture(params=cpu.available(), ids=lambda isa: isa.name.lower())
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    return CpuBackend(request.param)


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def run(case: Case, backend: CpuBackend, scale: float = 0.3) -> Tensor:
    new = [(k[a:], v[a:]) for k, v, (a, _) in zip(case.k, case.v, case.spans, strict=True)]
    backend.write(torch.cat([k for k, _ in new]), torch.cat([v for _, v in new]), case.cache, case.tables)
    case.ctx.scratch.clear()
    return backend.attend(case.q_THD, case.cache, case.tables, case.ctx, scale)


def check(case: Case, backend: CpuBackend, tolerance: float = 3e-6) -> None:
    got, want = run(case, backend), case.expected(0.3)
    assert got.shape == want.shape
    assert got.dtype == case.q_THD.dtype
    error = (got.double() - want).abs().max().item()
    assert error < tolerance, f"off by {error} with seed {case.seed}"


@pytest.mark.parametrize("window", [0, 1, 5, 16, 33, 600])
@pytest.mark.parametrize(
    "spans",
    [
        [(0, 1)],
        [(0, 40)],
        [(37, 1), (5, 1), (200, 1), (0, 1), (63, 1), (64, 1), (65, 1)],
        [(31, 1), (16, 1), (20, 1)],
        [(16, 16), (7, 30), (0, 2)],
        [(50, 1), (0, 19), (13, 1), (90, 25), (300, 1)],
        [(511, 1), (512, 1), (513, 3), (1100, 40)],
    ],
    ids=["first-token", "prompt", "decode-spread", "decode-even", "chunks", "mixed", "spans"],
)
def test_against_dense(backend: CpuBackend, spans: list[tuple[int, int]], window: int) -> None:
    check(Case(spans, window=window), backend)


@pytest.mark.parametrize("window", [0, 7, 40])
@pytest.mark.parametrize("spans", FIRST_SPANS, ids=["second-token", "decode", "chunk", "mixed"])
def test_positions_that_hold_nothing_are_not_seen(
    backend: CpuBackend, spans: list[tuple[int, int]], window: int
) -> None:
    check(Case(spans, window=window, first=min(17, spans[0][0])), backend)


@pytest.mark.parametrize(("width", "block_size"), [(8, 16), (20, 48), (64, 16), (80, 32), (128, 16)])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1), (9, 3), (48, 1)])
def test_shapes(backend: CpuBackend, heads: tuple[int, int], block_size: int, width: int) -> None:
    case = Case([(70, 1), (3, 1), (21, 40)], heads=heads, block_size=block_size, width=width)
    check(case, backend, 3e-6 * max(1, width // 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 24])
def test_types(backend: CpuBackend, dtype: torch.dtype, kv_dtype: torch.dtype, width: int) -> None:
    tolerance = max({torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}[t] for t in (dtype, kv_dtype))
    check(Case([(100, 1), (30, 20), (3, 1), (600, 2)], dtype=dtype, kv_dtype=kv_dtype, width=width), backend, tolerance)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("seed", range(6))
def test_random_batches_on_threads(backend: CpuBackend, seed: int) -> None:
    rng = random.Random(random.randrange(2**31))
    spans = [(rng.randrange(900), rng.choice((1, 1, 1, rng.randrange(1, 90)))) for _ in range(rng.randrange(1, 9))]
    check(Case(spans, window=rng.choice((0, 0, rng.randrange(1, 700)))), backend)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_a_token_gets_the_same_bits_in_any_chunk_and_batch(
    backend: CpuBackend, window: int, kv_dtype: torch.dtype
) -> None:
    heads, width = (6, 2), 32
    whole = Case([(0, 700), (0, 90), (0, 1)], window=window, heads=heads, width=width, kv_dtype=kv_dtype)
    expected = run(whole, backend)
    for first, count in ((699, 1), (0, 700), (130, 17), (512, 188), (513, 1), (63, 2)):
        part = Case([(first, count)], window=window, heads=heads, width=width, kv_dtype=kv_dtype)
        part.k[0], part.v[0] = whole.k[0][: first + count], whole.v[0][: first + count]
        for p in range(first):
            block = part.tables.block_tables_SB[0, p // 16].long()
            part.cache[block, 0, :, p % 16] = part.k[0][p].to(kv_dtype)
            part.cache[block, 1, :, p % 16] = part.v[0][p].to(kv_dtype)
        part.q_THD = whole.q_THD[first : first + count]
        assert torch.equal(run(part, backend), expected[first : first + count])


def test_the_number_of_threads_changes_no_bit(backend: CpuBackend) -> None:
    case = Case([(1500, 1), (30, 20)], heads=(9, 3), width=64)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(case, backend))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_queries_and_keys_may_be_slices_of_packed_rows(backend: CpuBackend) -> None:
    case = Case([(10, 1), (40, 1), (0, 12)])
    expected = run(case, backend)
    packed = torch.full((case.q_THD.shape[0], 9, 16), float("nan"))
    packed[:, 2:8] = case.q_THD
    case.q_THD = packed[:, 2:8]
    assert torch.equal(run(case, backend), expected)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_stores_what_the_reference_stores(backend: CpuBackend, kv_dtype: torch.dtype) -> None:
    case = Case([(7, 30), (0, 2), (12, 1)], kv_dtype=kv_dtype, width=24)
    cache = case.cache.clone()
    packed = torch.randn(33, 7, 24) * 100
    packed[0, 2, :4] = torch.tensor([0.0, -0.0, float("inf"), 1e-7])
    k, v = packed[:, 2:4], packed[:, 4:6]
    backend.write(k, v, case.cache, case.tables)
    ReferenceBackend().write(k, v, cache, case.tables)
    assert torch.equal(case.cache.nan_to_num(nan=-1.0), cache.nan_to_num(nan=-1.0))


def test_two_layers_of_a_step_share_their_arguments(backend: CpuBackend) -> None:
    case = Case([(100, 1), (30, 20)])
    first = run(case, backend)
    other = case.cache.clone(memory_format=torch.preserve_format)
    shifted = torch.empty_strided(other.shape, case.cache.stride()).copy_(other * 0.5)
    again = backend.attend(case.q_THD, case.cache, case.tables, case.ctx, 0.3)
    halved = backend.attend(case.q_THD, shifted, case.tables, case.ctx, 0.3)
    assert torch.equal(first, again)
    assert not torch.equal(first, halved)
    assert len(case.ctx.scratch) == 1


def test_it_declares_what_it_can() -> None:
    able = cpu_attention.capability()
    assert able.name == "cpu"
    assert able.unavailable == ""
    assert able.devices == ("cpu",)
