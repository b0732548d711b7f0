"""Products of few rows against torch in float64, with fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from gpu_support import check
from torch import Tensor

from common.kernels import gpu, ops

pytestmark = pytest.mark.gpu

SHAPES = [(4096, 4096), (6144, 4096), (4096, 12288), (1024, 3072), (1000, 1280)]


def inputs(m: int, n: int, k: int, dtype: torch.dtype, on: torch.device, *, bias: bool) -> tuple[Tensor, ...]:
    x = torch.randn(m, k + 8, device=on).to(dtype)[:, :k]
    weight = (torch.randn(n, k + 16, device=on) * k**-0.5).to(dtype)[:, 8 : 8 + k]
    return x, weight, *((torch.randn(n, device=on).to(dtype),) if bias else ())


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the sums, the sums of absolute values)."""
    x, weight = x.double(), weight.double()
    added = torch.zeros((), dtype=torch.float64, device=x.device) if bias is None else bias.double()
    return x @ weight.T + added, x.abs() @ weight.T.abs() + added.abs()


def gated(sums: Tensor, dtype: torch.dtype, limit: float) -> Tensor:
    gate, up = sums.to(dtype).double().chunk(2, -1)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * gate.sigmoid() * up


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "k", "columns"), [(24, 128, 128), (10, 300, 128), (9, 100, 128)])
def test_in_registers(kernel_device: torch.device, m: int, n: int, k: int, columns: int, with_bias: bool) -> None:
    x, weight, *rest = inputs(m, n, k, torch.bfloat16, kernel_device, bias=with_bias)
    bias = rest[0] if rest else None
    config = gpu.linear.InRegisters(rows=4, columns=columns, warps=1)
    want, magnitude = product(x, weight, bias)
    check(gpu.linear.linear(x, weight, bias, torch.bfloat16, config), want, magnitude)
    check(gpu.linear.linear(x, weight, bias, torch.float32, config), want, magnitude)
    if n % 2 == 0:
        for limit in (0.0, 3.0):
            near_gated(gpu.linear.linear_silu_mul(x, weight, bias, limit, config), gated(want, x.dtype, limit))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("m", [1, 5, 16, 33])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("n", [64, 130, 7])
def test_in_tiles(kernel_device: torch.device, m: int, n: int, parts: int, with_bias: bool) -> None:
    dtype = torch.bfloat16 if kernel_device.type == "cuda" else torch.float16  # whose products the interpreter knows
    x, weight, *rest = inputs(m, n, 192, dtype, kernel_device, bias=with_bias)
    bias = rest[0] if rest else None
    config = gpu.linear.InTiles(rows=64, columns=32, parts=parts, stages=3, early=32)
    want, magnitude = product(x, weight, bias)
    for _ in range(2):  # the second finds the counters as the first left them
        check(gpu.linear.linear(x, weight, bias, dtype, config), want, magnitude)
    check(gpu.linear.linear(x, weight, bias, torch.float32, config), want, magnitude)
    if n % 2 == 0:
        near_gated(gpu.linear.linear_silu_mul(x, weight, bias, 0.0, config), gated(want, x.dtype, 0.0))


def near_gated(got: Tensor, want: Tensor) -> None:
    """A rounding of gate or up that falls the other way moves the result by as much again."""
    off = (got.double() - want).abs()
    assert bool((off <= want.abs() * 2.0**-5 + 2.0**-6).all()), f"off by {off.max()}"


@pytest.mark.parametrize("m", [1, 2, 4, 5, 8, 16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_of_real_shapes(cuda: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, weight = inputs(m, n, k, dtype, cuda, bias=False)
    want, magnitude = product(x, weight, None)
    check(ops.linear(x, weight), want, magnitude)
    check(ops.linear(x, weight, out_dtype=torch.float32), want, magnitude)
    assert torch.equal(ops.linear(x, weight), ops.linear(x, weight))
    got = ops.linear_silu_mul(x, weight, None, 0.0)
    near_gated(got, gated(want, dtype, 0.0))


@pytest.mark.parametrize("m", [1, 16, 200])
def test_linear_with_float32_results_and_weights_of_another_type(cuda: torch.device, m: int) -> None:
    for weight_dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.randn(m, 512, device=cuda).bfloat16(), torch.randn(96, 512, device=cuda).to(weight_dtype)
        want, magnitude = product(x, weight, None)
        got = ops.linear(x, weight, out_dtype=torch.float32)
        assert got.dtype == torch.float32
        check(got, want, magnitude)
