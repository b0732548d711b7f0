"""The `ucx` transport: one-sided reads through libucp, bound in csrc/ucx (see docs/design/transport.md).

This module translates between the transport's words and the C structures of `libnd_ucx.so`, and guards what
comes from peers: addresses and remote keys travel sealed (magic, checksum), because libucp trusts what it
is given. A sealed key names the memory it belongs to, and a random cookie behind that memory, which the
native side reads back before the first read: a key that leads elsewhere is refused.

All memory of a transport is on one device: the host, where it allocates, or a GPU, where it registers the pool's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import socket
import struct
import threading
import weakref
from array import array
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.config.schema import UcxConfig
from common.errors import ConfigError, InternalError, KVTransferError
from common.kernels.native import Signatures, load_library
from common.kvtransfer.shm import segments_folder
from common.kvtransfer.transport import (
    DigestCheck,
    Endpoint,
    MemoryHandle,
    PeerDown,
    ReadPiece,
    ReadResult,
    ReadStatus,
)

LIBRARY_PATH = Path(__file__).parent / "libnd_ucx.so"

_SEAL = struct.Struct("<4s8s")
_MAGIC = b"NDU2"
_KEY = struct.Struct("<QQ16sQB")  # base, nbytes, cookie, its address, is it a GPU's memory; the packed UCX key follows
_COOKIE_NBYTES = 16
_STATUS = (ReadStatus.OK, ReadStatus.MISMATCH, ReadStatus.FAILED, ReadStatus.FENCED)
_POLL_EVENTS = 64


class _Memory(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("cookie_address", ctypes.c_uint64),
        ("cookie", ctypes.c_uint8 * 16),
        ("key_nbytes", ctypes.c_uint32),
        ("key", ctypes.c_uint8 * 1004),
    )


class _Remote(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_uint64),
        ("cookie_address", ctypes.c_uint64),
        ("cookie", ctypes.c_uint8 * 16),
        ("key", ctypes.c_char_p),
        ("key_nbytes", ctypes.c_uint64),
        ("on_device", ctypes.c_uint64),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("status", ctypes.c_uint32),
        ("id", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
        ("read_seconds", ctypes.c_double),
        ("message", ctypes.c_char * 216),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    pointer, text, size, u64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64
    signatures: Signatures = {
        "nd_ucx_open": (pointer, [text, text, text, text, ctypes.c_int, text, size]),
        "nd_ucx_close": (None, [pointer]),
        "nd_ucx_wakeup_fd": (ctypes.c_int, [pointer]),
        "nd_ucx_version": (None, [pointer, text, size]),
        "nd_ucx_address": (size, [pointer, text, size]),
        "nd_ucx_allocate": (ctypes.c_bool, [pointer, u64, pointer, text, size]),
        "nd_ucx_register": (ctypes.c_bool, [pointer, u64, u64, u64, pointer, text, size]),
        "nd_ucx_connect": (None, [pointer, u64, text, size, pointer, size]),
        "nd_ucx_disconnect": (None, [pointer, u64]),
        "nd_ucx_read": (None, [pointer, u64, u64, pointer, size, pointer, size, pointer, size]),
        "nd_ucx_hold": (size, [pointer, u64, pointer, size]),
        "nd_ucx_release": (None, [pointer, u64]),
        "nd_ucx_poll": (size, [pointer, pointer, size]),
        "nd_ucx_describe": (None, [pointer, u64, text, size]),
    }
    return load_library(LIBRARY_PATH, signatures)


def default_library() -> str:
    """Path of the `libucx` wheel's libucp; `ConfigError` if the wheel is not installed."""
    spec = importlib.util.find_spec("libucx")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "lib" / "libucp.so.0"
        if path.exists():
            return str(path)
    raise ConfigError("libucp not found: install libucx-cu13, or name a library", param="ucx.library")


