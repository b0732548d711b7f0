"""SwiGLU experts over rows sorted by expert. Only the weights of experts that have rows are read."""

from __future__ import annotations

from torch import Tensor

from common.kernels.moe_ops import linear_experts
from common.kernels.ops import silu_mul


def swiglu_experts(
    rows_PD: Tensor, starts_E1: Tensor, gate_up_ELD: Tensor, down_EDI: Tensor, limit: float = 0.0
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of each row by its expert: [P, D], a row's bits the same whatever the others are.

    `gate_up_ELD`: [gate | up] of each expert, L = 2 I. `limit`: see `common.kernels.ops.silu_mul`.
    """
    inner_PI = silu_mul(linear_experts(rows_PD, gate_up_ELD, starts_E1), limit)
    return linear_experts(inner_PI, down_EDI, starts_E1)
