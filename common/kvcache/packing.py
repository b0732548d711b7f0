"""Rows in 8 bits that carry their own scales: how the bytes of one lie. No torch.

    latent_dim float8_e4m3fn | ceil(latent_dim / 128) float32 scales | rope_dim bfloat16 | zeros

Scales begin at a multiple of 4 bytes and a row is a whole number of 8-byte words (digests need that), filled up with
zeros. At DeepSeek's 512 + 64 nothing is filled up: these are the 656 bytes per token of FlashMLA's sparse decoding on
Hopper ("FP8 KV cache" of `flash_mla_with_kvcache`).

128 numbers share a scale, made when their row is written, so nothing is calibrated: the least power of two that is at
least max(largest magnitude / 448, 1e-4), as FlashMLA's own quantiser has it (tests/quant.py,
`_cast_scale_inv_to_ue8m0`). A number is its float8 times the scale, and bfloat16 holds that exactly; FlashMLA
multiplies in bfloat16, which would round a scale that is no power of two. Where one of the 128 is not finite, the scale
is NaN.

An indexer's key is a row without the bfloat16 part: 128 float8 and one scale, DeepSeek-V3.2's 132 bytes, filled up to
136.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 128  # numbers that share a scale
LARGEST = 448.0  # of float8_e4m3fn
LEAST_RATIO = 1e-4  # of largest magnitude to 448


@dataclass(frozen=True)
class RowPacking:
    latent_dim: int
    rope_dim: int = 0

    @property
    def dim(self) -> int:
        """Numbers in a row."""
        return self.latent_dim + self.rope_dim

    @property
    def num_scales(self) -> int:
        return -(-self.latent_dim // TILE)

    @property
    def scales_at(self) -> int:
        """Byte of the first scale."""
        return -(-self.latent_dim // 4) * 4

    @property
    def rope_at(self) -> int:
        """Byte of the first bfloat16."""
        return self.scales_at + 4 * self.num_scales

    @property
    def nbytes(self) -> int:
        return -(-(self.rope_at + 2 * self.rope_dim) // 8) * 8

    @property
    def scale_format(self) -> str:
        """Names the form in a region's declaration: rows that say the same can be read by each other's owners."""
        return f"{self.latent_dim} e4m3, pow2 float32 per {TILE}, {self.rope_dim} bfloat16"
