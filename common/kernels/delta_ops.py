"""A gated delta net between its projections, as one operation: convolution, gates, rule, norm, output gate.

The CPU kernel goes through the tokens one by one, so a token's result has the same bits in every batch and however
its prompt is cut into steps. The fallback and the kernels of GPUs write long runs of tokens in the chunked form
(`common.kernels.delta_rule`).

What a token is projected to is taken as views of one row, by key head: a key head *unit* has its query, its key and
all that belongs to the value heads which it serves.

Shape letters: T tokens of a step, S sequences, N tokens of one, G key heads, R value heads of one, H = G x R value
heads, K key width, V value width, C = 2 K + R V channels of a unit, W tokens that the convolution sees.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.kernels import cpu, gpu
from common.kernels.delta_rule import chunked_rule, recurrent_step
from common.kernels.ops import DTYPES, rms_norm

UNIT_EPS = 1e-6
"""Of the length of queries and keys."""

_DELTA = struct.Struct("@31qfi")  # nd::DeltaCall


@dataclass(frozen=True)
class DeltaInputs:
    """Views of rows [T, ...] that a token is projected to: `v` and `z` [T, G, R * V], `b` and `a` [T, G, R]."""

    q_TGK: Tensor
    k_TGK: Tensor
    v: Tensor
    z: Tensor
    b_TGR: Tensor
    a_TGR: Tensor


@dataclass(frozen=True)
class DeltaWeights:
    """fp32 but for the norm, which is of the model's type. `rate_H`: the decay is rate * softplus(a + dt_bias)."""

    taps_GWC: Tensor
    rate_H: Tensor
    dt_bias_H: Tensor
    norm_V: Tensor
    eps: float


def delta_net(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    conv: Tensor,
    state: Tensor,
    blocks_S: Tensor,
    query_starts_S1: Tensor,
    *,
    max_query_len: int = 0,
    fixed: bool = False,
    shared: dict[str, Any] | None = None,
    isa: cpu.Isa = cpu.Isa.BEST,
) -> Tensor:
    """norm(rule) * silu(z): a new contiguous [T, H * V] of the inputs' type.

    `conv` [blocks, W - 1, G, 1, C] of that type, the oldest input first, and `state` [blocks, 1, H, 1, K * V] in fp32
    are one layer's; the blocks `blocks_S` (int64) of the step's sequences are updated in place. `query_starts_S1` is
    int32; `max_query_len` is the largest number of new tokens in it, 0 if that is not known. `fixed`: on a GPU too a
    token's bits depend neither on the batch nor on cuts. `shared`: kept from layer to layer of a step.

    On a GPU nothing is read back, and the same shapes and `max_query_len` launch the same work.
    """
    if gpu.enabled(inputs.q_TGK) and is_regular(inputs, weights, conv, state):
        out: Tensor = gpu.delta.delta_net(
            inputs,
            weights,
            conv,
            state,
            blocks_S,
            query_starts_S1,
            unit_eps=UNIT_EPS,
            max_query_len=max_query_len or len(inputs.q_TGK),
            fixed=fixed,
            shared={} if shared is None else shared,
        )
        return out
    lib = cpu.library()
    if lib is None or not _fits(inputs, weights, conv, state):
        return _delta_net(inputs, weights, conv, state, blocks_S, query_starts_S1)
    tokens, units, key_width = inputs.q_TGK.shape
    heads, value_width = len(weights.rate_H), len(weights.norm_V)
    out = torch.empty(tokens, heads * value_width, dtype=inputs.q_TGK.dtype)
    call = _DELTA.pack(
        *(x.data_ptr() for x in (inputs.q_TGK, inputs.k_TGK, inputs.v, inputs.z, inputs.b_TGR, inputs.a_TGR)),
        *(x.data_ptr() for x in (weights.taps_GWC, weights.rate_H, weights.dt_bias_H, weights.norm_V)),
        *(x.data_ptr() for x in (conv, state, blocks_S, query_starts_S1, out)),
        len(blocks_S),
        units,
        heads // units,
        key_width,
        value_width,
        weights.taps_GWC.shape[1],
        inputs.q_TGK.stride(0),
        inputs.q_TGK.stride(1),
        inputs.v.stride(1),
        inputs.z.stride(1),
        inputs.b_TGR.stride(1),
        *conv.stride()[:3],
        state.stride(0),
        state.stride(2),
        weights.eps,
        DTYPES[out.dtype],
    )
    lib.nd_delta_net(isa, torch.get_num_threads(), call)
    return out


