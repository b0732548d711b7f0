"""Tokens become compressed entries (DeepSeek-V4, sections 2.3.1 and 2.3.2): an entry per `ratio` tokens.

    entry = norm(sum over its tokens of softmax(gate + ape) * value), the softmax over tokens in each column

Pooled over the entry's own tokens (HCA), or over those and the ones of the entry before (CSA); then each token has
values and gates twice, [for the next entry | for its own]. An entry turns by the position of its first own token.

Nothing is kept but rows by position: values and gates of the last tokens (`Tail`: a window group), and entries, in
blocks that hold whole ones. A step writes the rows of its tokens, then each entry whose last token is among them.
Until then nobody reads the entry: a query sees (position + 1) // ratio of them.

Shape letters: T new tokens of the step, N entries that a step completes, L tokens pooled into one, C columns of a
compressor's values, D width of an entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.attention.compressed import sequence_of_tokens
from common.attention.context import GroupTables
from common.kernels.compress_ops import pool_entries
from common.kernels.draws import to_device
from common.kvcache.layout import KVPlace
from common.layers.base import Build, Init, Layer, Slot
from common.layers.rms_norm import RMSNorm
from common.layers.rope import apply_rope_
from common.layers.step import Rotation, Step


@dataclass(frozen=True)
class Completed:
    """The entries that a step completes. `tokens_N`: each one's last token; `slots_NL`: where its tokens' rows lie in
    the input's group, -1 before the sequence; `block_ids_N`, `offsets_N`: the entry's own place.

    A recorded step has one for each token. Those that are none have no slots, and lie in the last block, the pool's
    padding.
    """

    tokens_N: Tensor
    slots_NL: Tensor
    block_ids_N: Tensor
    offsets_N: Tensor


def completed(step: Step, ratio: int, num_pooled: int, inputs: GroupTables, entries: GroupTables) -> Completed:
    """Worked out once in a step for all layers of a ratio."""
    key = f"completed {ratio} {num_pooled}"
    found: Completed | None = step.shared.get(key)
    if found is None:
        num_tokens = step.positions_T.shape[0]
        ends_T = (step.positions_T + 1) % ratio == 0
        is_recorded = step.ctx.graph > 0
        if is_recorded:
            tokens_N = torch.arange(num_tokens, device=ends_T.device)
        elif step.ctx.host is not None:  # the device, where the step before may still run, is not asked
            tokens_N = to_device(np.flatnonzero(step.ctx.host.seen() % ratio == 0), ends_T.device)
        else:
            tokens_N = ends_T.nonzero().flatten()
        last_N1 = step.positions_T[tokens_N][:, None]
        sequence_N1 = sequence_of_tokens(step.ctx, num_tokens)[tokens_N][:, None]
        pooled_NL = last_N1 + torch.arange(1 - num_pooled, 1, device=last_N1.device)
        safe_NL = pooled_NL.clamp(min=0)
        slots_NL = _slots(inputs, sequence_N1, safe_NL).masked_fill_(pooled_NL < 0, -1)
        place_N = _slots(entries, sequence_N1, last_N1).flatten()
        size = entries.block_size
        block_ids_N = place_N // size
        if is_recorded:
            slots_NL.masked_fill_(~ends_T[:, None], -1)
            block_ids_N.masked_fill_(~ends_T, -1)
        found = Completed(tokens_N, slots_NL, block_ids_N, place_N % size // ratio)
        step.shared[key] = found
    return found


def _slots(tables: GroupTables, sequence_N1: Tensor, positions_NL: Tensor) -> Tensor:
    """int64 [N, L]: block * block_size + offset."""
    size = tables.block_size
    return tables.block_tables_SB[sequence_N1, positions_NL // size].long() * size + positions_NL % size


def entry_rows(cache: Tensor, ratio: int, width: int) -> Tensor:
    """[num_blocks, entries per block, D] of a layer's view of a region of entries (see `compress_spec.row_width`)."""
    blocks, _, _, size, row = cache.shape
    return cache[:, 0, 0].view(blocks, size // ratio, ratio * row)[..., :width]


class Compressor(Layer):
    """Checkpoint names `ape` [ratio, C], `norm.weight` [D]. Values and gates, `wkv` and `wgate`, come in the input's
    row, the values from `column` on, the gates C columns later. `overlap`: pooled over twice `ratio` tokens.
    """

    def __init__(
        self, build: Build, width: int, ratio: int, place: KVPlace, column: int, eps: float, *, overlap: bool
    ) -> None:
        self._place = place
        self._width, self._ratio, self._column, self._overlap = width, ratio, column, overlap
        self._columns = width * (2 if overlap else 1)
        self._ape = torch.empty(ratio, self._columns, device=build.device)
        self._bias_LD = torch.empty(ratio * (2 if overlap else 1), width, device=build.device)
        self.norm = RMSNorm(build, width, eps)

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("ape", self._ape, tuple(self._ape.shape), init=Init.ZEROS)

    def derive_own(self) -> None:
        """The bias of each token pooled: of the entry before the first columns, of the entry's own the last."""
        self._bias_LD.copy_(self._ape.view(self._ratio, -1, self._width).transpose(0, 1).flatten(0, 1))

    def entries(self, step: Step) -> Tensor:
        """The entries of this layer: [num_blocks, entries per block, D]."""
        return entry_rows(step.cache(self._place), self._ratio, self._width)

    def __call__(self, rows: Tensor, done: Completed, turn: Rotation, step: Step) -> None:
        """Write the entries that the step completes. `rows`: the input's region, [num_blocks, block_size, columns];
        `turn`: each new token's rotation by the position of the first token of its entry.
        """
        if not done.tokens_N.shape[0]:
            return
        own = self._ratio if self._overlap else 0
        pooled_ND = pool_entries(rows[..., self._column :], done.slots_NL, self._bias_LD, self._columns, own)
        entry_ND = self.norm(pooled_ND)
        turn_tail_(entry_ND[:, None], (turn[0][done.tokens_N], turn[1][done.tokens_N]))
        entries = self.entries(step)
        entries[done.block_ids_N, done.offsets_N] = entry_ND.to(entries.dtype)


def turn_tail_(x_THD: Tensor, turn: Rotation) -> None:
    """Turn the last elements of each head in place, neighbours together; they are left in halves, as `apply_rope_`."""
    cos, sin = turn
    apply_rope_(x_THD[..., -cos.shape[-1] :], cos, sin, interleaved=True)
