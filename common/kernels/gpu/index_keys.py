"""An indexer's keys on a GPU: layer norm, rotation of the first elements, and the write to the cache, in one kernel.

What a packed key holds is `common.kvcache.packing`'s: a row of up to 128 numbers of 8 bits and one scale.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from common.kernels.gpu.rows import Packed, power_scale, rounded8


@triton.jit
def _normed(x_ptr, weight_ptr, bias_ptr, i, mask, mean, scale):
    """Rounded to the type of x."""
    x = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + i, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, (x - mean) * scale * weight + bias, 0.0).to(x_ptr.dtype.element_ty)


@triton.jit
def _store_keys(
    keys_ptr,
    keys_stride,
    weight_ptr,
    bias_ptr,
    eps,
    cos_ptr,
    cos_stride,
    sin_ptr,
    sin_stride,
    slots_ptr,
    cache_ptr,
    scales_ptr,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    SCALES_AT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PACKED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    half: tl.constexpr = ROPE // 2
    row = keys_ptr + token * keys_stride
    i, j = tl.arange(0, WIDTH_BLOCK), tl.arange(0, HALF_BLOCK)
    inside, turns = i < WIDTH, j < half
    x = tl.load(row + i, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / WIDTH
    centred = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    straight = _normed(row, weight_ptr, bias_ptr, i, inside & (i >= ROPE), mean, scale).to(tl.float32)
    low_at, high_at = j, half + j
    if INTERLEAVED:
        low_at, high_at = 2 * j, 2 * j + 1
    low = _normed(row, weight_ptr, bias_ptr, low_at, turns, mean, scale).to(tl.float32)
    high = _normed(row, weight_ptr, bias_ptr, high_at, turns, mean, scale).to(tl.float32)
    cos, sin = cos_ptr + token * cos_stride + j, sin_ptr + token * sin_stride + j
    cos_low = tl.load(cos, mask=turns, other=0.0).to(tl.float32)
    sin_low = tl.load(sin, mask=turns, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + half, mask=turns, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + half, mask=turns, other=0.0).to(tl.float32)
    first = (low * cos_low + high * sin_low).to(dtype).to(tl.float32)
    second = (high * cos_high + low * sin_high).to(dtype).to(tl.float32)

    slot = tl.load(slots_ptr + token)
    start = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * TOKEN_STRIDE
    if PACKED:
        broken = (mean - mean) != 0.0  # then none of them is a number
        straight, first = tl.where(broken, 0.0, straight), tl.where(broken, 0.0, first)
        second = tl.where(broken, 0.0, second)
        turned = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
        kept, inverse = power_scale(tl.maximum(tl.max(tl.abs(straight), 0), turned))
        straight, first = rounded8(straight * inverse), rounded8(first * inverse)
        second = rounded8(second * inverse)
        tl.store(scales_ptr + start // 4 + SCALES_AT, tl.where(broken, float("nan"), kept))
    stored = cache_ptr.dtype.element_ty
    tl.store(cache_ptr + start + i, straight.to(stored), mask=inside & (i >= ROPE))
    tl.store(cache_ptr + start + j, first.to(stored), mask=turns)
    tl.store(cache_ptr + start + half + j, second.to(stored), mask=turns)


def store_keys(
    keys_TD: Tensor,
    norm: tuple[Tensor, Tensor, float],
    rotation: tuple[Tensor, Tensor],
    cache: Tensor,
    slots_T: Tensor,
    *,
    interleaved: bool,
    packed: bool,
) -> None:
    """Norm (weight, bias, epsilon), turn the first elements by (cos, signed sin) [T, 1, R] and store at int64 slots.

    `cache`: [num_blocks, 1, 1, block_size, D].
    """
    tokens, width = keys_TD.shape
    weight, bias, eps = norm
    cos, sin = rotation
    rope = cos.shape[2]
    form = Packed.of(cache, width, 0) if packed else None
    stored = cache if form is None else form.bytes8
    assert keys_TD.stride(1) == stored.stride(4) == cos.stride(2) == sin.stride(2) == 1
    assert form is None or form.num_scales == 1
    if tokens == 0:
        return
    _store_keys[(tokens,)](
        keys_TD,
        keys_TD.stride(0),
        weight,
        bias,
        eps,
        cos,
        cos.stride(0),
        sin,
        sin.stride(0),
        slots_T,
        stored,
        stored if form is None else form.scales,
        stored.stride(0),
        BLOCK_SIZE=cache.shape[3],
        TOKEN_STRIDE=stored.stride(3),
        WIDTH=width,
        ROPE=rope,
        WIDTH_BLOCK=triton.next_power_of_2(width),
        HALF_BLOCK=triton.next_power_of_2(rope // 2),
        SCALES_AT=0 if form is None else form.scales_at,
        INTERLEAVED=interleaved,
        PACKED=packed,
        num_warps=1,
    )
