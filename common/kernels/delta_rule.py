"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks"), in fp32.

Each head has a state S, [key width, value width], that a token changes by

    S <- a S                                 forget:  a = exp(decay), decay <= 0
    S <- S + k (b (v - k S))                 correct what S says of key k towards v, by b in [0, 1]
    o = q S                                  and read

`recurrent_step` does that for one token of several sequences, `chunked_rule` for many tokens of one. The second
takes chunks of `CHUNK` tokens and writes their corrections u as one triangular system (section 3.3, the WY form):
with G the running sum of decays, in a chunk that begins with state S

    u_i + b_i sum_{j<i} exp(G_i - G_j) (k_i k_j) u_j = b_i (v_i - exp(G_i) k_i S)
    o_i = exp(G_i) q_i S + sum_{j<=i} exp(G_i - G_j) (q_i k_j) u_j
    S  <- exp(G_C) S + sum_j exp(G_C - G_j) k_j u_j

Exponents are never above 0, so nothing overflows; they are added up in fp64. A sequence's numbers depend on itself
alone.

Shape letters: R sequences, N tokens, H value heads, K key width, V value width, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64


def recurrent_step(
    q_RHK: Tensor, k_RHK: Tensor, v_RHV: Tensor, decay_RH: Tensor, beta_RH: Tensor, state_RHKV: Tensor
) -> Tensor:
    """One token of each of R sequences: o [R, H, V]; `state_RHKV` is updated in place. All fp32."""
    keep_RH1 = decay_RH.exp().unsqueeze(-1)
    kq_RH2K = torch.stack((k_RHK, q_RHK), dim=2)
    said_RH2V = torch.matmul(kq_RH2K, state_RHKV) * keep_RH1.unsqueeze(-1)  # of the state after forgetting
    u_RHV = (v_RHV - said_RH2V[:, :, 0]) * beta_RH.unsqueeze(-1)
    state_RHKV.mul_(keep_RH1.unsqueeze(-1)).addcmul_(k_RHK.unsqueeze(-1), u_RHV.unsqueeze(-2))
    return said_RH2V[:, :, 1] + (q_RHK * k_RHK).sum(-1, keepdim=True) * u_RHV


def chunked_rule(
    q_NHK: Tensor, k_NHK: Tensor, v_NHV: Tensor, decay_NH: Tensor, beta_NH: Tensor, state_HKV: Tensor
) -> Tensor:
    """N tokens of one sequence: o [N, H, V]; `state_HKV` is updated in place. All fp32."""
    out_NHV = torch.empty_like(v_NHV, memory_format=torch.contiguous_format)
    for start in range(0, len(q_NHK), CHUNK):
        chunk = slice(start, start + CHUNK)
        q, k, v = (x[chunk].transpose(0, 1) for x in (q_NHK, k_NHK, v_NHV))
        out_HCV = _chunk(q, k, v, decay_NH[chunk].T, beta_NH[chunk].T, state_HKV)
        out_NHV[chunk] = out_HCV.transpose(0, 1)
    return out_NHV


def _chunk(q_HCK: Tensor, k_HCK: Tensor, v_HCV: Tensor, decay_HC: Tensor, beta_HC: Tensor, state_HKV: Tensor) -> Tensor:
    sum_HC = decay_HC.cumsum(-1, dtype=torch.float64)  # large sums are subtracted
    kept_HC1 = sum_HC.float().exp_().unsqueeze(-1)
    future = torch.ones(q_HCK.shape[1], q_HCK.shape[1], dtype=torch.bool, device=q_HCK.device).triu_(1)
    between_HCC = (sum_HC.unsqueeze(-1) - sum_HC.unsqueeze(-2)).float().masked_fill_(future, -torch.inf).exp_()
    system_HCC = torch.matmul(k_HCK, k_HCK.mT).mul_(between_HCC).mul_(beta_HC.unsqueeze(-1))
    wanted_HCV = (v_HCV - torch.matmul(k_HCK, state_HKV).mul_(kept_HC1)).mul_(beta_HC.unsqueeze(-1))
    u_HCV = torch.linalg.solve_triangular(system_HCC, wanted_HCV, upper=False, unitriangular=True)
    out_HCV = torch.matmul(q_HCK, state_HKV).mul_(kept_HC1)
    out_HCV += torch.matmul(torch.matmul(q_HCK, k_HCK.mT).mul_(between_HCC), u_HCV)
    left_HC1 = between_HCC[:, -1].unsqueeze(-1)
    state_HKV.mul_(kept_HC1[:, -1:]).add_(torch.matmul((k_HCK * left_HC1).mT, u_HCV))
    return out_HCV
