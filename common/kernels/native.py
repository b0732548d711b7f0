"""The native CPU library `libnd_cpu.so`, through ctypes. Calls release the GIL.

Everything here works on raw addresses: the caller keeps the memory alive and in bounds. The library is
built by `setup.py`; without it this module's functions raise `InternalError`.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


Signatures = Mapping[str, tuple[Any, Sequence[Any]]]
"""Function -> (result type, argument types), of ctypes."""


def load_library(path: Path, signatures: Signatures) -> ctypes.CDLL:
    """A library of ours with these functions declared; `InternalError` if it was not built, or not from this source."""
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise InternalError(f"{path.name} cannot be loaded: {error}; run `make native`") from error
    for name, (result, arguments) in signatures.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise InternalError(
                f"{path} has no function {name}: it was built from another version; run `make native`"
            ) from None
        function.restype, function.argtypes = result, list(arguments)
    return lib


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; `InternalError` if it was not built, or not from this source."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    return load_library(
        LIBRARY_PATH,
        {
            "nd_digest": (ctypes.c_uint64, [pointer, pointer, size]),
            "nd_digest_blocks": (None, [pointer, pointer, size, pointer, size, pointer]),
            "nd_digest_use": (ctypes.c_bool, [ctypes.c_int]),
            "nd_cpu_features": (ctypes.c_uint, []),
        },
    )


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
