"""Weights in blocks of FP8, in plain torch."""

from __future__ import annotations

import pytest
import torch

from common.kernels import fp8_ops


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (3, 64, 130)])
def test_a_weight_is_what_it_was(shape: tuple[int, ...]) -> None:
    """To half a step of E4M3, which has 3 bits behind the first; a block's largest number exactly."""
    values = torch.randn(shape)
    weight, scales = fp8_ops.quantise_weight(values)
    assert weight.shape == values.shape
    assert scales.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    again = fp8_ops.dequantise(weight, scales, torch.float32)
    assert torch.allclose(again, values, rtol=2**-4, atol=float(values.abs().max()) / 448 / 2**9)
    assert torch.allclose(again.abs().amax(), values.abs().amax())


def test_products_without_a_gpu() -> None:
    weight, scales = fp8_ops.quantise_weight(torch.randn(70, 256))
    x, bias = torch.randn(5, 256), torch.randn(70)
    want = x @ fp8_ops.dequantise(weight, scales, torch.float32).T + bias
    assert torch.allclose(fp8_ops.linear_fp8(x, weight, scales, bias), want, atol=1e-4)
