"""Numbers of a rotary embedding, as plain data (no torch, so that a model's spec needs none)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

RopeType = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeSpec:
    """`factor`: context extension. Wavelengths are judged against `original_max_positions` tokens.

    llama3 reads the frequency factors; yarn (Peng et al. 2023) reads the betas (rotations over the original
    context between which it blends) and scales cos and sin by `attention_factor`.
    `sections`: rotary pairs by axis of multimodal rotation (time, height, width), see `common.layers.rope`; empty
    where a token has one position. `rotary_dim`: elements of a head that turn, its first ones; 0 is all.
    """

    rope_type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    sections: tuple[int, ...] = ()
    rotary_dim: int = 0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Yarn's attention scale for a context extended `factor` times."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
