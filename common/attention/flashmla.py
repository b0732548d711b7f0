"""Latent attention on GPUs: FlashMLA's kernels where they fit, our own in Triton for everything else.

    all positions, few new tokens     FlashMLA's dense decode: rows of 512 + 64 in bfloat16 or float16, blocks of 64,
                                      any number of heads, but for very few of them; sequences with equally many new
                                      tokens, else token by token
    selected positions, 8-bit rows    FlashMLA's sparse decode: 64 or 128 heads, selections of a multiple of 64
    selected positions, more tokens   FlashMLA's sparse prefill, over rows in place, or gathered and unpacked: 64 or 128
                                      heads, selections of a multiple of 128
    many new tokens, expanded         `common.attention.ragged`
    the rest                          `common.kernels.gpu.sparse_latent`; what no latent model asks for (units, values
                                      that do not begin a row) is the reference backend's

FlashMLA's dense decode is launched as one that may begin while the kernel before it runs, and waits for nothing: that
kernel must be one that lets none begin. Layers store the new rows right before it, and that kernel is such a one.

Blocks of all layers lie together, so a layer's rows are strided by whole blocks: dense decode addresses them by a TMA
map with that stride, sparse decode by 64-bit offsets, and neither needs more than whole rows inside a block. FlashMLA's
schedule is made on the device, by its first call of a step, and used by the other layers; recorded in a graph it is
made again by each replay.

The indexer scores rows as they lie in the cache, in bfloat16 or 8 bits, with queries of the model's type. DeepGEMM's
kernels want queries of 8 bits and another order of bytes in a block, and what is selected would depend on that.

Shape letters as in `common.attention.context`; also K selected positions, W width of a row, V of its value.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import Tensor

from common.attention.capability import Capability, Needs
from common.attention.context import DTYPES, AttentionContext, GroupTables, Selection
from common.attention.flashinfer_modules import build_missing
from common.attention.latent import Part
from common.attention.latent_gpu import LatentBackend, SlotSelection, meant, places_of, sequence_of_tokens
from common.attention.ragged import Module, RaggedAttention
from common.attention.ragged import missing as ragged_missing
from common.kernels import gpu
from common.kvcache.packing import RowPacking

_log = structlog.stdlib.get_logger(__name__)

_FLOATS = ("bfloat16", "float16", "float32")
_ROW, _VALUE, _BLOCK = 576, 512, 64  # of FlashMLA's kernels
_SPARSE_HEADS = (64, 128)
_LITTLE = 64  # queries of all heads, up to which our own kernel is done sooner: 16 heads of 4 tokens
_TILES = 64  # of 64 heads of a token, from which sparse prefill's kernel, which splits nothing, fills half a GPU
_MANY = 512  # new tokens of a step, from which 8-bit rows are unpacked before


def capability() -> Capability:
    return Capability(
        "flashmla",
        devices=("cuda",),
        dtypes=_FLOATS,
        kv_dtypes=(*_FLOATS, "float8_e4m3fn"),
        latent=True,
        heads=False,
        unavailable=gpu.unavailable() or ("" if torch.cuda.is_available() else "there is no GPU"),
    )


def missing() -> str:
    """Why FlashMLA cannot be used here, empty if it can."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "FlashMLA's kernels are for Hopper"
    if importlib.util.find_spec("flash_mla") is None:
        return "flash_mla is not installed"
    try:
        importlib.import_module("flash_mla")
    except (ImportError, OSError, RuntimeError) as error:  # made for another torch
        return f"flash_mla cannot be loaded: {error!r}"
    return ""


def prepare(needs: Needs) -> None:
    """Compile what prompts need, where it is not there yet."""
    types = (DTYPES[needs.dtype], *needs.expanded)
    if RaggedAttention.able(*types):
        build_missing([Module(*types)])


@dataclass(frozen=True)
class _Scheduled:
    """What FlashMLA's dense decode takes of a step: `queries` each of `tables` and `lens`, and its schedule."""

    queries: int
    tables_SB: Tensor
    lens_S: Tensor
    schedule: Any


