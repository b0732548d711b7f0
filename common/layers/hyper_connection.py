"""Hyper-connections (Xie et al. 2026; DeepSeek-V4, section 2.2): several residual streams instead of one.

    x = sum over s of pre[s] * stream s                     what a block computes on
    stream k = post[k] * block(x) + sum over j of comb[j, k] * stream j

A token's weights follow from its own streams; comb is doubly stochastic, so that mixing keeps what the streams hold.
All of it is fp32 whatever the model computes in.

Shape letters: T tokens, S streams, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.kernels.compress_ops import collapse_streams, collapse_weights, mix_streams, stream_weights
from common.kernels.ops import linear, rms_norm
from common.layers.base import Build, Init, Layer, Slot
from common.layers.compress_spec import StreamSpec


class StreamMap(Layer):
    """Checkpoint tensors `prefix`fn [out, S * D], `prefix`base [out] and `prefix`scale, all fp32."""

    transparent = True

    def __init__(self, build: Build, prefix: str, width: int, out: int, scales: int, eps: float) -> None:
        self._prefix = prefix
        self._eps = eps
        self._ones = torch.ones(width, device=build.device)
        self._fn = torch.empty(out, width, device=build.device)
        self.base = torch.empty(out, device=build.device)
        self.scale = torch.empty(scales, device=build.device)

    def own_slots(self) -> Iterator[Slot]:
        yield Slot(f"{self._prefix}fn", self._fn, tuple(self._fn.shape))
        yield Slot(f"{self._prefix}base", self.base, tuple(self.base.shape), init=Init.ZEROS)
        yield Slot(f"{self._prefix}scale", self.scale, tuple(self.scale.shape), init=Init.ONES)

    def __call__(self, streams_TSD: Tensor) -> Tensor:
        """fp32 [T, out] of the normed streams."""
        return linear(rms_norm(streams_TSD.flatten(1).float(), self._ones, self._eps), self._fn)


class HyperConnection(Layer):
    """Around one block. `prefix`: of its checkpoint tensors."""

    transparent = True

    def __init__(self, build: Build, prefix: str, hidden_size: int, spec: StreamSpec, norm_eps: float) -> None:
        self._spec = spec
        count = spec.count
        self.map = StreamMap(build, prefix, count * hidden_size, (2 + count) * count, 3, norm_eps)

    def collapse(self, streams_TSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the block's input [T, D], and what `expand` takes)."""
        spec = self._spec
        mix = self.map(streams_TSD)
        pre_TS, post_TS, comb_TSS = stream_weights(mix, self.map.scale, self.map.base, spec.count, spec.steps, spec.eps)
        return collapse_streams(streams_TSD, pre_TS), post_TS, comb_TSS

    def expand(self, streams_TSD: Tensor, y_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> None:
        """Mix the streams, in place, and add the block's output `y_TD`."""
        mix_streams(streams_TSD, y_TD, post_TS, comb_TSS)


class HyperHead(Layer):
    """The streams become one row: before the final norm."""

    transparent = True

    def __init__(self, build: Build, prefix: str, hidden_size: int, spec: StreamSpec, norm_eps: float) -> None:
        self._eps = spec.eps
        self.map = StreamMap(build, prefix, spec.count * hidden_size, spec.count, 1, norm_eps)

    def __call__(self, streams_TSD: Tensor) -> Tensor:
        pre_TS = collapse_weights(self.map(streams_TSD), self.map.scale, self.map.base, self._eps)
        return collapse_streams(streams_TSD, pre_TS)
