"""Matrix products whose rows do not depend on how many rows there are: those of `--deterministic`.

An output is the sum over k in steps of one tensor-core instruction, in order, in one fp32 accumulator: no split of k,
and no choice by the number of rows but of how many outputs a program makes. Tiles have at least 64 rows, so that all
of them are computed by the same instruction (`wgmma`; smaller ones would take `mma.sync`, which rounds otherwise).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUP = tl.constexpr(8)  # tiles of rows that go through a column of tiles together, which then comes from the L2 cache


class _Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    width,
    x_stride,
    weight_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    m_tiles, n_tiles = tl.cdiv(rows, M), tl.cdiv(columns, N)
    program = tl.program_id(0)
    first_m = program // (_GROUP * n_tiles) * _GROUP
    group = tl.minimum(m_tiles - first_m, _GROUP)
    m_tile = first_m + program % (_GROUP * n_tiles) % group
    n_tile = program % (_GROUP * n_tiles) // group
    m = m_tile * M + tl.arange(0, M)
    n = n_tile * N + tl.arange(0, N)
    k = tl.arange(0, K)
    x_place = x_ptr + m[:, None].to(tl.int64) * x_stride + k[None, :]
    weight_place = weight_ptr + n[None, :].to(tl.int64) * weight_stride + k[:, None]
    has_m, has_n = (m < rows)[:, None], (n < columns)[None, :]
    out = tl.zeros((M, N), tl.float32)
    for start in range(0, width, K):
        if EVEN:
            x = tl.load(x_place, mask=has_m, other=0.0)
            weight = tl.load(weight_place, mask=has_n, other=0.0)
        else:
            x = tl.load(x_place, mask=has_m & (start + k < width)[None, :], other=0.0)
            weight = tl.load(weight_place, mask=has_n & (start + k < width)[:, None], other=0.0)
        out = tl.dot(x, weight, out, input_precision="ieee")
        x_place += K
        weight_place += K
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    place = out_ptr + m[:, None].to(tl.int64) * out_stride + n[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=has_m & has_n)


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """As `common.kernels.ops.linear`, for operands with contiguous rows: [T, N] of `out_dtype`."""
    rows, width = x_TK.shape
    columns = weight_NK.shape[0]
    x_TK = x_TK.to(weight_NK.dtype)
    out_TN = torch.empty(rows, columns, dtype=out_dtype, device=x_TK.device)
    if rows == 0:
        return out_TN
    assert x_TK.stride(1) == weight_NK.stride(1) == 1
    tile = _tile(rows, columns, x_TK.dtype)
    grid = (triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n),)
    _linear[grid](
        x_TK,
        weight_NK,
        weight_NK if bias_N is None else bias_N,
        out_TN,
        rows,
        columns,
        width,
        x_TK.stride(0),
        weight_NK.stride(0),
        columns,
        HAS_BIAS=bias_N is not None,
        EVEN=width % tile.k == 0,
        M=tile.m,
        N=tile.n,
        K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_TN


def _tile(rows: int, columns: int, dtype: torch.dtype) -> _Tile:
    if dtype == torch.float32:
        return _Tile(64, 64, 32, 4, 3)
    if rows <= 64:
        return _Tile(64, 64 if columns >= 64 * 132 else 32, 128, 4, 4)
    return _Tile(64, 128, 64, 4, 4) if rows <= 1024 else _Tile(128, 128, 64, 8, 4)


@triton.jit(do_not_specialize=["rows"])
def _linear_heads(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    columns,
    width,
    x_stride,
    x_head_stride,
    weight_stride,
    weight_head_stride,
    out_stride,
    out_head_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    head = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    x_place = x_ptr + head * x_head_stride + m[:, None] * x_stride + k[None, :]
    weight_place = weight_ptr + head * weight_head_stride + n[None, :] * weight_stride + k[:, None]
    has_m, has_n = (m < rows)[:, None], (n < columns)[None, :]
    out = tl.zeros((M, N), tl.float32)
    for start in range(0, width, K):
        has_k = start + k < width
        x = tl.load(x_place, mask=has_m & has_k[None, :], other=0.0)
        weight = tl.load(weight_place, mask=has_n & has_k[:, None], other=0.0)
        out = tl.dot(x, weight, out, input_precision="ieee")
        x_place += K
        weight_place += K
    place = out_ptr + head * out_head_stride + m[:, None] * out_stride + n[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=has_m & has_n)


def linear_heads(x_THK: Tensor, weight_HNK: Tensor, out_THN: Tensor) -> None:
    """As `common.kernels.ops.linear_heads`, for operands with contiguous rows."""
    rows, heads, width = x_THK.shape
    columns = weight_HNK.shape[1]
    assert x_THK.stride(2) == weight_HNK.stride(2) == out_THN.stride(2) == 1
    tile = _Tile(64, 64, 32 if x_THK.dtype == torch.float32 else 64, 4, 3)
    grid = (triton.cdiv(rows, tile.m), triton.cdiv(columns, tile.n), heads)
    _linear_heads[grid](
        x_THK,
        weight_HNK,
        out_THN,
        rows,
        columns,
        width,
        x_THK.stride(0),
        x_THK.stride(1),
        weight_HNK.stride(1),
        weight_HNK.stride(0),
        out_THN.stride(0),
        out_THN.stride(1),
        M=tile.m,
        N=tile.n,
        K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
