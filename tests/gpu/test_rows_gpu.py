"""Rows of latent attention in Triton: stored, packed, gathered and expanded as plain torch does it, to the bit."""

from __future__ import annotations

import pytest
import torch
from gpu_support import check
from torch import Tensor

from common.attention.packed import pack_rows, unpack_rows
from common.kernels import gpu
from common.kvcache.packing import RowPacking

pytestmark = pytest.mark.gpu

BLOCKS, LAYERS = 9, 3


def make_rows(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of very different sizes, with what is not finite, in rows that lie apart."""
    x = torch.randn(tokens, width + 8) * torch.exp(3 * torch.randn(tokens, 1))
    x[1, :3] = torch.tensor([float("inf"), 0.0, 1e30])
    x[2, 2] = float("nan")
    x[3] *= 1e-7
    return x.bfloat16().to(device, dtype)[:, :width]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (128, 0), (24, 8), (20, 0), (200, 16)])
def test_packed_rows_have_the_bits_of_torch(
    kernel_device: torch.device, latent: int, rope: int, dtype: torch.dtype
) -> None:
    packing, tokens, size = RowPacking(latent, rope), 23, 16
    rows_TW = make_rows(tokens, latent + rope, dtype, kernel_device)
    slots_T = torch.randperm(BLOCKS * size, device=kernel_device)[:tokens]
    pool = torch.full((BLOCKS, LAYERS, 1, 1, size, packing.nbytes), 7, dtype=torch.uint8, device=kernel_device)
    gpu.rows.store_rows(rows_TW, pool[:, 1], slots_T, latent, packed=True)
    want = pack_rows(rows_TW.cpu(), packing)
    used = packing.rope_at + 2 * rope
    got = pool[slots_T // size, 1, 0, 0, slots_T % size].cpu()
    assert torch.equal(got[:, :used], want[:, :used])
    assert (pool[:, 0] == 7).all()
    assert (pool[:, 2] == 7).all()
    back_TW = gpu.rows.gather_rows(pool[:, 1], slots_T, latent, rope, dtype, packed=True)
    torch.testing.assert_close(back_TW.cpu(), unpack_rows(want, packing, dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_plain_rows(kernel_device: torch.device, dtype: torch.dtype) -> None:
    rows_TW = torch.randn(19, 584, device=kernel_device).to(dtype)[:, :576]
    slots_T = torch.randperm(BLOCKS * 64, device=kernel_device)[:19]
    pool = torch.full((BLOCKS, LAYERS, 1, 1, 64, 576), float("nan"), dtype=dtype, device=kernel_device)
    gpu.rows.store_rows(rows_TW, pool[:, 1], slots_T, 576)
    assert torch.equal(pool[slots_T // 64, 1, 0, 0, slots_T % 64], rows_TW)
    assert int(pool.isfinite().all(-1).sum()) == 19
    assert torch.equal(gpu.rows.gather_rows(pool[:, 1], slots_T, 576, 0, dtype), rows_TW)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("latent", "rope", "heads"), [(512, 64, 16), (24, 8, 5)])
def test_norm_and_turn_as_they_are_stored(
    kernel_device: torch.device, latent: int, rope: int, heads: int, interleaved: bool, in_place: bool
) -> None:
    dtype, tokens, device = torch.bfloat16, 11, kernel_device
    rows_TW = torch.randn(tokens, latent + rope + 8, device=device).to(dtype)[:, : latent + rope]
    q_THD = torch.randn(tokens, heads, 3 * rope, device=device).to(dtype)[..., rope : 2 * rope]
    out_THD = q_THD if in_place else torch.full((tokens, heads, latent + rope), float("nan"), device=device).to(dtype)
    weight = torch.randn(latent, device=device).to(dtype)
    table = torch.randn(tokens, 2, rope, device=device).to(dtype)
    cos, sin = table[:, :1], table[:, 1:]
    slots_T = torch.randperm(BLOCKS * 64, device=device)[:tokens]
    pool = torch.full((BLOCKS, LAYERS, 1, 1, 64, latent + rope), float("nan"), dtype=dtype, device=device)

    def turned(x: Tensor) -> Tensor:
        x, c, s = x.double(), cos.double(), sin.double()
        low, high = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        return torch.cat((low, high), -1) * c + torch.cat((high, low), -1) * s

    x = rows_TW.double()
    normed = x[:, :latent] / (x[:, :latent].square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    want_row = torch.cat((normed, turned(rows_TW[:, None, latent:])[:, 0]), 1)
    want_q = turned(q_THD)
    gpu.rows.store_rows(
        rows_TW,
        pool[:, 1],
        slots_T,
        latent,
        norm=(weight, 1e-6),
        rotation=(cos, sin),
        interleaved=interleaved,
        turned=gpu.rows.Turned(q_THD, q_THD if in_place else out_THD[..., latent:]),
    )
    check(rows_TW, want_row, want_row.abs() + 4)
    assert torch.equal(pool[slots_T // 64, 1, 0, 0, slots_T % 64], rows_TW)
    check(q_THD if in_place else out_THD[..., latent:], want_q, want_q.abs() + 4)
    assert in_place or bool(out_THD[..., :latent].isnan().all())


@pytest.mark.parametrize(("nope", "rope", "value", "heads"), [(128, 64, 128, 16), (12, 8, 10, 3)])
def test_keys_of_heads(kernel_device: torch.device, nope: int, rope: int, value: int, heads: int) -> None:
    kv_PGE = torch.randn(37, heads + 1, nope + value, device=kernel_device).bfloat16()[:, 1:]
    rope_PD = torch.randn(37, 9 + rope, device=kernel_device).bfloat16()[:, 9:]
    want = torch.cat((kv_PGE[..., :nope], rope_PD[:, None].expand(-1, heads, -1)), -1)
    assert torch.equal(gpu.rows.expand_keys(kv_PGE, rope_PD, nope), want)


@pytest.mark.parametrize(("tokens", "heads", "width", "columns"), [(5, 3, 24, 40), (70, 2, 128, 64)])
def test_products_of_heads_in_a_fixed_order(
    kernel_device: torch.device, tokens: int, heads: int, width: int, columns: int
) -> None:
    x_THK = torch.randn(tokens, heads, 2 * width, device=kernel_device)[..., :width]
    weight_HNK = torch.randn(heads, columns + 3, width, device=kernel_device)[:, 3:]
    out_THN = torch.full((tokens, heads, columns + 8), float("nan"), device=kernel_device)
    gpu.fixed.linear_heads(x_THK, weight_HNK, out_THN[..., 8:])
    want = torch.einsum("thk,hnk->thn", x_THK.double(), weight_HNK.double())
    torch.testing.assert_close(out_THN[..., 8:].double(), want, rtol=1e-5, atol=1e-4)
    assert bool(out_THN[..., :8].isnan().all())
    gpu.fixed.linear_heads(x_THK[-1:], weight_HNK, out_THN[:1, :, 8:])
    assert torch.equal(out_THN[0, :, 8:], out_THN[-1, :, 8:])
