"""The memory of one rank's KV cache as tensors: one allocation per group, a strided view per region.

The bytes belong to a transport (see `Transport.allocate`) or, without one, to the pool itself; on a GPU they are always
the pool's, and the transport registers them (`Transport.register`). What lies where is the layout's business; who owns
a block, the manager's.

On a GPU each group has one block more than the layout counts: the padding block. It belongs to nobody, no peer may read
it, and what only fills up a step of fixed size writes there.

    block 0 | ... | block num_blocks - 1 | padding block | GUARD_NBYTES for the transport
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.kvcache.layout import ALIGN, TAIL_GROUP, KVLayout, RegionSpec
from common.kvcache.scales import KVScales, scales_hash
from common.kvcache.tables import BlockCopy

GUARD_NBYTES = 4096


class KVPool:
    """`addresses`: group -> address of `nbytes(group)` zeroed bytes, which must outlive the pool (CPU only).

    `scales`: of the layers of each region that is declared with a `scales_hash`, the same ones.
    """

    def __init__(
        self,
        layout: KVLayout,
        addresses: Mapping[str, int] | None,
        device: torch.device,
        scales: Mapping[str, Sequence[KVScales]] | None = None,
    ) -> None:
        self.layout = layout
        self._scales = scales or {}
        for region in layout.regions:
            found = scales_hash(self._scales[region.name]) if region.name in self._scales else b""
            assert found == region.scales_hash, f"region {region.name}: scales that its declaration does not have"
        self._num_padding = 0 if device.type == "cpu" else 1
        self._memory: dict[str, Tensor] = {}
        for group in layout.groups:
            size = layout.block_nbytes(group.name) * (group.num_blocks + self._num_padding)
            if addresses is None:
                self._memory[group.name] = _allocate(size, device)
            else:
                self._memory[group.name] = _wrap(addresses[group.name], size, device)
            assert self._memory[group.name].data_ptr() % ALIGN == 0, "KV memory is not aligned"
        self._regions = {r.name: self._view(r) for r in layout.regions}
        tails = layout.regions_of(TAIL_GROUP)
        self._tail_BD = self._regions[tails[0].name].flatten(1) if tails else None

    def nbytes(self, group: str) -> int:
        """Bytes of all blocks of a group that are handed out: the padding block is not among them."""
        return self.layout.block_nbytes(group) * self.layout.group(group).num_blocks

    def padding_block(self, group: str) -> int:
        """The block that nobody owns; only on a GPU."""
        assert self._num_padding, "there is a padding block on a GPU only"
        return self.layout.group(group).num_blocks

    def guards(self) -> dict[str, int]:
        """Address of `GUARD_NBYTES` behind each group's blocks; only on a GPU."""
        assert self._num_padding, "there are guards on a GPU only"
        return {name: memory.data_ptr() + memory.numel() for name, memory in self._memory.items()}

    def bases(self) -> dict[str, int]:
        """Address of block 0 of each group."""
        return {name: memory.data_ptr() for name, memory in self._memory.items()}

    def region(self, name: str) -> Tensor:
        """[num_blocks, num_layers, num_parts, units, block_size, width], strided over the pool. KeyError.

        On a GPU with one more, the padding block.
        """
        return self._regions[name]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Make these copies, whole blocks with all regions, in this order."""
        for group, source, target in copies:
            rows = self._memory[group].view(-1, self.layout.block_nbytes(group))
            if source < 0:
                rows[target].zero_()
            else:
                rows[target].copy_(rows[source])

    def scales(self, name: str) -> Sequence[KVScales] | None:
        """By layer of the region, None where its numbers are stored as they are."""
        return self._scales.get(name)

    def write_tail(self, block_ids_R: Tensor, hidden_RD: Tensor) -> None:
        """Keep one last hidden row in each of these tail blocks (int64)."""
        assert self._tail_BD is not None, "the layout has no tail group"
        self._tail_BD.index_copy_(0, block_ids_R, hidden_RD.to(self._tail_BD.dtype))

    def read_tail(self, block_ids_R: Tensor) -> Tensor:
        """The rows of these tail blocks (int64): a new [R, hidden]."""
        assert self._tail_BD is not None, "the layout has no tail group"
        return self._tail_BD.index_select(0, block_ids_R)

    def _view(self, region: RegionSpec) -> Tensor:
        group = self.layout.group(region.group)
        place = self.layout.place(region.name)
        typed = self._memory[region.group].view(getattr(torch, region.dtype))
        item = typed.element_size()
        strides = (
            self.layout.block_nbytes(region.group),
            place.layer_stride,
            place.part_stride,
            place.unit_stride,
            place.token_stride,
            item,
        )
        shape = (
            group.num_blocks + self._num_padding,
            region.num_layers,
            region.num_parts,
            place.local_units,
            group.block_size,
            region.width,
        )
        return typed.as_strided(shape, [s // item for s in strides], place.offset // item)


def _allocate(nbytes: int, device: torch.device) -> Tensor:
    """Zeros, once it returns: others than the current stream write and read there. On a GPU with a guard behind them,
    in memory that other processes can map: by cudaMalloc.
    """
    if device.type != "cuda":
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    memory = torch.zeros(nbytes + GUARD_NBYTES, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    return memory[:nbytes]


def _wrap(address: int, nbytes: int, device: torch.device) -> Tensor:
    if device.type != "cpu":
        raise ValueError(f"memory given by address must be the CPU's, not {device}")
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
