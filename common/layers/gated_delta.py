"""Gated delta net: linear attention whose memory is a state of fixed size (Yang et al. 2024; Qwen3-Next).

    x -> projections -> q, k, v -> causal depthwise convolution, silu -> q and k of unit length
      -> gated delta rule, decay -exp(A_log) softplus(a + dt_bias), strength sigmoid(b) -> norm, silu(z) -> out

A sequence keeps, per layer, the last `conv_width - 1` inputs of the convolution (what it adds up is then exactly what
one pass over the prompt would) and the rule's state in fp32. Both lie in its block of a snapshot group and are
updated in place:

    gdn_conv       [conv_width - 1 parts, key heads, channels of a key head]    oldest first, in the model's type
    gdn_recurrent  [value heads, key width * value width]                       fp32

Channels are in the checkpoint's order, [all queries | all keys | all values]; only the state is kept head by head,
so that ranks can hold a part of it.

Shape letters: T tokens of a step, R sequences, N tokens of one sequence, C channels of the convolution, H value
heads, G key heads, K key width, V value width, W inputs a convolution keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.kernels.ops import linear
from common.kvcache.layout import KVPlace
from common.layers.base import Build, Init, Layer, Slot
from common.layers.delta_rule import chunked_rule, recurrent_step
from common.layers.delta_spec import CONV_REGION, RECURRENT_REGION, DeltaSpec
from common.layers.linear import RowLinear
from common.layers.rms_norm import RMSNorm
from common.layers.step import Step

EPS = 1e-6  # of the length of queries and keys

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

    def segments(self) -> Iterator[tuple[int, int]]:
        """(first channel over all ranks, channels here) of queries, keys and values."""
        spec = self.spec
        keys, values = spec.num_key_heads * spec.key_dim, spec.values_per_key * spec.value_dim
        mine = self.first * spec.key_dim
        yield from zip((mine, keys + mine, 2 * keys + self.first * values), self.widths, strict=True)


class DeltaProjection(Layer):
    """Everything a token is projected to, as one product. `fused`: which of two ways a checkpoint has it in.

    in_proj_qkv [all q | all k | all v], in_proj_z, in_proj_b, in_proj_a             Qwen3.5
    in_proj_qkvz, in_proj_ba: per key head [q | k | its v | its z] and [its b | its a]   Qwen3-Next (fused)
    """

    transparent = True

    def __init__(self, build: Build, hidden_size: int, heads: Heads, *, fused: bool) -> None:
        self._heads = heads
        self._fused = fused
        self._hidden_size = hidden_size
        self._rows = (*heads.widths, heads.widths[2], heads.num_values, heads.num_values)
        self.weight = build.empty(sum(self._rows), hidden_size)

    def own_slots(self) -> Iterator[Slot]:
        spec, first = self._heads.spec, self._heads.first
        per_key, values = spec.values_per_key, spec.values_per_key * spec.value_dim
        if self._fused:
            wide = sum(self._rows[:4])
            for name, rows, unit in (
                ("in_proj_qkvz", self.weight[:wide], spec.unit_width + values),
                ("in_proj_ba", self.weight[wide:], 2 * per_key),
            ):
                yield Slot(f"{name}.weight", rows, (spec.num_key_heads * unit, self._hidden_size), 0, first * unit)
            return
        q, k, v, z, b, a = self.weight.split_with_sizes(self._rows)
        whole = (spec.num_key_heads * spec.unit_width, self._hidden_size)
        for rows, (start, _) in zip((q, k, v), self._heads.segments(), strict=True):
            yield Slot("in_proj_qkv.weight", rows, whole, 0, start, form=_FORM)
        for name, rows, unit in (("z", z, values), ("b", b, per_key), ("a", a, per_key)):
            shape = (spec.num_key_heads * unit, self._hidden_size)
            yield Slot(f"in_proj_{name}.weight", rows, shape, 0, first * unit)

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k and v as channels [T, C], z [T, H, V], b [T, H], a [T, H])."""
        spec, num_tokens = self._heads.spec, x_TD.shape[0]
        y = linear(x_TD, self.weight)
        if not self._fused:
            channels_TC, z, b, a = y.split_with_sizes((sum(self._rows[:3]), *self._rows[3:]), 1)
            return channels_TC, z.view(num_tokens, -1, spec.value_dim), b, a
        values = spec.values_per_key * spec.value_dim
        qkvz, ba = y.split_with_sizes((sum(self._rows[:4]), sum(self._rows[4:])), 1)
        sizes = (spec.key_dim, spec.key_dim, values, values)
        parts = qkvz.reshape(num_tokens, self._heads.num_keys, -1).split_with_sizes(sizes, 2)
        q, k, v, z = (p.reshape(num_tokens, -1) for p in parts)
        b, a = (p.reshape(num_tokens, -1) for p in ba.reshape(num_tokens, self._heads.num_keys, 2, -1).unbind(2))
        return torch.cat((q, k, v), 1), z.view(num_tokens, -1, spec.value_dim), b, a


