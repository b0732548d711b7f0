"""Packed rows (`common.kvcache.packing`) in plain torch: what the kernels are tested against.

Shape letters: W numbers of a row, B bytes of one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from common.kvcache.packing import LARGEST, LEAST_RATIO, TILE, RowPacking


def pack_rows(rows_TW: Tensor, packing: RowPacking) -> Tensor:
    """The bytes of rows: a new uint8 [T, B]."""
    latent_TL = rows_TW[:, : packing.latent_dim].float()
    padded_TL = functional.pad(latent_TL, (0, packing.num_scales * TILE - packing.latent_dim))
    tiles_TNS = padded_TL.view(-1, packing.num_scales, TILE)
    largest_TN = tiles_TNS.abs().amax(-1)
    mantissa_TN, exponent_TN = torch.frexp((largest_TN / LARGEST).clamp_(min=LEAST_RATIO))
    scales_TN = torch.ldexp(torch.ones_like(largest_TN), exponent_TN - (mantissa_TN == 0.5).int())
    scales_TN[~largest_TN.isfinite()] = float("nan")
    latent_TL = (tiles_TNS / scales_TN.unsqueeze(-1)).flatten(1)[:, : packing.latent_dim]
    latent_TL = latent_TL.nan_to_num_(0.0)  # the scale says it
    out_TB = torch.zeros(rows_TW.shape[0], packing.nbytes, dtype=torch.uint8, device=rows_TW.device)
    out_TB[:, : packing.latent_dim] = latent_TL.to(torch.float8_e4m3fn).view(torch.uint8)
    out_TB[:, packing.scales_at : packing.rope_at] = scales_TN.view(torch.uint8)
    rope_TD = rows_TW[:, packing.latent_dim :].to(torch.bfloat16).contiguous()
    out_TB[:, packing.rope_at : packing.rope_at + 2 * packing.rope_dim] = rope_TD.view(torch.uint8)
    return out_TB


def unpack_rows(packed: Tensor, packing: RowPacking, dtype: torch.dtype) -> Tensor:
    """The numbers of uint8 [..., B]: a new [..., W]. Float32 and bfloat16 hold them exactly."""
    flat_TB = packed.reshape(-1, packed.shape[-1])
    latent_TL = flat_TB[:, : packing.latent_dim].contiguous().view(torch.float8_e4m3fn).float()
    scales_TN = flat_TB[:, packing.scales_at : packing.rope_at].contiguous().view(torch.float32)
    latent_TL = latent_TL * scales_TN.repeat_interleave(TILE, 1)[:, : packing.latent_dim]
    rope_TD = flat_TB[:, packing.rope_at : packing.rope_at + 2 * packing.rope_dim].contiguous().view(torch.bfloat16)
    return torch.cat((latent_TL.to(dtype), rope_TD.to(dtype)), 1).view(*packed.shape[:-1], packing.dim)
