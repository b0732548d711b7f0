"""Attention of few new tokens over a paged cache: every key is read once, by thread blocks that share the work evenly.

    schedule(lengths)   once a step, on the GPU: sequences cut into items of about equally many keys
    attend(...)         in each layer: a program for each item and key head

Nothing is planned on the host, and a recorded step needs no new arguments. An item is a chunk of one sequence's keys;
the program that ends last of a sequence's joins their results, in the order of the chunks, so that a result does not
depend on who that is. Query heads of a key head and all new tokens of a sequence are the rows of one tile. Numbers of
an 8-bit cache are multiplied as float16, which holds them exactly.

The chunk follows from the sum of lengths. Sequences that are a single item whatever the chunk do not count: padding is.
As many items as run at once are best; where whole sequences make for more, few of them are cut.

Shape letters as in `common.attention.context`; also I items, N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.launch import let_next_start, pdl, wait

ITEM = 8
"""int32 of an item: its sequence or -1, its first key and the end, the sequence's chunks, the first of its partial
results, the item's own, the sequence's first key that is seen, its length."""
MAX_ROWS = 128
MIN_CHUNK = 128  # keys
SLOTS_PER_PROCESSOR = 3  # items to aim for: so many run at once (their tiles fill the shared memory)
STAGES = {False: 3, True: 5}  # of loads ahead, by whether the cache is 8-bit
WARPS = 4
JOINED = tl.constexpr(4096)  # numbers of partial results that are joined at once
TILE_NUMBERS = 8192  # of keys that are multiplied at once
_LOG2_E = 1.4426950408889634


@triton.jit(
    do_not_specialize=["num_sequences", "num_items", "num_slots", "num_new", "window", "first"],
    do_not_specialize_on_alignment=["lens_ptr"],  # it begins anywhere in a step's
)
def _schedule(
    lens_ptr,
    items_ptr,
    num_sequences,
    num_items,
    num_slots,
    num_new,
    window,
    first,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ITEMS: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait(PDL)
    s = tl.arange(0, SEQUENCES)
    length = tl.load(lens_ptr + s, mask=s < num_sequences, other=0)
    lowest = tl.zeros([SEQUENCES], tl.int32) + first
    if WINDOW:
        lowest = tl.maximum(lowest, length - num_new + 1 - window)
    low = lowest // TILE * TILE
    seen = tl.where(s < num_sequences, tl.maximum(length - low, 1), 0)
    total = tl.sum(tl.where(seen > MIN_CHUNK, seen, 0), 0)
    chunk = (total + num_slots - 1) // num_slots
    chunk = tl.maximum((chunk + TILE - 1) // TILE * TILE, MIN_CHUNK)
    chunks = tl.maximum((seen + chunk // 2) // chunk, 1)  # what is a little longer is not cut
    at_once = tl.sum(tl.where(seen > MIN_CHUNK, chunks, 0), 0) <= num_slots
    chunks = tl.where(at_once, chunks, tl.maximum(seen // chunk, 1))
    chunk = tl.maximum(((seen + chunks - 1) // chunks + TILE - 1) // TILE * TILE, TILE)  # each sequence's: equal parts
    chunks = (seen + chunk - 1) // chunk
    end_item = tl.cumsum(chunks, 0)
    partials = tl.where(chunks > 1, chunks, 0)
    first_partial = tl.cumsum(partials, 0) - partials

    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    sequence = tl.sum((end_item[None, :] <= item[:, None]).to(tl.int32), 1)
    own = s[None, :] == sequence[:, None]
    at = item - tl.sum(tl.where(own, (end_item - chunks)[None, :], 0), 1)
    its_chunk = tl.sum(tl.where(own, chunk[None, :], 0), 1)
    begin = tl.sum(tl.where(own, low[None, :], 0), 1) + at * its_chunk
    its_length = tl.sum(tl.where(own, length[None, :], 0), 1)
    end = tl.minimum(begin + its_chunk, its_length)
    of_sequence = tl.sum(tl.where(own, chunks[None, :], 0), 1)
    partial = tl.sum(tl.where(own, first_partial[None, :], 0), 1)
    row = items_ptr + item * 8
    is_item = item < num_items
    tl.store(row, tl.where(sequence < num_sequences, sequence, -1), mask=is_item)
    tl.store(row + 1, begin, mask=is_item)
    tl.store(row + 2, end, mask=is_item)
    tl.store(row + 3, of_sequence, mask=is_item)
    tl.store(row + 4, partial, mask=is_item)
    tl.store(row + 5, partial + at, mask=is_item)
    tl.store(row + 6, tl.sum(tl.where(own, lowest[None, :], 0), 1), mask=is_item)
    tl.store(row + 7, its_length, mask=is_item)


@triton.jit
def _join(
    partials_ptr,
    sums_ptr,
    out_ptr,
    partial,
    chunks,
    first_token,
    first_head,
    v_scale,
    num_new,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    JOINED_ROWS: tl.constexpr,
):
    """The partial results from `partial` on, one for each chunk, some chunks at a time, all rows side by side."""
    at_once: tl.constexpr = JOINED // (JOINED_ROWS * WIDTH) if JOINED_ROWS * WIDTH < JOINED else 1
    row, d = tl.arange(0, JOINED_ROWS), tl.arange(0, WIDTH)[None, :]
    is_row = row < num_new * GROUP
    top = tl.full([JOINED_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([JOINED_ROWS], tl.float32)
    out = tl.zeros([JOINED_ROWS, WIDTH], tl.float32)
    for begin in tl.range(0, chunks, at_once, num_stages=1):
        chunk = begin + tl.arange(0, at_once)
        its = partial + chunk * UNITS
        mask = (chunk < chunks)[:, None] & is_row[None, :]
        its_sum = tl.load(
            sums_ptr + its[:, None] * ROWS + row[None, :], mask=mask, other=float("-inf"), cache_modifier=".cg"
        )
        its_row = partials_ptr + (its[:, None] * ROWS + row[None, :]) * WIDTH
        its_out = tl.load(its_row[:, :, None] + d[None, :, :], mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(its_sum, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, share = tl.exp2(top - shift), tl.exp2(its_sum - shift[None, :])
        total = total * shrink + tl.sum(share, 0)
        out = out * shrink[:, None] + tl.sum(its_out * share[:, :, None], 0)
        top = higher
    out_row = out_ptr + ((first_token + row // GROUP) * UNITS * GROUP + first_head + row % GROUP)[:, None] * WIDTH
    whole = out * (v_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    tl.store(out_row + d, whole.to(out_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit(
    do_not_specialize=["num_new", "window", "table_stride"],
    do_not_specialize_on_alignment=["tables_ptr"],  # it begins anywhere in a step's
)
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    items_ptr,
    out_ptr,
    partials_ptr,
    sums_ptr,
    counters_ptr,
    q_token_stride,
    q_head_stride,
    block_stride,
    unit_stride,
    row_stride,
    table_stride,
    scale_log2,
    v_scale,
    num_new,
    window,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    JOINED_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTED: tl.constexpr,
    SCHEDULED: tl.constexpr,
    PDL: tl.constexpr,
):
    """`SCHEDULED`: this kernel ran since the schedule was made, which then is complete before this one begins."""
    unit = tl.program_id(0)
    item = items_ptr + tl.program_id(1) * 8
    if not SCHEDULED:
        wait(PDL)
    sequence, length = tl.load(item), tl.load(item + 7)
    begin, end, chunks = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    lowest = tl.load(item + 6)
    if SCHEDULED:
        wait(PDL)
    if sequence < 0:
        return
    row = tl.arange(0, ROWS)
    n = tl.arange(0, TILE)
    d = tl.arange(0, WIDTH)[None, :]
    token, head = row // GROUP, unit * GROUP + row % GROUP
    is_row = row < num_new * GROUP
    own = (length - num_new + token)[:, None]
    new_token = (sequence * num_new + token).to(tl.int64)
    q_row = q_ptr + new_token * q_token_stride + head * q_head_stride
    q = tl.load(q_row[:, None] + d, mask=is_row[:, None], other=0.0).to(COMPUTED)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    unit_place = unit.to(tl.int64) * unit_stride
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        position = start + n
        is_key = position < end
        if WINDOW or FIRST:  # below lie blocks that were given back, or nothing
            is_key &= position >= lowest
        if BLOCK_SIZE % TILE == 0:
            block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            place = block * block_stride + (start % BLOCK_SIZE + n)[:, None] * row_stride
        else:
            blocks = tl.load(table + position // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
            place = (blocks * block_stride + position % BLOCK_SIZE * row_stride)[:, None]
        place += unit_place
        k = tl.load(k_ptr + place + d, mask=is_key[:, None], other=0.0)
        v = tl.load(v_ptr + place + d, mask=is_key[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k.to(COMPUTED))) * scale_log2
        seen = is_key[None, :] & (position[None, :] <= own)
        if WINDOW:
            seen &= position[None, :] > own - window
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(COMPUTED), v.to(COMPUTED), out * shrink[:, None])
        top = higher

    let_next_start(PDL)
    out_row = out_ptr + (new_token * UNITS * GROUP + head)[:, None] * WIDTH + d
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    mean = out / tl.where(total == 0.0, 1.0, total)[:, None]
    if chunks == 1:
        tl.store(out_row, (mean * v_scale).to(dtype), mask=is_row[:, None])
    else:
        partial = (tl.load(item + 5) * UNITS + unit).to(tl.int64)
        tl.store(partials_ptr + (partial * ROWS + row)[:, None] * WIDTH + d, mean, mask=is_row[:, None])
        tl.store(sums_ptr + partial * ROWS + row, top + tl.log2(total), mask=is_row)  # -inf where nothing was seen
        tl.debug_barrier()
        counter = counters_ptr + sequence * UNITS + unit
        if tl.atomic_add(counter, 1, sem="acq_rel") == chunks - 1:
            _join(
                partials_ptr,
                sums_ptr,
                out_ptr,
                (tl.load(item + 4) * UNITS + unit).to(tl.int64),
                chunks,
                sequence.to(tl.int64) * num_new,
                unit * GROUP,
                v_scale,
                num_new,
                GROUP,
                UNITS,
                WIDTH,
                ROWS,
                JOINED_ROWS,
            )
            tl.atomic_xchg(counter, 0)


@dataclass(frozen=True)
class Workspace:
    """For what is computed at one time. `counters` are 0 before and after."""

    partials: Tensor  # float32
    sums: Tensor  # float32: logarithms to base 2 of the sums of weights
    counters: Tensor  # int32


@dataclass(frozen=True)
class Seen:
    """What new tokens see. `num_new`: of each sequence. `window`: 0 is all. Positions below `first` hold nothing."""

    num_new: int
    window: int = 0
    first: int = 0


def num_slots(units: int, device: torch.device) -> int:
    """Items of a key head to aim for: a GPU's worth."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(SLOTS_PER_PROCESSOR * processors // units, 1)


