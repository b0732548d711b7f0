"""An indexer's keys in Triton: the norm, the rotation and the write of plain torch."""

from __future__ import annotations

import pytest
import torch
from gpu_support import check
from torch import Tensor

from common.attention.packed import pack_rows, unpack_rows
from common.kernels import gpu
from common.kvcache.packing import RowPacking

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rope"), [(128, 64), (20, 8)])
def test_keys_as_they_are_stored(
    kernel_device: torch.device, width: int, rope: int, interleaved: bool, packed: bool
) -> None:
    device, tokens, blocks = kernel_device, 13, 5
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # the interpreter cuts bfloat16 off
    k_TD = (3 * torch.randn(tokens, width + 8, device=device) + 1).to(dtype)[:, :width]
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    table = torch.randn(tokens, 2, rope, device=device).to(dtype)
    slots_T = torch.randperm(blocks * 64, device=device)[:tokens]
    packing = RowPacking(width)
    if packed:
        k_TD[3, 2] = float("nan")
        pool = torch.full((blocks, 3, 1, 1, 64, packing.nbytes), 7, dtype=torch.uint8, device=device)
    else:
        pool = torch.full((blocks, 3, 1, 1, 64, width), float("nan"), dtype=dtype, device=device)
    rotation = (table[:, :1], table[:, 1:])
    norm = (weight, bias, 1e-6)
    gpu.index_keys.store_keys(k_TD, norm, rotation, pool[:, 1], slots_T, interleaved=interleaved, packed=packed)
    got = pool[slots_T // 64, 1, 0, 0, slots_T % 64]
    x = k_TD.double()
    x = torch.nn.functional.layer_norm(x, (width,), weight.double(), bias.double(), 1e-6).to(dtype).double()
    cos, sin = (t[:, 0].double() for t in rotation)
    turning: Tensor = x[:, :rope]
    low, high = (turning[:, 0::2], turning[:, 1::2]) if interleaved else turning.chunk(2, -1)
    turned = torch.cat((low, high), -1) * cos + torch.cat((high, low), -1) * sin
    want = torch.cat((turned, x[:, rope:]), -1)
    if not packed:
        check(got, want, want.abs() + 4)
        assert int(pool.isfinite().all(-1).sum()) == tokens
        return
    whole = torch.arange(tokens, device=device) != 3
    kept = unpack_rows(got, packing, torch.float32)
    expected = unpack_rows(pack_rows(want.to(dtype), packing), packing, torch.float32)
    assert bool(kept[3].isnan().all())
    step = want.abs().amax(1, keepdim=True) / 16  # a rounding may become a step of 8 bits
    assert bool(((kept - expected).abs() <= step)[whole].all())
    assert (kept[whole] == expected[whole]).float().mean() > 0.95
