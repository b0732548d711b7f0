"""Tokens that a grammar allows, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from common.kernels import gpu


def check_mask(mask: Tensor, rows: int, vocab_size: int) -> None:
    """ValueError unless it is bool [rows, vocab], or int32 [rows, ceil(vocab / 32)] with token t at bit t % 32 of
    word t // 32.
    """
    num_words = -(-vocab_size // 32)
    forms = {torch.bool: (rows, vocab_size), torch.int32: (rows, num_words)}
    if forms.get(mask.dtype) != tuple(mask.shape):
        raise ValueError(
            f"masks must be bool {[rows, vocab_size]} or int32 {[rows, num_words]}, got {mask.dtype} {list(mask.shape)}"
        )


def forbid(logits_RV: Tensor, mask: Tensor) -> None:
    """Make the logits of tokens that `mask` (see `check_mask`, on the same device) does not allow -inf, in place."""
    if mask.dtype == torch.int32 and gpu.enabled(logits_RV):
        gpu.masks.forbid(logits_RV, mask)
        return
    if mask.dtype == torch.int32:
        bits = torch.arange(32, dtype=torch.int32, device=mask.device)
        mask = ((mask.unsqueeze(-1) >> bits) & 1).view(mask.shape[0], -1)[:, : logits_RV.shape[1]].bool()
    logits_RV.masked_fill_(~mask, -torch.inf)
