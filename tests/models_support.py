"""Drive one of our models through the paged cache the way an engine does, without an engine."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.attention.context import AttentionBackend, AttentionContext, GroupTables
from common.attention.reference import ReferenceBackend
from common.kvcache.layout import TAIL_GROUP, Retention
from common.kvcache.pool import KVPool
from common.kvcache.tables import BlockCopy
from common.layers.base import TensorParallel
from common.layers.media_positions import rope_positions
from common.layers.step import StepMedia
from common.models.decoder import DecoderModel
from common.models.kv import kv_layout
from common.models.spec import ModelSpec
from common.models.weights import load_model

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Picture:
    """An image in a sequence, from token `position` on. `rows_NW`: embeddings and deepstack features."""

    position: int
    grid: tuple[int, int, int]
    rows_NW: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.rows_NW)


class PagedModel:
    """Sequences are numbered; each takes fresh blocks from a shuffled free list as it grows.

    Blocks of a window group are freed as soon as no later query can see them, and at once given away again;
    their table entries turn to 0. Free blocks hold NaN, so that a read of a wrong one is seen. Each sequence has one
    block of a snapshot group, which begins as zeros.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "float32",
        kv_dtype: str = "",
        block_size: int = 16,
        num_blocks: int = 64,
        backend: AttentionBackend | None = None,
        tp: TensorParallel | None = None,
        seed: int = 0,
        dense: bool = False,
        recorded: bool = False,
    ) -> None:
        """`dense`: without sparse attention, if the model has it. `recorded`: steps of sequences with equally many new
        tokens, but for the first, are run as those that are recorded on a GPU, the last block being nobody's.
        """
        self._recorded = recorded
        self.spec = ModelSpec.from_folder(folder)
        if dense:
            self.spec = self.spec.with_dense_attention()
        self.model: DecoderModel = load_model(self.spec, dtype=dtype, device=CPU, tp=tp)
        self.layout = kv_layout(
            self.spec,
            kv_dtype=kv_dtype or dtype,
            dtype=dtype,
            block_size=block_size,
            num_blocks={g.name: num_blocks for g in self.spec.cache.groups} | {TAIL_GROUP: 4},
            tp_size=tp.size if tp else 1,
            tp_rank=tp.rank if tp else 0,
        )
        self.pool = KVPool(self.layout, None, CPU)
        self.backend = backend or ReferenceBackend()
        self.groups = [g for g in self.layout.groups if g.retention is not Retention.SNAPSHOT]
        self._states: dict[str, dict[int, int]] = {
            g.name: {} for g in self.layout.groups if g.retention is Retention.SNAPSHOT and g.name != TAIL_GROUP
        }
        rng = random.Random(seed)
        self._free: dict[str, list[int]] = {}
        self._tables: dict[str, dict[int, list[int]]] = {g.name: {} for g in self.groups}
        self._lens: dict[int, int] = {}
        for g in (*self.groups, *(self.layout.group(name) for name in self._states)):
            ids = list(range(g.num_blocks - recorded))
            rng.shuffle(ids)
            self._free[g.name] = ids
            self._spoil(g.name, ids)

    @torch.inference_mode()
    def step(
        self, work: Sequence[tuple[int, Sequence[int]]], pictures: Mapping[int, Sequence[Picture]] | None = None
    ) -> list[Tensor]:
        """Compute new tokens of some sequences in one batch; their logits, each [new tokens, vocab].

        `pictures`: all of a sequence's, whichever the step is in.
        """
        ids = [t for _, tokens in work for t in tokens]
        counts = [len(tokens) for _, tokens in work]
        starts = [self._lens.get(s, 0) for s, _ in work]
        positions = [start + i for start, n in zip(starts, counts, strict=True) for i in range(n)]
        for (s, _), start, n in zip(work, starts, counts, strict=True):
            self._lens[s] = start + n
        recorded = self._recorded and min(starts) > 0 and len(set(counts)) == 1
        groups = {g.name: self._group_tables(g.name, g.block_size, g.window, work, starts) for g in self.groups}
        longest = max(self._lens[s] for s, _ in work)
        if recorded:  # what bounds it is known when it is recorded
            longest = max(t.block_tables_SB.shape[1] * t.block_size for t in groups.values())
        ctx = AttentionContext(
            query_starts_S1=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            seq_lens_S=torch.tensor([self._lens[s] for s, _ in work], dtype=torch.int32),
            max_query_len=max(counts),
            max_seq_len=longest,
            groups=groups,
            kv=self.pool,
            backend=self.backend,
            states={group: torch.tensor([self._state_block(group, s) for s, _ in work]) for group in self._states},
            graph=len(work) if recorded else 0,
        )
        spans = [(s, start, start + n) for (s, _), start, n in zip(work, starts, counts, strict=True)]
        media = self._media(spans, pictures) if pictures else None
        if media is not None:
            ids = torch.tensor(ids).index_fill(0, media.rows_N, 0).tolist()  # placeholders mean nothing
        hidden_TD = self.model.forward(torch.tensor(ids), torch.tensor(positions), ctx, media)
        assert hidden_TD.shape == (len(ids), self.spec.hidden_size)
        for g in self.groups:
            self._forget(g.name, g.block_size, g.window, [s for s, _ in work])
        return list(self.model.logits(hidden_TD).split(counts))

    def _media(
        self, spans: Sequence[tuple[int, int, int]], pictures: Mapping[int, Sequence[Picture]]
    ) -> StepMedia | None:
        """What of the pictures lies in positions [start, end) of each (sequence, start, end)."""
        assert self.spec.media is not None
        rows: list[int] = []
        parts = [torch.empty(0, self.spec.media.row_width(self.spec.hidden_size))]
        places = []
        first = 0
        for s, start, end in spans:
            places.append(torch.from_numpy(rope_positions(pictures.get(s, ()), start, end)))
            for p in pictures.get(s, ()):
                begin, stop = max(p.position, start), min(p.position + p.num_tokens, end)
                rows += range(first + begin - start, first + stop - start)
                parts.append(p.rows_NW[begin - p.position : max(stop, begin) - p.position])
            first += end - start
        positions_3T = torch.cat(places, 1) if self.spec.media.takes_grid else None
        return StepMedia(torch.tensor(rows, dtype=torch.int64), torch.cat(parts), positions_3T)

    def _group_tables(
        self, group: str, size: int, window: int, work: Sequence[tuple[int, Sequence[int]]], starts: Sequence[int]
    ) -> GroupTables:
        slots: list[int] = []
        for (s, tokens), start in zip(work, starts, strict=True):
            table = self._tables[group].setdefault(s, [])
            while len(table) * size < self._lens[s]:
                table.append(self._free[group].pop())
            slots += [table[p // size] * size + p % size for p in range(start, start + len(tokens))]
        width = max(len(self._tables[group][s]) for s, _ in work)
        tables = torch.zeros(len(work), width, dtype=torch.int32)
        for i, (s, _) in enumerate(work):
            table = self._tables[group][s]
            tables[i, : len(table)] = torch.tensor(table)
        return GroupTables(tables, torch.tensor(slots), size, window)

    def _state_block(self, group: str, sequence: int) -> int:
        blocks = self._states[group]
        if sequence not in blocks:
            blocks[sequence] = self._free[group].pop()
            self.pool.copy_blocks([BlockCopy(group, -1, blocks[sequence])])
        return blocks[sequence]

    def _forget(self, group: str, size: int, window: int, sequences: Sequence[int]) -> None:
        if not window:
            return
        for s in sequences:
            table = self._tables[group][s]
            for i in range(min(max(0, self._lens[s] + 1 - window) // size, len(table))):
                if table[i]:
                    self._spoil(group, [table[i]])
                    self._free[group].insert(0, table[i])
                    table[i] = 0

    def _spoil(self, group: str, block_ids: Sequence[int]) -> None:
        for r in self.layout.regions_of(group):
            view = self.pool.region(r.name)
            view[list(block_ids)] = 255 if view.dtype == torch.uint8 else float("nan")  # packed rows' scales are NaN


class Sum:
    """All-reduce between threads."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=30)
        self._parts: list[Tensor | None] = [None] * size

    def of(self, rank: int) -> TensorParallel:
        def reduce(x: Tensor) -> Tensor:
            self._parts[rank] = x.clone()
            self._barrier.wait()
            x.copy_(torch.stack([p for p in self._parts if p is not None]).sum(0))
            self._barrier.wait()
            return x

        return TensorParallel(rank, len(self._parts), reduce)
