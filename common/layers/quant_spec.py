"""How the weights of a checkpoint are quantised, as plain data (no torch, so that a model's spec needs none)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

WHOLE = 2**31
"""Of a block, rows or columns: all there are."""


@dataclass(frozen=True)
class QuantSpec:
    """Which tensors are quantised the checkpoint itself says, by their names and types; this says how.

    fp8: weights in E4M3 with a scale for each block of `block` (rows, columns), beside them as `weight_scale_inv`
    (DeepSeek-V3), `scale` (V4) or `weight_scale`, factors all three; a block may be a row, or all of a tensor. With
    `fp4_experts` the routed experts' weights are pairs of E2M1 in a byte, the even column in its low half, with a scale
    for `block_fp4` columns of a row.

    int4: weights from -8 to 7, eight to a 32-bit word (`weight_packed`, the first column in the lowest bits, plus 8),
    with a scale for each `block` (`weight_scale`) and their shape (`weight_shape`). `ignored`: modules, as names or
    as regular expressions after "re:", that must not be quantised.
    """

    method: Literal["fp8", "int4"]
    block: tuple[int, int]
    fp4_experts: bool = False
    ignored: tuple[str, ...] = ()

    block_fp4 = (1, 32)

    def is_ignored(self, module: str) -> bool:
        return any(
            re.match(entry.removeprefix("re:"), module) if entry.startswith("re:") else entry == module
            for entry in self.ignored
        )
