"""Rows in 8 bits with scales of their own, written and read by the CPU kernels. What they hold and how their bytes lie
is `common.kvcache.packing`'s; `common.attention.packed` is the same in torch, to the bit.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from common.kernels import cpu
from common.kernels.ops import DTYPES

_PACK = struct.Struct("@10qi4x")  # nd::PackCall
_UNPACK = struct.Struct("@9qi4x")  # nd::UnpackCall


def pack_rows(rows_TW: Tensor, cache: Tensor, slots_T: Tensor, latent_dim: int, *, isa: cpu.Isa = cpu.Isa.BEST) -> None:
    """Store rows, of which the first `latent_dim` numbers are latent, at their slots (block * block_size + offset).

    `cache`: uint8 [num_blocks, 1, 1, block_size, bytes of a row].
    """
    lib = cpu.library()
    assert lib is not None
    assert slots_T.dtype == torch.int64
    assert slots_T.shape == rows_TW.shape[:1]
    assert (slots_T.stride(0), rows_TW.stride(1), cache.stride(4)) == (1, 1, 1)
    call = _PACK.pack(
        rows_TW.data_ptr(),
        cache.data_ptr(),
        slots_T.data_ptr(),
        rows_TW.shape[0],
        latent_dim,
        rows_TW.shape[1] - latent_dim,
        cache.shape[3],
        rows_TW.stride(0),
        cache.stride(0),
        cache.stride(3),
        DTYPES[rows_TW.dtype],
    )
    lib.nd_pack_rows(isa, torch.get_num_threads(), call)


def unpack_rows(
    cache: Tensor,
    block_ids_N: Tensor,
    latent_dim: int,
    rope_dim: int,
    dtype: torch.dtype,
    *,
    isa: cpu.Isa = cpu.Isa.BEST,
) -> Tensor:
    """The rows of whole blocks, one after the other: a new [N * block_size, latent_dim + rope_dim] of `dtype`."""
    lib = cpu.library()
    assert lib is not None
    assert block_ids_N.dtype == torch.int64
    assert (block_ids_N.stride(0), cache.stride(4)) == (1, 1)
    num_blocks, block_size = block_ids_N.shape[0], cache.shape[3]
    out_PW = torch.empty(num_blocks * block_size, latent_dim + rope_dim, dtype=dtype)
    call = _UNPACK.pack(
        cache.data_ptr(),
        block_ids_N.data_ptr(),
        out_PW.data_ptr(),
        num_blocks,
        latent_dim,
        rope_dim,
        block_size,
        cache.stride(0),
        cache.stride(3),
        DTYPES[dtype],
    )
    lib.nd_unpack_rows(isa, torch.get_num_threads(), call)
    return out_PW
