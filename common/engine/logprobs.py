"""Logprobs of drawn tokens and of the best ones: the log softmax of the model's raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from common.engine.results import Fetched
from common.kernels.sampling import top_rows
from common.types import TokenLogprobs


@dataclass(frozen=True)
class RawLogprobs:
    """Logprobs of one token per row, still on the device.

    `top_n`: alternatives to list for each row, None for no logprobs at all; the tensors hold the rows that have
    some, with as many alternatives as the greediest of them wants.
    """

    top_n: Sequence[int | None]
    chosen_L: Tensor
    ids_LN: Tensor
    values_LN: Tensor

    @classmethod
    def of(
        cls, logits_RV: Tensor, token_ids_R: Tensor, top_n: Sequence[int | None], lines_L: Tensor | None = None
    ) -> RawLogprobs:
        """`logits_RV`: raw, float32; `token_ids_R`: int64, -1 where there is no token.

        `lines_L`: int64 on their device, the rows that ask for logprobs; None if all do.
        """
        logits_LV = logits_RV if lines_L is None else logits_RV.index_select(0, lines_L)
        ids_L = token_ids_R if lines_L is None else token_ids_R.index_select(0, lines_L)
        most = min(max((n for n in top_n if n is not None), default=0), logits_RV.shape[1])
        log_sum_L, ids_LN, values_LN = top_rows(logits_LV, most)
        chosen_L = logits_LV.gather(1, ids_L.clamp(min=0).unsqueeze(1)).squeeze(1).double() - log_sum_L
        return cls(top_n, chosen_L.float(), ids_LN, (values_LN.double() - log_sum_L.unsqueeze(1)).float())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `per_row` wants on the host."""
        return self.chosen_L, self.ids_LN, self.values_LN

    def per_row(self, chosen_L: Tensor, ids_LN: Tensor, values_LN: Tensor) -> list[TokenLogprobs | None]:
        """One entry per row; None for rows that did not ask. The arguments: `tensors`, on the host."""
        lines = iter(zip(chosen_L.tolist(), ids_LN.tolist(), values_LN.tolist(), strict=True))
        out: list[TokenLogprobs | None] = []
        for top_n in self.top_n:
            if top_n is None:
                out.append(None)
                continue
            chosen, ids, values = next(lines)
            out.append(TokenLogprobs((chosen,), len(ids[:top_n]), tuple(ids[:top_n]), tuple(values[:top_n])))
        return out


@dataclass(frozen=True)
class PromptLogprobs:
    """Logprobs of tokens of a prompt, on their way to the host."""

    raw: RawLogprobs
    fetched: Fetched

    def get(self) -> TokenLogprobs:
        """Waits."""
        found = [line for line in self.raw.per_row(*self.fetched.get()) if line is not None]
        return TokenLogprobs(
            tuple(line.token_logprobs[0] for line in found),
            self.raw.ids_LN.shape[1],
            tuple(t for line in found for t in line.top_ids),
            tuple(v for line in found for v in line.top_logprobs),
        )


def prompt_logprobs(logits_TV: Tensor, targets_T: Tensor, top_n: int) -> PromptLogprobs:
    """Logprobs of the token that really follows each position, and the best `top_n` of each position."""
    raw = RawLogprobs.of(logits_TV, targets_T, [top_n] * len(targets_T))
    return PromptLogprobs(raw, Fetched.start(raw.tensors()))
