"""DeepSeek-V4's operations in Triton against those of the CPU, with fresh random inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu_support import spacing
from torch import Tensor

from common.kernels import compress_ops as ops
from common.kernels import gpu

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def device(kernel_device: torch.device) -> Iterator[None]:
    with kernel_device:
        yield


def check(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    off, bound = (got.cpu().double() - want.double()).abs(), 1e-5 + 2 * spacing(got) * want.double().abs()
    assert bool((off <= bound).all()), f"off by {off.max()}"


def on_cpu(op: Callable[..., Any], *args: Any) -> Any:
    """What the CPU's operation returns, or has made of its first argument."""
    with torch.device("cpu"):
        given = [a.cpu().clone() if isinstance(a, Tensor) else a for a in args]
        found = op(*given)
    return given[0] if found is None else found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "own", "width"), [(128, 0, 64), (8, 4, 32), (6, 3, 40), (5, 0, 7)])
def test_pooling(dtype: torch.dtype, tokens: int, own: int, width: int) -> None:
    size, columns = 16, width * (2 if own else 1)
    cache = (torch.randn(11, size, 2 * columns + 5) * 3).to(dtype)[:, :, : 2 * columns + 3]
    bias = torch.randn(tokens, width)
    slots = torch.stack([torch.randperm(11 * size)[:tokens] for _ in range(9)])
    slots[0, : tokens - 1] = -1
    slots[3, : tokens // 2] = -1
    slots[5] = -1  # no entry: zeros
    unused = torch.ones(11 * size, dtype=torch.bool).index_fill_(0, slots[slots >= 0], False)
    cache[unused.view(11, size)] = float("nan")
    there = [n for n in range(9) if n != 5]
    got = gpu.compress.pool_entries(cache, slots, bias, columns, own)
    check(got[there], on_cpu(ops.pool_entries, cache, slots[there], bias, columns, own))
    assert bool((got[5] == 0).all())
    assert torch.equal(gpu.compress.pool_entries(cache, slots[3:4], bias, columns, own), got[3:4])


@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_stream_weights(streams: int) -> None:
    columns = (2 + streams) * streams
    given = torch.randn(33, columns) * 4, torch.randn(3), torch.randn(columns)
    got = gpu.compress.stream_weights(*given, streams, 20, 1e-6)
    for ours, want in zip(got, on_cpu(ops.stream_weights, *given, streams, 20, 1e-6), strict=True):
        check(ours, want)
    one = gpu.compress.stream_weights(given[0][5:6], *given[1:], streams, 20, 1e-6)
    assert all(torch.equal(a[5:6], b) for a, b in zip(got, one, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("streams", "width"), [(4, 64), (4, 1300), (2, 257), (3, 5)])
def test_streams_are_collapsed_and_mixed(dtype: torch.dtype, streams: int, width: int) -> None:
    x, y = torch.randn(7, streams, width).to(dtype), torch.randn(7, width).to(dtype)
    pre, post, comb = torch.rand(7, streams), torch.randn(7, streams), torch.randn(7, streams, streams)
    check(gpu.compress.collapse_streams(x, pre), on_cpu(ops.collapse_streams, x, pre))
    want = on_cpu(ops.mix_streams, x, y, post, comb)
    one = x[1:2].clone()
    gpu.compress.mix_streams(one, y[1:2], post[1:2], comb[1:2])
    gpu.compress.mix_streams(x, y, post, comb)
    check(x, want)
    assert torch.equal(one, x[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(3, 64), (4, 33), (1, 500)])
def test_two_parts_and_a_sink_are_joined(dtype: torch.dtype, heads: int, width: int) -> None:
    a, b = torch.randn(9, heads, width).to(dtype), torch.randn(9, heads, width).to(dtype)
    sums_a, sums_b, sinks = torch.randn(9, heads) * 30, torch.randn(9, heads) * 30, torch.randn(heads) * 5
    counts = torch.randint(0, 3, (9,), dtype=torch.int32)
    counts[1] = 0
    b[counts == 0], sums_b[counts == 0] = float("nan"), float("nan")
    for more in ((b, sums_b, counts), (None, None, None)):
        got = a.clone()
        gpu.compress.join_parts(got, sums_a, sinks, *more)
        check(got, on_cpu(ops.join_parts, a, sums_a, sinks, *more))
