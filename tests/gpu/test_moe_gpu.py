"""Routing, sorting and experts in Triton against plain torch in fp32, with fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.kernels import moe_ops
from common.kernels.expert_weights import ExpertWeights
from common.layers.base import Build
from common.layers.moe import MoENames, Router
from common.layers.moe_spec import MoESpec

pytestmark = pytest.mark.gpu


def on_grid(*shape: int) -> Tensor:
    """Logits of which many are equal."""
    return torch.randint(-8, 9, shape).float() / 4


ROUTES = [
    ("softmax", 128, 8, 1, 1, True, False),
    ("softmax", 512, 10, 1, 1, True, False),
    ("softmax", 60, 4, 1, 1, False, False),
    ("sigmoid", 64, 6, 1, 1, True, True),
    ("sigmoid", 256, 8, 8, 4, True, True),
    ("sigmoid", 48, 3, 4, 2, False, True),
    ("sqrt_softplus", 256, 6, 1, 1, True, True),
]


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize(("scoring", "experts", "top_k", "groups", "keep", "normalized", "bias"), ROUTES)
def test_route(
    kernel_device: torch.device,
    ties: bool,
    scoring: moe_ops.Scoring,
    experts: int,
    top_k: int,
    groups: int,
    keep: int,
    normalized: bool,
    bias: bool,
) -> None:
    """The experts that the CPU's kernel chooses, also of equal scores; values of which none is near another."""
    from common.kernels.gpu import routing

    logits = on_grid(33, experts) if ties else torch.stack([torch.randperm(experts) for _ in range(33)]) * 0.03 - 2
    bias_E = torch.randint(0, 3, (experts,)).float() if bias else None
    want_ids, want = moe_ops.route(
        logits,
        top_k,
        scoring=scoring,
        bias_E=bias_E,
        num_groups=groups,
        topk_groups=keep,
        normalized=normalized,
        scale=2.5,
    )
    x, b = logits.to(kernel_device), None if bias_E is None else bias_E.to(kernel_device)
    ids, weights = routing.route(x, top_k, scoring, b, groups, keep, normalized, 2.5, None)
    assert ids.dtype == torch.int64
    assert torch.equal(ids.cpu(), want_ids)
    assert torch.allclose(weights.cpu(), want, rtol=1e-5, atol=1e-6)
    again, weights = routing.route(x, top_k, scoring, b, groups, keep, normalized, 2.5, want_ids.to(kernel_device))
    assert torch.equal(again.cpu(), want_ids)
    assert torch.allclose(weights.cpu(), want, rtol=1e-5, atol=1e-6)


def test_route_of_what_is_no_number(kernel_device: torch.device) -> None:
    """Always experts that there are, and each once."""
    from common.kernels.gpu import routing

    logits = torch.randn(4, 20)
    logits[1] = float("nan")
    logits[2, 3:] = float("-inf")
    logits[3, ::2] = float("nan")
    ids, _ = routing.route(logits.to(kernel_device), 6, "sigmoid", None, 1, 1, True, 1.0, None)
    want, _ = moe_ops.route(logits, 6, scoring="sigmoid")
    assert torch.equal(ids.cpu(), want)


@pytest.mark.parametrize("skewed", [True, False])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "rows"), [(1, 8, 128, 16), (40, 3, 7, 16), (300, 6, 64, 64), (1500, 6, 20, 128)]
)
def test_tile_map(kernel_device: torch.device, skewed: bool, tokens: int, top_k: int, experts: int, rows: int) -> None:
    from common.kernels.gpu import routing

    ids = torch.randint(min(experts, 3) if skewed else experts, (tokens, top_k))
    places = torch.full((ids.numel(),), -1, dtype=torch.int64, device=kernel_device)
    got = routing.tile_map(ids.to(kernel_device), experts, rows, places)
    want_starts, want_order, want_places = moe_ops.sort_by_expert(ids, experts)
    assert torch.equal(got.order_P.cpu().long(), want_order)
    assert torch.equal(got.starts_E1.cpu().long(), want_starts)
    assert torch.equal(places.cpu(), want_places)
    want = [
        (e, first, min(first + rows, int(want_starts[e + 1])))
        for e in range(experts)
        for first in range(int(want_starts[e]), int(want_starts[e + 1]), rows)
    ]
    tiles = [*zip(*(t.tolist() for t in (got.expert_B, got.first_row_B, got.end_row_B)), strict=True)]
    assert tiles[: len(want)] == want
    assert all(expert == -1 for expert, _, _ in tiles[len(want) :])


def moe(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    """In fp64, expert by expert."""
    out = torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64)
    for e in range(gate_up.shape[0]):
        t, k = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[t].double() @ gate_up[e].double().T).chunk(2, -1)
        if limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        inner = torch.nn.functional.silu(gate) * up
        out.index_add_(0, t, (inner @ down[e].double().T) * weights[t, k, None].double())
    return out


def error(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm())


SHAPES = [(1, 2, 5, 64, 48, 0.0), (3, 3, 6, 96, 40, 0.5), (40, 4, 6, 72, 56, 0.0), (150, 2, 4, 128, 72, 0.0)]
REAL_SHAPES = [(t, 8, 128, 2048, 768, 0.0) for t in (1, 4, 33, 256, 1000, 9000)] + [(70, 6, 64, 2048, 1408, 7.0)]


def is_too_big(device: torch.device, shape: tuple[int, ...]) -> bool:
    return device.type == "cpu" and shape in [s[:5] for s in REAL_SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "top_k", "experts", "hidden", "inner", "limit"), SHAPES + REAL_SHAPES)
