"""Products of rows by weights that are few rows' or many experts': one kernel, in tiles that the device finds itself.

A program multiplies a tile of weight rows by a tile of tokens, weights first: Hopper's matrix unit wants 64 rows of
its first operand and as few as 8 columns of its second, and in decode there are many weights and few tokens. Rows are
gathered while they are multiplied. Each weight is read once for each tile of rows.

Weights in E4M3 have a scale for each block of 128 x 128 (`common.kernels.fp8_ops`), rows in E4M3 one for each 128 of
their elements; sums of 128 products are scaled and added in fp32.

Nothing depends on the host: launches have the size that shapes allow for, and programs without a tile end at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.launch import bring_to_l2, let_next_start, pdl, wait
from common.kernels.gpu.pointwise import silu_times
from common.kernels.gpu.routing import TileMap


class Tile(NamedTuple):
    """What a program computes: `weights` rows of a weight by `tokens`, `depth` elements of a row at a time."""

    tokens: int
    weights: int
    depth: int
    num_warps: int
    num_stages: int
    weights_first: bool = True
    halves: bool = False


TILES = (
    Tile(16, 64, 128, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(128, 256, 64, 8, 4, weights_first=False, halves=True),
)
TILES_FP8 = (
    Tile(16, 64, 128, 4, 4),
    Tile(32, 128, 128, 4, 4),
    Tile(64, 128, 128, 4, 4),
    Tile(128, 128, 128, 8, 3, weights_first=False),
)
"""From few tokens to many. The first three are for reading weights, the last one is for arithmetic."""


_PIECE, _PIECES = tl.constexpr(512), tl.constexpr(128)  # bytes of the next weights, and how often a program asks
_MOST_BEHIND = 32 * 2**20  # bytes: the L2 cache has to hold them


class Rows(NamedTuple):
    """Which rows are multiplied by which weight, and where results go.

    `tiles`: rows are those of a tile map; without one row p goes by `experts_P[p]` (any whole numbers); without that
    too, all go by weight 0. `top_k` above 0: row r of the map is read from the row of its pair's token. `to_pairs`: the
    result goes to the row of its pair.
    """

    tiles: TileMap | None = None
    experts_P: Tensor | None = None
    top_k: int = 0
    to_pairs: bool = False


def tile_for(tokens: float, *, fp8: bool, fixed: bool = False) -> Tile:
    """The tile for so many rows of one weight. `fixed`: one of those that add in the same order."""
    tiles = TILES_FP8 if fp8 else TILES
    tile = next((tile for tile in tiles if tokens <= tile.tokens), tiles[-1])
    return tile._replace(weights_first=True) if fixed else tile


def multiply(
    x: Tensor,
    weight_ENK: Tensor,
    out: Tensor,
    rows: Rows,
    tile: Tile,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    gated: bool = False,
    limit: float = 0.0,
    behind_ENK: Tensor | None = None,
) -> None:
    """Rows of x times their weights, into `out`.

    `scales`: with rows and weights in E4M3, fp32 [rows of x, K / 128] and [E, ceil(N / 128), K / 128]. `gated`: the
    weight is [gate | up], and the result silu(gate) * up with `limit` as in `common.kernels.ops.silu_mul`.
    `behind_ENK`: weights of the same experts that are read next; some of them are brought to the L2 cache.
    """
    assert x.stride(1) == weight_ENK.stride(2) == out.stride(1) == 1
    if weight_ENK.element_size() == 4:
        tile = tile._replace(depth=tile.depth // 2)  # shared memory holds half as many numbers
    assert scales is None or (tile.depth == 128 and weight_ENK.shape[2] % 128 == 0 and scales[1].stride(2) == 1)
    n = weight_ENK.shape[1] // 2 if gated else weight_ENK.shape[1]
    depth = weight_ENK.shape[2]
    wide = tile.weights // 2 if gated else tile.weights
    if not out.shape[0]:
        return
    mode, count, lists = _lists(rows, x, triton.cdiv(out.shape[0], tile.tokens))
    x_scales, w_scales = scales or (None, None)
    use_pdl = pdl(x.device)
    programs = count * triton.cdiv(n, wide)
    behind = behind_ENK is not None and use_pdl and _brings(programs, n, wide, behind_ENK)
    _multiply[(programs,)](
        x,
        weight_ENK,
        x if x_scales is None else x_scales,
        x if w_scales is None else w_scales,
        out,
        out if behind_ENK is None else behind_ENK.view(torch.int8),
        *lists,
        x.stride(0),
        weight_ENK.stride(0),
        weight_ENK.stride(1),
        0 if x_scales is None else x_scales.stride(0),
        0 if x_scales is None else x_scales.stride(1),
        0 if w_scales is None else w_scales.stride(0),
        0 if w_scales is None else w_scales.stride(1),
        out.stride(0),
        0 if behind_ENK is None else behind_ENK[0].nbytes,
        out.shape[0],
        n,
        depth,
        float(limit),
        MODE=mode,
        TOP_K=rows.top_k,
        TO_PAIRS=rows.to_pairs,
        GATED=gated,
        LIMITED=limit > 0,
        EVEN=depth % tile.depth == 0,
        FP8=scales is not None,
        BM=tile.tokens,
        BN=tile.weights,
        BK=tile.depth,
        WEIGHTS_FIRST=tile.weights_first,
        HALVES=tile.halves and mode == 2,
        BEHIND=behind,
        PDL=use_pdl,
        launch_pdl=use_pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _lists(rows: Rows, unused: Tensor, tiles_of_all: int) -> tuple[int, int, tuple[Tensor, ...]]:
    """(MODE, number of tiles, their order, experts, first and end rows)"""
    tiles, experts = rows.tiles, rows.experts_P
    if tiles is not None:
        return 2, tiles.expert_B.numel(), (tiles.order_P, tiles.expert_B, tiles.first_row_B, tiles.end_row_B)
    if experts is not None:
        return 1, experts.numel(), (experts,) * 4
    return 0, tiles_of_all, (unused,) * 4


def _brings(programs: int, n: int, wide: int, behind_ENK: Tensor) -> bool:
    """Are there few programs, and does each find its share of the next weight of its expert?"""
    share = _PIECE.value * _PIECES.value
    return (
        behind_ENK.is_contiguous()
        and programs * share <= _MOST_BEHIND
        and triton.cdiv(n, wide) * share <= behind_ENK[0].nbytes
    )


@triton.jit(do_not_specialize=["x_scale_stride_k", "num_rows"])  # which both follow from the step
def _multiply(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    scale_ptr,
    y_ptr,
    behind_ptr,
    order_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    x_stride,
    w_stride_e,
    w_stride_n,
    x_scale_stride,
    x_scale_stride_k,
    scale_stride_e,
    scale_stride_n,
    y_stride,
    behind_stride,
    num_rows,
    n_outputs,
    depth,
    limit,
    MODE: tl.constexpr,
    TOP_K: tl.constexpr,
    TO_PAIRS: tl.constexpr,
    GATED: tl.constexpr,
    LIMITED: tl.constexpr,
    EVEN: tl.constexpr,
    FP8: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    HALVES: tl.constexpr,
    BEHIND: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs of one tile of rows lie side by side, so that they find its rows in the cache.

    MODE: 2 a tile map, 1 an expert for each row, 0 one weight for all rows. HALVES: a tile with few rows is multiplied
    as half a one.
    """
    let_next_start(PDL)
    wait(PDL)
    WIDE: tl.constexpr = BN // 2 if GATED else BN
    n_tiles = tl.cdiv(n_outputs, WIDE)
    b = tl.program_id(0) // n_tiles
    n_first = (tl.program_id(0) % n_tiles) * WIDE
    expert = b.to(tl.int64) * 0 if MODE == 0 else tl.load(expert_ptr + b).to(tl.int64)
    if MODE == 2:
        first, end = tl.load(first_ptr + b), tl.load(end_ptr + b)
    elif MODE == 1:
        first, end = b, b + 1
    else:
        first, end = b * BM, num_rows
    if expert < 0:
        return
    w_ptr += expert * w_stride_e
    scale_ptr += expert * scale_stride_e
    if HALVES and end - first <= BM // 2:
        _tile(
            x_ptr, w_ptr, x_scale_ptr, scale_ptr, y_ptr, order_ptr, first, end, n_first, x_stride, w_stride_n,
            x_scale_stride, x_scale_stride_k, scale_stride_n, y_stride, n_outputs, depth, limit, MODE, TOP_K, TO_PAIRS,
            GATED, LIMITED, EVEN, FP8, BM // 2, BN, BK, WEIGHTS_FIRST,
        )  # fmt: skip
    else:
        _tile(
            x_ptr, w_ptr, x_scale_ptr, scale_ptr, y_ptr, order_ptr, first, end, n_first, x_stride, w_stride_n,
            x_scale_stride, x_scale_stride_k, scale_stride_n, y_stride, n_outputs, depth, limit, MODE, TOP_K, TO_PAIRS,
            GATED, LIMITED, EVEN, FP8, BM, BN, BK, WEIGHTS_FIRST,
        )  # fmt: skip
    if BEHIND:
        piece = (tl.program_id(0) % n_tiles) * _PIECES + tl.arange(0, _PIECES)
        bring_to_l2(behind_ptr + expert * behind_stride + piece * _PIECE, _PIECE)


