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

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common.engine.logprobs import RawLogprobs
from common.errors import InternalError, InvalidRequestError, NanoDeployError
from common.kernels.sampling import Draw, DrawStatus, draw_rows, noise_key
from common.types import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to draw. `output_index` is the place of that token in the choice's output, from 0.

    Of `params`, stop, n and seed are not used. `stop_ids` (EOS and stop_token_ids) cannot be drawn while
    `output_index` < min_tokens. `prompt_ids` and `output_ids` (so far) are read for penalties only.
    """

    seed: int
    choice: int
    output_index: int
    params: SamplingParams
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SampleResult:
    """`token_ids_R`: int64 on the device of the logits, -1 for a failed row."""

    token_ids_R: Tensor
    status_R: Tensor = field(repr=False)
    raw: RawLogprobs | None = field(repr=False)

    @cached_property
    def failures(self) -> list[NanoDeployError | None]:
        """One entry per row: why it has no token."""
        return [_failure(DrawStatus(status)) for status in self.status_R.tolist()]

    @cached_property
    def logprobs(self) -> list[TokenLogprobs | None]:
        """One entry per row; None where the request asked for none or the row failed."""
        if self.raw is None:
            return [None] * self.token_ids_R.shape[0]
        return self.raw.of_tokens(self.token_ids_R.tolist())


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
                f"logits must be float32 [{len(rows)}, {self.vocab_size}], got {logits_RV.dtype} "
                f"{list(logits_RV.shape)}"
            )
        logits_RV = logits_RV.contiguous()
        wanted = [(r, row.params.logprobs) for r, row in enumerate(rows) if row.params.logprobs is not None]
        raw = RawLogprobs.of(logits_RV, wanted) if wanted else None
        adjusted_RV = self._adjusted(logits_RV, rows, masks)
        token_ids_R, status_R = draw_rows(adjusted_RV, [_draw(row) for row in rows])
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
        bias = dict(row.params.logit_bias)
        if bias:
            ids_K = self._ids(np.fromiter(bias.keys(), np.int64, len(bias)), "logit_bias")
            logits_V[ids_K] += torch.tensor(list(bias.values()), dtype=torch.float32, device=self.device)
        if row.stop_ids and row.output_index < row.params.min_tokens:
            kept = np.fromiter((t for t in row.stop_ids if 0 <= t < self.vocab_size), np.int64)
            logits_V[torch.from_numpy(kept).to(self.device)] = -torch.inf

    def _penalise(self, logits_V: Tensor, row: SampleRow) -> None:
        params = row.params
        if params.repetition_penalty != 1.0:
            seen = np.concatenate([np.asarray(ids, np.int64) for ids in (row.prompt_ids, row.output_ids)])
            ids_K = self._ids(np.unique(seen), "prompt")
            x_K = logits_V[ids_K]
            penalty = params.repetition_penalty
            logits_V[ids_K] = torch.where(x_K > 0, x_K / penalty, x_K * penalty)
        if (params.presence_penalty or params.frequency_penalty) and len(row.output_ids):
            unique, counts = np.unique(np.asarray(row.output_ids, np.int64), return_counts=True)
            cost = params.presence_penalty + params.frequency_penalty * counts
            logits_V[self._ids(unique, "output")] -= torch.from_numpy(cost.astype(np.float32)).to(self.device)

    def _ids(self, ids: np.ndarray[tuple[int], np.dtype[np.int64]], param: str) -> Tensor:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise InvalidRequestError(f"{param} holds a token id outside 0..{self.vocab_size - 1}", param=param)
        return torch.from_numpy(ids).to(self.device)

    def _allowed(self, masks: Tensor, num_rows: int) -> Tensor:
        if masks.dtype == torch.bool and masks.shape == (num_rows, self.vocab_size):
            return masks.to(self.device)
        if masks.dtype == torch.int32 and masks.shape == (num_rows, -(-self.vocab_size // 32)):
            bit = torch.arange(32, dtype=torch.int32, device=self.device)
            allowed = (masks.to(self.device).unsqueeze(-1) >> bit) & 1
            return allowed.view(num_rows, -1)[:, : self.vocab_size].bool()
        raise ValueError(
            f"masks must be bool [{num_rows}, {self.vocab_size}] or int32 [{num_rows}, {-(-self.vocab_size // 32)}], "
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


_GREEDY = Draw(0, 0.0, 0, 1.0, 0.0)


def _failure(status: DrawStatus) -> NanoDeployError | None:
    if status is DrawStatus.OK:
        return None
    if status is DrawStatus.EMPTY:
        return InvalidRequestError("no token is allowed: the grammar, bans and min_tokens leave nothing to draw")
    return InternalError("the model's logits are not finite numbers")
