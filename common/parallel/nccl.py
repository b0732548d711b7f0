"""Sums and gathers over NCCL, on the stream that everything else is computed on.

NCCL's C face is called as it is (nccl.h, 2.18 and later): a call costs microseconds, nothing waits in a stream of its
own, and what is recorded in a CUDA graph is replayed like a kernel. Torch brings the library.
"""

from __future__ import annotations

import ctypes
import functools
import threading

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from common.errors import ConfigError
from common.parallel.store import put
from common.telemetry import get_logger

log = get_logger(__name__)

_ID_NBYTES = 128
_CALL_S = 2.0  # longest wait of `abort` for a call that is being made
_ABORT_S = 2.0  # with `_CALL_S` less than a lost rank leaves an engine to say why it ends
_SUM = 0
_TYPES = {
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}  # ncclDataType_t


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * _ID_NBYTES),)


@functools.cache
def _library() -> ctypes.CDLL:
    """libnccl.so.2, which torch's own library has brought into the process."""
    try:
        lib = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise ConfigError(f"several GPUs need NCCL: {error}", param="tensor_parallel_size") from None
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    lib.ncclGetErrorString.restype = ctypes.c_char_p
    lib.ncclGetErrorString.argtypes = [number]
    lib.ncclGetUniqueId.argtypes = [ctypes.POINTER(_UniqueId)]
    lib.ncclCommInitRank.argtypes = [ctypes.POINTER(pointer), number, _UniqueId, number]
    lib.ncclAllReduce.argtypes = [pointer, pointer, size, number, number, pointer, pointer]
    lib.ncclAllGather.argtypes = [pointer, pointer, size, number, pointer, pointer]
    lib.ncclCommAbort.argtypes = [pointer]
    return lib


class NcclCollectives:
    """One communicator on one GPU; made by all ranks at once."""

    def __init__(self, store: Store, rank: int, size: int, device: torch.device) -> None:
        self._lib = _library()
        self._size = size
        self._device = device
        torch.cuda.set_device(device)
        unique = _UniqueId()
        if rank == 0:
            self._check(self._lib.ncclGetUniqueId(ctypes.byref(unique)))
            put(store, "nccl", bytes(unique))
        else:
            ctypes.memmove(ctypes.byref(unique), store.get("nccl"), _ID_NBYTES)
        self._comm = ctypes.c_void_p()
        self._calling = threading.Lock()
        self._check(self._lib.ncclCommInitRank(ctypes.byref(self._comm), size, unique, rank))
        self._warm_up()

    def all_reduce(self, x: Tensor) -> Tensor:
        assert x.is_contiguous(), "a sum over ranks takes contiguous tensors"
        at, kind, stream = x.data_ptr(), _TYPES[x.dtype], self._stream()
        with self._calling:
            self._check(self._lib.ncclAllReduce(at, at, x.numel(), kind, _SUM, self._open(), stream))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(self._size, *x.shape)
        source, target, kind, stream = x.data_ptr(), out.data_ptr(), _TYPES[x.dtype], self._stream()
        with self._calling:
            self._check(self._lib.ncclAllGather(source, target, x.numel(), kind, self._open(), stream))
        return out

    def abort(self) -> None:
        """From another thread too: not amid a call, unless that waits itself, for room in the queue of a stuck GPU.

        NCCL waits until the last recorded step that refers to it is gone. Nobody else does for longer than a moment.
        """
        made = self._calling.acquire(timeout=_CALL_S)
        comm, self._comm = self._comm, ctypes.c_void_p()
        if made:
            self._calling.release()
        if comm:
            ending = threading.Thread(target=self._lib.ncclCommAbort, args=(comm,), name="nccl-abort", daemon=True)
            ending.start()
            ending.join(_ABORT_S)
            if ending.is_alive():
                log.error("NCCL does not end: does a recorded step still refer to it?", device=str(self._device))

    def close(self) -> None:
        """Once all that was queued has ended; without waiting for other ranks to close theirs."""
        if self._comm:
            torch.cuda.synchronize(self._device)
            self.abort()

    def _warm_up(self) -> None:
        """Connections are made by the first call of a kind, which must not be one that is recorded."""
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(self._size << 20, dtype=dtype, device=self._device)
            self.all_reduce(x)
            self.all_reduce(x[:64])
            self.all_gather(x[:64])
        torch.cuda.synchronize(self._device)

    def _open(self) -> ctypes.c_void_p:
        if not self._comm:
            raise RuntimeError("the group of ranks is closed")
        return self._comm

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    def _check(self, result: int) -> None:
        if result:
            raise RuntimeError(f"NCCL: {self._lib.ncclGetErrorString(result).decode()}")
