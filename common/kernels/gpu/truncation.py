"""Where top_k and top_p end, row by row, and the race over what they and min_p leave.

narrow   three times: counts and masses above 16 limits between two bounds give closer bounds
collect  the tokens between the bounds, once they are few, in a list
edge     the last token kept (`gpu.edge`)
race     tile by tile, over the tokens up to the edge
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.edge import find_edges
from common.kernels.gpu.noise import load_f64, race
from common.kernels.gpu.order import (
    ALL,
    BY_COUNT,
    BY_MASS,
    COLUMNS,
    STATE,
    TRUNCATED,
    load_f32,
    mass_of,
    place_of,
    row_extreme,
)

ROOM = 4096  # of the list of a row
_PASSES = 3
_WARPS = 8
_LIST_WARPS = 16
_WAYS = tl.constexpr(16)


@triton.jit
def _closer(draw, state, tallies, FIRST: tl.constexpr, TILES: tl.constexpr, TILES_2: tl.constexpr, ROOM: tl.constexpr):
    """The state behind a pass: which two of its limits have the edge between them. `state`: the one before it."""
    way, tile = tl.arange(0, _WAYS), tl.arange(0, TILES_2)
    cell = tallies + tile[:, None] * (3 * _WAYS) + way[None, :]
    there = (tile < TILES)[:, None]
    limit_W = load_f32(tallies + way)
    count_W = tl.sum(tl.load(cell + _WAYS, mask=there, other=0), 0)
    mass_W = tl.sum(tl.load(cell + 2 * _WAYS, mask=there, other=0), 0)
    top_k, top_p = tl.load(draw + 4), load_f64(draw + 2)
    total, mode = tl.load(state + 4), tl.load(state + 5)
    if FIRST:
        total = tl.sum(tl.where(way == 0, mass_W, 0), 0)
        num_finite = tl.sum(tl.where(way == 0, count_W, 0), 0)
        otherwise = tl.where(top_p < 1, BY_MASS, ALL)
        mode = tl.where((mode == BY_COUNT) & (top_k > num_finite), otherwise, mode)
    enough_W = tl.where(mode == BY_COUNT, count_W >= top_k, mass_W.to(tl.float64) >= top_p * total.to(tl.float64))
    last = tl.maximum(tl.sum(enough_W.to(tl.int32), 0) - 1, 0)
    above_low = tl.sum(tl.where(way == last, count_W, 0), 0)
    low = tl.where(last > 0, tl.sum(tl.where(way == tl.maximum(last, 1), limit_W, 0.0), 0), load_f32(state))
    inner = last < _WAYS - 1
    high = tl.where(inner, tl.sum(tl.where(way == last + 1, limit_W, 0.0), 0), load_f32(state + 1))
    above_high = tl.where(inner, tl.sum(tl.where(way == last + 1, count_W, 0), 0), tl.load(state + 2))
    mass_high = tl.where(inner, tl.sum(tl.where(way == last + 1, mass_W, 0), 0), tl.load(state + 3))
    whole = above_low <= ROOM  # then the list takes all above the low bound
    between = (above_low - above_high <= ROOM) & ((mode == BY_MASS) | (top_p >= 1))
    settled = whole | between | (mode == ALL)
    high = tl.where(whole, float("inf"), high)
    return low, high, tl.where(whole, 0, above_high), tl.where(whole, 0, mass_high), total, mode, settled


@triton.jit
def _store_state(state, low, high, above_high, mass_high, total, mode, settled):
    tl.store(state, low.to(tl.int32, bitcast=True).to(tl.int64))
    tl.store(state + 1, high.to(tl.int32, bitcast=True).to(tl.int64))
    tl.store(state + 2, above_high)
    tl.store(state + 3, mass_high)
    tl.store(state + 4, total)
    tl.store(state + 5, mode)
    tl.store(state + 6, settled.to(tl.int64))


@triton.jit
def _tally(x, draw, best, low, high, least, tallies, tile, SHIFT: tl.constexpr):
    """Count the tokens of a tile above each limit, and weigh them where top_p asks for it."""
    way = tl.arange(0, _WAYS)
    base = tl.where(low == float("-inf"), least, low)
    limit_W = base + tl.minimum(high - base, 3e38) * (way.to(tl.float32) / _WAYS)
    limit_W = tl.where(way == 0, low, limit_W)
    if tile == 0:
        tl.store(tallies + way, limit_W.to(tl.int32, bitcast=True).to(tl.int64))
    if tl.max(x, 0) > low:
        weighs = load_f64(draw + 2) < 1
        mass = tl.zeros_like(x).to(tl.int64)
        if weighs:
            mass = mass_of(x, best, load_f64(draw + 1), SHIFT)
        for i in tl.static_range(_WAYS):
            above = x > tl.sum(tl.where(way == i, limit_W, 0.0), 0)
            tl.store(tallies + _WAYS + i, tl.sum(above.to(tl.int32), 0).to(tl.int64))
            if weighs:
                tl.store(tallies + 2 * _WAYS + i, tl.sum(tl.where(above, mass, 0), 0))
        if not weighs:
            tl.store(tallies + 2 * _WAYS + way, tl.zeros_like(way).to(tl.int64))
    else:
        tl.store(tallies + _WAYS + way, tl.zeros_like(way).to(tl.int64))
        tl.store(tallies + 2 * _WAYS + way, tl.zeros_like(way).to(tl.int64))


@triton.jit(do_not_specialize=["num_rows"])
def _narrow(
    logits_ptr,
    draws_ptr,
    best_ptr,
    least_ptr,
    states_ptr,
    tallies_ptr,
    listed_x_ptr,
    listed_id_ptr,
    num_listed_ptr,
    row_stride,
    vocab_size,
    num_rows,
    PASS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_2: tl.constexpr,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
    SHIFT: tl.constexpr,
    COLLECTS: tl.constexpr,
):
    """One pass; the last one collects the list. States and tallies of all passes are kept, [passes, rows, ...]."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    draw = draws_ptr + row * COLUMNS
    if tl.load(draw + 5) != TRUNCATED:
        return
    best = row_extreme(best_ptr + row * TILES, TILES, TILES_2, True)
    top_k, top_p = tl.load(draw + 4), load_f64(draw + 2)
    low, high = tl.full((), float("-inf"), tl.float32), best
    above_high, mass_high, total = top_k * 0, top_k * 0, top_k * 0
    mode = tl.where(top_p < 1, BY_MASS, ALL).to(tl.int64)
    mode = tl.where((top_k > 0) & (top_k < vocab_size), BY_COUNT, mode)
    settled = (mode == ALL) | (best == float("-inf")) | (best == float("inf"))
    if PASS > 0:
        before = states_ptr + ((PASS - 1) * num_rows + row) * STATE
        settled = tl.load(before + 6) != 0
        if settled:
            low, high = load_f32(before), load_f32(before + 1)
            above_high, mass_high = tl.load(before + 2), tl.load(before + 3)
            total, mode = tl.load(before + 4), tl.load(before + 5)
        else:
            tallies = tallies_ptr + ((PASS - 1) * num_rows + row) * (TILES * 3 * _WAYS)
            low, high, above_high, mass_high, total, mode, settled = _closer(
                draw, before, tallies, PASS == 1, TILES, TILES_2, ROOM
            )
    if tile == 0:
        state = states_ptr + (PASS * num_rows + row) * STATE
        _store_state(state, low, high, above_high, mass_high, total, mode, settled)
    ids = tile * TILE + tl.arange(0, TILE)
    place = logits_ptr + row * row_stride + ids
    tile_best = tl.load(best_ptr + row * TILES + tile)
    if COLLECTS:
        if settled & (mode != ALL) & (tile_best > low) & (best < float("inf")):
            x = tl.load(place, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
            listed = ((x > low) & (x <= high)).to(tl.int32)
            first = tl.atomic_add(num_listed_ptr + row, tl.sum(listed, 0))
            at = row * ROOM + first + tl.cumsum(listed, 0) - 1
            tl.store(listed_x_ptr + at, x, mask=listed > 0)
            tl.store(listed_id_ptr + at, ids, mask=listed > 0)
    elif not settled:
        x = tl.load(place, mask=ids < tl.where(tile_best > low, vocab_size, 0), other=float("-inf")).to(tl.float32)
        least = row_extreme(least_ptr + row * TILES, TILES, TILES_2, False)
        tallies = tallies_ptr + ((PASS * num_rows + row) * TILES + tile) * (3 * _WAYS)
        _tally(x, draw, best, low, high, least, tallies, tile, SHIFT)


@triton.jit
def _race(
    logits_ptr,
    draws_ptr,
    best_ptr,
    winner_ptr,
    edge_ptr,
    row_stride,
    vocab_size,
    TILES: tl.constexpr,
    TILES_2: tl.constexpr,
    TILE: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    draw = draws_ptr + row * COLUMNS
    if tl.load(draw + 5) != TRUNCATED:
        return
    best = row_extreme(best_ptr + row * TILES, TILES, TILES_2, True)
    edge = tl.load(edge_ptr + row)
    tile_best = tl.load(best_ptr + row * TILES + tile)
    first = tile * TILE
    winner = tl.full((), -1, tl.int32)
    if (place_of(tile_best, 0) >= edge) & (tile_best > float("-inf")) & (best < float("inf")):
        logits_row = logits_ptr + row * row_stride
        ids = first + tl.arange(0, TILE)
        x = tl.load(logits_row + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        x = tl.where(place_of(x, ids) >= edge, x, float("-inf"))
        winner = race(logits_row, draw, x, ids, best)
    tl.store(winner_ptr + row * TILES + tile, winner)


def race_kept(
    logits_RV: Tensor,
    draws_R6: Tensor,
    best_RT: Tensor,
    least_RT: Tensor,
    winner_RT: Tensor,
    num_listed_R: Tensor,
    *,
    tile: int,
    room: int,
) -> None:
    """Fill `winner_RT` of truncated rows. `best_RT`, `least_RT`: highest and lowest finite logit of each tile."""
    (rows, vocab_size), tiles, dev = logits_RV.shape, best_RT.shape[1], logits_RV.device
    tiles_2, shift, stride = triton.next_power_of_2(tiles), 62 - (vocab_size - 1).bit_length(), logits_RV.stride(0)
    states = torch.empty(_PASSES + 1, rows, 8, dtype=torch.int64, device=dev)
    tallies = torch.empty(_PASSES, rows, tiles, 48, dtype=torch.int64, device=dev)
    listed_x = torch.empty(rows, room, dtype=torch.float32, device=dev)
    listed_id = torch.empty(rows, room, dtype=torch.int32, device=dev)
    edge_R = torch.empty(rows, dtype=torch.int64, device=dev)
    for number in range(_PASSES + 1):
        _narrow[rows, tiles](
            logits_RV,
            draws_R6,
            best_RT,
            least_RT,
            states,
            tallies,
            listed_x,
            listed_id,
            num_listed_R,
            stride,
            vocab_size,
            rows,
            number,
            tiles,
            tiles_2,
            tile,
            room,
            shift,
            number == _PASSES,
            num_warps=_WARPS,
        )
    find_edges[rows,](
        logits_RV,
        draws_R6,
        best_RT,
        states[_PASSES],
        listed_x,
        listed_id,
        num_listed_R,
        edge_R,
        stride,
        vocab_size,
        tiles,
        tiles_2,
        tile,
        room,
        shift,
        num_warps=_LIST_WARPS,
    )
    _race[rows, tiles](
        logits_RV, draws_R6, best_RT, winner_RT, edge_R, stride, vocab_size, tiles, tiles_2, tile, num_warps=_WARPS
    )