def is_regular(inputs: DeltaInputs, weights: DeltaWeights, conv: Tensor, state: Tensor) -> bool:
    """Are strides those that kernels take? The stride of a dimension of one means nothing."""
    q, k, v, z, b, a = inputs.q_TGK, inputs.k_TGK, inputs.v, inputs.z, inputs.b_TGR, inputs.a_TGR
    tokens, units, _ = q.shape
    return (
        (tokens == 1 or all(x.stride(0) == q.stride(0) for x in (k, v, z, b, a)))
        and (units == 1 or (k.stride(1) == q.stride(1) and a.stride(1) == b.stride(1)))
        and all(x.stride(2) == 1 or x.shape[2] == 1 for x in (q, k, v, z, b, a))
        and weights.taps_GWC.is_contiguous()
        and conv.stride(-1) == state.stride(-1) == 1
    )


def _fits(inputs: DeltaInputs, weights: DeltaWeights, conv: Tensor, state: Tensor) -> bool:
    """Does the CPU's kernel take them?"""
    q, k, v, z, b, a = inputs.q_TGK, inputs.k_TGK, inputs.v, inputs.z, inputs.b_TGR, inputs.a_TGR
    return (
        q.device.type == "cpu"
        and q.dtype in DTYPES
        and all(x.dtype == q.dtype for x in (k, v, z, b, a, conv, weights.norm_V))
        and is_regular(inputs, weights, conv, state)
    )


def _delta_net(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    conv: Tensor,
    state: Tensor,
    blocks_S: Tensor,
    query_starts_S1: Tensor,
) -> Tensor:
    channels_TGC = torch.cat((inputs.q_TGK, inputs.k_TGK, inputs.v), -1)
    tokens, heads, width = len(channels_TGC), len(weights.rate_H), len(weights.norm_V)
    softplus = functional.softplus(inputs.a_TGR.reshape(tokens, heads).float() + weights.dt_bias_H)
    decay_TH, beta_TH = softplus * weights.rate_H, inputs.b_TGR.reshape(tokens, heads).float().sigmoid()
    out_THV = torch.empty(tokens, heads, width, dtype=torch.float32, device=channels_TGC.device)
    starts = query_starts_S1.tolist()
    singles = [s for s, (a, b) in enumerate(itertools.pairwise(starts)) if b == a + 1]
    if singles:
        at_R = torch.tensor([starts[s] for s in singles], device=out_THV.device)
        blocks_R = blocks_S[torch.tensor(singles, device=out_THV.device)]
        kept = torch.cat((conv[blocks_R].squeeze(-2), channels_TGC[at_R].unsqueeze(1)), 1)
        conv[blocks_R] = kept[:, 1:].unsqueeze(-2)
        q, k, v = _convolved(kept, weights, inputs.q_TGK.shape[2])
        state_RHKV = state[blocks_R].view(len(singles), heads, -1, width)
        out_THV[at_R] = recurrent_step(q[:, 0], k[:, 0], v[:, 0], decay_TH[at_R], beta_TH[at_R], state_RHKV)
        state[blocks_R] = state_RHKV.view(len(singles), *state.shape[1:])
    for (a, b), block in zip(itertools.pairwise(starts), blocks_S.tolist(), strict=True):
        if b > a + 1:
            kept = torch.cat((conv[block].squeeze(-2), channels_TGC[a:b]), 0)
            conv[block] = kept[b - a :].unsqueeze(-2)
            q, k, v = _convolved(kept, weights, inputs.q_TGK.shape[2])
            out_THV[a:b] = chunked_rule(q, k, v, decay_TH[a:b], beta_TH[a:b], state[block].view(heads, -1, width))
    z_THV = inputs.z.reshape(tokens, heads, width).float()
    out_THV = rms_norm(out_THV, weights.norm_V, weights.eps).mul_(functional.silu(z_THV))
    return out_THV.to(channels_TGC.dtype).view(tokens, -1)


def _convolved(kept: Tensor, weights: DeltaWeights, key_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of inputs [..., W - 1 + N, G, C]: q and k [..., N, H, K], of unit length and q scaled, and v [..., N, H, V]."""
    heads, width = len(weights.rate_H), len(weights.norm_V)
    taps = weights.taps_GWC.unbind(1)
    num_new = kept.shape[-3] - len(taps) + 1
    out = kept.narrow(-3, 0, num_new) * taps[0]
    for i, tap_GC in enumerate(taps[1:], 1):
        out.addcmul_(kept.narrow(-3, i, num_new).float(), tap_GC)
    out = functional.silu(out, inplace=True)
    qk = out[..., : 2 * key_width].unflatten(-1, (2, key_width))  # type: ignore[no-untyped-call]
    qk = qk * torch.rsqrt(qk.square().sum(-1, keepdim=True) + UNIT_EPS)
    q, k = (x.repeat_interleave(heads // kept.shape[-2], -2) for x in qk.unbind(-2))
    return q * key_width**-0.5, k, out[..., 2 * key_width :].reshape(*out.shape[:-2], heads, width)
