"""Native operations against torch in float64, with fresh random inputs, on every instruction set."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from common.kernels import cpu, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=cpu.available(), ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest) -> cpu.Isa:
    found: cpu.Isa = request.param
    return found


def check(got: Tensor, want: Tensor, magnitude: Tensor, terms: int) -> None:
    """`magnitude`: sum of the absolute values of what was added; rounding of the result comes on top."""
    bound = want.abs() * EPS[got.dtype] + magnitude * terms * 2.0**-24 + 1e-7
    assert got.shape == want.shape
    assert bool(((got.double() - want).abs() <= bound).all()), f"off by {(got.double() - want).abs().max()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 16), (24, 40), (25, 33), (100, 576), (49, 2100)])
def test_linear_of_odd_shapes(isa: cpu.Isa, dtype: torch.dtype, weight_dtype: torch.dtype, n: int, k: int) -> None:
    for m in (1, 2, 3, 4, 5, 8, random.randrange(1, 130)):
        x = torch.randn(m, k).to(dtype)
        weight = torch.randn(n, k).to(weight_dtype)
        bias = torch.randn(n).to(weight_dtype) if m % 2 else None
        got = ops.linear(x, weight, bias, isa=isa)
        assert got.dtype == dtype
        want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        check(got, want, x.double().abs() @ weight.double().abs().T + 10, 2 * k + 8 if k < 64 else k)


def test_linear_can_give_another_type(isa: cpu.Isa) -> None:
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    got = ops.linear(x, weight, out_dtype=torch.float32, isa=isa)
    assert got.dtype == torch.float32
    check(got, x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T, 64)


def test_linear_takes_slices_of_wider_rows(isa: cpu.Isa) -> None:
    wide, weights = torch.randn(6, 300), torch.randn(90, 256)
    got = ops.linear(wide[:, 20:148], weights[10:60, 64:192], isa=isa)
    assert torch.equal(got, ops.linear(wide[:, 20:148].contiguous(), weights[10:60, 64:192].contiguous(), isa=isa))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_linear_has_the_same_bits_in_any_batch_and_on_any_threads(isa: cpu.Isa, dtype: torch.dtype) -> None:
    x, weight = torch.randn(120, 2500).to(dtype), torch.randn(77, 2500).to(dtype)
    before = torch.get_num_threads()
    whole = ops.linear(x, weight, isa=isa)
    for first, count, threads in ((0, 1, 1), (119, 1, 2), (3, 2, 3), (50, 3, 1), (7, 4, 2), (20, 49, 5), (0, 120, 4)):
        torch.set_num_threads(threads)
        part = ops.linear(x[first : first + count], weight, isa=isa)
        assert torch.equal(part, whole[first : first + count])
    torch.set_num_threads(before)


def test_linear_of_nothing_is_empty(isa: cpu.Isa) -> None:
    assert ops.linear(torch.empty(0, 32), torch.randn(8, 32), isa=isa).shape == (0, 8)


def test_linear_that_the_kernel_cannot_do_goes_to_torch() -> None:
    x, weight = torch.randn(2, 3, 16), torch.randn(4, 16)
    assert torch.equal(ops.linear(x, weight), torch.nn.functional.linear(x, weight))
