"""Scales of an 8-bit cache of keys and values: one of each per layer, fixed before the first token. No torch.

What is stored is value / scale, rounded to the nearest float8_e4m3fn and never above its largest number; what is read
is stored * scale. That is how vLLM and FlashInfer read such a cache (their `k_scale` and `v_scale`). Two workers can
exchange blocks only if all scales are the same to the bit: `scales_hash` of a region is part of its declaration.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

SCALE_FORMAT = "static_kv_per_layer"
LARGEST = 448.0  # of float8_e4m3fn


@dataclass(frozen=True)
class KVScales:
    """Of one layer. ValueError unless both are positive numbers of float32."""

    k: float
    v: float

    def __post_init__(self) -> None:
        for name in ("k", "v"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"the {name} scale must be positive, got {value}")
            object.__setattr__(self, name, struct.unpack("<f", struct.pack("<f", value))[0])


def scales_hash(scales: Sequence[KVScales]) -> bytes:
    """16 bytes over a region's layers in order."""
    packed = b"".join(struct.pack("<2f", s.k, s.v) for s in scales)
    return hashlib.blake2b(packed, digest_size=16).digest()
