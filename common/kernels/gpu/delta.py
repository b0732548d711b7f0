"""Gated delta nets between their projections (`common.kernels.delta_ops`), for steps of any sequences.

    few new tokens   one kernel: a program holds the state of a head in registers and takes token by token, from the
                     convolution to the gated norm
    more             in chunks (`common.kernels.gpu.delta_chunks`)
    both             the last inputs are kept for the next step, when all have read those from before

Which way a sequence takes follows from its own number of new tokens: its bits depend on no other sequence of the step.
Token by token they do not depend on the cuts of a prompt either, so `fixed` lets every sequence go that way. Nothing
is read back: shapes and the longest sequence decide what is launched, so that a step can be recorded.

Several sequences may name one block if nobody reads what comes of them (padding): what it holds then is one of theirs,
or a mixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu import delta_chunks
from common.kernels.gpu.conv import keep_inputs, mixed_token
from common.kernels.gpu.delta_chunks import softplus
from common.kernels.gpu.launch import let_next_start, pdl, wait

if TYPE_CHECKING:
    from common.kernels.delta_ops import DeltaInputs, DeltaWeights

FEW = 16  # new tokens: about as long one by one as the launches of chunks


@triton.jit(do_not_specialize=["few", "x_stride"])  # of a single token it means nothing, and must decide nothing
def _one_by_one(
    q_ptr,
    k_ptr,
    v_ptr,
    z_ptr,
    b_ptr,
    a_ptr,
    taps_ptr,
    rate_ptr,
    dt_bias_ptr,
    norm_ptr,
    kept_ptr,
    state_ptr,
    blocks_ptr,
    starts_ptr,
    out_ptr,
    x_stride,
    qk_stride,
    v_stride,
    z_stride,
    gate_stride,
    kept_block_stride,
    kept_part_stride,
    kept_unit_stride,
    state_block_stride,
    state_head_stride,
    few,
    eps,
    unit_eps,
    q_scale,
    HEADS: tl.constexpr,
    PER_UNIT: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    TAPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """All new tokens of a head of a sequence that has at most `few`."""
    let_next_start(PDL)
    head, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    unit, r = head // PER_UNIT, head % PER_UNIT
    BLOCK_K: tl.constexpr = triton.next_power_of_2(KEY)
    BLOCK_V: tl.constexpr = triton.next_power_of_2(VALUE)
    UNIT: tl.constexpr = 2 * KEY + PER_UNIT * VALUE
    i, j = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    has_i, has_j = i < KEY, j < VALUE
    rate, dt_bias = tl.load(rate_ptr + head), tl.load(dt_bias_ptr + head)
    weight = tl.load(norm_ptr + j, mask=has_j, other=0.0).to(tl.float32)
    taps_ptr += unit * TAPS * UNIT
    wait(PDL)
    first = tl.load(starts_ptr + s).to(tl.int64)
    count = (tl.load(starts_ptr + s + 1) - first).to(tl.int32)
    if count > few:
        return
    block = tl.load(blocks_ptr + s)
    place = block * state_block_stride + head * state_head_stride + i[:, None] * VALUE + j[None, :]
    has = has_i[:, None] & has_j[None, :]
    state = tl.load(state_ptr + place, mask=has, other=0.0)
    kept_ptr += block * kept_block_stride + unit * kept_unit_stride
    q_ptr += unit * qk_stride
    k_ptr += unit * qk_stride
    v_ptr += unit * v_stride + r * VALUE
    at_v = 2 * KEY + r * VALUE
    for n in range(count):
        t = first + n
        q = mixed_token(q_ptr, kept_ptr, taps_ptr, t, first, x_stride, kept_part_stride, UNIT, TAPS, KEY, BLOCK_K)
        k = mixed_token(
            k_ptr, kept_ptr + KEY, taps_ptr + KEY, t, first, x_stride, kept_part_stride, UNIT, TAPS, KEY, BLOCK_K
        )
        v = mixed_token(
            v_ptr, kept_ptr + at_v, taps_ptr + at_v, t, first, x_stride, kept_part_stride, UNIT, TAPS, VALUE, BLOCK_V
        )
        q *= tl.rsqrt(tl.sum(q * q, 0) + unit_eps) * q_scale
        k *= tl.rsqrt(tl.sum(k * k, 0) + unit_eps)
        gate = t * x_stride + unit * gate_stride + r
        a = tl.load(a_ptr + gate).to(tl.float32)
        beta = tl.sigmoid(tl.load(b_ptr + gate).to(tl.float32))
        state *= tl.exp(softplus(a + dt_bias) * rate)
        u = (v - tl.sum(state * k[:, None], 0)) * beta
        state += k[:, None] * u[None, :]
        o = tl.sum(state * q[:, None], 0)
        z = tl.load(z_ptr + t * x_stride + unit * z_stride + r * VALUE + j, mask=has_j, other=0.0).to(tl.float32)
        o = o * tl.rsqrt(tl.sum(o * o, 0) / VALUE + eps) * weight * (z / (1.0 + tl.exp(-z)))
        tl.store(out_ptr + (t * HEADS + head) * VALUE + j, o.to(out_ptr.dtype.element_ty), mask=has_j)
    tl.store(state_ptr + place, state, mask=has)


def delta_net(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    kept: Tensor,
    state: Tensor,
    blocks_S: Tensor,
    query_starts_S1: Tensor,
    *,
    unit_eps: float,
    max_query_len: int,
    fixed: bool,
    shared: dict[str, Any],
) -> Tensor:
    """As `common.kernels.delta_ops.delta_net`, for strides that are regular. `shared`: what layers of a step share."""
    q, k, v = inputs.q_TGK, inputs.k_TGK, inputs.v
    tokens, units, key = q.shape
    heads, value = len(weights.rate_H), len(weights.norm_V)
    out = torch.empty((tokens, heads * value), dtype=q.dtype, device=q.device)
    few, use_pdl = max_query_len if fixed else FEW, pdl(q.device)
    taps = weights.taps_GWC.shape[1]
    _one_by_one[(heads, len(blocks_S))](
        *(q, k, v, inputs.z, inputs.b_TGR, inputs.a_TGR),
        *(weights.taps_GWC, weights.rate_H, weights.dt_bias_H, weights.norm_V),
        *(kept, state, blocks_S, query_starts_S1, out),
        *(q.stride(0), q.stride(1), v.stride(1), inputs.z.stride(1), inputs.b_TGR.stride(1)),
        *kept.stride()[:3],
        *(state.stride(0), state.stride(2)),
        *(few, weights.eps, unit_eps, key**-0.5),
        HEADS=heads,
        PER_UNIT=heads // units,
        KEY=key,
        VALUE=value,
        TAPS=taps,
        PDL=use_pdl,
        num_warps=_num_warps(key, value),
        launch_pdl=use_pdl,
    )
    if max_query_len > few:
        chunks = shared.get("delta_chunks")
        if chunks is None:
            chunks = shared["delta_chunks"] = delta_chunks.cut(query_starts_S1, tokens, few)
        delta_chunks.delta_net(inputs, weights, kept, state, blocks_S, query_starts_S1, chunks, out, few, unit_eps)
    keep_inputs[(units, len(blocks_S))](
        *(q, k, v, kept, blocks_S, query_starts_S1),
        *(q.stride(0), q.stride(1), v.stride(1)),
        *kept.stride()[:3],
        KEY_WIDTH=key,
        VALUES_WIDTH=v.shape[2],
        KEPT=taps - 1,
        PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )
    return out


def _num_warps(key: int, value: int) -> int:
    """128 numbers of a state in the registers of a thread, of which it may have all: held to 128 it spills, and a
    decode step takes 1.7 to 1.9 times as long (H100, batch 8 to 256).
    """
    return min(16, max(1, triton.next_power_of_2(key) * triton.next_power_of_2(value) // 4096))
