"""Tokens that a grammar allows, for some rows of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from common.kernels import gpu


def forbid(logits_RV: Tensor, rows_G: Tensor, words_GW: Tensor) -> None:
    """Make the logits that are not allowed in the rows `rows_G` (int64) -inf, in place.

    `words_GW`: int32 [G, ceil(vocab / 32)], token t at bit t % 32 of word t // 32. All on one device.
    """
    if gpu.enabled(logits_RV):
        gpu.masks.forbid(logits_RV, rows_G, words_GW)
        return
    bits = torch.arange(32, dtype=torch.int32, device=words_GW.device)
    forbidden_GV = ((words_GW.unsqueeze(-1) >> bits) & 1).view(len(words_GW), -1)[:, : logits_RV.shape[1]] == 0
    logits_RV[rows_G] = logits_RV[rows_G].masked_fill_(forbidden_GV, -torch.inf)
