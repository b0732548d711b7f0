"""Per-step attention metadata: an argument of every forward, never a global.

Shape letters: T new tokens of the step, S sequences, B blocks in a table row, H query heads, U KV heads
(shard units), D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.kvcache.packing import RowPacking
from common.kvcache.scales import KVScales


@dataclass(frozen=True)
class GroupTables:
    """Where the positions of each sequence lie in one group.

    `block_tables_SB`: int32; entry [s, i] holds positions [i * block_size, (i + 1) * block_size). Entries that
    the group no longer keeps, or that lie past the end, are 0 and never read.
    `slots_T`: int64, block_id * block_size + offset of each new token.
    Positions below `first` hold nothing: no query sees them, and none is at one of them.
    `host_tables_SB`: the same tables on the host, where the step was made from them.
    """

    block_tables_SB: Tensor
    slots_T: Tensor
    block_size: int
    window: int = 0  # tokens a query sees, itself included; 0 is all
    first: int = 0
    host_tables_SB: NDArray[np.int32] | None = None

    @cached_property
    def new_block_ids(self) -> Tensor:
        """Block of each new token, int64."""
        return self.slots_T // self.block_size

    @cached_property
    def new_offsets(self) -> Tensor:
        """Place of each new token in its block, int64."""
        return self.slots_T % self.block_size


@dataclass(frozen=True)
class HostLengths:
    """`query_starts_S1` and `seq_lens_S` of a step as they are on the host."""

    query_starts_S1: NDArray[np.int32]
    seq_lens_S: NDArray[np.int32]

    def seen(self) -> NDArray[np.int32]:
        """[T]: positions that each new token of a step that is not recorded sees, its own included."""
        starts_S1 = self.query_starts_S1
        before_S = self.seq_lens_S - starts_S1[1:]
        return np.arange(1, starts_S1[-1] + 1, dtype=np.int32) + np.repeat(before_S, np.diff(starts_S1))


@dataclass(frozen=True)
class AttentionContext:
    """`query_starts_S1` and `seq_lens_S` are int32 on the device; seq_lens count the new tokens too.

    Token t of sequence s sits at position seq_lens[s] - (query_starts[s+1] - t) and attends to all positions up
    to its own. `kv` gives the pool views, `backend` does the work. `states`: by snapshot group, int64 [S], the block
    with each sequence's state. `scratch` holds what the backend worked out for this step in the first layer and needs
    in the others. `on_layer` is called before each layer: a long step is not a hung one.

    `graph`: 0, or the number of sequences of a step that is recorded once and replayed: shapes and tensors stay, what
    they hold changes. All its sequences have equally many new tokens; those that only pad it have nothing before them
    and lie in the pool's padding block. `host` is set wherever the device is not the host.
    """

    query_starts_S1: Tensor
    seq_lens_S: Tensor
    max_query_len: int
    max_seq_len: int
    groups: Mapping[str, GroupTables]
    kv: KVViews
    backend: AttentionBackend
    states: Mapping[str, Tensor] = field(default_factory=dict)
    scratch: dict[object, Any] = field(default_factory=dict)
    on_layer: Callable[[], None] = lambda: None
    host: HostLengths | None = None
    graph: int = 0


@dataclass(frozen=True)
class Selection:
    """The positions that each token of a step sees, where it does not see all up to its own.

    `positions_TK`: int32, ascending, contiguous rows; the first `counts_T` (int32) of a row are meant, at least one.
    """

    positions_TK: Tensor
    counts_T: Tensor

    def take(self, tokens: slice) -> Selection:
        """That of some of the tokens."""
        return Selection(self.positions_TK[tokens], self.counts_T[tokens])


class KVViews(Protocol):
    """Pool memory by region."""

    def region(self, name: str) -> Tensor:
        """[num_blocks, num_layers, num_parts, units, block_size, width], strided over the pool."""

    def scales(self, name: str) -> Sequence[KVScales] | None:
        """By layer of the region, None where its numbers are stored as they are."""


class AttentionBackend(Protocol):
    """`write_rows`, `read_rows`, `attend_rows` and `select` are asked of backends whose capability says `latent`.

    Where they are given a `packing`, the cache is uint8 with rows of that form, and what a row holds (its numbers,
    keys, values) are those unpacked.
    """

    name: str

    plain_writes: bool
    """Does `write` store its rows and nothing else, so that a layer may store them in a kernel of its own?"""

    can_record: bool
    """Does it launch the same work for the same shapes, so that a step can be recorded and replayed?"""

    def plan(self, ctx: AttentionContext) -> None:
        """Called before each forward, and before each replay of a recorded one: what needs the host is done here.

        The step before may still be running: pinned memory is written again only when its copy has been made.
        """

    def write(
        self, k_TUD: Tensor, v_TUD: Tensor, cache: Tensor, tables: GroupTables, scales: KVScales | None = None
    ) -> None:
        """Store new keys and values. `cache`: [num_blocks, 2, U, block_size, D], one layer's view.

        `scales`: the layer's, of a cache that has them (`common.kvcache.scales`): float8 is not read or written
        without.
        """

    def attend(
        self,
        q_THD: Tensor,
        cache: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        scales: KVScales | None = None,
    ) -> Tensor:
        """Causal attention of new tokens over the cache (their own keys included): [T, H, D]."""

    def write_rows(
        self, rows_TW: Tensor, cache: Tensor, tables: GroupTables, packing: RowPacking | None = None
    ) -> None:
        """Store one row per new token. `cache`: [num_blocks, 1, 1, block_size, W]."""

    def read_rows(
        self, cache: Tensor, block_ids_N: Tensor, dtype: torch.dtype, packing: RowPacking | None = None
    ) -> Tensor:
        """All rows of whole blocks (int64 ids), one after the other: [N * block_size, W] of `dtype`."""

    def attend_rows(
        self,
        q_THD: Tensor,
        rows: Tensor,
        values: slice,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        selected: Selection | None = None,
        log_sums_TH: Tensor | None = None,
        packing: RowPacking | None = None,
    ) -> Tensor:
        """Causal attention over rows that hold key and value: [T, H, width of `values`].

        `rows` is [num_blocks, U, block_size, W]. A key is its row's first D columns, a value the columns `values`;
        they may overlap, as in multi-head latent attention. `selected` restricts each token to some positions.
        `log_sums_TH` (fp32, contiguous), if given, takes the logarithm of each sum of exponentials, with which
        results over disjoint sets of rows can be joined. With a `packing` the values are its latents.
        """

    def select(
        self,
        q_THD: Tensor,
        weights_TH: Tensor,
        keys: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        top_k: int,
        packing: RowPacking | None = None,
    ) -> Selection:
        """The `top_k` positions up to each token's own with the highest sum_h weights[h] * max(0, q[h] . key * scale).

        `keys`: [num_blocks, block_size, D]; `weights_TH`: float32. All positions where there are no more than
        `top_k`; of equal scores the lower positions. Scores are fp32.
        """


DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "uint8": torch.uint8,
}
