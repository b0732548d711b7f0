"""The digest of `common.kvcache.digest`, for many runs of tokens in one launch: a sum, so programs add up their parts.

A program takes some (layer, part) rows of one segment, in tiles of tokens x words; it is short, so what computes beside
it soon gets its turn. A word's key is its column's key xor its token's. What is digested may lie anywhere: places are
counted in words from an anchor, a tensor of which the address alone is used.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from common.kernels.native import DigestGeometry

_TILE = 1024  # words
_TILES = 16  # that a program takes


@triton.jit
def _mix64(z):
    z = (z ^ (z >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit(do_not_specialize=["num_rows"])
def _digest(
    anchor_ptr,  # int64
    segments_ptr,  # int64 [N, 4]: words from the anchor to row 0's first token, its position, tokens, which sum
    sums_ptr,  # int64
    num_rows,
    num_parts,
    num_words,
    layer_stride,  # words, as are all strides
    part_stride,
    token_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WHOLE: tl.constexpr,  # rows are whole numbers of tiles wide
    ALIGNED: tl.constexpr,  # all places and strides are even
):
    segment = segments_ptr + tl.program_id(0).to(tl.int64) * 4
    place = tl.load(segment)
    position = tl.load(segment + 1)
    num_tokens = tl.load(segment + 2)
    first_row = tl.program_id(1) * ROWS
    c1 = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    c2 = tl.full([], 0xC2B2AE3D27D4EB4F, tl.uint64)
    c3 = tl.full([], 0x165667B19E3779F9, tl.uint64)
    total = tl.zeros([TOKENS, WORDS], tl.uint64)
    for first_word in range(0, num_words, WORDS):
        word = first_word + tl.arange(0, WORDS)
        column_key = _mix64((word + 1).to(tl.uint64) * c3)
        for first_token in range(0, num_tokens, TOKENS):
            token = first_token + tl.arange(0, TOKENS).to(tl.int64)
            token_seed = (position + token).to(tl.uint64) * c1 + 1
            mask = (token < num_tokens)[:, None]
            if not WHOLE:
                mask = mask & (word < num_words)[None, :]
            for row in range(first_row, tl.minimum(first_row + ROWS, num_rows)):
                wide_row = tl.full([], 0, tl.int64) + row
                start = place + (wide_row // num_parts) * layer_stride + (wide_row % num_parts) * part_stride
                starts = start + token * token_stride
                if ALIGNED:
                    starts = tl.multiple_of(starts, 2)
                x = tl.load(anchor_ptr + starts[:, None] + word[None, :], mask=mask, other=0).to(
                    tl.uint64, bitcast=True
                )
                key = column_key[None, :] ^ _mix64(token_seed + wide_row.to(tl.uint64) * c2)[:, None]
                low = x.to(tl.uint32) + key.to(tl.uint32)
                high = (x >> 32).to(tl.uint32) + (key >> 32).to(tl.uint32)
                total += tl.where(mask, low.to(tl.uint64) * high.to(tl.uint64), 0)
    whole = tl.sum(tl.reshape(total, [TOKENS * WORDS]), 0).to(tl.int64, bitcast=True)
    tl.atomic_add(sums_ptr + tl.load(segment + 3), whole, sem="relaxed")


def add_digests(
    sums: Tensor, anchor: Tensor, segments_N4: Tensor, geometry: DigestGeometry, max_tokens: int, aligned: bool
) -> None:
    """Add to `sums` (int64) what each segment's tokens have in their digest, modulo 2^64.

    `segments_N4`: int64, the words from `anchor` (int64) to layer 0's, part 0's first token, its absolute position, the
    number of tokens (at most `max_tokens`), and which of the sums they belong to. `aligned`: places are even.
    """
    g, num_words = geometry, geometry.token_nbytes // 8
    strides = [g.layer_stride, g.part_stride, g.token_stride]
    assert not any(n % 8 for n in (*strides, g.token_nbytes)), "digests count whole words"
    words = _tile_width(num_words, max_tokens)
    tokens = max(1, min(_TILE // words, triton.next_power_of_2(max_tokens)))
    num_rows = g.num_layers * g.num_parts
    tiles_per_row = triton.cdiv(max_tokens, tokens) * triton.cdiv(num_words, words)
    rows = min(max(1, _TILES // tiles_per_row), triton.next_power_of_2(num_rows))
    _digest[(len(segments_N4), triton.cdiv(num_rows, rows))](
        anchor,
        segments_N4,
        sums,
        num_rows,
        g.num_parts,
        num_words,
        *(s // 8 for s in strides),
        ROWS=rows,
        TOKENS=tokens,
        WORDS=words,
        WHOLE=num_words % words == 0,
        ALIGNED=aligned and not any(s % 16 for s in strides),
        num_warps=4,
    )


def _tile_width(num_words: int, max_tokens: int) -> int:
    """A power of two: what divides the row if that is not too narrow, more of it where there are few tokens."""
    most = min(_TILE, max(64, _TILE // triton.next_power_of_2(max_tokens)))
    divisor = num_words & -num_words
    if divisor >= 16:
        return min(divisor, most)
    return min(triton.next_power_of_2(num_words), most)
