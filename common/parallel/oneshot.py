"""Sums of few rows over the GPUs of one machine in one kernel: each rank reads the others' numbers from their memory.

    x -> own slot -> flag to all ranks -> their flags -> their slots are read and added up, in the order of ranks

NCCL takes some 10 microseconds for a row; a decode step has two such sums a layer. Every rank's memory is mapped into
all processes (CUDA IPC over NVLink) and holds

    counts [programs] int32      calls that a program of the kernel has made
    flags  [programs, ranks] int32   the count of each other rank's program, written by it
    slots  [2, nbytes]           what is summed, in turn

so calls need no host and can be recorded. A slot is written again two calls later: a rank that has seen a call's flags
knows that the others have ended the call before. All ranks make the same calls.

A rank that is lost sets no flags. So a program that waits looks now and then at a word of the host's memory, which
`abort` writes: calls then end without the others, and what they leave is no sum. Whoever aborts sees to it that nothing
of it is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from common.parallel.store import Rendezvous
from common.telemetry import get_logger

log = get_logger(__name__)

PART_NBYTES = 4096  # of a program: its place in a slot is its own, whatever the type
MOST_NBYTES = {2: 4 << 20, 4: 1 << 20, 8: 512 << 10}  # by ranks; every rank reads all of the others
_ALIGN = 256
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * 64),)


class SharedMemory:
    """Zeroed memory of the current GPU that other processes can map. RuntimeError where that is not possible."""

    def __init__(self, nbytes: int) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        address = ctypes.c_uint64()
        self._check("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        self._check("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(nbytes))
        self._check("cuCtxSynchronize")
        handle = _IpcHandle()
        self._check("cuIpcGetMemHandle", ctypes.byref(handle), address)
        self.address = address.value
        self.handle = bytes(handle)

    def map(self, handle: bytes) -> int:
        """Where the memory of another process begins in this one."""
        address = ctypes.c_uint64()
        theirs = _IpcHandle.from_buffer_copy(handle)
        self._check("cuIpcOpenMemHandle_v2", ctypes.byref(address), theirs, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return address.value

    def _check(self, name: str, *args: object) -> None:
        result = getattr(self._driver, name)(*args)
        if result:
            raise RuntimeError(f"{name} failed with CUDA error {result}")


class OneShot:
    """`bases`: where each rank's memory begins here, `layout_of(size)` bytes of it."""

    def __init__(self, bases: Sequence[int], rank: int, size: int, device: torch.device) -> None:
        from common.parallel.oneshot_kernel import one_shot  # needs triton

        self._kernel = one_shot
        self._rank, self._size = rank, size
        self._most = MOST_NBYTES[size]
        self._flags_at, self._slots_at, _ = layout_of(size)
        self._stop = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._bases = torch.tensor([*bases, self._stop.data_ptr()], dtype=torch.int64, device=device)

    def takes(self, x: Tensor) -> bool:
        return x.numel() * x.element_size() <= self._most and x.dtype in _DTYPES and x.data_ptr() % 16 == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks in place, on the current stream; for what it `takes`."""
        n, block = x.numel(), PART_NBYTES // x.element_size()
        self._kernel[(-(-n // block),)](
            x,
            self._bases,
            n,
            slot_nbytes=self._most,
            flags_at=self._flags_at,
            slots_at=self._slots_at,
            rank=self._rank,
            size=self._size,
            block=block,
            num_warps=8,
        )
        return x

    def abort(self) -> None:
        """From any thread, and without the GPU: no call waits for other ranks any more, begun or not."""
        self._stop.fill_(1)


def layout_of(size: int) -> tuple[int, int, int]:
    """Where flags begin and slots begin in a rank's memory, and its bytes."""
    programs = MOST_NBYTES[size] // PART_NBYTES
    flags_at = _up(4 * programs)
    slots_at = flags_at + _up(4 * programs * size)
    return flags_at, slots_at, slots_at + 2 * MOST_NBYTES[size]


def make_one_shot(meeting: Rendezvous, rank: int, size: int, device: torch.device) -> OneShot | None:
    """On every rank or on none: a machine whose GPUs cannot share memory goes without. Each has its GPU current."""
    if size not in MOST_NBYTES:
        return None
    torch.cuda.synchronize(device)  # there is a context
    memory, made, why = None, None, ""
    try:
        memory = SharedMemory(layout_of(size)[2])
    except (OSError, RuntimeError) as error:
        why = str(error)
    handles = [msgspec.convert(h, bytes) for h in meeting.share(memory.handle if memory is not None else b"")]
    if memory is not None and all(handles):
        try:
            own = memory.address
            bases = [own if r == rank else memory.map(handle) for r, handle in enumerate(handles)]
            made = OneShot(bases, rank, size, device)
        except (ImportError, OSError, RuntimeError) as error:
            why = str(error)
    if meeting.least([int(made is not None)])[0]:
        return made
    log.info("sums over ranks go through NCCL alone", reason=why or "another rank cannot share memory")
    return None


def _up(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
