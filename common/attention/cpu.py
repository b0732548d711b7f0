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
from common.attention.context import AttentionContext, GroupTables
from common.kernels import cpu
from common.kernels.ops import DTYPES

_FLOATS = ("float32", "bfloat16", "float16")
_ATTEND = struct.Struct("@19qf2i4x")  # nd::AttendCall
_WRITE = struct.Struct("@16q2i")  # nd::WriteCall
_ADDRESSES = struct.Struct("@3q")  # q, out, cache or k, v, cache

Signature = tuple[object, ...]


def capability() -> Capability:
    missing = "" if cpu.library() is not None else "libnd_cpu.so was not built"
    return Capability(
        "cpu", devices=("cpu",), dtypes=_FLOATS, kv_dtypes=_FLOATS, max_group_size=48, unavailable=missing
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


class CpuBackend:
    name = "cpu"

    def __init__(self, isa: cpu.Isa = cpu.Isa.BEST) -> None:
        lib = cpu.library()
        assert lib is not None, "the capability says that the library is missing"
        self._attend = lib.nd_attend
        self._write = lib.nd_write_rows
        self._isa = isa
        self._writes: dict[Signature, _Call] = {}

    def write(self, k_TUD: Tensor, v_TUD: Tensor, cache: Tensor, tables: GroupTables) -> None:
        """Store new keys and values, cast to the cache's type. `cache`: [num_blocks, 2, U, block_size, D]."""
        k_stride, v_stride, stride, slots_T = k_TUD.stride(), v_TUD.stride(), cache.stride(), tables.slots_T
        signature = (k_stride, v_stride, stride, k_TUD.dtype, cache.dtype, k_TUD.shape, slots_T.data_ptr())
        call = self._writes.get(signature)
        if call is None:
            _check(k_TUD, cache)
            _check(v_TUD, cache)
            num_tokens, units, width = k_TUD.shape
            assert slots_T.dtype == torch.int64
            assert slots_T.is_contiguous()
            assert cache.shape[1:] == (2, units, tables.block_size, width)
            packed = _WRITE.pack(
                0,
                0,
                0,
                slots_T.data_ptr(),
                num_tokens,
                units,
                width,
                tables.block_size,
                *k_stride[:2],
                *v_stride[:2],
                *stride[:4],
                DTYPES[k_TUD.dtype],
                DTYPES[cache.dtype],
            )
            if len(self._writes) >= 16:  # one or two are alive at a time: a group's slots in this step
                self._writes.clear()
            call = self._writes[signature] = _Call.of(signature, packed)
        _ADDRESSES.pack_into(call.memory, 0, k_TUD.data_ptr(), v_TUD.data_ptr(), cache.data_ptr())
        self._write(self._isa, torch.get_num_threads(), call.address)

    def attend(self, q_THD: Tensor, cache: Tensor, tables: GroupTables, ctx: AttentionContext, scale: float) -> Tensor:
        """Causal attention of the new tokens over the cache: a new [T, H, D]."""
        signature = (q_THD.stride(), cache.stride(), q_THD.dtype, cache.dtype, q_THD.shape, scale)
        key = (CpuBackend, id(tables))
        call: _Call | None = ctx.scratch.get(key)
        if call is None or call.signature != signature:
            packed = self._pack(q_THD, cache, tables, ctx, scale)
            call = ctx.scratch[key] = _Call.of(signature, packed)
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
        _ADDRESSES.pack_into(call.memory, 0, q_THD.data_ptr(), out_THD.data_ptr(), cache.data_ptr())
        self._attend(self._isa, torch.get_num_threads(), call.address)
        return out_THD

    def _pack(self, q_THD: Tensor, cache: Tensor, tables: GroupTables, ctx: AttentionContext, scale: float) -> bytes:
        _check(q_THD, cache)
        heads, units, width = q_THD.shape[1], cache.shape[2], cache.shape[4]
        assert heads % units == 0
        for table in (tables.block_tables_SB, ctx.query_starts_S1, ctx.seq_lens_S):
            assert table.dtype == torch.int32
            assert table.stride(-1) == 1
        return _ATTEND.pack(
            0,
            0,
            0,
            tables.block_tables_SB.data_ptr(),
            ctx.query_starts_S1.data_ptr(),
            ctx.seq_lens_S.data_ptr(),
            ctx.seq_lens_S.shape[0],
            heads,
            units,
            width,
            tables.block_size,
            tables.window,
            *q_THD.stride()[:2],
            tables.block_tables_SB.stride(0),
            *cache.stride()[:4],
            scale,
            DTYPES[q_THD.dtype],
            DTYPES[cache.dtype],
        )


def _check(x_THD: Tensor, cache: Tensor) -> None:
    assert x_THD.device.type == cache.device.type == "cpu"
    assert x_THD.shape[2] == cache.shape[4]
    assert x_THD.stride(2) == cache.stride(4) == 1
