"""Tokens that a grammar allows, for some rows of a step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.kernels import gpu

_MINUS_INF = -0x00800000  # float32 -inf as int32


def forbid(logits_RV: Tensor, rows_G: Tensor, words_GW: Tensor) -> None:
    """Make the logits that are not allowed in the rows `rows_G` (int64) -inf, in place.

    `words_GW`: int32 [G, ceil(vocab / 32)], token t at bit t % 32 of word t // 32. All on one device.
    """
    if gpu.enabled(logits_RV):
        gpu.masks.forbid(logits_RV, rows_G, words_GW)
        return
    for row, words_W in zip(rows_G.tolist(), words_GW.cpu(), strict=True):
        raw_V = logits_RV[row].view(torch.int32)
        bits_V = np.unpackbits(words_W.numpy().view(np.uint8), count=len(raw_V), bitorder="little")
        kept_V = torch.from_numpy(-bits_V.astype(np.int32)).to(raw_V.device)  # without a branch for each token
        raw_V &= kept_V
        raw_V |= ~kept_V & _MINUS_INF
