"""Grammar masks of packed bits: only logits that are not allowed are written, none is read."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096


@triton.jit
def _forbid(logits_ptr, mask_ptr, row_stride, mask_stride, vocab_size, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = ids < vocab_size
    words = tl.load(mask_ptr + row * mask_stride + ids // 32, mask=there, other=-1)
    forbidden = ((words >> (ids % 32)) & 1) == 0
    tl.store(logits_ptr + row * row_stride + ids, float("-inf"), mask=there & forbidden)


def forbid(logits_RV: Tensor, mask_RW: Tensor) -> None:
    """As `common.kernels.masks.forbid`, for int32 masks."""
    rows, vocab_size = logits_RV.shape
    assert logits_RV.stride(1) == 1
    assert mask_RW.stride(1) == 1
    grid = (rows, triton.cdiv(vocab_size, _TILE))
    _forbid[grid](logits_RV, mask_RW, logits_RV.stride(0), mask_RW.stride(0), vocab_size, _TILE, num_warps=4)
