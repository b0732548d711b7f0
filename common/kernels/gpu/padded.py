"""FP8 experts with many rows each: tiles of 128 rows side by side, multiplied by DeepGEMM.

Row i of tile b is row b * 128 + i, and a tile's rows behind its last are whatever memory holds: nobody reads their
results. The number of tiles is what shapes allow for; rows of tiles that there are not have expert -1.

In bf16 the gathering kernel of `products` is faster than this with DeepGEMM's (H100, 1024 to 16384 tokens).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.expert_weights import ExpertWeights
from common.kernels.gpu import deepgemm, fp8, routing
from common.kernels.gpu.launch import let_next_start, pdl, wait

_ROWS = deepgemm.GROUP_ROWS


def expert_rows(x_TD: Tensor, ids_TK: Tensor, experts: ExpertWeights, limit: float) -> tuple[Tensor, Tensor]:
    """Results of all rows [R, D], and of each pair the row that it is, int64 [P]."""
    num_experts, hidden_size, size = experts.down_EDI.shape
    assert experts.gate_up_scales is not None
    assert experts.down_scales is not None
    rows, experts_R, places_P = spread(x_TD, ids_TK, num_experts)
    gate_up_RL = x_TD.new_empty(len(experts_R), 2 * size)
    deepgemm.grouped_fp8(rows, (experts.gate_up_ELD, experts.gate_up_scales), gate_up_RL, experts_R)
    inner = fp8.silu_mul_quantise(gate_up_RL, limit, experts_R)
    y_RD = x_TD.new_empty(len(experts_R), hidden_size)
    deepgemm.grouped_fp8(inner, (experts.down_EDI, experts.down_scales), y_RD, experts_R)
    return y_RD, places_P


def spread(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Rows of tiles, quantised, and their scales; experts int32 [R]; the rows of pairs int64 [P]."""
    tiles = routing.tile_map(ids_TK, num_experts, _ROWS)
    rows, width = tiles.expert_B.numel() * _ROWS, x_TD.shape[1]
    device = x_TD.device
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(width // 128, rows, dtype=torch.float32, device=device).t()
    experts_R = torch.empty(rows, dtype=torch.int32, device=device)
    places_P = torch.empty(ids_TK.numel(), dtype=torch.int64, device=device)
    use_pdl = pdl(device)
    _spread[(rows,)](
        x_TD,
        out,
        scales,
        tiles.order_P,
        tiles.expert_B,
        tiles.first_row_B,
        tiles.end_row_B,
        experts_R,
        places_P,
        x_TD.stride(0),
        out.stride(0),
        scales.stride(1),
        width,
        TOP_K=ids_TK.shape[1],
        ROWS=_ROWS,
        BLOCK=min(2048, triton.next_power_of_2(width)),
        PDL=use_pdl,
        launch_pdl=use_pdl,
        num_warps=4,
    )
    return (out, scales), experts_R, places_P


@triton.jit
def _spread(
    x_ptr,
    out_ptr,
    scales_ptr,
    order_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    experts_ptr,
    places_ptr,
    x_stride,
    out_stride,
    scales_stride,
    width,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of a tile. Half a tile without rows has no expert either: what is multiplied is half a tile at least."""
    let_next_start(PDL)
    wait(PDL)
    r = tl.program_id(0)
    b, i = r // ROWS, r % ROWS
    expert, first, end = tl.load(expert_ptr + b), tl.load(first_ptr + b), tl.load(end_ptr + b)
    HALF: tl.constexpr = ROWS // 2
    tl.store(experts_ptr + r, tl.where(first + i // HALF * HALF < end, expert, -1))
    if first + i >= end:
        return
    pair = tl.load(order_ptr + first + i)
    tl.store(places_ptr + pair, r.to(tl.int64))
    x_ptr += (pair // TOP_K).to(tl.int64) * x_stride
    out_ptr += r.to(tl.int64) * out_stride
    for base in range(0, width, BLOCK):
        d = base + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + d, mask=d < width, other=0.0)
        x_G = x.to(tl.float32).reshape(BLOCK // 128, 128)
        scale = tl.maximum(tl.max(tl.abs(x_G), 1), 1e-10) / 448.0
        g = base // 128 + tl.arange(0, BLOCK // 128)
        tl.store(scales_ptr + g.to(tl.int64) * scales_stride + r, scale, mask=g < width // 128)
        x = (x_G * (1.0 / scale)[:, None]).to(tl.float8e4nv).reshape(BLOCK)
        tl.store(out_ptr + d, x, mask=d < width)
