"""Products of few rows, x @ weight^T with up to MAX_ROWS rows of x: their time is that of reading the weights once.

Up to MAX_ROWS_IN_REGISTERS rows each program holds some rows of the weight in registers, loaded before the kernel in
front is done: while a small kernel runs, memory is already busy. With more rows the tensor cores take tiles of the
weight from shared memory; parts of a long sum are then several programs' work, and the last to come adds up all parts
in their order. Sums are fp32, and the same at each run. Weights must be constants (`common.kernels.gpu.launch`).

The product of gate and up may go through silu(gate) * up before it is stored: rows of both are taken in turns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.launch import bring_to_l2, let_next_start, pdl, wait
from common.kernels.gpu.pointwise import silu_times

MAX_ROWS = 32  # from there on cuBLAS is as fast
MAX_ROWS_IN_REGISTERS = 2  # with three, tiles are faster (benchmarks/LOG.md, 2026-11-26)
_NUM_COUNTERS = 4096
_apart: set[int] = set()  # streams with counters of their own


@dataclass(frozen=True)
class InRegisters:
    """`rows` of the weight times `columns` at once, in the registers of `warps`."""

    rows: int
    columns: int
    warps: int = 4


@dataclass(frozen=True)
class InTiles:
    """Tiles of `rows` times `columns`, `stages` under way; `parts` programs share a sum.

    `early`: columns that are brought to the L2 cache before the kernel in front is done.
    """

    rows: int
    columns: int
    parts: int
    stages: int
    warps: int = 4
    early: int = 512


def fits(x_TK: Tensor, weight_NK: Tensor) -> bool:
    """Are these a product that the kernels compute, and faster than cuBLAS?"""
    return (
        x_TK.dim() == 2
        and 0 < x_TK.shape[0] <= MAX_ROWS
        and x_TK.dtype == weight_NK.dtype
        and x_TK.dtype in (torch.bfloat16, torch.float16)
        and x_TK.stride(1) == weight_NK.stride(1) == 1
        and weight_NK.stride(0) % 8 == x_TK.stride(0) % 8 == 0
        and plan(x_TK.shape[0], weight_NK.shape[0], x_TK.shape[1], _num_sms(x_TK.device)) is not None
    )


def plan(num_rows: int, n: int, k: int, num_sms: int) -> InRegisters | InTiles | None:
    """How to compute a product; None is for cuBLAS."""
    if num_rows <= MAX_ROWS_IN_REGISTERS:
        columns = min(4096, triton.next_power_of_2(k))
        return InRegisters(rows=16384 // columns, columns=columns) if columns >= 1024 else None
    rows, columns = 64, 128
    if k % columns or num_rows > MAX_ROWS:
        return None
    tiles = triton.cdiv(n, rows)
    parts = [p for p in (1, 2, 3, 4, 6, 8) if k % (p * columns) == 0 and k // p >= 2 * columns]
    return InTiles(rows, columns, parts=max(parts or [1], key=lambda p: _share_busy(tiles * p, num_sms)), stages=4)


def _share_busy(programs: int, num_sms: int) -> float:
    """Of all multiprocessors and rounds, two programs side by side at least."""
    rounds = triton.cdiv(programs, num_sms)
    return programs / (rounds * num_sms) - (0.2 if rounds == 1 else 0.0) - 0.001 * rounds


@functools.cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def keep_apart(stream: torch.cuda.Stream) -> None:
    """Products on this stream may run beside those of other streams, which are one after the other."""
    _apart.add(stream.cuda_stream)


def _counters(device: torch.device) -> Tensor:
    """Zeros, and zeros again whenever a kernel is done: of kernels that run one after the other."""
    stream = torch.cuda.current_stream(device).cuda_stream if _apart else 0
    return _zeros(device, stream if stream in _apart else 0)


@functools.cache
def _zeros(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def _in_lanes(weight, x_ptr, column, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Products with one row of x, those that a thread holds added up: [ROWS, LANES]."""
    x = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
    by_lane = tl.reshape(weight * x[None, :], [ROWS, COLUMNS // (8 * LANES), LANES, 8])
    return tl.sum(tl.sum(by_lane, 3), 1)


@triton.jit
def _store_row(sums, bias, out_ptr, limit, first, n, LIMITED: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr):
    """One row of x times ROWS of the weight: `sums` [ROWS, lanes] into the row at `out_ptr`."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    total = tl.sum(sums, 1) + bias
    if GATED:
        gate, up = tl.split(tl.reshape(total.to(dtype).to(tl.float32), [ROWS // 2, 2]))
        place = first // 2 + tl.arange(0, ROWS // 2)
        tl.store(out_ptr + place, silu_times(gate, up, limit, LIMITED).to(dtype), mask=place < n // 2)
    else:
        place = first + tl.arange(0, ROWS)
        tl.store(out_ptr + place, total.to(dtype), mask=place < n)


@triton.jit
def _weight_rows(first, n, GATED: tl.constexpr, ROWS: tl.constexpr):
    """Rows of the weight for outputs from `first` on; those of gate and up are in turns."""
    i = tl.minimum(first + tl.arange(0, ROWS), n - 1)
    if GATED:
        i = i // 2 + i % 2 * (n // 2)
    return i.to(tl.int64)


@triton.jit
def _in_registers(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    weight_stride,
    out_stride,
    n,
    k,
    limit,
    M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    LIMITED: tl.constexpr,
    ONE_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    first = tl.program_id(0) * ROWS
    row = _weight_rows(first, n, GATED, ROWS)
    column = tl.arange(0, COLUMNS)
    weight_rows = weight_ptr + row[:, None] * weight_stride + column[None, :]
    loaded = tl.load(weight_rows, mask=(column < k)[None, :], other=0.0)
    bias = tl.zeros([ROWS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row).to(tl.float32)
    wait(PDL)
    sums_0 = tl.zeros([ROWS, LANES], tl.float32)
    sums_1, sums_2, sums_3 = sums_0, sums_0, sums_0
    steps = 1 if ONE_STEP else tl.cdiv(k, COLUMNS)
    for step in range(steps):
        at = step * COLUMNS
        mask = column < k - at
        weight = loaded.to(tl.float32)
        sums_0 += _in_lanes(weight, x_ptr + at, column, mask, ROWS, COLUMNS, LANES)
        if M > 1:
            sums_1 += _in_lanes(weight, x_ptr + x_stride + at, column, mask, ROWS, COLUMNS, LANES)
        if M > 2:
            sums_2 += _in_lanes(weight, x_ptr + 2 * x_stride + at, column, mask, ROWS, COLUMNS, LANES)
        if M > 3:
            sums_3 += _in_lanes(weight, x_ptr + 3 * x_stride + at, column, mask, ROWS, COLUMNS, LANES)
        if not ONE_STEP:
            at += COLUMNS
            loaded = tl.load(weight_rows + at, mask=(column < k - at)[None, :], other=0.0)
    _store_row(sums_0, bias, out_ptr, limit, first, n, LIMITED, GATED, ROWS)
    if M > 1:
        _store_row(sums_1, bias, out_ptr + out_stride, limit, first, n, LIMITED, GATED, ROWS)
    if M > 2:
        _store_row(sums_2, bias, out_ptr + 2 * out_stride, limit, first, n, LIMITED, GATED, ROWS)
    if M > 3:
        _store_row(sums_3, bias, out_ptr + 3 * out_stride, limit, first, n, LIMITED, GATED, ROWS)


@triton.jit
def _add_parts(acc, parts_ptr, counter_ptr, part, PARTS: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr):
    """(Is this the last program of a sum? Then: all parts of it, added in their order.)"""
    place = tl.arange(0, M)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(parts_ptr + part * (M * ROWS) + place, acc)
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == PARTS - 1
    if is_last:
        acc = tl.zeros([M, ROWS], tl.float32)
        for i in tl.static_range(PARTS):
            acc += tl.load(parts_ptr + i * (M * ROWS) + place, cache_modifier=".cg")
        tl.store(counter_ptr, 0)
    return is_last, acc


@triton.jit(do_not_specialize=["m"])
def _in_tiles(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    counters_ptr,
    x_stride,
    weight_stride,
    out_stride,
    m,
    n,
    limit,
    K: tl.constexpr,
    M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    LIMITED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PIECES: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    tile, part = tl.program_id(0), tl.program_id(1)
    first = tile * ROWS
    row = _weight_rows(first, n, GATED, ROWS)
    column = part * (K // PARTS) + tl.arange(0, COLUMNS)
    if PDL and EARLY:
        piece: tl.constexpr = EARLY // PIECES  # one for each thread
        pieces = part * (K // PARTS) + tl.arange(0, PIECES)[None, :] * piece
        element_nbytes: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
        bring_to_l2(weight_ptr + row[:, None] * weight_stride + pieces, piece * element_nbytes)
    bias = tl.zeros([ROWS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row).to(tl.float32)
    wait(PDL)
    i = tl.arange(0, M)
    weight_rows = weight_ptr + row[:, None] * weight_stride + column[None, :]
    x_rows = x_ptr + i[:, None] * x_stride + column[None, :]
    turned = tl.zeros([ROWS, M], tl.float32)
    for at in tl.range(0, K // PARTS, COLUMNS, num_stages=STAGES):
        weight = tl.load(weight_rows + at)
        x = tl.load(x_rows + at, mask=(i < m)[:, None], other=0.0)
        turned = tl.dot(weight, tl.trans(x), turned)
    acc = tl.trans(turned)
    is_last = True
    if PARTS > 1:
        parts_ptr += tile * (PARTS * M * ROWS)
        is_last, acc = _add_parts(acc, parts_ptr, counters_ptr + tile, part, PARTS, M, ROWS)
    if is_last:
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        acc += bias[None, :]
        out_rows = out_ptr + i[:, None] * out_stride
        if GATED:
            gate, up = tl.split(tl.reshape(acc.to(dtype).to(tl.float32), [M, ROWS // 2, 2]))
            place = (first // 2 + tl.arange(0, ROWS // 2))[None, :]
            out = silu_times(gate, up, limit, LIMITED)
            tl.store(out_rows + place, out.to(dtype), mask=(i < m)[:, None] & (place < n // 2))
        else:
            place = (first + tl.arange(0, ROWS))[None, :]
            tl.store(out_rows + place, acc.to(dtype), mask=(i < m)[:, None] & (place < n))


def linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
    config: InRegisters | InTiles | None = None,
) -> Tensor:
    """As `common.kernels.ops.linear`, for what `fits`. `config`: another than planned."""
    out_TN = torch.empty((x_TK.shape[0], weight_NK.shape[0]), dtype=out_dtype, device=x_TK.device)
    _launch(x_TK, weight_NK, bias_N, out_TN, None, config)
    return out_TN


def linear_silu_mul(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    limit: float,
    config: InRegisters | InTiles | None = None,
) -> Tensor:
    """As `common.kernels.ops.linear_silu_mul`, for what `fits`. `config`: another than planned."""
    out_TI = torch.empty((x_TK.shape[0], weight_NK.shape[0] // 2), dtype=x_TK.dtype, device=x_TK.device)
    _launch(x_TK, weight_NK, bias_N, out_TI, limit, config)
    return out_TI


def _launch(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    out: Tensor,
    limit: float | None,
    config: InRegisters | InTiles | None,
) -> None:
    """`limit`: of silu_mul; None is the plain product."""
    (m, k), n = x_TK.shape, weight_NK.shape[0]
    config = config or plan(m, n, k, _num_sms(x_TK.device))
    assert config is not None, f"no kernel for {m} x {k} x {n}"
    use_pdl = pdl(x_TK.device)
    inputs = (x_TK, weight_NK, weight_NK if bias_N is None else bias_N, out)
    strides = (x_TK.stride(0), weight_NK.stride(0), out.stride(0))
    common = {
        "HAS_BIAS": bias_N is not None,
        "GATED": limit is not None,
        "LIMITED": limit is not None and limit > 0,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "PDL": use_pdl,
        "num_warps": config.warps,
        "launch_pdl": use_pdl,
    }
    if isinstance(config, InRegisters):
        _in_registers[(triton.cdiv(n, config.rows),)](
            *inputs,
            *strides,
            n,
            k,
            limit or 0.0,
            M=m,
            ONE_STEP=k <= config.columns,
            LANES=min(32 * config.warps, config.columns // 8),
            **common,
        )
        return
    tiles, parts, rows = triton.cdiv(n, config.rows), config.parts, max(16, triton.next_power_of_2(m))
    counters = _counters(x_TK.device)
    sums = counters
    if parts > 1:
        assert tiles <= _NUM_COUNTERS
        sums = torch.empty(tiles * parts * rows * config.rows, dtype=torch.float32, device=x_TK.device)
    pieces = max(1, 32 * config.warps // config.rows)
    _in_tiles[(tiles, parts)](
        *inputs,
        sums,
        counters,
        *strides,
        m,
        n,
        limit or 0.0,
        K=k,
        M=rows,
        PARTS=parts,
        STAGES=config.stages,
        EARLY=min(config.early, k // parts),
        PIECES=pieces,
        **common,
    )