class CausalConv(Layer):
    """Depthwise: a channel's output is a weighted sum of its last inputs, then silu; fp32 out.

    Checkpoint: `weight` [C, 1, conv_width], the newest input last.
    """

    def __init__(self, build: Build, heads: Heads) -> None:
        self._heads = heads
        shape = (heads.spec.conv_width, sum(heads.widths))
        self._taps_WC = torch.empty(shape, dtype=torch.float32, device=build.device)

    def own_slots(self) -> Iterator[Slot]:
        spec = self._heads.spec
        whole = (spec.num_key_heads * spec.unit_width, 1, spec.conv_width)
        parts = self._taps_WC.T.unsqueeze(1).split_with_sizes(self._heads.widths)
        for target, (start, _) in zip(parts, self._heads.segments(), strict=True):
            yield Slot("weight", target, whole, 0, start, form=_FORM)

    def __call__(self, inputs_XC: Tensor) -> Tensor:
        """Outputs for all but the first W inputs, along the last dimension but one; further ones are a batch."""
        num_new = inputs_XC.shape[-2] - len(self._taps_WC) + 1
        out = inputs_XC.narrow(-2, 0, num_new) * self._taps_WC[0]
        for i, tap_C in enumerate(self._taps_WC[1:], 1):
            out.addcmul_(inputs_XC.narrow(-2, i, num_new).float(), tap_C)
        return functional.silu(out, inplace=True)


@dataclass(frozen=True)
class _Plan:
    """Who has how many tokens in a step. `singles_R`: rows with one new token; None for all rows.

    `tokens_R`: where those tokens are. `chunks`: (row, first token, tokens) of the others.
    """

    singles_R: Tensor | None
    tokens_R: Tensor | None
    chunks: tuple[tuple[int, int, int], ...]


def _plan(step: Step) -> _Plan:
    """Worked out once in a step, for all layers."""
    plan: _Plan | None = step.shared.get("gated_delta")
    if plan is None:
        starts = step.ctx.query_starts_S1.tolist()
        counts = [end - start for start, end in itertools.pairwise(starts)]
        singles = [row for row, count in enumerate(counts) if count == 1]
        chunks = tuple((row, starts[row], count) for row, count in enumerate(counts) if count > 1)
        if chunks or len(singles) < len(counts):
            device = step.positions_T.device
            rows_R = torch.tensor(singles, dtype=torch.int64, device=device)
            tokens_R = torch.tensor([starts[row] for row in singles], dtype=torch.int64, device=device)
            plan = _Plan(rows_R, tokens_R, chunks)
        else:
            plan = _Plan(None, None, ())
        step.shared["gated_delta"] = plan
    return plan


