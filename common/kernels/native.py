"""The native CPU library `libnd_cpu.so`, through ctypes. Calls release the GIL.

Everything here works on raw addresses: the caller keeps the memory alive and in bounds. The library is
built by `setup.py`; without it this module's functions raise `InternalError`.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path

import msgspec

from common.errors import InternalError

LIBRARY_PATH = Path(__file__).parent / "libnd_cpu.so"

Segment = tuple[int, int, int]
"""(address of layer 0, part 0, first token; first token's absolute position; number of tokens)"""


class DigestGeometry(msgspec.Struct, frozen=True):
    """Where the bytes of one digest lie: [num_layers, num_parts] x tokens x token_nbytes. Strides in bytes."""

    num_layers: int
    num_parts: int
    layer_stride: int
    part_stride: int
    token_stride: int
    token_nbytes: int

    def packed(self) -> tuple[int, ...]:
        """In the order of `nd::DigestGeometry`."""
        return msgspec.structs.astuple(self)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; `InternalError` if it was not built."""
    try:
        lib = ctypes.CDLL(str(LIBRARY_PATH))
    except OSError as error:
        raise InternalError(f"{error}; build it with `python setup.py build_ext --inplace`") from error
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    lib.nd_digest.argtypes = [pointer, pointer, size]
    lib.nd_digest.restype = ctypes.c_uint64
    lib.nd_digest_blocks.argtypes = [pointer, pointer, size, pointer, size, pointer]
    lib.nd_digest_blocks.restype = None
    lib.nd_digest_use.argtypes = [ctypes.c_int]
    lib.nd_digest_use.restype = ctypes.c_bool
    lib.nd_cpu_features.argtypes = []
    lib.nd_cpu_features.restype = ctypes.c_uint
    return lib


def cpu_features() -> tuple[str, ...]:
    """Instruction sets that the kernels may use on this machine."""
    bits: int = library().nd_cpu_features()
    names = ("avx2", "avx512", "avx512_bf16", "amx_bf16")
    return tuple(name for i, name in enumerate(names) if bits >> i & 1)


def digest(geometry: DigestGeometry, segments: Sequence[Segment]) -> int:
    """The 64-bit digest of the tokens in `segments` (see `common.kvcache.digest`)."""
    shape = array("Q", geometry.packed())
    runs = array("Q", [field for segment in segments for field in segment])
    value: int = library().nd_digest(shape.buffer_info()[0], runs.buffer_info()[0], len(segments))
    return value


class BlockDigester:
    """Digests of whole blocks: one per unit (a region's shard unit), many blocks in one call.

    `units` are (offset of the unit in a block, its geometry), in the order the digests come out.
    """

    def __init__(self, units: Sequence[tuple[int, DigestGeometry]]) -> None:
        self.num_units = len(units)
        self._offsets = array("Q", [offset for offset, _ in units])
        self._geometries = array("Q", [field for _, geometry in units for field in geometry.packed()])

    def digest(self, blocks: Sequence[Segment]) -> list[int]:
        """Flat [blocks, units]. A block is (its address, position of its first token, number of valid tokens)."""
        runs = array("Q", [field for block in blocks for field in block])
        out = array("Q", bytes(8 * len(blocks) * self.num_units))
        library().nd_digest_blocks(
            self._geometries.buffer_info()[0],
            self._offsets.buffer_info()[0],
            self.num_units,
            runs.buffer_info()[0],
            len(blocks),
            out.buffer_info()[0],
        )
        return out.tolist()