def workspace(num_sequences: int, units: int, width: int, rows: int, slots: int, device: torch.device) -> Workspace:
    """`rows`: new tokens times query heads of a key head, for which this is the most."""
    partials, rows = slots * units, _rows(rows)
    return Workspace(
        torch.empty(partials * rows * width, dtype=torch.float32, device=device),
        torch.empty(partials * rows, dtype=torch.float32, device=device),
        torch.zeros(num_sequences * units, dtype=torch.int32, device=device),
    )


def schedule(seq_lens_S: Tensor, seen: Seen, width: int, slots: int) -> Tensor:
    """Items of a step, int32 [I, 8]. `seq_lens_S` count the new tokens."""
    num_sequences, tile = seq_lens_S.shape[0], _tile(width)
    items = torch.empty((slots + num_sequences, ITEM), dtype=torch.int32, device=seq_lens_S.device)
    at_once, use_pdl = 32, pdl(seq_lens_S.device)
    _schedule[(triton.cdiv(items.shape[0], at_once),)](
        seq_lens_S,
        items,
        num_sequences,
        items.shape[0],
        slots,
        seen.num_new,
        seen.window,
        seen.first,
        WINDOW=seen.window > 0,
        TILE=tile,
        MIN_CHUNK=MIN_CHUNK,
        SEQUENCES=max(64, triton.next_power_of_2(num_sequences)),  # few variants to compile
        ITEMS=at_once,
        PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )
    return items


