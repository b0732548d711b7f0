"""Each kind of routing against the router of transformers' module, with fresh random inputs; ties; any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV4Config, GlmMoeDsaConfig, Qwen3MoeConfig, Qwen3NextConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaTopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextTopKRouter

from common.layers.base import Build
from common.layers.moe import MoENames, Router
from common.layers.moe_spec import MoESpec
from common.moe.routing import RoutingRule, choose, weigh

D = 48
BUILD = Build(torch.float32, torch.device("cpu"))
QWEN = {"hidden_size": D, "num_experts": 16, "num_experts_per_tok": 4}
DEEPSEEK = {"hidden_size": D, "n_routed_experts": 16, "num_experts_per_tok": 4}


def qwen(**fields: Any) -> MoESpec:
    return MoESpec(16, 4, 8, (True,), **fields)


def deepseek(**fields: Any) -> MoESpec:
    return MoESpec(16, 4, 8, (True,), "sigmoid", correction_bias=True, router_fp32=True, **fields)


def grouped(norm: bool, groups: int, keep: int, scale: float) -> tuple[nn.Module, MoESpec]:
    fields = {"n_group": groups, "topk_group": keep, "norm_topk_prob": norm, "routed_scaling_factor": scale}
    spec = deepseek(norm_topk_prob=norm, num_groups=groups, topk_groups=keep, routed_scaling_factor=scale)
    return DeepseekV3TopkRouter(DeepseekV3Config(**DEEPSEEK, **fields)), spec


def glm() -> tuple[nn.Module, MoESpec]:
    fields = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    return GlmMoeDsaTopkRouter(GlmMoeDsaConfig(**DEEPSEEK, **fields)), deepseek(routed_scaling_factor=2.5)


def v4() -> tuple[nn.Module, MoESpec]:
    spec = MoESpec(16, 4, 8, (True,), "sqrt_softplus", correction_bias=True, routed_scaling_factor=1.5)
    return DeepseekV4TopKRouter(DeepseekV4Config(**DEEPSEEK, routed_scaling_factor=1.5)), spec


ROUTERS = {
    "qwen3_moe": lambda: (
        Qwen3MoeTopKRouter(Qwen3MoeConfig(**QWEN, norm_topk_prob=False)),
        qwen(norm_topk_prob=False),
    ),
    "qwen3_moe-norm": lambda: (Qwen3MoeTopKRouter(Qwen3MoeConfig(**QWEN, norm_topk_prob=True)), qwen()),
    "qwen3_next": lambda: (Qwen3NextTopKRouter(Qwen3NextConfig(**QWEN, norm_topk_prob=True)), qwen()),
    "deepseek_v3": lambda: grouped(True, 4, 2, 2.5),
    "deepseek_v3-plain": lambda: grouped(False, 1, 1, 1.0),
    "deepseek_v3-pairs": lambda: grouped(True, 8, 2, 1.0),
    "deepseek_v3-all-groups": lambda: grouped(True, 4, 4, 1.7),
    "glm_moe_dsa": glm,
    "deepseek_v4": v4,
}


@pytest.fixture(params=list(ROUTERS))
def routers(request: pytest.FixtureRequest) -> tuple[nn.Module, Router]:
    """The module and ours with the same random weights."""
    theirs, spec = ROUTERS[request.param]()
    ours = Router(BUILD, D, spec, MoENames())
    with torch.no_grad():
        theirs.weight.normal_(0, 0.3)
        ours.weight.copy_(theirs.weight)
        if ours.bias_E is not None:
            theirs.e_score_correction_bias.normal_(0, 0.3)
            ours.bias_E.copy_(theirs.e_score_correction_bias)
    return theirs, ours


def by_id(ids: Tensor, weights: Tensor) -> Tensor:
    """[T, E], so that the order of experts does not matter."""
    return torch.zeros(ids.shape[0], 16).scatter(1, ids, weights)


@torch.no_grad()
def test_router_equals_transformers(routers: tuple[nn.Module, Router]) -> None:
    theirs, ours = routers
    x = torch.randn(200, D)
    _, want_weights, want_ids = theirs(x)
    ids, weights = ours(x, None)
    assert ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert torch.equal(ids.sort().values, want_ids.sort().values)
    assert torch.allclose(by_id(ids, weights), by_id(want_ids, want_weights), atol=1e-6)


@torch.no_grad()
def test_a_token_goes_to_the_same_experts_in_any_batch(routers: tuple[nn.Module, Router]) -> None:
    ours, x = routers[1], torch.randn(130, D)
    ids, weights = ours(x, None)
    before = torch.get_num_threads()
    for first, count, threads in ((0, 1, 1), (129, 1, 3), (17, 40, 2), (3, 7, 4)):
        torch.set_num_threads(threads)
        part = ours(x[first : first + count], None)
        assert torch.equal(part[0], ids[first : first + count])
        assert torch.equal(part[1], weights[first : first + count])
    torch.set_num_threads(before)


@torch.no_grad()
def test_hash_router_equals_transformers() -> None:
    config = DeepseekV4Config(**DEEPSEEK, vocab_size=100)
    theirs = DeepseekV4HashRouter(config)
    spec = MoESpec(16, 4, 8, (True,), "sqrt_softplus", correction_bias=True, routed_scaling_factor=1.5)
    ours = Router(BUILD, D, spec, MoENames(), hash_vocab=100)
    theirs.weight.normal_()
    theirs.tid2eid.copy_(torch.rand(100, 16).argsort(-1)[:, :4])
    assert ours.bias_E is None
    assert ours.table_VK is not None
    ours.weight.copy_(theirs.weight)
    ours.table_VK.copy_(theirs.tid2eid)
    x, tokens = torch.randn(30, D), torch.randint(100, (30,))
    _, want_weights, want_ids = theirs(x, tokens)
    ids, weights = ours(x, tokens)
    assert torch.equal(ids, want_ids)
    assert torch.allclose(weights, want_weights, atol=1e-6)


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(1, 8)
    ids, weights = choose(logits, RoutingRule(3))
    assert ids.tolist() == [[0, 1, 2]]
    assert torch.allclose(weights, torch.full((1, 3), 1 / 3))
    logits[0, 5:7] = 1.0
    assert choose(logits, RoutingRule(3))[0].tolist() == [[5, 6, 0]]
    rule = RoutingRule(2, "sigmoid", num_groups=4, topk_groups=2)
    assert choose(torch.zeros(1, 8), rule)[0].tolist() == [[0, 1]]
    better = torch.zeros(1, 8)
    better[0, 7] = 1.0
    assert choose(better, rule)[0].tolist() == [[7, 0]]


def test_a_bias_chooses_and_does_not_weigh() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 9.0])
    ids, weights = choose(logits, RoutingRule(2, "sigmoid", normalized=False), bias)
    assert ids.tolist() == [[3, 0]]
    assert torch.allclose(weights, logits.sigmoid()[:, [3, 0]])
    assert torch.equal(weigh(logits, RoutingRule(2, "sigmoid", normalized=False), ids), weights)


def test_logits_that_are_no_numbers_give_valid_experts() -> None:
    """A broken row must not read out of bounds; its weights are no numbers, which the sampler then sees."""
    for logits in (torch.full((1, 8), float("nan")), torch.full((1, 8), float("inf"))):
        for rule in (RoutingRule(3), RoutingRule(3, "sigmoid", num_groups=4, topk_groups=2)):
            ids, _ = choose(logits, rule)
            assert len(set(ids[0].tolist())) == 3
            assert 0 <= int(ids.min()) <= int(ids.max()) < 8
    assert choose(torch.full((1, 8), float("nan")), RoutingRule(2))[1].isnan().all()
    mixed = torch.tensor([[float("nan"), 1.0, 2.0, float("-inf")]])
    assert choose(mixed, RoutingRule(3, "sigmoid"))[0].tolist() == [[2, 1, 3]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": 17}, "17 experts of a token"),
        ({"num_groups": 5}, "1 of 5 groups"),
        ({"num_groups": 4, "topk_groups": 5}, "5 of 4 groups"),
        ({"num_groups": 16, "topk_groups": 8}, "no two best"),
        ({"num_groups": 8, "topk_groups": 1}, "1 groups of 2 experts do not hold 4"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(fields: dict[str, int], words: str) -> None:
    given = {"num_experts": 16, "top_k": 4, "intermediate_size": 8, "is_moe_layer": (True,)} | fields
    with pytest.raises(ValueError, match=words):
        MoESpec(**given)
