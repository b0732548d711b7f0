"""Draw one token per row, for any mix of rows: the tokens that `common.kernels.sampling` defines.

    scan    tile by tile: the best logit; of greedy rows its id, of plain ones the winner of the tile's race
    narrow  (truncated rows: three times, then collect and edge, in `gpu.truncation`) where truncation ends
    race    (truncated rows) tile by tile, the winner of what is kept
    settle  row by row: the best of the tiles, and the status

A tile is a part of a row that one program holds in registers. All that a row needs lies in `draws_R6`
(`common.kernels.draws`), shapes follow from the arguments, and nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.draws import COLUMNS, DrawKind, any_truncated, pack_draws, to_device
from common.kernels.gpu import truncation
from common.kernels.gpu.noise import LAST_ID, gumbel, load_f64, race
from common.kernels.gpu.order import MAX_VOCAB
from common.kernels.sampling import Draw, DrawStatus

_COLUMNS = tl.constexpr(COLUMNS)
_GREEDY = tl.constexpr(int(DrawKind.GREEDY))
_PLAIN = tl.constexpr(int(DrawKind.PLAIN))
_EMPTY = tl.constexpr(int(DrawStatus.EMPTY))
_NOT_A_NUMBER = tl.constexpr(int(DrawStatus.NOT_A_NUMBER))

TILE = 4096
_WARPS = 4
_MAX_REGISTERS = 96  # then five programs share a multiprocessor, and none spills


@triton.jit
def _scan(
    logits_ptr,
    draws_ptr,
    best_ptr,
    least_ptr,
    winner_ptr,
    num_listed_ptr,
    row_stride,
    vocab_size,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits_row = logits_ptr + row * row_stride
    ids = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits_row + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    best = tl.max(x, 0)
    place = row * TILES + tile
    tl.store(best_ptr + place, best)
    kind = tl.load(draws_ptr + row * _COLUMNS + 5)
    winner = tl.full((), -1, tl.int32)
    if kind == _GREEDY:
        winner = tl.min(tl.where(x == best, ids, LAST_ID), 0)
    elif kind == _PLAIN:
        if (best > float("-inf")) & (best < float("inf")):
            winner = race(logits_row, draws_ptr + row * _COLUMNS, x, ids, best)
    else:
        tl.store(least_ptr + place, tl.min(tl.where(x > float("-inf"), x, float("inf")), 0))
        if tile == 0:
            tl.store(num_listed_ptr + row, 0)
    tl.store(winner_ptr + place, winner)


@triton.jit
def _settle(
    logits_ptr,
    draws_ptr,
    best_ptr,
    winner_ptr,
    token_ids_ptr,
    status_ptr,
    row_stride,
    TILES: tl.constexpr,
    TILES_2: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES_2)
    best_T = tl.load(best_ptr + row * TILES + tile, mask=tile < TILES, other=float("-inf"))
    winner_T = tl.load(winner_ptr + row * TILES + tile, mask=tile < TILES, other=-1)
    best = tl.max(best_T, 0)
    draw = draws_ptr + row * _COLUMNS
    token = tl.full((), -1, tl.int32)
    status = 0
    if best == float("inf"):
        status = _NOT_A_NUMBER
    elif best == float("-inf"):
        status = _EMPTY
    elif tl.load(draw + 5) == _GREEDY:
        token = tl.min(tl.where(best_T == best, winner_T, LAST_ID), 0)
    else:
        there = winner_T >= 0
        x_T = tl.load(logits_ptr + row * row_stride + winner_T, mask=there, other=float("-inf")).to(tl.float64)
        key = tl.load(draw).to(tl.uint64, bitcast=True)
        score_T = (x_T - best.to(tl.float64)) / load_f64(draw + 1) + gumbel(key, winner_T)
        score_T = tl.where(there, score_T, float("-inf"))
        token = tl.min(tl.where(there & (score_T == tl.max(score_T, 0)), winner_T, LAST_ID), 0)
    tl.store(token_ids_ptr + row, token.to(tl.int64))
    tl.store(status_ptr + row, status)


def draw_packed(
    logits_RV: Tensor, draws_R6: Tensor, *, truncated: bool = True, tile: int = TILE, room: int = truncation.ROOM
) -> tuple[Tensor, Tensor]:
    """As `common.kernels.draws.draw_packed`. `tile`, `room`: powers of two, smaller ones in tests."""
    rows, vocab_size = logits_RV.shape
    assert logits_RV.stride(1) == 1
    assert draws_R6.shape == (rows, COLUMNS)
    assert draws_R6.is_contiguous()
    assert vocab_size <= MAX_VOCAB
    dev, tiles = logits_RV.device, triton.cdiv(vocab_size, tile)
    token_ids_R = torch.empty(rows, dtype=torch.int64, device=dev)
    status_R = torch.empty(rows, dtype=torch.int8, device=dev)
    if rows == 0:
        return token_ids_R, status_R
    best_RT = torch.empty(rows, tiles, dtype=torch.float32, device=dev)
    least_RT = torch.empty_like(best_RT)
    winner_RT = torch.empty(rows, tiles, dtype=torch.int32, device=dev)
    num_listed_R = torch.empty(rows, dtype=torch.int32, device=dev)
    stride = logits_RV.stride(0)
    _scan[rows, tiles](
        logits_RV,
        draws_R6,
        best_RT,
        least_RT,
        winner_RT,
        num_listed_R,
        stride,
        vocab_size,
        tiles,
        tile,
        num_warps=_WARPS,
        maxnreg=_MAX_REGISTERS,
    )
    if truncated:
        truncation.race_kept(logits_RV, draws_R6, best_RT, least_RT, winner_RT, num_listed_R, tile=tile, room=room)
    _settle[rows,](
        logits_RV,
        draws_R6,
        best_RT,
        winner_RT,
        token_ids_R,
        status_R,
        stride,
        tiles,
        triton.next_power_of_2(tiles),
        num_warps=1,
    )
    return token_ids_R, status_R


def draw_rows(logits_RV: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """As `common.kernels.sampling.draw_rows`."""
    packed_R6 = pack_draws(draws)
    return draw_packed(logits_RV, to_device(packed_R6, logits_RV.device), truncated=any_truncated(packed_R6))