def attend(
    q_THD: Tensor,
    k: Tensor,
    v: Tensor,
    tables_SB: Tensor,
    items: Tensor,
    seen: Seen,
    space: Workspace,
    out_THD: Tensor,
    scale: float,
    v_scale: float = 1.0,
    *,
    scheduled: bool = False,
) -> None:
    """Write `out_THD`, contiguous. `scheduled`: this is not the first call since `items` were made.

    `k`, `v`: [num_blocks, U, block_size, D] with the same strides, rows contiguous.
    """
    heads, width = q_THD.shape[1:]
    units, group = k.shape[1], heads // k.shape[1]
    rows = _rows(seen.num_new * group)
    narrow = k.dtype == torch.float8_e4m3fn
    computed = tl.float16 if narrow or k.dtype == torch.float16 else tl.bfloat16
    use_pdl = pdl(q_THD.device)
    _attend[(units, items.shape[0])](
        q_THD,
        k,
        v,
        tables_SB,
        items,
        out_THD,
        space.partials,
        space.sums,
        space.counters,
        *q_THD.stride()[:2],
        *k.stride()[:3],
        tables_SB.stride(0),
        scale * _LOG2_E,
        v_scale,
        seen.num_new,
        seen.window,
        GROUP=group,
        UNITS=units,
        WIDTH=width,
        BLOCK_SIZE=k.shape[2],
        WINDOW=seen.window > 0,
        FIRST=seen.first > 0,
        ROWS=rows,
        JOINED_ROWS=min(rows, max(rows // 4, triton.next_power_of_2(group))) if seen.num_new == 1 else rows,
        TILE=_tile(width),
        STAGES=STAGES[narrow],
        COMPUTED=computed,
        SCHEDULED=scheduled,
        PDL=use_pdl,
        num_warps=WARPS,
        launch_pdl=use_pdl,
    )


def _rows(rows: int) -> int:
    assert rows <= MAX_ROWS
    return max(16, triton.next_power_of_2(rows))


def _tile(width: int) -> int:
    """Keys at once."""
    return min(128, TILE_NUMBERS // width)
