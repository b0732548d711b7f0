"""Grammar masks for tests, from booleans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.engine.batch import RowMasks


def pack_bits(allowed: Tensor) -> Tensor:
    """Bool [rows, vocab] as int32 words."""
    rows, vocab = allowed.shape
    padded = torch.zeros(rows, -(-vocab // 32) * 32, dtype=torch.int64)
    padded[:, :vocab] = allowed.long()
    return (padded.view(rows, -1, 32) << torch.arange(32)).sum(-1).to(torch.int32)


def row_masks(allowed: Tensor, rows: Sequence[int]) -> RowMasks:
    """Of those rows alone."""
    index = torch.tensor(rows)
    return RowMasks(index.numpy(), pack_bits(allowed[index]).numpy())
