"""SwiGLU experts on a GPU: products of rows by their experts' weights, and the weighted sum of the results.

    pairs sorted by expert, cut into tiles (`routing.tile_map`)
    -> silu(gate) * up of each row, gate and up of one tile multiplied together   [P, I] in the order of the rows
    -> down                                                                      [P, D] in the order of the pairs
    -> combine: of each token the weighted sum in the order of k                 [T, D]

Rows are gathered while they are multiplied. A program multiplies a tile of weight rows by a tile of tokens, weights
first: Hopper's matrix unit wants 64 rows of its first operand and as few as 8 columns of its second, and in decode
there are many weights and few tokens. Each weight is read once for each tile of its expert. Nothing depends on the
host: launches have the size that shapes allow for, and programs without a tile end at once.

Shape letters: T tokens, E experts, K experts of a token, P = T x K pairs, D hidden size, I of an expert, L = 2 I.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu import routing
from common.kernels.gpu.routing import TileMap


class Tile(NamedTuple):
    """What a program computes: `weights` rows of a weight by `tokens`, `depth` elements of a row at a time."""

    tokens: int
    weights: int
    depth: int
    num_warps: int
    num_stages: int


TILES = (
    Tile(16, 64, 128, 4, 4),
    Tile(32, 128, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(128, 256, 64, 8, 3),
)
"""From few tokens an expert to many. The first three are for reading weights, the last one is for arithmetic."""

_FEW_PAIRS = 32  # up to here each pair is a tile of its own, and nothing is sorted
_MAX_TOKENS = 8192  # a longer step goes in parts, which bounds what lies between the products


def tile_for(pairs: int, experts: int) -> Tile:
    """The tile for so many rows: about twice as many tokens as an expert gets."""
    tokens = 2 * pairs / experts
    return next((tile for tile in TILES if tokens <= tile.tokens), TILES[-1])


def swiglu_moe(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_ELD: Tensor,
    down_EDI: Tensor,
    limit: float,
    added_TD: Tensor | None,
) -> Tensor:
    """Of each token the weighted sum of its experts' results, plus `added_TD`: a new [T, D] of x's type."""
    tokens = x_TD.shape[0]
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    for first in range(0, tokens, _MAX_TOKENS):
        part = slice(first, min(tokens, first + _MAX_TOKENS))
        y_PD = _expert_rows(x_TD[part], ids_TK[part], gate_up_ELD, down_EDI, limit)
        combine(y_PD, None, weights_TK[part], None if added_TD is None else added_TD[part], out_TD[part])
    return out_TD


def _expert_rows(x_TD: Tensor, ids_TK: Tensor, gate_up_ELD: Tensor, down_EDI: Tensor, limit: float) -> Tensor:
    """Results of all pairs, in the order of the pairs: [P, D]."""
    experts, hidden_size, size = down_EDI.shape
    top_k, pairs = ids_TK.shape[1], ids_TK.numel()
    tile = TILES[0] if pairs <= _FEW_PAIRS else tile_for(pairs, experts)
    tiles = None if pairs <= _FEW_PAIRS else routing.tile_map(ids_TK, experts, tile.tokens)
    inner_PI = x_TD.new_empty(pairs, size)
    y_PD = x_TD.new_empty(pairs, hidden_size)
    multiply(x_TD, gate_up_ELD, inner_PI, ids_TK, tiles, tile, gated=True, top_k=top_k, limit=limit)
    multiply(inner_PI, down_EDI, y_PD, ids_TK, tiles, tile, to_pairs=True)
    return y_PD


def multiply(
    x: Tensor,
    weight_ENK: Tensor,
    out: Tensor,
    ids_TK: Tensor,
    tiles: TileMap | None,
    tile: Tile,
    *,
    gated: bool = False,
    top_k: int = 0,
    to_pairs: bool = False,
    limit: float = 0.0,
) -> None:
    """Rows of x times their experts' weights, into `out`.

    Row r of the tile map is row r of `x`, or with `top_k` the token of pair order[r]; its result goes to row r of
    `out`, or with `to_pairs` to the row of the pair. Without a tile map each pair is a row. `gated`: the weight is
    [gate | up], and the result silu(gate) * up with `limit` as in `common.kernels.ops.silu_mul`.
    """
    assert x.stride(1) == weight_ENK.stride(2) == out.stride(1) == 1
    n = weight_ENK.shape[1] // 2 if gated else weight_ENK.shape[1]
    depth = weight_ENK.shape[2]
    wide = tile.weights // 2 if gated else tile.weights
    count = ids_TK.numel() if tiles is None else tiles.expert_B.numel()
    if not out.shape[0]:
        return
    flat = ids_TK.reshape(-1)
    _multiply[(count * triton.cdiv(n, wide),)](
        x,
        weight_ENK,
        out,
        flat if tiles is None else tiles.order_P,
        flat if tiles is None else tiles.expert_B,
        flat if tiles is None else tiles.first_row_B,
        flat if tiles is None else tiles.end_row_B,
        x.stride(0),
        weight_ENK.stride(0),
        weight_ENK.stride(1),
        out.stride(0),
        n,
        depth,
        limit,
        TOP_K=top_k,
        TO_PAIRS=to_pairs,
        GATED=gated,
        LIMITED=limit > 0,
        MAPPED=tiles is not None,
        EVEN=depth % tile.depth == 0,
        BM=tile.tokens,
        BN=tile.weights,
        BK=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def linear_experts(x_PK: Tensor, weight_ENK: Tensor, starts_E1: Tensor) -> Tensor:
    """`common.kernels.moe_ops.linear_experts`: [P, N]."""
    rows = x_PK.shape[0]
    ids = torch.searchsorted(starts_E1[1:], torch.arange(rows, device=x_PK.device), right=True)
    out_PN = x_PK.new_empty(rows, weight_ENK.shape[1])
    tile = tile_for(rows, weight_ENK.shape[0])
    multiply(x_PK, weight_ENK, out_PN, ids, routing.tile_map(ids, weight_ENK.shape[0], tile.tokens), tile)
    return out_PN


def combine(
    y_PD: Tensor,
    places_P: Tensor | None,
    weights_TK: Tensor,
    added_TD: Tensor | None = None,
    out_TD: Tensor | None = None,
) -> Tensor:
    """Of each token the sum of weights[t, k] * y[places[t, k]] in the order of k, plus `added_TD`: rounded once.

    Without `places_P` row p of `y_PD` is pair p.
    """
    tokens, top_k = weights_TK.shape
    width = y_PD.shape[1]
    if out_TD is None:
        out_TD = y_PD.new_empty(tokens, width)
    assert y_PD.stride(1) == out_TD.stride(1) == weights_TK.stride(1) == 1
    assert weights_TK.stride(0) == top_k
    if tokens:
        block = min(triton.next_power_of_2(width), 256 if tokens < 64 else 1024)
        _combine[(tokens, triton.cdiv(width, block))](
            y_PD,
            weights_TK if places_P is None else places_P,
            weights_TK,
            out_TD if added_TD is None else added_TD,
            out_TD,
            y_PD.stride(0),
            out_TD.stride(0) if added_TD is None else added_TD.stride(0),
            out_TD.stride(0),
            width,
            K=top_k,
            PLACED=places_P is not None,
            ADDED=added_TD is not None,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
    return out_TD


@triton.jit
def _multiply(
    x_ptr,
    w_ptr,
    y_ptr,
    order_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    x_stride,
    w_stride_e,
    w_stride_n,
    y_stride,
    n_outputs,
    depth,
    limit,
    TOP_K: tl.constexpr,
    TO_PAIRS: tl.constexpr,
    GATED: tl.constexpr,
    LIMITED: tl.constexpr,
    MAPPED: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Tiles of one tile of rows lie side by side, so that they find its rows in the cache."""
    WIDE: tl.constexpr = BN // 2 if GATED else BN
    n_tiles = tl.cdiv(n_outputs, WIDE)
    b = tl.program_id(0) // n_tiles
    n_first = (tl.program_id(0) % n_tiles) * WIDE
    expert = tl.load(expert_ptr + b).to(tl.int64)
    if expert < 0:
        return
    if MAPPED:
        first, end = tl.load(first_ptr + b), tl.load(end_ptr + b)
    else:
        first, end = b, b + 1
    m = first + tl.arange(0, BM)
    rows = tl.minimum(m, end - 1)  # a row behind the last is computed with it, and not written
    pairs = tl.load(order_ptr + rows) if MAPPED else rows
    x_rows = pairs // TOP_K if TOP_K > 0 else rows
    i = tl.arange(0, BN)
    if GATED:  # eight rows of gate, eight of up: both of an output end in one thread
        w_rows = tl.minimum(n_first + i // 16 * 8 + i % 8, n_outputs - 1) + i // 8 % 2 * n_outputs
    else:
        w_rows = tl.minimum(n_first + i, n_outputs - 1)
    k = tl.arange(0, BK)
    w_ptrs = w_ptr + expert * w_stride_e + w_rows.to(tl.int64)[:, None] * w_stride_n + k[None, :]
    x_ptrs = x_ptr + x_rows.to(tl.int64)[None, :] * x_stride + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for base in range(0, depth, BK):
        if EVEN:
            w, x = tl.load(w_ptrs), tl.load(x_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(k < depth - base)[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=(k < depth - base)[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        w_ptrs += BK
        x_ptrs += BK
    if GATED:
        gate, up = acc.reshape(BN // 16, 2, 8, BM).permute(0, 2, 3, 1).split()
        if LIMITED:
            gate = tl.where(gate > limit, limit, gate)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        acc = (gate / (1.0 + tl.exp(-gate)) * up).reshape(WIDE, BM)
    n = n_first + tl.arange(0, WIDE)
    y_rows = pairs if TO_PAIRS else rows
    y_ptrs = y_ptr + y_rows.to(tl.int64)[None, :] * y_stride + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(m < end)[None, :] & (n < n_outputs)[:, None])


@triton.jit
def _combine(
    y_ptr,
    places_ptr,
    weights_ptr,
    added_ptr,
    out_ptr,
    y_stride,
    added_stride,
    out_stride,
    width,
    K: tl.constexpr,
    PLACED: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(places_ptr + t * K + k) if PLACED else t * K + k
        weight = tl.load(weights_ptr + t * K + k)
        total += weight * tl.load(y_ptr + row * y_stride + d, mask=mask, other=0.0).to(tl.float32)
    if ADDED:
        total += tl.load(added_ptr + t * added_stride + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * out_stride + d, total.to(out_ptr.dtype.element_ty), mask=mask)
