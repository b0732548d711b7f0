"""Logprobs of drawn tokens and of the best ones, from the model's raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.types import TokenLogprobs


@dataclass(frozen=True)
class RawLogprobs:
    """Log softmax of the rows that asked, taken before anything changed them.

    `top`: (row, number of best tokens to list) for each line of `logprobs_LV`, float32.
    """

    num_rows: int
    top: Sequence[tuple[int, int]]
    logprobs_LV: Tensor

    @classmethod
    def of(cls, logits_RV: Tensor, wanted: Sequence[tuple[int, int | None]]) -> RawLogprobs:
        """`wanted`: (row, number of best tokens)."""
        picked = logits_RV if len(wanted) == logits_RV.shape[0] else logits_RV[[r for r, _ in wanted]]
        return cls(logits_RV.shape[0], [(r, n or 0) for r, n in wanted], picked.log_softmax(dim=-1))

    def of_tokens(self, token_ids: Sequence[int]) -> list[TokenLogprobs | None]:
        """One entry per row; None for rows that did not ask and for token -1."""
        out: list[TokenLogprobs | None] = [None] * self.num_rows
        for line, (r, top_n) in enumerate(self.top):
            if token_ids[r] >= 0:
                out[r] = token_logprobs(self.logprobs_LV[line : line + 1], [token_ids[r]], top_n)
        return out


def token_logprobs(logprobs_TV: Tensor, token_ids: Sequence[int], top_n: int) -> TokenLogprobs:
    """Logprobs of one token per line and of each line's best `top_n`; equal ones by lower id."""
    ids_T1 = torch.tensor(token_ids, dtype=torch.int64, device=logprobs_TV.device).unsqueeze(1)
    chosen = tuple(logprobs_TV.gather(1, ids_T1).squeeze(1).tolist())
    top_n = min(top_n, logprobs_TV.shape[1])
    if top_n == 0:
        return TokenLogprobs(chosen)
    top_ids: list[int] = []
    top_values: list[float] = []
    floor_T1 = logprobs_TV.topk(top_n, dim=-1).values[:, -1:]
    for line_V, floor in zip(logprobs_TV, floor_T1, strict=True):
        ids_K = (line_V >= floor).nonzero().squeeze(1)
        values_K, order_K = line_V[ids_K].sort(descending=True, stable=True)
        top_ids += ids_K[order_K[:top_n]].tolist()
        top_values += values_K[:top_n].tolist()
    return TokenLogprobs(chosen, top_n, tuple(top_ids), tuple(top_values))
