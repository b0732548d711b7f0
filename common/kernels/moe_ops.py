"""Operations of mixture-of-experts layers: choose, sort, multiply by groups, add up.

As in `common.kernels.ops`, the CPU kernels give a token the same bits in every batch, and torch is the fallback.
A GPU's kernels read nothing back to the host: all of a layer can be captured in a graph.

Shape letters: T tokens, E experts, K experts of a token, P = T x K (token, expert) pairs, D and N widths.
"""

from __future__ import annotations

import itertools
import struct
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from common.kernels import cpu, gpu
from common.kernels.expert_weights import ExpertWeights
from common.kernels.ops import DTYPES, linear

Scoring = Literal["softmax", "sigmoid", "sqrt_softplus"]

_SCORINGS: dict[str, int] = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}  # nd::Scoring
_ROUTE = struct.Struct("@10q3if")  # nd::RouteCall
_EXPERTS = struct.Struct("@11q3i4x")  # nd::ExpertsCall
_COMBINE = struct.Struct("@8qi4x")  # nd::CombineCall


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: Scoring,
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    normalized: bool = True,
    scale: float = 1.0,
    ids_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(expert ids int64 [T, K], weights fp32 [T, K]) of fp32 logits; see `common.moe.routing` for the meaning.

    `ids_TK`: the experts are given, and only their weights wanted.
    """
    if gpu.enabled(logits_TE):
        return gpu.routing.route(logits_TE, top_k, scoring, bias_E, num_groups, topk_groups, normalized, scale, ids_TK)
    lib = cpu.library()
    if lib is None or logits_TE.device.type != "cpu" or logits_TE.stride(1) != 1:
        return _route(logits_TE, top_k, scoring, bias_E, num_groups, topk_groups, normalized, scale, ids_TK)
    assert logits_TE.dtype == torch.float32
    tokens, experts = logits_TE.shape
    given = ids_TK is not None
    ids = torch.empty(tokens, top_k, dtype=torch.int64) if ids_TK is None else ids_TK.long().contiguous()
    weights = torch.empty(tokens, top_k)
    call = _ROUTE.pack(
        logits_TE.data_ptr(),
        0 if bias_E is None else bias_E.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        tokens,
        experts,
        top_k,
        num_groups,
        topk_groups,
        logits_TE.stride(0),
        _SCORINGS[scoring],
        normalized,
        given,
        scale,
    )
    lib.nd_route(cpu.Isa.BEST, torch.get_num_threads(), call)
    return ids, weights


def sort_by_expert(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (t, k), numbered t * K + k, in the order of their experts, and of their numbers within one.

    (starts [E + 1], order [P], places [P]), int64: expert e has the rows from starts[e] to starts[e + 1]; row r is
    pair order[r]; pair p is row places[p].
    """
    flat = ids_TK.reshape(-1)
    pairs = flat.numel()
    if gpu.enabled(flat):
        places = torch.empty_like(flat)
        sort = gpu.routing.tile_map(flat, num_experts, 128, places)
        return sort.starts_E1.long(), sort.order_P.long(), places
    lib = cpu.library()
    if lib is None or flat.device.type != "cpu":
        order = flat.argsort(dim=0, stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(pairs, device=flat.device)
        counts = torch.bincount(flat, minlength=num_experts)
        return functional.pad(counts.cumsum(0), (1, 0)), order, places
    memory = torch.empty(num_experts + 1 + 2 * pairs, dtype=torch.int64)
    starts, order, places = torch.tensor_split(memory, (num_experts + 1, num_experts + 1 + pairs))
    addresses = starts.data_ptr(), order.data_ptr(), places.data_ptr()
    lib.nd_sort_by_expert(flat.data_ptr(), pairs, num_experts, *addresses)
    return starts, order, places


def linear_experts(
    x_PK: Tensor,
    weight_ENK: Tensor,
    starts_E1: Tensor,
    *,
    isa: cpu.Isa = cpu.Isa.BEST,
) -> Tensor:
    """Rows starts[e] to starts[e + 1] of x times weight[e]^T, as `linear` would: [P, N] of x's type.

    Experts without rows are not touched.
    """
    if gpu.enabled(x_PK):
        return gpu.experts.linear_experts(x_PK, weight_ENK, starts_E1)
    lib = cpu.library()
    experts, n, k = weight_ENK.shape
    fits = x_PK.device.type == "cpu" and x_PK.dtype in DTYPES and weight_ENK.dtype in DTYPES
    if lib is None or not fits or x_PK.stride(1) != 1 or weight_ENK.stride(2) != 1:
        parts = zip(itertools.pairwise(starts_E1.tolist()), weight_ENK, strict=True)
        found = [linear(x_PK[first:end], weight) for (first, end), weight in parts if first < end]
        return torch.cat(found or [x_PK.new_empty(0, n)])
    out = torch.empty(x_PK.shape[0], n, dtype=x_PK.dtype)
    call = _EXPERTS.pack(
        x_PK.data_ptr(),
        weight_ENK.data_ptr(),
        starts_E1.data_ptr(),
        out.data_ptr(),
        x_PK.stride(0),
        weight_ENK.stride(0),
        weight_ENK.stride(1),
        n,
        experts,
        n,
        k,
        DTYPES[x_PK.dtype],
        DTYPES[weight_ENK.dtype],
        DTYPES[out.dtype],
    )
    lib.nd_linear_experts(isa, torch.get_num_threads(), call)
    return out


def combine(y_PD: Tensor, places_TK: Tensor, weights_TK: Tensor, *, isa: cpu.Isa = cpu.Isa.BEST) -> Tensor:
    """Of each token the sum of weights[t, k] * y[places[t, k]] in the order of k, in fp32: [T, D] of y's type."""
    if gpu.enabled(y_PD):
        return gpu.experts.combine(y_PD, places_TK, weights_TK)
    lib = cpu.library()
    tokens, top_k = weights_TK.shape
    if lib is None or y_PD.device.type != "cpu" or y_PD.stride(1) != 1 or y_PD.dtype not in DTYPES:
        rows_TKD = y_PD[places_TK.reshape(tokens, top_k)].float() * weights_TK[:, :, None]
        total = rows_TKD[:, 0]
        for k in range(1, top_k):
            total = total + rows_TKD[:, k]
        return total.to(y_PD.dtype)
    out = torch.empty(tokens, y_PD.shape[1], dtype=y_PD.dtype)
    call = _COMBINE.pack(
        y_PD.data_ptr(),
        places_TK.data_ptr(),
        weights_TK.data_ptr(),
        out.data_ptr(),
        tokens,
        top_k,
        y_PD.shape[1],
        y_PD.stride(0),
        DTYPES[y_PD.dtype],
    )
    lib.nd_combine(isa, torch.get_num_threads(), call)
    return out


def fuses_experts(x_TD: Tensor) -> bool:
    """Is there a kernel for `swiglu_moe`?"""
    return gpu.enabled(x_TD)


def swiglu_moe(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: ExpertWeights,
    limit: float = 0.0,
    added_TD: Tensor | None = None,
    *,
    fixed: bool = False,
) -> Tensor:
    """Sort, both products of SwiGLU experts and `combine` in one, plus `added_TD`: a new [T, D] of x's type.

    Rows are gathered where they are multiplied. `limit`, `fixed`: see `common.kernels.ops`.
    """
    return gpu.experts.swiglu_moe(x_TD, ids_TK, weights_TK, experts, limit, added_TD, fixed=fixed)


def _route(
    logits_TE: Tensor,
    top_k: int,
    scoring: Scoring,
    bias_E: Tensor | None,
    num_groups: int,
    topk_groups: int,
    normalized: bool,
    scale: float,
    ids_TK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`route` in torch. Stable sorts: equal scores go to the lower id."""
    if scoring == "softmax":
        scores = logits_TE.softmax(-1)
    elif scoring == "sigmoid":
        scores = logits_TE.sigmoid()
    else:
        scores = functional.softplus(logits_TE).sqrt()
    if ids_TK is None:
        choice = scores if bias_E is None else scores + bias_E
        if topk_groups < num_groups:
            groups = choice.view(choice.shape[0], num_groups, -1)
            sums = groups.sort(-1, descending=True).values[..., :2].sum(-1)
            dropped = sums.argsort(dim=-1, descending=True, stable=True)[:, topk_groups:]
            choice = groups.scatter(1, dropped[..., None].expand(-1, -1, groups.shape[2]), float("-inf")).flatten(1)
        ids_TK = choice.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    ids_TK = ids_TK.long()
    weights = scores.gather(1, ids_TK)
    if normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, weights * scale