class UcxTransport:
    """Implements `common.kvtransfer.transport.Transport`. Methods may be called from any thread, but not beside close.

    `device`: number of the GPU that all memory is on, None for the host's. A GPU's transport looks at no digests: reads
    are queued without checks (see `common.kvtransfer.device`).
    Raises `ConfigError` if UCX does not start with this configuration.
    """

    name = "ucx"

    def __init__(self, config: UcxConfig, device: int | None = None) -> None:
        self._lib = _library()
        self._device = device
        error = ctypes.create_string_buffer(512)
        library = config.library or default_library()
        tls = config.tls if device is None else _with_cuda(config.tls)
        handle: int | None = self._lib.nd_ucx_open(
            library.encode(),
            tls.encode(),
            config.net_devices.encode(),
            segments_folder().encode(),
            -1 if device is None else device,
            error,
            len(error),
        )
        if not handle:
            raise ConfigError(error.value.decode(errors="replace"), param="ucx")
        self._handle = handle
        self._finalizer = weakref.finalize(self, self._lib.nd_ucx_close, handle)  # also at interpreter exit
        self._lock = threading.Lock()
        self._peer_ids = count(1)
        self._memory: dict[str, MemoryHandle] = {}
        self._remote: dict[int, dict[str, tuple[int, MemoryHandle]]] = {}
        self._refused: list[ReadResult | PeerDown] = []
        self._wakeup_fd: int = self._lib.nd_ucx_wakeup_fd(handle)
        self._events = (_Event * _POLL_EVENTS)()

    @property
    def wakeup_fd(self) -> int:
        return self._wakeup_fd

    @property
    def library_version(self) -> str:
        out = ctypes.create_string_buffer(32)
        self._lib.nd_ucx_version(self._open_handle(), out, len(out))
        return out.value.decode()

    def allocate(self, group: str, nbytes: int) -> int:
        self._check_new(group, nbytes)
        if self._device is not None:
            raise ValueError(f"group {group!r}: a GPU's memory is registered, not allocated here")
        memory, error = _Memory(), ctypes.create_string_buffer(512)
        if not self._lib.nd_ucx_allocate(self._open_handle(), nbytes, ctypes.byref(memory), error, len(error)):
            raise KVTransferError(f"group {group}: {error.value.decode(errors='replace')}")
        self._add(group, nbytes, memory)
        return int(memory.address)

    def register(self, group: str, address: int, nbytes: int, guard: int, guard_nbytes: int) -> None:
        self._check_new(group, nbytes)
        if address + nbytes > guard or guard_nbytes < _COOKIE_NBYTES:
            raise ValueError(f"group {group!r}: the guard is not behind the memory, or too small")
        memory, error = _Memory(), ctypes.create_string_buffer(512)
        arguments = (address, guard, guard_nbytes, ctypes.byref(memory), error, len(error))
        if not self._lib.nd_ucx_register(self._open_handle(), *arguments):
            raise KVTransferError(f"group {group}: {error.value.decode(errors='replace')}")
        self._add(group, nbytes, memory)

    def _check_new(self, group: str, nbytes: int) -> None:
        if group in self._memory:
            raise ValueError(f"group {group!r} is allocated already")
        if nbytes <= 0:
            raise ValueError(f"group {group!r}: cannot allocate {nbytes} bytes")

    def _add(self, group: str, nbytes: int, memory: _Memory) -> None:
        is_device = self._device is not None
        key = _KEY.pack(memory.address, nbytes, bytes(memory.cookie), memory.cookie_address, is_device)
        sealed = _seal(key + bytes(memory.key[: memory.key_nbytes]))
        self._memory[group] = MemoryHandle(group, memory.address, nbytes, sealed)

    def endpoint(self) -> Endpoint:
        out = ctypes.create_string_buffer(4096)
        nbytes: int = self._lib.nd_ucx_address(self._open_handle(), out, len(out))
        if nbytes > len(out):
            raise InternalError(f"UCX's address has {nbytes} bytes")
        hint = f"{socket.gethostname()}:{os.getpid()}"
        return Endpoint(self.name, _seal(out.raw[:nbytes]), tuple(self._memory.values()), hint)

    def connect(self, endpoint: Endpoint) -> int:
        handle, peer_id = self._open_handle(), next(self._peer_ids)
        try:
            address = _unseal(endpoint.address, "address")
            remotes = [_remote(memory) for memory in endpoint.memory]
        except ValueError as error:
            self._refuse(PeerDown(peer_id, f"refused the endpoint of {endpoint.hint or 'a peer'}: {error}"))
            return peer_id
        self._remote[peer_id] = {memory.group: (i, memory) for i, memory in enumerate(endpoint.memory)}
        packed = (_Remote * len(remotes))(*remotes)
        self._lib.nd_ucx_connect(handle, peer_id, address, len(address), packed, len(remotes))
        return peer_id

    def disconnect(self, peer_id: int) -> None:
        self._remote.pop(peer_id, None)
        self._lib.nd_ucx_disconnect(self._open_handle(), peer_id)

    def read(self, peer_id: int, read_id: int, pieces: Sequence[ReadPiece], checks: Sequence[DigestCheck]) -> None:
        handle = self._open_handle()
        remote = self._remote.get(peer_id)
        try:
            if remote is None:
                raise ValueError("not connected to this peer")
            packed_pieces = _pack_pieces(pieces, remote)
        except ValueError as error:
            self._refuse(ReadResult(read_id, ReadStatus.FAILED, 0, 0.0, 0.0, str(error)))
            return
        assert self._device is None or not checks, "digests of a GPU's memory are not for the host"
        packed_checks, segments = _pack_checks(checks)
        self._lib.nd_ucx_read(
            handle,
            peer_id,
            read_id,
            packed_pieces.buffer_info()[0],
            len(pieces),
            packed_checks.buffer_info()[0],
            len(checks),
            segments.buffer_info()[0],
            len(segments) // 3,
        )

    def hold(self, peer_id: int, pieces: Sequence[ReadPiece]) -> NDArray[np.int64] | None:
        """For kernels that read a ready peer's memory by themselves: int64 [pieces, 3], each one's address in this
        GPU's address space, its local address, and its size.

        The memory stays there until `release`, whatever becomes of the peer. None if it is not there, a piece is
        outside of it, or the transport's thread has not looked within a second: a driver may be slow.
        """
        remote = self._remote.get(peer_id)
        groups = {p.group for p in pieces}
        if self._device is None or not remote or len(groups) != 1 or not groups <= remote.keys():
            return None
        index, memory = remote[groups.pop()]
        rows = [(p.remote_offset, p.local_address, p.nbytes) for p in pieces]
        table = np.array(rows, np.int64)
        if (table[:, ::2] < 0).any() or (table[:, 0] + table[:, 2] > memory.nbytes).any():
            return None
        places = (ctypes.c_uint64 * len(remote))()
        if self._lib.nd_ucx_hold(self._open_handle(), peer_id, places, len(remote)) != len(remote):
            return None
        table[:, 0] += places[index]
        return table

    def release(self, peer_id: int) -> None:
        """Undo one `hold`."""
        self._lib.nd_ucx_release(self._open_handle(), peer_id)

    def poll(self) -> list[ReadResult | PeerDown]:
        if not self._finalizer.alive:
            return []
        with self._lock:
            ended, self._refused = self._refused, []
            while True:
                taken: int = self._lib.nd_ucx_poll(self._handle, self._events, _POLL_EVENTS)
                ended += [self._translate(event) for event in self._events[:taken]]
                if taken < _POLL_EVENTS:
                    return ended

    def describe(self, peer_id: int) -> str:
        """'ucx/posix', 'ucx/cma', 'ucx/tcp', 'ucx/cuda_ipc', ...; 'ucx/connecting' and 'ucx/gone' before and after."""
        out = ctypes.create_string_buffer(64)
        self._lib.nd_ucx_describe(self._open_handle(), peer_id, out, len(out))
        return f"{self.name}/{out.value.decode()}"

    def close(self) -> None:
        self._finalizer()

    def _open_handle(self) -> int:
        if not self._finalizer.alive:
            raise ValueError("the transport is closed")
        return self._handle

    def _refuse(self, event: ReadResult | PeerDown) -> None:
        """Queue an event that the native side never hears of."""
        with self._lock:
            self._refused.append(event)
        os.eventfd_write(self._wakeup_fd, 1)

    def _translate(self, event: _Event) -> ReadResult | PeerDown:
        message = event.message.decode(errors="replace")
        if event.kind == 0:
            status = _STATUS[event.status]
            return ReadResult(event.id, status, event.nbytes, event.seconds, event.read_seconds, message)
        self._remote.pop(event.id, None)
        return PeerDown(event.id, message)


