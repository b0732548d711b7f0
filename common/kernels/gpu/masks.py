"""Grammar masks of packed bits: only logits that are not allowed are written, none is read."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096


@triton.jit
def _forbid(logits_ptr, rows_ptr, mask_ptr, row_stride, mask_stride, vocab_size, TILE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = ids < vocab_size
    words = tl.load(mask_ptr + index * mask_stride + ids // 32, mask=there, other=-1)
    forbidden = ((words >> (ids % 32)) & 1) == 0
    tl.store(logits_ptr + row * row_stride + ids, float("-inf"), mask=there & forbidden)


def forbid(logits_RV: Tensor, rows_G: Tensor, words_GW: Tensor) -> None:
    """As `common.kernels.masks.forbid`."""
    vocab_size = logits_RV.shape[1]
    assert logits_RV.stride(1) == words_GW.stride(1) == 1
    grid = (len(rows_G), triton.cdiv(vocab_size, _TILE))
    _forbid[grid](logits_RV, rows_G, words_GW, logits_RV.stride(0), words_GW.stride(0), vocab_size, _TILE, num_warps=4)
