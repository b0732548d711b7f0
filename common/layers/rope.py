"""Rotary position embedding (Su et al. 2021), half-split: element i of a head turns with element i + D/2.

The table is made once in fp32, [positions, 2, D] of cos and signed sin; a step gathers its rows once and all
layers use them. Looking rows up, and not computing them, also makes a token's rotation independent of the
batch that it is in.

Multimodal (Qwen3-VL, interleaved): a token has a position in time, height and width, and each pair of elements turns
by one of the three. Pairs 1, 4, 7 ... take the height and 2, 5, 8 ... the width, as many as their sections say; all
others take the time. With three equal positions that is the plain rotation, bit for bit.

Shape letters: P positions, T tokens, H heads, D width that turns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.kernels.ops import rope
from common.layers.base import Build, Layer
from common.layers.rope_spec import RopeSpec


class Rope(Layer):
    def __init__(self, build: Build, spec: RopeSpec, head_dim: int, max_positions: int) -> None:
        self._table_P2D = rope_table(spec, head_dim, max_positions).to(build.device, build.dtype)
        self._axes_D = rope_axes(spec.sections, head_dim).to(build.device) if spec.sections else None

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, signed sin) of the tokens, each [T, 1, D], for int64 positions [T], or [3, T] with sections."""
        rows = self._table_P2D.index_select(0, positions.reshape(-1))
        if positions.dim() == 2:
            assert self._axes_D is not None, "this rotation takes one position per token"
            rows_3T2D = rows.view(3, -1, *rows.shape[1:])
            rows = rows_3T2D.gather(0, self._axes_D.expand(1, *rows_3T2D.shape[1:]))[0]
        return rows[:, :1], rows[:, 1:]


def apply_rope(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Turn each head; a new contiguous [T, H, D]."""
    return rope(x_THD, cos_T1D, sin_T1D)


def apply_rope_(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, *, interleaved: bool) -> None:
    """Turn each head in place. `interleaved`: element 2i turns with 2i + 1, and they are left as i and i + D/2.

    That order is as good as any, as long as queries and keys share it.
    """
    rope(x_THD, cos_T1D, sin_T1D, interleaved=interleaved, out_THD=x_THD)


def rope_table(spec: RopeSpec, head_dim: int, max_positions: int) -> Tensor:
    """fp32 [P, 2, D]: cos, and sin with its sign for the half it is applied to."""
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(spec, head_dim)
    cos = angles.cos() * spec.attention_factor
    sin = angles.sin() * spec.attention_factor
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)


def rope_axes(sections: tuple[int, ...], head_dim: int) -> Tensor:
    """int64 [D]: the axis (0 time, 1 height, 2 width) that each element turns by."""
    axes_D2 = torch.zeros(head_dim // 2, dtype=torch.int64)
    for axis in (1, 2):
        axes_D2[axis : 3 * sections[axis] : 3] = axis
    return torch.cat((axes_D2, axes_D2))


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """fp32 [D/2] radians per position, in the order of operations of the reference implementations."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    wave = spec.theta**exponent
    if spec.rope_type == "yarn":
        return _yarn(spec, head_dim, wave)
    inv_freq = 1.0 / wave
    if spec.rope_type == "linear":
        return inv_freq / spec.factor
    if spec.rope_type == "llama3":
        return _llama3(spec, inv_freq)
    return inv_freq


def _llama3(spec: RopeSpec, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long waves are slowed `factor` times, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inv_freq
    turns = spec.original_max_positions / wavelength
    smooth = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blended = (1 - smooth) * inv_freq / spec.factor + smooth * inv_freq
    is_long = wavelength > spec.original_max_positions / spec.low_freq_factor
    is_short = wavelength < spec.original_max_positions / spec.high_freq_factor
    return torch.where(is_long, inv_freq / spec.factor, torch.where(is_short, inv_freq, blended))


def _yarn(spec: RopeSpec, head_dim: int, wave: Tensor) -> Tensor:
    """Yarn: a linear ramp over the dimensions, from kept to slowed `factor` times."""

    def dim_of(rotations: float) -> float:
        context = spec.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(context) / (2 * math.log(spec.theta))

    low, high = dim_of(spec.beta_fast), dim_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (spec.factor * wave) * (1 - keep) + 1.0 / wave * keep
