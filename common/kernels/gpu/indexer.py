"""The lightning indexer on a GPU: scores of all positions, and the best of them, exactly.

    scores    a program takes a few tokens and a share of the positions: [positions, heads] products, in fp32 from there
    top-k     of a segment of a row, held in registers as whole numbers of the same order: the number of the last one
              taken is found by halving, then they are written in order of position, of equal ones those with the lower
              positions. Where a row has several segments, the same is done with what was taken of them.

Nothing depends on the host: lengths are read on the device, so a recorded step may be replayed with others.

Shape letters: T new tokens, H heads, D width of a key, L positions (the widest row of scores), K positions taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.rows import Packed
from common.kernels.gpu.sparse_latent import Places, whose

_NONE = tl.constexpr(-(2**31))
_SEGMENT = 1 << 13  # scores that a program compares, and, of what was taken of several segments, twice as many
_KEYS = 128  # that a program scores at once


@triton.jit(do_not_specialize=["table_stride", "num_tokens", "shares"])
def _score(
    q_ptr,
    q_token_stride,
    q_head_stride,
    weights_ptr,
    weights_stride,
    keys_ptr,
    scales_ptr,
    block_stride,
    tables_ptr,
    table_stride,
    sequence_ptr,
    starts_ptr,
    lens_ptr,
    out_ptr,
    out_stride,
    num_tokens,
    shares,
    heads,
    scale,
    BLOCK_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,  # known, since 136 bytes allow for loads of 8
    PER_SEQUENCE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
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
        length = tl.cdiv(tl.cdiv(most, KEYS), shares) * KEYS
        begin = share * length
        for at in range(begin, tl.minimum(begin + length, most), KEYS):
            position = at + tl.arange(0, KEYS)
            inside = position < most
            block = tl.load(tables_ptr + s * table_stride + position // BLOCK_SIZE, mask=inside, other=0)
            start = block.to(tl.int64) * block_stride + position % BLOCK_SIZE * TOKEN_STRIDE
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
    q_THD: Tensor,
    weights_TH: Tensor,
    keys: Tensor,
    places: Places,
    scale: float,
    *,
    most: int,
    packed: bool = False,
    alone: bool = False,
) -> Tensor:
    """fp32 [T, L] with L >= `most`: of the positions that a token sees, sum_h weights[h] * max(0, q[h] . key * scale).

    What lies behind them is not written. `keys`: [num_blocks, block_size, D]; `weights_TH`: fp32. `alone`: by one
    kernel, however many new tokens a sequence has.
    """
    tokens, heads, width = q_THD.shape
    out_TL = torch.empty(tokens, triton.cdiv(most, 64) * 64, dtype=torch.float32, device=q_THD.device)
    if tokens == 0:
        return out_TL
    form = Packed.of(keys, width, 0) if packed else None
    assert form is None or form.num_scales == 1
    stored = keys if form is None else form.bytes8
    head_block = triton.next_power_of_2(heads)
    wide = q_THD.dtype.itemsize > 2
    together = triton.cdiv(16, head_block)  # tokens of a program: a few, or as many as make tensor cores busy
    if not (places.per_sequence or wide or alone):
        together = max(together, 256 // head_block)
    at_once = 32 if wide else 64 if together * head_block > 128 else _KEYS
    programs = triton.cdiv(tokens, together)
    assert q_THD.stride(2) == stored.stride(2) == weights_TH.stride(1) == 1
    shares = _shares(q_THD.device, programs, triton.cdiv(most, at_once))
    _score[(programs, shares)](
        q_THD,
        q_THD.stride(0),
        q_THD.stride(1),
        weights_TH,
        weights_TH.stride(0),
        stored,
        stored if form is None else form.scales,
        stored.stride(0),
        places.tables_SB,
        places.tables_SB.stride(0),
        places.sequences,
        places.starts_S1,
        places.lens_S,
        out_TL,
        out_TL.stride(0),
        tokens,
        shares,
        heads,
        scale,
        BLOCK_SIZE=places.block_size,
        TOKEN_STRIDE=stored.stride(1),
        PER_SEQUENCE=places.per_sequence,
        WIDTH=width,
        WIDTH_BLOCK=max(triton.next_power_of_2(width), 16),
        TOKENS=together,
        HEADS=head_block,
        KEYS=at_once,
        SCALES_AT=0 if form is None else form.scales_at,
        PACKED=packed,
        num_warps=4 if wide else 8,
        num_stages=3,
    )
    return out_TL


@triton.jit
def _ordered(score):
    """Whole numbers in the order of the scores; -0 is 0, and none of them the least number."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _last_taken(number, top_k):
    """The largest number of which at least `top_k` are no less; the least of all where there are no more than that."""
    low, high = tl.full([], _NONE, tl.int64), tl.max(number, 0).to(tl.int64)
    if tl.sum((number > _NONE).to(tl.int32), 0) <= top_k:
        high = low
    while low < high:
        middle = (low + high + 1) >> 1
        count = tl.sum((number >= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(count >= top_k, middle, low)
        high = tl.where(count >= top_k, tl.where(count == top_k, middle, high), middle - 1)
    return low.to(tl.int32)


@triton.jit(do_not_specialize=["length", "table_stride"])
def _take(
    scores_ptr,
    numbers_ptr,
    origins_ptr,
    row_stride,
    length,
    sequence_ptr,
    starts_ptr,
    lens_ptr,
    tables_ptr,
    table_stride,
    out_numbers_ptr,
    positions_ptr,
    slots_ptr,
    counts_ptr,
    top_k,
    BLOCK_SIZE: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    SEGMENT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    WITH_SLOTS: tl.constexpr,
):
    """The best of a segment, in their order: FIRST of scores, later of the `length` numbers with their positions
    (`origins_ptr`) that were taken before; LAST is the result. Segments with less than `top_k` end with _NONE and -1.
    """
    token, segment = tl.program_id(0), tl.program_id(1)
    sequence, count = whose(token, sequence_ptr, starts_ptr, lens_ptr, PER_SEQUENCE)
    i = segment * SEGMENT + tl.arange(0, SEGMENT)
    row = token.to(tl.int64) * row_stride
    if FIRST:
        inside = i < count
        number = tl.where(inside, _ordered(tl.load(scores_ptr + row + i, mask=inside, other=0.0)), _NONE)
        position = i
    else:
        number = tl.load(numbers_ptr + row + i, mask=i < length, other=_NONE)
        position = tl.load(origins_ptr + row + i, mask=i < length, other=-1)
    last = _last_taken(number, top_k)
    above = number > last
    equal = (number == last) & (number > _NONE)
    needed = top_k - tl.sum(above.to(tl.int32), 0)
    both = above.to(tl.int32) + (equal.to(tl.int32) << 16)  # two sums in one: a segment is shorter than 2^15
    before = tl.cumsum(both, 0) - both
    equal_before = before >> 16
    taken = above | (equal & (equal_before < needed))
    place = (before & 0xFFFF) + tl.minimum(equal_before, needed)
    num_taken = tl.sum(taken.to(tl.int32), 0)
    out = (token.to(tl.int64) * tl.num_programs(1) + segment) * top_k
    tl.store(positions_ptr + out + place, position, mask=taken)
    rest = num_taken + tl.arange(0, SEGMENT)
    tl.store(positions_ptr + out + rest, -1, mask=rest < top_k)
    if not LAST:
        tl.store(out_numbers_ptr + out + place, number, mask=taken)
        tl.store(out_numbers_ptr + out + rest, _NONE, mask=rest < top_k)
    else:
        tl.store(counts_ptr + token, num_taken)
        if WITH_SLOTS:
            table = tables_ptr + sequence.to(tl.int64) * table_stride
            slot = tl.load(table + position // BLOCK_SIZE, mask=taken, other=0) * BLOCK_SIZE + position % BLOCK_SIZE
            tl.store(slots_ptr + out + place, slot, mask=taken)
            tl.store(slots_ptr + out + rest, -1, mask=rest < top_k)


@dataclass(frozen=True)
class Taken:
    """int32 positions [T, K] in ascending order, -1 behind the first `counts_T` of them, and their slots likewise."""

    positions_TK: Tensor
    counts_T: Tensor
    slots_TK: Tensor | None


def top_k(scores_TL: Tensor, places: Places, number: int, *, with_slots: bool = False) -> Taken:
    """The `number` positions with the highest scores among those that each token sees; all where there are no more."""
    tokens, length = scores_TL.shape
    device = scores_TL.device
    taken_T = torch.empty(tokens, dtype=torch.int32, device=device)
    slots_TK = torch.empty(tokens, number, dtype=torch.int32, device=device) if with_slots else None
    numbers, origins, stride, is_first = taken_T, taken_T, scores_TL.stride(0), True
    while True:
        limit = _SEGMENT if is_first else 2 * _SEGMENT
        segment = min(triton.next_power_of_2(max(length, number)), limit)
        assert number < segment or length <= segment, "as many are taken as are compared"
        segments = triton.cdiv(length, segment)
        is_last = segments == 1
        positions = torch.empty(tokens, segments * number, dtype=torch.int32, device=device)
        out_numbers = positions if is_last else torch.empty_like(positions)
        if tokens:
            _take[(tokens, segments)](
                scores_TL,
                numbers,
                origins,
                stride,
                length,
                places.sequences,
                places.starts_S1,
                places.lens_S,
                places.tables_SB,
                places.tables_SB.stride(0),
                out_numbers,
                positions,
                positions if slots_TK is None else slots_TK,
                taken_T,
                number,
                BLOCK_SIZE=places.block_size,
                PER_SEQUENCE=places.per_sequence,
                SEGMENT=segment,
                FIRST=is_first,
                LAST=is_last,
                WITH_SLOTS=with_slots,
                num_warps=min(16, max(4, segment // 512)),
            )
        if is_last:
            return Taken(positions, taken_T, slots_TK)
        numbers, origins, length, stride, is_first = out_numbers, positions, segments * number, segments * number, False


@triton.jit(do_not_specialize=["num_slots"])
def _rows_of(
    slots_ptr, out_ptr, num_slots, rows_per_block, rows_per_token, BLOCK_SIZE: tl.constexpr, AT_ONCE: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    slot = tl.load(slots_ptr + i, mask=i < num_slots, other=-1)
    row = slot // BLOCK_SIZE * rows_per_block + slot % BLOCK_SIZE * rows_per_token
    tl.store(out_ptr + i, tl.where(slot < 0, -1, row), mask=i < num_slots)


def rows_of(slots_TK: Tensor, block_size: int, rows_per_block: int, rows_per_token: int) -> Tensor:
    """Numbers of rows that begin wherever a token's may, so many of them in a block and in a token; -1 stays."""
    out_TK = torch.empty_like(slots_TK)
    _rows_of[(triton.cdiv(slots_TK.numel(), 1024),)](
        slots_TK,
        out_TK,
        slots_TK.numel(),
        rows_per_block,
        rows_per_token,
        BLOCK_SIZE=block_size,
        AT_ONCE=1024,
    )
    return out_TK


def _shares(device: torch.device, programs: int, tiles: int) -> int:
    """A power of two: two programs for each multiprocessor, where there is work."""
    if device.type != "cuda":
        return 4
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    limit = max(1, min(wanted, triton.next_power_of_2(tiles)))
    return 1 << (limit.bit_length() - 1)
