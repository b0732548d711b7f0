"""Entries from tokens, and residual streams: kernels and their fallback against plain float64, one row at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from common.kernels import compress_ops as ops
from common.kernels import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TORCH = "torch"


@pytest.fixture(params=[*cpu.available(), TORCH], ids=str)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[cpu.Isa]:
    if request.param is TORCH:
        monkeypatch.setattr(cpu, "library", lambda: None)
        yield cpu.Isa.BEST
    else:
        yield request.param


def close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert got.shape == want.shape
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=max(2 * torch.finfo(dtype).eps, 2e-6), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "own", "width"), [(128, 0, 64), (8, 4, 32), (6, 3, 40), (5, 0, 7)])
def test_pooling(isa: cpu.Isa, dtype: torch.dtype, tokens: int, own: int, width: int) -> None:
    size, columns = 16, width * (2 if own else 1)
    cache = (torch.randn(11, size, 2 * columns + 5) * 3).to(dtype)[:, :, : 2 * columns + 3]
    bias = torch.randn(tokens, width)
    slots = torch.stack([torch.randperm(11 * size)[:tokens] for _ in range(9)])
    slots[0, : tokens - 1] = -1
    slots[3, : tokens // 2] = -1
    unused = torch.ones(11 * size, dtype=torch.bool).index_fill_(0, slots[slots >= 0], False)
    cache[unused.view(11, size)] = float("nan")
    want = torch.empty(9, width, dtype=torch.float64)
    shift = torch.zeros(tokens, dtype=torch.int64)
    shift[tokens - own :] = width if own else 0
    for n in range(9):
        there = (slots[n] >= 0).nonzero().flatten()
        rows = cache[slots[n, there] // size, slots[n, there] % size].double()
        at = shift[there, None] + torch.arange(width)
        weights = (rows.gather(1, at + columns) + bias[there].double()).softmax(0)
        want[n] = (weights * rows.gather(1, at)).sum(0)
    got = ops.pool_entries(cache, slots, bias, columns, own, isa=isa)
    close(got, want)
    for first, last in ((0, 1), (3, 7)):
        part = ops.pool_entries(cache, slots[first:last].contiguous(), bias, columns, own, isa=isa)
        assert torch.equal(part, got[first:last])


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_stream_weights(isa: cpu.Isa, streams: int) -> None:
    eps, steps, columns = 1e-6, 20, (2 + streams) * streams
    mix, scale, base = torch.randn(33, columns) * 4, torch.randn(3), torch.randn(columns)
    pre, post, comb = ops.stream_weights(mix, scale, base, streams, steps, eps, isa=isa)
    m, b, (s0, s1, s2) = mix.double(), base.double(), scale.double()
    close(pre, (m[:, :streams] * s0 + b[:streams]).sigmoid() + eps)
    middle = slice(streams, 2 * streams)
    close(post, 2 * (m[:, middle] * s1 + b[middle]).sigmoid())
    want = (m[:, 2 * streams :] * s2 + b[2 * streams :]).view(-1, streams, streams).softmax(2) + eps
    for step in range(steps):
        want = want / (want.sum(2, keepdim=True) + eps) if step else want
        want = want / (want.sum(1, keepdim=True) + eps)
    close(comb, want)
    assert (comb.sum(1) - 1).abs().max() < 1e-5
    if cpu.library() is not None:
        one = ops.stream_weights(mix[5:6], scale, base, streams, steps, eps, isa=isa)
        assert all(torch.equal(a[5:6], b) for a, b in zip((pre, post, comb), one, strict=True))
    head = ops.collapse_weights(mix[:, :streams].contiguous(), scale[:1], base[:streams], eps)
    close(head, (m[:, :streams] * s0 + b[:streams]).sigmoid() + eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("streams", "width"), [(4, 64), (4, 300), (2, 257), (1, 5)])
def test_streams_are_collapsed_and_mixed(isa: cpu.Isa, dtype: torch.dtype, streams: int, width: int) -> None:
    tokens = random.randrange(2, 40)
    x, y = torch.randn(tokens, streams, width).to(dtype), torch.randn(tokens, width).to(dtype)
    pre, post, comb = torch.rand(tokens, streams), torch.randn(tokens, streams), torch.randn(tokens, streams, streams)
    collapsed = ops.collapse_streams(x, pre, isa=isa)
    close(collapsed, torch.einsum("ts,tsd->td", pre.double(), x.double()), dtype)
    want = post.double()[:, :, None] * y.double()[:, None] + torch.einsum("tjk,tjd->tkd", comb.double(), x.double())
    mixed, one = x.clone(), x[1:2].clone()
    ops.mix_streams(mixed, y, post, comb, isa=isa)
    close(mixed, want, dtype)
    ops.mix_streams(one, y[1:2], post[1:2], comb[1:2], isa=isa)
    close(one, want[1:2], dtype)
    if cpu.library() is not None:
        assert torch.equal(one, mixed[1:2])
        assert torch.equal(ops.collapse_streams(x[1:2], pre[1:2], isa=isa), collapsed[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(3, 64), (4, 33), (1, 500)])
def test_two_parts_and_a_sink_are_joined(isa: cpu.Isa, dtype: torch.dtype, heads: int, width: int) -> None:
    tokens = random.randrange(3, 30)
    a, b = torch.randn(tokens, heads, width).to(dtype), torch.randn(tokens, heads, width).to(dtype)
    sums_a, sums_b, sinks = torch.randn(tokens, heads) * 30, torch.randn(tokens, heads) * 30, torch.randn(heads) * 5
    counts = torch.randint(0, 3, (tokens,), dtype=torch.int32)
    counts[1] = 0
    none = counts == 0
    b[none], sums_b[none] = float("nan"), float("nan")
    logits = torch.stack((sums_a.double(), sums_b.double(), sinks.double().expand(tokens, -1)), -1)
    logits[none, :, 1] = -math.inf
    shares = logits.softmax(-1)[..., None]
    want = shares[:, :, 0] * a.double() + torch.where(none[:, None, None], 0.0, shares[:, :, 1] * b.double())
    joined = a.clone()
    ops.join_parts(joined, sums_a, sinks, b, sums_b, counts, isa=isa)
    close(joined, want, dtype)
    one = a[2:3].clone()
    ops.join_parts(one, sums_a[2:3], sinks, b[2:3], sums_b[2:3], counts[2:3], isa=isa)
    close(one, want[2:3], dtype)
    assert cpu.library() is None or torch.equal(one, joined[2:3])
    alone = a.clone()
    ops.join_parts(alone, sums_a, sinks, isa=isa)
    close(alone, logits[..., ::2].softmax(-1)[..., :1] * a.double(), dtype)
