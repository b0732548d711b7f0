"""Bindings of the CPU kernels in csrc/cpu (libnd_cpu.so), through ctypes. Calls release the GIL.

Each kernel exists once per instruction set; `ISA` names them. BEST is what production uses; tests name one to
force it. Work is spread over `torch.get_num_threads()` threads of the library's own pool.
"""

from __future__ import annotations

import ctypes
import enum
import functools

from common.kernels.native import LIBRARY_PATH, Signatures, load_library

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64

_BY_STRUCT = (
    "nd_linear",
    "nd_linear_batch",
    "nd_attend",
    "nd_select",
    "nd_delta_net",
    "nd_linear_experts",
    "nd_write_rows",
    "nd_rms_norm",
    "nd_rope",
    "nd_silu_mul",
    "nd_sigmoid_mul",
    "nd_combine",
    "nd_route",
    "nd_pool_entries",
    "nd_stream_weights",
    "nd_collapse_streams",
    "nd_mix_streams",
    "nd_join_parts",
    "nd_pack_rows",
    "nd_unpack_rows",
)
"""Take (instruction set, threads, address of a struct of csrc/cpu/kernels.h)."""


class Isa(enum.IntEnum):
    BEST = -1
    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AMX = 3


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they were not built: callers then use torch.

    Raises `InternalError` for a library that is there and is not built from this source.
    """
    if not LIBRARY_PATH.exists():
        return None
    rows = [_INT, _INT, _POINTER, _LONG, _LONG, _LONG]  # instruction set, threads, logits, stride, rows, vocabulary
    signatures: Signatures = {
        "nd_has_kernels": (ctypes.c_bool, [_INT]),
        "nd_draw_rows": (None, [*rows, _POINTER, _POINTER, _POINTER]),
        "nd_top_rows": (None, [*rows, _LONG, _POINTER, _POINTER, _POINTER]),
        "nd_sort_by_expert": (None, [_POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER]),
        **{name: (None, [_INT, _INT, _POINTER]) for name in _BY_STRUCT},
    }
    return load_library(LIBRARY_PATH, signatures)


def available() -> list[Isa]:
    """The instruction sets that this machine runs; empty where the library was not built."""
    lib = library()
    return [isa for isa in Isa if isa is not Isa.BEST and lib.nd_has_kernels(isa)] if lib is not None else []
