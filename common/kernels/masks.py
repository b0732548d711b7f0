"""Tokens that a grammar allows, for some rows of a step."""

from __future__ import annotations

import numpy as np
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
    for row, words_W in zip(rows_G.tolist(), words_GW.cpu(), strict=True):
        logits_V = logits_RV[row]
        bits_V = np.unpackbits(words_W.numpy().view(np.uint8), count=len(logits_V), bitorder="little").view(np.bool_)
        few_allowed = 2 * np.count_nonzero(bits_V) < len(bits_V)
        places_K = torch.from_numpy(np.flatnonzero(bits_V if few_allowed else ~bits_V)).to(logits_V.device)
        if few_allowed:
            kept_K = logits_V[places_K]
            logits_V.fill_(-torch.inf)
            logits_V.index_copy_(0, places_K, kept_K)
        else:
            logits_V.index_fill_(0, places_K, -torch.inf)
