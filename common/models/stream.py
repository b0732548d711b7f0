"""Tensors from files straight into a GPU's memory.

    pieces, in the order of the files -> read by threads into page-locked buffers -> copied to the GPU -> put in place

A piece is some whole rows of a stored tensor. Reading, copying and putting overlap: of a few buffers some are read
into, while others are on their way; one is used again when its copy is done.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import ConfigError
from common.models.checkpoint import TensorInfo
from common.models.stored import Part

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}

_BUFFER_NBYTES = 32 * 2**20
_NUM_BUFFERS = 8
_NUM_THREADS = 4


@dataclass(frozen=True)
class Wanted:
    """A box of a stored tensor and what it is copied to, of the same shape and of any type."""

    info: TensorInfo
    part: Part
    target: Tensor

    @property
    def nbytes(self) -> int:
        return self.info.nbytes * self.target.numel() // max(1, math.prod(self.info.shape))


@dataclass(frozen=True)
class _Piece:
    """Rows of dimension 0, numbered within the part."""

    wanted: Wanted
    first: int
    end: int

    @property
    def row_nbytes(self) -> int:
        return self.wanted.info.nbytes // self.wanted.info.shape[0]

    def read_into(self, buffer: Tensor, fd: int) -> None:
        """ConfigError if the file is shorter than its header says."""
        offset = self.wanted.info.offset + (self.wanted.part[0].start + self.first) * self.row_nbytes
        left = buffer.numpy().data[: (self.end - self.first) * self.row_nbytes]
        while left.nbytes:
            count = os.preadv(fd, [left], offset)
            if not count:
                raise ConfigError(f"{self.wanted.info.file} is cut short: {self.wanted.info.name_in_file}")
            left, offset = left[count:], offset + count

    def put(self, buffer: Tensor) -> None:
        """Copy from the buffer to the target: rows as they are in the file, what is wanted of them on the device."""
        target, info = self.wanted.target[self.first : self.end], self.wanted.info
        nbytes = (self.end - self.first) * self.row_nbytes
        rows = buffer[:nbytes].to(target.device, non_blocking=True).view(DTYPES[info.dtype])
        rows = rows.view(self.end - self.first, *info.shape[1:])[(slice(None), *self.wanted.part[1:])]
        target.copy_(rows)


class _Buffer:
    """`done`: recorded behind the copy that last read it."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(_BUFFER_NBYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.done = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()

    def mark(self) -> None:
        if self.done is not None:
            self.done.record()


def is_streamable(info: TensorInfo) -> bool:
    rows = info.shape[0] if info.shape else 0
    return info.dtype in DTYPES and rows > 0 and 0 < info.nbytes // rows <= _BUFFER_NBYTES


def stream(wanted: Sequence[Wanted]) -> Iterator[Wanted]:
    """Fill targets, all of one device; gives each when its last row is under way.

    All is in place when the current stream has come to the end of it. ConfigError for a file that cannot be read.
    """
    if not wanted:
        return
    free = deque(_Buffer(wanted[0].target.device) for _ in range(_NUM_BUFFERS))
    reading: deque[tuple[_Piece, _Buffer, Future[None]]] = deque()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(_NUM_THREADS, "weights"))
        files: dict[Path, int] = {}
        for piece in _pieces(wanted):
            if not free:
                yield from _finish(reading, free)
            buffer = free.popleft()
            buffer.wait()
            fd = files.get(piece.wanted.info.file)
            if fd is None:
                fd = files[piece.wanted.info.file] = _open(piece.wanted.info.file, stack)
            reading.append((piece, buffer, pool.submit(piece.read_into, buffer.memory, fd)))
        while reading:
            yield from _finish(reading, free)


def _pieces(wanted: Sequence[Wanted]) -> Iterator[_Piece]:
    for one in wanted:
        rows = one.part[0].stop - one.part[0].start
        step = max(1, _BUFFER_NBYTES // (one.info.nbytes // one.info.shape[0]))
        for first in range(0, rows, step):
            yield _Piece(one, first, min(rows, first + step))


def _finish(reading: deque[tuple[_Piece, _Buffer, Future[None]]], free: deque[_Buffer]) -> Iterator[Wanted]:
    """The oldest piece that is being read: wait for it, and send it off."""
    piece, buffer, read = reading.popleft()
    try:
        read.result()
    except OSError as e:
        raise ConfigError(f"{piece.wanted.info.file} cannot be read: {e}") from None
    piece.put(buffer.memory)
    buffer.mark()
    free.append(buffer)
    if piece.end == piece.wanted.part[0].stop - piece.wanted.part[0].start:
        yield piece.wanted


def _open(path: Path, stack: contextlib.ExitStack) -> int:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    stack.callback(os.close, fd)
    return fd