class GatedDeltaNet(Layer):
    """Checkpoint names under `linear_attn.`. ValueError where ranks do not divide the key heads."""

    def __init__(
        self, build: Build, hidden_size: int, spec: DeltaSpec, places: Mapping[str, KVPlace], eps: float, *, fused: bool
    ) -> None:
        if spec.num_key_heads % build.tp.size:
            raise ValueError(f"{spec.num_key_heads} key heads do not divide over {build.tp.size} ranks")
        heads = Heads(spec, *build.tp.share(spec.num_key_heads))
        self._heads = heads
        self._conv_place, self._state_place = places[CONV_REGION], places[RECURRENT_REGION]
        self.in_proj = DeltaProjection(build, hidden_size, heads, fused=fused)
        self.conv1d = CausalConv(build, heads)
        self._a_log_H, self._dt_bias_H = (
            torch.empty(heads.num_values, dtype=torch.float32, device=build.device) for _ in range(2)
        )
        self.norm = RMSNorm(build, spec.value_dim, eps)
        self.out_proj = RowLinear(build, spec.num_value_heads, spec.value_dim, hidden_size, bias=False)

    def own_slots(self) -> Iterator[Slot]:
        shape, start = (self._heads.spec.num_value_heads,), self._heads.first * self._heads.spec.values_per_key
        yield Slot("A_log", self._a_log_H, shape, 0, start)
        yield Slot("dt_bias", self._dt_bias_H, shape, 0, start, Init.ONES)

    def derive_own(self) -> None:
        self._rate_H = -self._a_log_H.exp()

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        channels_TC, z_THV, b_TH, a_TH = self.in_proj(x_TD)
        # fp64: torch's last bits depend on where in a tensor a number lies, and must not show
        decay_TH = functional.softplus(a_TH.double() + self._dt_bias_H).float() * self._rate_H
        out_THV = self._mix(channels_TC, decay_TH, b_TH.double().sigmoid().float(), step)
        out_THV = self.norm(out_THV).mul_(functional.silu(z_THV.float()))
        return self.out_proj(out_THV.to(x_TD.dtype).view(len(x_TD), -1))

    def _mix(self, channels_TC: Tensor, decay_TH: Tensor, beta_TH: Tensor, step: Step) -> Tensor:
        """What of the tokens depends on those before them: fp32 [T, H, V]."""
        plan = _plan(step)
        blocks_S = step.states(self._state_place)
        if plan.singles_R is None:
            return self._singles(channels_TC, decay_TH, beta_TH, blocks_S, step)
        num_values, width = self._heads.num_values, self._heads.spec.value_dim
        out_THV = torch.empty(len(channels_TC), num_values, width, dtype=torch.float32, device=channels_TC.device)
        if len(plan.singles_R):
            at_R, rows_R = plan.tokens_R, blocks_S[plan.singles_R]
            assert at_R is not None
            out_THV[at_R] = self._singles(channels_TC[at_R], decay_TH[at_R], beta_TH[at_R], rows_R, step)
        block_ids = blocks_S.tolist()
        for row, first, count in plan.chunks:
            at = slice(first, first + count)
            out_THV[at] = self._chunk(channels_TC[at], decay_TH[at], beta_TH[at], block_ids[row], step)
        return out_THV

    def _singles(self, channels_RC: Tensor, decay_RH: Tensor, beta_RH: Tensor, blocks_R: Tensor, step: Step) -> Tensor:
        conv, state = step.cache(self._conv_place), step.cache(self._state_place)
        inputs_RXC = torch.cat((self._as_channels(conv[blocks_R]), channels_RC.unsqueeze(1)), 1)
        conv[blocks_R] = self._by_head(inputs_RXC[:, 1:])
        q, k, v = self._heads_of(self.conv1d(inputs_RXC).squeeze(1))
        state_RHKV = state[blocks_R].view(len(blocks_R), *self._state_shape)
        out_RHV = recurrent_step(q, k, v, decay_RH, beta_RH, state_RHKV)
        state[blocks_R] = state_RHKV.view(len(blocks_R), *state.shape[1:])
        return out_RHV

    def _chunk(self, channels_NC: Tensor, decay_NH: Tensor, beta_NH: Tensor, block_id: int, step: Step) -> Tensor:
        conv, state = step.cache(self._conv_place)[block_id], step.cache(self._state_place)[block_id]
        inputs_XC = torch.cat((self._as_channels(conv), channels_NC), 0)
        conv.copy_(self._by_head(inputs_XC[len(channels_NC) :]))
        q, k, v = self._heads_of(self.conv1d(inputs_XC))
        return chunked_rule(q, k, v, decay_NH, beta_NH, state.view(self._state_shape))

    @property
    def _state_shape(self) -> tuple[int, int, int]:
        return self._heads.num_values, self._heads.spec.key_dim, self._heads.spec.value_dim

    def _heads_of(self, channels_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of unit length (queries scaled as well), one for each value head, and values."""
        spec, num_tokens = self._heads.spec, len(channels_NC)
        width = self._heads.widths[0]
        qk_NXK = channels_NC[:, : 2 * width].view(num_tokens, -1, spec.key_dim)
        qk_NXK = qk_NXK * torch.rsqrt(qk_NXK.square().sum(-1, keepdim=True) + EPS)
        q, k = (x.repeat_interleave(spec.values_per_key, 1) for x in qk_NXK.chunk(2, 1))
        return q * spec.key_dim**-0.5, k, channels_NC[:, 2 * width :].view(num_tokens, -1, spec.value_dim)

    def _as_channels(self, kept: Tensor) -> Tensor:
        """[..., W, G, 1, channels of a key head] as the state has it -> [..., W, C]."""
        spec = self._heads.spec
        parts = kept.squeeze(-2).split_with_sizes((spec.key_dim, spec.key_dim, spec.unit_width - 2 * spec.key_dim), -1)
        return torch.cat([p.flatten(-2) for p in parts], -1)

    def _by_head(self, channels: Tensor) -> Tensor:
        """The reverse of `_as_channels`."""
        parts = channels.split_with_sizes(self._heads.widths, -1)
        return torch.cat([p.view(*p.shape[:-1], self._heads.num_keys, -1) for p in parts], -1).unsqueeze(-2)
