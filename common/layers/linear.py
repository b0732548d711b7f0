"""Matrix products, packed and split over ranks.

Column: outputs are split; several checkpoint matrices that read the same input are stored as one, so that a
step makes one product instead of three (q, k, v) or two (gate, up). Row: inputs are split, the partial sums
are added over ranks. Weights are [out, in], as in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from common.layers.base import Build, Holder, Init, Slot, TensorParallel, share_size
from common.layers.fp8_weight import blocks_of, empty_weight, fits_blocks, gated_product, product


class ColumnLinear(Holder):
    """`parts`: checkpoint name -> (units, width of a unit); a rank holds whole units of every part."""

    transparent = True

    def __init__(self, build: Build, in_features: int, parts: Mapping[str, tuple[int, int]], *, bias: bool) -> None:
        shares = {name: build.tp.share(units) for name, (units, _) in parts.items()}
        self._parts = dict(parts)
        self._shares = shares
        self._in_features = in_features
        self._fixed = build.fixed
        rows = [shares[name][1] * width for name, (_, width) in parts.items()]
        self.out_features = sum(rows)
        self.is_exact, self.wants_fp8 = build.exact, build.fp8_linears
        self.in_fp8 = build.fp8_linears and self.fits(build.tp.size)
        self.weight, self.scales = empty_weight(build, self.in_fp8, self.out_features, in_features)
        self.bias = build.empty(self.out_features) if bias else None

    def fits(self, ranks: int) -> bool:
        """The last part may end anywhere if every rank has all of it."""
        counts = [(share_size(units, ranks), units, width) for units, width in self._parts.values()]
        rows = [count * width for count, _, width in counts]
        is_last_whole = counts[-1][0] == counts[-1][1]
        return fits_blocks(self._in_features, *(rows[:-1] if is_last_whole else rows))

    def hold_floats(self, dtype: torch.dtype) -> None:
        self.weight, self.scales, self.in_fp8 = torch.empty_like(self.weight, dtype=dtype), None, False

    def own_slots(self) -> Iterator[Slot]:
        row = 0
        for name, (units, width) in self._parts.items():
            first, count = self._shares[name]
            rows = slice(row, row + count * width)
            row = rows.stop
            shape = (units * width, self._in_features)
            scales = blocks_of(self.scales, 0, rows)
            yield Slot(f"{name}.weight", self.weight[rows], shape, 0, first * width, scales=scales, holder=self)
            if self.bias is not None:
                yield Slot(f"{name}.bias", self.bias[rows], shape[:1], 0, first * width, Init.ZEROS)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return product(x_TD, self.weight, self.scales, self.bias, fixed=self._fixed)

    def silu_mul(self, x_TD: Tensor, limit: float) -> Tensor:
        """Of two parts, gate and up: silu(gate) * up (`common.kernels.ops.silu_mul`)."""
        return gated_product(x_TD, self.weight, self.scales, self.bias, limit, fixed=self._fixed)


class RowLinear(Holder):
    """Inputs are `units` x `width`; each rank reads its units, `out_features` are whole on every rank.

    `reduce=False` leaves the partial sums to the caller, who adds others to them before they are added up over
    ranks; it goes with no bias.
    """

    def __init__(
        self, build: Build, units: int, width: int, out_features: int, *, bias: bool, reduce: bool = True
    ) -> None:
        assert reduce or not bias
        first, count = build.tp.share(units)
        self._tp = build.tp if reduce else TensorParallel()
        self._shape = (out_features, units * width)
        self._start = first * width
        self._fixed = build.fixed
        self._units = units
        self.is_exact, self.wants_fp8 = build.exact, build.fp8_linears
        self.in_fp8 = build.fp8_linears and self.fits(build.tp.size)
        self.weight, self.scales = empty_weight(build, self.in_fp8, out_features, count * width)
        self.bias = build.empty(out_features) if bias else None

    def fits(self, ranks: int) -> bool:
        return fits_blocks(share_size(self._units, ranks) * (self._shape[1] // self._units))

    def hold_floats(self, dtype: torch.dtype) -> None:
        self.weight, self.scales, self.in_fp8 = torch.empty_like(self.weight, dtype=dtype), None, False

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("weight", self.weight, self._shape, 1, self._start, scales=self.scales, holder=self)
        if self.bias is not None:
            yield Slot("bias", self.bias, self._shape[:1], init=Init.ZEROS)

    def __call__(self, x_TD: Tensor) -> Tensor:
        if self._tp.size == 1:
            return product(x_TD, self.weight, self.scales, self.bias, fixed=self._fixed)
        out = self._tp.reduce(product(x_TD, self.weight, self.scales, fixed=self._fixed))
        return out if self.bias is None else out.add_(self.bias)
