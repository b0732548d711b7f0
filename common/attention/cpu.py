"""Attention by the CPU kernels in csrc/cpu: paged, grouped heads, windows, any mix of prompt chunks and decodes.

Scores and sums are fp32. Keys are read in tiles at fixed positions, so what a query gets is bitwise the same in
any batch, in chunks of any length and on any number of threads. What a call needs beside its addresses is worked
out in the first layer of a step and kept in the context's scratch: a call costs some microseconds of Python.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from common.attention.capability import Capability
from common.attention.context import AttentionContext, GroupTables, Selection
from common.kernels import cpu
from common.kernels.ops import CACHE_DTYPES, DTYPES
from common.kernels.packed_ops import pack_rows, unpack_rows
from common.kvcache.packing import RowPacking
from common.kvcache.scales import KVScales

_FLOATS = ("float32", "bfloat16", "float16")
_CACHED = (*_FLOATS, "float8_e4m3fn")
_ATTEND = struct.Struct("@3q2f22q2i")  # nd::AttendCall
_SELECT = struct.Struct("@19qf2i4x")  # nd::SelectCall
_WRITE = struct.Struct("@3q2f14q2i")  # nd::WriteCall
_CALL = struct.Struct("@3q2f")  # q, out, cache or k, v, cache; two scales
_ADDRESSES = struct.Struct("@3q")  # q, weights, cache
_SELECTED = struct.Struct("@2q")  # positions and counts
_SELECTED_AT = _CALL.size + 3 * 8  # in nd::AttendCall
_FOUND_AT = _ADDRESSES.size + 3 * 8  # in nd::SelectCall
_LOG_SUMS = struct.Struct("@q")
_LOG_SUMS_AT = _SELECTED_AT + _SELECTED.size
_MAX_GROUP = 48  # query heads of a task

Signature = tuple[object, ...]


def capability() -> Capability:
    missing = "" if cpu.library() is not None else "libnd_cpu.so was not built"
    return Capability(
        "cpu",
        devices=("cpu",),
        dtypes=_FLOATS,
        kv_dtypes=_CACHED,
        max_group_size=_MAX_GROUP,
        latent=True,
        unavailable=missing,
    )


@dataclass(frozen=True)
class _Call:
    """One kernel's arguments in memory. `signature`: strides and types that they were made for."""

    signature: Signature
    memory: bytearray
    address: int
    view: ctypes.Array[ctypes.c_char]  # pins `memory`

    @classmethod
    def of(cls, signature: Signature, packed: bytes) -> _Call:
        memory = bytearray(packed)
        view = (ctypes.c_char * len(memory)).from_buffer(memory)
        return cls(signature, memory, ctypes.addressof(view), view)


@dataclass(frozen=True)
class _Rows:
    """How keys and values lie: strides in elements. `units` share nothing, or, with a stride of 0, everything."""

    units: int
    width: int
    value_width: int
    block_stride: int
    part_stride: int
    unit_stride: int
    token_stride: int


