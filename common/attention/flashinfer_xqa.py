"""FlashInfer's XQA: attention of one new token, on Hopper, without a plan.

It takes block tables and lengths as they lie on the GPU. A thread block has a key head of a sequence, or a part of its
keys where there are too few of them to fill all processors, or to fill them evenly (`num_parts`). Strides of blocks
are honoured: it counts in rows of a head, in 32 bits, and rows of 256 bytes reach 1 TB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.attention.flashinfer_modules import SHORT, find, function

_gpu_of_process: list[int] = []

BLOCKS_PER_PROCESSOR = 2  # that the kernel has room for at once
MOST_PARTS = 16
_MOST_ROUNDS = 2  # of thread blocks, where keys are shared; scratch memory is as large
_JOINING = 0.05  # of a round: what it costs that parts are put together


def can_run_on(gpu: int) -> bool:
    """Its launcher asks for shared memory once in a process, for the GPU that is current then: on another its kernels
    are refused ("invalid argument"). So they belong to the first GPU that a process asks for.
    """
    if not _gpu_of_process:
        _gpu_of_process.append(gpu)
    return gpu == _gpu_of_process[0]


def num_parts(num: int, num_processors: int) -> int:
    """In how many parts each of `num` rows of keys is read, so that thread blocks come in few, even rounds."""
    at_once = num_processors * BLOCKS_PER_PROCESSOR
    most = min(MOST_PARTS, _MOST_ROUNDS * at_once // num)

    def rounds(parts: int) -> float:
        return -(-num * parts // at_once) / parts + (_JOINING if parts > 1 else 0.0)

    return min(range(1, most + 1), key=rounds, default=1)


@dataclass(frozen=True)
class Xqa:
    """XQA's module. The cache is of `dtype`, the queries' own; `group` query heads to a key head."""

    dtype: torch.dtype
    head_dim: int
    group: int
    block_size: int

    @property
    def can(self) -> bool:
        """Is there a kernel of these sizes?"""
        return self.head_dim in (64, 128, 256) and self.block_size in (16, 32, 64, 128) and self.group <= 32

    @property
    def name(self) -> str:
        t = SHORT[self.dtype]
        types = f"xqa_input_{t}_kv_cache_{t}_output_{t}_page_size_{self.block_size}_head_dim_{self.head_dim}"
        flags = "use_sliding_window_False_use_spec_dec_False_spec_q_seq_len_1"
        return f"{types}_head_group_ratio_{self.group}_{flags}"  # FlashInfer's own: it is theirs as it is

    @property
    def path(self) -> Path | None:
        """Its library, None if it was not built."""
        return find(self.name)

    def sources(self) -> Any:
        """FlashInfer's JitSpec."""
        from flashinfer.jit.xqa import gen_xqa_module

        spec = gen_xqa_module(
            self.dtype, self.dtype, self.block_size, self.head_dim, self.group, False, self.dtype, q_seq_len=1
        )
        assert spec.name == self.name
        return spec

    def run(
        self,
        q_SHD: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tables_SB: torch.Tensor,
        lens_S: torch.Tensor,
        out_SHD: torch.Tensor,
        space: XqaSpace,
        scale: float,
    ) -> None:
        """Queries and output are contiguous; `k`, `v`: [num_blocks, U, block_size, D] of the same strides."""
        assert k.stride(0) % self.head_dim == 0
        num = len(lens_S) * k.shape[1]
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        function(self, "xqa_wrapper")(
            False,  # Hopper's 8-bit kernel
            num_parts(num, space.num_processors) * num,  # it divides by `num` to find the parts
            k.shape[1],
            0,  # no window
            scale * self.head_dim**0.5,
            None,
            out_SHD[:, None],
            1.0,
            q_SHD[:, None],
            None,  # no sinks
            keys,
            values,
            None,
            None,
            tables_SB,
            tables_SB.shape[1] * self.block_size,
            lens_S,
            len(lens_S),
            1.0,
            None,
            1,
            None,
            space.semaphores,
            space.scratch,
            True,
        )


@dataclass(frozen=True)
class XqaSpace:
    """`semaphores` are 0 before and after."""

    num_processors: int
    semaphores: torch.Tensor
    scratch: torch.Tensor

    @classmethod
    def make(cls, device: torch.device) -> XqaSpace:
        """For any step: a part has up to 32 rows of 256 numbers."""
        num = torch.cuda.get_device_properties(device).multi_processor_count
        semaphores = torch.zeros(1 << 18, dtype=torch.int32, device=device)
        nbytes = num * BLOCKS_PER_PROCESSOR * _MOST_ROUNDS << 16
        return cls(num, semaphores, torch.empty(nbytes, dtype=torch.uint8, device=device))
