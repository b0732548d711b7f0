"""SwiGLU feed-forward (Shazeer 2020): down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from common.layers.base import Build, Layer, Slot
from common.layers.linear import ColumnLinear, RowLinear


class SwiGLUNames(NamedTuple):
    """What a checkpoint calls the three matrices."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


SWIGLU_NAMES = SwiGLUNames()


class SwiGLU(Layer):
    """`limit`: gate and up are cut off there (DeepSeek-V4), 0 is no limit. `reduce`: see `RowLinear`."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        limit: float = 0.0,
        names: SwiGLUNames = SWIGLU_NAMES,
        reduce: bool = True,
    ) -> None:
        self._names = names
        self._limit = limit
        parts = {names.gate: (intermediate_size, 1), names.up: (intermediate_size, 1)}
        self.gate_up_proj = ColumnLinear(build, hidden_size, parts, bias=bias)
        self._down_proj = RowLinear(build, intermediate_size, 1, hidden_size, bias=bias, reduce=reduce)

    def own_slots(self) -> Iterator[Slot]:
        yield from self._down_proj.slots(f"{self._names.down}.")

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._down_proj(self.gate_up_proj.silu_mul(x_TD, self._limit))
