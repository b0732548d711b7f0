"""Brings a step's arrays to the device: on the CPU they are there, elsewhere they go in one copy.

    arrays of a batch -> pinned memory -> one asynchronous copy -> tensors by name

Pinned memory is written again only when the copy from it has been made, so the host may prepare a step while the one
before has not begun.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.attention.context import AttentionBackend, AttentionContext, GroupTables, HostLengths, KVViews
from common.engine.batch import Batch

Arrays = dict[str, NDArray[np.generic]]
Tensors = dict[str, Tensor]

_ALIGN = 64
_DEPTH = 16  # copies that may be under way at once: those of two steps, and their indices


class Inputs(Protocol):
    def put(self, arrays: Arrays, into: Tensor | None = None) -> Tensors:
        """The arrays as tensors on the device. `into`: uint8 memory there of at least `nbytes_of` bytes that takes
        them, so that the same shapes lie at the same addresses; otherwise it is new.
        """


class HostInputs:
    """The device is the host: tensors share memory with the arrays."""

    def put(self, arrays: Arrays, into: Tensor | None = None) -> Tensors:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass
class _Pinned:
    memory: Tensor
    copied: torch.cuda.Event


class PinnedInputs:
    """The device is a GPU. Copies are made on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ring: list[_Pinned] = []
        self._next = 0

    def put(self, arrays: Arrays, into: Tensor | None = None) -> Tensors:
        total = nbytes_of(arrays)
        pinned = self._take(total)
        host = pinned.memory.numpy()
        offsets = place(arrays)
        for array, offset in zip(arrays.values(), offsets, strict=True):
            host[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        device = torch.empty(total, dtype=torch.uint8, device=self._device) if into is None else into[:total]
        device.copy_(pinned.memory[:total], non_blocking=True)
        pinned.copied.record()
        return view(device, arrays)

    def _take(self, nbytes: int) -> _Pinned:
        """The memory that was used longest ago, once its copy is made."""
        if len(self._ring) < _DEPTH:
            self._ring.append(_Pinned(_pin(nbytes), torch.cuda.Event()))  # type: ignore[no-untyped-call]
        pinned = self._ring[self._next]
        self._next = (self._next + 1) % _DEPTH
        pinned.copied.synchronize()
        if pinned.memory.numel() < nbytes:
            pinned.memory = _pin(nbytes)
        return pinned


def place(arrays: Arrays) -> list[int]:
    """Where each array begins, one behind the other."""
    offsets, end = [], 0
    for array in arrays.values():
        offsets.append(end)
        end += -(-array.nbytes // _ALIGN) * _ALIGN
    return offsets


def nbytes_of(arrays: Arrays) -> int:
    """Bytes that they take together."""
    return sum(-(-array.nbytes // _ALIGN) * _ALIGN for array in arrays.values())


def view(memory: Tensor, arrays: Arrays) -> Tensors:
    """Tensors over uint8 memory in which the arrays lie as `place` says."""
    tensors = {}
    for (name, array), offset in zip(arrays.items(), place(arrays), strict=True):
        raw = memory[offset : offset + array.nbytes]
        tensors[name] = raw.view(_TORCH[array.dtype.str]).view(array.shape)
    return tensors


def arrays_of(batch: Batch) -> Arrays:
    """What a forward needs of a batch on the device: names as `context_of` reads them."""
    arrays: Arrays = {
        "input_ids": batch.input_ids_T,
        "positions": batch.positions_T,
        "query_starts": batch.query_starts_S1,
        "seq_lens": batch.seq_lens_S,
    }
    if batch.pending_T is not None:
        arrays["pending"] = batch.pending_T
    for name, group in batch.groups.items():
        arrays[f"tables.{name}"] = group.tables_SB
        arrays[f"slots.{name}"] = group.slots_T
    for name, ids in batch.states_S.items():
        arrays[f"states.{name}"] = ids
    return arrays


def context_of(
    batch: Batch,
    tensors: Tensors,
    kv: KVViews,
    backend: AttentionBackend,
    on_layer: Callable[[], None],
    first: int = 0,
) -> AttentionContext:
    """The context of a forward over a batch whose arrays are on the device. `first`: see `GroupTables`."""
    groups = {
        name: GroupTables(
            tensors[f"tables.{name}"], tensors[f"slots.{name}"], g.block_size, g.window, first, g.tables_SB
        )
        for name, g in batch.groups.items()
    }
    return AttentionContext(
        query_starts_S1=tensors["query_starts"],
        seq_lens_S=tensors["seq_lens"],
        max_query_len=batch.max_query_len,
        max_seq_len=batch.max_seq_len,
        groups=groups,
        kv=kv,
        backend=backend,
        states=states_of(tensors),
        on_layer=on_layer,
        host=HostLengths(batch.query_starts_S1, batch.seq_lens_S),
    )


def states_of(tensors: Mapping[str, Tensor]) -> Tensors:
    """By snapshot group."""
    prefix = "states."
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _pin(nbytes: int) -> Tensor:
    return torch.empty(1 << max(nbytes - 1, 4095).bit_length(), dtype=torch.uint8, pin_memory=True)


_TORCH = {
    np.dtype(np.int64).str: torch.int64,
    np.dtype(np.int32).str: torch.int32,
    np.dtype(np.float32).str: torch.float32,
    np.dtype(np.float64).str: torch.float64,
    np.dtype(np.uint8).str: torch.uint8,
}