@triton.jit
def _tile(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    scale_ptr,
    y_ptr,
    order_ptr,
    first,
    end,
    n_first,
    x_stride,
    w_stride_n,
    x_scale_stride,
    x_scale_stride_k,
    scale_stride_n,
    y_stride,
    n_outputs,
    depth,
    limit,
    MODE: tl.constexpr,
    TOP_K: tl.constexpr,
    TO_PAIRS: tl.constexpr,
    GATED: tl.constexpr,
    LIMITED: tl.constexpr,
    EVEN: tl.constexpr,
    FP8: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):
    """Rows `first` to `end` of one weight, at most BM of them, and outputs from `n_first` on."""
    WIDE: tl.constexpr = BN // 2 if GATED else BN
    m = first + tl.arange(0, BM)
    rows = tl.minimum(m, end - 1)  # a row behind the last is computed with it, and not written
    pairs = tl.load(order_ptr + rows) if MODE == 2 else rows
    x_rows = pairs // TOP_K if TOP_K > 0 else rows
    i = tl.arange(0, BN)
    if GATED:  # eight rows of gate, eight of up: both of an output end in one thread
        second_row = i // 8 % 2
        w_rows = tl.minimum(n_first + i // 16 * 8 + i % 8, n_outputs - 1) + second_row * n_outputs
    else:
        second_row = i // 128
        w_rows = tl.minimum(n_first + i, n_outputs - 1)
    k = tl.arange(0, BK)
    w_ptrs = w_ptr + w_rows.to(tl.int64)[:, None] * w_stride_n + k[None, :]
    x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * x_stride + k[None, :]
    acc = tl.zeros((BN, BM) if WEIGHTS_FIRST else (BM, BN), tl.float32)
    if FP8:
        scale_ptr += n_first // 128 * scale_stride_n
        behind = (
            (n_first + n_outputs) // 128 - n_first // 128
            if GATED
            else tl.minimum(1, (n_outputs - 1) // 128 - n_first // 128)
        )
        second_ptr = scale_ptr + behind * scale_stride_n
        x_scale_ptrs = x_scale_ptr + x_rows.to(tl.int64) * x_scale_stride
        scale_0, scale_1, x_scale = tl.load(scale_ptr), tl.load(second_ptr), tl.load(x_scale_ptrs)
    for base in range(0, depth, BK):
        if EVEN:
            w, x = tl.load(w_ptrs), tl.load(x_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(k < depth - base)[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=(k < depth - base)[None, :], other=0.0)
        if FP8:
            at, more = base // BK + 1, base + BK < depth
            next_0 = tl.load(scale_ptr + at, mask=more, other=0.0)
            next_1 = tl.load(second_ptr + at, mask=more, other=0.0)
            next_x = tl.load(x_scale_ptrs + at * x_scale_stride_k, mask=more & (x_rows >= 0), other=0.0)
            w_scale = tl.where(second_row > 0, scale_1, scale_0)
            if WEIGHTS_FIRST:
                acc += tl.dot(w, x.T) * (w_scale[:, None] * x_scale[None, :])
            else:
                acc += tl.dot(x, w.T) * (x_scale[:, None] * w_scale[None, :])
            scale_0, scale_1, x_scale = next_0, next_1, next_x
        elif WEIGHTS_FIRST:
            acc = tl.dot(w, x.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
        w_ptrs += BK
        x_ptrs += BK
    if GATED:
        if WEIGHTS_FIRST:
            gate, up = acc.reshape(BN // 16, 2, 8, BM).permute(0, 2, 3, 1).split()
            acc = silu_times(gate, up, limit, LIMITED).reshape(WIDE, BM)
        else:
            gate, up = acc.reshape(BM, BN // 16, 2, 8).permute(0, 1, 3, 2).split()
            acc = silu_times(gate, up, limit, LIMITED).reshape(BM, WIDE)
    out = acc.to(y_ptr.dtype.element_ty)
    if WEIGHTS_FIRST:
        out = out.T
    n = n_first + tl.arange(0, WIDE)
    y_rows = pairs if TO_PAIRS else rows
    y_ptrs = y_ptr + y_rows.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(y_ptrs, out, mask=(m < end)[:, None] & (n < n_outputs)[None, :])
