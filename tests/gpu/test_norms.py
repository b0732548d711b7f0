"""Triton norms against torch in float64, with fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from gpu_support import check
from torch import Tensor

from common.kernels import gpu

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (3, 7), (33, 576), (5, 2049), (2, 7168)])
def test_rms_norm(kernel_device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> None:
    x = (torch.randn(tokens, width + 3, device=kernel_device) * 4).to(dtype)[:, :width]
    for weight_dtype in (dtype, torch.float32):
        weight = torch.randn(width, device=kernel_device).to(weight_dtype)
        got = gpu.norms.rms_norm(x, weight, 1e-5)
        assert got.is_contiguous()
        assert got.dtype == dtype
        check(got, rms_norm(x, weight, 1e-5))
        assert torch.equal(gpu.norms.rms_norm(x[-1:], weight, 1e-5), got[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [0, 3, 5])
@pytest.mark.parametrize("width", [20, 128])
def test_rms_norm_of_heads(kernel_device: torch.device, dtype: torch.dtype, split: int, width: int) -> None:
    x = torch.randn(37, 7, width, device=kernel_device).to(dtype)[:, 1:6]
    weight = torch.randn(2, width, device=kernel_device).to(dtype)
    per_head = torch.stack([weight[int(h >= split)] for h in range(5)])
    check(gpu.norms.rms_norm(x, weight, 1e-3, split), rms_norm(x, per_head, 1e-3))
    check(gpu.norms.rms_norm(x, weight[1], 1e-3), rms_norm(x, weight[1], 1e-3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (3, 7), (33, 1024), (2, 7168)])
def test_add_rms_norm(kernel_device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> None:
    residual = torch.randn(tokens, width + 5, device=kernel_device).to(dtype)[:, 2 : 2 + width]
    delta = torch.randn(tokens, 2 * width, device=kernel_device).to(dtype)[:, width:]
    weight = torch.randn(width, device=kernel_device).to(dtype)
    total = residual.double() + delta.double()
    got = gpu.norms.add_rms_norm(residual, delta, weight, 1e-6)
    check(residual, total)
    torch.testing.assert_close(got, gpu.norms.rms_norm(residual, weight, 1e-6), rtol=1e-6, atol=1e-6)
    check(got, rms_norm(residual, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 128), (33, 100), (3, 1152)])
def test_layer_norm(kernel_device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> None:
    x = (torch.randn(tokens, width + 3, device=kernel_device) * 3 + 1).to(dtype)[:, :width]
    weight, bias = (torch.randn(width, device=kernel_device).to(dtype) for _ in range(2))
    want = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
    check(gpu.norms.layer_norm(x, weight, bias, 1e-5), want, want.abs() + 10)