class CpuBackend:
    name = "cpu"
    can_record = False
    plain_writes = True

    def __init__(self, isa: cpu.Isa = cpu.Isa.BEST) -> None:
        lib = cpu.library()
        assert lib is not None, "the capability says that the library is missing"
        self._attend = lib.nd_attend
        self._select = lib.nd_select
        self._write = lib.nd_write_rows
        self._isa = isa
        self._writes: dict[Signature, _Call] = {}

    def plan(self, ctx: AttentionContext) -> None:
        """Nothing is prepared."""

    def write(
        self, k_TUD: Tensor, v_TUD: Tensor, cache: Tensor, tables: GroupTables, scales: KVScales | None = None
    ) -> None:
        """Store new keys and values, cast to the cache's type. `cache`: [num_blocks, 2, U, block_size, D]."""
        self._store(k_TUD, v_TUD, cache, tables, 2, scales)

    def write_rows(
        self, rows_TW: Tensor, cache: Tensor, tables: GroupTables, packing: RowPacking | None = None
    ) -> None:
        """Store a row per new token, cast to the cache's type. `cache`: [num_blocks, 1, 1, block_size, W]."""
        if packing is None:
            rows_T1W = rows_TW.unsqueeze(1)
            return self._store(rows_T1W, rows_T1W, cache, tables, 1)
        _check_packed(cache, packing)
        assert rows_TW.shape[1] == packing.dim
        return pack_rows(rows_TW, cache, tables.slots_T, packing.latent_dim, isa=self._isa)

    def read_rows(
        self, cache: Tensor, block_ids_N: Tensor, dtype: torch.dtype, packing: RowPacking | None = None
    ) -> Tensor:
        """Rows of whole blocks: a new [N * block_size, W]."""
        if packing is None:
            return cache[:, 0, 0].index_select(0, block_ids_N).flatten(0, 1).to(dtype)
        _check_packed(cache, packing)
        return unpack_rows(cache, block_ids_N, packing.latent_dim, packing.rope_dim, dtype, isa=self._isa)

    def _store(
        self,
        k_TUD: Tensor,
        v_TUD: Tensor,
        cache: Tensor,
        tables: GroupTables,
        parts: int,
        scales: KVScales | None = None,
    ) -> None:
        k_scale, v_scale = _scales(cache, scales)
        k_stride, v_stride, stride, slots_T = k_TUD.stride(), v_TUD.stride(), cache.stride(), tables.slots_T
        signature = (k_stride, v_stride, stride, k_TUD.dtype, cache.dtype, k_TUD.shape, slots_T.data_ptr(), parts)
        call = self._writes.get(signature)
        if call is None:
            _check(k_TUD, cache)
            _check(v_TUD, cache)
            num_tokens, units, width = k_TUD.shape
            assert slots_T.dtype == torch.int64
            assert slots_T.is_contiguous()
            assert cache.shape[1:] == (parts, units, tables.block_size, width)
            packed = _WRITE.pack(
                *(0, 0, 0, 0.0, 0.0),
                slots_T.data_ptr(),
                num_tokens,
                parts,
                units,
                width,
                tables.block_size,
                *k_stride[:2],
                *v_stride[:2],
                *stride[:4],
                DTYPES[k_TUD.dtype],
                CACHE_DTYPES[cache.dtype],
            )
            if len(self._writes) >= 16:  # one or two are alive at a time: a group's slots in this step
                self._writes.clear()
            call = self._writes[signature] = _Call.of(signature, packed)
        _CALL.pack_into(call.memory, 0, k_TUD.data_ptr(), v_TUD.data_ptr(), cache.data_ptr(), k_scale, v_scale)
        self._write(self._isa, torch.get_num_threads(), call.address)

    def attend(
        self,
        q_THD: Tensor,
        cache: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        scales: KVScales | None = None,
    ) -> Tensor:
        """Causal attention of the new tokens over the cache: a new [T, H, D]."""
        k_scale, v_scale = _scales(cache, scales)
        signature = (q_THD.stride(), cache.stride(), q_THD.dtype, cache.dtype, q_THD.shape)
        key = (CpuBackend, id(tables))
        call: _Call | None = ctx.scratch.get(key)
        if call is None or call.signature != signature:
            width = cache.shape[4]
            rows = _Rows(cache.shape[2], width, width, *cache.stride()[:4])
            call = ctx.scratch[key] = _Call.of(signature, _pack_attend(q_THD, cache, rows, tables, ctx, 0))
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
        _CALL.pack_into(
            call.memory, 0, q_THD.data_ptr(), out_THD.data_ptr(), cache.data_ptr(), scale * k_scale, v_scale
        )
        self._attend(self._isa, torch.get_num_threads(), call.address)
        return out_THD

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
        """Causal attention over [num_blocks, U, block_size, W] rows of key and value: a new [T, H, width of values]."""
        num_selected = 0 if selected is None else selected.positions_TK.shape[1]
        num_tokens, heads, width = q_THD.shape
        value_width = values.stop - values.start
        strides = (q_THD.stride(), rows.stride(), num_selected)
        signature = (*strides, q_THD.dtype, rows.dtype, q_THD.shape, rows.shape[1], values.start, value_width)
        key = (CpuBackend, id(tables), "rows", selected is None)
        call: _Call | None = ctx.scratch.get(key)
        if call is None or call.signature != signature:
            if packing is not None:
                _check_packed(rows, packing)
                assert (width, values) == (packing.dim, slice(0, packing.latent_dim))
            units, unit_stride = rows.shape[1], rows.stride(1)
            if units == 1:  # a task takes so many heads at a time
                units, unit_stride = heads // _largest_divisor(heads, _MAX_GROUP), 0
            how = _Rows(units, width, value_width, rows.stride(0), values.start, unit_stride, rows.stride(2))
            packed = _pack_attend(q_THD, rows, how, tables, ctx, num_selected)
            call = ctx.scratch[key] = _Call.of(signature, packed)
        if selected is not None:
            positions_TK, counts_T = selected.positions_TK, selected.counts_T
            _check_selection(selected, num_tokens)
            _SELECTED.pack_into(call.memory, _SELECTED_AT, positions_TK.data_ptr(), counts_T.data_ptr())
        if log_sums_TH is not None:
            assert log_sums_TH.dtype == torch.float32
            assert log_sums_TH.shape == (num_tokens, heads)
            assert log_sums_TH.is_contiguous()
        _LOG_SUMS.pack_into(call.memory, _LOG_SUMS_AT, 0 if log_sums_TH is None else log_sums_TH.data_ptr())
        out_THV = torch.empty(num_tokens, heads, value_width, dtype=q_THD.dtype)
        _CALL.pack_into(call.memory, 0, q_THD.data_ptr(), out_THV.data_ptr(), rows.data_ptr(), scale, 1.0)
        self._attend(self._isa, torch.get_num_threads(), call.address)
        return out_THV

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
        """The best `top_k` positions of each token, see the protocol. `keys`: [num_blocks, block_size, D]."""
        num_tokens, heads, width = q_THD.shape
        strides = (q_THD.stride(), weights_TH.stride(), keys.stride())
        signature = (*strides, q_THD.dtype, keys.dtype, q_THD.shape, scale, top_k)
        key = (CpuBackend, id(tables), "select")
        call: _Call | None = ctx.scratch.get(key)
        if call is None or call.signature != signature:
            _check_types(q_THD, keys)
            _check_tables(tables, ctx)
            if packing is None:
                assert keys.shape[-1] == width
            else:
                _check_packed(keys, packing)
                assert (packing.latent_dim, packing.rope_dim) == (width, 0)
            assert weights_TH.shape == (num_tokens, heads)
            assert weights_TH.dtype == torch.float32
            assert weights_TH.stride(1) == 1
            packed = _SELECT.pack(
                *(0, 0, 0),
                tables.block_tables_SB.data_ptr(),
                ctx.query_starts_S1.data_ptr(),
                ctx.seq_lens_S.data_ptr(),
                *(0, 0),
                ctx.seq_lens_S.shape[0],
                heads,
                width,
                tables.block_size,
                top_k,
                *q_THD.stride()[:2],
                weights_TH.stride(0),
                tables.block_tables_SB.stride(0),
                *keys.stride()[:2],
                scale,
                DTYPES[q_THD.dtype],
                CACHE_DTYPES[keys.dtype],
            )
            call = ctx.scratch[key] = _Call.of(signature, packed)
        positions_TK = torch.empty(num_tokens, top_k, dtype=torch.int32)
        counts_T = torch.empty(num_tokens, dtype=torch.int32)
        _ADDRESSES.pack_into(call.memory, 0, q_THD.data_ptr(), weights_TH.data_ptr(), keys.data_ptr())
        _SELECTED.pack_into(call.memory, _FOUND_AT, positions_TK.data_ptr(), counts_T.data_ptr())
        self._select(self._isa, torch.get_num_threads(), call.address)
        return Selection(positions_TK, counts_T)


