"""Rotary position embedding (Su et al. 2021), half-split: element i of a head turns with element i + D/2.

The table is made once in fp32, [positions, 2, D] of cos and signed sin; a step gathers its rows once and all
layers use them. Looking rows up, and not computing them, also makes a token's rotation independent of the
batch that it is in.

Shape letters: P positions, T tokens, H heads, D head width.
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

    def __call__(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, signed sin) of the tokens, each [T, 1, D]."""
        rows_T2D = self._table_P2D.index_select(0, positions_T)
        return rows_T2D[:, :1], rows_T2D[:, 1:]


def apply_rope(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Turn each head; a new contiguous [T, H, D]."""
    return rope(x_THD, cos_T1D, sin_T1D)


def rope_table(spec: RopeSpec, head_dim: int, max_positions: int) -> Tensor:
    """fp32 [P, 2, D]: cos, and sin with its sign for the half it is applied to."""
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(spec, head_dim)
    cos = angles.cos() * spec.attention_factor
    sin = angles.sin() * spec.attention_factor
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)


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
