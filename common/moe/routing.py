"""Which experts a token goes to, and with which weights.

    scores = softmax, sigmoid or sqrt(softplus) of the router's logits, in fp32
    choice = scores + correction bias              (DeepSeek-V3, section 2.1.2: it balances load and weighs nothing)
    groups: of G equal runs of experts those are kept whose two best choices have the largest sum
    experts = the K best choices that are left, best first; or, for a hash layer, what the table says
    weights = their scores, divided by their sum if so wished, times a factor

Equal values go to the lower id, and nothing depends on the other tokens: a token's experts are the same in every
batch, chunk and process.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from common.kernels.moe_ops import Scoring, route


@dataclass(frozen=True)
class RoutingRule:
    """`num_groups` and `topk_groups` 1: experts are not grouped."""

    top_k: int
    scoring: Scoring = "softmax"
    normalized: bool = True
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1


def choose(logits_TE: Tensor, rule: RoutingRule, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(expert ids int64 [T, K], weights fp32 [T, K]) by the router's fp32 logits; `bias_E` is fp32."""
    return route(
        logits_TE,
        rule.top_k,
        scoring=rule.scoring,
        bias_E=bias_E,
        num_groups=rule.num_groups,
        topk_groups=rule.topk_groups,
        normalized=rule.normalized,
        scale=rule.scale,
    )


def weigh(logits_TE: Tensor, rule: RoutingRule, ids_TK: Tensor) -> Tensor:
    """Weights fp32 [T, K] of experts that are given, all below the number of experts."""
    _, weights_TK = route(
        logits_TE,
        rule.top_k,
        scoring=rule.scoring,
        normalized=rule.normalized,
        scale=rule.scale,
        ids_TK=ids_TK,
    )
    return weights_TK