def _with_cuda(tls: str) -> str:
    """With what a GPU's memory takes on another machine; a list of what is left out (^...), or all, stays as it is."""
    names = tls.split(",")
    return tls if tls.startswith("^") or {"all", "cuda_copy"} & set(names) else f"{tls},cuda_copy"


def _seal(payload: bytes) -> bytes:
    return _SEAL.pack(_MAGIC, hashlib.blake2b(payload, digest_size=8).digest()) + payload


def _unseal(sealed: bytes, what: str) -> bytes:
    """The payload; `ValueError` if it is not what `_seal` made."""
    payload = sealed[_SEAL.size :]
    if not payload or _seal(payload) != sealed:
        raise ValueError(f"malformed {what}")
    return payload


def _remote(memory: MemoryHandle) -> _Remote:
    key = _unseal(memory.remote_key, f"remote key of group {memory.group}")
    if len(key) <= _KEY.size:
        raise ValueError(f"malformed remote key of group {memory.group}")
    base, nbytes, cookie, cookie_address, on_device = _KEY.unpack_from(key)
    if (base, nbytes) != (memory.base, memory.nbytes):
        raise ValueError(f"remote key of group {memory.group} is for other memory")
    if cookie_address < base + nbytes and not on_device:
        raise ValueError(f"remote key of group {memory.group} has its cookie amid the memory")
    packed = key[_KEY.size :]
    return _Remote(base, cookie_address, (ctypes.c_uint8 * 16)(*cookie), packed, len(packed), on_device)


