"""Attention over rows that all query heads share, all of them or selected ones, by splitting positions over programs.

A program takes one token, a lot of its heads and a share of the positions that the token sees; a second kernel joins
the shares by their logarithms of sums. A row's first `LATENT` numbers are its value; key is the whole row. Rows are
gathered one by one, so any selection costs what as many positions in a row cost. Rows of an 8-bit cache are unpacked as
they are read. Scores, sums and shares are fp32.

Shape letters: T new tokens, S sequences, B blocks of a table, K selected positions, H heads, W width of a row, V of its
value, Z shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.rows import TILE, Packed

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_FEW = 8  # equally many new tokens of every sequence, up to which their number is a constant of the kernel


@dataclass(frozen=True)
class Places:
    """Which sequence each token belongs to, and where positions lie.

    `per_sequence`: new tokens of each sequence where all have equally few, else 0, and then `sequence_T` (int32) says
    it. `first`, `window`: as in `common.attention.context.GroupTables`.
    """

    tables_SB: Tensor
    starts_S1: Tensor
    lens_S: Tensor
    block_size: int
    per_sequence: int = 0
    sequence_T: Tensor | None = None
    first: int = 0
    window: int = 0

    @property
    def sequences(self) -> Tensor:
        return self.lens_S if self.sequence_T is None else self.sequence_T


@dataclass(frozen=True)
class Tiles:
    """`heads` and `positions` that a program of `warps` takes at once, with loads for `stages` of them under way.

    A multiprocessor holds one program of many heads, and two of 16.
    """

    heads: int
    positions: int
    warps: int
    stages: int = 2

    @property
    def at_once(self) -> int:
        return 2 if self.heads == 16 else 1


def few(num_tokens: int, num_sequences: int, max_query_len: int, *, recorded: bool) -> int:
    """`Places.per_sequence` of a step. One that is not `recorded` may have any number of new tokens of a sequence."""
    most = _FEW if recorded else 1
    return max_query_len if num_tokens == num_sequences * max_query_len and max_query_len <= most else 0


@triton.jit
def whose(token, sequence_ptr, starts_ptr, lens_ptr, PER_SEQUENCE: tl.constexpr):
    """(sequence, number of positions up to its own) of a token."""
    if PER_SEQUENCE > 0:
        sequence = token // PER_SEQUENCE
        behind = PER_SEQUENCE - 1 - token % PER_SEQUENCE
    else:
        sequence = tl.load(sequence_ptr + token)
        behind = tl.load(starts_ptr + sequence + 1) - 1 - token
    return sequence, tl.load(lens_ptr + sequence) - behind


@triton.jit(do_not_specialize=["table_stride", "positions_stride", "shares"])
def _attend(
    q_ptr,
    q_token_stride,
    q_head_stride,
    cache_ptr,
    scales_ptr,
    halves_ptr,
    block_stride,
    token_stride,
    tables_ptr,
    table_stride,
    sequence_ptr,
    starts_ptr,
    lens_ptr,
    positions_ptr,
    counts_ptr,
    positions_stride,
    out_ptr,
    sums_ptr,
    shares,
    heads,
    scale,
    BLOCK_SIZE: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    FIRST: tl.constexpr,
    WINDOW: tl.constexpr,
    LATENT: tl.constexpr,
    REST: tl.constexpr,
    LATENT_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
    SHARED: tl.constexpr,
    SCALES_AT: tl.constexpr,
    REST_AT: tl.constexpr,
    PACKED: tl.constexpr,
    SELECTED: tl.constexpr,
    WITH_SUMS: tl.constexpr,
):
    """With one share: the result, and logarithms of sums where wanted; with more: fp32 shares, and those to base 2."""
    token, share = tl.program_id(0), tl.program_id(2)
    if not SHARED:
        shares = 1  # a constant: there are no registers to spare
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    sequence, end = whose(token, sequence_ptr, starts_ptr, lens_ptr, PER_SEQUENCE)
    token, sequence = token.to(tl.int64), sequence.to(tl.int64)
    low = FIRST
    if WINDOW > 0:
        low = tl.maximum(end - WINDOW, FIRST)
    count = end - low
    if SELECTED:
        count = tl.load(counts_ptr + token)
    length = tl.cdiv(tl.cdiv(count, POSITIONS), shares) * POSITIONS
    begin = share * length
    stop = tl.minimum(begin + length, count)

    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i, j = tl.arange(0, LATENT_BLOCK), tl.arange(0, REST_BLOCK)
    q = q_ptr + token * q_token_stride + head[:, None] * q_head_stride
    q_latent = tl.load(q + i[None, :], mask=(head[:, None] < heads) & (i[None, :] < LATENT), other=0.0)
    if REST > 0:
        q_rest = tl.load(q + LATENT + j[None, :], mask=(head[:, None] < heads) & (j[None, :] < REST), other=0.0)

    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out = tl.zeros([HEADS, LATENT_BLOCK], tl.float32)
    for at in range(begin, stop, POSITIONS):
        index = at + tl.arange(0, POSITIONS)
        inside = index < stop
        position = low + index
        if SELECTED:
            position = tl.load(positions_ptr + token * positions_stride + index, mask=inside, other=0)
        block = tl.load(tables_ptr + sequence * table_stride + position // BLOCK_SIZE, mask=inside, other=0)
        start = (block.to(tl.int64) * block_stride + position % BLOCK_SIZE * token_stride)[:, None]
        latent = tl.load(cache_ptr + start + i[None, :], mask=inside[:, None] & (i[None, :] < LATENT), other=0.0)
        if PACKED:
            tile = tl.arange(0, LATENT_BLOCK // TILE)
            factor = tl.load(
                scales_ptr + start // 4 + SCALES_AT + tile[None, :],
                mask=inside[:, None] & (tile[None, :] * TILE < LATENT),
                other=0.0,
            )
            tiles = tl.reshape(latent.to(tl.float32), [POSITIONS, LATENT_BLOCK // TILE, TILE]) * factor[:, :, None]
            latent = tl.reshape(tiles.to(dtype), [POSITIONS, LATENT_BLOCK])
        latent = latent.to(dtype)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        if REST > 0:
            source = cache_ptr + start + LATENT
            if PACKED:
                source = halves_ptr + start // 2 + REST_AT
            rest = tl.load(source + j[None, :], mask=inside[:, None] & (j[None, :] < REST), other=0.0).to(dtype)
            scores = tl.dot(q_rest, tl.trans(rest), scores, input_precision="ieee")
        scores = tl.where(inside[None, :], scores * (scale * _LOG2E), float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - peak)
        share_of = tl.exp2(scores - peak[:, None])
        total = total * shrink + tl.sum(share_of, 1)
        out = tl.dot(share_of.to(dtype), latent, out * shrink[:, None], input_precision="ieee")
        top = peak

    place = (token * heads + head) * shares + share
    if (begin < stop) | (not SHARED):
        inverse = 1.0 / total
        row = out_ptr + place[:, None] * LATENT + i[None, :]
        mask = (head[:, None] < heads) & (i[None, :] < LATENT)
        tl.store(row, (out * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    if SHARED:
        tl.store(sums_ptr + place, top + tl.log2(tl.where(begin < stop, total, 1.0)), mask=head < heads)
    elif WITH_SUMS:
        tl.store(sums_ptr + place, (top + tl.log2(total)) * _LN2, mask=head < heads)


@triton.jit(do_not_specialize=["shares"])
def _join(
    shares_ptr,
    share_sums_ptr,
    out_ptr,
    sums_ptr,
    shares,
    LATENT: tl.constexpr,
    LATENT_BLOCK: tl.constexpr,
    SHARES_BLOCK: tl.constexpr,
    WITH_SUMS: tl.constexpr,
):
    """Of one token and head. A share without positions has a sum of 0 and was not written."""
    pair = tl.program_id(0).to(tl.int64)
    z, i = tl.arange(0, SHARES_BLOCK), tl.arange(0, LATENT_BLOCK)
    sums = tl.load(share_sums_ptr + pair * shares + z, mask=z < shares, other=float("-inf"))
    top = tl.max(sums, 0)
    factor = tl.exp2(sums - top)
    total = tl.sum(factor, 0)
    mask = (factor[:, None] > 0.0) & (i[None, :] < LATENT)
    parts = tl.load(shares_ptr + (pair * shares + z[:, None]) * LATENT + i[None, :], mask=mask, other=0.0)
    out = tl.sum(parts * (factor / total)[:, None], 0)
    tl.store(out_ptr + pair * LATENT + i, out.to(out_ptr.dtype.element_ty), mask=i < LATENT)
    if WITH_SUMS:
        tl.store(sums_ptr + pair, (top + tl.log2(total)) * _LN2)


def attend(
    q_THW: Tensor,
    cache: Tensor,
    places: Places,
    value_dim: int,
    scale: float,
    *,
    most: int,
    selected: tuple[Tensor, Tensor] | None = None,
    log_sums_TH: Tensor | None = None,
    packed: bool = False,
    whole: bool = False,
) -> Tensor:
    """A new [T, H, value_dim] of q's type.

    `cache`: [num_blocks, block_size, W], a row's value its first `value_dim` numbers. `selected`: int32 positions
    [T, K] and how many of each row are meant; without it a token sees all up to its own. `most`: no token sees more.
    `whole`: one program takes all positions of a token, so that nothing depends on the other tokens.
    """
    tokens, heads, width = q_THW.shape
    rest, dtype = width - value_dim, q_THW.dtype
    form = Packed.of(cache, value_dim, rest) if packed else None
    stored = cache if form is None else form.bytes8
    latent_block = max(triton.next_power_of_2(value_dim), 128 if packed else 16)
    tiles = _tiles(heads, latent_block, dtype.itemsize, packed)
    lots = triton.cdiv(heads, tiles.heads)
    parts = triton.cdiv(most, tiles.positions)
    shares = 1 if whole else _num_shares(q_THW.device, tokens * lots, parts, tiles.at_once)
    out_THV = torch.empty(tokens, heads, value_dim, dtype=dtype, device=q_THW.device)
    target, sums = out_THV, log_sums_TH if log_sums_TH is not None else out_THV
    if shares > 1:
        target = torch.empty(tokens, heads, shares, value_dim, dtype=torch.float32, device=q_THW.device)
        sums = torch.empty(tokens, heads, shares, dtype=torch.float32, device=q_THW.device)
    positions_TK, counts_T = selected if selected is not None else (places.lens_S, places.lens_S)
    assert q_THW.stride(2) == stored.stride(2) == 1
    _attend[(tokens, lots, shares)](
        q_THW,
        q_THW.stride(0),
        q_THW.stride(1),
        stored,
        stored if form is None else form.scales,
        stored if form is None else form.halves,
        stored.stride(0),
        stored.stride(1),
        places.tables_SB,
        places.tables_SB.stride(0),
        places.sequences,
        places.starts_S1,
        places.lens_S,
        positions_TK,
        counts_T,
        positions_TK.stride(0),
        target,
        sums,
        shares,
        heads,
        scale,
        BLOCK_SIZE=places.block_size,
        PER_SEQUENCE=places.per_sequence,
        FIRST=places.first,
        WINDOW=places.window,
        LATENT=value_dim,
        REST=rest,
        LATENT_BLOCK=latent_block,
        REST_BLOCK=max(triton.next_power_of_2(max(rest, 1)), 16),
        HEADS=tiles.heads,
        POSITIONS=tiles.positions,
        SHARED=shares > 1,
        SCALES_AT=0 if form is None else form.scales_at,
        REST_AT=0 if form is None else form.rope_at,
        PACKED=packed,
        SELECTED=selected is not None,
        WITH_SUMS=log_sums_TH is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if shares > 1:
        _join[(tokens * heads,)](
            target,
            sums,
            out_THV,
            log_sums_TH if log_sums_TH is not None else sums,
            shares,
            LATENT=value_dim,
            LATENT_BLOCK=latent_block,
            SHARES_BLOCK=8 if shares <= 8 else 32,  # few variants to compile
            WITH_SUMS=log_sums_TH is not None,
            num_warps=4,
        )
    return out_THV


def _tiles(heads: int, latent_block: int, itemsize: int, packed: bool) -> Tiles:
    """What a multiprocessor's registers and shared memory hold."""
    if latent_block * itemsize > 1024:  # fp32 rows of latents: for tests and checks, not for speed
        return Tiles(16, 16, 4)
    if packed:  # with two stages rows would be loaded when they are needed
        return Tiles(64, 32, 8, 3) if heads > 32 else Tiles(16, 32, 4, 3)
    if heads > 16:
        return Tiles(64, 64, 8) if heads > 32 else Tiles(32, 32, 8)
    return Tiles(16, 32, 4)


def _num_shares(device: torch.device, programs: int, parts: int, at_once: int) -> int:
    """As many as make all programs run at once, since a share costs a write of its own; a power of two, up to 32."""
    if device.type != "cuda":
        return min(4, triton.next_power_of_2(parts))
    wanted = at_once * torch.cuda.get_device_properties(device).multi_processor_count / programs
    return 1 << max(0, min(math.floor(math.log2(max(wanted, 1))), math.ceil(math.log2(max(parts, 1))), 5))
