"""Routing of mixture-of-experts layers on a GPU: choose experts, sort pairs by expert, lay out tiles of rows.

Nothing here is read by the host: the number of tiles that a launch must expect follows from shapes alone, and tiles
that are not needed say so (`TileMap`). So a captured graph follows the routing of each replay.

Shape letters: T tokens, E experts, K experts of a token, P = T x K (token, expert) pairs, B tiles, M rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.launch import let_next_start, pdl, wait

_SMALL = 8192  # pairs up to which one kernel sorts: each of its programs reads them all
_CHUNKS = (256, 1024, 4096)  # pairs that it reads at once
_CHUNK = 256  # pairs that one program of the sort of many ranks among themselves
_SCORINGS = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}


class TileMap(NamedTuple):
    """Pairs sorted by expert, and cut into tiles of at most M rows of one expert.

    Row r is pair `order_P[r]`. Tile b has the rows from `first_row_B[b]` to before `end_row_B[b]`, of expert
    `expert_B[b]`; that is -1 for a tile that there is not. int32; `starts_E1` has the first row of each expert.
    """

    order_P: Tensor
    starts_E1: Tensor
    expert_B: Tensor
    first_row_B: Tensor
    end_row_B: Tensor
    rows: int


def route(
    logits_TE: Tensor,
    top_k: int,
    scoring: str,
    bias_E: Tensor | None,
    num_groups: int,
    topk_groups: int,
    normalized: bool,
    scale: float,
    given_TK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`common.kernels.moe_ops.route` in one launch."""
    assert logits_TE.dtype == torch.float32
    tokens, experts = logits_TE.shape
    ids_TK = logits_TE.new_empty(tokens, top_k, dtype=torch.int64) if given_TK is None else given_TK.long().contiguous()
    weights_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    size = experts // num_groups
    use_pdl = pdl(logits_TE.device)
    if tokens:
        _route[(tokens,)](
            logits_TE,
            logits_TE if bias_E is None else bias_E,
            ids_TK,
            weights_TK,
            logits_TE.stride(0),
            logits_TE.stride(1),
            scale,
            SIZE=size,
            GROUPS=num_groups,
            KEEP=topk_groups,
            K=top_k,
            SCORING=_SCORINGS[scoring],
            HAS_BIAS=bias_E is not None,
            NORMALIZED=normalized,
            GIVEN=given_TK is not None,
            SP=triton.next_power_of_2(size),
            GP=triton.next_power_of_2(num_groups),
            KP=triton.next_power_of_2(top_k),
            PDL=use_pdl,
            launch_pdl=use_pdl,
            num_warps=1 if experts <= 256 else 2,
        )
    return ids_TK, weights_TK


def tile_map(ids_TK: Tensor, num_experts: int, rows: int, places_P: Tensor | None = None) -> TileMap:
    """Sort pairs by expert, by their numbers within one, and cut experts into tiles of `rows` rows.

    `places_P` int64, if given, takes of each pair the row that it is.
    """
    flat = ids_TK.reshape(-1)
    pairs, device = flat.numel(), flat.device
    tiles = max(1, min(num_experts, pairs) + pairs // rows)
    sizes = [pairs, num_experts + 1, tiles, tiles, tiles]
    room = [triton.cdiv(size, 4) * 4 for size in sizes]  # a pointer at 16 bytes is another kernel than one at 4
    parts = torch.empty(sum(room), dtype=torch.int32, device=device).split(room)
    order_P, starts_E1, *map_B = (part[:size] for part, size in zip(parts, sizes, strict=True))
    out = TileMap(order_P, starts_E1, map_B[0], map_B[1], map_B[2], rows)
    has_places, use_pdl = places_P is not None, pdl(device)
    launch = {"PDL": use_pdl, "launch_pdl": use_pdl, "num_warps": 4}
    places = order_P if places_P is None else places_P
    padded = triton.next_power_of_2(max(128, num_experts))
    args = (flat, order_P, places, starts_E1, *map_B)
    if pairs <= _SMALL:
        _sort_small[(num_experts + 1,)](
            *args,
            pairs,
            num_experts,
            tiles,
            rows,
            HAS_PLACES=has_places,
            EP=padded,
            CHUNK=next(n for n in _CHUNKS if pairs <= n or n == _CHUNKS[-1]),
            **launch,
        )
        return out
    chunks = triton.cdiv(pairs, _CHUNK)
    counts_CE = torch.empty(chunks, num_experts, dtype=torch.int32, device=device)
    bases_CE = torch.empty_like(counts_CE)
    _count_chunks[(chunks,)](flat, counts_CE, pairs, num_experts, EP=padded, CHUNK=_CHUNK, **launch)
    _sum_chunks[(num_experts + 1,)](
        counts_CE, bases_CE, starts_E1, *map_B, chunks, num_experts, tiles, rows, EP=padded, **launch
    )
    _place_chunks[(chunks,)](
        flat, bases_CE, order_P, places, pairs, num_experts, HAS_PLACES=has_places, CHUNK=_CHUNK, **launch
    )
    return out


@triton.jit
def _scores(x, SCORING: tl.constexpr):
    """fp32 scores of a row's logits [GP, SP]; -inf where there is no expert."""
    if SCORING == 0:
        e = tl.exp(x - tl.max(tl.max(x, 1), 0))
        return e / tl.sum(tl.sum(e, 1), 0)
    if SCORING == 1:
        return 1.0 / (1.0 + tl.exp(-x))
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.maximum(u - 1.0, 1e-30)))  # u - 1 is what of e is left beside 1
    return tl.sqrt_rn(tl.where(x > 20.0, x, log1p))


