"""The weights of SwiGLU experts, all of them in one tensor each."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ExpertWeights(NamedTuple):
    """[gate | up] [E, 2 I, D] and down [E, D, I]; in E4M3 with fp32 scales of 128 x 128 blocks, else without."""

    gate_up_ELD: Tensor
    down_EDI: Tensor
    gate_up_scales: Tensor | None = None
    down_scales: Tensor | None = None