def _pack_pieces(pieces: Sequence[ReadPiece], remote: dict[str, tuple[int, MemoryHandle]]) -> array[int]:
    """`nd::Piece` for each; `ValueError` for what is outside of the peer's memory."""
    packed = array("Q")
    for piece in pieces:
        found = remote.get(piece.group)
        if found is None:
            raise ValueError(f"the peer has no memory of group {piece.group!r}")
        index, memory = found
        if piece.nbytes <= 0 or piece.remote_offset < 0 or piece.remote_offset + piece.nbytes > memory.nbytes:
            raise ValueError(
                f"{piece.nbytes} bytes at {piece.remote_offset} are outside of group {piece.group}"
                f" ({memory.nbytes} bytes)"
            )
        packed.extend((index, memory.base + piece.remote_offset, piece.local_address, piece.nbytes))
    return packed


def _pack_checks(checks: Sequence[DigestCheck]) -> tuple[array[int], array[int]]:
    """`nd::Check` for each, and the `nd::DigestSegment`s of all."""
    rows = [
        (
            check.num_layers,
            check.num_parts,
            check.layer_stride,
            check.part_stride,
            check.token_stride,
            check.token_nbytes,
            check.expected,
            len(check.segments),
        )
        for check in checks
    ]
    if any(0 in row[:2] for row in rows):
        raise ValueError("a digest check over nothing")
    runs = chain.from_iterable([check.segments for check in checks])
    return array("Q", list(chain.from_iterable(rows))), array("Q", list(chain.from_iterable(runs)))
