"""The last token that top_k and top_p keep: by halving, over a list of tokens; where equal logits keep the list from
being short, or a long top_k comes with a top_p, over the whole row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.kernels.gpu.noise import load_f64
from common.kernels.gpu.order import ALL, BY_COUNT, COLUMNS, STATE, TRUNCATED, mass_of, place_of, row_extreme


@triton.jit
def _above(
    places,
    masses,
    logits_row,
    vocab_size,
    best,
    temperature,
    least,
    SLOW: tl.constexpr,
    WEIGHS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """(number, mass) of the tokens at `least` or above it: of the list, or, if SLOW, of the whole row."""
    number, mass = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    if SLOW:
        for tile in range(TILES):
            ids = tile * TILE + tl.arange(0, TILE)
            x = tl.load(logits_row + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
            counted = (x > float("-inf")) & (place_of(x, ids) >= least)
            number += tl.sum(counted.to(tl.int32), 0)
            if WEIGHS:
                mass += tl.sum(tl.where(counted, mass_of(x, best, temperature, SHIFT), 0), 0)
    else:
        counted = places >= least
        number += tl.sum(counted.to(tl.int32), 0)
        if WEIGHS:
            mass += tl.sum(tl.where(counted, masses, 0), 0)
    return number, mass


@triton.jit
def _find_edge(
    places,
    masses,
    logits_row,
    vocab_size,
    draw,
    best,
    low,
    high,
    above_high,
    mass_high,
    total,
    mode,
    SLOW: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The place of the last token kept. The edge lies above place `low` and up to place `high`."""
    temperature, top_p = load_f64(draw + 1), load_f64(draw + 2)
    edge = low + 1
    if mode == BY_COUNT:
        wanted = tl.load(draw + 4) - above_high
        least, past, found = low + 1, high + 1, tl.full((), -1, tl.int64)
        while (past - least > 1) & (found != wanted):
            middle = least + (past - least) // 2
            found, _ = _above(
                places, masses, logits_row, vocab_size, best, temperature, middle, SLOW, False, TILES, TILE, SHIFT
            )
            least, past = tl.where(found >= wanted, middle, least), tl.where(found >= wanted, past, middle)
        edge = least
        if top_p < 1:
            _, total = _above(
                places, masses, logits_row, vocab_size, best, temperature, edge, SLOW, True, TILES, TILE, SHIFT
            )
            low = edge - 1
    if top_p < 1:
        goal = top_p * total.to(tl.float64)
        # `low` is where enough has been seen before the next token, `high` where it has not
        n_low, _ = _above(
            places, masses, logits_row, vocab_size, best, temperature, low + 1, SLOW, True, TILES, TILE, SHIFT
        )
        n_high = n_low * 0
        while n_low - n_high > 1:
            middle = low + (high - low) // 2
            number, mass = _above(
                places, masses, logits_row, vocab_size, best, temperature, middle + 1, SLOW, True, TILES, TILE, SHIFT
            )
            enough = (mass_high + mass).to(tl.float64) >= goal
            low, n_low = tl.where(enough, middle, low), tl.where(enough, number, n_low)
            high, n_high = tl.where(enough, high, middle), tl.where(enough, n_high, number)
        edge = low + 1
    return edge


@triton.jit
def find_edges(
    logits_ptr,
    draws_ptr,
    best_ptr,
    states_ptr,
    listed_x_ptr,
    listed_id_ptr,
    num_listed_ptr,
    edge_ptr,
    row_stride,
    vocab_size,
    TILES: tl.constexpr,
    TILES_2: tl.constexpr,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """`states_ptr`: those behind the last pass."""
    row = tl.program_id(0).to(tl.int64)
    draw = draws_ptr + row * COLUMNS
    if tl.load(draw + 5) != TRUNCATED:
        return
    best = row_extreme(best_ptr + row * TILES, TILES, TILES_2, True)
    state = states_ptr + row * STATE
    above_high, mass_high, total, mode = (
        tl.load(state + 2),
        tl.load(state + 3),
        tl.load(state + 4),
        tl.load(state + 5),
    )
    lowest = place_of(tl.full((), float("-inf"), tl.float32), 0)
    edge = lowest
    finite = (best > float("-inf")) & (best < float("inf"))
    logits_row = logits_ptr + row * row_stride
    if finite & (mode != ALL):
        top = place_of(best, 0)
        if tl.load(state + 6) != 0:
            slot = tl.arange(0, ROOM)
            there = slot < tl.load(num_listed_ptr + row)
            x = tl.load(listed_x_ptr + row * ROOM + slot, mask=there, other=float("-inf"))
            ids = tl.load(listed_id_ptr + row * ROOM + slot, mask=there, other=0)
            places = tl.where(there, place_of(x, ids), lowest)
            masses = tl.where(there, mass_of(x, best, load_f64(draw + 1), SHIFT), 0)
            first = tl.min(tl.where(there, places, top), 0)
            edge = _find_edge(
                places,
                masses,
                logits_row,
                vocab_size,
                draw,
                best,
                first - 1,
                tl.max(places, 0),
                above_high,
                mass_high,
                total,
                mode,
                False,
                TILES,
                TILE,
                SHIFT,
            )
        else:
            edge = _find_edge(
                0,
                0,
                logits_row,
                vocab_size,
                draw,
                best,
                lowest,
                top,
                above_high * 0,
                mass_high * 0,
                total,
                mode,
                True,
                TILES,
                TILE,
                SHIFT,
            )
    tl.store(edge_ptr + row, edge)
