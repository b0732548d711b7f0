"""Norm, rotation and write in one kernel against the three one after the other, with fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.attention.context import GroupTables
from common.attention.reference import ReferenceBackend
from common.kernels import gpu
from common.kvcache.scales import KVScales

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = torch.float8_e4m3fn


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    head, tail = x.float().tensor_split((cos.shape[-1],), -1)
    low, high = head.chunk(2, -1)
    head = head * cos.float() + torch.cat((high, low), -1) * sin.float()
    return torch.cat((head, tail), -1).to(x.dtype)


def layer_view(
    num_blocks: int, units: int, block_size: int, width: int, dtype: torch.dtype, on: torch.device
) -> Tensor:
    """One of three layers of a pool: [num_blocks, 2, units, block_size, width], a block with all of its layers."""
    rows = torch.randn(num_blocks, 3, 2, units, block_size, width, device=on).to(dtype)
    return rows[:, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, FLOAT8])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "units", "width", "rotary"),
    [(1, 32, 8, 128, 128), (7, 4, 1, 64, 64), (3, 16, 2, 256, 64), (5, 3, 3, 24, 12)],
)
def test_norm_turn_store(
    kernel_device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    with_norm: bool,
    tokens: int,
    heads: int,
    units: int,
    width: int,
    rotary: int,
) -> None:
    on, block_size, eps = kernel_device, 16, 1e-5
    if cache_dtype == FLOAT8 and on.type == "cpu":
        pytest.skip("Triton's interpreter gets float8 wrong")
    qkv = torch.randn(tokens, heads + 2 * units + 1, width, device=on).to(dtype)
    q, k, v = qkv[:, :heads], qkv[:, heads : heads + units], qkv[:, heads + units : heads + 2 * units]
    weights = None
    if with_norm:
        q_weight, k_weight = torch.randn(2, width, device=on).to(torch.float32 if rotary < width else dtype)
        weights = (q_weight, k_weight)
    table = torch.randn(tokens, 2, rotary, device=on).to(dtype)
    cos, sin = table[:, :1], table[:, 1:]
    cache = layer_view(9, units, block_size, width, cache_dtype or dtype, on)
    wanted = cache.clone()
    slots = torch.randperm(9 * block_size, device=on)[:tokens]
    scales = KVScales(k=0.013, v=0.4) if cache_dtype else None

    numbers = None if scales is None else (scales.k, scales.v)
    behind = torch.randn(640, 1024, device=on).to(dtype)
    got = gpu.qkv.norm_turn_store(q, k, v, weights, eps, cos, sin, cache, slots, numbers, behind)

    q_weight, k_weight = weights or (None, None)
    close(got, turned(normed(q, q_weight, eps), cos, sin))
    tables = GroupTables(torch.zeros(1, 1, dtype=torch.int32, device=on), slots, block_size)
    ReferenceBackend().write(turned(normed(k, k_weight, eps), cos, sin), v, wanted, tables, scales)
    close(cache, wanted)
    assert torch.equal(cache[:, 1].float(), wanted[:, 1].float())


def close(got: Tensor, want: Tensor) -> None:
    """But for a rounding here and there, each of which another may follow."""
    unit = {torch.float32: 2.0**-18, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6, FLOAT8: 2.0**-2}[got.dtype]
    small = 2.0**-6 if got.dtype == FLOAT8 else unit * 4
    off, want = (got.float() - want.float()).abs(), want.float()
    assert bool((off <= want.abs() * unit + small).all()), f"off by {off.max()}"