@triton.jit
def _route(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    stride_t,
    stride_e,
    scale,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEEP: tl.constexpr,
    K: tl.constexpr,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALIZED: tl.constexpr,
    GIVEN: tl.constexpr,
    SP: tl.constexpr,
    GP: tl.constexpr,
    KP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token: its experts as [groups, experts of one]. Equal values go to the lower id, NaN counts as the lowest."""
    let_next_start(PDL)
    wait(PDL)
    t = tl.program_id(0).to(tl.int64)
    g, s = tl.arange(0, GP)[:, None], tl.arange(0, SP)[None, :]
    ids = g * SIZE + s
    there = (g < GROUPS) & (s < SIZE)
    lowest = float("-inf")
    logits = tl.load(logits_ptr + t * stride_t + ids.to(tl.int64) * stride_e, mask=there, other=lowest)
    scores = tl.where(there, _scores(logits, SCORING), 0.0)
    k_K = tl.arange(0, KP)
    weights_K = tl.zeros((KP,), tl.float32)
    total = 0.0
    if not GIVEN:
        choice = scores
        if HAS_BIAS:
            choice += tl.load(bias_ptr + ids, mask=there, other=0.0)
        choice = tl.where(there & (choice == choice), choice, lowest)
        if KEEP < GROUPS:
            best = tl.max(choice, 1)
            best_id = tl.min(tl.where(choice == best[:, None], ids, GP * SIZE + SP), 1)
            sums = best + tl.max(tl.where(ids == best_id[:, None], lowest, choice), 1)
            free = tl.arange(0, GP) < GROUPS
            for _ in tl.static_range(KEEP):
                top = tl.max(tl.where(free, sums, lowest), 0)
                chosen = tl.min(tl.where(free & (sums == top), tl.arange(0, GP), GP), 0)
                free = free & (tl.arange(0, GP) != chosen)
            choice = tl.where(free[:, None], lowest, choice)
        left = there
        for k in tl.static_range(K):
            top = tl.max(tl.max(tl.where(left, choice, lowest), 1), 0)
            chosen = tl.min(tl.min(tl.where(left & (choice == top), ids, GP * SIZE + SP), 1), 0)
            left = left & (ids != chosen)
            weight = tl.sum(tl.sum(tl.where(ids == chosen, scores, 0.0), 1), 0)
            weights_K = tl.where(k_K == k, weight, weights_K)
            total += weight
            tl.store(ids_ptr + t * K + k, chosen.to(tl.int64))
    else:
        for k in tl.static_range(K):
            chosen = tl.load(ids_ptr + t * K + k)
            weight = tl.sum(tl.sum(tl.where(there & (ids == chosen), scores, 0.0), 1), 0)
            weights_K = tl.where(k_K == k, weight, weights_K)
            total += weight
    if NORMALIZED:
        weights_K = weights_K / (total + 1e-20)
    tl.store(weights_ptr + t * K + k_K, weights_K * scale, mask=k_K < K)


@triton.jit
def _lay_out(counts_E, e, starts_ptr, expert_ptr, first_ptr, end_ptr, experts, tiles, rows_of_tile, EP: tl.constexpr):
    """Expert e's first row, its entry of `starts`, and its tiles; program `experts` says which tiles there are not."""
    e_E = tl.arange(0, EP)
    first = tl.sum(tl.where(e_E < e, counts_E, 0), 0)
    tile = tl.sum(tl.where(e_E < e, tl.cdiv(counts_E, rows_of_tile), 0), 0)
    tl.store(starts_ptr + e, first)
    count = tl.sum(tl.where(e_E == e, counts_E, 0), 0)
    own = tiles - tile
    expert = -1
    if e < experts:
        own = tl.cdiv(count, rows_of_tile)
        expert = e
    for base in range(0, own, 128):
        i = base + tl.arange(0, 128)
        tl.store(expert_ptr + tile + i, expert + tl.zeros((128,), tl.int32), mask=i < own)
        tl.store(first_ptr + tile + i, first + i * rows_of_tile, mask=i < own)
        tl.store(end_ptr + tile + i, first + tl.minimum(count, (i + 1) * rows_of_tile), mask=i < own)
    return first


@triton.jit(do_not_specialize=["pairs", "tiles", "rows_of_tile"])
def _sort_small(
    ids_ptr,
    order_ptr,
    places_ptr,
    starts_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    pairs,
    experts,
    tiles,
    rows_of_tile,
    HAS_PLACES: tl.constexpr,
    EP: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program e counts all pairs, and places those of expert e: no program waits for another."""
    let_next_start(PDL)
    wait(PDL)
    e = tl.program_id(0)
    i_C = tl.arange(0, CHUNK)
    counts_E = tl.zeros((EP,), tl.int32)
    for base in range(0, pairs, CHUNK):
        mask = base + i_C < pairs
        ids = tl.load(ids_ptr + base + i_C, mask=mask, other=0).to(tl.int32)
        counts_E += tl.histogram(ids, EP, mask=mask)
    row = _lay_out(counts_E, e, starts_ptr, expert_ptr, first_ptr, end_ptr, experts, tiles, rows_of_tile, EP)
    if e < experts:
        for base in range(0, pairs, CHUNK):
            ids = tl.load(ids_ptr + base + i_C, mask=base + i_C < pairs, other=-1).to(tl.int32)
            mine = (ids == e).to(tl.int32)
            rows = row + tl.cumsum(mine, 0) - 1
            tl.store(order_ptr + rows, base + i_C, mask=mine > 0)
            if HAS_PLACES:
                tl.store(places_ptr + base + i_C, rows.to(tl.int64), mask=mine > 0)
            row += tl.sum(mine, 0)


@triton.jit(do_not_specialize=["pairs"])
def _count_chunks(ids_ptr, counts_ptr, pairs, experts, EP: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """Pairs of each expert in a chunk: [chunks, E]."""
    let_next_start(PDL)
    wait(PDL)
    c = tl.program_id(0)
    i = c * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + i, mask=i < pairs, other=0).to(tl.int32)
    e_E = tl.arange(0, EP)
    tl.store(counts_ptr + c * experts + e_E, tl.histogram(ids, EP, mask=i < pairs), mask=e_E < experts)


@triton.jit(do_not_specialize=["chunks", "tiles", "rows_of_tile"])
def _sum_chunks(
    counts_ptr,
    bases_ptr,
    starts_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    chunks,
    experts,
    tiles,
    rows_of_tile,
    EP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program e: the row of the first pair of expert e in each chunk."""
    let_next_start(PDL)
    wait(PDL)
    e = tl.program_id(0)
    e_E, c_C = tl.arange(0, EP), tl.arange(0, 32)
    counts_E = tl.zeros((EP,), tl.int32)
    for base in range(0, chunks, 32):
        mask = (base + c_C < chunks)[:, None] & (e_E < experts)[None, :]
        counts_E += tl.sum(tl.load(counts_ptr + (base + c_C)[:, None] * experts + e_E[None, :], mask=mask, other=0), 0)
    row = _lay_out(counts_E, e, starts_ptr, expert_ptr, first_ptr, end_ptr, experts, tiles, rows_of_tile, EP)
    if e < experts:
        for base in range(0, chunks, 256):
            c = base + tl.arange(0, 256)
            counts = tl.load(counts_ptr + c * experts + e, mask=c < chunks, other=0)
            tl.store(bases_ptr + c * experts + e, row + tl.cumsum(counts, 0) - counts, mask=c < chunks)
            row += tl.sum(counts, 0)


@triton.jit(do_not_specialize=["pairs"])
def _place_chunks(
    ids_ptr,
    bases_ptr,
    order_ptr,
    places_ptr,
    pairs,
    experts,
    HAS_PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A pair's row: its expert's first one in the chunk, and how many pairs of that expert the chunk has before it."""
    let_next_start(PDL)
    wait(PDL)
    c = tl.program_id(0)
    i_C = tl.arange(0, CHUNK)
    i = c * CHUNK + i_C
    mask = i < pairs
    ids = tl.load(ids_ptr + i, mask=mask, other=-1).to(tl.int32)
    before_C = tl.zeros((CHUNK,), tl.int32)
    for base in range(0, CHUNK, 16):
        j = base + tl.arange(0, 16)
        others = tl.load(ids_ptr + c * CHUNK + j, mask=c * CHUNK + j < pairs, other=-1).to(tl.int32)
        before_C += tl.sum(((ids[:, None] == others[None, :]) & (j[None, :] < i_C[:, None])).to(tl.int32), 1)
    rows = tl.load(bases_ptr + c * experts + ids, mask=mask, other=0) + before_C
    tl.store(order_ptr + rows, i, mask=mask)
    if HAS_PLACES:
        tl.store(places_ptr + i, rows.to(tl.int64), mask=mask)
