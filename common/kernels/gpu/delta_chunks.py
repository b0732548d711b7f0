"""The gated delta rule for many new tokens, in chunks (`common.kernels.delta_rule` has the formulas).

    convolve   q, k and v of all chunks at once
    solve      what needs no state, all chunks at once: the inverse of a chunk's triangular system, the attention of its
               tokens to each other, what decays
    scan       chunk by chunk, each program some columns of a head's state
    norm       of whole heads, let through by silu(z)

Products take numbers of the model's type (fp32 as three of tf32) and add up in fp32; the state and all gates are fp32,
sums of decays fp64. An inverse is found row by row in blocks of 16, which are then joined from the top down: as exact
as solving, where a series of powers would cancel (equal keys that are all to be learnt give powers of 1e18).

Shape letters as in `common.kernels.delta_ops`; also N chunks, 64 tokens of one at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.conv import mixed_tile
from common.kernels.gpu.launch import let_next_start, pdl, wait

if TYPE_CHECKING:
    from common.kernels.delta_ops import DeltaInputs, DeltaWeights

CHUNK = 64
_COLUMNS = 32  # of a state, for one program


@triton.jit
def softplus(x):
    """log(1 + exp(x)), as exact for small results as for large ones."""
    e = tl.exp(tl.minimum(x, 20.0))
    small = e * (1.0 - e * (0.5 - e * (0.33333334 - 0.25 * e)))
    return tl.where(x > 20.0, x, tl.where(e < 0.01, small, tl.log(1.0 + e)))


@triton.jit(do_not_specialize=["num_sequences", "few"])
def _cut(starts_ptr, chunks_ptr, num_sequences, few, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """A sequence's chunks behind those of the sequences before it."""
    s, i = tl.program_id(0), tl.arange(0, BLOCK)
    mask = i < num_sequences
    counts = tl.load(starts_ptr + i + 1, mask=mask, other=0) - tl.load(starts_ptr + i, mask=mask, other=0)
    chunks = tl.where(counts > few, (counts + SIZE - 1) // SIZE, 0)
    place = chunks_ptr + 3 * tl.sum(tl.where(i < s, chunks, 0), 0)
    first, end = tl.load(starts_ptr + s), tl.load(starts_ptr + s + 1)
    if end - first > few:
        for at in range(first, end, SIZE):
            tl.store(place, at)
            tl.store(place + 1, tl.minimum(end - at, SIZE))
            tl.store(place + 2, s)
            place += 3


@triton.jit
def _convolve(
    q_ptr,
    k_ptr,
    v_ptr,
    taps_ptr,
    kept_ptr,
    blocks_ptr,
    starts_ptr,
    chunks_ptr,
    out_ptr,
    x_stride,
    qk_stride,
    v_stride,
    kept_block_stride,
    kept_part_stride,
    kept_unit_stride,
    unit_eps,
    q_scale,
    UNITS: tl.constexpr,
    PER_UNIT: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    TAPS: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of a chunk one part of a unit: q, k, or a value head."""
    let_next_start(PDL)
    wait(PDL)
    parts: tl.constexpr = 2 + PER_UNIT
    unit, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    chunk = chunks_ptr + 3 * tl.program_id(1)
    count = tl.load(chunk + 1)
    if count == 0:
        return
    s = tl.load(chunk + 2)
    begin = tl.load(starts_ptr + s).to(tl.int64)
    UNIT: tl.constexpr = 2 * KEY + PER_UNIT * VALUE
    BLOCK: tl.constexpr = triton.next_power_of_2(max(KEY, VALUE))
    i, column = tl.arange(0, SIZE)[:, None], tl.arange(0, BLOCK)[None, :]
    r = part - 2
    width = tl.where(part < 2, KEY, VALUE)
    channel = tl.where(part < 2, part * KEY, 2 * KEY + r * VALUE)
    x_ptr = tl.where(part == 0, q_ptr + unit * qk_stride, k_ptr + unit * qk_stride)
    x_ptr = tl.where(part < 2, x_ptr, v_ptr + unit * v_stride + r * VALUE)
    t = tl.load(chunk).to(tl.int64) + i
    kept_ptr += tl.load(blocks_ptr + s) * kept_block_stride + unit * kept_unit_stride + channel
    taps_ptr += unit * TAPS * UNIT + channel
    has, has_column = i < count, column < width
    x = mixed_tile(x_ptr, kept_ptr, taps_ptr, t, begin, column, has, has_column, x_stride, kept_part_stride, UNIT, TAPS)
    if part < 2:
        x *= tl.rsqrt(tl.sum(x * x, 1) + unit_eps)[:, None] * tl.where(part == 0, q_scale, 1.0)
    tl.store(
        out_ptr + (t * UNITS + unit) * UNIT + channel + column, x.to(out_ptr.dtype.element_ty), mask=has & has_column
    )


@triton.jit
def _inverse(system, SIZE: tl.constexpr):
    """Of 1 + `system`, strictly lower triangular [SIZE, SIZE] in fp32."""
    B: tl.constexpr = 16
    N: tl.constexpr = SIZE // B
    here = (tl.arange(0, N)[:, None] == tl.arange(0, N)[None, :])[:, None, :, None]
    inside = tl.where(here, tl.reshape(system, [N, B, N, B]), 0.0)
    below = -tl.sum(inside, 2)
    row, column = tl.arange(0, B)[None, :, None], tl.arange(0, B)[None, None, :]
    for i in range(1, B):
        mine = tl.sum(tl.where(row == i, below, 0.0), 1)
        mine += tl.sum(mine[:, :, None] * below, 1)
        below = tl.where(row == i, mine[:, None, :], below)
    below = tl.where(row == column, 1.0, below)
    blocks = tl.reshape(tl.where(here, below[:, :, None, :], 0.0), [SIZE, SIZE])
    i, j = tl.arange(0, SIZE)[:, None] // B, tl.arange(0, SIZE)[None, :] // B
    between = tl.dot(blocks, tl.where(i > j, system, 0.0), input_precision="tf32x3")
    found = blocks
    for _ in tl.static_range(N - 1):  # one more row of blocks is right each time
        found = blocks - tl.dot(between, found, input_precision="tf32x3")
    return found


@triton.jit(do_not_specialize=["num_gates"])
def _solve(
    b_ptr,
    a_ptr,
    rate_ptr,
    dt_bias_ptr,
    mixed_ptr,
    chunks_ptr,
    inverse_ptr,
    scores_ptr,
    gates_ptr,
    x_stride,
    gate_stride,
    num_gates,
    UNITS: tl.constexpr,
    PER_UNIT: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of a chunk and a head: inverse and scores [tokens, H, SIZE]; gates [3, tokens, H], what is left of the state
    before a token, of a token at the end, and beta.
    """
    let_next_start(PDL)
    wait(PDL)
    head = tl.program_id(0).to(tl.int64)
    unit, r = head // PER_UNIT, head % PER_UNIT
    chunk = chunks_ptr + 3 * tl.program_id(1)
    count = tl.load(chunk + 1)
    if count == 0:
        return
    UNIT: tl.constexpr = 2 * KEY + PER_UNIT * VALUE
    HEADS: tl.constexpr = UNITS * PER_UNIT
    BLOCK_K: tl.constexpr = max(16, triton.next_power_of_2(KEY))
    i = tl.arange(0, SIZE)
    t, has = tl.load(chunk).to(tl.int64) + i, i < count
    d = tl.arange(0, BLOCK_K)[None, :]
    rows = mixed_ptr + (t[:, None] * UNITS + unit) * UNIT + d
    q = tl.load(rows, mask=has[:, None] & (d < KEY), other=0.0)
    k = tl.load(rows + KEY, mask=has[:, None] & (d < KEY), other=0.0)
    gate = t * x_stride + unit * gate_stride + r
    a = tl.load(a_ptr + gate, mask=has, other=0.0).to(tl.float32)
    beta = tl.sigmoid(tl.load(b_ptr + gate, mask=has, other=0.0).to(tl.float32))
    decay = softplus(a + tl.load(dt_bias_ptr + head)) * tl.load(rate_ptr + head)
    decay = tl.where(has, decay, 0.0).to(tl.float64)
    total = tl.cumsum(decay, 0)
    j = tl.arange(0, SIZE)[None, :]
    seen = (i[:, None] >= j) & has[:, None]
    between = tl.where(seen, total[:, None] - total[None, :], 0.0).to(tl.float32)
    between = tl.where(seen, tl.exp(between), 0.0)
    system = tl.dot(k, tl.trans(k), input_precision="tf32x3") * between * beta[:, None]
    inverse = _inverse(tl.where(i[:, None] > j, system, 0.0), SIZE)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * between
    place = (t * HEADS + head)[:, None] * SIZE + j
    dtype: tl.constexpr = scores_ptr.dtype.element_ty
    tl.store(inverse_ptr + place, inverse.to(dtype), mask=has[:, None])
    tl.store(scores_ptr + place, scores.to(dtype), mask=has[:, None])
    place = t * HEADS + head
    tl.store(gates_ptr + place, tl.exp(total.to(tl.float32)), mask=has)
    left = tl.exp((tl.sum(decay, 0) - total).to(tl.float32))
    tl.store(gates_ptr + num_gates + place, left, mask=has)
    tl.store(gates_ptr + 2 * num_gates + place, beta, mask=has)


@triton.jit(do_not_specialize=["few", "num_gates"])
def _scan(
    mixed_ptr,
    inverse_ptr,
    scores_ptr,
    gates_ptr,
    state_ptr,
    blocks_ptr,
    starts_ptr,
    out_ptr,
    state_block_stride,
    state_head_stride,
    num_gates,
    few,
    UNITS: tl.constexpr,
    PER_UNIT: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """All chunks of some columns of a head of a sequence with more than `few` new tokens."""
    let_next_start(PDL)
    wait(PDL)
    head, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    unit, r = head // PER_UNIT, head % PER_UNIT
    first = tl.load(starts_ptr + s).to(tl.int64)
    count = (tl.load(starts_ptr + s + 1) - first).to(tl.int32)
    if count <= few:
        return
    UNIT: tl.constexpr = 2 * KEY + PER_UNIT * VALUE
    HEADS: tl.constexpr = UNITS * PER_UNIT
    BLOCK_K: tl.constexpr = max(16, triton.next_power_of_2(KEY))
    dtype: tl.constexpr = mixed_ptr.dtype.element_ty
    d, i = tl.arange(0, BLOCK_K), tl.arange(0, SIZE)
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    state_ptr += tl.load(blocks_ptr + s) * state_block_stride + head * state_head_stride
    place = state_ptr + d[:, None] * VALUE + column[None, :]
    has_state = (d < KEY)[:, None] & (column < VALUE)[None, :]
    state = tl.load(place, mask=has_state, other=0.0)
    for at in tl.range(0, count, SIZE, num_stages=STAGES):
        has = i < count - at
        t = first + at + i
        has_keys, has_values = has[:, None] & (d < KEY)[None, :], has[:, None] & (column < VALUE)[None, :]
        rows = mixed_ptr + (t[:, None] * UNITS + unit) * UNIT
        q = tl.load(rows + d[None, :], mask=has_keys, other=0.0)
        k = tl.load(rows + KEY + d[None, :], mask=has_keys, other=0.0)
        v = tl.load(rows + 2 * KEY + r * VALUE + column[None, :], mask=has_values, other=0.0).to(tl.float32)
        square = (t * HEADS + head)[:, None] * SIZE + i[None, :]
        inverse = tl.load(inverse_ptr + square, mask=has[:, None], other=0.0)
        scores = tl.load(scores_ptr + square, mask=has[:, None], other=0.0)
        gates = gates_ptr + t * HEADS + head
        kept = tl.load(gates, mask=has, other=0.0)
        left = tl.load(gates + num_gates, mask=has, other=0.0)
        beta = tl.load(gates + 2 * num_gates, mask=has, other=0.0)
        last = first + tl.minimum(at + SIZE, count) - 1
        whole = tl.load(gates_ptr + last * HEADS + head)
        known = state.to(dtype)
        said = tl.dot(k, known, input_precision="tf32x3") * kept[:, None]
        wanted = ((v - said) * beta[:, None]).to(dtype)
        u = tl.dot(inverse, wanted, input_precision="tf32x3")
        out = tl.dot(q, known, input_precision="tf32x3") * kept[:, None]
        out += tl.dot(scores, u.to(dtype), input_precision="tf32x3")
        tl.store(
            out_ptr + (t * HEADS + head)[:, None] * VALUE + column[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=has_values,
        )
        state = state * whole
        state += tl.dot(tl.trans(k), (u * left[:, None]).to(dtype), input_precision="tf32x3")
    tl.store(place, state, mask=has_state)


@triton.jit
def _norm(
    z_ptr,
    norm_ptr,
    chunks_ptr,
    out_ptr,
    x_stride,
    z_stride,
    eps,
    HEADS: tl.constexpr,
    PER_UNIT: tl.constexpr,
    VALUE: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of a chunk and a head, in place."""
    let_next_start(PDL)
    column = tl.arange(0, triton.next_power_of_2(VALUE))[None, :]
    weight = tl.load(norm_ptr + column, mask=column < VALUE, other=0.0).to(tl.float32)
    wait(PDL)
    head = tl.program_id(0).to(tl.int64)
    chunk = chunks_ptr + 3 * tl.program_id(1)
    count = tl.load(chunk + 1)
    i = tl.arange(0, SIZE)[:, None]
    has = (i < count) & (column < VALUE)
    t = tl.load(chunk).to(tl.int64) + i
    z_ptr += head // PER_UNIT * z_stride + head % PER_UNIT * VALUE
    z = tl.load(z_ptr + t * x_stride + column, mask=has, other=0.0).to(tl.float32)
    place = out_ptr + (t * HEADS + head) * VALUE + column
    o = tl.load(place, mask=has, other=0.0).to(tl.float32)
    o = o * tl.rsqrt(tl.sum(o * o, 1) / VALUE + eps)[:, None] * weight * (z / (1.0 + tl.exp(-z)))
    tl.store(place, o.to(out_ptr.dtype.element_ty), mask=has)


def cut(query_starts_S1: Tensor, num_tokens: int, few: int) -> Tensor:
    """The chunks of all sequences with more than `few` new tokens: int32 [N, 3], first token, tokens, sequence.

    N is what there may be at most; those that there are not have no tokens.
    """
    num_sequences = len(query_starts_S1) - 1
    most = num_tokens // CHUNK + min(num_sequences, num_tokens // (few + 1))
    chunks_N3 = torch.zeros(max(1, most), 3, dtype=torch.int32, device=query_starts_S1.device)
    _cut[(num_sequences,)](
        query_starts_S1,
        chunks_N3,
        num_sequences,
        few,
        BLOCK=max(512, triton.next_power_of_2(num_sequences)),  # hardly ever another kernel
        SIZE=CHUNK,
        num_warps=1,
    )
    return chunks_N3


def delta_net(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    kept: Tensor,
    state: Tensor,
    blocks_S: Tensor,
    query_starts_S1: Tensor,
    chunks_N3: Tensor,
    out: Tensor,
    few: int,
    unit_eps: float,
) -> None:
    """`out` [T, H * V] of all sequences with more than `few` new tokens, and their states; what they keep stays."""
    q, v, z = inputs.q_TGK, inputs.v, inputs.z
    (tokens, units, key), device = q.shape, q.device
    heads, value = len(weights.rate_H), len(weights.norm_V)
    per_unit, num_chunks, use_pdl = heads // units, len(chunks_N3), pdl(device)
    mixed = torch.empty((tokens, units, 2 * key + v.shape[2]), dtype=q.dtype, device=device)
    inverse, scores = (torch.empty((tokens, heads, CHUNK), dtype=q.dtype, device=device) for _ in range(2))
    gates = torch.empty((3, tokens, heads), dtype=torch.float32, device=device)
    sizes = {"PER_UNIT": per_unit, "VALUE": value, "SIZE": CHUNK}
    launch = {"PDL": use_pdl, "launch_pdl": use_pdl, "num_warps": 4}
    _convolve[(units * (2 + per_unit), num_chunks)](
        *(q, inputs.k_TGK, v, weights.taps_GWC, kept, blocks_S, query_starts_S1, chunks_N3, mixed),
        *(q.stride(0), q.stride(1), v.stride(1), *kept.stride()[:3], unit_eps, key**-0.5),
        UNITS=units,
        KEY=key,
        TAPS=weights.taps_GWC.shape[1],
        **sizes,
        **launch | {"num_warps": 8},
    )
    _solve[(heads, num_chunks)](
        *(inputs.b_TGR, inputs.a_TGR, weights.rate_H, weights.dt_bias_H, mixed, chunks_N3, inverse, scores, gates),
        *(inputs.b_TGR.stride(0), inputs.b_TGR.stride(1), tokens * heads),
        UNITS=units,
        KEY=key,
        **sizes,
        **launch,
    )
    columns = min(_COLUMNS, max(16, triton.next_power_of_2(value)))
    _scan[(triton.cdiv(value, columns), heads, len(blocks_S))](
        *(mixed, inverse, scores, gates, state, blocks_S, query_starts_S1, out),
        *(state.stride(0), state.stride(2), tokens * heads, few),
        UNITS=units,
        KEY=key,
        BLOCK_V=columns,
        STAGES=1 if q.dtype == torch.float32 else 2,
        **sizes,
        **launch,
    )
    _norm[(heads, num_chunks)](
        *(z, weights.norm_V, chunks_N3, out, q.stride(0), z.stride(1), weights.eps),
        HEADS=heads,
        **sizes,
        **launch,
    )