class FlashMlaBackend(LatentBackend):
    name = "flashmla"

    def __init__(self) -> None:
        super().__init__()
        self._flash: Any = None
        if why := missing():
            _log.warning("latent attention without FlashMLA", reason=why, instead="kernels in Triton")
        else:
            self._flash = importlib.import_module("flash_mla")
        if why := ragged_missing():
            _log.warning("prompts of latent attention without FlashInfer", reason=why, instead="plain torch")
        self.ragged = RaggedAttention()

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
        """Causal attention over [num_blocks, U, block_size, W] rows of key and value: a new [T, H, V]."""
        if log_sums_TH is None and self._fits_flash(q_THD, rows, values, tables):
            if selected is None and rows.dtype == q_THD.dtype and q_THD.shape[0] * q_THD.shape[1] > _LITTLE:
                return self._dense(q_THD, rows, tables, ctx, scale)
            if selected is not None and q_THD.shape[1] in _SPARSE_HEADS and q_THD.dtype == torch.bfloat16:
                tokens, num_selected = q_THD.shape[0], selected.positions_TK.shape[1]
                if packing is None and rows.dtype == q_THD.dtype and num_selected % 128 == 0:
                    if tokens * q_THD.shape[1] >= _TILES * 64:
                        return self._sparse_in_place(q_THD, rows, tables, ctx, scale, selected)
                elif packing is not None and not ctx.graph and tokens >= _MANY and num_selected % 128 == 0:
                    return self._sparse_unpacked(q_THD, rows, tables, ctx, scale, selected, packing)
                elif packing is not None and num_selected % 64 == 0:
                    return self._sparse_decode(q_THD, rows, tables, ctx, scale, selected)
        more = (selected, log_sums_TH, packing)
        return super().attend_rows(q_THD, rows, values, tables, ctx, scale, *more)

    def _fits_flash(self, q_THD: Tensor, rows: Tensor, values: slice, tables: GroupTables) -> bool:
        return (
            self._flash is not None
            and (q_THD.shape[2], rows.shape[1], tables.block_size) == (_ROW, 1, _BLOCK)
            and values == slice(0, _VALUE)
            and q_THD.dtype in (torch.bfloat16, torch.float16)
            and not tables.first
            and not tables.window
        )

    def _dense(self, q_THD: Tensor, rows: Tensor, tables: GroupTables, ctx: AttentionContext, scale: float) -> Tensor:
        heads = q_THD.shape[1]
        key = (FlashMlaBackend, id(tables), "dense", heads)
        how: _Scheduled | None = ctx.scratch.get(key)
        if how is None:
            how = ctx.scratch[key] = self._schedule_dense(tables, ctx)
        q = q_THD.reshape(-1, how.queries, heads, _ROW)
        out: Tensor = self._flash.flash_mla_with_kvcache(
            q,
            rows.transpose(1, 2),
            how.tables_SB,
            how.lens_S,
            _VALUE,
            how.schedule,
            softmax_scale=scale,
            causal=how.queries > 1,
        )[0]
        return out.view(-1, heads, _VALUE)

    def _schedule_dense(self, tables: GroupTables, ctx: AttentionContext) -> _Scheduled:
        places = places_of(tables, ctx, tables.slots_T.shape[0])
        schedule = self._flash.get_mla_metadata()[0]
        if places.per_sequence:
            return _Scheduled(places.per_sequence, tables.block_tables_SB, ctx.seq_lens_S, schedule)
        sequence_T = places.sequence_T.long()
        ends_T = ctx.seq_lens_S[sequence_T] - ctx.query_starts_S1[1:][sequence_T]
        lens_T = ends_T + torch.arange(1, sequence_T.shape[0] + 1, dtype=torch.int32, device=ends_T.device)
        return _Scheduled(1, tables.block_tables_SB[sequence_T], lens_T, schedule)

    def _sparse_decode(
        self,
        q_THD: Tensor,
        rows: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        selected: Selection,
    ) -> Tensor:
        """Each token is a sequence of its own, of as many positions as can be selected: the schedule follows from T."""
        tokens, heads = q_THD.shape[:2]
        slots_TK = self._slots(selected, tables, ctx)
        key = (FlashMlaBackend, "sparse", tokens, heads, slots_TK.shape[1])
        schedule = ctx.scratch.get(key)
        if schedule is None:
            schedule = ctx.scratch[key] = self._flash.get_mla_metadata()[0]
        out: Tensor = self._flash.flash_mla_with_kvcache(
            q_THD.unsqueeze(1),
            rows.transpose(1, 2),
            None,
            None,
            _VALUE,
            schedule,
            softmax_scale=scale,
            is_fp8_kvcache=True,
            indices=slots_TK.unsqueeze(1),
        )[0]
        return out.view(tokens, heads, _VALUE)

    def _slots(self, selected: Selection, tables: GroupTables, ctx: AttentionContext) -> Tensor:
        if isinstance(selected, SlotSelection):
            return selected.slots_TK
        tokens = selected.counts_T.shape[0]
        places = places_of(tables, ctx, tokens)
        sequence_T = places.sequence_T
        if sequence_T is None:
            sequence_T = torch.arange(tokens, device=selected.counts_T.device) // places.per_sequence
        positions_TK, size = selected.positions_TK.clamp(min=0).long(), tables.block_size
        slots_TK = tables.block_tables_SB[sequence_T.long()[:, None], positions_TK // size] * size + positions_TK % size
        return slots_TK.int().masked_fill_(~meant(selected), -1)

    def _sparse_in_place(
        self,
        q_THD: Tensor,
        rows: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        selected: Selection,
    ) -> Tensor:
        """The kernel knows one stride: that of rows which overlap, one at every place where a token's may begin."""
        step = math.gcd(_ROW, rows.stride(0))
        per_block = rows.stride(0) // step
        num_rows = (rows.shape[0] - 1) * per_block + (_BLOCK - 1) * (_ROW // step) + 1
        every = rows.as_strided((num_rows, 1, _ROW), (step, _ROW, 1), rows.storage_offset())
        slots_TK = self._slots(selected, tables, ctx)
        index_TK = gpu.indexer.rows_of(slots_TK, _BLOCK, per_block, _ROW // step)
        args = (q_THD, every, index_TK.unsqueeze(1), scale)
        out: Tensor = self._flash.flash_mla_sparse_fwd(*args, d_v=_VALUE)[0]
        return out

    def _sparse_unpacked(
        self,
        q_THD: Tensor,
        rows: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        selected: Selection,
        packing: RowPacking,
    ) -> Tensor:
        key = (FlashMlaBackend, id(tables), "part")
        part: Part = ctx.scratch.setdefault(key, Part(slice(0, q_THD.shape[0]), tables, ctx))
        row_PW = self.gather_rows(rows.unsqueeze(1), part, q_THD.dtype, packing)
        starts_S = part.ragged.starts_S1[:-1]
        sequence_T = sequence_of_tokens(ctx, q_THD.shape[0]).long()
        index_TK = (selected.positions_TK + starts_S[sequence_T][:, None]).masked_fill_(~meant(selected), -1)
        args = (q_THD, row_PW.unsqueeze(1), index_TK.unsqueeze(1), scale)
        out: Tensor = self._flash.flash_mla_sparse_fwd(*args, d_v=_VALUE)[0]
        return out
