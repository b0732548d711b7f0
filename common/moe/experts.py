"""SwiGLU experts over rows sorted by expert. Only the weights of experts that have rows are read."""

from __future__ import annotations

from torch import Tensor

from common.kernels.expert_weights import ExpertWeights
from common.kernels.moe_ops import fuses_experts, linear_experts, swiglu_moe
from common.kernels.ops import silu_mul
from common.moe.dispatch import LocalDispatcher


def swiglu_experts(
    rows_PD: Tensor, starts_E1: Tensor, gate_up_ELD: Tensor, down_EDI: Tensor, limit: float = 0.0
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of each row by its expert: [P, D], a row's bits the same whatever the others are.

    `gate_up_ELD`: [gate | up] of each expert, L = 2 I. `limit`: see `common.kernels.ops.silu_mul`.
    """
    inner_PI = silu_mul(linear_experts(rows_PD, gate_up_ELD, starts_E1), limit)
    return linear_experts(inner_PI, down_EDI, starts_E1)


def run_experts(
    dispatcher: LocalDispatcher,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: ExpertWeights,
    limit: float = 0.0,
    added_TD: Tensor | None = None,
    *,
    fixed: bool = False,
) -> Tensor:
    """Of each token the weighted sum of its experts' results, plus `added_TD`: a new [T, D].

    Where a kernel does it all and no token has to move, none is copied. `fixed`: a token's bits do not depend on the
    other tokens, on a GPU too.
    """
    if fuses_experts(x_TD):
        return swiglu_moe(x_TD, ids_TK, weights_TK, experts, limit, added_TD, fixed=fixed)
    assert experts.gate_up_scales is None, "FP8 experts are a GPU's"
    sent = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    y_PD = swiglu_experts(sent.rows_PD, sent.starts_E1, experts.gate_up_ELD, experts.down_EDI, limit)
    out_TD = dispatcher.combine(y_PD, sent)
    return out_TD if added_TD is None else out_TD.add_(added_TD)
