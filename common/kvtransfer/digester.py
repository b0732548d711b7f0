"""The native digest in the transfer layer's words."""

from __future__ import annotations

from common.kernels import native
from common.kvtransfer.transport import DigestCheck


def digest(check: DigestCheck) -> int:
    """Digest of local memory as `common.kvcache.digest` defines it. The caller keeps the memory alive."""
    geometry = native.DigestGeometry(
        check.num_layers,
        check.num_parts,
        check.layer_stride,
        check.part_stride,
        check.token_stride,
        check.token_nbytes,
    )
    return native.digest(geometry, check.segments)
