"""Rows of latent attention and of indexers on a GPU: stored as they are or packed in 8 bits, gathered, expanded.

What a packed row holds and how its bytes lie is `common.kvcache.packing`'s; `common.attention.packed` is the same in
torch, to the bit. A cache is [num_blocks, 1, 1, block_size, W]; a block's stride is that of a whole block over all
layers, so what is multiplied with it has 64 bits.

Shape letters: T new tokens, P gathered positions, W numbers of a row, H heads, G heads expanded at once, E width of
what is expanded for a head, D width that turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = tl.constexpr(128)  # numbers that share a scale
LARGEST = tl.constexpr(448.0)  # of float8_e4m3fn
LEAST_RATIO = tl.constexpr(1e-4)
_FINITE = tl.constexpr(3.4028234663852886e38)  # largest float32
_TURNED = 4096  # elements of queries that a program turns


@dataclass(frozen=True)
class Packed:
    """Views of a cache of packed rows by type, with where the parts of a row begin, in elements of each.

    `latent` numbers of 8 bits, `num_scales` scales, `rope` bfloat16.
    """

    bytes8: Tensor
    scales: Tensor
    halves: Tensor
    latent: int
    rope: int
    num_scales: int
    scales_at: int
    rope_at: int

    @classmethod
    def of(cls, cache: Tensor, latent: int, rope: int) -> Packed:
        num_scales = -(-latent // 128)
        scales_at = -(-latent // 4)
        rope_at = 2 * (scales_at + num_scales)
        numbers = cache.view(torch.float8_e4m3fn)
        return cls(
            numbers,
            cache.view(torch.float32),
            cache.view(torch.bfloat16),
            latent,
            rope,
            num_scales,
            scales_at,
            rope_at,
        )


@triton.jit
def turn(x_ptr, cos_ptr, sin_ptr, i, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Elements i and i + HALF of what is at `x_ptr`, turned, in fp32."""
    if INTERLEAVED:
        low = tl.load(x_ptr + 2 * i, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(x_ptr + 2 * i + 1, mask=mask, other=0.0).to(tl.float32)
    else:
        low = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(x_ptr + HALF + i, mask=mask, other=0.0).to(tl.float32)
    cos, sin = cos_ptr + i, sin_ptr + i
    inside = i < HALF
    cos_low = tl.load(cos, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + HALF, mask=inside, other=0.0).to(tl.float32)
    return low * cos_low + high * sin_low, high * cos_high + low * sin_high


@triton.jit
def rounded8(x):
    """fp32 of up to LARGEST, to the nearest float8_e4m3fn and of two to the even one, as fp32: casts then agree."""
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    coarse = ((tl.abs(x) + 16384.0) - 16384.0).to(tl.int32, bitcast=True)  # below the least normal number: k * 2^-9
    return tl.where(tl.abs(x) < 0.015625, coarse | (bits & -0x80000000), normal).to(tl.float32, bitcast=True)


@triton.jit
def power_scale(largest):
    """The least power of two that brings `largest` to LARGEST or below, and its inverse."""
    bits = tl.maximum(tl.div_rn(largest, LARGEST), LEAST_RATIO).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_packed(x, tile, column, bytes_ptr, scales_ptr, LATENT: tl.constexpr):
    """Pack fp32 [tiles, TILE] (zero behind the latent) at the beginning of a row, whose views the pointers are."""
    finite = tl.abs(x) <= _FINITE
    broken = tl.min(finite.to(tl.int32), 1) == 0
    scale, inverse = power_scale(tl.max(tl.where(finite, tl.abs(x), 0.0), 1))
    number = tl.where(broken[:, None], 0.0, x * inverse[:, None])
    place = tile[:, None] * TILE + column[None, :]
    tl.store(bytes_ptr + place, rounded8(number).to(bytes_ptr.dtype.element_ty), mask=place < LATENT)
    tl.store(scales_ptr + tile, tl.where(broken, float("nan"), scale), mask=tile * TILE < LATENT)


@triton.jit
def _store(
    row_ptr,
    row_stride,
    weight_ptr,
    eps,
    cos_ptr,
    cos_stride,
    sin_ptr,
    sin_stride,
    slots_ptr,
    cache_ptr,
    scales_ptr,
    halves_ptr,
    block_stride,
    token_stride,
    q_ptr,
    q_token_stride,
    q_head_stride,
    out_ptr,
    out_token_stride,
    out_head_stride,
    heads,
    BLOCK_SIZE: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    TILES: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    SCALES_AT: tl.constexpr,
    ROPE_AT: tl.constexpr,
    NORM: tl.constexpr,
    TURN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Program (t, 0) stores token t's row, (t, 1 + n) turns its nth lot of heads."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    i = tl.arange(0, HALF_BLOCK)
    half_mask = i < ROPE // 2
    cos, sin = cos_ptr + token * cos_stride, sin_ptr + token * sin_stride
    if part == 0:
        tile, column = tl.arange(0, TILES), tl.arange(0, TILE)
        place = tile[:, None] * TILE + column[None, :]
        row = row_ptr + token * row_stride
        x = tl.load(row + place, mask=place < LATENT, other=0.0)
        if NORM:
            x = x.to(tl.float32)
            weight = tl.load(weight_ptr + place, mask=place < LATENT, other=0.0).to(tl.float32)
            x = x * tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / LATENT + eps) * weight
            x = x.to(row_ptr.dtype.element_ty)
            tl.store(row + place, x, mask=place < LATENT)
        slot = tl.load(slots_ptr + token)
        start = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride
        if PACKED:
            store_packed(x.to(tl.float32), tile, column, cache_ptr + start, scales_ptr + start // 4 + SCALES_AT, LATENT)
        else:
            tl.store(cache_ptr + start + place, x.to(cache_ptr.dtype.element_ty), mask=place < LATENT)
        if ROPE > 0:
            rope = row + LATENT
            if TURN:
                low, high = turn(rope, cos, sin, i, half_mask, ROPE // 2, INTERLEAVED)
                low, high = low.to(row_ptr.dtype.element_ty), high.to(row_ptr.dtype.element_ty)
                tl.debug_barrier()  # in place, what one thread writes another reads
                tl.store(rope + i, low, mask=half_mask)
                tl.store(rope + ROPE // 2 + i, high, mask=half_mask)
            else:
                low = tl.load(rope + i, mask=half_mask, other=0.0)
                high = tl.load(rope + ROPE // 2 + i, mask=half_mask, other=0.0)
            stored = cache_ptr + start + LATENT
            if PACKED:
                stored = halves_ptr + start // 2 + ROPE_AT
            tl.store(stored + i, low.to(stored.dtype.element_ty), mask=half_mask)
            tl.store(stored + ROPE // 2 + i, high.to(stored.dtype.element_ty), mask=half_mask)
    else:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)[:, None]
        mask = (head < heads) & half_mask[None, :]
        source = q_ptr + token * q_token_stride + head * q_head_stride
        q_low, q_high = turn(source, cos, sin, i[None, :], mask, ROPE // 2, INTERLEAVED)
        tl.debug_barrier()
        target = out_ptr + token * out_token_stride + head * out_head_stride + i[None, :]
        tl.store(target, q_low.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(target + ROPE // 2, q_high.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Turned:
    """Queries to turn beside a row: `q_THD` into `out_THD`, which may be the same. Last dimensions are contiguous."""

    q_THD: Tensor
    out_THD: Tensor


def store_rows(
    rows_TW: Tensor,
    cache: Tensor,
    slots_T: Tensor,
    latent: int,
    *,
    packed: bool = False,
    norm: tuple[Tensor, float] | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    turned: Turned | None = None,
) -> None:
    """Store rows at their slots (int64, block * block_size + offset), cast to the cache's type.

    `norm`: weight and epsilon of an RMS norm of the first `latent` numbers; `rotation`: (cos, signed sin), [T, 1, D]
    each, of the others. Both are also left in `rows_TW` itself. `turned`: queries that turn the same way.
    """
    tokens, width = rows_TW.shape
    rope = width - latent
    if tokens == 0:
        return
    assert rope % 2 == 0
    assert (rows_TW.stride(1), cache.stride(4)) == (1, 1)
    form = Packed.of(cache, latent, rope) if packed else None
    weight, eps = norm if norm is not None else (rows_TW, 0.0)
    cos, sin = rotation if rotation is not None else (rows_TW, rows_TW)
    half_block = triton.next_power_of_2(max(rope // 2, 1))
    heads, lot = 0, 1
    queries = turned if turned is not None else Turned(rows_TW.unsqueeze(1), rows_TW.unsqueeze(1))
    if turned is not None:
        heads = turned.q_THD.shape[1]
        lot = min(triton.next_power_of_2(heads), max(1, _TURNED // half_block))
        assert (turned.q_THD.stride(2), turned.out_THD.stride(2)) == (1, 1)
    stored = cache if form is None else form.bytes8
    _store[(tokens, 1 + triton.cdiv(heads, lot))](
        rows_TW,
        rows_TW.stride(0),
        weight,
        eps,
        cos,
        cos.stride(0),
        sin,
        sin.stride(0),
        slots_T,
        stored,
        stored if form is None else form.scales,
        stored if form is None else form.halves,
        stored.stride(0),
        stored.stride(3),
        queries.q_THD,
        queries.q_THD.stride(0),
        queries.q_THD.stride(1),
        queries.out_THD,
        queries.out_THD.stride(0),
        queries.out_THD.stride(1),
        heads,
        BLOCK_SIZE=cache.shape[3],
        LATENT=latent,
        ROPE=rope,
        TILES=triton.next_power_of_2(triton.cdiv(latent, 128)),
        HALF_BLOCK=half_block,
        HEADS=lot,
        SCALES_AT=0 if form is None else form.scales_at,
        ROPE_AT=0 if form is None else form.rope_at,
        NORM=norm is not None,
        TURN=rotation is not None,
        INTERLEAVED=interleaved,
        PACKED=packed,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _gather(
    cache_ptr,
    scales_ptr,
    halves_ptr,
    block_stride,
    token_stride,
    slots_ptr,
    out_ptr,
    num_rows,
    BLOCK_SIZE: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SCALES_AT: tl.constexpr,
    ROPE_AT: tl.constexpr,
    PACKED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    slot = tl.load(slots_ptr + row, mask=inside, other=0)
    start = (slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride)[:, None]
    out = out_ptr + row[:, None] * (LATENT + ROPE)
    i = tl.arange(0, LATENT_BLOCK)[None, :]
    mask = inside[:, None] & (i < LATENT)
    x = tl.load(cache_ptr + start + i, mask=mask, other=0.0)
    if PACKED:
        x = x.to(tl.float32) * tl.load(scales_ptr + start // 4 + SCALES_AT + i // TILE, mask=mask, other=0.0)
    tl.store(out + i, x.to(out_ptr.dtype.element_ty), mask=mask)
    if ROPE > 0:
        i = tl.arange(0, ROPE_BLOCK)[None, :]
        mask = inside[:, None] & (i < ROPE)
        source = cache_ptr + start + LATENT
        if PACKED:
            source = halves_ptr + start // 2 + ROPE_AT
        tl.store(out + LATENT + i, tl.load(source + i, mask=mask, other=0.0).to(out_ptr.dtype.element_ty), mask=mask)


def gather_rows(
    cache: Tensor, slots_P: Tensor, latent: int, rope: int, dtype: torch.dtype, *, packed: bool = False
) -> Tensor:
    """The rows at these slots (int64), unpacked: a new [P, latent + rope] of `dtype`."""
    out_PW = torch.empty(slots_P.shape[0], latent + rope, dtype=dtype, device=cache.device)
    form = Packed.of(cache, latent, rope) if packed else None
    stored = cache if form is None else form.bytes8
    rows = 4
    _gather[(triton.cdiv(max(slots_P.shape[0], 1), rows),)](
        stored,
        stored if form is None else form.scales,
        stored if form is None else form.halves,
        stored.stride(0),
        stored.stride(3),
        slots_P,
        out_PW,
        slots_P.shape[0],
        BLOCK_SIZE=cache.shape[3],
        LATENT=latent,
        ROPE=rope,
        LATENT_BLOCK=triton.next_power_of_2(latent),
        ROPE_BLOCK=triton.next_power_of_2(max(rope, 1)),
        ROWS=rows,
        SCALES_AT=0 if form is None else form.scales_at,
        ROPE_AT=0 if form is None else form.rope_at,
        PACKED=packed,
        num_warps=4,
    )
    return out_PW


@triton.jit(do_not_specialize=["num_pairs"])
def _keys(
    kv_ptr,
    kv_row_stride,
    kv_head_stride,
    rope_ptr,
    rope_stride,
    out_ptr,
    num_pairs,
    heads,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A pair is a position and a head."""
    pair = (tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS))[:, None]
    position, head = pair // heads, pair % heads
    i = tl.arange(0, BLOCK)[None, :]
    inside = pair < num_pairs
    nope = tl.load(kv_ptr + position * kv_row_stride + head * kv_head_stride + i, mask=inside & (i < NOPE), other=0.0)
    turned = inside & (i >= NOPE) & (i < NOPE + ROPE)
    rope = tl.load(rope_ptr + position * rope_stride + (i - NOPE), mask=turned, other=0.0)
    tl.store(out_ptr + pair * (NOPE + ROPE) + i, tl.where(i < NOPE, nope, rope), mask=inside & (i < NOPE + ROPE))


def expand_keys(kv_PGE: Tensor, rope_PD: Tensor, nope: int) -> Tensor:
    """Keys of heads, [first `nope` numbers of a head | the rope part that all heads share]: a new [P, G, nope + D]."""
    positions, heads, rope = kv_PGE.shape[0], kv_PGE.shape[1], rope_PD.shape[1]
    out_PGD = torch.empty(positions, heads, nope + rope, dtype=kv_PGE.dtype, device=kv_PGE.device)
    block = triton.next_power_of_2(nope + rope)
    pairs = max(1, 2048 // block)
    _keys[(triton.cdiv(positions * heads, pairs),)](
        kv_PGE,
        kv_PGE.stride(0),
        kv_PGE.stride(1),
        rope_PD,
        rope_PD.stride(0),
        out_PGD,
        positions * heads,
        heads,
        NOPE=nope,
        ROPE=rope,
        BLOCK=block,
        PAIRS=pairs,
        num_warps=4,
    )
    return out_PGD
