"""Native operations of mixture-of-experts layers against torch, with fresh random inputs, on every instruction set."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from common.kernels import cpu, moe_ops, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=cpu.available(), ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest) -> cpu.Isa:
    found: cpu.Isa = request.param
    return found


@pytest.fixture(params=[1, 3], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random_starts(experts: int, rows: int) -> Tensor:
    ids = torch.tensor(
        [random.choice((0, 2, experts - 1, random.randrange(experts))) for _ in range(rows)], dtype=torch.int64
    )
    return torch.nn.functional.pad(torch.bincount(ids, minlength=experts).cumsum(0), (1, 0))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "n", "k"), [(4, 96, 64), (9, 40, 33), (3, 200, 800), (5, 7, 16)])
def test_experts_compute_what_linear_does(isa: cpu.Isa, dtype: torch.dtype, experts: int, n: int, k: int) -> None:
    """Bit for bit, so that a row is what it is alone."""
    weight = torch.randn(experts, n, k).to(dtype)
    for rows in (0, 1, 5, 150):
        starts = random_starts(experts, rows)
        x = torch.randn(rows, k + 3).to(dtype)[:, :k]
        got = moe_ops.linear_experts(x, weight, starts, isa=isa)
        assert got.shape == (rows, n)
        assert got.dtype == dtype
        for e in range(experts):
            for row in range(int(starts[e]), int(starts[e + 1])):
                assert torch.equal(got[row], ops.linear(x[row : row + 1], weight[e], isa=isa)[0])


def test_experts_take_views() -> None:
    packed = torch.randn(6, 120, 80)
    starts = random_starts(6, 30)
    x = torch.randn(30, 64)
    got = moe_ops.linear_experts(x, packed[::2, 20:90, 10:74], torch.cat((starts[:3], starts[-1:])))
    want = moe_ops.linear_experts(x, packed[::2, 20:90, 10:74].contiguous(), torch.cat((starts[:3], starts[-1:])))
    assert torch.equal(got, want)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 1), (1, 8, 128), (50, 3, 7), (300, 6, 64)])
def test_sort_by_expert(tokens: int, top_k: int, experts: int) -> None:
    ids = torch.randint(experts, (tokens, top_k))
    starts, order, places = moe_ops.sort_by_expert(ids, experts)
    flat = ids.flatten()
    assert torch.equal(order, flat.argsort(stable=True))
    assert torch.equal(places[order], torch.arange(tokens * top_k))
    assert torch.equal(starts.diff(), torch.bincount(flat, minlength=experts))
    assert starts[0] == 0


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 8, 64), (7, 3, 33), (70, 2, 700)])
def test_combine(isa: cpu.Isa, dtype: torch.dtype, tokens: int, top_k: int, width: int) -> None:
    y, weights = torch.randn(tokens * top_k, width).to(dtype), torch.rand(tokens, top_k)
    places = torch.randperm(tokens * top_k)
    got = moe_ops.combine(y, places, weights, isa=isa)
    want = (y[places].double().view(tokens, top_k, width) * weights[:, :, None].double()).sum(1)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), want, rtol=ops_eps(dtype), atol=1e-5)
    alone = moe_ops.combine(y, places[-top_k:], weights[-1:], isa=isa)
    assert torch.equal(alone, got[-1:])


def ops_eps(dtype: torch.dtype) -> float:
    return {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_width", [1, 77])
def test_sigmoid_mul(isa: cpu.Isa, dtype: torch.dtype, gate_width: int) -> None:
    x, gate = (torch.randn(60, 80).to(dtype)[:, :77], (torch.randn(60, gate_width) * 40).float())
    got = ops.sigmoid_mul(x, gate, isa=isa)
    want = x.double() * gate.double().sigmoid()
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.allclose(got.double(), want, rtol=ops_eps(dtype), atol=1e-7)
    assert torch.equal(ops.sigmoid_mul(x[5:6], gate[5:6], isa=isa), got[5:6])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_with_a_limit(isa: cpu.Isa, dtype: torch.dtype) -> None:
    x = (torch.randn(40, 2 * 37) * 20).to(dtype)
    gate, up = x.double().chunk(2, -1)
    want = torch.nn.functional.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0)
    assert torch.allclose(ops.silu_mul(x, 7.0, isa=isa).double(), want, rtol=ops_eps(dtype), atol=1e-6)
    broken = torch.full((1, 4), float("nan"))
    assert ops.silu_mul(broken, 7.0, isa=isa).isnan().all()


def test_the_fallbacks_are_the_same_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, bias = torch.randn(40, 16), torch.randn(16)
    x, weight = torch.randn(120, 24), torch.randn(16, 9, 24)
    gate = torch.randn(120, 1)

    def results() -> list[Tensor]:
        ids, weights = moe_ops.route(
            logits, 3, scoring="sigmoid", bias_E=bias, num_groups=4, topk_groups=2, normalized=True, scale=2.5
        )
        given = moe_ops.route(logits, 3, scoring="softmax", ids_TK=ids, normalized=False)[1]
        hashed = moe_ops.route(logits, 3, scoring="sqrt_softplus", ids_TK=ids)[1]
        starts, order, places = moe_ops.sort_by_expert(ids, 16)
        y = moe_ops.linear_experts(x, weight, starts)
        limited = ops.silu_mul(x, 0.5)
        return [
            ids,
            weights,
            given,
            hashed,
            starts,
            order,
            places,
            y,
            moe_ops.combine(y, places, weights),
            limited,
            ops.sigmoid_mul(x, gate),
        ]

    native = results()
    monkeypatch.setattr(cpu, "library", lambda: None)
    for got, want in zip(native, results(), strict=True):
        assert got.dtype == want.dtype
        assert torch.allclose(got, want, atol=1e-5)
