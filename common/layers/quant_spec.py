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
    with a scale for each `block` (`weight_scale`) and their shape (`weight_shape`).

    `ignored`: modules that are not quantised, named by `quantization_config`'s field `ignored_by`: by their names, by
    regular expressions after "re:" and, with `by_parts`, by any run of the parts of a name ("mlp.gate", "visual",
    "model.layers.0"). All other linear layers are quantised; where `targets` does not say "Linear", those it names.
    """

    method: Literal["fp8", "int4"]
    block: tuple[int, int]
    fp4_experts: bool = False
    ignored: tuple[str, ...] = ()
    ignored_by: str = "ignore"
    by_parts: bool = False
    targets: tuple[str, ...] = ("Linear",)

    block_fp4 = (1, 32)

    def is_ignored(self, *modules: str) -> bool:
        """`modules`: all names of one, ours and the checkpoint's."""
        return any(self._names(entry, module) for entry in self.ignored for module in modules)

    def covers(self, *modules: str) -> bool:
        """Must that linear layer be quantised?"""
        is_meant = "Linear" in self.targets or any(self._names(t, module) for t in self.targets for module in modules)
        return is_meant and not self.is_ignored(*modules)

    def _names(self, entry: str, module: str) -> bool:
        if entry.startswith("re:"):
            return re.match(entry.removeprefix("re:"), module) is not None
        return f".{entry}." in f".{module}." if self.by_parts else entry == module
