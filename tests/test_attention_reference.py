"""The reference backend against naive dense attention, with fresh random inputs on every run."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from common.attention.context import AttentionContext, GroupTables
from common.attention.reference import ReferenceBackend


class NoPool:
    def region(self, name: str) -> Tensor:
        raise AssertionError(name)


class Case:
    """Random keys and values of some sequences, cached in shuffled blocks that hold NaN elsewhere."""

    def __init__(
        self,
        spans: list[tuple[int, int]],
        *,
        heads: tuple[int, int] = (6, 2),
        width: int = 16,
        block_size: int = 16,
        window: int = 0,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        first: int = 0,
    ) -> None:
        """`spans`: (tokens cached before, new tokens) of each sequence; positions below `first` hold nothing."""
        self.seed = random.randrange(2**31)
        torch.manual_seed(self.seed)
        self.spans = spans
        self.window, self.first = window, first
        self.k = [torch.randn(a + n, heads[1], width).to(dtype) for a, n in spans]
        self.v = [torch.randn(a + n, heads[1], width).to(dtype) for a, n in spans]
        counts = [n for _, n in spans]
        self.q_THD = torch.randn(sum(counts), heads[0], width).to(dtype)
        blocks = [-(-(a + n) // block_size) for a, n in spans]
        ids = torch.randperm(sum(blocks) + 3).tolist()
        kv_dtype = kv_dtype or dtype
        pool = torch.full((len(ids), 3, 2, heads[1], block_size, width), float("nan"), dtype=kv_dtype)
        self.cache = pool[:, 1]
        tables = torch.zeros(len(spans), max(blocks), dtype=torch.int32)
        slots = []
        for s, (a, n) in enumerate(spans):
            held = [ids.pop() for _ in range(blocks[s])]
            tables[s, : len(held)] = torch.tensor(held)
            for p in range(first, a + n):
                if p < a:
                    self.cache[held[p // block_size], 0, :, p % block_size] = self.k[s][p].to(kv_dtype)
                    self.cache[held[p // block_size], 1, :, p % block_size] = self.v[s][p].to(kv_dtype)
                else:
                    slots.append(held[p // block_size] * block_size + p % block_size)
            gone = max(0, a + 1 - window) // block_size if window else 0
            tables[s, :gone] = 0
        self.tables = GroupTables(tables, torch.tensor(slots), block_size, window, first)
        self.ctx = AttentionContext(
            query_starts_S1=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            seq_lens_S=torch.tensor([a + n for a, n in spans], dtype=torch.int32),
            max_query_len=max(counts),
            max_seq_len=max(a + n for a, n in spans),
            groups={"full": self.tables},
            kv=NoPool(),
            backend=ReferenceBackend(),
        )

    def run(self, scale: float) -> Tensor:
        backend = ReferenceBackend()
        new = [(k[a:], v[a:]) for k, v, (a, _) in zip(self.k, self.v, self.spans, strict=True)]
        backend.write(torch.cat([k for k, _ in new]), torch.cat([v for _, v in new]), self.cache, self.tables)
        return backend.attend(self.q_THD, self.cache, self.tables, self.ctx, scale)

    def expected(self, scale: float) -> Tensor:
        out, first = [], 0
        for k, v, (a, n) in zip(self.k, self.v, self.spans, strict=True):
            q = self.q_THD[first : first + n].double()
            first += n
            group = q.shape[1] // k.shape[1]
            k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("nhd,lhd->hnl", q, k) * scale
            query, key = torch.arange(a, a + n)[:, None], torch.arange(a + n)
            hidden = (key > query) | (key < self.first)
            if self.window:
                hidden |= key <= query - self.window
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out.append(torch.einsum("hnl,lhd->nhd", weights, v))
        return torch.cat(out)

    def check(self, tolerance: float = 2e-6) -> None:
        got, want = self.run(0.3), self.expected(0.3)
        assert got.shape == want.shape
        error = (got.double() - want).abs().max().item()
        assert error < tolerance, f"off by {error} with seed {self.seed}"


FIRST_SPANS = [[(1, 1)], [(20, 1), (17, 1)], [(18, 40)], [(19, 1), (17, 16), (300, 2), (530, 1)]]


@pytest.mark.parametrize("window", [0, 7, 40])
@pytest.mark.parametrize("spans", FIRST_SPANS, ids=["second-token", "decode", "chunk", "mixed"])
def test_positions_that_hold_nothing_are_not_seen(spans: list[tuple[int, int]], window: int) -> None:
    Case(spans, window=window, first=min(17, spans[0][0])).check()


@pytest.mark.parametrize("window", [0, 1, 5, 16, 33])
@pytest.mark.parametrize(
    "spans",
    [
        [(0, 1)],
        [(0, 40)],
        [(37, 1), (5, 1), (200, 1), (0, 1), (63, 1)],
        [(31, 1), (16, 1), (20, 1)],
        [(16, 16), (7, 30), (0, 2)],
        [(50, 1), (0, 19), (13, 1), (90, 25), (300, 1)],
    ],
    ids=["first-token", "prompt", "decode-spread", "decode-even", "chunks", "mixed"],
)
def test_against_dense(spans: list[tuple[int, int]], window: int) -> None:
    Case(spans, window=window).check()


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1), (9, 3)])
@pytest.mark.parametrize("block_size", [16, 48])
def test_head_groups_and_block_sizes(heads: tuple[int, int], block_size: int) -> None:
    Case([(70, 1), (3, 1), (21, 40)], heads=heads, block_size=block_size, width=8).check()


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(seed: int) -> None:
    rng = random.Random(random.randrange(2**31))
    spans = [(rng.randrange(150), rng.choice((1, 1, 1, rng.randrange(1, 60)))) for _ in range(rng.randrange(1, 9))]
    Case(spans, window=rng.choice((0, 0, rng.randrange(1, 100)))).check()


def test_low_precision() -> None:
    Case([(100, 1), (30, 20), (3, 1)], dtype=torch.bfloat16).check(4e-2)
    Case([(100, 1), (30, 20), (3, 1)], kv_dtype=torch.bfloat16).check(4e-2)


def test_same_inputs_give_the_same_bits() -> None:
    case = Case([(100, 1), (30, 20), (3, 1), (250, 1)])
    first = case.run(0.3)
    case.ctx.scratch.clear()
    assert torch.equal(first, case.run(0.3))


def test_strided_queries() -> None:
    case = Case([(10, 1), (40, 1), (0, 12)])
    expected = case.run(0.3)
    wide = torch.full((case.q_THD.shape[0], 9, 16), float("nan"))
    wide[:, 2:8] = case.q_THD
    case.q_THD = wide[:, 2:8]
    assert torch.equal(case.run(0.3), expected)
