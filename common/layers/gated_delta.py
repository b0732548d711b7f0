"""Gated delta net: linear attention whose memory is a state of fixed size (Yang et al. 2024; Qwen3-Next).

    x -> projections -> q, k, v -> causal depthwise convolution, silu -> q and k of unit length
      -> gated delta rule, decay -exp(A_log) softplus(a + dt_bias), strength sigmoid(b) -> norm, silu(z) -> out

A sequence keeps, per layer, the last `conv_width - 1` inputs of the convolution (what it adds up is then exactly what
one pass over the prompt would) and the rule's state in fp32. Both lie in its block of a snapshot group, head by head
so that ranks can hold a part of them, and are updated in place:

    gdn_conv       [conv_width - 1 parts, key heads, channels of a key head]    oldest first, in the model's type
    gdn_recurrent  [value heads, key width * value width]                       fp32

Shape letters: T tokens of a step, G key heads, H value heads, R value heads of a key head, K key width, V value
width, C channels of a key head, W tokens that the convolution sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.kernels import gpu
from common.kernels.delta_ops import DeltaInputs, DeltaWeights, delta_net
from common.kernels.ops import linear
from common.kvcache.layout import KVPlace
from common.layers.base import Build, Init, Layer, Slot
from common.layers.delta_spec import CONV_REGION, RECURRENT_REGION, DeltaSpec
from common.layers.linear import RowLinear
from common.layers.step import Step

_FORM = "split by head"


@dataclass(frozen=True)
class Heads:
    """What a rank holds: its key heads from `first` on, with the value heads that they serve."""

    spec: DeltaSpec
    first: int
    num_keys: int

    @property
    def num_values(self) -> int:
        return self.num_keys * self.spec.values_per_key

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of queries, keys and values."""
        keys = self.num_keys * self.spec.key_dim
        return keys, keys, self.num_values * self.spec.value_dim

    @property
    def starts(self) -> tuple[int, int, int]:
        """Where a checkpoint's channels, [all queries | all keys | all values], hold those of this rank."""
        spec = self.spec
        keys, values = spec.num_key_heads * spec.key_dim, spec.values_per_key * spec.value_dim
        mine = self.first * spec.key_dim
        return mine, keys + mine, 2 * keys + self.first * values


class DeltaProjection(Layer):
    """Everything a token is projected to, as one product. `fused`: which of two ways a checkpoint has it in.

    in_proj_qkv [all q | all k | all v], in_proj_z, in_proj_b, in_proj_a               Qwen3.5
    in_proj_qkvz, in_proj_ba: per key head [q | k | its v | its z] and [its b | its a]   Qwen3-Next (fused)
    """

    transparent = True

    def __init__(self, build: Build, hidden_size: int, heads: Heads, *, fused: bool) -> None:
        self._heads = heads
        self._fused = fused
        self._fixed = build.fixed
        self._hidden_size = hidden_size
        self._rows = (*heads.widths, heads.widths[2], heads.num_values, heads.num_values)
        self.weight = build.empty(sum(self._rows), hidden_size)

    def own_slots(self) -> Iterator[Slot]:
        spec, heads = self._heads.spec, self._heads
        per_key, values = spec.values_per_key, spec.values_per_key * spec.value_dim

        def by_unit(name: str, rows: Tensor, unit: int) -> Slot:
            shape = (spec.num_key_heads * unit, self._hidden_size)
            return Slot(f"{name}.weight", rows, shape, 0, heads.first * unit)

        if self._fused:
            wide = sum(self._rows[:4])
            yield by_unit("in_proj_qkvz", self.weight[:wide], spec.unit_width + values)
            yield by_unit("in_proj_ba", self.weight[wide:], 2 * per_key)
            return
        *qkv, z, b, a = self.weight.split_with_sizes(self._rows)
        whole = (spec.num_key_heads * spec.unit_width, self._hidden_size)
        for rows, start in zip(qkv, heads.starts, strict=True):
            yield Slot("in_proj_qkv.weight", rows, whole, 0, start, form=_FORM)
        for name, rows, unit in (("in_proj_z", z, values), ("in_proj_b", b, per_key), ("in_proj_a", a, per_key)):
            yield by_unit(name, rows, unit)

    def __call__(self, x_TD: Tensor) -> DeltaInputs:
        spec, units = self._heads.spec, self._heads.num_keys
        y = linear(x_TD, self.weight, fixed=self._fixed)
        if not self._fused:
            return DeltaInputs(*(p.view(len(x_TD), units, -1) for p in y.split_with_sizes(self._rows, 1)))
        values, per_key = spec.values_per_key * spec.value_dim, spec.values_per_key
        wide, narrow = (p.view(len(x_TD), units, -1) for p in y.tensor_split((sum(self._rows[:4]),), 1))
        q, k, v, z = wide.split_with_sizes((spec.key_dim, spec.key_dim, values, values), 2)
        b, a = narrow.split_with_sizes((per_key, per_key), 2)
        return DeltaInputs(q, k, v, z, b, a)


