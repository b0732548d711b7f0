"""The lightning indexer on a GPU: scores of all positions, and the best of them, exactly.

    scores    a program takes a few tokens and a share of the positions: [positions, heads] products, in fp32 from there
    top-k     a radix select over scores as whole numbers of the same order, in four passes of 8 bits. A row is cut in
              segments; each pass counts digits by segment, and the next one knows from all counts which digit the
              last score taken has. Counts by segment also say where each segment's part of the result begins, so it
              comes out in order of position, and of equal scores the lower positions are taken.

Nothing depends on the host: lengths are read on the device, so a recorded step may be replayed with others.

Shape letters: T new tokens, H heads, D width of a key, L positions (the widest row of scores), K positions taken, G
segments of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.rows import Packed
from common.kernels.gpu.sparse_latent import Places, whose

_DIGITS = tl.constexpr(256)
_PASSES = 4
_CHUNK = 2048  # scores that a program of the selection takes at once
_MOST_SEGMENTS = 16
_KEYS = 128  # that a program scores at once


@triton.jit
def _score(
    q_ptr,
    q_token_stride,
    q_head_stride,
    weights_ptr,
    weights_stride,
    keys_ptr,
    scales_ptr,
    block_stride,
    token_stride,
    tables_ptr,
    table_stride,
    sequence_ptr,
    starts_ptr,
    lens_ptr,
    out_ptr,
    out_stride,
    num_tokens,
    heads,
    scale,
    BLOCK_SIZE: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    SHARES: tl.constexpr,
    SCALES_AT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Tokens of a program may belong to several sequences: each is gone through for those that are its own."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    first = tl.program_id(0) * TOKENS
    share = tl.program_id(1)
    token = first + tl.arange(0, TOKENS)
    safe = tl.minimum(token, num_tokens - 1)
    sequence, end = whose(safe, sequence_ptr, starts_ptr, lens_ptr, PER_SEQUENCE)
    end = tl.where(token < num_tokens, end, 0)
    column = tl.arange(0, TOKENS * HEADS)  # token by token, its heads
    column_token = tl.minimum(first + column // HEADS, num_tokens - 1).to(tl.int64)
    column_head = column % HEADS
    i = tl.arange(0, WIDTH_BLOCK)
    q = tl.load(
        q_ptr + (column_token * q_token_stride + column_head * q_head_stride)[:, None] + i[None, :],
        mask=(column_head < heads)[:, None] & (i[None, :] < WIDTH),
        other=0.0,
    )
    weight = tl.load(weights_ptr + column_token * weights_stride + column_head, mask=column_head < heads, other=0.0)
    out_row = out_ptr + safe.to(tl.int64)[None, :] * out_stride

    for s in range(tl.min(sequence, 0), tl.max(sequence, 0) + 1):
        seen = tl.where(sequence == s, end, 0)
        most = tl.max(seen, 0)
        length = tl.cdiv(tl.cdiv(most, KEYS), SHARES) * KEYS
        begin = share * length
        for at in range(begin, tl.minimum(begin + length, most), KEYS):
            position = at + tl.arange(0, KEYS)
            inside = position < most
            block = tl.load(tables_ptr + s * table_stride + position // BLOCK_SIZE, mask=inside, other=0)
            start = block.to(tl.int64) * block_stride + position % BLOCK_SIZE * token_stride
            mask = inside[:, None] & (i[None, :] < WIDTH)
            key = tl.load(keys_ptr + start[:, None] + i[None, :], mask=mask, other=0.0)
            products = tl.dot(key.to(dtype), tl.trans(q), input_precision="ieee")
            if PACKED:
                factor = tl.load(scales_ptr + start // 4 + SCALES_AT, mask=inside, other=0.0)
                products = products * (factor * scale)[:, None]
            else:
                products = products * scale
            weighted = tl.maximum(products, 0.0) * weight[None, :]
            scores = tl.sum(tl.reshape(weighted, [KEYS, TOKENS, HEADS]), 2)
            tl.store(out_row + position[:, None], scores, mask=position[:, None] < seen[None, :])


def score(
    q_THD: Tensor, weights_TH: Tensor, keys: Tensor, places: Places, scale: float, *, most: int, packed: bool = False
) -> Tensor:
    """fp32 [T, L] with L >= `most`: of the positions that a token sees, sum_h weights[h] * max(0, q[h] . key * scale).

    What lies behind them is not written. `keys`: [num_blocks, block_size, D]; `weights_TH`: fp32.
    """
    tokens, heads, width = q_THD.shape
    out_TL = torch.empty(tokens, triton.cdiv(most, 64) * 64, dtype=torch.float32, device=q_THD.device)
    if tokens == 0:
        return out_TL
    form = Packed.of(keys, width, 0) if packed else None
    assert form is None or form.num_scales == 1
    stored = keys if form is None else form.bytes8
    head_block = triton.next_power_of_2(heads)
    together = 1 if places.per_sequence else max(1, 128 // head_block)  # tokens of a program
    together = max(together, triton.cdiv(16, head_block))
    programs = triton.cdiv(tokens, together)
    wide = q_THD.dtype.itemsize > 2
    assert q_THD.stride(2) == stored.stride(2) == weights_TH.stride(1) == 1
    shares = _shares(q_THD.device, programs, triton.cdiv(most, _KEYS))
    _score[(programs, shares)](
        q_THD,
        q_THD.stride(0),
        q_THD.stride(1),
        weights_TH,
        weights_TH.stride(0),
        stored,
        stored if form is None else form.scales,
        stored.stride(0),
        stored.stride(1),
        places.tables_SB,
        places.tables_SB.stride(0),
        places.sequences,
        places.starts_S1,
        places.lens_S,
        out_TL,
        out_TL.stride(0),
        tokens,
        heads,
        scale,
        BLOCK_SIZE=places.block_size,
        PER_SEQUENCE=places.per_sequence,
        WIDTH=width,
        WIDTH_BLOCK=max(triton.next_power_of_2(width), 16),
        TOKENS=together,
        HEADS=head_block,
        KEYS=32 if wide else _KEYS,
        SHARES=shares,
        SCALES_AT=0 if form is None else form.scales_at,
        PACKED=packed,
        num_warps=4 if wide else 8,
        num_stages=3,
    )
    return out_TL


@triton.jit
def _ordered(score):
    """Whole numbers of 32 bits in the order of the scores, as unsigned ones; -0 is 0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) ^ -0x80000000