def _pack_attend(
    q_THD: Tensor,
    cache: Tensor,
    rows: _Rows,
    tables: GroupTables,
    ctx: AttentionContext,
    num_selected: int,
) -> bytes:
    _check_types(q_THD, cache)
    _check_tables(tables, ctx)
    heads = q_THD.shape[1]
    assert q_THD.shape[2] == rows.width
    assert heads % rows.units == 0
    assert heads // rows.units <= _MAX_GROUP
    assert not (num_selected and tables.window), "selected positions and a window"
    return _ATTEND.pack(
        *(0, 0, 0, 0.0, 0.0),
        tables.block_tables_SB.data_ptr(),
        ctx.query_starts_S1.data_ptr(),
        ctx.seq_lens_S.data_ptr(),
        *(0, 0, 0),
        ctx.seq_lens_S.shape[0],
        heads,
        rows.units,
        rows.width,
        rows.value_width,
        tables.block_size,
        tables.window,
        tables.first,
        *q_THD.stride()[:2],
        tables.block_tables_SB.stride(0),
        num_selected,
        rows.block_stride,
        rows.part_stride,
        rows.unit_stride,
        rows.token_stride,
        DTYPES[q_THD.dtype],
        CACHE_DTYPES[cache.dtype],
    )


def _scales(cache: Tensor, scales: KVScales | None) -> tuple[float, float]:
    assert (scales is not None) == (cache.dtype == torch.float8_e4m3fn)
    return (1.0, 1.0) if scales is None else (scales.k, scales.v)


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def _check_types(x_THD: Tensor, cache: Tensor) -> None:
    assert x_THD.device.type == cache.device.type == "cpu"
    assert x_THD.stride(2) == cache.stride(-1) == 1


def _check_tables(tables: GroupTables, ctx: AttentionContext) -> None:
    for table in (tables.block_tables_SB, ctx.query_starts_S1, ctx.seq_lens_S):
        assert table.dtype == torch.int32
        assert table.stride(-1) == 1


def _check_packed(cache: Tensor, packing: RowPacking) -> None:
    assert cache.dtype == torch.uint8
    assert cache.shape[-1] == packing.nbytes


def _check_selection(selected: Selection, num_tokens: int) -> None:
    for table in (selected.positions_TK, selected.counts_T):
        assert table.dtype == torch.int32
        assert table.is_contiguous()
        assert table.shape[0] == num_tokens


def _check(x_THD: Tensor, cache: Tensor) -> None:
    _check_types(x_THD, cache)
    assert x_THD.shape[2] == cache.shape[-1]