class CausalConv(Layer):
    """The kernel of a depthwise convolution: `weight` [channels, 1, conv_width], the newest input last.

    `taps_GWC` are the same by key head, in fp32.
    """

    def __init__(self, build: Build, heads: Heads) -> None:
        self._heads = heads
        shape = (sum(heads.widths), 1, heads.spec.conv_width)
        self._weight = torch.empty(shape, dtype=torch.float32, device=build.device)

    def own_slots(self) -> Iterator[Slot]:
        spec = self._heads.spec
        whole = (spec.num_key_heads * spec.unit_width, 1, spec.conv_width)
        parts = self._weight.split_with_sizes(self._heads.widths)
        for target, start in zip(parts, self._heads.starts, strict=True):
            yield Slot("weight", target, whole, 0, start, form=_FORM)

    def derive_own(self) -> None:
        parts = self._weight.squeeze(1).split_with_sizes(self._heads.widths)
        by_head = torch.cat([p.reshape(self._heads.num_keys, -1, p.shape[-1]) for p in parts], 1)
        self.taps_GWC = by_head.transpose(1, 2).contiguous()


class GatedDeltaNet(Layer):
    """Checkpoint names under `linear_attn.`. ValueError where ranks do not divide the key heads."""

    can_record = not gpu.unavailable()
    """On a GPU: does it launch the same work for the same shapes? In torch the rule's chunks follow the lengths."""

    def __init__(
        self, build: Build, hidden_size: int, spec: DeltaSpec, places: Mapping[str, KVPlace], eps: float, *, fused: bool
    ) -> None:
        if spec.num_key_heads % build.tp.size:
            raise ValueError(f"{spec.num_key_heads} key heads do not divide over {build.tp.size} ranks")
        heads = Heads(spec, *build.tp.share(spec.num_key_heads))
        self._heads = heads
        self._eps = eps
        self._fixed = build.fixed
        self._conv_place, self._state_place = places[CONV_REGION], places[RECURRENT_REGION]
        self.in_proj = DeltaProjection(build, hidden_size, heads, fused=fused)
        self.conv1d = CausalConv(build, heads)
        self._a_log_H, self._dt_bias_H = (
            torch.empty(heads.num_values, dtype=torch.float32, device=build.device) for _ in range(2)
        )
        self._norm_V = build.empty(spec.value_dim)
        self.out_proj = RowLinear(build, spec.num_value_heads, spec.value_dim, hidden_size, bias=False)

    def own_slots(self) -> Iterator[Slot]:
        spec = self._heads.spec
        shape, start = (spec.num_value_heads,), self._heads.first * spec.values_per_key
        yield Slot("A_log", self._a_log_H, shape, 0, start)
        yield Slot("dt_bias", self._dt_bias_H, shape, 0, start, Init.ONES)
        yield Slot("norm.weight", self._norm_V, (spec.value_dim,), init=Init.ONES)

    def derive(self) -> None:
        super().derive()
        rate_H = -self._a_log_H.exp()
        self._weights = DeltaWeights(self.conv1d.taps_GWC, rate_H, self._dt_bias_H, self._norm_V, self._eps)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        conv, state = step.cache(self._conv_place), step.cache(self._state_place)
        y = delta_net(
            self.in_proj(x_TD),
            self._weights,
            conv,
            state,
            step.states(self._state_place),
            step.ctx.query_starts_S1,
            max_query_len=step.ctx.max_query_len,
            fixed=self._fixed,
            shared=step.shared,
        )
        return self.out_proj(y)
