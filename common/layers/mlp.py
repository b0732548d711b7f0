"""SwiGLU feed-forward (Shazeer 2020): down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor

from common.kernels.ops import silu_mul
from common.layers.base import Build, Layer
from common.layers.linear import ColumnLinear, RowLinear


class SwiGLU(Layer):
    def __init__(self, build: Build, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        parts = {"gate_proj": (intermediate_size, 1), "up_proj": (intermediate_size, 1)}
        self.gate_up_proj = ColumnLinear(build, hidden_size, parts, bias=bias)
        self.down_proj = RowLinear(build, intermediate_size, 1, hidden_size, bias=bias)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_up_proj(x_TD)))
