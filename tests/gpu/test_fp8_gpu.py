"""FP8 weights on a GPU: against fp32 products of what they mean and of rows quantised in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.kernels import fp8_ops
from common.kernels.expert_weights import ExpertWeights
from common.layers.base import Build
from common.layers.fp8_weight import fill_quantised
from common.layers.moe import MoE
from common.layers.moe_spec import MoESpec

pytestmark = pytest.mark.gpu


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().norm())


def quantised_rows(x: Tensor) -> Tensor:
    """What is left of rows whose 128 elements have a scale each."""
    groups = x.float().unflatten(-1, (-1, 128))
    scales = groups.abs().amax(-1, keepdim=True).clamp(1e-10) / 448
    return ((groups / scales).to(torch.float8_e4m3fn).float() * scales).flatten(-2)


def weight(*shape: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3, scales, and what they mean in fp32. Blocks have scales of their own."""
    blocks = torch.rand(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)) + 0.5
    spread = blocks.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : shape[-2], : shape[-1]]
    values, scales = fp8_ops.quantise_weight(torch.randn(shape) * spread / shape[-1] ** 0.5)
    return values.to(device), scales.to(device), fp8_ops.dequantise(values, scales, torch.float32).to(device)


DTYPES = [torch.float32, torch.bfloat16]
SMALL = [(1, 64, 128), (5, 192, 256), (40, 320, 128)]
LARGE = [(m, 4096, 7168) for m in (1, 16, 17, 64, 256)] + [(3, 2112, 7168), (100, 576, 512), (4000, 2048, 7168)]


def skip_large(device: torch.device, shape: tuple[int, ...]) -> None:
    if device.type == "cpu" and shape in LARGE:
        pytest.skip("for a GPU")


def allowed(on_gpu: float, device: torch.device) -> float:
    """Triton's interpreter cuts digits off where a GPU rounds to E4M3."""
    return 0.15 if device.type == "cpu" else on_gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL + LARGE)
def test_linear(kernel_device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    from common.kernels.gpu import fp8

    skip_large(kernel_device, shape)
    tokens, n, k = shape
    values, scales, meant = weight(n, k, device=kernel_device)
    x = torch.randn(tokens, k, device=kernel_device).to(dtype)
    got = fp8.linear(x, values, scales, dtype)
    assert got.dtype == dtype
    assert error(got, quantised_rows(x) @ meant.T) < allowed(6e-3, kernel_device)


@pytest.mark.parametrize("limit", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(1, 256, 128), (20, 512, 256), (3, 192, 128)])
def test_linear_silu_mul(kernel_device: torch.device, limit: float, shape: tuple[int, int, int]) -> None:
    from common.kernels.gpu import fp8

    tokens, n, k = shape
    values, scales, meant = weight(n, k, device=kernel_device)
    x = torch.randn(tokens, k, device=kernel_device)
    gate, up = (quantised_rows(x) @ meant.T).chunk(2, -1)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    got = fp8.linear_silu_mul(x, values, scales, limit)
    assert error(got, torch.nn.functional.silu(gate) * up) < allowed(6e-3, kernel_device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 256), (9, 384), (70, 1408)])