@triton.jit
def _segment(count, segment, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr):
    length = tl.cdiv(tl.cdiv(count, CHUNK), SEGMENTS) * CHUNK
    return segment * length, tl.minimum((segment + 1) * length, count)


@triton.jit
def _digit(counts_D, needed):
    """(digit of the last number taken, how many of it are needed) where `needed` of the largest are taken."""
    digit = tl.arange(0, _DIGITS)
    at_least = tl.sum(counts_D, 0) - tl.cumsum(counts_D, 0) + counts_D
    found = tl.sum(tl.where(at_least >= needed, 1, 0), 0) - 1
    above = tl.sum(tl.where(digit > found, counts_D, 0), 0)
    return found, needed - above


@triton.jit
def _count(
    scores_ptr,
    scores_stride,
    counts_ptr,
    state_ptr,
    sequence_ptr,
    starts_ptr,
    lens_ptr,
    top_k,
    PER_SEQUENCE: tl.constexpr,
    PASS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Pass 0, 1, 2, 3: counts of the highest to the lowest 8 bits of a segment, where those above are the last one's.

    `counts_ptr`: [4, T, G, 256]; `state_ptr`: [4, T, 2], of each pass the bits found before it, and how many are needed
    of those that begin with them.
    """
    token, segment = tl.program_id(0), tl.program_id(1)
    num_tokens = tl.num_programs(0)
    _, count = whose(token, sequence_ptr, starts_ptr, lens_ptr, PER_SEQUENCE)
    if count <= top_k:
        return
    digit = tl.arange(0, _DIGITS)
    prefix, needed = 0, top_k
    if PASS > 0:
        before = state_ptr + ((PASS - 1) * num_tokens + token) * 2
        prefix, needed = tl.load(before), tl.load(before + 1)
        row = counts_ptr + ((PASS - 1) * num_tokens + token).to(tl.int64) * (SEGMENTS * _DIGITS)
        g = tl.arange(0, SEGMENTS)
        found, needed = _digit(tl.sum(tl.load(row + g[:, None] * _DIGITS + digit[None, :]), 0), needed)
        prefix = prefix * _DIGITS + found
    if segment == 0:
        state = state_ptr + (PASS * num_tokens + token) * 2
        tl.store(state, prefix)
        tl.store(state + 1, needed)
    begin, stop = _segment(count, segment, CHUNK, SEGMENTS)
    scores = scores_ptr + token.to(tl.int64) * scores_stride
    found_D = tl.zeros([_DIGITS], tl.int32)
    for at in range(begin, stop, CHUNK):
        i = at + tl.arange(0, CHUNK)
        number = _ordered(tl.load(scores + i, mask=i < stop, other=0.0))
        counted = i < stop
        if PASS > 0:
            counted = counted & (((number >> (32 - 8 * PASS)) & ((1 << (8 * PASS)) - 1)) == prefix)
        found_D += tl.histogram((number >> (24 - 8 * PASS)) & 255, _DIGITS, mask=counted)
    row = counts_ptr + ((PASS * num_tokens + token).to(tl.int64) * SEGMENTS + segment) * _DIGITS
    tl.store(row + digit, found_D)


@triton.jit
def _take(
    scores_ptr,
    scores_stride,
    counts_ptr,
    state_ptr,
    sequence_ptr,
    starts_ptr,
    lens_ptr,
    tables_ptr,
    table_stride,
    positions_ptr,
    slots_ptr,
    taken_ptr,
    top_k,
    BLOCK_SIZE: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    WITH_SLOTS: tl.constexpr,
):
    """Write the positions (and slots) of a segment behind those of the segments before it."""
    token, segment = tl.program_id(0), tl.program_id(1)
    num_tokens = tl.num_programs(0)
    sequence, count = whose(token, sequence_ptr, starts_ptr, lens_ptr, PER_SEQUENCE)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    out = token.to(tl.int64) * top_k
    if segment == 0:
        tl.store(taken_ptr + token, tl.minimum(count, top_k))
    if count <= top_k:
        for at in range(segment * CHUNK, top_k, SEGMENTS * CHUNK):
            i = at + tl.arange(0, CHUNK)
            tl.store(positions_ptr + out + i, tl.where(i < count, i, -1), mask=i < top_k)
            if WITH_SLOTS:
                slot = tl.load(table + i // BLOCK_SIZE, mask=i < count, other=0) * BLOCK_SIZE + i % BLOCK_SIZE
                tl.store(slots_ptr + out + i, tl.where(i < count, slot, -1), mask=i < top_k)
        return
    digit, g = tl.arange(0, _DIGITS), tl.arange(0, SEGMENTS)
    above_G, equal_G = tl.zeros([SEGMENTS], tl.int32), tl.zeros([SEGMENTS], tl.int32)
    last, needed = 0, top_k
    for level in tl.static_range(4):
        row = counts_ptr + (level * num_tokens + token).to(tl.int64) * (SEGMENTS * _DIGITS)
        counts_GD = tl.load(row + g[:, None] * _DIGITS + digit[None, :])
        needed = tl.load(state_ptr + (level * num_tokens + token) * 2 + 1)
        found, needed = _digit(tl.sum(counts_GD, 0), needed)
        above_G += tl.sum(tl.where(digit[None, :] > found, counts_GD, 0), 1)
        equal_G = tl.sum(tl.where(digit[None, :] == found, counts_GD, 0), 1)
        last = last * 256 + found
    above = tl.sum(tl.where(g < segment, above_G, 0), 0)
    equal = tl.sum(tl.where(g < segment, equal_G, 0), 0)
    begin, stop = _segment(count, segment, CHUNK, SEGMENTS)
    scores = scores_ptr + token.to(tl.int64) * scores_stride
    threshold = last ^ -0x80000000  # compared as a signed number
    for at in range(begin, stop, CHUNK):
        i = at + tl.arange(0, CHUNK)
        inside = i < stop
        number = _ordered(tl.load(scores + i, mask=inside, other=0.0)) ^ -0x80000000
        is_above = ((number > threshold) & inside).to(tl.int32)
        is_equal = ((number == threshold) & inside).to(tl.int32)
        rank = equal + tl.cumsum(is_equal, 0) - is_equal
        taken = is_above + tl.where(rank < needed, is_equal, 0)
        place = above + tl.minimum(equal, needed) + tl.cumsum(taken, 0) - taken
        tl.store(positions_ptr + out + place, i, mask=taken > 0)
        if WITH_SLOTS:
            slot = tl.load(table + i // BLOCK_SIZE, mask=taken > 0, other=0) * BLOCK_SIZE + i % BLOCK_SIZE
            tl.store(slots_ptr + out + place, slot, mask=taken > 0)
        above += tl.sum(is_above, 0)
        equal += tl.sum(is_equal, 0)


@dataclass(frozen=True)
class Taken:
    """int32 positions [T, K] in ascending order, -1 behind the first `counts_T` of them, and their slots likewise."""

    positions_TK: Tensor
    counts_T: Tensor
    slots_TK: Tensor | None


def top_k(scores_TL: Tensor, places: Places, number: int, *, with_slots: bool = False) -> Taken:
    """The `number` positions with the highest scores among those that each token sees; all where there are no more."""
    tokens, device = scores_TL.shape[0], scores_TL.device
    segments = _shares(device, tokens, triton.cdiv(scores_TL.shape[1], _CHUNK), _MOST_SEGMENTS)
    positions_TK = torch.empty(tokens, number, dtype=torch.int32, device=device)
    slots_TK = torch.empty_like(positions_TK) if with_slots else None
    taken_T = torch.empty(tokens, dtype=torch.int32, device=device)
    counts = torch.empty(_PASSES, tokens, segments, _DIGITS.value, dtype=torch.int32, device=device)
    state = torch.empty(_PASSES, tokens, 2, dtype=torch.int32, device=device)
    whose_rows = (places.sequences, places.starts_S1, places.lens_S)
    if tokens == 0:
        return Taken(positions_TK, taken_T, slots_TK)
    for number_of in range(_PASSES):
        _count[(tokens, segments)](
            scores_TL,
            scores_TL.stride(0),
            counts,
            state,
            *whose_rows,
            number,
            PER_SEQUENCE=places.per_sequence,
            PASS=number_of,
            SEGMENTS=segments,
            CHUNK=_CHUNK,
            num_warps=8,
        )
    _take[(tokens, segments)](
        scores_TL,
        scores_TL.stride(0),
        counts,
        state,
        *whose_rows,
        places.tables_SB,
        places.tables_SB.stride(0),
        positions_TK,
        positions_TK if slots_TK is None else slots_TK,
        taken_T,
        number,
        BLOCK_SIZE=places.block_size,
        PER_SEQUENCE=places.per_sequence,
        SEGMENTS=segments,
        CHUNK=_CHUNK,
        WITH_SLOTS=with_slots,
        num_warps=8,
    )
    return Taken(positions_TK, taken_T, slots_TK)


def _shares(device: torch.device, programs: int, tiles: int, most: int = 256) -> int:
    """A power of two, so that few kernels are compiled: two programs for each multiprocessor, where there is work."""
    if device.type != "cuda":
        return 4
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    limit = max(1, min(wanted, most, triton.next_power_of_2(tiles)))
    return 1 << (limit.bit_length() - 1)
