"""Rows of some sequences in shuffled blocks of a strided pool that holds NaN elsewhere, and attention over them."""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from torch import Tensor

from common.attention.context import AttentionContext, GroupTables, HostLengths, Selection
from common.attention.packed import pack_rows, unpack_rows
from common.attention.reference import ReferenceBackend
from common.kernels import gpu
from common.kvcache.packing import RowPacking

LAYERS, SCALE = 3, 0.1


class NoPool:
    def region(self, name: str) -> Tensor:
        raise AssertionError(name)

    def scales(self, name: str) -> None:
        raise AssertionError(name)


class LatentCase:
    """`spans`: (positions before, new tokens) of each sequence. Blocks hold `LAYERS` layers, of which one is meant."""

    def __init__(
        self,
        spans: list[tuple[int, int]],
        device: torch.device,
        *,
        heads: int,
        value_dim: int = 512,
        rest: int = 64,
        block_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        packed: bool = False,
        first: int = 0,
    ) -> None:
        self.seed = random.randrange(2**31)
        generator = torch.Generator().manual_seed(self.seed)
        self.spans, self.device, self.value_dim, self.first = spans, device, value_dim, first
        width, self.block_size = value_dim + rest, block_size
        self.packing = RowPacking(value_dim, rest) if packed else None
        counts, lens = [n for _, n in spans], [a + n for a, n in spans]
        self.rows = [torch.randn(n, width, generator=generator).to(dtype) for n in lens]
        self.q_THD = torch.randn(sum(counts), heads, width, generator=generator).to(device, dtype)
        self.own = [p for a, n in spans for p in range(a, a + n)]
        self.sequence = [s for s, (_, n) in enumerate(spans) for _ in range(n)]
        blocks = [-(-n // block_size) for n in lens]
        ids = torch.randperm(sum(blocks) + 3, generator=generator).tolist()
        if self.packing is None:
            pool = torch.full((len(ids), LAYERS, 1, 1, block_size, width), float("nan"), dtype=dtype)
        else:
            pool = torch.full((len(ids), LAYERS, 1, 1, block_size, self.packing.nbytes), 255, dtype=torch.uint8)
        tables_SB = np.zeros((len(spans), max(blocks)), np.int32)
        for s, n in enumerate(blocks):
            tables_SB[s, :n] = [ids.pop() for _ in range(n)]
            where = torch.from_numpy(tables_SB[s, :n]).long()
            stored = self.rows[s] if self.packing is None else pack_rows(self.rows[s], self.packing)
            if self.packing is not None:
                self.rows[s] = unpack_rows(stored, self.packing, dtype)
            held = pool[where, 1, 0, 0].flatten(0, 1)
            held[first : len(stored)] = stored[first:]
            pool[where, 1, 0, 0] = held.view(n, block_size, -1)
        self.pool = pool.to(device)
        self.cache = self.pool[:, 1]
        slots = [int(tables_SB[s, p // block_size]) * block_size + p % block_size for s, p in self.places()]
        self.tables = GroupTables(
            torch.from_numpy(tables_SB).to(device),
            torch.tensor(slots, device=device),
            block_size,
            first=first,
            host_tables_SB=tables_SB,
        )
        host = HostLengths(np.array([0, *itertools.accumulate(counts)], np.int32), np.array(lens, np.int32))
        self.ctx = AttentionContext(
            query_starts_S1=torch.from_numpy(host.query_starts_S1.copy()).to(device),
            seq_lens_S=torch.from_numpy(host.seq_lens_S.copy()).to(device),
            max_query_len=max(counts),
            max_seq_len=max(lens),
            groups={"full": self.tables},
            kv=NoPool(),
            backend=ReferenceBackend(),
            host=host,
        )

    def places(self) -> list[tuple[int, int]]:
        """(sequence, position) of each new token."""
        return list(zip(self.sequence, self.own, strict=True))

    def triton_places(self) -> object:
        """What `FlashMlaBackend` gives the kernels in Triton."""
        per = gpu.sparse_latent.few(len(self.own), len(self.spans), self.ctx.max_query_len, recorded=True)
        return gpu.sparse_latent.Places(
            self.tables.block_tables_SB,
            self.ctx.query_starts_S1,
            self.ctx.seq_lens_S,
            self.block_size,
            per,
            None if per else torch.tensor(self.sequence, dtype=torch.int32, device=self.device),
            self.first,
        )

    def chosen(self, most: int, *, full: bool = False) -> Selection:
        """A random few of what each token sees; `full`: as many as there can be."""
        positions_TK = torch.full((len(self.own), most), -1, dtype=torch.int32)
        counts_T = torch.empty(len(self.own), dtype=torch.int32)
        for t, own in enumerate(self.own):
            largest = min(own + 1, most)
            some = sorted(random.sample(range(own + 1), largest if full else random.randrange(1, largest + 1)))
            positions_TK[t, : len(some)] = torch.tensor(some)
            counts_T[t] = len(some)
        return Selection(positions_TK.to(self.device), counts_T.to(self.device))

    def expected(self, selected: Selection | None = None, scale: float = SCALE) -> tuple[Tensor, Tensor]:
        """(values, logarithms of sums) in float64, on the CPU."""
        out, sums = [], []
        queries = self.q_THD.double().cpu()
        for t, (s, own) in enumerate(self.places()):
            seen = torch.arange(self.first, own + 1)
            if selected is not None:
                seen = selected.positions_TK[t, : int(selected.counts_T[t])].long().cpu()
            rows = self.rows[s][seen].double()
            scores = queries[t] @ rows.T * scale
            out.append(scores.softmax(-1) @ rows[:, : self.value_dim])
            sums.append(scores.logsumexp(-1))
        return torch.stack(out), torch.stack(sums)

    def check(self, got: Tensor, want: Tensor, tolerance: float) -> None:
        """By the norm of what is off, of all and of the worst token."""
        assert got.shape == want.shape
        off = (got.double().cpu() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
        worst = off.max().item()
        assert worst < tolerance, f"off by {worst} with seed {self.seed}"
