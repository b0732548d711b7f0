"""Native operations against torch in float64, with fresh random inputs, on every instruction set."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

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


def test_callers_on_several_threads_do_not_disturb_each_other() -> None:
    inputs = [(torch.randn(9, 300), torch.randn(400, 300)) for _ in range(8)]
    expected = [ops.linear(x, weight) for x, weight in inputs]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(lambda pair: ops.linear(*pair), inputs))
            assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))
    torch.set_num_threads(before)


def test_idle_threads_sleep() -> None:
    x, weight = torch.randn(64, 300), torch.randn(2000, 300)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    ops.linear(x, weight)
    torch.set_num_threads(before)
    time.sleep(0.1)
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.05


def test_linear_of_nothing_is_empty(isa: cpu.Isa) -> None:
    assert ops.linear(torch.empty(0, 32), torch.randn(8, 32), isa=isa).shape == (0, 8)


def test_linear_that_the_kernel_cannot_do_goes_to_torch() -> None:
    x, weight = torch.randn(2, 3, 16), torch.randn(4, 16)
    assert torch.equal(ops.linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_heads_is_linear_of_each(isa: cpu.Isa, dtype: torch.dtype) -> None:
    wide, weights = torch.randn(7, 5, 60).to(dtype), torch.randn(5, 50, 48).to(dtype)
    x, weight = wide[..., 10:58], weights[:, 3:43]
    out = torch.full((7, 5, 100), float("nan"), dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    got = ops.linear_heads(x, weight, out[..., 20:60], isa=isa)
    torch.set_num_threads(before)
    assert got.data_ptr() == out[..., 20:].data_ptr()
    assert out[..., :20].isnan().all()
    assert out[..., 60:].isnan().all()
    assert torch.equal(got, ops.linear_heads(x, weight, isa=isa))
    for h in range(5):
        assert torch.equal(got[:, h], ops.linear(x[:, h].contiguous(), weight[h].contiguous(), isa=isa))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 576), (3, 7), (130, 576), (5, 2049)])
def test_rms_norm(isa: cpu.Isa, dtype: torch.dtype, tokens: int, width: int) -> None:
    x, weight = (torch.randn(tokens, width + 3) * 4).to(dtype)[:, :width], torch.randn(width).to(dtype)
    got = ops.rms_norm(x, weight, 1e-5, isa=isa)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert got.is_contiguous()
    check(got, want, want.abs(), 16)
    assert torch.equal(ops.rms_norm(x[-1:], weight, 1e-5, isa=isa), got[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [0, 3, 5])
def test_rms_norm_of_heads(isa: cpu.Isa, dtype: torch.dtype, split: int) -> None:
    x, weight = torch.randn(9, 7, 20).to(dtype)[:, :5], torch.randn(2, 20).to(dtype)
    got = ops.rms_norm(x, weight, 1e-3, split=split, isa=isa)
    per_head = torch.stack([weight[int(h >= split)] for h in range(5)]).double()
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * per_head
    check(got, want, want.abs(), 16)
    check(
        ops.rms_norm(x, weight[1], 1e-3, isa=isa)[:, 0],
        (want / per_head * weight[1].double())[:, 0],
        x.double().abs()[:, 0] * 99,
        16,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 12, 64), (3, 2, 6), (200, 12, 64)])
def test_rope(isa: cpu.Isa, dtype: torch.dtype, tokens: int, heads: int, width: int) -> None:
    x = torch.randn(tokens, heads + 2, width).to(dtype)[:, 1:-1]
    table = torch.randn(tokens, 2, width).to(dtype)
    got = ops.rope(x, table[:, :1], table[:, 1:], isa=isa)
    exchanged = torch.cat((x[..., width // 2 :], x[..., : width // 2]), -1).double()
    want = x.double() * table[:, :1].double() + exchanged * table[:, 1:].double()
    assert got.is_contiguous()
    check(got, want, x.double().abs() * 9 + exchanged.abs() * 9, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_of_neighbours_in_place(isa: cpu.Isa, dtype: torch.dtype) -> None:
    wide, table = torch.randn(9, 3, 40).to(dtype), torch.randn(9, 2, 12).to(dtype)
    cos, sin = table[:, :1], table[:, 1:]
    x = wide[..., 20:32]
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    want = ops.rope(halves, cos, sin, isa=isa)
    rest = wide.clone()
    got = ops.rope(x, cos, sin, interleaved=True, out_THD=x, isa=isa)
    assert got is x
    assert torch.equal(wide[..., 20:32], want)
    assert torch.equal(wide[..., :20], rest[..., :20])
    assert torch.equal(wide[..., 32:], rest[..., 32:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1536), (3, 5), (100, 1536)])
def test_silu_mul(isa: cpu.Isa, dtype: torch.dtype, tokens: int, width: int) -> None:
    x = (torch.randn(tokens, 2 * width) * 30).to(dtype)
    got = ops.silu_mul(x, isa=isa)
    gate, up = x.double().chunk(2, -1)
    want = gate * up * torch.sigmoid(gate)
    assert got.is_contiguous()
    check(got, want, want.abs(), 16)


def test_the_fallbacks_are_the_same_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, weights = torch.randn(5, 6, 8), torch.randn(8), torch.randn(2, 8)
    table, wide = torch.randn(5, 2, 8), torch.randn(5, 24)

    def results() -> list[Tensor]:
        return [
            ops.linear(wide, torch.ones(3, 24), torch.ones(3), out_dtype=torch.float32),
            ops.rms_norm(x[:, 0], weight, 1e-5),
            ops.rms_norm(x, weights, 1e-5, split=4),
            ops.rope(x, table[:, :1], table[:, 1:]),
            ops.rope(x, table[:, :1], table[:, 1:], interleaved=True),
            ops.rope(x, table[:, :1], table[:, 1:], out_THD=x.clone()),
            ops.linear_heads(x, torch.ones(6, 3, 8)),
            ops.linear(wide.bfloat16(), torch.ones(3, 24), out_dtype=torch.float32),
            ops.silu_mul(wide),
        ]

    native = results()
    monkeypatch.setattr(cpu, "library", lambda: None)
    for got, want in zip(native, results(), strict=True):
        assert torch.allclose(got, want, atol=1e-5)
