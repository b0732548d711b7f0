"""Numbers of a mixture of experts, as plain data (no torch, so that a model's spec needs none)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "sigmoid", "sqrt_softplus"]


@dataclass(frozen=True)
class MoESpec:
    """How a token finds its experts (`common.moe.routing`), and what they are.

    `intermediate_size` is of one expert, `shared_intermediate_size` of all shared ones together (0: none).
    `is_moe_layer`: one flag per layer; the others are dense. `norm_topk_prob`: a token's weights are divided by
    their sum; `routed_scaling_factor` multiplies them after that. `correction_bias`: a bias per expert is added to
    the scores for choosing, and not for weighing. `shared_gate`: the shared expert's output is multiplied by a
    sigmoid of its own. `router_fp32`: the router's weight stays in fp32. `swiglu_limit` cuts gate and up off (0: no).
    The first `num_hash_layers` layers look the experts up by token id, in a table of the checkpoint.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    is_moe_layer: tuple[bool, ...]
    scoring: Scoring = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    correction_bias: bool = False
    router_fp32: bool = False
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    swiglu_limit: float = 0.0
    num_hash_layers: int = 0

    def __post_init__(self) -> None:
        """ValueError for numbers that do not fit each other."""
        if not 0 < self.top_k <= self.num_experts:
            raise ValueError(f"{self.top_k} experts of a token are not among {self.num_experts}")
        if self.num_experts % self.num_groups or not 0 < self.topk_groups <= self.num_groups:
            groups = f"{self.topk_groups} of {self.num_groups} groups"
            raise ValueError(f"{self.num_experts} experts cannot be in {groups}")
        size = self.num_experts // self.num_groups
        if self.num_groups > 1 and size < 2:
            raise ValueError(f"groups of {size} expert have no two best ones")
        if size * self.topk_groups < self.top_k:
            raise ValueError(f"{self.topk_groups} groups of {size} experts do not hold {self.top_k}")
