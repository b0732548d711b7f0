"""Triton rotation and gates against torch in float64, with fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from gpu_support import check
from torch import Tensor

from common.kernels import gpu

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    low, high = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    straight, exchanged = torch.cat((low, high), dim=-1), torch.cat((high, low), dim=-1)
    return straight.double() * cos.double() + exchanged.double() * sin.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 40, 128), (3, 2, 6), (50, 12, 64), (5, 1, 64)])
def test_rope(
    kernel_device: torch.device, dtype: torch.dtype, interleaved: bool, tokens: int, heads: int, width: int
) -> None:
    wide = torch.randn(tokens, heads + 3, width + 16, device=kernel_device).to(dtype)
    x = wide[:, 1 : 1 + heads, 10 : 10 + width]
    rows = torch.randn(tokens, 2, width, device=kernel_device).to(dtype)
    cos, sin = rows[:, :1], rows[:, 1:]
    want = rope(x, cos, sin, interleaved)
    magnitude = x.double().abs().amax() * rows.double().abs().amax() * 2 + want.abs()
    got = gpu.rope.rope(x, cos, sin, interleaved, None)
    assert got.is_contiguous()
    check(got, want, magnitude)
    out = torch.full((tokens, heads, width + 3), float("nan"), dtype=dtype, device=kernel_device)
    assert gpu.rope.rope(x, cos, sin, interleaved, out[..., 2 : 2 + width]).data_ptr() == out[..., 2:].data_ptr()
    assert torch.equal(out[..., 2 : 2 + width], got)
    assert out[..., :2].isnan().all()
    before = wide.clone()
    gpu.rope.rope(x, cos, sin, interleaved, x)
    assert torch.equal(x, got)
    before[:, 1 : 1 + heads, 10 : 10 + width] = got
    assert torch.equal(wide, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 12288), (3, 7), (33, 1025)])
@pytest.mark.parametrize("limit", [0.0, 1.5])
def test_silu_mul(kernel_device: torch.device, dtype: torch.dtype, tokens: int, width: int, limit: float) -> None:
    x = (torch.randn(tokens, 2 * width + 5, device=kernel_device) * 4).to(dtype)[:, : 2 * width]
    gate, up = x.double().chunk(2, dim=-1)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    check(gpu.pointwise.silu_mul(x, limit), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (3, 7), (33, 1025)])
@pytest.mark.parametrize("whole_rows", [False, True])
def test_sigmoid_mul(
    kernel_device: torch.device,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    tokens: int,
    width: int,
    whole_rows: bool,
) -> None:
    x = torch.randn(tokens, width + 5, device=kernel_device).to(dtype)[:, :width]
    gate = (torch.randn(tokens, (1 if whole_rows else width) + 2, device=kernel_device) * 4).to(gate_dtype)[:, 2:]
    check(gpu.pointwise.sigmoid_mul(x, gate), x.double() * gate.double().sigmoid())
