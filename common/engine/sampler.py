"""The token of decision 13: logits in, one token per row out, by noise keyed by place.

Each row stands alone: what it draws depends on its logits and its `SampleRow` only, never on the batch. A
verify step of speculation passes one row for each position of a sequence. Order of operations, as users of
vLLM and of the OpenAI API expect:

    logprobs (log softmax of the raw logits) -> logit_bias -> min_tokens -> grammar mask -> repetition penalty
    (prompt and output) -> presence and frequency penalties (output) -> temperature -> top_k -> top_p -> min_p
    -> argmax of logit / temperature + noise (`common.kernels.sampling` defines the noise)

A row that has nothing left, or whose logits are not numbers, fails alone: its token is -1 and `failures` says
why. `logprobs` and `failures` are read from the device on first use, so that a step can be sampled and
collected later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.batch import SampleRow
from common.engine.logprobs import RawLogprobs
from common.kernels.sampling import Draw, DrawStatus, draw_rows, noise_key
from common.types import TokenLogprobs

_GREEDY = Draw(0, 0.0, 0, 1.0, 0.0)

_REASONS = {
    DrawStatus.EMPTY: "no token is allowed: the grammar, bans and min_tokens leave nothing to draw",
    DrawStatus.NOT_A_NUMBER: "the model's logits are not finite numbers",
}


@dataclass(frozen=True)
class SampleResult:
    """`token_ids_R`: int64 on the device of the logits, -1 for a failed row."""

    token_ids_R: Tensor
    status_R: Tensor = field(repr=False)
    raw: RawLogprobs | None = field(repr=False)

    @cached_property
    def failures(self) -> dict[int, str]:
        """Rows without a token, and why."""
        return {r: _REASONS[DrawStatus(status)] for r, status in enumerate(self.status_R.tolist()) if status}

    @cached_property
    def logprobs(self) -> list[TokenLogprobs | None]:
        """One entry per row; None where the request asked for none or the row failed."""
        if self.raw is None:
            return [None] * self.token_ids_R.shape[0]
        return [None if r in self.failures else entry for r, entry in enumerate(self.raw.per_row())]


class Sampler:
    """Stateless but for its sizes; one per engine."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)

    def sample(self, logits_RV: Tensor, rows: Sequence[SampleRow], masks: Tensor | None = None) -> SampleResult:
        """Draw one token per row. `logits_RV`: float32 [rows, vocab], left as it is.

        `masks` says which tokens a grammar allows: bool [rows, vocab], or int32 [rows, ceil(vocab / 32)] with
        token t at bit t % 32 of word t // 32.
        """
        if logits_RV.shape != (len(rows), self.vocab_size) or logits_RV.dtype != torch.float32:
            raise ValueError(
                f"logits must be float32 {[len(rows), self.vocab_size]}, got {logits_RV.dtype} {list(logits_RV.shape)}"
            )
        logits_RV = logits_RV.contiguous()
        token_ids_R, status_R = draw_rows(self._adjusted(logits_RV, rows, masks), [_draw(row) for row in rows])
        top_n = [row.params.logprobs for row in rows]
        raw = RawLogprobs.of(logits_RV, token_ids_R, top_n) if any(n is not None for n in top_n) else None
        return SampleResult(token_ids_R, status_R, raw)

    def _adjusted(self, logits_RV: Tensor, rows: Sequence[SampleRow], masks: Tensor | None) -> Tensor:
        changed = [(r, row) for r, row in enumerate(rows) if _adjusts(row)]
        if not changed and masks is None:
            return logits_RV
        out_RV = logits_RV.clone()
        for r, row in changed:
            self._bias(out_RV[r], row)
        if masks is not None:
            out_RV.masked_fill_(~self._allowed(masks, len(rows)), -torch.inf)
        for r, row in changed:
            self._penalise(out_RV[r], row)
        return out_RV

    def _bias(self, logits_V: Tensor, row: SampleRow) -> None:
        bias = {t: value for t, value in row.params.logit_bias if 0 <= t < self.vocab_size}
        if bias:
            ids_K = torch.tensor(list(bias.keys()), device=self.device)
            logits_V[ids_K] += torch.tensor(list(bias.values()), dtype=torch.float32, device=self.device)
        if row.output_index < row.params.min_tokens:
            logits_V[self._tensor(self._known(row.stop_ids))] = -torch.inf

    def _penalise(self, logits_V: Tensor, row: SampleRow) -> None:
        params = row.params
        output_ids = self._known(row.output_ids)
        if params.repetition_penalty != 1.0:
            ids_K = self._tensor(np.concatenate([self._known(row.prompt_ids), output_ids]))
            x_K = logits_V[ids_K]
            logits_V[ids_K] = torch.where(x_K > 0, x_K / params.repetition_penalty, x_K * params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            unique, counts = np.unique(output_ids, return_counts=True)
            cost = params.presence_penalty + params.frequency_penalty * counts
            logits_V[self._tensor(unique)] -= torch.from_numpy(cost.astype(np.float32)).to(self.device)

    def _known(self, ids: Iterable[int]) -> NDArray[np.int64]:
        """Ids of the vocabulary; others (media placeholders past its end) have no logit."""
        array = np.asarray(ids if isinstance(ids, Sequence) else list(ids), dtype=np.int64)
        return array[(array >= 0) & (array < self.vocab_size)]

    def _tensor(self, ids: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(ids).to(self.device)

    def _allowed(self, masks: Tensor, num_rows: int) -> Tensor:
        num_words = -(-self.vocab_size // 32)
        if masks.dtype == torch.bool and masks.shape == (num_rows, self.vocab_size):
            return masks.to(self.device)
        if masks.dtype == torch.int32 and masks.shape == (num_rows, num_words):
            bits = torch.arange(32, dtype=torch.int32, device=self.device)
            allowed = (masks.to(self.device).unsqueeze(-1) >> bits) & 1
            return allowed.view(num_rows, -1)[:, : self.vocab_size].bool()
        raise ValueError(
            f"masks must be bool {[num_rows, self.vocab_size]} or int32 {[num_rows, num_words]}, "
            f"got {masks.dtype} {list(masks.shape)}"
        )


def _adjusts(row: SampleRow) -> bool:
    p = row.params
    return bool(
        p.logit_bias
        or p.repetition_penalty != 1.0
        or p.presence_penalty
        or p.frequency_penalty
        or row.output_index < p.min_tokens
    )


def _draw(row: SampleRow) -> Draw:
    p = row.params
    if p.temperature == 0:
        return _GREEDY
    key = noise_key(row.seed, row.choice, row.output_index)
    return Draw(key, p.temperature, max(p.top_k, 0), p.top_p, p.min_p)
