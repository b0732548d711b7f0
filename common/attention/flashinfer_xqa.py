"""FlashInfer's XQA: attention of one new token, on Hopper, without a plan.

It takes block tables and lengths as they lie on the GPU. Where there are fewer sequences times key heads than
processors, a sequence's keys are shared by several thread blocks; else a sequence has one for each key head, however
long it is. Strides of blocks are honoured: it counts in rows of a head, in 32 bits, and rows of 256 bytes reach 1 TB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.attention.flashinfer_modules import SHORT, find, function


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
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        function(self, "xqa_wrapper")(
            False,  # Hopper's 8-bit kernel
            space.num_processors,
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
        """For any step: parts of a sequence are no more than a GPU has processors, 32 rows of 256 numbers each."""
        num = torch.cuda.get_device_properties(device).multi_processor_count
        semaphores = torch.zeros(1 << 18, dtype=torch.int32, device=device)
        return cls(num, semaphores, torch.empty(num << 16, dtype=torch.uint8, device=device))
