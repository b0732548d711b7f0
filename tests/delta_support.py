"""What the tests of the gated delta rule share: its definition in float64, and layers of random numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.kernels.delta_ops import DeltaInputs, DeltaWeights

Op = Callable[..., Tensor]


def defined(given: Sequence[Tensor], state_HKV: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token as the paper writes it, in float64: (outputs, last state)."""
    state = state_HKV.double().clone()
    out = []
    for q, k, v, decay, beta in zip(*(x.double() for x in given), strict=True):
        state = state * decay.exp()[:, None, None]
        said = torch.einsum("hk,hkv->hv", k, state)
        state = state + torch.einsum("hk,hv->hkv", k, (v - said) * beta[:, None])
        out.append(torch.einsum("hk,hkv->hv", q, state))
    return torch.stack(out), state


@dataclass(frozen=True)
class Sizes:
    units: int = 2
    per_unit: int = 2
    key_width: int = 16
    value_width: int = 8
    conv_width: int = 4

    @property
    def heads(self) -> int:
        return self.units * self.per_unit

    @property
    def channels(self) -> int:
        return 2 * self.key_width + self.per_unit * self.value_width


SIZES = {
    "small": Sizes(),
    "as released": Sizes(2, 2, 128, 128),
    "odd": Sizes(3, 1, 12, 40, 3),
    "columns left over": Sizes(1, 3, 20, 70, 2),
}


class Net:
    """Random weights, and states of 9 sequences in a pool whose other blocks are NaN; on torch's default device."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, *, fused: bool, scale: float = 1.0) -> None:
        self.sizes, self.dtype, self.fused, self.scale = sizes, dtype, fused, scale
        s = sizes
        self.weights = DeltaWeights(
            taps_GWC=torch.randn(s.units, s.conv_width, s.channels) / 2,
            rate_H=-torch.rand(s.heads) * 4,
            dt_bias_H=torch.randn(s.heads) - 3,
            norm_V=(1 + torch.randn(s.value_width) / 10).to(dtype),
            eps=1e-6,
        )
        conv_shape = (20, 2, s.conv_width - 1, s.units, 1, s.channels)
        self.conv = torch.full(conv_shape, float("nan"), dtype=dtype)[:, 1]
        self.state = torch.full((20, 2, 1, s.heads, 1, s.key_width * s.value_width), float("nan"))[:, 0]
        self.blocks = torch.randperm(20)[:9]
        self.conv[self.blocks] = 0
        self.state[self.blocks] = 0

    def copy(self) -> Net:
        other = Net(self.sizes, self.dtype, fused=self.fused)
        other.weights, other.scale = self.weights, self.scale
        other.conv, other.state, other.blocks = self.conv.clone(), self.state.clone(), self.blocks
        return other

    def rows(self, num_tokens: int) -> Tensor:
        s = self.sizes
        width = s.units * (s.channels + s.per_unit * s.value_width + 2 * s.per_unit)
        return (torch.randn(num_tokens, width) * self.scale).to(self.dtype)

    def views(self, rows: Tensor) -> DeltaInputs:
        """In one of the two orders of checkpoints."""
        s, values = self.sizes, self.sizes.per_unit * self.sizes.value_width
        sizes = (s.key_width, s.key_width, values, values, s.per_unit, s.per_unit)
        if self.fused:
            return DeltaInputs(*rows.view(len(rows), s.units, -1).split_with_sizes(sizes, 2))
        parts = rows.split_with_sizes([s.units * n for n in sizes], 1)
        return DeltaInputs(*(p.view(len(rows), s.units, -1) for p in parts))

    def run(self, work: Sequence[tuple[int, Tensor]], op: Op) -> list[Tensor]:
        """Rows of some sequences in one step."""
        counts = [len(rows) for _, rows in work]
        starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        blocks = self.blocks[torch.tensor([s for s, _ in work])]
        inputs = self.views(torch.cat([rows for _, rows in work]))
        return list(op(inputs, self.weights, self.conv, self.state, blocks, starts).split(counts))

    def expected(self, rows: Tensor) -> Tensor:
        """Of a whole sequence, in float64."""
        s, w = self.sizes, self.weights
        x = self.views(rows.double())
        channels = torch.cat((x.q_TGK, x.k_TGK, x.v), -1)
        padded = functional.pad(channels, (0, 0, 0, 0, s.conv_width - 1, 0))
        mixed = functional.silu(sum(padded[i : i + len(rows)] * w.taps_GWC[:, i] for i in range(s.conv_width)))
        q, k = (
            functional.normalize(part, dim=-1).repeat_interleave(s.per_unit, 1)
            for part in (mixed[..., : s.key_width], mixed[..., s.key_width : 2 * s.key_width])
        )
        v = mixed[..., 2 * s.key_width :].reshape(len(rows), s.heads, -1)
        a, b = (part.reshape(len(rows), s.heads) for part in (x.a_TGR, x.b_TGR))
        decay = functional.softplus(a + w.dt_bias_H) * w.rate_H
        state = torch.zeros(s.heads, s.key_width, s.value_width)
        out, last = defined((q * s.key_width**-0.5, k, v, decay, b.sigmoid()), state)
        self.last_state = last
        normed = functional.rms_norm(out, (s.value_width,), w.norm_V.double(), w.eps)
        return (normed * functional.silu(x.z.reshape(out.shape))).flatten(1)

    def kept_after(self, rows: Tensor) -> Tensor:
        """Of a whole sequence: the last inputs of its convolution, [conv_width - 1, units, channels]."""
        x = self.views(rows)
        channels = torch.cat((x.q_TGK, x.k_TGK, x.v), -1)
        return functional.pad(channels, (0, 0, 0, 0, self.sizes.conv_width - 1, 0))[len(rows) :]