def test_quantise(kernel_device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> None:
    from common.kernels.gpu import fp8

    x = torch.randn(tokens, width, device=kernel_device).to(dtype) * 10
    if kernel_device.type == "cuda":  # Triton's interpreter makes no E4M3 of 0
        x[0, :128] = 0
    values, scales = fp8.quantise(x)
    assert scales.stride(0) == 1
    assert scales.stride(1) % 4 == 0
    got = values.float() * scales.repeat_interleave(128, 1)
    assert error(got, quantised_rows(x)) < allowed(3e-3, kernel_device)  # a value between two codes may go either way
    gate_up = torch.randn(tokens, 2 * width, device=kernel_device).to(dtype) * 3
    gate, up = gate_up.float().chunk(2, -1)
    for limit in (0.0, 2.0):
        values, scales = fp8.silu_mul_quantise(gate_up, limit)
        got = values.float() * scales.repeat_interleave(128, 1)
        cut = (gate.clamp(max=limit), up.clamp(-limit, limit)) if limit else (gate, up)
        want = torch.nn.functional.silu(cut[0]) * cut[1]
        assert error(got, want) < allowed(4e-2, kernel_device)


def moe(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """In fp32, with rows quantised before each product."""
    out = torch.zeros(x.shape[0], down.shape[1], device=x.device)
    for e in range(gate_up.shape[0]):
        t, k = (ids == e).nonzero(as_tuple=True)
        gate, up = (quantised_rows(x[t]) @ gate_up[e].T).chunk(2, -1)
        inner = (torch.nn.functional.silu(gate) * up).to(x.dtype)
        out.index_add_(0, t, (quantised_rows(inner) @ down[e].T) * weights[t, k, None])
    return out


EXPERTS = [(1, 2, 5, 128, 128), (3, 3, 4, 256, 128), (50, 2, 4, 128, 256)]
MANY_EXPERTS = [(t, 8, 64, 2048, 768) for t in (1, 8, 100, 800, 3000)] + [(300, 6, 16, 2048, 1408)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EXPERTS + MANY_EXPERTS)
def test_experts(kernel_device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    from common.kernels.gpu import experts as kernels

    if kernel_device.type == "cpu" and shape in MANY_EXPERTS:
        pytest.skip("for a GPU")
    tokens, top_k, experts, hidden, inner = shape
    gate_up, gate_up_scales, gate_up_meant = weight(experts, 2 * inner, hidden, device=kernel_device)
    down, down_scales, down_meant = weight(experts, hidden, inner, device=kernel_device)
    x = torch.randn(tokens, hidden, device=kernel_device).to(dtype)
    ids = torch.rand(tokens, experts, device=kernel_device).argsort(-1)[:, :top_k]
    weights = torch.rand(tokens, top_k, device=kernel_device)
    given = ExpertWeights(gate_up, down, gate_up_scales, down_scales)
    got = kernels.swiglu_moe(x, ids, weights, given, 0.0, None)
    assert error(got, moe(x, ids, weights, gate_up_meant, down_meant)) < allowed(2e-2, kernel_device)


@pytest.mark.parametrize("tokens", [5, 90])
def test_rows_of_tiles(kernel_device: torch.device, tokens: int) -> None:
    """Each pair's row is its token's, quantised, in a tile of its expert."""
    from common.kernels.gpu import padded

    x = torch.randn(tokens, 256, device=kernel_device)
    ids = torch.rand(tokens, 7, device=kernel_device).argsort(-1)[:, :3]
    (values, scales), experts, places = padded.spread(x, ids, 7)
    assert scales.stride(0) == 1
    assert torch.equal(experts[places].long(), ids.flatten())
    assert len(places.unique()) == places.numel()
    assert all(len(tile.unique()) <= 2 for tile in experts.view(-1, 128))
    got = (values.float() * scales.repeat_interleave(128, 1))[places]
    assert error(got, quantised_rows(x).repeat_interleave(3, 0)) < allowed(3e-3, kernel_device)


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_a_layer_in_fp8_is_the_layer(cuda: torch.device, tokens: int) -> None:
    """A mixture of experts with a shared one: to a few percent what it is in bf16, and the same when it is replayed."""
    spec = MoESpec(8, 2, 256, (True,), shared_intermediate_size=384)
    plain = MoE(Build(torch.bfloat16, cuda), 512, spec)
    layer = MoE(Build(torch.bfloat16, cuda, fp8_linears=True, fp8_experts=True), 512, spec)
    with torch.inference_mode():
        for slot, kept in zip(plain.slots(), layer.slots(), strict=True):
            slot.target.normal_(0, 0.05)
            if kept.scales is None:
                kept.target.copy_(slot.target)
            else:
                fill_quantised(kept, slot.target)
        x = torch.randn(tokens, 512, device=cuda, dtype=torch.bfloat16)
        got, want = layer(x), plain(x)
        assert 1e-3 < error(got, want) < 8e-2
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = layer(x)
        again.fill_(float("nan"))
        graph.replay()
        assert torch.equal(again, got)
