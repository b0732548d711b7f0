"""SwiGLU experts on a GPU, and the weighted sum of their results.

    pairs sorted by expert, cut into tiles (`routing.tile_map`)
    -> silu(gate) * up, gate and up multiplied together, rows gathered meanwhile (`products`)   [P, I] as the rows lie
    -> down                                                                                    [P, D] as the pairs lie
    -> combine: of each token the weighted sum in the order of k

FP8 experts with many rows each, as in prefill, go to DeepGEMM where it is there (`padded`).

Shape letters: T tokens, E experts, K experts of a token, P = T x K pairs, D hidden size, I of an expert, L = 2 I.
"""

from __future__ import annotations

import functools

import structlog
import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.expert_weights import ExpertWeights
from common.kernels.gpu import deepgemm, fp8, padded, products, routing
from common.kernels.gpu.launch import let_next_start, pdl, wait
from common.kernels.gpu.products import Rows

_log = structlog.stdlib.get_logger(__name__)

_FEW_PAIRS = 32  # up to here each pair is a tile of its own, and nothing is sorted
_MAX_ELEMENTS = 2**29  # of the results of all pairs: a longer step goes in parts
_MANY_ROWS = 96  # rows of an FP8 expert, on average, from which DeepGEMM is faster


def swiglu_moe(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: ExpertWeights,
    limit: float,
    added_TD: Tensor | None,
    *,
    fixed: bool = False,
) -> Tensor:
    """Of each token the weighted sum of its experts' results, plus `added_TD`: a new [T, D] of x's type.

    `fixed`: by the same kernels whatever the number of rows.
    """
    tokens = x_TD.shape[0]
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    at_once = max(1, _MAX_ELEMENTS // (ids_TK.shape[1] * x_TD.shape[1]))
    for first in range(0, tokens, at_once):
        part = slice(first, min(tokens, first + at_once))
        some = x_TD[part], ids_TK[part], experts, limit
        places_P: Tensor | None = None
        if not fixed and _has_many(ids_TK[part], experts) and _goes_to_deepgemm(x_TD, experts):
            y, places_P = padded.expert_rows(*some)
        else:
            y = expert_rows(*some, fixed=fixed)
        combine(y, places_P, weights_TK[part], None if added_TD is None else added_TD[part], out_TD[part])
    return out_TD


def expert_rows(x_TD: Tensor, ids_TK: Tensor, experts: ExpertWeights, limit: float, *, fixed: bool = False) -> Tensor:
    """Results of all pairs, in the order of the pairs: [P, D]."""
    num_experts, hidden_size, size = experts.down_EDI.shape
    top_k, pairs = ids_TK.shape[1], ids_TK.numel()
    in_fp8 = experts.gate_up_scales is not None
    inner_PI = x_TD.new_empty(pairs, size)
    y_PD = x_TD.new_empty(pairs, hidden_size)
    if pairs <= _FEW_PAIRS:
        tile, tiles = products.tile_for(1, fp8=in_fp8), None
        flat = ids_TK.reshape(-1)
    else:  # most experts are one tile
        tile = products.tile_for(2 * pairs / num_experts, fp8=in_fp8, fixed=fixed)
        tiles, flat = routing.tile_map(ids_TK, num_experts, tile.tokens), None
    x, scales = _rows(x_TD, experts.gate_up_scales)
    rows = Rows(tiles, flat, top_k=top_k)
    behind = experts.down_EDI if tiles is None else None
    products.multiply(
        x, experts.gate_up_ELD, inner_PI, rows, tile, scales=scales, gated=True, limit=limit, behind_ENK=behind
    )
    inner, scales = _rows(inner_PI, experts.down_scales)
    products.multiply(inner, experts.down_EDI, y_PD, Rows(tiles, flat, to_pairs=True), tile, scales=scales)
    return y_PD


def _rows(x: Tensor, weight_scales: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Rows as they are multiplied by weights with or without scales, and the scales of both."""
    if weight_scales is None:
        return x, None
    values, scales = fp8.quantise(x)
    return values, (scales, weight_scales)


def linear_experts(x_PK: Tensor, weight_ENK: Tensor, starts_E1: Tensor) -> Tensor:
    """`common.kernels.moe_ops.linear_experts`: [P, N]."""
    rows, experts = x_PK.shape[0], weight_ENK.shape[0]
    ids = torch.searchsorted(starts_E1[1:], torch.arange(rows, device=x_PK.device), right=True)
    out_PN = x_PK.new_empty(rows, weight_ENK.shape[1])
    tile = products.tile_for(2 * rows / experts, fp8=False)
    products.multiply(x_PK, weight_ENK, out_PN, Rows(routing.tile_map(ids, experts, tile.tokens)), tile)
    return out_PN


def combine(
    y: Tensor,
    places_P: Tensor | None,
    weights_TK: Tensor,
    added_TD: Tensor | None = None,
    out_TD: Tensor | None = None,
) -> Tensor:
    """Of each token the sum of weights[t, k] * y[places[t, k]] in the order of k, plus `added_TD`: rounded once.

    Without `places_P` row p of `y` is pair p.
    """
    tokens, top_k = weights_TK.shape
    width = y.shape[1]
    if out_TD is None:
        out_TD = y.new_empty(tokens, width)
    assert y.stride(1) == out_TD.stride(1) == weights_TK.stride(1) == 1
    assert weights_TK.stride(0) == top_k
    if tokens:
        block = min(triton.next_power_of_2(width), 256 if tokens < 64 else 1024)
        use_pdl = pdl(y.device)
        _combine[(tokens, triton.cdiv(width, block))](
            y,
            weights_TK if places_P is None else places_P,
            weights_TK,
            out_TD if added_TD is None else added_TD,
            out_TD,
            y.stride(0),
            out_TD.stride(0) if added_TD is None else added_TD.stride(0),
            out_TD.stride(0),
            width,
            K=top_k,
            PLACED=places_P is not None,
            ADDED=added_TD is not None,
            BLOCK=block,
            PDL=use_pdl,
            launch_pdl=use_pdl,
            num_warps=max(1, block // 256),
        )
    return out_TD


def _has_many(ids_TK: Tensor, experts: ExpertWeights) -> bool:
    return ids_TK.numel() >= _MANY_ROWS * experts.gate_up_ELD.shape[0]


def _goes_to_deepgemm(x_TD: Tensor, experts: ExpertWeights) -> bool:
    return experts.gate_up_scales is not None and not _why_not(x_TD.dtype, experts.down_EDI.shape[1:])


@functools.cache
def _why_not(dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """Why DeepGEMM does not multiply these FP8 experts, empty if it does; said once."""
    reason = ""
    if dtype != torch.bfloat16 or any(size % 128 for size in sizes):
        reason = f"rows of {dtype} and sizes of {list(sizes)}: it takes bfloat16 and multiples of 128"
    reason = reason or deepgemm.unavailable()
    _log.info("products of many rows of FP8 experts", by="triton" if reason else "deep_gemm", reason=reason)
    return reason


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
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait(PDL)
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
