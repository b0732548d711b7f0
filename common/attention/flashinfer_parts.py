"""The launches that a step's attention is made of, each for some of its sequences: planned once, run in every layer.

Shape letters as in `common.attention.context`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from common.attention.flashinfer_modules import Launch
from common.attention.flashinfer_plan import Ints, Pages
from common.attention.flashinfer_xqa import Xqa, XqaSpace
from common.kernels import gpu

if TYPE_CHECKING:
    from common.kernels.gpu.paged_attention import Seen, Workspace


@dataclass(frozen=True)
class Paged:
    """A launch of FlashInfer's over `pages`, for some tokens of a step."""

    tokens: slice
    pages: tuple[Tensor, Tensor, Tensor, Tensor]
    launch: Launch

    def run(self, q_THD: Tensor, k: Tensor, v: Tensor, out_THD: Tensor, scale: float, v_scale: float) -> None:
        self.launch.run(q_THD, k, v, self.pages, out_THD, scale, v_scale)


@dataclass
class Few:
    """A launch of our own kernel, for sequences with equally many new tokens. `ran`: in a layer of this step."""

    tokens: slice
    tables_SB: Tensor
    seen: Seen
    items: Tensor
    space: Workspace
    ran: bool = False

    def run(self, q_THD: Tensor, k: Tensor, v: Tensor, out_THD: Tensor, scale: float, v_scale: float) -> None:
        places = (self.tables_SB, self.items, self.seen, self.space)
        gpu.paged_attention.attend(q_THD, k, v, *places, out_THD, scale, v_scale, scheduled=self.ran)
        self.ran = True


@dataclass(frozen=True)
class One:
    """A launch of XQA, for sequences with one new token."""

    tokens: slice
    module: Xqa
    tables_SB: Tensor
    lens_S: Tensor
    space: XqaSpace

    def run(self, q_THD: Tensor, k: Tensor, v: Tensor, out_THD: Tensor, scale: float, v_scale: float) -> None:
        assert v_scale == 1.0
        self.module.run(q_THD.contiguous(), k, v, self.tables_SB, self.lens_S, out_THD, self.space, scale)


Part = Paged | Few | One


def lay_out(pages: Pages, out: Ints, start: int) -> tuple[slice, slice, slice, int]:
    """Write the pages from `start` on: where the starts of queries and of blocks, last lengths and blocks then are."""
    count = len(pages.last_S)
    blocks, lasts, ids = start + count + 1, start + 2 * count + 2, start + 3 * count + 2
    out[start:blocks] = pages.query_starts_S1
    out[blocks:lasts] = pages.block_starts_S1
    out[lasts:ids] = pages.last_S
    out[ids : ids + len(pages.block_ids_N)] = pages.block_ids_N
    return slice(start, blocks), slice(blocks, lasts), slice(lasts, ids), ids