def test_experts(
    kernel_device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    inner: int,
    limit: float,
) -> None:
    from common.kernels.gpu import experts as kernels

    if is_too_big(kernel_device, (tokens, top_k, experts, hidden, inner)):
        pytest.skip("for a GPU")
    if kernel_device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not multiply bfloat16")
    x = torch.randn(tokens, hidden, device=kernel_device).to(dtype)
    gate_up = (torch.randn(experts, 2 * inner, hidden, device=kernel_device) / hidden**0.5).to(dtype)
    down = (torch.randn(experts, hidden, inner, device=kernel_device) / inner**0.5).to(dtype)
    ids = torch.rand(tokens, experts, device=kernel_device).argsort(-1)[:, :top_k]
    weights, added = torch.rand(tokens, top_k, device=kernel_device), torch.randn_like(x)
    cpu = [t.cpu() for t in (x, ids, weights, gate_up, down)]
    want = moe(*cpu, limit) if tokens < 500 else moe_on_device(x, ids, weights, gate_up, down).cpu()
    got = kernels.swiglu_moe(x, ids, weights, ExpertWeights(gate_up, down), limit, None)
    assert error(got, want) < (1e-5 if dtype == torch.float32 else 1e-2)
    got = kernels.swiglu_moe(x, ids, weights, ExpertWeights(gate_up, down), limit, added)
    assert error(got, want + added.cpu().double()) < (1e-5 if dtype == torch.float32 else 1e-2)


def moe_on_device(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], down.shape[1], device=x.device)
    for e in range(gate_up.shape[0]):
        t, k = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[t].float() @ gate_up[e].float().T).chunk(2, -1)
        out.index_add_(0, t, ((torch.nn.functional.silu(gate) * up) @ down[e].float().T) * weights[t, k, None])
    return out.double()


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_linear_experts(kernel_device: torch.device, rows: int) -> None:
    from common.kernels.gpu import experts as kernels

    x, weight = torch.randn(rows, 40), torch.randn(5, 24, 40)
    ids = torch.randint(5, (rows,)).sort().values
    starts = torch.nn.functional.pad(torch.bincount(ids, minlength=5).cumsum(0), (1, 0))
    got = kernels.linear_experts(x.to(kernel_device), weight.to(kernel_device), starts.to(kernel_device))
    want = torch.stack([weight[e].double() @ row.double() for e, row in zip(ids.tolist(), x, strict=True)])
    assert error(got, want) < 1e-5


def test_combine_with_places(kernel_device: torch.device) -> None:
    from common.kernels.gpu import experts as kernels

    y, weights, places = torch.randn(60, 70), torch.rand(20, 3), torch.randperm(60)
    want = (y[places].double().view(20, 3, 70) * weights[:, :, None].double()).sum(1)
    got = kernels.combine(y.to(kernel_device), places.to(kernel_device), weights.to(kernel_device))
    assert error(got, want) < 1e-6


@pytest.mark.parametrize("tokens", [2, 64])
def test_a_graph_follows_the_routing(cuda: torch.device, tokens: int) -> None:
    """Replays of one graph with other logits give bit for bit what eager steps give."""
    experts, hidden, inner, top_k = 32, 256, 128, 4
    x = torch.randn(tokens, hidden, device=cuda, dtype=torch.bfloat16)
    logits = torch.randn(tokens, experts, device=cuda)
    gate_up = torch.randn(experts, 2 * inner, hidden, device=cuda, dtype=torch.bfloat16) / 16
    down = torch.randn(experts, hidden, inner, device=cuda, dtype=torch.bfloat16) / 16

    def step() -> Tensor:
        ids, weights = moe_ops.route(logits, top_k, scoring="softmax")
        return moe_ops.swiglu_moe(x, ids, weights, ExpertWeights(gate_up, down))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for skew in (0.0, 5.0, 0.0):
        logits.copy_(torch.randn_like(logits) + skew * (torch.arange(experts, device=cuda) < 5))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, step())


def test_a_long_step_goes_in_parts(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from common.kernels.gpu import experts as kernels

    x, ids = torch.randn(50, 64), torch.rand(50, 6).argsort(-1)[:, :2]
    weights, added = torch.rand(50, 2), torch.randn(50, 64)
    given = ExpertWeights(torch.randn(6, 96, 64) / 8, torch.randn(6, 64, 48) / 7)
    monkeypatch.setattr(kernels, "_MAX_ELEMENTS", 17 * 2 * 64)
    args = [t.to(kernel_device) for t in (x, ids, weights)]
    there = ExpertWeights(*(t.to(kernel_device) for t in given[:2]))
    got = kernels.swiglu_moe(*args, there, 0.0, added.to(kernel_device))
    assert error(got, moe(x, ids, weights, *given[:2], 0.0) + added.double()) < 1e-5


@pytest.mark.parametrize("exact", [True, False])
def test_a_router_in_fp32(cuda: torch.device, exact: bool) -> None:
    """Logits are fp32's, whether the weight has digits that bf16 has not or none."""
    spec = MoESpec(64, 6, 32, (True,), "sigmoid", correction_bias=True, router_fp32=True)
    router = Router(Build(torch.bfloat16, cuda), 512, spec, MoENames())
    with torch.inference_mode():
        weight = torch.randn(64, 512, device=cuda) / 20
        router.weight.copy_(weight.bfloat16() if exact else weight)
        router.bias_E.zero_()
        router.derive()
        for tokens in (1, 40, 300):
            x = torch.randn(tokens, 512, device=cuda, dtype=torch.bfloat16)
            ids, weights = router(x, None)
            scores = (x.double() @ router.weight.double().T).sigmoid()
            chosen = scores.gather(1, ids)
            assert torch.allclose(weights.double(), chosen / chosen.sum(1, keepdim=True), atol=1e-4)
            assert torch.allclose(chosen, scores.topk(6).values, atol=1e-5)
