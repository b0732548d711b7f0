"""Operations of layers on a GPU against those on the CPU: each finds its kernel, or torch for what it cannot do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_support import check
from torch import Tensor

from common.kernels import gpu, ops

pytestmark = pytest.mark.gpu

CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-6), (torch.randn(5, 256), torch.randn(256))),
    "rms_norm of heads": (
        lambda x, w: ops.rms_norm(x, w, 1e-6, split=3),
        (torch.randn(5, 4, 64), torch.randn(2, 64)),
    ),
    "rms_norm, strided": (lambda x, w: ops.rms_norm(x.mT, w, 1e-6), (torch.randn(256, 5), torch.randn(256))),
    "add_rms_norm": (
        lambda x, y, w: ops.add_rms_norm(x.clone(), y, w, 1e-6),
        (torch.randn(5, 256), torch.randn(5, 256), torch.randn(256)),
    ),
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, w, b, 1e-6), (torch.randn(5, 256), *torch.randn(2, 256))),
    "rope": (lambda x, c, s: ops.rope(x, c, s), (torch.randn(5, 3, 64), *torch.randn(2, 5, 1, 64))),
    "rope of pairs": (
        lambda x, c, s: ops.rope(x, c, s, interleaved=True),
        (torch.randn(5, 3, 64), *torch.randn(2, 5, 1, 64)),
    ),
    "silu_mul": (lambda x: ops.silu_mul(x, 2.0), (torch.randn(5, 256),)),
    "sigmoid_mul": (ops.sigmoid_mul, (torch.randn(5, 256), torch.randn(5, 1))),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_is_the_same_on_both(cuda: torch.device, name: str) -> None:
    assert not gpu.unavailable()
    call, inputs = CALLS[name]
    want = call(*inputs).double()
    got = call(*(x.to(cuda) for x in inputs))
    assert got.is_cuda
    check(got.cpu(), want, want.abs() + 1)


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_can_be_captured(cuda: torch.device, name: str) -> None:
    call, inputs = CALLS[name]
    places = [torch.empty_like(x, device=cuda) for x in inputs]
    for place in places:
        place.normal_()
    call(*places)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(*places)
    for place, x in zip(places, inputs, strict=True):
        place.copy_(x)
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, call(*(x.to(cuda) for x in inputs)))
